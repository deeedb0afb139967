"""The rules of the house: what may import what, lines, numbers in titles, the sidebar, and paths of a machine.

Says what is wrong, and exits 1.

Run from the top of the repository:  python tools/check_house.py
"""
import ast
import json
import re
import sys
from pathlib import Path

import yaml

import compecon

EXPORTED, LESSON = 120, 88  # characters of a line
LAYERS = {'study': 2, 'lab': 1}  # a part of the package imports from its own layer and from lower ones


def notebooks(folder):
    "Numbered notebooks, in order: path and cells"
    files = [p for p in folder.glob('*.ipynb') if re.match(r'\d\d[a-z]?_', p.name)]
    return [(p, json.loads(p.read_text(encoding='utf-8'))['cells']) for p in sorted(files, key=number)]


def number(path):
    "Its place in the order: '20b_training' comes after '20_market'"
    found = re.match(r'(\d\d)([a-z]?)_', path.name)
    return int(found[1]), found[2]


def source(cell): return ''.join(cell['source'])


def is_exported(cell): return bool(re.search(r'^#\|\s*exports?\b', source(cell), re.M))


def module_of(cells):
    "The module that a notebook writes, or `None`"
    found = [m[1] for c in cells if (m := re.search(r'^#\|\s*default_exp\s+(\S+)', source(c), re.M))]
    return found[0] if found else None


def home(name):
    "The module that a name of the front door is from; another name is that of a module"
    return getattr(compecon, name).__module__.removeprefix('compecon.') if name in compecon.__all__ else name


def imported(code):
    "Modules of the package that some code imports, by their names or through the front door"
    tree = ast.parse(re.sub(r'^\s*[%!].*$', '', code, flags=re.M))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or '').split('.')[0] == 'compecon':
            inside = node.module.removeprefix('compecon').removeprefix('.')
            yield from [inside] if inside else [home(a.name) for a in node.names]
        if isinstance(node, ast.Import):
            yield from (a.name.removeprefix('compecon').removeprefix('.') for a in node.names
                        if a.name.split('.')[0] == 'compecon')


def second_pages(found):
    "Names that a notebook adds to a module that another one begins: by module and name, the notebook"
    added = {}
    for path, cells in found:
        for cell in cells:
            module = re.search(r'^#\|\s*exports?[ \t]+(\S+)', source(cell), re.M)
            if not module: continue
            names = (getattr(node, 'name', None) for node in ast.parse(source(cell)).body)
            added |= {(module[1], name): path for name in names if name}
    return added


def check_second_pages(found):
    "What a second page adds to a module is not imported before it, but by the module's own first page"
    added = second_pages(found)
    for path, cells in found:
        if number(path)[0] == 0: continue
        for cell in (c for c in cells if c['cell_type'] == 'code'):
            tree = ast.parse(re.sub(r'^\s*[%!].*$', '', source(cell), flags=re.M))
            for node in (n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)):
                module = (node.module or '').removeprefix('compecon.')
                for alias in node.names if module != module_of(cells) else []:
                    page = added.get((module, alias.name), path)
                    if number(page) > number(path): yield f'{path} imports {alias.name} of the later {page.name}'


def check_imports(found):
    "A notebook imports from lower numbers only; the core from neither lab nor study, lab not from study"
    owner = {module_of(cells): path for path, cells in found if module_of(cells)}
    for path, cells in found:
        if number(path)[0] == 0: continue  # the tour and the recipes show what the others make
        mine = module_of(cells)
        for cell in (c for c in cells if c['cell_type'] == 'code'):
            for name in imported(source(cell)):
                if name in owner and number(owner[name]) > number(path):
                    yield f'{path} imports compecon.{name}, which the later notebook {owner[name].name} writes'
                theirs = LAYERS.get(name.split('.')[0], 0)
                if mine and is_exported(cell) and theirs > LAYERS.get(mine.split('.')[0], 0):
                    yield f'{path}: compecon.{mine} may not import compecon.{name}'


def check_package(folder):
    "The same for the generated package, whose imports are relative, or stand within functions"
    for path in sorted(folder.rglob('*.py')):
        if path.name == '_modidx.py': continue
        parts = path.relative_to(folder).parts
        mine = LAYERS.get(parts[0], 0)
        code = path.read_text(encoding='utf-8')
        relative = [n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.ImportFrom) and n.level]
        above = {n: parts[:len(parts) - n.level] for n in relative}  # folders that an import starts from
        for name in ['.'.join([*above[n], n.module or '']) for n in relative] + [*imported(code)]:
            if LAYERS.get(name.split('.')[0], 0) > mine: yield f'{path} may not import compecon.{name}'


def check_lines(found, scripts):
    "Exported code and scripts within 120 characters, lesson cells within 88; an alt text is one line of any length"
    for path, cells in found:
        for cell in (c for c in cells if c['cell_type'] == 'code'):
            limit = EXPORTED if is_exported(cell) else LESSON
            for line in source(cell).split('\n'):
                if len(line) > limit and not line.startswith('#| fig-alt'):
                    yield f'{path}: {len(line)} characters, over {limit}: {line.strip()[:60]}...'
    for path in scripts:
        for i, line in enumerate(path.read_text(encoding='utf-8').split('\n'), 1):
            if len(line) > EXPORTED: yield f'{path}:{i} has {len(line)} characters, over {EXPORTED}'


def check_titles(found, folder):
    "A notebook has a number, and its title begins with it"
    for path in {*folder.glob('*.ipynb')} - {path for path, _ in found} - {folder/'index.ipynb'}:
        yield f'{path} has no number: the name of a notebook begins like 33_shrink, or 32a_halving'
    for path, cells in found:
        wanted = re.match(r'\d\d[a-z]?', path.name)[0]
        title = source(cells[0]).split('\n')[0]
        if not re.match(rf'# {wanted} \S', title):
            yield f'{path} begins with {title!r}: its title must begin with "# {wanted} "'


def check_pages(found):
    "A page is named after its notebook without the number, so no two notebooks may share that name"
    names = [re.sub(r'^\d\d[a-z]?_', '', path.stem) for path, _ in found]
    for name in sorted({n for n in names if names.count(n) > 1}):
        yield f'{names.count(name)} notebooks write the page {name}.html: rename all but one'


def check_links(found):
    "nbdev links a name in backquotes by itself, which breaks a link around it"
    for path, cells in found:
        for cell in cells:
            for text in re.findall(r'\[`\w+`\]\([^)]*\)', source(cell) if cell['cell_type'] == 'markdown' else ''):
                yield f'{path}: {text} is no link on its page: take the backquotes off'


def check_paths(folder):
    "Neither code nor what it printed names a folder of a machine"
    for path in sorted(folder.glob('*.ipynb')):
        for cell in json.loads(path.read_text(encoding='utf-8'))['cells']:
            printed = [o.get('text', []) for o in cell.get('outputs', [])]
            shown = [v for o in cell.get('outputs', []) for kind, v in o.get('data', {}).items() if 'image' not in kind]
            text = ''.join(''.join(part) for part in [cell['source'], *printed, *shown])
            for name in re.findall(r'/(?:work|root|home|Users|tmp)/\w[\w./-]*|[\w./-]+/site-packages/\w+', text):
                yield f'{path}, cell {cell["id"]}: {name} is a path of this machine: take it out, or clear the output'


def check_noise(folder):
    "Warnings and bars that a cell wrote while it ran are no part of its page"
    for path in sorted(folder.glob('*.ipynb')):
        for cell in json.loads(path.read_text(encoding='utf-8'))['cells']:
            if any(o.get('name') == 'stderr' for o in cell.get('outputs', [])):
                yield f'{path}, cell {cell["id"]} shows what it wrote to stderr: clear that output'


def check_sidebar(found, config):
    "Every notebook is in the sidebar, once"
    contents = config['website']['sidebar']['contents']
    listed = [item for section in contents for item in section['contents']]
    for path in [Path('nbs/index.ipynb'), *(p for p, _ in found)]:
        if listed.count(path.name) != 1:
            yield f'{path} is {listed.count(path.name)} times in the sidebar: add it once to its group in _quarto.yml'
    if listed != sorted(listed, key=lambda name: (name != 'index.ipynb', name)):
        yield '_quarto.yml lists notebooks in another order than that of their numbers'
    for name in listed:
        if not Path('nbs', name).exists(): yield f'_quarto.yml lists {name}, which is not there'


def main():
    found = notebooks(Path('nbs'))
    folders = 'experiments', 'benchmarks', 'tools', 'tools/quarto', '.'
    scripts = [p for folder in folders for p in sorted(Path(folder).glob('*.py'))]
    config = yaml.safe_load(Path('_quarto.yml').read_text(encoding='utf-8'))
    wrong = [*check_imports(found), *check_second_pages(found), *check_package(Path('compecon')),
             *check_lines(found, scripts), *check_titles(found, Path('nbs')), *check_pages(found), *check_links(found),
             *check_sidebar(found, config), *check_paths(Path('nbs')), *check_noise(Path('nbs'))]
    print('\n'.join(wrong) if wrong else f'{len(found)} notebooks in order')
    sys.exit(bool(wrong))


if __name__ == '__main__': main()
