"""The contest: every method, with the same agents, data, distillation and epochs of recovery, on real tasks.

Run:  python benchmarks/contest.py --data DATA [--tasks stsb,cola] [--budgets 0.2,0.1] [--seeds 3] [--methods ...]

Every run is a line of OUT/runs.jsonl as soon as it ends; run again, it resumes. It may be started twice, with a task
for each.

An ablation is the same with a field of the plan changed, as in `--set sort_neurons=false`, `--set hidden=0`, or
`--methods repair,kprune --set epochs=0`. Its lines go to a file of their own, OUT/runs-FIELD=VALUE.jsonl, where fields
have the names that records have for them, and its runs start from the same dense models.
"""
import json
from pathlib import Path

from compecon.lab.bench import RunLog
from compecon.lab.cli import frontier_table
from compecon.lab.experiment import ALL_METHODS, RECORDED_AS, TASKS, Plan, run_plan
from compecon.lab.records import append_run
from compecon.lab.scripts import read_args, script_parser

FIELDS = {recorded: field for field,recorded in RECORDED_AS.items()}  # by the names that records have


def changes(settings):
    "Fields of the plan and their values, and the name of the file of records"
    pairs = [s.split('=') for s in settings]
    name = '-'.join(['runs', *(f'{RECORDED_AS.get(k, k)}={v}' for k,v in pairs)])
    return {FIELDS.get(k, k): json.loads(v) for k,v in pairs}, f'{name}.jsonl'


def copy_dense(plan, out, file):
    "The contest's dense records of a plan, for an ablation's file"
    dense, known = (RunLog(Path(out, name), plan).runs() for name in ('runs.jsonl', file))
    for record in dense[dense.method == 'dense'].to_dict('records'):
        if record['when'] in set(known.when): continue
        append_run({k: v for k,v in record.items() if v == v}, Path(out, file))  # NaN is what other records have


def main():
    parser = script_parser(__doc__, tasks='stsb,cola', budgets='0.2,0.1', seeds=3, methods=','.join(ALL_METHODS),
                           out='results/contest')
    parser.add_argument('--set', action='append', default=[], metavar='FIELD=VALUE',
                        help='another value for a field of compecon.lab.experiment.Plan')
    args = read_args(parser, dict(tasks=TASKS, methods=ALL_METHODS))
    changed, file = changes(args.set)
    common = dict(data=args.data, budgets=args.budgets, methods=tuple(args.methods), seeds=args.seeds, first=args.first)
    for plan in [Plan(**{**common, 'task': task, **changed}) for task in args.tasks]:
        if changed: copy_dense(plan, args.out, file)
        table = frontier_table(run_plan(plan, args.out, file=file, keep=False))
        epochs = f'dense {plan.dense_epochs} epochs, then {plan.epochs} for every method'
        print(f'\n{plan.task}: {epochs} {changed or ""}\n\n{table.to_markdown(index=False)}')


if __name__ == '__main__': main()
