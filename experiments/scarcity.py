"""What scarcity does to the attention of a standard model: heads, blocks or tokens are taken away, by value and by lot, and attention is compared with what tokens are worth.

Run:  python experiments/scarcity.py --data ../shared/data [--task stsb|cola|mnli] [--seeds 3] [--shares 0.8,0.6,0.4,0.2,0.1]

Every line of RECORDS (results/scarcity.jsonl) is one kind of scarcity at one share, for one task and seed, as compecon.scarcity.impose describes it, written as soon as it is known; run again, it goes on
where it was. A line of kind 'none' says how the model attends before anything is scarce, how far attention agrees with the value of tokens, and how far deletion and integrated gradients agree with each
other. Dense models are those of benchmarks/contest.py, in OUT (results/contest), and are made if they are not there. Sentences are drawn from those of the validation split with at least eight tokens, the
same for all seeds. A try of the script itself: --sentences 16 --out FOLDER --records FOLDER/scarcity.jsonl.
"""
import argparse
import math
import random
import warnings
from pathlib import Path

import torch
from fastai.torch_core import default_device
from transformers.utils import logging

from compecon.clock import provenance
from compecon.economy import Economy
from compecon.experiment import TASKS, Bench, Plan, RunLog, _prepare, load_dense, load_task
from compecon.frontier import append_line, read_runs
from compecon.glue import length_sorted, loss_of, score, tokenize
from compecon.scarcity import KINDS, MEASURES, SHARES, content_tokens, deletion_values, impose, integrated_gradients, interval, observe, rank_correlation
from compecon.valuation import taylor

OUT, RECORDS = 'results/contest', 'results/scarcity.jsonl'


def look(bench, sentences):
    "What is the same for all kinds and shares of one seed: a record, and arguments of impose"
    model, task, device = bench.dense, bench.task, default_device()
    special, mask = bench.tokenizer.all_special_ids, bench.tokenizer.mask_token_id
    long = [s for s in bench.samples['validation'] if len(s[0]['input_ids']) >= 8]
    some = random.Random(0).sample(long, min(sentences, len(long)))
    batches = [({k: v.to(device) for k,v in x.items() if k != 'idx'}, y.to(device)) for x,y in length_sorted(some, 32, pad_id=bench.tokenizer.pad_token_id or 0)]
    contents = [content_tokens(x, special) for x,_ in batches]
    values = [deletion_values(model, x, y, loss_of(task), mask, c) for (x,y),c in zip(batches, contents)]
    paths = [integrated_gradients(model, x, c, mask).abs() for (x,_),c in zip(batches, contents)]
    agree = torch.cat([rank_correlation(p, v.abs(), c) for p,v,c in zip(paths, values, contents)]).cpu()
    economy = Economy(model, tokens=bench.tokens, block=bench.plan.block)
    worth = taylor(economy, bench.batches(), loss_of(task))
    labels = torch.cat([y for _,y in batches])
    before, by_path = observe(economy, batches, special, values), observe(economy, batches, special, paths)[1]
    alike = dict(kind='none', share=1., deletion_and_gradients=interval(agree), by_gradients={k: interval(by_path[k].mean((1, 2))) for k in ('top', 'rank')},
                 **{k: interval(before[1][k].mean((1, 2))) for k in MEASURES}, by_head={k: v.mean(0).round(decimals=4).tolist() for k,v in before[1].items()})
    def right(logits, which): return next(iter(score(task, logits[which], labels[which]).values()))
    return alike, dict(economy=economy, batches=batches, special_ids=special, values=values, worth=worth, before=before, score=right)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--data', help='folder with glue/<task>/<split>.jsonl; the hub without it')
    parser.add_argument('--task', default='stsb', choices=list(TASKS))
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--first', type=int, default=0, help='the first seed')
    parser.add_argument('--shares', default=','.join(map(str, SHARES)))
    parser.add_argument('--sentences', type=int, default=256)
    parser.add_argument('--out', default=OUT)
    parser.add_argument('--records', default=RECORDS)
    parser.add_argument('--threads', type=int)
    args = parser.parse_args()
    logging.set_verbosity_error(); logging.disable_progress_bar(); warnings.filterwarnings('ignore')
    if args.threads: torch.set_num_threads(args.threads)

    plan = Plan(task=args.task, data=args.data, seeds=args.seeds, first=args.first, epochs=0, methods=('taylor',))
    shares, done = [float(s) for s in args.shares.split(',')], read_runs(args.records).to_dict('records')
    wanted = [dict(task=plan.task, model=plan.model, seed=s, kind=k, share=h, sentences=args.sentences) for s in range(plan.first, plan.first + plan.seeds) for k,h in [('none', 1.), *((k, h) for k in KINDS for h in shares)]]
    todo = [w for w in wanted if not any(all(d.get(k) == v for k,v in w.items()) for d in done)]
    if not todo: return print('all is done')
    _, tokenizer = load_dense(plan.model, TASKS[plan.task])
    samples = {k: tokenize(TASKS[plan.task], rows, tokenizer) for k,rows in load_task(plan.task, plan.data).items()}
    tokens = 8*math.ceil(sum(len(x['input_ids']) for x,_ in samples['train'])/len(samples['train'])/8)
    for seed in sorted({w['seed'] for w in todo}):
        bench = Bench(plan, seed, TASKS[plan.task], samples, tokenizer, tokens)
        _prepare(bench, RunLog(Path(args.out)/'runs.jsonl', plan), Path(args.out)/'models', None)
        alike, given = look(bench, args.sentences)
        for w in (w for w in todo if w['seed'] == seed):
            row = append_line({**w, **(alike if w['kind'] == 'none' else impose(**given, kind=w['kind'], share=w['share'])), **provenance(default_device())}, args.records)
            print(plan.task, seed, w['kind'], w['share'], {k: row[k] for k in ('score', 'control_score', 'dense') if k in row}, row['top'].get('excess', row['top']), flush=True)


if __name__ == '__main__': main()
