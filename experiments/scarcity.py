"""What scarcity does to the attention of a standard model: heads, blocks or tokens are taken away, by value and at random, and attention is compared with what tokens are worth.

Run:  python experiments/scarcity.py --data ../shared/data [--task stsb|cola|mnli|wikitext] [--seeds 3] [--shares 0.8,0.6,0.4,0.2,0.1]
or:   accelerate launch --multi_gpu --num_processes 2 experiments/scarcity.py --data ../shared/data ..., with a GPU or without: the processes share out the seeds, and find the same models and scores as one

Every line of RECORDS (results/scarcity.jsonl) is one kind of scarcity at one share, for one task and seed, as compecon.study.scarcity.impose describes it, written as soon as it is known; run again, it goes on
where it was. A line of kind 'none' says how the model attends before anything is scarce, how far attention agrees with the value of tokens, and how far deletion and integrated gradients agree with each
other. Dense models are those of benchmarks/contest.py, in OUT (results/contest), and are made if they are not there. Sentences are drawn from those of the validation split with at least eight tokens, the
same for all seeds. `wikitext` asks SmolLM2 as it comes, on windows of --length tokens of the validation text, each after a token that starts texts; seeds draw windows; its score is the mean log-likelihood
of a token in nats, and a token is deleted by writing the one that ends texts over it. A quick test: --sentences 16 --out FOLDER --records FOLDER/scarcity.jsonl.
"""
import argparse
import math
import random
import warnings
from functools import partial
from operator import itemgetter
from pathlib import Path

import torch
from fastai.torch_core import default_device
from torch.utils.weak import WeakIdKeyDictionary
from transformers.utils import logging

from compecon.lab.records import provenance
from compecon.economy import Economy
from compecon.lab.experiment import MINILM, TASKS, Bench, Plan, RunLog, _prepare, load_dense, load_task
from compecon.lab.records import append_line, shard_seeds, read_runs
from compecon.lab.glue import length_sorted, loss_of, score, tokenize
from compecon.study.scarcity import KINDS, MEASURES, SHARES, content_tokens, deletion_values, impose, integrated_gradients, interval, observe, rank_correlation
from compecon.importance import taylor
from compecon.lab.wikitext import SMOLLM2, detokenize, encode, lm_batches, lm_loss, load_decoder, load_wikitext

OUT, RECORDS, WIKITEXT = 'results/contest', 'results/scarcity.jsonl', 'wikitext'


def look(model, batches, special, mask, loss_func, scoring, score, tokens, block_size, gradients=True):
    "What is the same for all kinds and shares of one seed: a record, and arguments of impose"
    batches = [({k: v.to(default_device()) for k,v in x.items() if k != 'idx'}, y.to(default_device())) for x,y in batches]
    contents = [content_tokens(x, special) for x,_ in batches]
    values = [deletion_values(model, x, y, loss_func, mask, c) for (x,y),c in zip(batches, contents)]
    paths = [integrated_gradients(model, x, c, mask).abs() for (x,_),c in zip(batches, contents)] if gradients else []
    economy = Economy(model, tokens=tokens, block_size=block_size)
    worth, before = taylor(economy, scoring, loss_func), observe(economy, batches, special, values)
    alike = dict(kind='none', share=1., **{k: interval(before[1][k].mean((1, 2))) for k in MEASURES}, by_head={k: v.mean(0).round(decimals=4).tolist() for k,v in before[1].items()})
    if gradients:
        by_path = observe(economy, batches, special, paths)[1]
        agree = torch.cat([rank_correlation(p, v.abs(), c) for p,v,c in zip(paths, values, contents)]).cpu()
        alike |= dict(deletion_and_gradients=interval(agree), by_gradients={k: interval(by_path[k].mean((1, 2))) for k in ('top', 'rank')})
    return alike, dict(economy=economy, batches=batches, special_ids=special, values=values, worth=worth, before=before, score=partial(score, torch.cat([y for _,y in batches])))


def classifier(plan, samples, tokenizer, out, seed, sentences):
    "A fine-tuned model of the contest, and sentences"
    task, pad = TASKS[plan.task], tokenizer.pad_token_id or 0
    tokens = 8*math.ceil(sum(len(x['input_ids']) for x,_ in samples['train'])/len(samples['train'])/8)
    bench = Bench(plan, seed, task, samples, tokenizer, tokens)
    _prepare(bench, RunLog(Path(out)/'runs.jsonl', plan), Path(out)/'models', None)
    long = [s for s in samples['validation'] if len(s[0]['input_ids']) >= 8]
    some = random.Random(0).sample(long, min(sentences, len(long)))
    def right(labels, logits, which): return next(iter(score(task, logits[which], labels[which]).values()))
    return look(bench.dense, length_sorted(some, 32, pad_id=pad), tokenizer.all_special_ids, tokenizer.mask_token_id, loss_of(task), bench.batches(), right, tokens, plan.block_size)


def decoder(plan, text, seed, sentences, length):
    "SmolLM2, and windows of text"
    model, tokenizer = load_decoder(SMOLLM2)
    ids, known = encode(tokenizer, text), WeakIdKeyDictionary()
    def windows(seed, n): return [(dict(input_ids=torch.cat([ids[:1].expand(len(y), 1), x['input_ids'][:, :-1]], 1)), x['input_ids']) for x,y in lm_batches(ids, length, 8, seed)[:math.ceil(n/8)]]
    def likelihood(labels, logits, which):
        if logits not in known: known[logits] = torch.stack([-lm_loss(l[None], y[None]) for l,y in zip(logits, labels)])
        return known[logits][which].mean().item()
    return look(model.to(default_device()), windows(seed, sentences), tokenizer.all_special_ids, tokenizer.eos_token_id, lm_loss, windows(1000 + seed, sentences), likelihood, length, plan.block_size, gradients=False)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--data', help='folder with glue/<task>/<split>.jsonl; the hub without it')
    parser.add_argument('--task', default='stsb', choices=[*TASKS, WIKITEXT])
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--first', type=int, default=0, help='the first seed')
    parser.add_argument('--shares', default=','.join(map(str, SHARES)))
    parser.add_argument('--sentences', type=int, default=256)
    parser.add_argument('--length', type=int, default=32, help='tokens of a window of wikitext')
    parser.add_argument('--out', default=OUT)
    parser.add_argument('--records', default=RECORDS)
    parser.add_argument('--threads', type=int)
    args = parser.parse_args()
    logging.set_verbosity_error(); logging.disable_progress_bar(); warnings.filterwarnings('ignore')
    if args.threads: torch.set_num_threads(args.threads)

    lm = args.task == WIKITEXT
    plan = Plan(model=SMOLLM2 if lm else MINILM, task='cola' if lm else args.task, data=args.data, seeds=args.seeds, first=args.first, epochs=0, methods=('taylor',))
    shares, done = [float(s) for s in args.shares.split(',')], read_runs(args.records).to_dict('records')
    wanted = [dict(task=args.task, model=plan.model, seed=s, kind=k, share=h, sentences=args.sentences, **(dict(length=args.length) if lm else {})) for s in range(plan.first, plan.first + plan.seeds) for k,h in [('none', 1.), *((k, h) for k in KINDS for h in shares)]]
    todo = shard_seeds((w for w in wanted if not any(all(d.get(k) == v for k,v in w.items()) for d in done)), itemgetter('seed'))
    if not todo: return print('nothing left to do here')
    if lm: text = detokenize(load_wikitext(args.data, splits=('validation',))['validation'])
    else:
        _, tokenizer = load_dense(plan.model, TASKS[plan.task])
        samples = {k: tokenize(TASKS[plan.task], rows, tokenizer) for k,rows in load_task(plan.task, plan.data).items()}
    for seed in sorted({w['seed'] for w in todo}):
        alike, given = decoder(plan, text, seed, args.sentences, args.length) if lm else classifier(plan, samples, tokenizer, args.out, seed, args.sentences)
        for w in (w for w in todo if w['seed'] == seed):
            row = append_line({**w, **(alike if w['kind'] == 'none' else impose(**given, kind=w['kind'], share=w['share'])), **provenance(default_device())}, args.records)
            print(args.task, seed, w['kind'], w['share'], {k: row[k] for k in ('score', 'control_score', 'dense') if k in row}, row['top'].get('excess', row['top']), flush=True)


if __name__ == '__main__': main()
