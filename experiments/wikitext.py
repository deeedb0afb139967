"""How much perplexity does a decoder lose when it loses a quarter, a half, two thirds of its parameters? Every method from the same tuned dense model, with the same steps of recovery; what each looks at before is in its bill.

Run:  python experiments/wikitext.py --data ../shared/data [--model smollm2] [--params 0.74,0.52,0.33] [--methods economy,repair,taylor,fisher,magnitude] [--seeds 1]
or:   accelerate launch --multi_gpu --num_processes 2 experiments/wikitext.py --data ../shared/data ..., with a GPU or without: the processes share out the seeds (--seeds 2), and find the same models and scores as one

Every run is a line of RECORDS (results/wikitext.jsonl) as soon as it ends; run again, it goes on where it was. Dense models are kept in OUT (results/wikitext/models).

Data. --data is a folder with `wikitext-103/{validation,test}.txt`, the hub without it, or 'python' (the language reference of this Python). The training split is not used: the dense model is tuned, agents are appraised
and small models recover on the first nine tenths of the articles of the validation split; choices (which candidate wins) are made on --held-tokens of the last tenth. The test split is read once for each run, for its last number:
the first --test-tokens of it (as WikiText counts: words and ends of lines), all of it without, in windows of --context tokens, --stride apart. `score` is word perplexity; `metrics` has that of tokens as well, `relative` the loss of each.

Parameters. A share is one of the *whole* model, embeddings included, as in SIMPLE (Tao et al. 2023), whose figures for GPT-2 are 14.23 dense, and 15.10, 16.51, 19.08 at 0.74, 0.52, 0.33. SIMPLE narrows the residual stream, and embeddings with it; here heads and
neurons leave and embeddings stay (21 % of SmolLM2-135M), so layers have to lose more. --without-embeddings takes the share of the layers' parameters only. `achieved` is the share that was asked for, `achieved_params` and `achieved_layers` are both.

`economy` lets Taylor and Fisher values at several rates of exchange compete in trials of an eighth and a quarter of the steps; the others choose once. `repair` adds 0.3 of what agents write to Fisher's values (both in shares of their sum), and refits output projections by least squares before recovery. `any-price` is one checkpoint for all shares: the same values without a refit,
and as many steps as specialists for all shares take together, each at a share at random. `dense:more` is the dense
model with the same recovery steps, by which one may compare as well. Token embeddings are frozen throughout. 'smollm2' is instruction-tuned and was dequantised from 4 bits: see `note`. With --steps 0 there is no recovery.

A repair learns from more windows (--refit) than importance scores look at: they are cheap, four passes forward, and what it needs to know is more. With --dtype bfloat16 products are made in bfloat16, in all but the tests; weights and their updates stay in float32.

On two slow cores: --batch 2 --dtype bfloat16 --refit 96 --test-tokens 20000 --context 512 --stride 512 --steps 60 --dense-steps 120 --threads 1, some ten minutes a run, with --lr 2e-4 for repair and 3e-4 for taylor, fisher and any-price: chosen among three on held-out articles, for repair and for taylor (a rate that mends a broken model breaks a mended one). --refit 96 holds 4.5 GB. On a graphics card: --windows 8.
"""
import argparse
import copy
import hashlib
import json
import math
import random
import re
import time
import warnings
from functools import partial
from operator import itemgetter
from pathlib import Path

import torch
from transformers.utils import logging

from compecon.lab.records import now, provenance
from compecon.economy import Economy
from compecon.halving import head_weight, successive_halving
from compecon.sort_neurons import sort_neurons
from compecon.flops import count_flops, latency
from compecon.lab.records import append_run, shard_seeds, read_runs
from compecon.repair import repair
from compecon.settle import save, settle
from compecon.curves import allocate
from compecon.importance import SCORES, activation, score_agents
from compecon.lab.wikitext import SMOLLM2, detokenize, encode, lm_batches, lm_loss, load_decoder, load_wikitext, perplexity, python_reference, tune

CANDIDATES = [('taylor', r) for r in (1, 2, 4)] + [('fisher', r*r) for r in (1, 2, 4)] # Fisher values are squares
FAMILY = 'any-price'
METHODS = 'economy', 'repair', *SCORES, FAMILY, 'dense:more'
REPRESENTATION = 0.3 # Share of what agents write in the values of `repair`
SHARED = 'model', 'task', 'length', 'batch', 'dense_steps', 'dense_lr', 'dtype', 'context', 'stride', 'test_tokens' # By which two dense runs are the same
OUT, RECORDS = 'results/wikitext', 'results/wikitext.jsonl'


def first(text, tokens):
    "The lines with which a text has at least so many words and ends of lines; all of them if `None`"
    lines, count = text.splitlines(keepends=True), 0
    for i, line in enumerate(lines):
        if tokens is not None and count >= tokens: return ''.join(lines[:i])
        count += len(line.split()) + 1
    return text


def texts(args):
    "The text to tune on, the one for choices, and the one for the last number; and what makes them readable"
    if args.data == 'python':
        read, clean = python_reference(), None
        tuning, held = read['train'], read['validation']
    else:
        read, clean = load_wikitext(args.data, args.raw), detokenize
        starts = [m.start() for m in re.finditer(r'(?m)^ = [^=]', read['validation'])]
        cut = starts[len(starts)*9//10] if len(starts) > 9 else len(read['validation'])*9//10
        tuning, held = read['validation'][:cut], read['validation'][cut:]
    return tuning, first(held, args.held_tokens), first(read['test'], args.test_tokens), clean


def size(model): return sum(p.numel() for p in model.parameters())
def embeddings(model): return sum(p.numel() for p in {e.weight for e in (model.get_input_embeddings(), model.get_output_embeddings()) if e is not None})


class Bench:
    "What the runs of one seed share"
    def __init__(self, args, seed, dense, tokenizer, read):
        self.args, self.seed, self.dense, self.tokenizer = args, seed, dense, tokenizer
        self.tuning, self.held, self.test, self.clean = read
        ids = encode(tokenizer, self.clean(self.tuning) if self.clean else self.tuning)
        self.batches = lm_batches(ids, args.length, args.batch, seed)
        shuffled = lm_batches(ids, args.length, args.batch, 1000 + seed)
        self.looks, self.refit = (shuffled[:max(1, n//args.batch)] for n in (args.looks, args.refit))
        self.dtype, self.family = None if args.dtype == 'float32' else getattr(torch, args.dtype), None
        self.held_windows = len(encode(tokenizer, self.clean(self.held) if self.clean else self.held))/args.length

    def prepare(self):
        for e in (self.dense.get_input_embeddings(), self.dense.get_output_embeddings()):
            if e is not None: e.requires_grad_(False)
        self.flops = partial(count_flops, input_ids=torch.ones(1, self.args.length, dtype=torch.long, device=next(self.dense.parameters()).device))
        return self

    def casting(self): return torch.autocast(torch.device(self.args.device).type, self.dtype, enabled=self.dtype is not None)
    def tune(self, model, steps, lr): return tune(model, self.batches, steps, lr, seed=self.seed, dtype=self.dtype)
    def recover(self, model, steps, seed=0, before=None): return tune(model, self.batches, steps, self.args.lr, self.dense, seed=seed + self.seed, hidden=self.args.hidden, dtype=self.dtype, before=before)
    def held_out(self, model): return perplexity(model, self.tokenizer, self.held, self.args.length, self.args.length, self.clean, self.args.windows)
    def final(self, model): return perplexity(model, self.tokenizer, self.test, self.args.context, self.args.stride, self.clean, self.args.windows)

    def budget(self, share): # As compecon.cost curves takes it
        if not self.args.without_embeddings: return f'{share} params'
        return f'{embeddings(self.dense) + math.floor(share*(size(self.dense) - embeddings(self.dense)))} params'


def founded(bench, appraiser):
    "A copy of the dense model with sorted neurons, as an economy"
    model = copy.deepcopy(bench.dense)
    with bench.casting(): sort_neurons(model, appraiser, bench.looks, lm_loss, bench.seed, bench.args.length)
    return Economy(model, tokens=bench.args.length, block_size=bench.args.block_size)


def compete(bench, share):
    "Candidates of several importance scores and rates in a tournament; the best as it was before its trial, training FLOPs, and the tournament"
    made, rounds, looks = {}, (bench.args.steps//8, bench.args.steps//4), 0
    for method in dict.fromkeys(m for m,_ in CANDIDATES):
        economy = founded(bench, method)
        with bench.casting(): values, looks = score_agents(economy, method, bench.looks, lm_loss, bench.seed).clone(), looks + 2
        for rate in (r for m,r in CANDIDATES if m == method):
            economy.values = values
            head_weight(economy, rate)
            allocate(economy, bench.budget(share))
            made[method, rate] = settle(economy).cpu()  # on the device only while it competes
        economy.remove()
    device, spent = next(bench.dense.parameters()).device, []
    def train(model, r):
        bench.recover(model.to(device), rounds[r], seed=4000 + r)
        spent.append(rounds[r]*bench.args.batch*(3*bench.flops(model) + bench.flops(bench.dense)))
    def judge(model):
        spent.append(bench.held_windows*bench.flops(model))
        return math.log(bench.held_out(model)['token'])
    table = successive_halving({name: partial(copy.deepcopy, made[name]) for name in made}, train, judge)
    return made[table.index[0]].to(device), 3*looks*len(bench.looks)*bench.args.batch*bench.flops(bench.dense) + sum(spent), table


def mixture(economy, bench):
    "Fisher values with a share of what agents write"
    costs = economy.prices.costs.to(economy.log_values.device)
    with bench.casting(): worth, written = (v/(v*costs).sum() for v in (score_agents(economy, 'fisher', bench.looks, lm_loss).clone(), activation(economy, bench.looks)))
    return worth + REPRESENTATION*written


def choose(bench, method, share):
    "From the dense model to a settled one; training FLOPs; what else is worth a record"
    if method == 'economy':
        small, flops, table = compete(bench, share)
        return small, flops, dict(successive_halving=[[*name, *(None if math.isnan(x) else round(x, 4) for x in row)] for name,row in zip(table.index, table.values)])
    economy, looks = founded(bench, 'fisher' if method == 'repair' else method), len(bench.looks)*dict(random=0, magnitude=0, activation=2/3).get(method, 2)
    if method == 'repair': economy.values = mixture(economy, bench)
    else:
        with bench.casting(): score_agents(economy, method, bench.looks, lm_loss, bench.seed)
    allocate(economy, bench.budget(share))
    if method == 'repair':
        with bench.casting(): repair(economy, bench.refit)
        looks += len(bench.looks)/3 + len(bench.refit)*(1 + 3)/3
    small = settle(economy)
    economy.remove()
    return small, 3*looks*bench.args.batch*bench.flops(bench.dense), {}


def train_family(bench, shares, file):
    "The economy of one checkpoint for all shares, from a file or trained now, each step at a share at random; training seconds and FLOPs"
    if file.is_file():
        economy, kept = Economy(copy.deepcopy(bench.dense), tokens=bench.args.length, block_size=bench.args.block_size), torch.load(file)
        economy.model.load_state_dict(kept['model'])
        economy.log_values.data = kept['log_values'].to(economy.log_values.device)
        return economy, kept['seconds'], kept['flops']
    start, steps, rng, opened = time.perf_counter(), bench.args.steps*len(shares), random.Random(bench.seed), []
    economy = founded(bench, 'fisher')
    economy.values = mixture(economy, bench)
    for share in shares:
        allocate(economy, bench.budget(share))
        opened.append(economy.open.float())
    def before(_): economy.forced = rng.choice(opened)
    values = economy.log_values.data.clone()
    bench.recover(economy.model, steps, seed=3000, before=before)
    economy.forced, economy.log_values.data = None, values
    seconds, flops = time.perf_counter() - start, bench.args.batch*(3*(2 + 1/3)*len(bench.looks) + 4*steps)*bench.flops(bench.dense)
    torch.save(dict(model=economy.model.state_dict(), log_values=values, seconds=seconds, flops=flops), part := file.with_suffix('.part'))
    part.replace(file)
    return economy, seconds, flops


def measure(bench, model, dense=None):
    "The fields of a record that say what a model is like; `dense` is the dense model's record"
    found, ids = bench.final(model), torch.ones(1, bench.args.length, dtype=torch.long, device=next(model.parameters()).device)
    with torch.no_grad(): timing = latency({'dense': lambda: bench.dense(ids), 'settled': lambda: model(ids)}, rounds=5, warmup=1).loc['settled']
    layers, all_layers = size(model) - embeddings(model), size(bench.dense) - embeddings(bench.dense)
    shares = dict(achieved_params=size(model)/size(bench.dense), achieved_layers=layers/all_layers, achieved_flops=bench.flops(model)/bench.flops(bench.dense))
    was = dense['metrics'] if dense else found
    return shares | dict(achieved=shares['achieved_layers' if bench.args.without_embeddings else 'achieved_params'], score=found['word'], dense=was['word'],
        metrics=found, held_out=bench.held_out(model)['token'], relative={k: found[k]/was[k] - 1 for k in ('word', 'token')}, unknown=bench.test.split().count('<unk>'),
        params=size(model), latency_ratio=timing.ratio, latency_low=timing.low, latency_high=timing.high)


class Log:
    "The records of one plan in a file"
    def __init__(self, args, task, shares):
        self.args, self.shares, self.file, self.provenance = args, shares, Path(args.records), provenance(args.device)
        keys = *SHARED, 'steps', 'lr', 'hidden', 'looks', 'refit', 'block', 'held_tokens', 'without_embeddings'
        self.plan = {k: getattr(args, k) for k in keys if k not in ('model', 'task')} | dict(model=Path(args.model).name if Path(args.model).is_dir() else args.model, task=task)

    def same(self, method): return {k: v for k,v in self.plan.items() if (method != 'dense' or k in SHARED) and (method == 'repair' or k != 'refit')} | (dict(shares=self.shares) if method == FAMILY else {})
    def runs(self):
        runs = read_runs(self.file)
        return runs[[p == self.same(m) for p,m in zip(runs.plan, runs.method)]] if 'plan' in runs else runs
    def find(self, method, seed, budget):
        runs = self.runs()
        runs = runs[(runs.method == method) & (runs.seed == seed) & (runs.budget == budget)]
        return None if runs.empty else runs.iloc[-1].to_dict()

    def add(self, bench, method, budget, found, steps, seconds, flops):
        note = 'instruction-tuned, dequantised from 4 bits' if self.args.model == SMOLLM2 else ''
        return append_run(dict(model=self.plan['model'], task=self.plan['task'], split='test', method=method, seed=bench.seed, unit='params', budget=budget, metric='word perplexity (less is better)', **found,
            epochs=steps/len(bench.batches), train_seconds=seconds, train_flops=float(flops), note=note, plan=self.same(method), **{**self.provenance, 'when': now()}), self.file)


def dense_of(args, log, seed, tokenizer, pretrained, read):
    "A bench with its tuned dense model, from disk or made now, and its record"
    folder = Path(args.out)/'models'/f"{log.plan['model'].replace('/', '-')}-{log.plan['task']}-{args.dense_steps}x{args.batch}x{args.length}-{args.dense_lr:g}-{args.dtype}-seed{seed}"
    found, made = log.find('dense', seed, 1.), (folder/'config.json').is_file()
    bench = Bench(args, seed, load_decoder(folder)[0].to(args.device) if made else copy.deepcopy(pretrained).to(args.device), tokenizer, read).prepare()
    if found is not None and made: return bench, found
    start, before = time.perf_counter(), None
    if not made:
        before = bench.held_out(bench.dense)['token']
        bench.tune(bench.dense, args.dense_steps, args.dense_lr)
        save(bench.dense, folder, tokenizer)
    seconds = time.perf_counter() - start
    if found is None: found = log.add(bench, 'dense', 1., measure(bench, bench.dense) | dict(held_out_before=before), args.dense_steps, seconds, 3*args.dense_steps*args.batch*bench.flops(bench.dense))
    return bench, found


def run(bench, log, method, share, dense, shares):
    "Choose, settle, recover, measure, record; the checkpoint for all shares is trained once, and each of its records has the whole bill"
    start, args, more = time.perf_counter(), bench.args, {}
    if method == FAMILY:
        if bench.family is None: bench.family = train_family(bench, shares, Path(args.out)/'models'/f"family-{hashlib.sha1(json.dumps([log.same(FAMILY), bench.seed]).encode()).hexdigest()[:8]}.pt")
        economy, seconds, flops = bench.family
        allocate(economy, bench.budget(share))
        small, steps = settle(economy), args.steps*len(shares)
    else:
        small, flops, more = (copy.deepcopy(bench.dense), 0, {}) if method == 'dense:more' else choose(bench, method, share)
        more['held_out_before'] = bench.held_out(small)['token']
        for e in (small.get_input_embeddings(), small.get_output_embeddings()):
            if e is not None: e.requires_grad_(False)
        bench.recover(small, args.steps, seed=2000)
        steps, seconds, flops = args.steps, time.perf_counter() - start, flops + args.steps*args.batch*(3*bench.flops(small) + bench.flops(bench.dense))
    return log.add(bench, method, share, measure(bench, small, dense) | more, steps, seconds, flops)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--data', help="folder with wikitext-103/<split>.txt; the hub without it; or 'python'")
    parser.add_argument('--raw', action='store_true', help='the edition without <unk>')
    parser.add_argument('--model', default=SMOLLM2, help="'smollm2', a folder, or a decoder on the hub")
    parser.add_argument('--params', default='0.74,0.52,0.33', help="shares of the dense model's parameters")
    parser.add_argument('--without-embeddings', action='store_true', help='shares of the layers only')
    parser.add_argument('--methods', default='economy,repair,taylor,fisher,magnitude')
    parser.add_argument('--seeds', type=int, default=1)
    parser.add_argument('--first', type=int, default=0, help='the first seed')
    for name, default, kind, what in (('length', 256, int, 'tokens of a window in training'), ('batch', 4, int, 'windows of a step'), ('steps', 100, int, 'of recovery, for every method'), ('lr', 3e-4, float, 'of recovery'), ('hidden', 0.3, float, 'weight of hidden states in recovery'),
            ('dense-steps', 100, int, 'of the dense model'), ('dense-lr', 5e-5, float, 'of the dense model'), ('looks', 16, int, 'windows that importance scores see'), ('refit', 64, int, 'windows that a repair fits'), ('block', 32, int, 'neurons of an agent'),
            ('context', 1024, int, 'tokens seen at once, in the test'), ('stride', 512, int, 'tokens between windows, in the test'), ('held-tokens', 5000, int, 'of the text for choices'), ('windows', 1, int, 'scored at once')):
        parser.add_argument(f'--{name}', type=kind, default=default, help=f'{what} ({default})')
    parser.add_argument('--dtype', default='float32', choices=('float32', 'bfloat16'), help='of products in training and appraisal; tests are in float32')
    parser.add_argument('--test-tokens', type=int, help='only the first so many of the test split, as WikiText counts; all without it')
    parser.add_argument('--out', default=OUT)
    parser.add_argument('--records', default=RECORDS)
    parser.add_argument('--threads', type=int)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    args = parser.parse_args()
    methods, shares = args.methods.split(','), sorted({float(p) for p in args.params.split(',')}, reverse=True)
    if unknown := set(methods) - set(METHODS): parser.error(f'unknown methods {", ".join(unknown)}: there are {", ".join(METHODS)}')
    if not all(0 < p <= 1 for p in shares): parser.error(f'--params {args.params}: shares are in (0, 1]')
    logging.set_verbosity_error(); logging.disable_progress_bar(); warnings.filterwarnings('ignore')
    if args.threads: torch.set_num_threads(args.threads)

    log = Log(args, 'python' if args.data == 'python' else 'wikitext-103' + '-raw'*args.raw, shares)
    wanted = [(s, m, p) for s in range(args.first, args.first + args.seeds) for m,p in [('dense', 1.)] + [(m, 1.) for m in methods if m == 'dense:more'] + [(FAMILY, p) for p in shares if FAMILY in methods] + [(m, p) for p in shares for m in methods if m not in (FAMILY, 'dense:more')]]
    todo = shard_seeds([w for w in wanted if log.find(w[1], w[0], w[2]) is None], itemgetter(0))
    if todo:
        read = texts(args)
        pretrained, tokenizer = load_decoder(args.model)
        floor = embeddings(pretrained)/size(pretrained)
        if not args.without_embeddings and min(shares) <= floor: parser.error(f'--params {min(shares)}: embeddings alone are {floor:.2f} of this model')
    for seed in sorted({s for s,*_ in todo}):
        bench, dense = dense_of(args, log, seed, tokenizer, pretrained, read)
        print(f"seed {seed} dense: {dense['score']:.2f} by the word, {dense['metrics']['token']:.2f} by the token, on {dense['metrics']['words']} words; held out {dense['held_out']:.2f}", flush=True)
        for _, method, share in (t for t in todo if t[0] == seed and t[1] != 'dense'):
            found = run(bench, log, method, share, dense, shares)
            print(f"seed {seed} {method} at {share}: {found['score']:.2f} ({found['relative']['word']:+.1%} by the word, {found['relative']['token']:+.1%} by the token), held out {found.get('held_out_before', math.nan):.2f} before recovery, {found['held_out']:.2f} after, layers {found['achieved_layers']:.3f}, FLOPs {found['achieved_flops']:.3f}, {found['train_seconds']:.0f} s", flush=True)
    runs = log.runs()
    runs = runs[[(s, m, p) in wanted for s,m,p in zip(runs.seed, runs.method, runs.budget)]] if len(runs) else runs
    if len(runs): print(runs.assign(token=[m['token'] for m in runs.metrics], loss=[r['word'] for r in runs.relative])[['seed', 'budget', 'method', 'achieved_params', 'score', 'token', 'loss', 'dense']].sort_values(['budget', 'seed', 'score']).to_markdown(index=False, floatfmt='.3f'))


if __name__ == '__main__': main()
