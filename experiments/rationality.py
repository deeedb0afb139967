"""Is a fine-tuned model an economy? The tests of compecon.rationality, on the dense models of the contest.

Run:  python experiments/rationality.py --data ../shared/data [--task stsb|cola] [--seeds 3] [--budgets 0.6,0.4] [--methods taylor,fisher,signed]
or:   accelerate launch --multi_gpu --num_processes 2 experiments/rationality.py --data ../shared/data ..., with a GPU or without: the processes share out the seeds, and find the same models and scores as one. For the test `seeds` each asks for the dense models of all: make them before, by benchmarks/contest.py

Every finding is a line of RECORDS (results/rationality.jsonl) as soon as it is known, one for each task, seed, method, budget and test; run again, it goes on where it was.
Dense models and their records are those of benchmarks/contest.py, in OUT (results/contest), and are made if they are not there. No weight is changed after the fine-tune: neurons
are only re-ordered by Taylor's values, as everywhere (compecon.sorted neurons), but for the test `seeds`, for which neurons have to stay where they were.
Values are made of 512 training samples, as in the contest; the tests ask SAMPLES others of the training set, and those that ask of many open sets a quarter of them.
Tests that look at many budgets or at none are made once, and recorded at a budget of 1. What has no answer (Fisher's price is no slope; a price may be 0) is recorded as
'not asked', with its reason. Anything else that goes wrong (a loss that is no number, too few samples) ends the run. Lots are the same for all methods, and asked once.
A quick test: --samples 32 --out FOLDER --records FOLDER/rationality.jsonl.
"""
import argparse
import copy
import math
import random
import time
import warnings
from functools import partial
from operator import itemgetter
from pathlib import Path

import torch
from fastai.torch_core import default_device
from transformers.utils import logging

from compecon.lab.records import now, provenance
from compecon.economy import Economy
from compecon.lab.experiment import TASKS, Bench, Plan, RunLog, _prepare, load_dense, load_task
from compecon.sort_neurons import sort_neurons
from compecon.lab.records import shard_seeds, read_runs
from compecon.lab.glue import length_sorted, loss_of, tokenize
from compecon.study.rationality import KEY, READINGS, TESTS, WITHOUT_BUDGET, NotAsked, Trial, append_finding, stability, verdicts

OUT, RECORDS = 'results/contest', 'results/rationality.jsonl'
FEW = 'nested', 'interactions', 'additive' # Tests that ask of many open sets
BATCHES = 32 # Of a trial: choices are made at 16 prices, on two batches each


def found(bench, sorting):
    "The dense model as an economy, and a trial on the samples that appraise"
    model = copy.deepcopy(bench.dense)
    if sorting: sort_neurons(model, 'taylor', bench.batches(), loss_of(bench.task), bench.seed, bench.tokens)
    economy = Economy(model, tokens=bench.tokens, block_size=bench.plan.block_size)
    return economy, Trial(economy, bench.batches(), loss_of(bench.task))


def others(bench, n):
    "Batches of training samples that do not appraise"
    used = {i for x,_ in bench.batches() for i in x['idx'].tolist()}
    rest = [(x, y) for x,y in bench.samples['train'] if x['idx'] not in used]
    if len(rest) < n: raise ValueError(f'{len(rest)} training samples are left, {n} are asked for')
    return list(length_sorted(random.Random(9000 + bench.seed).sample(rest, n), math.ceil(n/BATCHES), pad_id=bench.tokenizer.pad_token_id or 0))


class Trials:
    "What the tests of one seed share, made when it is asked for"
    def __init__(self, bench, samples): self.bench, self.samples, self.whole, self.method = bench, samples, None, None

    def start(self):
        economy, self.appraiser = found(self.bench, self.bench.plan.sort_neurons)
        self.whole = Trial(economy, others(self.bench, self.samples), loss_of(self.bench.task))
        self.few = Trial(economy, self.whole.batches[::4], loss_of(self.bench.task))

    def run(self, test, method, budget):
        if self.whole is None: self.start()
        for t in (self.appraiser, self.whole, self.few): t.reading = method
        if method != self.method: self.whole.economy.values, self.method = self.appraiser.values().clamp_min(0).float(), method
        return TESTS[test](self.few if test in FEW else self.whole, budget, seed=self.bench.seed)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--data', help='folder with glue/<task>/<split>.jsonl; the hub without it')
    parser.add_argument('--task', default='stsb', choices=list(TASKS))
    parser.add_argument('--budgets', default='0.6,0.4', help="shares of the dense model's FLOPs")
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--first', type=int, default=0, help='the first seed')
    parser.add_argument('--methods', default='taylor,fisher,signed', help=f'whose valuations: {", ".join(READINGS)}')
    parser.add_argument('--tests', default=','.join([*TESTS, 'seeds']))
    parser.add_argument('--samples', type=int, default=384, help=f'at least {BATCHES}; other than 384 needs --records of its own')
    parser.add_argument('--out', default=OUT)
    parser.add_argument('--records', default=RECORDS)
    parser.add_argument('--threads', type=int)
    args = parser.parse_args()
    methods, tests, budgets = args.methods.split(','), args.tests.split(','), [float(b) for b in args.budgets.split(',')]
    for what, names, known in (('methods', methods, READINGS), ('tests', tests, [*TESTS, 'seeds'])):
        if unknown := set(names) - set(known): parser.error(f'unknown {what} {", ".join(unknown)}: there are {", ".join(known)}')
    if args.samples < BATCHES: parser.error(f'--samples {args.samples}: at least {BATCHES}')
    if args.samples != 384 and Path(args.records) == Path(RECORDS): parser.error('--samples would mix a try with results: name other --records')
    logging.set_verbosity_error(); logging.disable_progress_bar(); warnings.filterwarnings('ignore')
    if args.threads: torch.set_num_threads(args.threads)

    plan = Plan(task=args.task, data=args.data, budgets=tuple(budgets), seeds=args.seeds, first=args.first, epochs=0, methods=('taylor',))
    task, dense_log, origin = TASKS[plan.task], RunLog(Path(args.out)/'runs.jsonl', plan), provenance(default_device())
    seeds = range(plan.first, plan.first + plan.seeds)
    def key(seed, method, budget, test): return dict(zip(KEY, (plan.model, plan.task, seed, method, budget, test)))
    runs = read_runs(args.records)
    done = {tuple(r) for r in runs[list(KEY)].itertuples(index=False)} if 'test' in runs else set()
    todo = shard_seeds([(s, m, b, t) for s in seeds for m in methods for t,b in [*((t, b) for b in budgets for t in tests if t not in WITHOUT_BUDGET), *((t, 1.) for t in tests if t in WITHOUT_BUDGET)]
            if not (t == 'seeds' and len(seeds) < 2) and tuple(key(s, m, b, t).values()) not in done], itemgetter(0))
    if todo:
        _, tokenizer = load_dense(plan.model, task)
        samples = {k: tokenize(task, rows, tokenizer) for k,rows in load_task(plan.task, plan.data).items()}
        tokens = 8*math.ceil(sum(len(x['input_ids']) for x,_ in samples['train'])/len(samples['train'])/8)
        def bench_of(seed):
            bench = Bench(plan, seed, task, samples, tokenizer, tokens)
            _prepare(bench, dense_log, Path(args.out)/'models', None)
            return bench
        plain = {} # Trials of models as they are, of all seeds
        def across(seed, method):
            for s in seeds:
                if s not in plain: plain[s] = found(bench_of(s), False)[1]
                plain[s].reading = method
            return stability(plain[seed], [plain[s].values() for s in seeds if s != seed], seed=seed)

    for seed in sorted({s for s,*_ in todo}):
        bench = bench_of(seed)
        trials = Trials(bench, args.samples)
        for _, method, budget, test in (t for t in todo if t[0] == seed):
            began = time.perf_counter()
            try: finding = (partial(across, seed, method) if test == 'seeds' else partial(trials.run, test, method, budget))()
            except NotAsked as e: finding = dict(test=test, verdict='not asked', reason=str(e))
            finding = append_finding(finding | key(seed, method, budget, test) | dict(split='train', tokens=tokens, dense=bench.score, seconds=time.perf_counter() - began, **{**origin, 'when': now()}), args.records)
            told = finding.get('reason') or f"{finding['measured']:.3f} ({finding['low']:.3f} to {finding['high']:.3f}), control {finding['control']:.3f}"
            print(f"{plan.task} seed {seed} {method} at {budget:g}, {test}: {told}: {finding['verdict']} ({finding['seconds']:.0f} s)", flush=True)
    runs = read_runs(args.records)
    if 'test' in runs: print(verdicts(runs[runs.task == plan.task])[['method', 'budget', 'test', 'seeds', 'measured', 'low', 'high', 'goal', 'control', 'verdict']].to_markdown(index=False, floatfmt='.3f'))


if __name__ == '__main__': main()
