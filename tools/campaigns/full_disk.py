"""A disk that is full, at any byte: is that said in one sentence, and is what was there before still whole?

Run:  python tools/campaigns/full_disk.py [--short] [--tries 300] [--seed 0]

A model is saved and records are appended where a file may have so many bytes and no more (RLIMIT_FSIZE), and, if this
is root, on small disks in memory (tmpfs) with so much room left. `clear` is success (`written`), or one sentence that
names the file; then the model at the place, if there was one, and the records are those of before, and nothing else
lies about. The rest is `wrong`, and `unclear` of these are those where only the sentence is.
"""
import argparse
import random
import resource
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import common

from compecon.lab.records import append_line, read_runs
from compecon.settle import save


def listed(folder): return {f: f.read_bytes() for f in sorted(folder.rglob('*')) if f.is_file()}


def limited(size):
    "Within this process, no file has more bytes"
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


class Full:
    "One campaign: something is written where there is little room, and what is left is judged"
    def __init__(self, rng, tries):
        self.rng, self.tries, self.rows = rng, tries, []
        self.models, self.tokenizer = [common.marked(mark) for mark in range(2)], common.letters()

    def over(self, folder):
        self.first(folder)
        save(self.models[0], folder/'model', self.tokenizer)
    def first(self, folder): append_line(dict(i=0, text='x'*3000), folder/'runs.jsonl')
    def save(self, folder): save(self.models[1], folder/'model', self.tokenizer)
    def append(self, folder): append_line(dict(i=1, text='x'*9000), folder/'runs.jsonl')

    def sizes(self, most): # All that matter, and others at random
        edges = [0, 1, 4095, 4096, most - 1, most]
        return edges + [self.rng.randrange(most) for _ in range(self.tries - len(edges))]

    def judge(self, folder, before, work):
        def go(say):
            work()
            say('done')
        code, said = common.in_child(go)
        sentence, files = said[-1] if said else '', listed(folder)
        if sentence == 'done':
            found = common.mark_of(folder/'model'), len(read_runs(folder/'runs.jsonl'))
            return 'written' if code == 0 and found in ((1, 1), (None, 2)) and not self.litter(folder) else 'wrong'
        if files != before or self.litter(folder): return 'wrong'
        one = code == 1 and sentence.startswith('ValueError: ') and str(folder) in sentence and len(said) == 1
        return 'clear' if one and 'cannot be written' in sentence and len(sentence) < 300 else 'unclear'

    def litter(self, folder): return {f.name for f in folder.iterdir()} - {'model', 'runs.jsonl'}

    def row(self, name, found):
        n = {k: found.count(k) for k in ('clear', 'unclear', 'wrong', 'written')}
        self.rows.append(dict(campaign=name, tried=len(found), clear=n['clear'] + n['written'],
                              wrong=n['wrong'] + n['unclear'], unclear=n['unclear'], written=n['written']))

    def by_limit(self, name, prepare, work, most):
        found = []
        for size in self.sizes(most):
            with tempfile.TemporaryDirectory(prefix='compecon-full-') as place:
                folder = Path(place)
                prepare(folder)
                def go():
                    limited(size)
                    work(folder)
                found.append(self.judge(folder, listed(folder), go))
        self.row(f'{name}, files of so many bytes', found)

    def on_disk(self, name, prepare, work, most):
        found = []
        for size in self.sizes(most):
            with small_disk() as folder:
                prepare(folder)
                fill(folder, size)
                before = listed(folder)
                found.append(self.judge(folder, before, lambda: work(folder)))
        self.row(f'{name}, a disk with so much room', found)


@contextmanager
def small_disk():
    "A folder that is a disk of its own; raises `OSError` if this process may not have one"
    with tempfile.TemporaryDirectory(prefix='compecon-full-') as place:
        done = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=1m', 'compecon-full', place], capture_output=True)
        if done.returncode: raise OSError(done.stderr.decode().strip())
        folder = Path(place, 'in')
        try:
            folder.mkdir()
            yield folder
        finally: subprocess.run(['umount', place], check=True)


def fill(folder, size):
    "Leave room for so many bytes, as far as pages allow"
    free = shutil.disk_usage(folder).free - size
    if free > 0: (folder.parent/'filler').write_bytes(b'x'*free)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--short', action='store_true')
    parser.add_argument('--tries', type=int, default=300, help='of each kind (300)')
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    full = Full(random.Random(args.seed), 20 if args.short else args.tries)
    with tempfile.TemporaryDirectory() as folder:
        full.over(Path(folder))
        largest = max(len(b) for b in listed(Path(folder)).values())
    kinds = (('first save', full.first, full.save, largest + 4096),
             ('save over a model', full.over, full.save, largest + 4096),
             ('append', full.first, full.append, 20_000))
    for name, prepare, work, most in kinds: full.by_limit(name, prepare, work, most)
    try:
        for name, prepare, work, most in kinds: full.on_disk(name, prepare, work, 2*most)
    except OSError as e: print(f'no small disks: {e}', file=sys.stderr)
    common.report('full disks', full.rows, args.short)


if __name__ == '__main__': main()
