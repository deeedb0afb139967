"""How fast does a settled decoder write? Tokens a second and the time to the first token, settled against dense, on the same prompts, in turns.

Run:  python benchmarks/generation.py [--model smollm2] [--params 0.74,0.52,0.33] [--prompt 64] [--new 32]     (prints a table, and appends to results/generation.jsonl)

Agents are chosen by the magnitude of their weights; other methods leave other numbers of them in each layer. Prompts are cuts of this Python's language reference, so all models read the same; they write greedily and never stop early, so that all write the same
number of tokens. Within a round, models take turns in random order; medians over rounds, with quartiles of the ratio to dense. The first token is prefill, `tokens_s` is of those after it, with a cache.
"""
import argparse
import json
import random
import statistics
import time
import warnings
from pathlib import Path

import pandas as pd
import torch
from transformers.utils import logging

from compecon.lab.records import provenance
from compecon.economy import Economy
from compecon.settle import settle
from compecon.curves import allocate
from compecon.importance import score_agents
from compecon.lab.wikitext import SMOLLM2, encode, load_decoder, python_reference

RECORDS = 'results/generation.jsonl'


def smaller(model, share, tokens, block_size):
    "The model settled at a share of its parameters"
    economy = Economy(model, tokens=tokens, block_size=block_size)
    score_agents(economy, 'magnitude')
    allocate(economy, f'{share} params')
    small = settle(economy)
    economy.remove()
    return small


def write(model, ids, new):
    "Seconds to the first token, and tokens a second after it"
    def synchronized():
        if ids.is_cuda: torch.cuda.synchronize()
        return time.perf_counter()
    start = synchronized()
    with torch.no_grad():
        out = model(ids, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1:].argmax(-1)
        first = synchronized()
        for _ in range(new - 1):
            out = model(token, use_cache=True, past_key_values=out.past_key_values)
            token = out.logits[:, -1:].argmax(-1)
    return first - start, (new - 1)/(synchronized() - first)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--model', default=SMOLLM2)
    parser.add_argument('--params', default='0.74,0.52,0.33', help="shares of the dense model's parameters, embeddings included")
    parser.add_argument('--prompt', type=int, default=64, help='tokens')
    parser.add_argument('--new', type=int, default=32, help='tokens, at least 2')
    parser.add_argument('--rounds', type=int, default=9)
    parser.add_argument('--block', type=int, default=32)
    parser.add_argument('--threads', type=int)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--records', default=RECORDS)
    args = parser.parse_args()
    if args.new < 2 or args.rounds < 2: parser.error('--new and --rounds are at least 2')
    logging.set_verbosity_error(); logging.disable_progress_bar(); warnings.filterwarnings('ignore', category=FutureWarning)  # `past_key_values` has a new name in the newest transformers
    if args.threads: torch.set_num_threads(args.threads)

    dense, tokenizer = load_decoder(args.model)
    dense.to(args.device)
    models = {1.: dense} | {p: smaller(dense, p, args.prompt, args.block_size) for p in map(float, args.params.split(','))}
    ids, rng = encode(tokenizer, python_reference()['test'][:40*args.prompt*args.rounds]), random.Random(0)
    times, order = {p: [] for p in models}, list(models)
    for r in range(args.rounds + 1):  # the first round is warm-up
        start = rng.randrange(len(ids) - args.prompt)
        prompt = ids[None, start:start + args.prompt].to(args.device)
        rng.shuffle(order)
        for p in order:
            found = write(models[p], prompt, args.new)
            if r: times[p].append(found)
    rows, origin = [], provenance(args.device)
    for p, model in models.items():
        firsts, speeds = zip(*times[p])
        slower, faster = ([t/d for t,d in zip(values, base)] for values, base in zip((firsts, speeds), zip(*times[1.])))
        low, _, high = statistics.quantiles(faster, n=4, method='inclusive')
        name = Path(args.model).name if Path(args.model).is_dir() else args.model
        rows.append(dict(model=name, budget=p, unit='params', params=sum(w.numel() for w in model.parameters()), prompt=args.prompt, new=args.new, rounds=args.rounds, first_token_ms=1e3*statistics.median(firsts), tokens_s=statistics.median(speeds),
                         first_token_ratio=statistics.median(slower), speed_ratio=statistics.median(faster), speed_low=low, speed_high=high, dtype=str(model.dtype).removeprefix('torch.'), **origin))
    Path(args.records).parent.mkdir(parents=True, exist_ok=True)
    with open(args.records, 'a') as f: f.writelines(json.dumps(row) + '\n' for row in rows)
    print(pd.DataFrame(rows)[['budget', 'params', 'first_token_ms', 'tokens_s', 'first_token_ratio', 'speed_ratio', 'speed_low', 'speed_high']].to_markdown(index=False, floatfmt='.3f'))


if __name__ == '__main__': main()
