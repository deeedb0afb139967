"""Command lines that cannot be right: is each refused in one sentence, before any training?

Run:  python tools/campaigns/commands.py [--short] [--all]

Numbers that cannot be, unknown names, files that are missing, torn or of another kind, model folders that are not whole,
places that cannot be written. `compecon` is called in this process, with a tiny model. `clear` is exit code 2 or 130,
one line, no traceback; `late` is training before the refusal; `wrong` is exit code 0; the rest is `unclear`. With --short only every seventh
is tried; with --all what was said is printed.
"""
import argparse
import json
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

import pandas as pd
from typer.testing import CliRunner

import common
from compecon.agents import tiny_model
from compecon.lab import cli, experiment

NUMBERS = '', 'abc', 'nan', 'inf', '-1', '0', '1e999', '0,0', '½'


def save_model(folder, **config):
    "A tiny BERT with a tokenizer that knows letters"
    common.letters().save_pretrained(folder)
    tiny_model('bert', **{'vocab_size': 64, **config}).save_pretrained(folder)
    return folder


def broken_models(work):
    "Folders that are no whole model, by what is wrong"
    def of(name, **config): return save_model(work/name.replace(' ', '-'), **config)
    def written(name, file, content):
        folder = of(name)
        (folder/file).write_bytes(content)
        return folder
    def without(name, *patterns):
        folder = of(name)
        for pattern in patterns:
            for file in folder.glob(pattern): file.unlink()
        return folder
    empty = work/'empty'
    empty.mkdir()
    whole = of('whole')
    weights, config = (whole/'model.safetensors').read_bytes(), json.loads((whole/'config.json').read_text())
    def configured(name, **changes):
        return written(name, 'config.json', json.dumps(config | changes).encode())
    return {
        'missing': work/'nowhere', 'an empty folder': empty, 'a file': whole/'config.json',
        'no config': without('no config', 'config.json'), 'no weights': without('no weights', '*.safetensors'),
        'no tokenizer': without('no tokenizer', 'tokenizer*', 'vocab*', 'special*'),
        'few embeddings': of('few embeddings', vocab_size=12),
        'torn weights': written('torn', 'model.safetensors', weights[:5000]),
        'weights of nothing': written('nothing', 'model.safetensors', b''),
        'a torn config': written('torn config', 'config.json', b'{"model_type": '),
        'a config of bytes': written('bytes', 'config.json', b'\xff\xfe\x00'),
        'a config that is a list': written('list', 'config.json', b'[]'),
        'a torn tokenizer': written('torn tokenizer', 'tokenizer.json', b'{'),
        'another size': configured('another size', hidden_size=64),
        'another kind': configured('another kind', model_type='vit'),
        'no kind': configured('no kind', model_type='nonesuch'),
        'no such class': configured('no such class', architectures=['nonesuch']),
        'a class that is no model': configured('no model', architectures=['pipeline'])}


def broken_files(work):
    "Files that hold no texts, by what is wrong"
    contents = {
        'empty.txt': b'', 'blank.txt': b'\n\n \n', 'bytes.txt': b'\xff\xfe\xfd', 'torn.jsonl': b'{"text": "a',
        'list.jsonl': b'[1, 2]\n', 'numbers.jsonl': b'{"text": 1}\n{"text": 2}\n', 'other.csv': b'a,b\n1,2\n',
        'empty.csv': b'', 'garbage.parquet': b'PAR1 and nothing', 'texts.doc': b'text', 'one.txt': b'a\n'}
    for name, content in contents.items(): (work/name).write_bytes(content)
    (work/'folder.txt').mkdir()
    return [work/name for name in contents if name != 'one.txt'] + [work/'missing.txt', work/'folder.txt', 'nobody/none']


def command_lines(work):
    "Pairs of a kind and the arguments"
    good, texts = str(save_model(work/'good')), work/'texts.txt'
    texts.write_text(''.join(f'{w} is a text of letters, as good as any.\n' for w in 'abcdefghijklmnop'*4))
    texts, out = str(texts), str(work/'out')
    frontier = ['frontier', '--model', good, '--samples', '32', '--dense-epochs', '1', '--epochs', '1', '--out', out]
    shrink = ['shrink', good, '--data', texts]
    for option in ('seeds', 'epochs', 'dense-epochs', 'lr', 'recover-lr', 'bs', 'samples', 'budgets'):
        for value in NUMBERS:
            if value == '0' and 'epochs' in option: continue  # is without training
            yield 'numbers', [*frontier, f'--{option}={value}']
    for value in NUMBERS:
        for option in ('samples', 'budget'): yield 'numbers', [*shrink, f'--{option}={value}']
        for option in ('batch', 'threads'): yield 'numbers', ['bench', good, '--data', texts, f'--{option}={value}']
    for budget in ('1.5', '0.4 watt', '60%', '-3 ms', '0.00001', '0.4 flops,0.3 volts'):
        yield 'numbers', [*shrink, '--budget', budget]
    for option, command in dict(methods=frontier, task=frontier, method=shrink, engine=shrink, column=shrink).items():
        for value in ('nonesuch', '', ',', 'repair,,fisher'): yield 'names', [*command, f'--{option}={value}']
    yield 'names', ['nonesuch']
    yield 'names', [*frontier, '--nonesuch']
    for value in ('nonesuch', ''):
        yield 'names', ['export', good, '--data', texts, '--out', out, f'--to={value}']
        yield 'names', ['bench', good, '--data', texts, f'--engines={value}']
        yield 'names', ['evaluate', good, f'--task={value}']
        yield 'names', ['kernels', f'--prebuild={value or "none"}']
    for file in map(str, broken_files(work)):
        yield 'files', ['shrink', good, '--data', file]
        yield 'files', [*shrink, '--other', file]
        yield 'files', ['export', good, '--data', file, '--out', out]
        yield 'files', ['bench', good, '--data', file]
        yield 'files', [*frontier, '--task', 'cola', '--data', file]
    for wrong, folder in broken_models(work).items():
        folder = str(folder)
        yield 'models', ['shrink', folder, '--data', texts]
        if 'class' not in wrong:  # these take it as a classifier, whatever it was saved as
            yield 'models', ['frontier', '--model', folder, *frontier[3:]]
            yield 'models', ['evaluate', folder]
        yield 'models', ['export', folder, '--data', texts, '--out', out]
        yield 'models', ['bench', folder, '--data', texts]
    mine = work/'mine'
    mine.mkdir()
    (mine/'thesis.tex').write_text('precious')
    for place in (texts, f'{texts}/below', '/proc/nope', '/dev/null', '/dev/full'):
        yield 'places', [*frontier[:-1], place]
        yield 'places', [*shrink, '--budget', '0.5', '--out', place]
        yield 'places', [*shrink, '--out', place]
        yield 'places', ['export', good, '--data', texts, '--out', place]
    yield 'places', [*shrink, '--budget', '0.5', '--out', str(mine)]
    yield 'places', ['export', good, '--data', texts, '--out', str(mine)]


class Trained(BaseException): "Something would have been trained"


def tried(arguments):
    "How a command line ended, and what it said"
    def train(*_, **__): raise Trained
    with patch.object(experiment, 'finetune', train), patch.object(cli, '_quiet', lambda: None):
        try: done = CliRunner().invoke(cli.app, arguments, catch_exceptions=True)
        except Trained: return 'late', 'something was trained'
    said = done.output.strip()
    if done.exit_code == 0: return 'wrong', said[-200:]
    if isinstance(done.exception, SystemExit):
        lines = [line for line in done.output.splitlines() if 'compecon: ' in line or 'Error' in line]
        return ('clear' if len(lines) == 1 and len(lines[0]) < 900 else 'unclear'), said[-300:]
    return 'unclear', f'{type(done.exception).__name__}: {done.exception}'[:300]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--short', action='store_true', help='every seventh')
    parser.add_argument('--all', action='store_true', help='print what was said')
    args = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as work:
        lines = list(command_lines(Path(work)))
        for kind, arguments in lines[::7] if args.short else lines:
            how, said = tried(arguments)
            found.append((kind, how))
            if args.all or how != 'clear':
                shown = ' '.join(arguments).replace(work, '')
                print(f'{how}: {shown}\n    {said.replace(work, "")}', file=sys.stderr, flush=True)
    counts = pd.DataFrame(found, columns=['campaign', 'how']).value_counts().unstack(fill_value=0)
    counts = counts.reindex(columns=['clear', 'unclear', 'late', 'wrong'], fill_value=0)
    counts.insert(0, 'tried', counts.sum(axis=1))
    common.report('command lines', counts.reset_index().to_dict('records'), args.short)
    if counts[['unclear', 'late']].values.any(): raise SystemExit(1)


if __name__ == '__main__': main()
