"""How fast does a settled decoder write? Tokens a second and the time to the first token, beside the dense model.

Run:  python benchmarks/generation.py [--model smollm2] [--params 0.74,0.52,0.33] [--prompt 64] [--new 32]

It prints a table, and appends to results/generation.jsonl. Agents are chosen by the magnitude of their weights; other
methods keep other numbers of them in each layer. Prompts are cuts of this Python's language reference, so all models
read the same. They write greedily and never stop early, so all write the same number of tokens. Within a round, models
take turns in random order; medians over rounds, with quartiles of the ratio to dense. The first token is prefill;
`tokens_s` is of those after it, with a cache.
"""
import random
import statistics
import time
from pathlib import Path

import pandas as pd
import torch

from compecon.core import Budget
from compecon.economy import Economy
from compecon.importance import score_agents
from compecon.lab.records import append_line, provenance
from compecon.lab.scripts import read_args, script_parser
from compecon.lab.wikitext import SMOLLM2, encode, load_decoder, python_reference
from compecon.settle import settle

RECORDS = 'results/generation.jsonl'
SHOWN = ['budget', 'params', 'first_token_ms', 'tokens_s', 'first_token_ratio', 'speed_ratio', 'speed_low',
         'speed_high']


def smaller(model, share, tokens, block_size):
    "The model settled at a share of its parameters"
    economy = Economy(model, tokens=tokens, block_size=block_size)
    score_agents(economy, 'magnitude')
    economy.clear(f'{share} params')
    small = settle(economy)
    economy.remove()
    return small


def seconds(ids):
    "The time, once the device has done what it was asked"
    if ids.is_cuda: torch.cuda.synchronize()
    return time.perf_counter()


@torch.no_grad()
def write(model, ids, new):
    "Seconds to the first token, and tokens a second after it"
    start = seconds(ids)
    out = model(ids, use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1:].argmax(-1)
    first = seconds(ids)
    for _ in range(new - 1):
        out = model(token, use_cache=True, past_key_values=out.past_key_values)
        token = out.logits[:, -1:].argmax(-1)
    return first - start, (new - 1)/(seconds(ids) - first)


def timed(models, ids, args):
    "For each model, what `write` found in each round"
    times, order, rng = {share: [] for share in models}, list(models), random.Random(0)
    for r in range(args.rounds + 1):  # the first round is warm-up
        start = rng.randrange(len(ids) - args.prompt)
        prompt = ids[None, start:start + args.prompt].to(args.device)
        rng.shuffle(order)
        for share in order:
            found = write(models[share], prompt, args.new)
            if r > 0: times[share].append(found)
    return times


def record(share, model, times, dense_times, args):
    "A line of the records, without its provenance"
    firsts, speeds = zip(*times)
    dense_firsts, dense_speeds = zip(*dense_times)
    slower = [t/d for t, d in zip(firsts, dense_firsts)]
    faster = [s/d for s, d in zip(speeds, dense_speeds)]
    low, middle, high = statistics.quantiles(faster, n=4, method='inclusive')
    name = Path(args.model).name if Path(args.model).is_dir() else args.model
    return dict(model=name, budget=share, unit='params', params=sum(w.numel() for w in model.parameters()),
                prompt=args.prompt, new=args.new, rounds=args.rounds,
                first_token_ms=1e3*statistics.median(firsts), tokens_s=statistics.median(speeds),
                first_token_ratio=statistics.median(slower), speed_ratio=middle, speed_low=low, speed_high=high,
                dtype=str(model.dtype).removeprefix('torch.'))


def share_of_params(text):
    "A share as in 0.74 or '0.74 params'; raises `ValueError` for other budgets"
    budget = Budget(text if len(text.split()) > 1 else f'{text} params')
    if budget.unit != 'params' or not budget.is_share:
        raise ValueError(f"budget={str(budget)!r}: a share of parameters is needed, as in 0.74 or '0.74 params'")
    return budget.amount


def arguments():
    parser = script_parser(__doc__, device='cuda' if torch.cuda.is_available() else 'cpu', records=RECORDS)
    parser.add_argument('--model', default=SMOLLM2, help=f"'{SMOLLM2}', a folder, or a name on the hub ({SMOLLM2})")
    parser.add_argument('--params', default='0.74,0.52,0.33', help="shares of the dense model's, embeddings included")
    parser.add_argument('--prompt', type=int, default=64, help='tokens (64)')
    parser.add_argument('--new', type=int, default=32, help='tokens, at least 2 (32)')
    parser.add_argument('--rounds', type=int, default=9, help='at least 2 (9)')
    parser.add_argument('--block-size', type=int, default=32, help='neurons of a block (32)')
    args = read_args(parser)
    if args.new < 2 or args.rounds < 2: parser.error('--new and --rounds are at least 2')
    try: args.params = [share_of_params(p) for p in args.params.split(',')]
    except ValueError as e: parser.error(str(e))
    return args


def main():
    args = arguments()
    dense, tokenizer = load_decoder(args.model)
    dense.to(args.device)
    models = {1.: dense} | {p: smaller(dense, p, args.prompt, args.block_size) for p in args.params}
    ids = encode(tokenizer, python_reference()['test'][:40*args.prompt*args.rounds])
    times, origin = timed(models, ids, args), provenance(args.device)
    rows = [record(p, model, times[p], times[1.], args) | origin for p, model in models.items()]
    for row in rows: append_line(row, args.records)
    print(pd.DataFrame(rows)[SHOWN].to_markdown(index=False, floatfmt='.3f'))


if __name__ == '__main__': main()
