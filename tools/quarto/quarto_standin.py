"""`quarto`, as far as nbdev calls it. The real one is used wherever it is on the PATH; else smalldocs renders the site.

Before either renders, signatures lose what only Python's own repr wants and what the code beneath them repeats, and
notebooks that run anywhere get a link to Colab. With smalldocs, maths become MathML, so that pages need nothing from
the network, and pages get the names that their front matter gives them as `output-file`.
"""
import base64
import html
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml
from latex2mathml.converter import convert

TEXT = '.html', '.json', '.xml', '.txt', '.md'  # where pages are named
COLAB = 'https://colab.research.google.com/github/compecon/compecon/blob/main/nbs'


def real_quarto():
    "A Quarto elsewhere on the PATH, or `None`"
    me = Path(sys.argv[0]).resolve()
    for folder in os.environ.get('PATH', '').split(os.pathsep):
        found = shutil.which('quarto', path=folder)
        if found and Path(found).resolve() != me: return found


def output_folder(): return Path(yaml.safe_load(Path('nbdev.yml').read_text())['project']['output-dir'])


def cells_of(notebook): return json.loads(Path(notebook).read_text(encoding='utf-8'))['cells']


def front_matter(notebook):
    "What the first cell of a notebook says about its page"
    source = ''.join((cells_of(notebook) or [dict(source='')])[0]['source'])
    found = re.match(r'---\n(.*?)\n---', source, re.S)
    return yaml.safe_load(found[1]) if found else {}


def short_annotations(code):
    "Annotations by their last name, as in `Path` for `pathlib.Path`; no type where there is none"
    code = code.replace(':NoneType=None', '=None')
    code = re.sub(r'\b(?:before|after)_\w+=None,?\s*', '', code)  # fastai's callbacks take a function for each event
    return re.sub(r'\b(?!torch\.\w+\b(?!\.))(?:\w+\.)+(?=[A-Z])', '', code)


def clean_signature(fence):
    "The code of a documented function: short annotations, and no links within its comments"
    lines = []
    for line in fence.split('\n'):
        code, mark, comment = line.partition('#')
        line = short_annotations(code) + mark + re.sub(r'\[(`[^`]+`)\]\([^)]+\)', r'\1', comment)
        if line.strip(): lines.append(line)
    return '\n'.join(lines).replace('(\n)', '()')


def clean_text(text):
    "Markdown with such signatures, and without nbdev's links to private names, which no page has a place for"
    text = re.sub(r'(?<=```python\n).*?(?=\n```)', lambda m: clean_signature(m[0]), text, flags=re.S)
    return re.sub(r'\[(`_\w+`)\]\([^)]*#_[^)]*\)', r'\1', text)


def say_once(cells):
    "Where a function's code is shown with its heading, the heading does not repeat the signature and the docstring"
    for doc, code in zip(cells, cells[1:]):
        named = re.search(r'^show_doc\((?:\w+\.)*(\w+)', ''.join(doc['source']), re.M)
        if not named or code['cell_type'] != 'code': continue
        if not re.search(rf'^\s*(?:def|class) {named[1]}\b', ''.join(code['source']), re.M): continue
        for data in (o['data'] for o in doc['outputs'] if 'text/markdown' in o.get('data', {})):
            data['text/markdown'] = ''.join(data['text/markdown']).partition('```python')[0]


def hidden_answer(cell):
    "The answer of an exercise, code and output, hidden until it is opened"
    source = re.sub(r'^#\| code-(fold|summary):.*\n', '', ''.join(cell['source']), flags=re.M)
    before, after = '<details><summary>Answer</summary>', '</details>'
    shown = [dict(cell_type='markdown', metadata={}, source=part) for part in (before, after)]
    return [shown[0], cell | dict(source=source), shown[1]]


def with_colab(front, name):
    "Front matter with a link to the notebook in Colab"
    found = yaml.safe_load(front.strip().strip('-'))
    found['other-links'] = [dict(text='Open in Colab', href=f'{COLAB}/{name}', icon='box-arrow-up-right')]
    return f'---\n{yaml.safe_dump(found, sort_keys=False)}---\n'


def prepare(notebook):
    "Clean what nbdev wrote; hide answers; link to Colab from a notebook whose source installs the package there"
    found = json.loads(notebook.read_text(encoding='utf-8'))
    cells = found['cells']
    for data in (o.get('data', {}) for cell in cells for o in cell.get('outputs', [])):
        if 'text/markdown' in data: data['text/markdown'] = clean_text(''.join(data['text/markdown']))
    for cell in cells:
        if cell['cell_type'] == 'markdown': cell['source'] = clean_text(''.join(cell['source']))
    say_once(cells)
    found['cells'] = [part for cell in cells for part in (hidden_answer(cell) if is_answer(cell) else [cell])]
    source = Path('../nbs', notebook.name)
    if source.exists() and '%pip install' in source.read_text(encoding='utf-8'):
        cells[0]['source'] = with_colab(''.join(cells[0]['source']), notebook.name)
    notebook.write_text(json.dumps(found), encoding='utf-8')


def is_answer(cell): return cell['cell_type'] == 'code' and '#| code-summary: "Answer"' in ''.join(cell['source'])


def mathml(page):
    "Replace TeX by MathML in a page, and drop the renderer that it would have loaded"
    def one(match):
        tex, display = html.unescape(match[2]), 'block' if match[1] == 'display' else 'inline'
        return convert(tex, display=display)
    page = re.sub(r'<span class="math (inline|display)">\\[(\[](.*?)\\[)\]]</span>', one, page, flags=re.S)
    return re.sub(r'<(script|link)[^>]*cdn\.jsdelivr\.net/npm/katex[^>]*>(</script>)?', '', page)


def rename_pages(out):
    "Give pages their `output-file`, and have everything that names them say so"
    names = {n.stem: Path(front_matter(n).get('output-file', n.stem)).stem for n in Path('.').glob('*.ipynb')}
    names = {old: new for old, new in names.items() if old != new and (out/f'{old}.html').exists()}
    for old, new in names.items():
        for page in out.glob(f'{old}.*'): page.rename(out/page.name.replace(old, new, 1))
    if not names: return
    known = re.compile(r'(?<![\w.-])(' + '|'.join(map(re.escape, names)) + r')(?=\.(?:html|llms\.md)\b)')
    for file in (f for f in out.rglob('*') if f.suffix in TEXT):
        text = file.read_text(encoding='utf-8')
        file.write_text(known.sub(lambda m: names[m[1]], text), encoding='utf-8')


def land_methods(out):
    "Links to a method lead to its class, where only the class has a place on the page"
    anchors = {p.name: set(re.findall(r'\bid="([^"]+)"', p.read_text(encoding='utf-8'))) for p in out.glob('*.html')}
    def one(match):
        page, place = match[1], match[2]
        known = anchors.get(page, {place})
        return match[0] if place in known or '.' not in place else f'{page}#{place.split(".")[0]}"'
    for file in out.glob('*.html'):
        text = file.read_text(encoding='utf-8')
        file.write_text(re.sub(r'([\w-]+\.html)#([\w.-]+)"', one, text), encoding='utf-8')


def render_site():
    "The project in this folder, to the output folder that it names"
    out = output_folder()
    shutil.rmtree(out, ignore_errors=True)  # the README may have left its pictures here
    status = subprocess.run([sys.executable, '-m', 'smalldocs.cli', 'render', '--quiet', '.']).returncode
    if status: return status
    for page in out.rglob('*.html'): page.write_text(mathml(page.read_text(encoding='utf-8')), encoding='utf-8')
    rename_pages(out)
    land_methods(out)
    return 0


def output_text(output, images, name, alt):
    "One output of a cell as GitHub's Markdown; a picture is written into a folder"
    data = output.get('data', {'text/plain': output.get('text', '')})
    data = {k: ''.join(v) for k, v in data.items() if not isinstance(v, dict)}
    if 'image/png' in data:
        (images/f'{name}.png').write_bytes(base64.b64decode(data['image/png']))
        return f'![{alt}]({images.name}/{name}.png)'
    if 'text/html' in data: return re.sub(r'<style.*?</style>|\n\s*', '', data['text/html'], flags=re.S)
    if 'text/markdown' in data: return data['text/markdown']
    return f'```\n{data.get("text/plain", "").rstrip()}\n```'


def cell_texts(cell, images, number):
    "The parts of a cell, as its directives say"
    source = ''.join(cell['source'])
    if cell['cell_type'] == 'markdown': return [re.sub(r'\A---\n.*?\n---\n', '', source, flags=re.S)]
    if cell['cell_type'] != 'code' or re.search(r'^#\|\s*(hide|include: false)', source, re.M): return []
    code = '\n'.join(line for line in source.split('\n') if not line.startswith('#|'))
    shown = [] if re.search(r'^#\|\s*echo:\s*false', source, re.M) else [f'```python\n{code}\n```']
    alt = re.search(r'^#\|\s*fig-alt:\s*"(.*)"', source, re.M)
    alt = alt[1] if alt else ''
    return shown + [output_text(o, images, f'{number}-{i}', alt) for i, o in enumerate(cell['outputs'])]


def render_markdown(notebook, name):
    "One notebook as GitHub's Markdown, with its pictures beside it"
    out = output_folder()
    images = out/f'{Path(notebook).stem}_files'
    images.mkdir(parents=True, exist_ok=True)
    title = front_matter(notebook).get('title')
    parts = [f'# {title}'] if title else []
    parts += [part for n, cell in enumerate(cells_of(notebook)) for part in cell_texts(cell, images, n)]
    (out/name).write_text('\n\n'.join(p for p in parts if p.strip()) + '\n', encoding='utf-8')
    return 0


def main():
    quarto, args = None if 'QUARTO_STANDIN' in os.environ else real_quarto(), sys.argv[1:]
    os.environ['QUARTO_STANDIN'] = '1'  # what is found may be another stand-in, which must not look for this one
    if args[:1] == ['render'] and '-o' not in args:
        for notebook in Path('.').glob('*.ipynb'): prepare(notebook)
    if quarto: os.execv(quarto, [quarto, *args])
    if args[:1] == ['render'] and '-o' in args: sys.exit(render_markdown(args[1], args[args.index('-o') + 1]))
    if args[:1] == ['render']: sys.exit(render_site())
    if args[:1] == ['preview']: os.execv(sys.executable, [sys.executable, '-m', 'smalldocs.cli', 'preview', '.'])
    sys.exit(f'quarto (stand-in): {" ".join(args)} is not known; install Quarto from https://quarto.org')
