"""Sparse execution: products over open blocks against torch, and packed models against plain ones.

Run:  python benchmarks/sparse.py [--models bert,minilm] [--tokens 1,16,128,1024] [--open 1,0.75,0.6,0.5,0.25] [--parts ffn,attention,model] [--seconds 8] [--device cpu]

Every line of OUT/kernels.jsonl is one way to compute with a share of the agents open: its time as a share of dense torch's, measured in turns by the clock of the
thread, with quartiles; its error against float64; what it reads and computes in a second (at one token beside a plain sum over as much memory, in the same turns). Weights of `compecon` lie in huge pages, `torch:dense, huge pages` is torch with the same. One thread, at least 12 layers with weights of their own (fewer would stay in the caches),
another random open set for each layer. `compecon` is ours, with weights as float32, bfloat16 or int8; its peers are `masked` (everything is computed), `index_select` (open weights are
copied together), `bmm` (block by block, in a batch), and torch's dynamic int8.

`--tables` prints what is in OUT already, and measures nothing.
"""
import argparse
import copy
import json
import os
import time
import warnings
from functools import partial
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertForSequenceClassification

from compecon import native
from compecon.agents import example_inputs
from compecon.lab.records import provenance
from compecon.router import ContextualEconomy, calibrate
from compecon.economy import Economy
from compecon.flops import latency
from compecon.kernels import down, ffn, ffn_reference, open_set, pack_down, pack_up, up
from compecon.packed import pack, pack_economy
from compecon.settle import settle

MODELS = dict(bert=dict(hidden_size=768, num_hidden_layers=12, intermediate_size=3072, num_attention_heads=12),
              minilm=dict(hidden_size=384, num_hidden_layers=6, intermediate_size=1536, num_attention_heads=12))
LAYERS, BLOCK = 12, 32


def some(n, share, groups=1):
    "Open sets, each of as many blocks"
    mask = torch.zeros(groups, n, dtype=torch.bool)
    for row in mask: row[torch.randperm(n)[:max(1, round(share*n))]] = True
    return mask


def timed(calls, seconds, device):
    "Interleaved, by the clock of the thread on a processor"
    once = latency(calls, rounds=2, warmup=1, turn=0.001).ms.sum()/1e3
    rounds = int(min(40, max(5, seconds/(len(calls)*0.05 + 2*once))))
    return latency(calls, rounds=rounds, clock=time.thread_time if device == 'cpu' and torch.get_num_threads() == 1 else time.perf_counter)


def ffns(config, tokens, shares, seconds, device):
    "Feed-forward networks alone"
    H, N = config['hidden_size'], config['intermediate_size']
    nb, x = N//BLOCK, torch.randn(1, tokens, H, device=device)
    layers = [[torch.randn(N, H, device=device)*.03, torch.randn(N, device=device)*.1, torch.randn(H, N, device=device)*.03, torch.randn(H, device=device)*.1] for _ in range(LAYERS)]
    packed = {name: [(pack_up(a, BLOCK, d), b, pack_down(c, BLOCK, d), e) for a,b,c,e in layers] for name,d in (('', None), (':bfloat16', torch.bfloat16), (':int8', torch.int8))}
    native.huge_pages([v for ls in packed.values() for (a, sa), b, (c, sc), e in ls for v in (a, c)])
    paged = [[v.clone() for v in l] for l in layers]
    native.huge_pages([v for l in paged for v in l])
    plain = [torch.nn.Sequential(torch.nn.Linear(H, N), torch.nn.GELU(), torch.nn.Linear(N, H)) for _ in layers]
    for m, (a, b, c, e) in zip(plain, layers): m[0].weight.data, m[0].bias.data, m[2].weight.data, m[2].bias.data = a, b, c, e
    eight = [torch.ao.quantization.quantize_dynamic(m, {torch.nn.Linear}) for m in plain] if device == 'cpu' else []
    batched = [(a.view(nb, BLOCK, H).transpose(1, 2).contiguous(), b.view(nb, 1, BLOCK), c.T.contiguous().view(nb, BLOCK, H), e) for a,b,c,e in layers]
    def dense(a, b, c, e): return F.linear(F.gelu(F.linear(x[0], a, b)), c, e)
    for share in shares:
        sets = [open_set(some(nb, share).to(device)) for _ in layers]
        rows = [s.block[:, None].mul(BLOCK).add(torch.arange(BLOCK, device=device)).flatten() for s in sets]
        masks = [torch.zeros(N, device=device).index_fill(0, r, 1) for r in rows]
        each = [open_set(some(nb, share, tokens).to(device)) for _ in layers] if tokens > 1 else None
        def masked(i): a, b, c, e = layers[i]; return F.linear(F.gelu(F.linear(x[0], a, b))*masks[i], c, e)
        def selected(i):
            a, b, c, e = layers[i]; r = rows[i]
            return F.linear(F.gelu(F.linear(x[0], a.index_select(0, r), b.index_select(0, r))), c.index_select(1, r), e)
        def bmm(i):
            a, b, c, e = batched[i]; k = sets[i].block
            return torch.bmm(F.gelu(torch.bmm(x.expand(len(k), -1, -1), a[k]) + b[k]), c[k]).sum(0) + e
        def ours(packed, i): (a, b, c, e) = packed[i]; return ffn(x, a, b, c, e, sets[i])
        def tokenwise(i): a, b, c, e = packed[''][i]; return ffn(x.transpose(0, 1), a, b, c, e, each[i])
        def in_huge_pages(i): a, b, c, e = paged[i]; return F.linear(F.gelu(F.linear(x[0], a, b)), c, e)
        ways = {'torch:dense, huge pages, all open': in_huge_pages, 'torch:masked': masked, 'torch:index_select': selected, 'torch:bmm': bmm, **{'compecon' + n: partial(ours, p) for n,p in packed.items()}}
        if tokens > 1: ways['compecon:token sets'] = tokenwise
        if eight: ways['torch:int8, all open'] = lambda i: eight[i](x)
        memory = torch.ones(round(share*2*H*N*LAYERS)) if tokens == 1 and device == 'cpu' else None  # as much as `compecon` reads
        if memory is not None: native.huge_pages([memory])
        calls = {'dense': lambda: [dense(*l) for l in layers], **({} if memory is None else {'read': memory.sum}), **{k: lambda f=f: [f(i) for i in range(LAYERS)] for k,f in ways.items()}}
        times = timed(calls, seconds, device)
        reads = None if memory is None else memory.nbytes/times.ms['read']/1e6
        for k, f in ways.items():
            t, per = times.loc[k], times.ms[k]/1e3/LAYERS
            o = each[0] if k.endswith('token sets') else sets[0]
            a, b, c, e = packed[''][0]
            xs = x.transpose(0, 1) if k.endswith('token sets') else x
            exact = ffn_reference(*(v.double() if isinstance(v, torch.Tensor) else v for v in (xs, a[0], None, b, None, None, None, c[0], None, e)), o.group, o.block, 2).view(tokens, H)
            error = None if 'all open' in k else ((f(0).view(tokens, H).double() - exact).norm()/exact.norm()).item()
            computed = 1 if k == 'torch:masked' or 'all open' in k else o.share
            size = dict(bfloat16=2, int8=1).get(k.split(':')[-1].split(',')[0], 4)
            yield dict(op='ffn', shape=f'{H}x{N}', batch=1, tokens=tokens, open=round(share, 4), backend=k, dense_ratio=t.ratio, low=t.low, high=t.high, ms=per*1e3, dense_ms=times.ms['dense']/LAYERS, error=error,
                       gb_s=2*H*N*computed*size/per/1e9, read_gb_s=reads, tflop_s=4*tokens*H*N*computed/per/1e12)


def attentions(config, tokens, batch, heads, seconds, device):
    "Projections and attention over open heads"
    H, n = config['hidden_size'], config['num_attention_heads']
    d, x = H//n, torch.randn(1, batch*tokens, H, device=device)
    layers = [[torch.randn(H, H, device=device)*.05 for _ in range(4)] + [torch.randn(H, device=device)*.1 for _ in range(4)] for _ in range(LAYERS)]
    fused = [(pack_up(torch.stack([w.view(n, d, H) for w in l[:3]], 1).reshape(3*H, H), 3*d), torch.stack([b.view(n, d) for b in l[4:7]], 1).reshape(3*H), pack_down(l[3], d), l[7]) for l in layers]
    native.huge_pages([v for (a, _), b, (c, _), e in fused for v in (a, c)])
    def attend(q, k, v): return F.scaled_dot_product_attention(*(t.view(batch, tokens, -1, d).transpose(1, 2) for t in (q, k, v))).transpose(1, 2).flatten(2)
    def dense(i): l = layers[i]; return F.linear(attend(*(F.linear(x[0], l[j], l[4 + j]) for j in range(3))), l[3], l[7])
    sets = [open_set(some(n, heads/n).to(device)) for _ in layers]
    def ours(i):
        a, b, c, e = fused[i]
        h = up(x, a, b, sets[i]).view(-1, batch, tokens, 3*d)  # a block is what a head reads: query, key and value
        return down(F.scaled_dot_product_attention(*h.split(d, -1)).reshape(len(h), batch*tokens, d), c, e, sets[i])
    def selected(i):
        l, r = layers[i], sets[i].block[:, None].mul(d).add(torch.arange(d, device=device)).flatten()
        return F.linear(attend(*(F.linear(x[0], l[j].index_select(0, r), l[4 + j].index_select(0, r)) for j in range(3))), l[3].index_select(1, r), l[7])
    ways = {'compecon': ours, 'torch:index_select': selected}
    error = ((ours(0).double().view(-1, H) - selected(0).double().view(-1, H)).norm()/selected(0).double().norm()).item()
    times = timed({'dense': lambda: [dense(i) for i in range(LAYERS)], **{k: lambda f=f: [f(i) for i in range(LAYERS)] for k,f in ways.items()}}, seconds, device)
    for k in ways:
        t = times.loc[k]
        yield dict(op='attention', shape=f'{H}, {heads} of {n} heads', batch=batch, tokens=tokens, open=heads/n, backend=k, dense_ratio=t.ratio, low=t.low, high=t.high, ms=t.ms/LAYERS, dense_ms=times.ms['dense']/LAYERS, error=error if k == 'compecon' else None)


def models(name, config, tokens, batch, shares, seconds, device):
    "Whole models: agents opened by a router for each sequence, or settled, plain and packed"
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**config, max_position_embeddings=1024)).eval().to(device)
    x = example_inputs(model, tokens, batch, seed=0)
    for share in shares:
        economy = ContextualEconomy(copy.deepcopy(model), tokens=tokens)
        economy.log_values.data = torch.randn(len(economy), device=device)
        torch.nn.init.normal_(economy.model.router.bids.weight, std=3.)
        spent = calibrate(economy, [(x, None)], share)['mean']
        static = Economy(copy.deepcopy(model), tokens=tokens)
        static.values = economy.log_values.detach().exp()
        achieved = static.clear(share)
        small = settle(static)
        paged = copy.deepcopy(model)
        native.huge_pages(paged.parameters())
        made = {'dense, huge pages': (paged, 1.), 'masked, router': (economy.model, spent), 'packed, router': (pack_economy(economy), spent), 'settled': (small, achieved), 'settled, packed': (pack(small), achieved),
                'settled, packed:bfloat16': (pack(small, dtype=torch.bfloat16), achieved), 'settled, packed:int8': (pack(small, dtype=torch.int8), achieved), 'packed, all open': (pack(model), 1.)}
        times = timed({'dense': lambda: model(**x), **{k: lambda m=m: m(**x) for k,(m,_) in made.items()}}, seconds, device)
        for k, (_, flops) in made.items():
            t = times.loc[k]
            yield dict(op='model', shape=name, batch=batch, tokens=tokens, open=share, flops_ratio=flops, backend=k, dense_ratio=t.ratio, low=t.low, high=t.high, ms=t.ms, dense_ms=times.ms['dense'])


def tables(file):
    "What README.md of this folder shows, for each device"
    text = []
    for device, rows in pd.read_json(file, lines=True).groupby('device'):
        rows['size'] = [f'{int(b)} x {t}' if b > 1 else str(t) for b,t in zip(rows.batch, rows.tokens)]
        rows['time'] = [f'{r:.2f}' for r in rows.dense_ratio]
        text.append(device)
        for op in ('ffn', 'attention', 'model'):
            some = rows[rows.op == op].drop_duplicates(['shape', 'open', 'backend', 'size'], keep='last').sort_values(['batch', 'tokens'])
            if len(some): text.append(some.assign(open=some.open.round(2)).pivot_table('time', ['shape', 'open', 'backend'], 'size', aggfunc='last', sort=False).reset_index().to_markdown(index=False))
    return '\n\n'.join(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--models', default='bert,minilm')
    parser.add_argument('--tokens', default='1,16,128,1024')
    parser.add_argument('--open', default='1,0.75,0.6,0.5,0.25')
    parser.add_argument('--parts', default='ffn,attention,model')
    parser.add_argument('--seconds', type=float, default=8., help='for each row of a table')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--out', default='results')
    parser.add_argument('--tables', action='store_true', help='print the tables of what is in OUT already, and measure nothing')
    args = parser.parse_args()
    file = Path(args.out, 'kernels.jsonl')
    file.parent.mkdir(parents=True, exist_ok=True)
    if args.tables: return print(tables(file))
    warnings.filterwarnings('ignore')
    torch.set_num_threads(args.threads); torch.manual_seed(0)
    loaded, stamp = native.load(args.device.split(':')[0]), provenance(args.device)
    print(loaded.how, loaded.variant, loaded.why)
    shares = [float(o) for o in args.open.split(',')]
    with torch.inference_mode():
        for name in args.models.split(','):
            config = MODELS[name]
            for tokens in map(int, args.tokens.split(',')):
                batch, length = (8, 128) if tokens == 1024 else (1, tokens)
                parts = dict(ffn=lambda: ffns(config, tokens, shares, args.seconds, args.device), attention=lambda: attentions(config, length, batch, 7, args.seconds, args.device),
                             model=lambda: models(name, config, length, batch, [s for s in shares if s in (0.6, 0.25)], 2*args.seconds, args.device))
                for part in args.parts.split(','):
                    for row in parts[part]():
                        with open(file, 'a') as f: f.write(json.dumps(dict(row, model=name, variant=loaded.variant, **stamp)) + '\n')
                        print(row['op'], name, row['tokens'], row['open'], row['backend'], round(row['dense_ratio'], 3), flush=True)
    print(tables(file))


if __name__ == '__main__':
    os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')
    main()
