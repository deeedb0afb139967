"""The audit over all families, beside the closed form, torch's counter and fvcore.

Run:  python benchmarks/flops.py [--tokens 64]
"""
import argparse

import pandas as pd
import torch
from torch.utils.flop_counter import FlopCounterMode

from compecon.agents import TINY, example_inputs, find_agents, tiny_model
from compecon.cost import closed_form
from compecon.flops import audit, flops_by_fvcore
from compecon.lab.scripts import set_up


def by_torch(model, inputs):
    "What torch's own counter finds in a forward pass"
    with FlopCounterMode(display=False) as counter, torch.no_grad(): model(**inputs)
    return counter.get_total_flops()


def is_product(operator):
    return 'attention' in operator or 'matmul' in operator or 'mm' in operator.split('::')[-1]


def by_fvcore(model, inputs):
    "What fvcore finds, without norms, and the products that it leaves out"
    try: counted, omitted = flops_by_fvcore(model, **inputs)
    except Exception as e: return float('nan'), f'cannot trace it ({type(e).__name__})'
    left_out = [f'{op.removeprefix("aten::")} {n}' for op, n in omitted.most_common() if is_product(op)]
    return sum(n for op, n in counted[''].items() if 'norm' not in op), ', '.join(left_out)


def row(family, tokens, attention):
    "A line of the table: the audit in FLOPs, the others relative to it"
    model = tiny_model(family, attention=attention)
    model.config.use_cache = False
    inputs = example_inputs(model, tokens)
    audited, by_hand = audit(model, **inputs).total, closed_form(model, find_agents(model, 16), tokens)
    fvcore, left_out = by_fvcore(model, inputs)
    def difference(n): return f'{100*n/audited - 100:+.2f} %'
    return {'family': family, 'attention': model.config._attn_implementation, 'audit': audited,
            'closed form': difference(sum(by_hand.values())), 'torch': difference(by_torch(model, inputs)),
            'fvcore (doubled, without norms)': difference(fvcore), 'products that fvcore leaves out': left_out}


def attentions(family): return ('eager', 'sdpa') if tiny_model(family)._supports_sdpa else ('eager',)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--tokens', type=int, default=64, help='length of the sequence')
    tokens = parser.parse_args().tokens
    set_up()
    rows = [row(family, tokens, attention) for family in TINY for attention in attentions(family)]
    print(f'FLOPs of one sequence of {tokens} tokens, tiny models, torch {torch.__version__}; '
          'the others relative to the audit\n')
    print(pd.DataFrame(rows).to_markdown(index=False))


if __name__ == '__main__': main()
