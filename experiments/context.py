"""Do gates that read their input beat gates that do not? Same budget, same dense model, same training.

Run:  python experiments/context.py --data ../shared/data [--task cola|stsb] [--budgets 0.4,0.2] [--seeds 3]
          [--methods contextual,static]
or:   accelerate launch --multi_gpu --num_processes 2 experiments/context.py --data ../shared/data ...

The second command works with a GPU or without: the processes share out the seeds, and find the same models and scores
as one. Every run is a line of RECORDS (results/context.jsonl) as soon as it ends; run again, the script resumes. Dense
models and their records are those of benchmarks/contest.py, in OUT (results/contest), made if they are not there.

Both methods trade for a quarter of the epochs and train with hard gates for the rest, taught by the dense model. Gates
stay in place, so that nothing differs but the router. `contextual` is then held to one price, found on training
sequences. `achieved` is its mean spend over validation, its router included, if only open agents ran (they all run
here: latency is that of masks); `achieved_by_tokens` weighs each sequence by its length.

A quick test: --samples 256 --out FOLDER --records FOLDER/context.jsonl.
"""
import time

import torch

from compecon.callback import EconomyCallback
from compecon.economy import Economy
from compecon.lab.bench import RunLog, measure, start_economy
from compecon.lab.experiment import TASKS, Plan, market_epochs, read_data
from compecon.lab.glue import length_sorted
from compecon.lab.scripts import by_seed, dense_bench, left_to_do, read_args, script_parser
from compecon.market import ClearedMarket
from compecon.router import ContextualEconomy, ContextualMarket, calibrate, spread

METHODS = {'contextual': (ContextualEconomy, ContextualMarket), 'static': (Economy, ClearedMarket)}


def sequences(bench, split): return length_sorted(bench.samples[split], 64, pad_id=bench.pad_id)


def settle_price(bench, economy, budget):
    "Harden the gates at the price that holds from now on; the mean cost of training sequences"
    if not isinstance(economy, ContextualEconomy): return economy.clear(budget)
    return calibrate(economy, sequences(bench, 'train'), budget)['mean']


def spends(bench, economy):
    "What validation sequences cost, each by itself and weighed by its tokens"
    if not isinstance(economy, ContextualEconomy):
        return dict(achieved=economy.spend(), achieved_by_tokens=economy.spend())
    batches = list(sequences(bench, 'validation'))
    found = spread(economy, batches)
    lengths = torch.cat([x['attention_mask'].sum(1) for x,_ in batches]).to(economy.log_values.device)
    by_tokens = (economy.spends()*lengths).sum()/lengths.sum()
    return dict(achieved=found.pop('mean'), achieved_by_tokens=by_tokens.item(), spread=found)


def run(bench, method, budget):
    "Trade, hold to one price, recover, measure; fields of a record, training seconds, and FLOPs, all gates executed"
    began, plan, (kind, market) = time.perf_counter(), bench.plan, METHODS[method]
    economy, looks = start_economy(bench, 'taylor', kind)
    trades = market_epochs(plan.epochs)
    bench.train(economy.model, trades, 1000 + bench.seed, EconomyCallback(market(budget), economy))
    trained = settle_price(bench, economy, budget)
    bench.train(economy.model, plan.epochs - trades, 2000 + bench.seed)
    seconds = time.perf_counter() - began
    found = measure(economy.model, bench) | spends(bench, economy) | dict(achieved_in_training=trained)
    flops = bench.look_flops(looks) + 3*bench.total*plan.epochs*len(bench.samples['train'])
    economy.remove()
    return found, seconds, flops


def say(record):
    where = f"{record['task']} seed {record['seed']} {record['method']} at {record['budget']}"
    scores = f"{record['metric']} {record['score']:.3f} (dense {record['dense']:.3f})"
    cost = f"achieved {record['achieved']:.4f}, {record.get('spread', '')} {record['train_seconds']:.0f} s"
    print(f'{where}: {scores}, {cost}', flush=True)


def report(runs):
    columns = runs[['seed', 'budget', 'method', 'achieved', 'score', 'dense']]
    print(columns.sort_values(['budget', 'seed', 'method']).to_markdown(index=False, floatfmt='.3f'))


def main():
    parser = script_parser(
        __doc__, task=dict(default='cola', choices=list(TASKS)), budgets='0.4,0.2', seeds=3, methods=','.join(METHODS),
        samples=None, out='results/contest', records='results/context.jsonl')
    args = read_args(parser, dict(methods=METHODS))
    plan = Plan(task=args.task, data=args.data, budgets=args.budgets, seeds=args.seeds, first=args.first)
    log, seeds = RunLog(args.records, plan), range(plan.first, plan.first + plan.seeds)
    todo = left_to_do(log.missing((s, m, b) for s in seeds for b in plan.budgets for m in args.methods))
    data = read_data(plan, args.samples) if todo else None
    for seed, runs in by_seed(todo):
        bench = dense_bench(plan, seed, data, args.out)
        for _, method, budget in runs:
            found, seconds, flops = run(bench, method, budget)
            if args.samples: found['samples'] = args.samples
            say(log.add(bench, method, budget, found, seconds, flops))
    if len(log.runs()): report(log.runs())


if __name__ == '__main__': main()
