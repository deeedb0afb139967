"""Other libraries' pruners, brought to our budgets; each is imported when it is used, and is no dependency of ours.

torch-pruning 1.6 (`pip install --no-deps torch-pruning`): its own pruner for heads and neurons, by its first-order
Taylor importance, with gradients of the same label-free loss that `shrink` has. Of its settings, those that were best
at 40 % on `validation` are taken: see results/attempts.md.
optipfair 0.4 (`pip install --no-deps optipfair`): its own `prune_model`, for the gated neurons of decoders.
"""
import copy

import torch

from compecon.core import evaluating, model_inputs
from compecon.flops import count_flops
from compecon.outputs import outputs_of


def _attention(model): return [m for m in model.modules() if hasattr(m, 'query') and hasattr(m, 'num_attention_heads')]


def _wide(model): # What has the hidden size, or is a head: left alone
    inner = {id(m) for a in _attention(model) for m in (a.query, a.key, a.value)}
    return [m for path, m in model.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Embedding))
            and id(m) not in inner and not path.endswith('intermediate.dense')]


def _gradients(model, batches, seed): # Of the loss by labels drawn from the model's own outputs
    outputs, generator = outputs_of(model), torch.Generator().manual_seed(seed)
    model.zero_grad()
    for batch in batches:
        with evaluating(model), torch.enable_grad(): outputs.own_loss(model, batch, generator).backward()


def torch_pruned(dense, ratio, batches, seed=0, taylor=True, over_layers=True):
    "A copy without a share of its heads and neurons, as torch-pruning chooses them"
    import torch_pruning as tp
    model = copy.deepcopy(dense)
    heads = {m: a.num_attention_heads for a in _attention(model) for m in (a.query, a.key, a.value)}
    if taylor: _gradients(model, batches, seed)
    importance = tp.importance.GroupTaylorImportance() if taylor else tp.importance.GroupMagnitudeImportance(p=2)
    example = model_inputs(batches[0])
    pruner = tp.pruner.BasePruner(
        model, {k: v[:1] for k, v in example.items()}, importance=importance, global_pruning=over_layers,
        pruning_ratio=ratio, num_heads=heads, prune_num_heads=True, prune_head_dims=False, head_pruning_ratio=ratio,
        ignored_layers=_wide(model), output_transform=lambda out: out[0].sum())
    pruner.step()
    for a in _attention(model):
        a.num_attention_heads = pruner.num_heads[a.query]
        a.all_head_size = a.query.out_features
    return model.eval()


def torch_pruning_to(dense, budgets, batches, tokens, seed=0, **options):
    "For each budget the largest model within it, its share of FLOPs, and nothing"
    ids = dict(input_ids=torch.ones(1, tokens, dtype=torch.long))
    full = count_flops(dense, **ids)
    for budget in budgets:
        low, high, best = 0., .98, None
        for _ in range(7):
            middle = (low + high)/2
            model = torch_pruned(dense, middle, batches, seed, **options)
            share = count_flops(model, **ids)/full
            if share <= budget: high, best = middle, (model, share)
            else: low = middle
        if best is None: raise ValueError(f'torch-pruning reaches no budget of {budget}')
        yield *best, None


def optipfair_to(dense, budgets, batches, tokens):
    "For each budget what optipfair makes of a decoder, looking at batches, its share of FLOPs, and nothing"
    from optipfair import prune_model
    ids = dict(input_ids=torch.ones(1, tokens, dtype=torch.long))
    full = count_flops(dense, **ids)
    def cut(percent, data=None):
        model = prune_model(copy.deepcopy(dense), pruning_percentage=percent, dataloader=data, show_progress=False)
        return model.eval(), count_flops(model, **ids)/full
    for budget in budgets:
        low, high = 0., 99.
        for _ in range(8):
            middle = (low + high)/2
            low, high = (low, middle) if cut(middle)[1] <= budget else (middle, high)
        model, share = cut(high, batches)
        if share > budget: raise ValueError(f'optipfair reaches no budget of {budget}: {share:.4f} at least')
        yield model, share, None
