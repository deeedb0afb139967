"""Is a fine-tuned model an economy? The tests of compecon.study, on the dense models of the contest.

Run:  python experiments/rationality.py --data ../shared/data [--task stsb|cola] [--seeds 3] [--budgets 0.6,0.4]
      [--methods taylor,fisher,signed]
or:   accelerate launch --multi_gpu --num_processes 2 experiments/rationality.py --data ../shared/data ...
      with a GPU or without: the processes share out the seeds, and find the same models and scores as one. For the
      test `seeds` each needs the dense models of all: make them before, by benchmarks/contest.py

Every finding is a line of RECORDS (results/rationality.jsonl) as soon as it is known, one for each task, seed, method,
budget and test; run again, the script resumes. Dense models and their records are those of benchmarks/contest.py, in
OUT (results/contest), and are made if they are not there. No weight is changed after the fine-tune: neurons are only
sorted by Taylor's values, as everywhere (compecon.importance.sort_neurons), but for the test `seeds`, for which neurons
have to stay where they are.

Values are estimated on 512 training samples, as in the contest; the tests ask SAMPLES others of the training set, and
those that ask of many open sets a quarter of them. Tests that look at many budgets or at none are made once, and
recorded at a budget of 1. What has no answer (Fisher's price is no slope; a price may be 0) is recorded as 'not asked',
with its reason. Anything else that goes wrong (a loss that is no number, too few samples) ends the run. Random draws
are the same for all methods, and asked once.

A quick test: --samples 32 --out FOLDER --records FOLDER/rationality.jsonl
"""
import copy
import math
import random
import time

from fastai.torch_core import default_device

from compecon.economy import Economy
from compecon.importance import sort_neurons
from compecon.lab.experiment import TASKS, Plan, read_data
from compecon.lab.glue import length_sorted
from compecon.lab.records import now, provenance, read_runs
from compecon.lab.scripts import by_seed, dense_bench, left_to_do, read_args, script_parser
from compecon.study.rationality import KEY, READINGS, WITHOUT_BUDGET, NotAsked, Trial, append_finding, verdicts
from compecon.study.rationality_tests import TESTS, stability

OUT, RECORDS = 'results/contest', 'results/rationality.jsonl'
FEW = 'nested', 'interactions', 'additive' # Tests that ask of many open sets
BATCHES = 32 # Of a trial: choices are made at 16 prices, on two batches each
ALL_TESTS = [*TESTS, 'seeds']
SHOWN = ['method', 'budget', 'test', 'seeds', 'measured', 'low', 'high', 'goal', 'control', 'verdict']


def scoring_trial(bench, sorting):
    "The dense model as an economy, in a trial on the samples on which values are estimated"
    model = copy.deepcopy(bench.dense)
    if sorting: sort_neurons(model, 'taylor', bench.batches(), bench.loss_func, bench.seed, bench.tokens)
    economy = Economy(model, tokens=bench.tokens, block_size=bench.plan.block_size)
    return Trial(economy, bench.batches(), bench.loss_func)


def other_batches(bench, n):
    "Batches of training samples on which no values are estimated"
    used = {i for x,_ in bench.batches() for i in x['idx'].tolist()}
    rest = [(x, y) for x,y in bench.samples['train'] if x['idx'] not in used]
    if len(rest) < n: raise ValueError(f'{len(rest)} training samples are left, {n} are asked for')
    drawn = random.Random(9000 + bench.seed).sample(rest, n)
    return list(length_sorted(drawn, math.ceil(n/BATCHES), pad_id=bench.pad_id))


class SeedTests:
    "The tests of one seed"
    def __init__(self, bench, samples):
        self.bench, self.method = bench, None
        self.scoring = scoring_trial(bench, bench.plan.sort_neurons)
        economy = self.scoring.economy
        self.whole = Trial(economy, other_batches(bench, samples), bench.loss_func)
        self.few = Trial(economy, self.whole.batches[::4], bench.loss_func)

    def run(self, test, method, budget):
        for trial in (self.scoring, self.whole, self.few): trial.reading = method
        if method != self.method:
            self.whole.economy.values = self.scoring.values().clamp_min(0).float()
            self.method = method
        return TESTS[test](self.few if test in FEW else self.whole, budget, seed=self.bench.seed)


class Study:
    "Dense models of all seeds, and their tests, made when they are needed"
    def __init__(self, plan, args):
        self.plan, self.args, self.data = plan, args, read_data(plan)
        self.benches, self.unsorted = {}, {}
        self.tests = None # Of the latest seed

    def bench(self, seed):
        if seed not in self.benches: self.benches[seed] = dense_bench(self.plan, seed, self.data, self.args.out)
        return self.benches[seed]

    def run(self, seed, method, budget, test):
        if test == 'seeds': return self.across_seeds(seed, method)
        if self.tests is None or self.tests.bench.seed != seed:
            self.tests = SeedTests(self.bench(seed), self.args.samples)
        return self.tests.run(test, method, budget)

    def across_seeds(self, seed, method):
        "Stability of values over seeds, with neurons where they are"
        seeds = range(self.args.first, self.args.first + self.args.seeds)
        for s in seeds:
            if s not in self.unsorted: self.unsorted[s] = scoring_trial(self.bench(s), False)
            self.unsorted[s].reading = method
        others = [self.unsorted[s].values() for s in seeds if s != seed]
        return stability(self.unsorted[seed], others, seed=seed)


def arguments():
    "What is asked for"
    parser = script_parser(
        __doc__, task=dict(default='stsb', choices=list(TASKS)), budgets='0.6,0.4', seeds=3, out=OUT, records=RECORDS,
        methods=dict(default=','.join(READINGS), help='how values are read off gradients'),
        samples=dict(default=384, help=f'that tests ask, at least {BATCHES}; others than 384 need --records'))
    parser.add_argument('--tests', default=','.join(ALL_TESTS), help='names, separated by commas')
    args = read_args(parser, dict(methods=READINGS, tests=ALL_TESTS), apart=('records',))
    if args.samples < BATCHES: parser.error(f'--samples {args.samples}: at least {BATCHES}')
    return args


def wanted(args):
    "All findings: seed, method, budget and test"
    once = [t for t in args.tests if t in WITHOUT_BUDGET and (t != 'seeds' or args.seeds > 1)]
    often = [t for t in args.tests if t not in WITHOUT_BUDGET]
    asked = [(b, t) for b in args.budgets for t in often] + [(1., t) for t in once]
    seeds = range(args.first, args.first + args.seeds)
    return [(s, m, b, t) for s in seeds for m in args.methods for b,t in asked]


def report(finding):
    "One finding, on the terminal"
    f = finding
    if f['verdict'] == 'not asked': found = f['reason']
    else: found = f"{f['measured']:.3f} ({f['low']:.3f} to {f['high']:.3f}), control {f['control']:.3f}"
    print(f"{f['task']} seed {f['seed']} {f['method']} at {f['budget']:g}, {f['test']}: {found}: "
          f"{f['verdict']} ({f['seconds']:.0f} s)", flush=True)


def ask(study, run):
    "The finding of one test, or why it has none"
    try: return study.run(*run)
    except NotAsked as e: return dict(test=run[-1], verdict='not asked', reason=str(e))


def summary(args):
    "Verdicts on what is on disk"
    runs = read_runs(args.records)
    if 'test' not in runs: return
    print(verdicts(runs[runs.task == args.task])[SHOWN].to_markdown(index=False, floatfmt='.3f'))


def main():
    args = arguments()
    plan = Plan(task=args.task, data=args.data, budgets=args.budgets, seeds=args.seeds, first=args.first, epochs=0,
                methods=('taylor',))
    runs, origin = read_runs(args.records), provenance(default_device())
    def key(run): return dict(zip(KEY, (plan.model, plan.task, *run)))
    done = set(runs[list(KEY)].itertuples(index=False, name=None)) if 'test' in runs else set()
    todo = left_to_do(wanted(args), lambda run: tuple(key(run).values()) in done)
    if todo: study = Study(plan, args)
    for seed, of_seed in by_seed(todo):
        bench = study.bench(seed)
        for run in of_seed:
            start = time.perf_counter()
            finding = ask(study, run) | key(run)
            seconds = time.perf_counter() - start
            more = dict(split='train', tokens=bench.tokens, dense=bench.score, seconds=seconds)
            report(append_finding(finding | more | origin | dict(when=now()), args.records))
    summary(args)


if __name__ == '__main__': main()
