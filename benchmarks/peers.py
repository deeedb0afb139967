"""Dense and small models in the engines that people have: does the saving multiply?

Run:  python benchmarks/peers.py --data DATA [--models minilm,bert,smollm2] [--sizes 1x1,1x16,1x128,8x128]
          [--budgets 0.6,0.4,0.2] [--engines eager,onnxruntime,...] [--threads 1]

- `minilm` is all-MiniLM as it comes, and what `shrink` makes of it (512 texts of STS-B's training part, seed 0). Its
  answers are scored in eager torch, in ONNX Runtime and in ONNX Runtime int8, on the two halves of STS-B's validation
  part that benchmarks/shrink.py tells apart. `minilm-l3` is paraphrase-MiniLM-L3-v2 from its package, dense.
- `minilm-by-torch` and `minilm-by-onnxruntime` ask for a share of the time that one or the other measures, in place of
  FLOPs.
- `bert` has BERT-base's size, and `smollm2` is SmolLM2-135M with a cache: weights of the first and structures of both
  are random, for time does not depend on them.

Engines are those of compecon.engines. In one setting (model, size, threads) all budgets and engines take turns, at
least five. `what` is `pass`; for a decoder `first` (128 tokens are read) and `next` (one more after them). `ratio` is
the share of the time of the dense model in eager torch, float32, in the same turns. A setting leaves its lines in
RECORDS when it ends; run again, the script resumes.
"""
import copy
import tempfile
from pathlib import Path

import pandas as pd
import torch
from transformers import AutoModel, AutoTokenizer, BertConfig, BertForSequenceClassification

from shrink import HALVES, L3, bert_from_onnx, rows_of, scores, texts_of
from compecon.engines import ENGINES, Prepared, installed_engines, prepare_engines
from compecon.core import package_versions
from compecon.economy import Economy
from compecon.flops import count_flops, latency
from compecon.lab.finetune import MINILM, model_source
from compecon.lab.records import append_line, now, provenance, read_runs
from compecon.lab.scripts import read_args, script_parser
from compecon.lab.wikitext import SMOLLM2, load_decoder
from compecon.settle import settle
from compecon.shrink import shrink_to_all

SIZES, BY = ('1x1', '1x16', '1x128', '8x128'), 'minilm-by-'
MODELS = 'minilm', 'minilm-l3', f'{BY}torch', f'{BY}onnxruntime', 'bert', 'smollm2'
SCORED = 'eager', 'onnxruntime', 'onnxruntime int8'


def random_settled(dense, budgets):
    "Settled models by budget, of agents whose values are log-normal"
    economy, g = Economy(copy.deepcopy(dense), tokens=128), torch.Generator().manual_seed(0)
    def one(s): return torch.randn(1, generator=g).mul(0.5).exp()*torch.randn(s.n, generator=g).exp()
    economy.values = torch.cat([one(s) for s in economy.sublayers])
    for b in budgets:
        try: economy.clear(b)
        except ValueError as e:  # SmolLM2's vocabulary costs more than a fifth of its FLOPs
            print(e)
            continue
        yield b, settle(economy)


class Subject:
    "A dense model, its tokenizer if it is scored, and smaller ones by budget"
    def __init__(self, name, args):
        self.name, self.decodes, self.tokenizer, self.rows = name, name == 'smollm2', None, []
        if name.startswith('minilm'):
            source = model_source(MINILM)
            self.tokenizer, self.rows = AutoTokenizer.from_pretrained(source), rows_of(args.data, 'validation')
            dense = bert_from_onnx(L3) if name == 'minilm-l3' else AutoModel.from_pretrained(source).eval()
        elif self.decodes: dense, _ = load_decoder(SMOLLM2)
        else:
            torch.manual_seed(0)
            dense = BertForSequenceClassification(BertConfig(max_position_embeddings=1024)).eval()
        self.models = {1.: dense}
        if name == 'minilm' or name.startswith(BY):
            texts, unit = texts_of(rows_of(args.data, 'train')), 'latency' if name.startswith(BY) else 'flops'
            engine = name.removeprefix(BY) if unit == 'latency' else 'torch'
            small = shrink_to_all(dense, [f'{b} {unit}' for b in args.budgets], texts, self.tokenizer, seed=0,
                                  engine=engine, progress=False)
            self.models |= dict(zip(args.budgets, (m for m, _ in small)))
        elif name != 'minilm-l3': self.models |= dict(random_settled(dense, args.budgets))
        x = dict(input_ids=torch.randint(1000, 20_000, (1, 128)))
        whole = count_flops(dense, **x)
        self.achieved = {b: count_flops(m, **x)/whole for b, m in self.models.items()}

    def batches(self): # Names of inputs, and ranges of activations
        g, (rows, width) = torch.Generator().manual_seed(0), (4, 32)
        ids = torch.randint(1000, 20_000, (8, rows, width), generator=g)
        def batch(x): return dict(input_ids=x, attention_mask=torch.ones_like(x))
        return [batch(x) for x in ids]

    def in_engines(self, engines, folder):
        "What is called, by budget and engine; and the files' megabytes"
        runs = {}
        for b, model in self.models.items():
            prepared = Prepared(model, self.batches(), Path(folder)/f'{b}', self.decodes)
            runs |= {(b, e): run for e, run in prepare_engines(prepared, engines).items()}
        return runs

    def score(self, run): # Of both halves, or nothing
        if not self.rows: return {}
        return {f'score_{k}': v for k, v in scores(Embeds(run), self.tokenizer, self.rows, HALVES).items()}


class Embeds(torch.nn.Module):
    "Whatever runs in an engine, as a module"
    def __init__(self, run):
        super().__init__()
        self.run = [run]
    def forward(self, input_ids, attention_mask, **_):
        return self.run[0](input_ids=input_ids, attention_mask=attention_mask)


def one_pass(run, ids): return lambda: run(input_ids=ids)


def one_more(run, ids):
    "Reads one token after a text"
    last, options = ids[:, -1:], {} if hasattr(run, 'inputs') else dict(use_cache=True)
    past = run(input_ids=ids, **options).past_key_values
    def call():
        run(input_ids=last, past_key_values=past, **options)
        if hasattr(past, 'crop'): past.crop(-1)  # torch's cache grows
    return call


def settings(subject, sizes):
    "Batch, tokens, `what`, and what makes a call of a run"
    if subject.decodes: return [(1, 128, 'first', one_pass), (1, 128, 'next', one_more)]
    return [(*map(int, s.split('x')), 'pass', one_pass) for s in sizes]


def measure(subject, runs, setting, quality, args):
    batch, tokens, what, call = setting
    ids = torch.randint(1000, 20_000, (batch, tokens), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): times = latency({k: call(r, ids) for k, r in runs.items()}, rounds=args.rounds)
    for key, ms, ratio, low, high in zip(runs, times.ms, times.ratio, times.low, times.high):
        budget, engine = key
        engine, _, dtype = engine.partition(' ')
        append_line(dict(model=subject.name, what=what, batch=batch, tokens=tokens, engine=engine,
                         dtype=dtype or 'float32', budget=budget, achieved=subject.achieved[budget], ms=float(ms),
                         ratio=float(ratio), low=float(low), high=float(high), rounds=args.rounds,
                         **quality.get(key, {}), **{**args.origin, 'when': now()}), args.records)
    print(subject.name, what, f'{batch}x{tokens}', args.threads, flush=True)
    times.index = pd.MultiIndex.from_tuples(times.index)
    print(times.ratio.unstack(0).round(3).to_string(), flush=True)


def main():
    parser = script_parser(__doc__, data=dict(required=True), budgets='0.6,0.4,0.2', threads=1,
                           records='results/peers.jsonl')
    parser.add_argument('--models', default='minilm,minilm-l3,bert,smollm2', help='names, separated by commas')
    parser.add_argument('--sizes', default=','.join(SIZES), help='batch x tokens, separated by commas')
    parser.add_argument('--engines', default=','.join(installed_engines()), help='of compecon.engines.ENGINES')
    parser.add_argument('--rounds', type=int, default=7, help='turns of each')
    args = read_args(parser, dict(models=MODELS, sizes=SIZES, engines=ENGINES), apart=['records'])
    args.origin = provenance()
    args.origin['versions'] |= package_versions('onnxruntime', 'openvino')
    for name in args.models:
        known = read_runs(args.records).to_dict('records') if Path(args.records).exists() else []
        done = {(r['model'], r['batch'], r['tokens'], r['what'], r['threads']) for r in known}
        subject = Subject(name, args)
        left = [s for s in settings(subject, args.sizes) if (name, *s[:3], args.threads) not in done]
        if not left: continue
        with tempfile.TemporaryDirectory() as folder:
            runs = subject.in_engines(args.engines, folder)
            quality = {k: subject.score(r) for k, r in runs.items() if k[1] in SCORED and args.threads == 1}
            for setting in left: measure(subject, runs, setting, quality, args)


if __name__ == '__main__': main()
