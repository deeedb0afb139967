"""The audit over all families, beside the closed form, torch's counter and fvcore.

Run:  python benchmarks/flops.py [--tokens 64]
"""
import argparse
import warnings

import pandas as pd
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers.utils import logging

from compecon.agents import TINY, example_inputs, find_agents, tiny_model
from compecon.cost import closed_form
from compecon.flops import audit, flops_by_fvcore


def row(family, tokens, attention):
    model = tiny_model(family, attention=attention)
    model.config.use_cache = False
    inputs = example_inputs(model, tokens)
    audited = audit(model, **inputs).total
    with FlopCounterMode(display=False) as counter, torch.no_grad(): model(**inputs)
    try:
        fvcore, omitted = flops_by_fvcore(model, **inputs)
        products = sum(n for op, n in fvcore[''].items() if 'norm' not in op)
        omitted = ', '.join(f'{op.removeprefix("aten::")} {n}' for op, n in omitted.most_common() if 'attention' in op or 'matmul' in op or 'mm' in op.split('::')[-1])
    except Exception as e: products, omitted = float('nan'), f'cannot trace it ({type(e).__name__})'
    def share(n): return f'{100*n/audited - 100:+.2f} %'
    return {'family': family, 'attention': model.config._attn_implementation, 'audit': audited, 'closed form': share(sum(closed_form(model, find_agents(model, 16), tokens).values())),
            'torch': share(counter.get_total_flops()), 'fvcore (doubled, without norms)': share(products), 'products that fvcore leaves out': omitted}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--tokens', type=int, default=64, help='length of the sequence')
    tokens = parser.parse_args().tokens
    logging.set_verbosity_error(); warnings.filterwarnings('ignore')
    rows = [row(f, tokens, a) for f in TINY for a in (('eager', 'sdpa') if tiny_model(f)._supports_sdpa else ('eager',))]
    print(f'FLOPs of one sequence of {tokens} tokens, tiny models, torch {torch.__version__}; the others relative to the audit\n')
    print(pd.DataFrame(rows).to_markdown(index=False))


if __name__ == '__main__': main()
