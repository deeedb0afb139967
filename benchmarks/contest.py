"""The contest: every method, the same agents, data, distillation and epochs of recovery, on real tasks at small budgets.

Run:  python benchmarks/contest.py --data DATA [--tasks stsb,cola] [--budgets 0.2,0.1] [--seeds 3] [--methods ...]

Every run is a line of OUT/runs.jsonl as soon as it ends; run again, it goes on where it was. It may be started twice, with a task for each.
An ablation is the same with a field of the plan changed, as in `--set sorted neurons=false`, `--set hidden=0`, or `--methods repair,kprune --set epochs=0`;
its lines go to a file of their own, OUT/runs-FIELD=VALUE.jsonl, and its runs start from the same dense models.
"""
import argparse
import json
import warnings
from pathlib import Path

import torch
from transformers.utils import logging

from compecon.lab.cli import frontier_table
from compecon.lab.experiment import METHODS, Plan, run_plan
from compecon.lab.records import append_run, read_runs


def records(out, file): return read_runs(Path(out, file)).to_dict('records')


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--data', help='folder with glue/<task>/<split>.jsonl; the hub without it')
    parser.add_argument('--tasks', default='stsb,cola')
    parser.add_argument('--budgets', default='0.2,0.1', help="shares of the dense model's FLOPs")
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--first', type=int, default=0, help='the first seed')
    parser.add_argument('--methods', default=','.join(METHODS))
    parser.add_argument('--out', default='results/contest')
    parser.add_argument('--set', action='append', default=[], metavar='FIELD=VALUE', help='another value for a field of compecon.lab.experiment.Plan')
    parser.add_argument('--threads', type=int, default=None)
    args = parser.parse_args()
    logging.set_verbosity_error(); logging.disable_progress_bar(); warnings.filterwarnings('ignore')
    if args.threads: torch.set_num_threads(args.threads)
    budgets = tuple(float(b) for b in args.budgets.split(','))
    changes = {k: json.loads(v) for k, v in (c.split('=') for c in args.set)}
    plans = [Plan(task=t, data=args.data, budgets=budgets, methods=tuple(args.methods.split(',')), seeds=args.seeds, first=args.first, **changes) for t in args.tasks.split(',')]
    file = '-'.join(['runs', *args.set]) + '.jsonl'
    for plan in plans:
        if args.set:
            dense = [r for r in records(args.out, 'runs.jsonl') if r['method'] == 'dense' and r['plan'] == plan.same('dense')]
            known = [r['when'] for r in records(args.out, file)]
            for r in dense:
                if r['when'] not in known: append_run(r, Path(args.out, file))
        table = frontier_table(run_plan(plan, args.out, file=file, keep=False))
        print(f'\n{plan.task}: dense {plan.dense_epochs} epochs, then {plan.epochs} for every method {changes or ""}\n\n{table.to_markdown(index=False)}')


if __name__ == '__main__': main()
