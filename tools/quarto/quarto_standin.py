"""`quarto`, as far as nbdev calls it. The real one is used wherever it is on the PATH; else smalldocs renders the site.

Maths become MathML while rendering, so that pages need nothing from the network.
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


def real_quarto():
    "A Quarto elsewhere on the PATH, or `None`"
    me = Path(sys.argv[0]).resolve()
    for folder in os.environ.get('PATH', '').split(os.pathsep):
        found = shutil.which('quarto', path=folder)
        if found and Path(found).resolve() != me: return found


def output_folder(): return Path(yaml.safe_load(Path('nbdev.yml').read_text())['project']['output-dir'])


def mathml(page):
    "Replace TeX by MathML in a page, and drop the renderer that it would have loaded"
    def one(match):
        tex, display = html.unescape(match[2]), 'block' if match[1] == 'display' else 'inline'
        return convert(tex, display=display)
    page = re.sub(r'<span class="math (inline|display)">\\[(\[](.*?)\\[)\]]</span>', one, page, flags=re.S)
    return re.sub(r'<(script|link)[^>]*cdn\.jsdelivr\.net/npm/katex[^>]*>(</script>)?', '', page)


def render_site():
    "The project in this folder, to the output folder that it names"
    out = output_folder()
    shutil.rmtree(out, ignore_errors=True)  # the README may have left its pictures here
    status = subprocess.run([sys.executable, '-m', 'smalldocs.cli', 'render', '--quiet', '.']).returncode
    if status: return status
    for page in out.rglob('*.html'): page.write_text(mathml(page.read_text(encoding='utf-8')), encoding='utf-8')
    return 0


def render_markdown(notebook, name):
    "One notebook as GitHub's Markdown, with its pictures beside it"
    out, images = output_folder(), f'{Path(notebook).stem}_files'
    (out/images).mkdir(parents=True, exist_ok=True)
    parts = []
    for n, cell in enumerate(json.loads(Path(notebook).read_text(encoding='utf-8'))['cells']):
        source = ''.join(cell['source'])
        if cell['cell_type'] == 'markdown': parts.append(source)
        if cell['cell_type'] != 'code' or re.search(r'^#\|\s*(hide|include: false)', source, re.M): continue
        code = '\n'.join(l for l in source.split('\n') if not l.startswith('#|'))
        if not re.search(r'^#\|\s*echo:\s*false', source, re.M): parts.append(f'```python\n{code}\n```')
        for i, output in enumerate(cell['outputs']):
            data = {k: ''.join(v) for k,v in output.get('data', {'text/plain': output.get('text', '')}).items() if not isinstance(v, dict)}
            if 'image/png' in data:
                (out/images/f'{n}-{i}.png').write_bytes(base64.b64decode(data['image/png']))
                parts.append(f'![]({images}/{n}-{i}.png)')
            elif 'text/html' in data: parts.append(re.sub(r'<style.*?</style>|\n\s*', '', data['text/html'], flags=re.S))
            elif 'text/markdown' in data: parts.append(data['text/markdown'])
            else: parts.append(f'```\n{data.get("text/plain", "").rstrip()}\n```')
    parts = [re.sub(r'\A---\n.*?\n---\n', '', p, flags=re.S) for p in parts]
    (out/name).write_text('\n\n'.join(p for p in parts if p.strip()) + '\n', encoding='utf-8')
    return 0


def main():
    quarto, args = None if 'QUARTO_STANDIN' in os.environ else real_quarto(), sys.argv[1:]
    os.environ['QUARTO_STANDIN'] = '1'  # what is found may be another stand-in, which must not look for this one
    if quarto: os.execv(quarto, [quarto, *args])
    if args[:1] == ['render'] and '-o' in args: sys.exit(render_markdown(args[1], args[args.index('-o') + 1]))
    if args[:1] == ['render']: sys.exit(render_site())
    if args[:1] == ['preview']: os.execv(sys.executable, [sys.executable, '-m', 'smalldocs.cli', 'preview', '.'])
    sys.exit(f'quarto (stand-in): {" ".join(args)} is not known; install Quarto from https://quarto.org')
