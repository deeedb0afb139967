"""Opens every link of the built site that leads to the site itself: pages, anchors, pictures.

Says which lead nowhere, and exits 1.

Run from the top of the repository, after nbdev_docs:  python tools/check_links.py
"""
import configparser
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

SITE = Path('_docs')


class Page(HTMLParser):
    "Links of a page and the anchors in it"
    def __init__(self, text):
        super().__init__()
        self.links, self.anchors = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors |= {attrs[k] for k in ('id', 'name') if attrs.get(k)}
        self.links += [attrs[k] for k in ('href', 'src') if attrs.get(k)]


def home():
    "The address at which the site will be served"
    settings = configparser.ConfigParser(delimiters=['='])
    settings.read('settings.ini')
    return settings['DEFAULT']['doc_host'] + settings['DEFAULT']['doc_baseurl']


def target(link, page, address):
    "The file and the anchor that a link leads to; `None` for another site"
    if link.startswith(address): link = link.removeprefix(address).lstrip('/') or 'index.html'
    parts = urlsplit(link)
    if parts.scheme or parts.netloc: return None
    file = SITE/unquote(parts.path).lstrip('/') if parts.path.startswith('/') else page.parent/unquote(parts.path)
    if not parts.path: file = page
    return (file/'index.html' if file.is_dir() else file), unquote(parts.fragment)


def main():
    pages = {p.resolve(): Page(p.read_text(encoding='utf-8')) for p in SITE.rglob('*.html')}
    if not pages: sys.exit(f'{SITE} has no pages: run nbdev_docs first')
    address, wrong, count = home(), [], 0
    for path, page in pages.items():
        for link in page.links:
            found = target(link, path, address)
            if found is None: continue
            file, anchor = found[0].resolve(), found[1]
            count += 1
            if not file.exists(): wrong.append(f'{path.name}: {link} leads nowhere')
            elif anchor and file in pages and anchor not in pages[file].anchors:
                wrong.append(f'{path.name}: {link} leads to no place on {file.name}')
    print('\n'.join(sorted(set(wrong))) if wrong else f'{count} links on {len(pages)} pages lead somewhere')
    sys.exit(bool(wrong))


if __name__ == '__main__': main()
