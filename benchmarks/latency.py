"""Latency follows FLOPs: settled models against dense, by size, batch, length and budget, with what the clock predicted.

Run:  python benchmarks/latency.py [--models minilm,bert] [--sizes 1x1,1x16,1x128,8x128] [--budgets 0.6,0.4,0.2] [--backends eager,compiled,int8,bfloat16,onnx] [--threads 1]

Every line of OUT/latency.jsonl is a settled model in a setting: its FLOPs, the time that was predicted, and its time, as shares of the dense model's with the same backend,
measured in turns; efficiency is the share of FLOPs over the share of time. The weights are random (time does not depend on them), and so are the valuations: log-normal for agents and for sites.
Structures are chosen under a budget of FLOPs, and under the same share of time by a clock that is measured first and kept in OUT/clocks.
"""
import argparse
import copy
import io
import json
import os
import warnings
from pathlib import Path

import pandas as pd
import torch
from transformers import BertConfig, BertForSequenceClassification
from transformers.utils import logging

from compecon.agents import example_inputs
from compecon.clock import measure_prices, provenance
from compecon.economy import Economy
from compecon.flops import count_flops, latency
from compecon.settle import settle
from compecon.tariff import allocate

MODELS = dict(minilm=dict(hidden_size=384, num_hidden_layers=6, intermediate_size=1536), bert=dict(hidden_size=768, num_hidden_layers=12, intermediate_size=3072))

def compiled(model, x): return torch.compile(model, dynamic=False)
def int8(model, x): return torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {torch.nn.Linear})
def bfloat16(model, x): return copy.deepcopy(model).bfloat16()
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
BACKENDS = dict(eager=lambda model, x: model, compiled=compiled, int8=int8, bfloat16=bfloat16, onnx=onnx)


def peak(model, x):
    "Bytes of the weights, and of the most that a forward pass holds beside them"
    weights = sum(p.numel()*p.element_size() for p in model.parameters())
    if x['input_ids'].is_cuda:
        torch.cuda.reset_peak_memory_stats(); before = torch.cuda.memory_allocated()
        model(**x)
        return weights, torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as prof: model(**x)
    held = most = 0
    for e in sorted((e for e in prof.profiler.kineto_results.events() if e.name() == '[memory]'), key=lambda e: e.start_ns()):
        held += e.nbytes(); most = max(most, held)
    return weights, most


def settled(model, budgets, clock, tokens):
    "Settled models by budget and by who set the prices, with the time that the clock predicts"
    g = torch.Generator().manual_seed(0)
    economy = Economy(copy.deepcopy(model), tokens=tokens)
    economy.valuations = torch.cat([torch.randn(1, generator=g).mul(0.5).exp()*torch.randn(s.n, generator=g).exp() for s in economy.sites]).to(economy.log_values.device)
    tariff, res = clock.tariff(economy.sites), {}
    for b in budgets:
        for unit in ('flops', 'latency'):
            try: allocate(economy, f'{b} {unit}', tariff if unit == 'latency' else None)
            except ValueError as e: print(e); continue
            counts = [int(o.sum()) for o in economy.split(economy.open)]
            res[b, unit] = settle(economy), tariff.bill(counts)/clock.dense, counts
    return res


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--models', default='minilm,bert')
    parser.add_argument('--sizes', default='1x1,1x16,1x128,8x128')
    parser.add_argument('--budgets', default='0.6,0.4,0.2')
    parser.add_argument('--backends', default='eager')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--seconds', type=float, default=60., help='for each clock, and for each table')
    parser.add_argument('--out', default='results')
    args = parser.parse_args()
    logging.set_verbosity_error(); warnings.filterwarnings('ignore', category=DeprecationWarning)
    torch.set_num_threads(args.threads); torch.set_grad_enabled(False)
    rows = []
    for name in args.models.split(','):
        for size in args.sizes.split(','):
            batch, tokens = map(int, size.split('x'))
            torch.manual_seed(0)
            model = BertForSequenceClassification(BertConfig(**MODELS[name], num_attention_heads=12, max_position_embeddings=1024)).eval().to(args.device)
            x = example_inputs(model, tokens, batch)
            clock = measure_prices(model, batch, tokens, folder=Path(args.out, 'clocks'), seconds=args.seconds)
            small = settled(model, [float(b) for b in args.budgets.split(',')], clock, tokens)
            for backend in args.backends.split(','):
                runs = {'dense': model} | {k: m for k,(m,*_) in small.items()}
                calls = {k: (lambda f=BACKENDS[backend](m, x): f(**x)) for k,m in runs.items()}
                once = latency({'dense': calls['dense']}, rounds=3).ms['dense']/1e3
                times = latency(calls, rounds=int(min(50, max(7, args.seconds/len(calls)/max(0.01, once)))))
                whole, dense_memory = count_flops(model, **x), peak(model, x)
                for key, (m, predicted, counts) in small.items():
                    t, flops, memory = times.loc[[key]].iloc[0], count_flops(m, **x)/whole, peak(m, x)
                    row = dict(model=name, batch=batch, tokens=tokens, budget=key[0], priced_in=key[1], backend=backend, flops_ratio=flops, predicted_ratio=predicted if backend == 'eager' else None, latency_ratio=t.ratio,
                               low=t.low, high=t.high, efficiency=flops/t.ratio, ms=t.ms, dense_ms=times.ms['dense'], weights_mb=memory[0]/1e6, activations_mb=memory[1]/1e6, dense_weights_mb=dense_memory[0]/1e6, dense_activations_mb=dense_memory[1]/1e6,
                               counts=counts, clock_spread=clock.spread, seed=0, **provenance(args.device))
                    rows.append(row)
                    with open(Path(args.out, 'latency.jsonl'), 'a') as f: f.write(json.dumps(row) + '\n')
                torch._dynamo.reset()
            print(pd.DataFrame(rows).drop(columns=['counts', 'versions', 'when', 'device', 'dtype', 'threads']).tail(len(small)*len(args.backends.split(','))).round(3).to_string(index=False), flush=True)


if __name__ == '__main__':
    os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')
    main()
