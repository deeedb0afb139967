"""Random calls of the processor's kernels under AddressSanitizer and UndefinedBehaviorSanitizer.

Run:  python tools/campaigns/kernels.py [--calls 2000] [--seed 0] [--variants avx512-bf16,avx2,generic] [--plain]

For each variant that this processor runs, the kernels are compiled with both sanitizers (g++), and a process of its own
calls them. `amx-emulated` is the variant for AMX, with its instructions in plain C++; it needs AVX-512 with bfloat16.
With --plain nothing watches but the comparison, which takes a tenth of the time. Calls have random shapes, open sets,
types of weights, activations, masks and numbers of threads, empty and unusual ones among them, and inputs that are not
finite. Every answer is compared with the reference's. The first report of a sanitizer ends the process.
"""
import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd

EMULATED = 'amx-emulated'
SANITIZERS = '-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1 -O2'.split()


def build_variant(variant, more, folder):
    "The library, with more flags"
    from compecon import native
    emulated = variant == EMULATED
    compiler, flags = native._cpu_command('avx512-bf16' if emulated else variant)
    flags = [*flags, *more, *(['-DCOMPECON_EMULATE_AMX'] if emulated else [])]
    return native.build_once(native._source('cpu'), compiler, flags, folder, variant)[0]


def watched():
    "What a process with sanitizers needs"
    files = [subprocess.run(['g++', f'-print-file-name={name}'], capture_output=True, text=True, check=True)
             .stdout.strip() for name in ('libasan.so', 'libubsan.so')]
    return dict(LD_PRELOAD=' '.join(files), ASAN_OPTIONS='detect_leaks=0', UBSAN_OPTIONS='print_stacktrace=1')


def run_variant(variant, library, args):
    "How many calls it stood, and what a sanitizer said"
    options = dict(COMPECON_KERNELS='torch') | ({} if args.plain else watched())
    command = [sys.executable, '-W', 'ignore', __file__, '--library', str(library), '--calls', str(args.calls),
               '--seed', str(args.seed)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **options})
    lines = done.stdout.split()
    said = next((line for line in done.stderr.splitlines() if 'ERROR' in line or 'runtime error' in line), '')
    last = done.stderr.strip().splitlines()[-1:] if done.returncode else []
    return dict(variant=variant, calls=int(lines[-1]) if lines else 0, wrong=0 if not done.returncode else 1,
                report=said or ''.join(last))


class Case:
    "One random call of each operator, and the same of its reference"
    def __init__(self, torch, kernels):
        self.torch, self.kernels = torch, kernels
        self.draw = lambda *of: of[torch.randint(len(of), ()).item()]
        draw = self.draw
        self.groups, self.rows = draw((1, 1), (1, 2), (1, 13), (1, 37), (1, 97), (1, 250), (3, 1), (40, 1), (4, 9),
                                      (2, 100), (5, 0))
        self.width, self.blocks = draw(16, 32, 48, 64), draw(1, 2, 5, 9)
        self.inputs, self.outputs = draw(16, 32, 64, 100, 192), draw(16, 48, 64, 96)
        self.dtype = draw(None, None, torch.bfloat16, torch.int8)
        self.share, self.activation = draw(0., .3, .6, 1.), draw(0, 1, 2, 3, 4)
        torch.set_num_threads(draw(1, 1, 2, 4))

    def opened(self, groups, n): return self.torch.rand(groups, n) < self.share

    def bias(self, n): return self.draw(None, self.torch.randn(n))

    def numbers(self, *shape):
        x = self.torch.randn(*shape)*self.draw(1., 1e-30, 1e3)
        if x.numel() and self.draw(*[False]*9, True):
            x.view(-1)[self.torch.randint(x.numel(), ())] = self.draw(float('nan'), float('inf'), -float('inf'))
        return x.transpose(-1, -2).contiguous().transpose(-1, -2) if self.draw(False, False, True) else x

    def ffn(self):
        k, t = self.kernels, self.torch
        features = self.blocks*self.width
        def first(): return *k.pack_up(t.randn(features, self.inputs), self.width, self.dtype), self.bias(features)
        up, gate = first(), self.draw((None, None, None), first())
        down = *k.pack_down(t.randn(self.outputs, features), self.width, self.dtype), self.bias(self.outputs)
        s = k.open_set(self.opened(self.groups, self.blocks))
        x = self.numbers(self.groups, self.rows, self.inputs)
        args = (x, *up, *gate, *down, s.group, s.block, self.activation)
        yield t.ops.compecon.ffn(*args), k._ffn_reference(*args)
        args = (x, *up, s.group, s.block, self.activation, self.draw(False, True))
        h = t.ops.compecon.up(*args)
        yield h, k._up_reference(*args)
        args = (h, *down, s.group, s.block, self.groups)
        yield t.ops.compecon.down(*args), k._down_reference(*args)

    def sublayers(self):
        k, t = self.kernels, self.torch
        heads, dim, width = self.draw(1, 3, 4), self.draw(16, 32), self.draw(32, 64, 96)
        groups, tokens = self.draw(1, 1, 2, 4), self.draw(0, 1, 2, 13, 16, 17, 50, 130)
        def tensors(n, reads, writes):
            none = t.empty(0)
            (up, up_scale), (down, down_scale) = (k.pack_up(t.randn(n*reads, width), reads, self.dtype),
                                                  k.pack_down(t.randn(width, n*writes), writes, self.dtype))
            scales = [none if s is None else s for s in (up_scale, down_scale)]
            biases = [none if b is None else b for b in (self.bias(n*reads), self.bias(width))]
            return [up, scales[0], biases[0], down, scales[1], biases[1], t.rand(width), t.randn(width)]
        kinds = self.draw([k.HEADS], [self.activation], [k.HEADS, self.activation],
                          [k.HEADS, self.activation, k.HEADS, self.activation])
        sizes = [heads if kind == k.HEADS else self.blocks for kind in kinds]
        weights = [w for kind, n in zip(kinds, sizes)
                   for w in (tensors(n, 3*dim, dim) if kind == k.HEADS else tensors(n, self.width, self.width))]
        x = self.numbers(groups*self.draw(1, 2), tokens, width)
        masks = (None, t.rand(len(x), 1, tokens, tokens) < .8, t.randn(len(x), 1, 1, tokens),
                 t.rand(1, 1, 1, tokens) < .5, (t.rand(len(x), 1, 1, tokens) < .7).expand(-1, 1, tokens, -1),
                 t.randn(1, 1, tokens, tokens).log())  # of which half is no number
        args = (x, self.draw(*masks), self.opened(groups, sum(sizes)), kinds, weights, 1e-5)
        yield t.ops.compecon.sublayers(*args), k._sublayers_reference(*args)

    def shown(self): return {k: v for k, v in vars(self).items() if isinstance(v, int | float | self.torch.dtype)}

    def wrong(self):
        "Names of operators whose answer is not the reference's"
        most = {None: 2e-4, self.torch.bfloat16: 2e-2, self.torch.int8: 5e-2}[self.dtype]
        for y, same in [*self.ffn(), *self.sublayers()]:
            if y.shape != same.shape: yield f'{tuple(y.shape)} for {tuple(same.shape)}'
            elif y.numel() and not self.close(y, same, most): yield f'{self.shown()}'

    def close(self, y, same, most):
        "Are both finite in the same places, and there alike?"
        y, same, finite = y.double(), same.double(), same.isfinite()
        if not y.isfinite().equal(finite): return False
        return (y - same)[finite].norm() <= most*same[finite].norm() + 1e-34


def call(library, calls, seed):
    "In a process with sanitizers: random calls, four a case"
    import torch

    from compecon import kernels
    torch.ops.load_library(library)
    torch.manual_seed(seed)
    made = 0
    with torch.no_grad():
        while made < calls:
            for wrong in Case(torch, kernels).wrong(): raise SystemExit(f'not what the reference gives: {wrong}')
            made += 4
            if made % 400 == 0: print(made, flush=True)
    print(made)


def keep_rows(found):
    "In the records, as those of other campaigns"
    import common
    common.keep('kernels under sanitizers', [
        dict(campaign=row['variant'], tried=row['calls'], clear=row['calls'] - row['wrong'], wrong=row['wrong'])
        for row in found])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--calls', type=int, default=2000, help='of each variant (2000)')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--variants', help='separated by commas (all that this processor runs)')
    parser.add_argument('--plain', action='store_true', help='without sanitizers')
    parser.add_argument('--library', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.library: return call(args.library, args.calls, args.seed)
    from compecon import native
    found, here = [], native.variants()
    if 'avx512-bf16' in here: here.insert(0, EMULATED)
    with tempfile.TemporaryDirectory() as folder:
        if 'avx512' in here and not args.variants: build_variant('amx', [], Path(folder))  # it is at least a library
        for variant in args.variants.split(',') if args.variants else here:
            if variant not in here:
                print(f'{variant}: skipped, this processor runs {", ".join(here)}', flush=True)
                continue
            library = build_variant(variant, [] if args.plain else SANITIZERS, Path(folder))
            found.append(run_variant(variant, library, args))
            print(pd.DataFrame(found[-1:]).to_markdown(index=False), flush=True)
    if not args.plain: keep_rows(found)
    if any(row['wrong'] or row['calls'] < args.calls for row in found): raise SystemExit(1)


if __name__ == '__main__': main()
