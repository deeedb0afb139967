"""What `shrink` keeps, without labels and without training: all-MiniLM as it comes, STS-B by cosine.

Run:  python benchmarks/shrink.py --data DATA [--budgets 0.8,0.6,0.4,0.2] [--methods repair,...] [--seeds 3]
      [--without images,headlines] [--first 0] [--records FILE]

Texts of STS-B's training part are looked at, 512 of them, drawn anew for each seed. Scores are Spearman's correlation
with the labels, on two halves of the validation part, told apart once by a hash of the row: `validation`, by which
choices may be made, and `third`, which none has seen. With `--without`, a source of texts is left out of what is looked
at, and scored by itself (`elsewhere`). Every budget leaves its lines in RECORDS (results/shrink.jsonl) as soon as it is
there; run again, the script resumes. DATA is a folder with glue/stsb/*.jsonl.
"""
import hashlib
import json
import time
from pathlib import Path

import torch
from scipy.stats import spearmanr
from transformers import AutoModel, AutoTokenizer

from compecon.core import evaluating
from compecon.lab.finetune import MINILM, model_source
from compecon.lab.records import append_line, now, provenance, read_runs
from compecon.lab.scripts import read_args, script_parser
from compecon.shrink import SHRINK_METHODS, shrink_to_all

RECORDS = 'results/shrink.jsonl'
KEY = 'task', 'method', 'seed', 'budget', 'split', 'without', 'samples'


def rows_of(data, part):
    "Rows of STS-B with the source of each"
    folder = Path(data)/'glue'/'stsb'
    rows = [json.loads(line) for line in (folder/f'{part}.jsonl').read_text(encoding='utf-8').splitlines()]
    sources = (folder/f'{part}_source.txt').read_text(encoding='utf-8').splitlines()
    return [row | dict(source=source) for row, source in zip(rows, sources, strict=True)]


def is_third(row):
    "Does a row of the validation part belong to the half that no choice sees?"
    return hashlib.sha1(f'third {row["idx"]}'.encode()).digest()[0] % 2 == 1


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


def splits_of(without):
    "Which rows of the validation part each score is of"
    if without: return {'elsewhere': lambda row: row['source'] == without}
    return {'validation': lambda row: not is_third(row), 'third': is_third}


def arguments():
    looked_at = dict(default=512, help='texts to look at; with --records of its own for another number')
    parser = script_parser(__doc__, data=dict(required=True), budgets='0.8,0.6,0.4,0.2',
                           methods=','.join(SHRINK_METHODS), seeds=3, samples=looked_at, records=RECORDS, threads=1)
    parser.add_argument('--without', default='', help='sources to leave out, one after the other, separated by commas')
    return read_args(parser, dict(methods=SHRINK_METHODS), apart=['records'])


def run(model, tokenizer, train, validation, args, method, seed, without, dense):
    "All budgets of one method, seed and set of texts; those that are known are left out"
    done = {tuple(r.get(k) for k in KEY) for r in read_runs(args.records).to_dict('records')}
    splits, texts = splits_of(without), texts_of(r for r in train if r['source'] != without)
    def record(budget, split):
        return dict(task='stsb', method=method, seed=seed, budget=budget, split=split, without=without,
                    samples=args.samples)
    todo = [b for b in args.budgets if any(tuple(record(b, s)[k] for k in KEY) not in done for s in splits)]
    if not todo: return
    start = time.perf_counter()
    made = shrink_to_all(model, todo, texts, tokenizer, method=method, seed=seed, samples=args.samples, progress=False)
    for budget, (small, report) in zip(todo, made):
        seconds = time.perf_counter() - start
        for split, score in scores(small, tokenizer, validation, splits).items():
            append_line(dict(model=MINILM, labels=False, unit='flops', achieved=report.achieved, metric='spearman',
                             score=score, dense=dense[split], fidelity=report.fidelity, seconds=round(seconds, 1),
                             **record(budget, split), **{**args.origin, 'when': now()}), args.records)
            print(f'{method} seed {seed} at {budget}{f" without {without}" if without else ""}, {split}: '
                  f'{score:.4f} (dense {dense[split]:.4f}), {seconds:.0f} s', flush=True)


def table(records):
    "Points lost, mean over seeds, by split and budget"
    runs = read_runs(records)
    runs = runs.assign(points=100*(runs.score - runs.dense), split=runs.split.where(runs.without == '', runs.without))
    means = runs.groupby(['split', 'budget', 'method']).points.agg(['mean', 'std', 'count'])
    shown = means.apply(lambda r: f'{r["mean"]:+.2f} ± {r["std"]:.2f} ({r["count"]:.0f})', axis=1).unstack('method')
    return shown.sort_index(ascending=[True, False]).to_markdown()


def main():
    args = arguments()
    args.origin = provenance()
    source = model_source(MINILM)
    model, tokenizer = AutoModel.from_pretrained(source).eval(), AutoTokenizer.from_pretrained(source)
    train, validation = rows_of(args.data, 'train'), rows_of(args.data, 'validation')
    for without in [''] if not args.without else args.without.split(','):
        dense = scores(model, tokenizer, validation, splits_of(without))
        for seed in range(args.first, args.first + args.seeds):
            for method in args.methods:
                run(model, tokenizer, train, validation, args, method, seed, without, dense)
    print(table(args.records))


if __name__ == '__main__': main()
