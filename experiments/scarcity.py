"""What scarcity does to the attention of a standard model.

Heads, neuron blocks or tokens are taken away, by value and at random, and attention is compared with what tokens are
worth.

Run:  python experiments/scarcity.py --data ../shared/data [--task stsb|cola|mnli|wikitext] [--seeds 3]
      [--shares 0.8,0.6,0.4,0.2,0.1]
or:   accelerate launch --multi_gpu --num_processes 2 experiments/scarcity.py --data ../shared/data ...
      with a GPU or without: the processes share out the seeds, and find the same models and scores as one

Every line of RECORDS (results/scarcity.jsonl) is one kind of scarcity at one share, for one task and seed, as
compecon.study.scarcity.impose describes it, written as soon as it is known; run again, the script resumes. A line of
kind 'none' says how the model attends before anything is scarce, how far attention agrees with the value of tokens, and
how far deletion and integrated gradients agree with each other. Dense models are those of benchmarks/contest.py, in OUT
(results/contest), and are made if they are not there. Sentences are drawn from those of the validation split with at
least eight tokens, the same for all seeds.

`wikitext` uses SmolLM2 as it comes, on windows of --length tokens of the validation text, each after a token that
starts texts; seeds draw windows; its score is the mean log-likelihood of a token in nats, and a token is deleted by
writing the one that ends texts over it.

A quick test: --sentences 16 --out FOLDER --records FOLDER/scarcity.jsonl
"""
import math
import random
from collections.abc import Callable
from functools import partial
from operator import itemgetter
from typing import NamedTuple

import torch
from fastai.torch_core import default_device
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from compecon.core import model_inputs
from compecon.economy import Economy
from compecon.importance import taylor
from compecon.lab.agreement import score
from compecon.lab.experiment import TASKS, Plan, read_data
from compecon.lab.finetune import MINILM
from compecon.lab.glue import length_sorted
from compecon.lab.records import append_line, provenance, read_runs
from compecon.lab.scripts import by_seed, dense_bench, is_recorded, left_to_do, read_args, script_parser
from compecon.lab.wikitext import SMOLLM2, detokenize, encode, lm_batches, lm_loss, load_decoder, load_wikitext
from compecon.study.scarcity import (
    KINDS, MEASURES, SHARES, content_tokens, deletion_values, impose, integrated_gradients, interval, observe,
    rank_correlation)

OUT, RECORDS, WIKITEXT = 'results/contest', 'results/scarcity.jsonl', 'wikitext'


class Subject(NamedTuple):
    "A model and sentences, and how they are judged"
    model: nn.Module
    batches: list # Pairs of inputs and labels
    scoring: list # The same, for importance scores
    loss_func: Callable # `loss_func(logits, labels)`
    score: Callable # `score(labels, logits, which)`, on the sentences of these numbers
    special_ids: list # Of the tokenizer
    mask_id: int # The token that replaces others
    tokens: int # Length of sequences, for the price list
    gradients: bool # Ask for integrated gradients, too?


class Likelihood:
    "Mean log-likelihood of a token; what is known of some logits is kept as long as they are"
    def __init__(self): self.known = WeakIdKeyDictionary()

    def __call__(self, labels, logits, which):
        if logits not in self.known:
            losses = [lm_loss(l[None], y[None]) for l,y in zip(logits, labels)]
            self.known[logits] = -torch.stack(losses)
        return self.known[logits][which].mean().item()


def classifier(bench, sentences):
    "A fine-tuned model of the contest, and sentences of at least eight tokens"
    task, tokenizer = bench.task, bench.tokenizer
    long = [s for s in bench.samples['validation'] if len(s[0]['input_ids']) >= 8]
    drawn = random.Random(0).sample(long, min(sentences, len(long)))
    def first_metric(labels, logits, which): return next(iter(score(task, logits[which], labels[which]).values()))
    return Subject(
        bench.dense, length_sorted(drawn, 32, pad_id=bench.pad_id), bench.batches(), bench.loss_func, first_metric,
        tokenizer.all_special_ids, tokenizer.mask_token_id, bench.tokens, gradients=True)


def decoder(text, seed, sentences, length):
    "SmolLM2, and windows of text"
    model, tokenizer = load_decoder(SMOLLM2)
    ids = encode(tokenizer, text)
    def windows(seed):
        drawn = lm_batches(ids, length, 8, seed)[:math.ceil(sentences/8)]
        return [(dict(input_ids=after_start(x['input_ids'])), x['input_ids']) for x,_ in drawn]
    def after_start(x): return torch.cat([ids[:1].expand(len(x), 1), x[:, :-1]], 1)
    return Subject(
        model.to(default_device()), windows(seed), windows(1000 + seed), lm_loss, Likelihood(),
        tokenizer.all_special_ids, tokenizer.eos_token_id, length, gradients=False)


def look(subject, block_size):
    "What all kinds and shares of a seed have in common: a record of kind 'none', and arguments of impose"
    def on_device(batch): return model_inputs(batch, default_device()), batch[1].to(default_device())
    s, batches = subject, [on_device(b) for b in subject.batches]
    contents = [content_tokens(x, s.special_ids) for x,_ in batches]
    values = [deletion_values(s.model, x, y, s.loss_func, s.mask_id, c) for (x,y),c in zip(batches, contents)]
    paths = [integrated_gradients(s.model, x, c, s.mask_id).abs() for (x,_),c in zip(batches, contents) if s.gradients]
    economy = Economy(s.model, tokens=s.tokens, block_size=block_size)
    worth, before = taylor(economy, s.scoring, s.loss_func), observe(economy, batches, s.special_ids, values)
    record = describe_before(before[1])
    if s.gradients:
        by_path = observe(economy, batches, s.special_ids, paths)[1]
        record |= compare_values(values, paths, contents, by_path)
    given = dict(
        economy=economy, batches=batches, special_ids=s.special_ids, values=values, worth=worth, before=before,
        score=partial(s.score, torch.cat([y for _,y in batches])))
    return record, given


def describe_before(found):
    "How a model attends before anything is scarce"
    means = {k: interval(found[k].mean((1, 2))) for k in MEASURES}
    by_head = {k: v.mean(0).round(decimals=4).tolist() for k,v in found.items()}
    return dict(kind='none', share=1., **means, by_head=by_head)


def compare_values(values, paths, contents, by_path):
    "How far the two opinions on what a token is worth agree, and what attention does by the second"
    agree = [rank_correlation(p, v.abs(), c) for p,v,c in zip(paths, values, contents)]
    by_gradients = {k: interval(by_path[k].mean((1, 2))) for k in ('top', 'rank')}
    return dict(deletion_and_gradients=interval(torch.cat(agree).cpu()), by_gradients=by_gradients)


def arguments():
    "What is asked for"
    task = dict(default='stsb', choices=[*TASKS, WIKITEXT])
    parser = script_parser(__doc__, task=task, seeds=3, out=OUT, records=RECORDS)
    shares = ','.join(map(str, SHARES))
    parser.add_argument('--shares', default=shares, help=f'of heads, blocks or tokens that are left ({shares})')
    parser.add_argument('--sentences', type=int, default=256, help='of validation (256)')
    parser.add_argument('--length', type=int, default=32, help='tokens of a window of wikitext (32)')
    args = read_args(parser)
    args.shares = [float(s) for s in args.shares.split(',')]
    return args


def make_plan(args):
    "Dense models of the contest; of SmolLM2 only its name and its block size are used"
    lm = args.task == WIKITEXT
    return Plan(
        model=SMOLLM2 if lm else MINILM, task='cola' if lm else args.task, data=args.data, seeds=args.seeds,
        first=args.first, epochs=0, methods=('taylor',))


def wanted(args, plan):
    "All records: fields by which each is known"
    kinds = [('none', 1.), *((k, s) for k in KINDS for s in args.shares)]
    windows = dict(length=args.length) if args.task == WIKITEXT else {}
    return [dict(task=args.task, model=plan.model, seed=seed, kind=k, share=s, sentences=args.sentences, **windows)
            for seed in range(args.first, args.first + args.seeds) for k,s in kinds]


def subjects(args, plan):
    "From seed to its model and sentences"
    if args.task == WIKITEXT:
        text = detokenize(load_wikitext(args.data, splits=('validation',))['validation'])
        return lambda seed: decoder(text, seed, args.sentences, args.length)
    data = read_data(plan)
    return lambda seed: classifier(dense_bench(plan, seed, data, args.out), args.sentences)


def report(row):
    "One record, on the terminal"
    scores = {k: round(row[k], 3) for k in ('score', 'control_score', 'dense') if k in row}
    top = row['top'].get('excess', row['top'])
    print(row['task'], row['seed'], row['kind'], row['share'], scores, top, flush=True)


def main():
    args = arguments()
    plan, done = make_plan(args), read_runs(args.records).to_dict('records')
    todo = left_to_do(wanted(args, plan), lambda w: is_recorded(done, w), itemgetter('seed'))
    if not todo: return print('nothing left to do here')
    subject_of = subjects(args, plan)
    for seed, runs in by_seed(todo, itemgetter('seed')):
        before, given = look(subject_of(seed), plan.block_size)
        for w in runs:
            found = before if w['kind'] == 'none' else impose(**given, kind=w['kind'], share=w['share'])
            report(append_line(w | found | provenance(default_device()), args.records))


if __name__ == '__main__': main()
