"""Do gates that read their input beat gates that do not? Both at the same audited budget, on the same dense model, with the same training.

Run:  python experiments/context.py --data ../shared/data [--task cola|stsb] [--budgets 0.4,0.2] [--seeds 3] [--methods contextual,static]
or:   accelerate launch --multi_gpu --num_processes 2 experiments/context.py --data ../shared/data ..., with a GPU or without: the processes share out the seeds, and find the same models and scores as one

Every run is a line of RECORDS (results/context.jsonl) as soon as it ends; run again, it goes on where it was. Dense models and their records are
those of benchmarks/contest.py, in OUT (results/contest), and are made if they are not there.
Both methods trade for a quarter of the epochs and train with hard gates for the rest, taught by the dense model; gates stay in place, so that nothing differs but the
router. `contextual` is then held to one price, found on training sequences; `achieved` is its mean spend over validation, its router included, if only open agents ran (they all run here: latency is that of masks).
`achieved_by_tokens` weighs each sequence by its length. A quick test: --samples 256 --out FOLDER --records FOLDER/context.jsonl.
"""
import argparse
import copy
import math
import time
import warnings
from operator import itemgetter
from pathlib import Path

import torch
from transformers.utils import logging

from compecon.callback import EconomyCallback
from compecon.router import ContextualEconomy, ContextualMarket, calibrate, spread
from compecon.economy import Economy
from compecon.lab.experiment import TASKS, Bench, Plan, RunLog, _prepare, load_dense, load_task, market_epochs, measure
from compecon.sort_neurons import sort_neurons
from compecon.lab.records import shard_seeds
from compecon.lab.glue import length_sorted, loss_of, tokenize
from compecon.market import ClearedMarket

METHODS = {'contextual': (ContextualEconomy, ContextualMarket), 'static': (Economy, ClearedMarket)}
OUT, RECORDS = 'results/contest', 'results/context.jsonl'


def start(bench, kind):
    "A copy of the dense model with sorted neurons, as an economy; as the markets of compecon.lab.experiment start"
    model = copy.deepcopy(bench.dense)
    model.get_input_embeddings().requires_grad_(False)
    if bench.plan.sort_neurons: sort_neurons(model, 'taylor', bench.batches(), loss_of(bench.task), bench.seed, bench.tokens)
    return kind(model, tokens=bench.tokens, block_size=bench.plan.block_size)


def sequences(bench, split): return length_sorted(bench.samples[split], 64, pad_id=bench.tokenizer.pad_token_id or 0)


def settle_price(bench, economy, budget):
    "Harden the gates at the price that holds from now on; what training sequences cost"
    if isinstance(economy, ContextualEconomy): return calibrate(economy, sequences(bench, 'train'), budget)
    return dict(mean=economy.clear(budget))


def spends(bench, economy):
    "What validation sequences cost, each by itself and weighed by its tokens"
    if not isinstance(economy, ContextualEconomy): return dict(achieved=economy.spend(), achieved_by_tokens=economy.spend())
    batches = list(sequences(bench, 'validation'))
    found = spread(economy, batches)
    lengths = torch.cat([x['attention_mask'].sum(1) for x,_ in batches]).to(economy.log_values.device)
    share = (economy.spends()*lengths).sum()/lengths.sum()
    return dict(achieved=found.pop('mean'), achieved_by_tokens=share.item(), spread=found)


def run(bench, method, budget):
    "Trade, hold to one price, recover, measure; the fields of a record, training seconds, and training FLOPs with everything executed"
    began, plan, (kind, market) = time.perf_counter(), bench.plan, METHODS[method]
    economy, trades = start(bench, kind), market_epochs(plan.epochs)
    bench.train(economy.model, trades, 1000 + bench.seed, EconomyCallback(market(budget), economy))
    trained = settle_price(bench, economy, budget)
    bench.train(economy.model, plan.epochs - trades, 2000 + bench.seed)
    seconds = time.perf_counter() - began
    found = measure(economy.model, bench) | spends(bench, economy) | dict(achieved_in_training=trained['mean'])
    flops = 3*economy.prices.total*(plan.epochs*len(bench.samples['train']) + plan.sort_neurons*min(512, len(bench.samples['train'])))
    economy.remove()
    return found, seconds, flops


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--data', help='folder with glue/<task>/<split>.jsonl; the hub without it')
    parser.add_argument('--task', default='cola', choices=list(TASKS))
    parser.add_argument('--budgets', default='0.4,0.2', help="shares of the dense model's FLOPs, on average over sequences")
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--first', type=int, default=0, help='the first seed')
    parser.add_argument('--methods', default=','.join(METHODS))
    parser.add_argument('--samples', type=int, help='only so many of each split, to try the script; needs an --out and --records of its own')
    parser.add_argument('--out', default=OUT)
    parser.add_argument('--records', default=RECORDS)
    parser.add_argument('--threads', type=int)
    args = parser.parse_args()
    methods = args.methods.split(',')
    if unknown := set(methods) - set(METHODS): parser.error(f'unknown methods {", ".join(unknown)}: there are {", ".join(METHODS)}')
    if args.samples and (Path(args.out) == Path(OUT) or Path(args.records) == Path(RECORDS)): parser.error('--samples would mix a try with results: name another --out and --records')
    logging.set_verbosity_error(); logging.disable_progress_bar(); warnings.filterwarnings('ignore')
    if args.threads: torch.set_num_threads(args.threads)

    plan = Plan(task=args.task, data=args.data, budgets=tuple(float(b) for b in args.budgets.split(',')), seeds=args.seeds, first=args.first)
    task, log, dense_log = TASKS[plan.task], RunLog(args.records, plan), RunLog(Path(args.out)/'runs.jsonl', plan)
    todo = shard_seeds([(s, m, b) for s in range(plan.first, plan.first + plan.seeds) for b in plan.budgets for m in methods if log.find(m, s, b) is None], itemgetter(0))
    if todo:
        _, tokenizer = load_dense(plan.model, task)
        samples = {k: tokenize(task, rows, tokenizer)[:args.samples] for k,rows in load_task(plan.task, plan.data).items()}
        tokens = 8*math.ceil(sum(len(x['input_ids']) for x,_ in samples['train'])/len(samples['train'])/8)
    for seed in sorted({s for s,*_ in todo}):
        bench = Bench(plan, seed, task, samples, tokenizer, tokens)
        _prepare(bench, dense_log, Path(args.out)/'models', None)
        for _, method, budget in (t for t in todo if t[0] == seed):
            found, seconds, flops = run(bench, method, budget)
            if args.samples: found['samples'] = args.samples
            record = log.add(bench, method, budget, found, seconds, flops)
            print(f"{plan.task} seed {seed} {method} at {budget}: {record['metric']} {record['score']:.3f} (dense {bench.score:.3f}), achieved {record['achieved']:.4f}, {record.get('spread', '')} {record['train_seconds']:.0f} s", flush=True)
    runs = log.runs()
    if len(runs): print(runs[['seed', 'budget', 'method', 'achieved', 'score', 'dense']].sort_values(['budget', 'seed', 'method']).to_markdown(index=False, floatfmt='.3f'))


if __name__ == '__main__': main()
