"""What gates cost a training step, and what leaving saves: MiniLM-L6, interleaved, median and quartiles.

Run:  python benchmarks/training.py [--batch 32] [--tokens 32] [--budget 0.2] [--rounds 15]
"""
import argparse
import copy
import warnings

import torch
from fastai.torch_core import default_device
from transformers.utils import logging

from compecon.agents import example_inputs
from compecon.economy import Economy, marginal_values
from compecon.lab.records import provenance
from compecon.lab.experiment import MINILM, load_dense
from compecon.flops import latency
from compecon.lab.glue import GLUE
from compecon.prune_in_training import prune_training
from compecon.market import ClearedMarket, MeasuredMarket


def stepper(model, inputs, economy=None, market=None):
    "One training step: forward, backward, AdamW; with its market's part, if there is one"
    opt, mean = torch.optim.AdamW(model.parameters(), 1e-5, fused=True), None
    bids = torch.optim.Adam([economy.log_values], 0.05) if isinstance(market, ClearedMarket) else None

    def step():
        nonlocal mean
        if market: market.update(economy, 0.4)
        loss = model(**inputs).logits.square().mean()
        if market: loss = market.charge(loss, economy)
        loss.backward(); opt.step(); opt.zero_grad()
        if bids: bids.step(); bids.zero_grad()
        elif market:
            values = marginal_values(economy)
            mean = values if mean is None else 0.98*mean + 0.02*values
            economy.values = mean
    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (('batch', 32), ('tokens', 32), ('rounds', 15)): parser.add_argument(f'--{name}', type=int, default=default)
    parser.add_argument('--budget', type=float, default=0.2)
    args = parser.parse_args()
    logging.set_verbosity_error(); logging.disable_progress_bar(); warnings.filterwarnings('ignore')
    dense = load_dense(MINILM, GLUE['stsb'])[0].to(default_device()).train()
    inputs, candidates = example_inputs(dense, args.tokens, args.batch, seed=0), {'dense': stepper(dense, example_inputs(dense, args.tokens, args.batch, seed=0))}
    for name, market in (('measured market', MeasuredMarket(args.budget)), ('cleared market', ClearedMarket(args.budget))):
        economy = Economy(copy.deepcopy(dense), tokens=args.tokens)
        candidates[name] = stepper(economy.model, inputs, economy, market)
    economy = Economy(copy.deepcopy(dense), tokens=args.tokens)
    economy.values = torch.rand(len(economy))
    economy.clear(args.budget)
    small = prune_training(economy)
    small.remove()
    candidates[f'after leaving, at {small.spend():.2f} of the FLOPs'] = stepper(small.model, inputs)
    table = latency(candidates, rounds=args.rounds, warmup=2, turn=0.5)
    where = provenance(default_device())
    print(f"{args.batch} x {args.tokens} tokens, {where['device']}, {where['threads']} threads, torch {torch.__version__}\n")
    print(table.round(3).to_markdown())


if __name__ == '__main__': main()
