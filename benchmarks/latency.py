"""Latency follows FLOPs: settled models against dense, by size, batch, length and budget, with what the clock predicted.

Run:  python benchmarks/latency.py [--models minilm,bert] [--sizes 1x1,1x16,1x128,8x128] [--budgets 0.6,0.4,0.2] [--backends eager,layout,packed,packed_bf16,packed_int8,packed_compiled,compiled,int8,bfloat16,onnx] [--threads 1]

Every line of OUT/latency.jsonl is a settled model in a setting: its FLOPs, the time that was predicted, and its time, as shares of the dense model's with the same backend,
measured in turns; efficiency is the share of FLOPs over the share of time; `as_it_is_ratio` is the share of the time of the dense model as it is, eager and float32. The weights are random (time does not depend on them), and so are the values: log-normal for agents and for sub-layers.
Structures are chosen under a budget of FLOPs, and under the same share of time by a clock that is measured first and kept in OUT/clocks; Torch-Pruning, where it is installed, makes
models of about the same FLOPs.
"""
import argparse
import copy
import io
import json
import os
import warnings
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from transformers import BertConfig, BertForSequenceClassification
from transformers.utils import logging

from compecon.agents import example_inputs
from compecon.budget import measure_latency
from compecon.lab.records import provenance
from compecon.economy import Economy
from compecon.flops import count_flops, latency
from compecon.layout import fit_layout
from compecon.packed import pack
from compecon.settle import settle
from compecon.curves import allocate

MODELS = dict(minilm=dict(hidden_size=384, num_hidden_layers=6, intermediate_size=1536), bert=dict(hidden_size=768, num_hidden_layers=12, intermediate_size=3072))

def compiled(model, x): return torch.compile(model, dynamic=False)
def int8(model, x): return torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {torch.nn.Linear})
def bfloat16(model, x): return copy.deepcopy(model).bfloat16()
def layout(model, x):
    model = copy.deepcopy(model)
    fit_layout(model, *x['input_ids'].shape)
    return model
def onnx(model, x):
    import onnxruntime
    file, options = io.BytesIO(), onnxruntime.SessionOptions()
    class Plain(torch.nn.Module):
        def __init__(self): super().__init__(); self.model = model
        def forward(self, ids): return self.model(input_ids=ids).logits
    torch.onnx.export(Plain().eval(), (x['input_ids'],), dynamo=True, verbose=False).save(file)
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file.getvalue(), options)
    return lambda input_ids: session.run(None, {session.get_inputs()[0].name: input_ids.numpy()})
def packed(model, x, dtype=None): return pack(model, dtype=dtype)
BACKENDS = dict(eager=lambda model, x: model, layout=layout, packed=packed, packed_bf16=partial(packed, dtype=torch.bfloat16), packed_int8=partial(packed, dtype=torch.int8), packed_compiled=lambda model, x: compiled(pack(model), x), compiled=compiled, int8=int8, bfloat16=bfloat16, onnx=onnx)


def peak(model, call, x):
    "Megabytes of the weights, and of the most that a forward pass holds beside them"
    weights = sum(p.numel()*p.element_size() for p in model.parameters())
    if x['input_ids'].is_cuda:
        torch.cuda.reset_peak_memory_stats(); before = torch.cuda.memory_allocated()
        call()
        return weights/1e6, (torch.cuda.max_memory_allocated() - before)/1e6
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as prof: call()
    held = most = 0
    for e in sorted((e for e in prof.profiler.kineto_results.events() if e.name() == '[memory]'), key=lambda e: e.start_ns()):
        held += e.nbytes(); most = max(most, held)
    return weights/1e6, most/1e6


def settled(model, budgets, clock, tokens):
    "Settled models by budget and by who set the prices, with the time that the clock predicts"
    g = torch.Generator().manual_seed(0)
    economy = Economy(copy.deepcopy(model), tokens=tokens)
    economy.values = torch.cat([torch.randn(1, generator=g).mul(0.5).exp()*torch.randn(s.n, generator=g).exp() for s in economy.sublayers]).to(economy.log_values.device)
    curves, res = clock.curves(economy.sublayers), {}
    for b in budgets:
        for unit in ('flops', 'latency'):
            try: allocate(economy, f'{b} {unit}', curves if unit == 'latency' else None)
            except ValueError as e: print(e); continue
            counts = [int(o.sum()) for o in economy.split(economy.open)]
            res[b, unit] = settle(economy), curves.cost(counts)/clock.dense, counts
    return res


def torch_pruned(model, budget, x):
    "Torch-Pruning at about the same FLOPs: by magnitude, all widths alike, that of the residual stream too"
    try: import torch_pruning
    except ImportError: return {}
    model = copy.deepcopy(model)
    attentions = [m for m in model.modules() if hasattr(m, 'query')]
    hidden = model.config.hidden_size
    ratio = 1 - round(budget**0.5*hidden/8)*8/hidden  # widths that hardware likes
    with torch.enable_grad():
        pruner = torch_pruning.pruner.BasePruner(model, x, torch_pruning.importance.MagnitudeImportance(), pruning_ratio=ratio, head_pruning_ratio=ratio, prune_num_heads=True,
            num_heads={p: m.num_attention_heads for m in attentions for p in (m.query, m.key, m.value)}, ignored_layers=[model.classifier], output_transform=lambda y: y.logits.sum())
        pruner.step()
    for m in attentions:
        m.num_attention_heads, m.all_head_size = pruner.num_heads[m.query], m.query.out_features
        m.attention_head_size = m.all_head_size//m.num_attention_heads
    return {(budget, 'torch-pruning'): (model, None, None)}


def tables(file):
    "The tables of benchmarks/README.md, for each device: efficiency and latency, the clock's error, time and memory of the dense models"
    text, key = [], ['model', 'backend', 'priced_in', 'budget']
    for (device, threads), rows in pd.read_json(file, lines=True).groupby(['device', 'threads']):
        rows['size'] = rows.batch.astype(str) + ' x ' + rows.tokens.astype(str)
        rows = rows.drop_duplicates([*key, 'size'], keep='last').sort_values(['batch', 'tokens'])
        def across(values, by, **kw): return rows.assign(shown=values).dropna(subset='shown').pivot_table('shown', by, 'size', sort=False, **kw).sort_index(ascending=[b != 'budget' for b in by])
        error, longest = 100*(rows.predicted_ratio/rows.latency_ratio - 1).abs(), rows[rows['size'] == rows['size'].iloc[-1]]
        parts = {'efficiency (share of the time)': across([f'{e:.2f} ({t:.2f})' for e,t in zip(rows.efficiency, rows.latency_ratio)], key, aggfunc='last'),
                 'the same against the dense model as it is, eager and float32': across([f'{f/t:.2f} ({t:.2f})' if t > 0 else None for f,t in zip(rows.flops_ratio, rows.as_it_is_ratio)], key, aggfunc='last'),
                 "error of the clock's prediction in per cent, median": across(error, ['model'], aggfunc='median').round(1), 'the largest': across(error, ['model'], aggfunc='max').round(1),
                 'dense model, ms': across(rows.dense_ms, ['model', 'backend']).round(1),
                 'weights and activations at the longest, MB': longest.dropna(subset='weights_mb').set_index(key).sort_index()[[c for c in rows if c.endswith('_mb')]].round(1)}
        spread = ((rows.high - rows.low)/rows.latency_ratio).quantile([0.5, 0.9])
        text += [f'{device}, {threads} threads; distance of the quartiles as a share of the ratio: median {spread[0.5]:.3f}, 90th percentile {spread[0.9]:.3f}']
        text += [f'{title}:\n\n{t.reset_index().to_markdown(index=False)}' for title,t in parts.items()]
    return '\n\n'.join(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--models', default='minilm,bert')
    parser.add_argument('--sizes', default='1x1,1x16,1x128,8x128')
    parser.add_argument('--budgets', default='0.6,0.4,0.2')
    parser.add_argument('--backends', default='eager')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--tables', action='store_true', help='print the tables of what is in OUT already, and measure nothing')
    parser.add_argument('--seconds', type=float, default=60., help='for each clock, and for each table')
    parser.add_argument('--out', default='results')
    args = parser.parse_args()
    if args.tables: return print(tables(Path(args.out, 'latency.jsonl')))
    logging.set_verbosity_error(); warnings.filterwarnings('ignore', category=DeprecationWarning)
    torch.set_num_threads(args.threads); torch.set_grad_enabled(False)
    torch._dynamo.config.recompile_limit = 64  # each settled model is another one of the same class
    for name in args.models.split(','):
        for size in args.sizes.split(','):
            batch, tokens = map(int, size.split('x'))
            torch.manual_seed(0)
            model = BertForSequenceClassification(BertConfig(**MODELS[name], num_attention_heads=12, max_position_embeddings=1024)).eval().to(args.device)
            x = example_inputs(model, tokens, batch)
            clock = measure_latency(model, batch, tokens, folder=Path(args.out, 'clocks'), seconds=args.seconds)
            small = settled(model, [float(b) for b in args.budgets.split(',')], clock, tokens)
            for b in args.budgets.split(','): small |= torch_pruned(model, float(b), x)
            for backend in args.backends.split(','):
                served = {k: v for k,v in small.items() if not (backend.startswith('packed') and k[1] == 'torch-pruning')}  # its heads have widths that panels do not fit
                made = {k: BACKENDS[backend](m, x) for k,m in {'dense': model, **{k: m for k,(m,*_) in served.items()}}.items()}
                calls = {k: lambda f=f: f(**x) for k,f in made.items()} | {'as it is': lambda: model(**x)}
                once = latency({'dense': calls['dense']}, rounds=3).ms['dense']/1e3
                times = latency(calls, rounds=int(min(50, max(7, args.seconds/len(calls)/(max(0.03, once) + min(0.1, 3*once))))))
                whole, memory = count_flops(model, **x), {k: peak(f, calls[k], x) if backend in ('eager', 'layout', 'bfloat16') else (None, None) for k,f in made.items()}
                for key, (m, predicted, counts) in served.items():
                    t, flops = times.loc[[key]].iloc[0], count_flops(m, **x)/whole
                    row = dict(model=name, batch=batch, tokens=tokens, budget=key[0], priced_in=key[1], backend=backend, flops_ratio=flops, predicted_ratio=predicted if backend == 'eager' else None, latency_ratio=t.ratio,
                               low=t.low, high=t.high, efficiency=flops/t.ratio, as_it_is_ratio=t.ratio/times.ratio['as it is'], ms=t.ms, dense_ms=times.ms['dense'], weights_mb=memory[key][0], activations_mb=memory[key][1], dense_weights_mb=memory['dense'][0], dense_activations_mb=memory['dense'][1],
                               counts=counts, clock_spread=clock.spread, seed=0, **provenance(args.device))
                    with open(Path(args.out, 'latency.jsonl'), 'a') as f: f.write(json.dumps(row) + '\n')
                torch._dynamo.reset()
    print(tables(Path(args.out, 'latency.jsonl')))


if __name__ == '__main__':
    os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')
    main()
