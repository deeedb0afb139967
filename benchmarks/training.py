"""What gates cost a training step, and what pruning in mid-training saves: MiniLM-L6, interleaved, with quartiles.

Run:  python benchmarks/training.py [--batch 32] [--tokens 32] [--budget 0.2] [--rounds 15]
"""
import copy

import torch

from compecon.agents import example_inputs
from compecon.core import flops_share
from compecon.economy import Economy
from compecon.flops import latency
from compecon.lab.finetune import MINILM, load_dense
from compecon.lab.glue import GLUE
from compecon.lab.records import provenance
from compecon.lab.scripts import read_args, script_parser
from compecon.market import ClearedMarket, MeasuredMarket
from compecon.prune_in_training import prune_training
from compecon.training import PricedTraining

PCT = 0.4  # Share of training done: after warm-up, and before a market closes


def stepper(model, inputs, priced=None):
    "One training step: forward, backward, AdamW; with the part of a market, if there is one"
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5, fused=True)

    def step():
        if priced: priced.before_forward(PCT)
        loss = model(**inputs).logits.square().mean()
        if priced: loss = priced.loss(loss)
        loss.backward()
        if priced: priced.after_backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


def gated(dense, inputs, market):
    "A training step under a market"
    economy = Economy(copy.deepcopy(dense), tokens=inputs['input_ids'].shape[1])
    priced = PricedTraining(market, economy)
    priced.start()
    return stepper(economy.model, inputs, priced)


def pruned(dense, inputs, budget):
    "A training step after closed agents were cut, and the share of FLOPs that is left"
    economy = Economy(copy.deepcopy(dense), tokens=inputs['input_ids'].shape[1])
    economy.values = torch.rand(len(economy))
    economy.clear(budget)
    small = prune_training(economy)
    small.remove()
    return stepper(small.model, inputs), small.spend()


def candidates(dense, inputs, budget):
    "All steps that are timed, by name; the dense one first"
    step, spend = pruned(dense, inputs, budget)
    return {'dense': stepper(dense, inputs),
            'measured market': gated(dense, inputs, MeasuredMarket(budget)),
            'cleared market': gated(dense, inputs, ClearedMarket(budget)),
            f'after pruning, at {spend:.2f} of the FLOPs': step}


def arguments():
    parser = script_parser(__doc__, device='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--batch', type=int, default=32, help='sequences (32)')
    parser.add_argument('--tokens', type=int, default=32, help='length of each (32)')
    parser.add_argument('--rounds', type=int, default=15, help='at least 2 (15)')
    parser.add_argument('--budget', default='0.2', help="share of the dense model's FLOPs (0.2)")
    args = read_args(parser)
    try: args.budget = flops_share(args.budget)
    except ValueError as e: parser.error(str(e))
    return args


def main():
    args = arguments()
    dense = load_dense(MINILM, GLUE['stsb'])[0].to(args.device).train()
    inputs = example_inputs(dense, args.tokens, args.batch, seed=0)
    table = latency(candidates(dense, inputs, args.budget), rounds=args.rounds, warmup=2, turn=0.5)
    where = provenance(args.device)
    print(f"{args.batch} x {args.tokens} tokens, {where['device']}, {where['threads']} threads, "
          f"torch {torch.__version__}\n")
    print(table.round(3).to_markdown())


if __name__ == '__main__': main()
