"""Is attention more faithful after economic training than before it, and than after post-hoc pruning?

Run:  python experiments/faithfulness.py --data ../shared/data [--task stsb,cola] [--budgets 0.4,0.2] [--seeds 3]
      [--methods cleared,taylor]
or:   accelerate launch --multi_gpu --num_processes 2 experiments/faithfulness.py --data ../shared/data ...
      with a GPU or without: the processes share out the seeds, and find the same models and scores as one

Every model that is examined is a line of RECORDS (results/faithfulness.jsonl) as soon as it is done; run again, the
script resumes. Models are those of benchmarks/contest.py, in OUT (results/contest/models): dense ones and settled ones
are read where they are on disk, and otherwise trained as there (same plan, same seeds) and kept there. Settled ones add
no record to OUT/runs.jsonl: a record here has their score and their audited FLOPs. All models of a task are examined on
the same validation sentences, with the same random orders. `sentences` of a record has what
compecon.study.faithfulness.examine found, a list over sentences for each column.

A quick test: --samples 256 --sentences 8 --out FOLDER --records FOLDER/faithfulness.jsonl
"""
import random
import time
from operator import itemgetter
from pathlib import Path

from fastai.torch_core import default_device
from transformers import AutoModelForSequenceClassification

from compecon.core import package_versions
from compecon.lab.bench import RunLog, model_folder, prepare_dense, train_run
from compecon.lab.experiment import ALL_METHODS, TASKS, ClassifierBench, Plan, read_data
from compecon.lab.finetune import evaluate
from compecon.lab.glue import length_sorted
from compecon.lab.records import append_line, now, provenance, read_runs
from compecon.lab.scripts import by_seed, is_recorded, left_to_do, read_args, script_parser
from compecon.settle import save
from compecon.study.faithfulness import ATTRIBUTIONS, BINS, CRITERIA, compare, conclude, examine, verdicts

OUT, RECORDS = 'results/contest', 'results/faithfulness.jsonl'


def pick(samples, special_ids, n, fewest):
    "The same sentences for every model, with at least `fewest` content tokens, in the order of the data"
    special = set(special_ids)
    def content(x): return sum(t not in special for t in x['input_ids'])
    long = [i for i,(x,_) in enumerate(samples) if content(x) >= fewest]
    return [samples[i] for i in sorted(random.Random(0).sample(long, min(n, len(long))))]


def model_of(bench, out, method, budget):
    "The model of a run: from disk, or by training, and then from disk; a dense model is made only where it is needed"
    plan, models = bench.plan, Path(out)/'models'
    if method == 'dense': folder = bench.dense_folder(models)
    else: folder = model_folder(models, plan, method)/f'{budget}-seed{bench.seed}'
    if not (folder/'config.json').is_file():
        if bench.dense is None: prepare_dense(bench, RunLog(Path(out)/'runs.jsonl', plan), models)
        if method != 'dense':
            trained = train_run(bench, method, budget)
            save(trained.model, folder, bench.tokenizer)
            print(f'{plan.task} seed {bench.seed} {method} at {budget}: trained in {trained.seconds:.0f} s', flush=True)
    return AutoModelForSequenceClassification.from_pretrained(folder).to(default_device()).eval()


def arguments():
    "What is asked for"
    parser = script_parser(
        __doc__, task=dict(default='stsb,cola', help='names, separated by commas'), budgets='0.4,0.2', seeds=3,
        samples=None, out=OUT, records=RECORDS,
        methods=dict(default='cleared,taylor', help='besides dense; the first is compared with the others'))
    parser.add_argument('--sentences', type=int, default=256, help='of validation, to examine each model on (256)')
    parser.add_argument('--fewest', type=int, default=6, help='content tokens of a sentence (6)')
    parser.add_argument('--draws', type=int, default=5, help='random orders (5)')
    parser.add_argument('--steps', type=int, default=16, help='of integrated gradients (16)')
    return read_args(parser, dict(task=TASKS, methods=ALL_METHODS))


def wanted(args, plans):
    "All records: fields by which each is known"
    how = dict(asked=args.sentences, fewest=args.fewest, draws=args.draws, steps=args.steps, bins=list(BINS))
    models = [('dense', 1.), *((m, b) for m in args.methods for b in args.budgets)]
    return [dict(model=p.model, task=task, method=m, seed=seed, budget=b, plan=p.same(m), **how)
            for task,p in plans.items() for seed in range(args.first, args.first + args.seeds) for m,b in models]


class Examination:
    "Data and sentences of one task"
    def __init__(self, plan, args):
        self.plan, self.args, self.data = plan, args, read_data(plan, args.samples)
        tokenizer = self.data.tokenizer
        chosen = pick(self.data.samples['validation'], tokenizer.all_special_ids, args.sentences, args.fewest)
        self.batches = list(length_sorted(chosen, 16, pad_id=tokenizer.pad_token_id or 0))

    def seed(self, seed):
        "The bench of a seed, and the FLOPs of its dense model"
        bench = ClassifierBench(self.plan, seed, *self.data)
        return bench, bench.flops(model_of(bench, self.args.out, 'dense', 1.))

    def run(self, bench, dense_flops, method, budget):
        "What is found of one model"
        args, task, tokenizer = self.args, self.data.task, self.data.tokenizer
        model, start = model_of(bench, args.out, method, budget), time.perf_counter()
        seen = examine(model, self.batches, tokenizer.mask_token_id, tokenizer.all_special_ids, args.draws, args.steps)
        metric, score = next(iter(evaluate(model, task, self.data.samples['validation']).items()))
        found = dict(
            split=task.validation, unit='flops', achieved=bench.flops(model)/dense_flops, metric=metric, score=score,
            params=sum(p.numel() for p in model.parameters()), attributions=list(ATTRIBUTIONS),
            examine_seconds=round(time.perf_counter() - start, 1))
        return found, seen


def report(record, seen):
    "One model, on the terminal"
    def gain(a): return (seen[f'{a} comprehensiveness'] - seen['random comprehensiveness']).mean()
    gains = ', '.join(f'{a} {gain(a):+.3f}' for a in (*ATTRIBUTIONS, 'gradients', 'effects'))
    r = record
    print(f"{r['task']} seed {r['seed']} {r['method']} at {r['budget']}: {r['metric']} {r['score']:.3f}, "
          f'{len(seen)} sentences, full change {seen.full.abs().mean():.3f}, '
          f"comprehensiveness over random orders: {gains}; {r['examine_seconds']} s", flush=True)


def summary(args):
    "Verdicts on what is on disk"
    try: table = verdicts(compare(read_runs(args.records), args.methods[0], args.methods[1:]))
    except ValueError as e: return print(e)
    print(table.round(3).to_markdown(index=False))
    for task, rows in table.groupby('task', sort=False): print(f'{task}: {conclude(rows)}')
    print(f'{len(CRITERIA)} measures of {len(ATTRIBUTIONS)} attributions: {conclude(table)}')


def main():
    args = arguments()
    plans = {task: Plan(task=task, data=args.data, budgets=args.budgets, seeds=args.seeds, first=args.first,
                        methods=tuple(args.methods)) for task in args.task}
    origin, done = provenance(default_device()), read_runs(args.records).to_dict('records')
    origin['versions'] |= package_versions('captum', 'scipy')
    limit = dict(samples=args.samples) if args.samples else {}
    todo = left_to_do(wanted(args, plans), lambda w: is_recorded(done, w), itemgetter('seed'))
    for task, plan in plans.items():
        of_task = [w for w in todo if w['task'] == task]
        if not of_task: continue
        examination = Examination(plan, args)
        for seed, runs in by_seed(of_task, itemgetter('seed')):
            bench, dense_flops = examination.seed(seed)
            for w in runs:
                found, seen = examination.run(bench, dense_flops, w['method'], w['budget'])
                sentences = dict(sentences=seen.round(4).to_dict('list'))
                record = w | found | origin | dict(when=now()) | sentences | limit
                append_line(record, args.records)
                report(record, seen)
    summary(args)


if __name__ == '__main__': main()
