"""Is attention more faithful after economic training than before it, and than after post-hoc pruning retrained to the same budget?

Run:  python experiments/faithfulness.py --data ../shared/data [--task stsb,cola] [--budgets 0.4,0.2] [--seeds 3] [--methods cleared,taylor]
or:   accelerate launch --multi_gpu --num_processes 2 experiments/faithfulness.py --data ../shared/data ..., with a GPU or without: the processes share out the seeds, and find the same models and scores as one

Every model that is examined is a line of RECORDS (results/faithfulness.jsonl) as soon as it is done; run again, it goes on where it was. Models are
those of benchmarks/contest.py, in OUT (results/contest/models): dense ones and settled ones are read where they are on disk, and otherwise trained as
there (same plan, same seeds) and kept there. Settled ones add no record to OUT/runs.jsonl: a record here has their score and their audited FLOPs.
All models of a task are examined on the same validation sentences, with the same orders at random. `sentences` of a record has what compecon.study.faithfulness.examine
found, a list over sentences for each column. A quick test: --samples 256 --sentences 8 --out FOLDER --records FOLDER/faithfulness.jsonl.
"""
import argparse
import math
import random
import time
import warnings
from pathlib import Path

import torch
from fastai.torch_core import default_device
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging

from compecon.core import package_versions
from compecon.lab.records import now, provenance
from compecon.lab.experiment import METHODS, TASKS, Bench, Plan, RunLog, _folder, _prepare, evaluate, load_dense, load_task, train_run
from compecon.study.faithfulness import ATTRIBUTIONS, BINS, CRITERIA, compare, conclude, examine, verdicts
from compecon.lab.records import append_line, shard_seeds, read_runs
from compecon.lab.glue import length_sorted, tokenize
from compecon.settle import save

OUT, RECORDS = 'results/contest', 'results/faithfulness.jsonl'


def pick(samples, special_ids, n, fewest):
    "The same sentences for every model: drawn among those with at least `fewest` content tokens, in the order of the data"
    special = set(special_ids)
    long = [i for i,(x,_) in enumerate(samples) if sum(t not in special for t in x['input_ids']) >= fewest]
    return [samples[i] for i in sorted(random.Random(0).sample(long, min(n, len(long))))]


def settled(bench, log, models, method, budget):
    "The model of a run: from disk, or by training, and then from disk; the bench gets its dense model only where something must be trained"
    plan, name = bench.plan, f'seed{bench.seed}' if method == 'dense' else f'{budget}-seed{bench.seed}'
    folder = _folder(models, plan, method)/name
    if not (folder/'config.json').is_file():
        if bench.dense is None: _prepare(bench, log, models, None)
        if method != 'dense':
            small, seconds, _ = train_run(bench, method, budget)
            save(small, folder, bench.tokenizer)
            print(f'{plan.task} seed {bench.seed} {method} at {budget}: trained in {seconds:.0f} s', flush=True)
    return AutoModelForSequenceClassification.from_pretrained(folder).to(default_device()).eval()


def asked(record, wanted):
    "Was this record made in the same way?"
    return all(record.get(k) == v for k,v in wanted.items())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--data', help='folder with glue/<task>/<split>.jsonl; the hub without it')
    parser.add_argument('--task', default='stsb,cola')
    parser.add_argument('--budgets', default='0.4,0.2', help="shares of the dense model's FLOPs")
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--first', type=int, default=0, help='the first seed')
    parser.add_argument('--methods', default='cleared,taylor', help='besides dense; any of compecon.lab.experiment.METHODS')
    parser.add_argument('--sentences', type=int, default=256, help='of validation, to examine each model on')
    parser.add_argument('--fewest', type=int, default=6, help='content tokens of a sentence')
    parser.add_argument('--draws', type=int, default=5, help='orders at random')
    parser.add_argument('--steps', type=int, default=16, help='of integrated gradients')
    parser.add_argument('--samples', type=int, help='only so many of each split, to try the script; needs an --out and --records of its own')
    parser.add_argument('--out', default=OUT)
    parser.add_argument('--records', default=RECORDS)
    parser.add_argument('--threads', type=int)
    args = parser.parse_args()
    tasks, methods, budgets = args.task.split(','), args.methods.split(','), tuple(float(b) for b in args.budgets.split(','))
    if unknown := set(tasks) - set(TASKS): parser.error(f'unknown tasks {", ".join(unknown)}: there are {", ".join(TASKS)}')
    if unknown := set(methods) - set(METHODS): parser.error(f'unknown methods {", ".join(unknown)}: there are {", ".join(METHODS)}')
    if args.samples and (Path(args.out) == Path(OUT) or Path(args.records) == Path(RECORDS)): parser.error('--samples would mix a try with results: name another --out and --records')
    logging.set_verbosity_error(); logging.disable_progress_bar(); warnings.filterwarnings('ignore')
    if args.threads: torch.set_num_threads(args.threads)
    models, where, mine = Path(args.out)/'models', provenance(default_device()), shard_seeds(range(args.first, args.first + args.seeds), int)
    where['versions'] |= package_versions('captum', 'scipy')

    for name in tasks:
        plan, task = Plan(task=name, data=args.data, budgets=budgets, seeds=args.seeds, first=args.first, methods=tuple(methods)), TASKS[name]
        log, how = RunLog(Path(args.out)/'runs.jsonl', plan), dict(asked=args.sentences, fewest=args.fewest, draws=args.draws, steps=args.steps, bins=list(BINS))
        def key(method, seed, budget): return dict(model=plan.model, task=name, method=method, seed=seed, budget=budget, plan=plan.same(method), **how)
        done = read_runs(args.records).to_dict('records')
        runs = [key(m, s, b) for s in mine for m,b in [('dense', 1.)] + [(m, b) for m in methods for b in budgets]]
        todo = [k for k in runs if not any(asked(r, k) for r in done)]
        if not todo: continue
        _, tokenizer = load_dense(plan.model, task)
        samples = {k: tokenize(task, rows, tokenizer)[:args.samples] for k,rows in load_task(name, plan.data).items()}
        tokens = 8*math.ceil(sum(len(x['input_ids']) for x,_ in samples['train'])/len(samples['train'])/8)
        chosen = pick(samples['validation'], tokenizer.all_special_ids, args.sentences, args.fewest)
        batches = list(length_sorted(chosen, 16, pad_id=tokenizer.pad_token_id or 0))
        for seed in sorted({k['seed'] for k in todo}):
            bench = Bench(plan, seed, task, samples, tokenizer, tokens)
            dense = bench.flops(settled(bench, log, models, 'dense', 1.))
            for k in (k for k in todo if k['seed'] == seed):
                model = settled(bench, log, models, k['method'], k['budget'])
                start = time.perf_counter()
                seen = examine(model, batches, tokenizer.mask_token_id, tokenizer.all_special_ids, args.draws, args.steps)
                metrics = evaluate(model, task, samples['validation'])
                record = dict(**k, split=task.validation, unit='flops', achieved=bench.flops(model)/dense, metric=next(iter(metrics)), score=next(iter(metrics.values())),
                              params=sum(p.numel() for p in model.parameters()), attributions=list(ATTRIBUTIONS), examine_seconds=round(time.perf_counter() - start, 1),
                              **{**where, 'when': now()}, sentences=seen.round(4).to_dict('list'))
                if args.samples: record['samples'] = args.samples
                append_line(record, args.records)
                gains = ', '.join(f"{a} {(seen[f'{a} comprehensiveness'] - seen['random comprehensiveness']).mean():+.3f}" for a in (*ATTRIBUTIONS, 'gradients', 'effects'))
                print(f"{name} seed {seed} {k['method']} at {k['budget']}: {record['metric']} {record['score']:.3f}, {len(seen)} sentences, full change {seen.full.abs().mean():.3f}, comprehensiveness over lots: {gains}; {record['examine_seconds']} s", flush=True)
    report(read_runs(args.records), methods)


def report(records, methods):
    "Verdicts on what is on disk"
    try: table = verdicts(compare(records, methods[0], methods[1:]))
    except ValueError as e: return print(e)
    print(table.round(3).to_markdown(index=False))
    for task, rows in table.groupby('task', sort=False): print(f'{task}: {conclude(rows)}')
    print(f'{len(CRITERIA)} measures of {len(ATTRIBUTIONS)} attributions: {conclude(table)}')


if __name__ == '__main__': main()
