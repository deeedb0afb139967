"""Sparse execution: products over open blocks against torch, and packed models against plain ones.

Run:  python benchmarks/sparse.py [--models bert,minilm] [--tokens 1,16,128,1024] [--open 1,0.75,0.6,0.5,0.25]
          [--parts ffn,attention,model] [--seconds 8] [--device cpu]

Every line of OUT/kernels.jsonl is one way to compute with a share of the agents open: its time as a share of dense
torch's, interleaved, in thread time, with quartiles; its error against float64; what it reads and computes in a second
(at one token beside a plain sum over as much memory, in the same rounds). Weights of `compecon` lie in huge pages;
`torch:dense, huge pages` is torch with the same. One thread, at least 12 layers with weights of their own (fewer would
stay in the caches), another random open set for each layer. `compecon` is ours, with weights as float32, bfloat16 or
int8; its peers are `masked` (everything is computed), `index_select` (open weights are copied together), `bmm` (block
by block, in a batch), and torch's dynamic int8.

`--tables` prints what is in OUT already, and measures nothing.
"""
import copy
import time
from functools import partial
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from compecon import native
from compecon.agents import example_inputs
from compecon.economy import Economy
from compecon.flops import latency
from compecon.kernels import ACTIVATIONS, down, ffn, open_set, pack_down, pack_up, up
from compecon.lab.records import append_line, provenance
from compecon.lab.scripts import read_args, script_parser
from compecon.packed import pack
from compecon.router import ContextualEconomy, calibrate, pack_router
from compecon.settle import settle

MODELS = dict(
    bert=dict(hidden_size=768, num_hidden_layers=12, intermediate_size=3072, num_attention_heads=12),
    minilm=dict(hidden_size=384, num_hidden_layers=6, intermediate_size=1536, num_attention_heads=12))
PARTS = 'ffn', 'attention', 'model'
LAYERS, BLOCK, HEADS_OPEN = 12, 32, 7
KEPT_AS = {'': None, ':bfloat16': torch.bfloat16, ':int8': torch.int8}  # names of ours, and how weights are kept


def some(n, share, groups=1):
    "Open sets, each of as many blocks"
    mask = torch.zeros(groups, n, dtype=torch.bool)
    for row in mask: row[torch.randperm(n)[:max(1, round(share*n))]] = True
    return mask


def features(blocks, width):
    "Numbers of the features of some blocks"
    return blocks[:, None].mul(width).add(torch.arange(width, device=blocks.device)).flatten()


def timed(calls, seconds, device):
    "Interleaved; in thread time on a processor with one thread"
    once = latency(calls, rounds=2, warmup=1, turn=0.001).ms.sum()/1e3
    rounds = int(min(40, max(5, seconds/(len(calls)*0.05 + 2*once))))
    alone = device == 'cpu' and torch.get_num_threads() == 1
    return latency(calls, rounds=rounds, clock=time.thread_time if alone else time.perf_counter)


def in_all_layers(way): return lambda: [way(i) for i in range(LAYERS)]


def relative(y, exact): return ((y.double() - exact).norm()/exact.norm()).item()


class FFNs:
    "Feed-forward networks of one size with weights of their own, in each layout that is compared"
    def __init__(self, config, tokens, device):
        self.hidden, self.neurons, self.tokens = config['hidden_size'], config['intermediate_size'], tokens
        self.device, self.blocks = device, self.neurons//BLOCK
        self.x = torch.randn(1, tokens, self.hidden, device=device)
        self.layers = [self._weights() for _ in range(LAYERS)]
        self.packed = {name: [self._packed(*l, dtype) for l in self.layers] for name, dtype in KEPT_AS.items()}
        panels = [p for ls in self.packed.values() for (a, _), _, (c, _), _ in ls for p in (a, c)]
        self.paged = [[w.clone() for w in l] for l in self.layers]
        native.huge_pages([*panels, *(w for l in self.paged for w in l)])
        self.batched = [self._batched(*l) for l in self.layers]
        self.int8_modules = [self._quantised(*l) for l in self.layers] if device == 'cpu' else []

    def _weights(self):
        def random(*shape, scale): return torch.randn(*shape, device=self.device)*scale
        H, N = self.hidden, self.neurons
        return random(N, H, scale=.03), random(N, scale=.1), random(H, N, scale=.03), random(H, scale=.1)

    def _packed(self, a, b, c, e, dtype): return pack_up(a, BLOCK, dtype), b, pack_down(c, BLOCK, dtype), e

    def _batched(self, a, b, c, e): # One matrix a block
        up = a.view(self.blocks, BLOCK, self.hidden).transpose(1, 2).contiguous()
        return up, b.view(self.blocks, 1, BLOCK), c.T.contiguous().view(self.blocks, BLOCK, self.hidden), e

    def _quantised(self, a, b, c, e):
        m = nn.Sequential(nn.Linear(self.hidden, self.neurons), nn.GELU(), nn.Linear(self.neurons, self.hidden))
        m[0].weight.data, m[0].bias.data, m[2].weight.data, m[2].bias.data = a, b, c, e
        return torch.ao.quantization.quantize_dynamic(m, {nn.Linear})

    def open(self, share):
        "Draw open sets: one a layer, and one a token of each layer"
        self.sets = [open_set(some(self.blocks, share).to(self.device)) for _ in range(LAYERS)]
        self.rows = [features(s.block, BLOCK) for s in self.sets]
        self.masks = [torch.zeros(self.neurons, device=self.device).index_fill(0, r, 1) for r in self.rows]
        if self.tokens > 1:
            self.by_token = [open_set(some(self.blocks, share, self.tokens).to(self.device)) for _ in range(LAYERS)]

    # Ways to compute layer `i`

    def _plain(self, a, b, c, e): return F.linear(F.gelu(F.linear(self.x[0], a, b)), c, e)
    def dense(self, i): return self._plain(*self.layers[i])
    def dense_paged(self, i): return self._plain(*self.paged[i])
    def dense_int8(self, i): return self.int8_modules[i](self.x)

    def masked(self, i):
        a, b, c, e = self.layers[i]
        return F.linear(F.gelu(F.linear(self.x[0], a, b))*self.masks[i], c, e)

    def selected(self, i):
        (a, b, c, e), r = self.layers[i], self.rows[i]
        return self._plain(a.index_select(0, r), b.index_select(0, r), c.index_select(1, r), e)

    def bmm(self, i):
        (a, b, c, e), k = self.batched[i], self.sets[i].block
        h = F.gelu(torch.bmm(self.x.expand(len(k), -1, -1), a[k]) + b[k])
        return torch.bmm(h, c[k]).sum(0) + e

    def ours(self, i, kept_as=''): return ffn(self.x, *self.packed[kept_as][i], self.sets[i])
    def by_tokens(self, i): return ffn(self.x.transpose(0, 1), *self.packed[''][i], self.by_token[i])

    def ways(self):
        "Name -> function of a layer's number"
        ways = {'torch:dense, huge pages, all open': self.dense_paged, 'torch:masked': self.masked,
                'torch:index_select': self.selected, 'torch:bmm': self.bmm}
        ways |= {f'compecon{name}': partial(self.ours, kept_as=name) for name in KEPT_AS}
        if self.tokens > 1: ways['compecon:token sets'] = self.by_tokens
        if self.int8_modules: ways['torch:int8, all open'] = self.dense_int8
        return ways

    def exact(self, token_sets):
        "What the first layer gives in float64"
        (a, _), b, (c, _), e = self.packed[''][0]
        x, opened = (self.x.transpose(0, 1), self.by_token[0]) if token_sets else (self.x, self.sets[0])
        x, a, b, c, e = (t.double() for t in (x, a, b, c, e))
        gate = None, None, None
        y = torch.ops.compecon.ffn_reference(x, a, None, b, *gate, c, None, e, opened.group, opened.block,
                                             ACTIVATIONS['gelu'])
        return y.view(self.tokens, self.hidden)


def memory_like(ffns, share):
    "As much memory as `compecon` reads at one token, or nothing"
    if ffns.tokens > 1 or ffns.device != 'cpu': return None
    memory = torch.ones(round(share*2*ffns.hidden*ffns.neurons*LAYERS))
    native.huge_pages([memory])
    return memory


def ffn_rows(config, tokens, shares, seconds, device):
    "Records of feed-forward networks alone"
    ffns = FFNs(config, tokens, device)
    for share in shares:
        ffns.open(share)
        ways, memory = ffns.ways(), memory_like(ffns, share)
        calls = {'dense': in_all_layers(ffns.dense)}
        if memory is not None: calls['read'] = memory.sum
        times = timed(calls | {k: in_all_layers(way) for k, way in ways.items()}, seconds, device)
        reads = None if memory is None else memory.nbytes/times.ms['read']/1e6
        for name, way in ways.items(): yield ffn_row(ffns, name, way, share, times, reads)


def ffn_row(ffns, name, way, share, times, reads):
    t, seconds = times.loc[name], times.ms[name]/1e3/LAYERS
    token_sets, all_open = name.endswith('token sets'), 'all open' in name
    opened = ffns.by_token[0] if token_sets else ffns.sets[0]
    computed = 1 if name == 'torch:masked' or all_open else opened.share
    bytes_each = dict(bfloat16=2, int8=1).get(name.split(':')[-1].split(',')[0], 4)
    weights = 2*ffns.hidden*ffns.neurons*computed
    error = None if all_open else relative(way(0).view(ffns.tokens, ffns.hidden), ffns.exact(token_sets))
    return dict(op='ffn', shape=f'{ffns.hidden}x{ffns.neurons}', batch=1, tokens=ffns.tokens, open=round(share, 4),
                backend=name, dense_ratio=t.ratio, low=t.low, high=t.high, ms=seconds*1e3,
                dense_ms=times.ms['dense']/LAYERS, error=error, gb_s=weights*bytes_each/seconds/1e9, read_gb_s=reads,
                tflop_s=2*ffns.tokens*weights/seconds/1e12)


class Attentions:
    "Attention of one size with weights of its own, some heads open"
    def __init__(self, config, tokens, batch, device):
        self.hidden, self.heads = config['hidden_size'], config['num_attention_heads']
        self.dim, self.tokens, self.batch, self.device = self.hidden//self.heads, tokens, batch, device
        self.x = torch.randn(1, batch*tokens, self.hidden, device=device)
        self.layers = [self._weights() for _ in range(LAYERS)]
        self.fused = [self._fused(*l) for l in self.layers]
        native.huge_pages([panels for (a, _), _, (c, _), _ in self.fused for panels in (a, c)])
        self.sets = [open_set(some(self.heads, HEADS_OPEN/self.heads).to(device)) for _ in range(LAYERS)]

    def _weights(self): # Of query, key, value and output
        H = self.hidden
        weights = [torch.randn(H, H, device=self.device)*.05 for _ in range(4)]
        return weights, [torch.randn(H, device=self.device)*.1 for _ in range(4)]

    def _fused(self, weights, biases): # A block is what a head reads: query, key and value
        by_head = torch.stack([w.view(self.heads, self.dim, self.hidden) for w in weights[:3]], 1)
        bias = torch.stack([b.view(self.heads, self.dim) for b in biases[:3]], 1)
        up = pack_up(by_head.reshape(3*self.hidden, self.hidden), 3*self.dim)
        return up, bias.reshape(3*self.hidden), pack_down(weights[3], self.dim), biases[3]

    def _attend(self, *projected): # Query, key and value, `(batch*tokens, heads*dim)`
        q, k, v = (t.view(self.batch, self.tokens, -1, self.dim).transpose(1, 2) for t in projected)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    # Ways to compute layer `i`

    def dense(self, i):
        weights, biases = self.layers[i]
        qkv = [F.linear(self.x[0], w, b) for w, b in zip(weights[:3], biases[:3])]
        return F.linear(self._attend(*qkv), weights[3], biases[3])

    def selected(self, i):
        (weights, biases), r = self.layers[i], features(self.sets[i].block, self.dim)
        pairs = zip(weights[:3], biases[:3])
        qkv = [F.linear(self.x[0], w.index_select(0, r), b.index_select(0, r)) for w, b in pairs]
        return F.linear(self._attend(*qkv), weights[3].index_select(1, r), biases[3])

    def ours(self, i):
        a, b, c, e = self.fused[i]
        h = up(self.x, a, b, self.sets[i]).view(-1, self.batch, self.tokens, 3*self.dim)
        h = F.scaled_dot_product_attention(*h.split(self.dim, -1))
        return down(h.reshape(len(h), self.batch*self.tokens, self.dim), c, e, self.sets[i])


def attention_rows(config, tokens, batch, seconds, device):
    "Records of projections and attention over open heads"
    attentions = Attentions(config, tokens, batch, device)
    hidden, n = attentions.hidden, attentions.heads
    ways = {'compecon': attentions.ours, 'torch:index_select': attentions.selected}
    exact = attentions.selected(0).view(-1, hidden).double()
    errors = {'compecon': relative(attentions.ours(0).view(-1, hidden), exact)}
    calls = {'dense': attentions.dense, **ways}
    times = timed({k: in_all_layers(way) for k, way in calls.items()}, seconds, device)
    for name in ways:
        t = times.loc[name]
        yield dict(op='attention', shape=f'{hidden}, {HEADS_OPEN} of {n} heads', batch=batch, tokens=tokens,
                   open=HEADS_OPEN/n, backend=name, dense_ratio=t.ratio, low=t.low, high=t.high, ms=t.ms/LAYERS,
                   dense_ms=times.ms['dense']/LAYERS, error=errors.get(name))


def ways_to_run(model, x, tokens, share):
    "Name -> a whole model with a share of its FLOPs, and that share as achieved"
    economy = ContextualEconomy(copy.deepcopy(model), tokens=tokens)
    economy.log_values.data = torch.randn(len(economy), device=economy.log_values.device)
    nn.init.normal_(economy.model.router.bids.weight, std=3.)
    spent = calibrate(economy, [(x, None)], share)['mean']
    static = Economy(copy.deepcopy(model), tokens=tokens)
    static.values = economy.log_values.detach().exp()
    achieved = static.clear(share)
    small, paged = settle(static), copy.deepcopy(model)
    native.huge_pages(paged.parameters())
    packed = {f'settled, packed{name}': (pack(small, dtype=dtype), achieved) for name, dtype in KEPT_AS.items()}
    return {'dense, huge pages': (paged, 1.), 'masked, router': (economy.model, spent),
            'packed, router': (pack_router(economy), spent), 'settled': (small, achieved), **packed,
            'packed, all open': (pack(model), 1.)}


def model_rows(name, config, tokens, batch, shares, seconds, device):
    "Records of whole models: agents opened by a router for each sequence, or settled, plain and packed"
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**config, max_position_embeddings=1024)).eval().to(device)
    x = example_inputs(model, tokens, batch, seed=0)
    for share in shares:
        made = ways_to_run(model, x, tokens, share)
        calls = {'dense': lambda: model(**x)} | {k: lambda m=m: m(**x) for k, (m, _) in made.items()}
        times = timed(calls, seconds, device)
        for backend, (_, flops) in made.items():
            t = times.loc[backend]
            yield dict(op='model', shape=name, batch=batch, tokens=tokens, open=share, flops_ratio=flops,
                       backend=backend, dense_ratio=t.ratio, low=t.low, high=t.high, ms=t.ms,
                       dense_ms=times.ms['dense'])


def rows_of(part, name, tokens, shares, args):
    "Records of one part of the script, for one model and size"
    config, batch, length = MODELS[name], *((8, 128) if tokens == 1024 else (1, tokens))
    if part == 'ffn': return ffn_rows(config, tokens, shares, args.seconds, args.device)
    if part == 'attention': return attention_rows(config, length, batch, args.seconds, args.device)
    shares = [s for s in shares if s in (0.6, 0.25)]
    return model_rows(name, config, length, batch, shares, 2*args.seconds, args.device)


def tables(file):
    "What README.md of this folder shows, for each device"
    text = []
    for device, rows in pd.read_json(file, lines=True).groupby('device'):
        rows['size'] = [f'{int(b)} x {t}' if b > 1 else str(t) for b, t in zip(rows.batch, rows.tokens)]
        rows['time'] = [f'{r:.2f}' for r in rows.dense_ratio]
        text.append(device)
        for op in PARTS:
            of_op = rows[rows.op == op].drop_duplicates(['shape', 'open', 'backend', 'size'], keep='last')
            if of_op.empty: continue
            of_op = of_op.sort_values(['batch', 'tokens']).assign(open=of_op.open.round(2))
            table = of_op.pivot_table('time', ['shape', 'open', 'backend'], 'size', aggfunc='last', sort=False)
            text.append(table.reset_index().to_markdown(index=False))
    return '\n\n'.join(text)


def arguments():
    parser = script_parser(__doc__, threads=1, device='cpu',
                           out=dict(default='results', help='folder of kernels.jsonl'))
    parser.add_argument('--models', default='bert,minilm', help=f'of {", ".join(MODELS)} (bert,minilm)')
    parser.add_argument('--tokens', default='1,16,128,1024', help='1024 are 8 sequences of 128 (1,16,128,1024)')
    parser.add_argument('--open', default='1,0.75,0.6,0.5,0.25', help='shares of the agents (1,0.75,0.6,0.5,0.25)')
    parser.add_argument('--parts', default=','.join(PARTS), help=f'of {", ".join(PARTS)} (all)')
    parser.add_argument('--seconds', type=float, default=8., help='for each row of a table')
    parser.add_argument('--tables', action='store_true', help='print the tables of what is in OUT, and measure nothing')
    return read_args(parser, dict(models=MODELS, parts=PARTS))


@torch.inference_mode()
def measure(args, file):
    "Append a record for each model, size, part, share and way"
    loaded, origin = native.load(args.device.split(':')[0]), provenance(args.device)
    print(loaded.how, loaded.variant, loaded.why)
    shares = [float(o) for o in args.open.split(',')]
    cases = [(part, name, int(tokens)) for name in args.models for tokens in args.tokens.split(',')
             for part in args.parts]
    for part, name, tokens in cases:
        for row in rows_of(part, name, tokens, shares, args):
            append_line(dict(row, model=name, variant=loaded.variant, **origin), file)
            print(row['op'], name, row['tokens'], row['open'], row['backend'], round(row['dense_ratio'], 3), flush=True)


def main():
    args = arguments()
    file = Path(args.out, 'kernels.jsonl')
    if not args.tables:
        torch.manual_seed(0)
        measure(args, file)
    print(tables(file))


if __name__ == '__main__': main()
