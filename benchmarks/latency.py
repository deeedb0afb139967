"""Latency follows FLOPs: settled models against dense, by size, batch, length and budget, with the time predicted.

Run:  python benchmarks/latency.py [--models minilm,bert] [--sizes 1x1,1x16,1x128,8x128] [--budgets 0.6,0.4,0.2]
          [--backends eager,layout,packed,packed_bf16,packed_int8,packed_compiled,compiled,int8,bfloat16,onnx]

Every line of OUT/latency.jsonl is a settled model in a setting: its FLOPs, the time that was predicted, and its time,
as shares of the dense model's with the same backend, interleaved; `efficiency` is the share of FLOPs over the share of
time; `as_it_is_ratio` is the share of the time of the dense model as it is, eager and float32. Weights are random (time
does not depend on them), and so are values: log-normal for agents and for sub-layers. Structures are chosen under a
budget of FLOPs, and under the same share of time by a latency table that is measured first and kept in
`compecon.core.cache_folder()`. Torch-Pruning, where it is installed, makes models of about the same FLOPs.
"""
import copy
import io
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from transformers import BertConfig, BertForSequenceClassification

from compecon.agents import example_inputs
from compecon.budget import measure_latency
from compecon.economy import Economy
from compecon.flops import count_flops, latency
from compecon.lab.records import append_line, provenance
from compecon.lab.scripts import read_args, script_parser
from compecon.layout import fit_layout
from compecon.packed import pack
from compecon.settle import settle

MODELS = dict(minilm=dict(hidden_size=384, num_hidden_layers=6, intermediate_size=1536),
              bert=dict(hidden_size=768, num_hidden_layers=12, intermediate_size=3072))


# Backends: each takes a model and its inputs, and gives what is called with them

def eager(model, x): return model


def compiled(model, x): return torch.compile(model, dynamic=False)


def int8(model, x): return torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {torch.nn.Linear})


def bfloat16(model, x): return copy.deepcopy(model).bfloat16()


def layout(model, x):
    model = copy.deepcopy(model)
    fit_layout(model, *x['input_ids'].shape)
    return model


def packed(model, x, dtype=None): return pack(model, dtype=dtype)


def packed_compiled(model, x): return compiled(pack(model), x)


class Logits(torch.nn.Module):
    "A model that takes token ids and gives logits, as ONNX wants it"
    def __init__(self, model):
        super().__init__()
        self.model = model
    def forward(self, ids): return self.model(input_ids=ids).logits


def onnx(model, x):
    import onnxruntime
    file, options = io.BytesIO(), onnxruntime.SessionOptions()
    torch.onnx.export(Logits(model).eval(), (x['input_ids'],), dynamo=True, verbose=False).save(file)
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file.getvalue(), options)
    name = session.get_inputs()[0].name
    return lambda input_ids: session.run(None, {name: input_ids.numpy()})


BACKENDS = dict(eager=eager, layout=layout, packed=packed, packed_bf16=partial(packed, dtype=torch.bfloat16),
                packed_int8=partial(packed, dtype=torch.int8), packed_compiled=packed_compiled, compiled=compiled,
                int8=int8, bfloat16=bfloat16, onnx=onnx)
WEIGHED = 'eager', 'layout', 'bfloat16'  # backends whose memory is measured


def peak(model, call, x):
    "Megabytes of the weights, and of the most that a forward pass holds beside them"
    weights = sum(p.numel()*p.element_size() for p in model.parameters())
    held = peak_cuda(call) if x['input_ids'].is_cuda else peak_cpu(call)
    return weights/1e6, held/1e6


def peak_cuda(call):
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def peak_cpu(call):
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile: call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == '[memory]']
    held = most = 0
    for e in sorted(events, key=lambda e: e.start_ns()):
        held += e.nbytes()
        most = max(most, held)
    return most


@dataclass
class Smaller:
    "A smaller model, and for ours the time predicted (as a share of dense) and the open agents of each sub-layer"
    model: torch.nn.Module
    predicted: float|None=None
    counts: list|None=None


def random_values(sublayers):
    "Log-normal for agents, and for sub-layers"
    g = torch.Generator().manual_seed(0)
    def one(s): return torch.randn(1, generator=g).mul(0.5).exp()*torch.randn(s.n, generator=g).exp()
    return torch.cat([one(s) for s in sublayers])


def settled(model, budgets, table, tokens):
    "Settled models by budget and unit"
    economy, res = Economy(copy.deepcopy(model), tokens=tokens), {}
    economy.values = random_values(economy.sublayers)
    curves = table.curves(economy.sublayers)
    for b in budgets:
        for unit in ('flops', 'latency'):
            try: economy.clear(f'{b} {unit}', curves if unit == 'latency' else None)
            except ValueError as e:
                print(e)
                continue
            counts = [int(o.sum()) for o in economy.split(economy.open)]
            res[b, unit] = Smaller(settle(economy), curves.cost(counts)/table.dense, counts)
    return res


def torch_pruned(model, budgets, x):
    "Torch-Pruning at about the same FLOPs, by budget; nothing where it is not installed"
    try: import torch_pruning
    except ImportError: return {}
    return {(b, 'torch-pruning'): Smaller(prune_widths(torch_pruning, copy.deepcopy(model), b, x)) for b in budgets}


def prune_widths(torch_pruning, model, budget, x):
    "By magnitude, all widths alike, that of the residual stream too"
    attentions, hidden = [m for m in model.modules() if hasattr(m, 'query')], model.config.hidden_size
    ratio = 1 - round(budget**0.5*hidden/8)*8/hidden  # widths that hardware likes
    heads = {p: m.num_attention_heads for m in attentions for p in (m.query, m.key, m.value)}
    with torch.enable_grad():
        importance = torch_pruning.importance.MagnitudeImportance()
        pruner = torch_pruning.pruner.BasePruner(
            model, x, importance, pruning_ratio=ratio, head_pruning_ratio=ratio, prune_num_heads=True, num_heads=heads,
            ignored_layers=[model.classifier], output_transform=lambda y: y.logits.sum())
        pruner.step()
    for m in attentions:
        m.num_attention_heads, m.all_head_size = pruner.num_heads[m.query], m.query.out_features
        m.attention_head_size = m.all_head_size//m.num_attention_heads
    return model


def dense_model(name, device):
    torch.manual_seed(0)
    config = BertConfig(**MODELS[name], num_attention_heads=12, max_position_embeddings=1024)
    return BertForSequenceClassification(config).eval().to(device)


def interleaved(calls, seconds):
    "Times of all calls, in about so many seconds"
    once = latency({'dense': calls['dense']}, rounds=3).ms['dense']/1e3
    turn = max(0.03, once) + min(0.1, 3*once)
    return latency(calls, rounds=int(min(50, max(7, seconds/len(calls)/turn))))


def measured(model, smaller, backend, x, seconds):
    "Rows of the records for one backend: what they share with others is added later"
    if backend.startswith('packed'):  # Torch-Pruning's heads have widths that panels do not fit
        smaller = {k: s for k, s in smaller.items() if k[1] != 'torch-pruning'}
    made = {k: BACKENDS[backend](m, x) for k, m in [('dense', model), *((k, s.model) for k, s in smaller.items())]}
    calls = {k: lambda f=f: f(**x) for k, f in made.items()} | {'as it is': lambda: model(**x)}
    times, whole = interleaved(calls, seconds), count_flops(model, **x)
    memory = {k: peak(f, calls[k], x) if backend in WEIGHED else (None, None) for k, f in made.items()}
    dense_weights, dense_activations = memory['dense']
    for key, small in smaller.items():
        t, flops = times.loc[[key]].iloc[0], count_flops(small.model, **x)/whole
        weights, activations = memory[key]
        yield dict(budget=key[0], priced_in=key[1], backend=backend, flops_ratio=flops,
                   predicted_ratio=small.predicted if backend == 'eager' else None,
                   latency_ratio=t.ratio, low=t.low, high=t.high, efficiency=flops/t.ratio,
                   as_it_is_ratio=t.ratio/times.ratio['as it is'], ms=t.ms, dense_ms=times.ms['dense'],
                   weights_mb=weights, activations_mb=activations, dense_weights_mb=dense_weights,
                   dense_activations_mb=dense_activations, counts=small.counts)


def run(name, batch, tokens, args):
    "Rows of the records for one model and size"
    model = dense_model(name, args.device)
    x = example_inputs(model, tokens, batch)
    table = measure_latency(model, batch, tokens, seconds=args.seconds)
    smaller = settled(model, args.budgets, table, tokens) | torch_pruned(model, args.budgets, x)
    for backend in args.backends:
        for row in measured(model, smaller, backend, x, args.seconds):
            yield dict(model=name, batch=batch, tokens=tokens, **row, clock_spread=table.spread, seed=0)
        torch._dynamo.reset()


KEY = ['model', 'backend', 'priced_in', 'budget']


def across(rows, values, index, **kw):
    "A table of some values, sizes across"
    shown = rows.assign(shown=values).dropna(subset='shown')
    table = shown.pivot_table('shown', index, 'size', sort=False, **kw)
    return table.sort_index(ascending=[name != 'budget' for name in index])


def against_as_it_is(rows):
    pairs = zip(rows.flops_ratio, rows.as_it_is_ratio)
    return [f'{flops/time:.2f} ({time:.2f})' if time > 0 else None for flops, time in pairs]


def tables_of(rows):
    "By title, for one device"
    efficiency = [f'{e:.2f} ({t:.2f})' for e, t in zip(rows.efficiency, rows.latency_ratio)]
    error = 100*(rows.predicted_ratio/rows.latency_ratio - 1).abs()
    longest = rows[rows['size'] == rows['size'].iloc[-1]].dropna(subset='weights_mb')
    memory = longest.set_index(KEY).sort_index()[[c for c in rows if c.endswith('_mb')]]
    return {
        'efficiency (share of the time)': across(rows, efficiency, KEY, aggfunc='last'),
        'the same against the dense model as it is, eager and float32':
            across(rows, against_as_it_is(rows), KEY, aggfunc='last'),
        'error of the predicted time in per cent, median': across(rows, error, ['model'], aggfunc='median').round(1),
        'the largest': across(rows, error, ['model'], aggfunc='max').round(1),
        'dense model, ms': across(rows, rows.dense_ms, ['model', 'backend']).round(1),
        'weights and activations at the longest, MB': memory.round(1)}


def tables(file):
    "The tables of benchmarks/README.md, for each device"
    text = []
    for (device, threads), rows in pd.read_json(file, lines=True).groupby(['device', 'threads']):
        rows['size'] = rows.batch.astype(str) + ' x ' + rows.tokens.astype(str)
        rows = rows.drop_duplicates([*KEY, 'size'], keep='last').sort_values(['batch', 'tokens'])
        spread = ((rows.high - rows.low)/rows.latency_ratio).quantile([0.5, 0.9])
        text.append(f'{device}, {threads} threads; distance of the quartiles as a share of the ratio: '
                    f'median {spread[0.5]:.3f}, 90th percentile {spread[0.9]:.3f}')
        text += [f'{title}:\n\n{t.reset_index().to_markdown(index=False)}' for title, t in tables_of(rows).items()]
    return '\n\n'.join(text)


def arguments():
    parser = script_parser(__doc__, budgets='0.6,0.4,0.2', threads=1, device='cpu',
                           out=dict(default='results', help='folder of latency.jsonl'))
    parser.add_argument('--models', default='minilm,bert', help=f'of {", ".join(MODELS)} (minilm,bert)')
    parser.add_argument('--sizes', default='1x1,1x16,1x128,8x128', help='batch x tokens (1x1,1x16,1x128,8x128)')
    parser.add_argument('--backends', default='eager', help=f'of {", ".join(BACKENDS)} (eager)')
    parser.add_argument('--tables', action='store_true', help='print the tables of what is in OUT, and measure nothing')
    parser.add_argument('--seconds', type=float, default=60., help='for each latency table, and each table of results')
    return read_args(parser, dict(models=MODELS, backends=BACKENDS))


def main():
    args = arguments()
    file = Path(args.out, 'latency.jsonl')
    if args.tables: return print(tables(file))
    warnings.filterwarnings('always', module='compecon')  # says when times are too noisy
    torch.set_grad_enabled(False)
    torch._dynamo.config.recompile_limit = 64  # each settled model is another one of the same class
    for name in args.models:
        for size in args.sizes.split(','):
            batch, tokens = (int(n) for n in size.split('x'))
            for row in run(name, batch, tokens, args): append_line(row | provenance(args.device), file)
    print(tables(file))


if __name__ == '__main__': main()
