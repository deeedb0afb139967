"""Model folders that lie: is each refused in one sentence, at once, and does none give other answers?

Run:  python tools/campaigns/configs.py [--short] [--tries 400] [--all] [--seed 0]

Settled models of three families are saved, and then something in the folder is changed: entries of `config.json` and
of the record of what was kept in it, by values that cannot be; sizes, by others; the weights, by cutting the file, by
bytes of its header, by tensors that are missing or have another shape. Each folder is read in a process of its own,
with a bound on time and memory. `clear` is one sentence of a `ValueError`, or the same answers as before; `unclear` is
another error, a long one, or one that takes its time; `wrong` is other answers. With --all what was said is printed.
"""
import argparse
import json
import random
import resource
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path

import common
import torch
from safetensors.torch import load_file, save_file

from compecon.agents import tiny_model
from compecon.economy import Economy
from compecon.lab.loading import load_whole
from compecon.settle import save, settle, settle_vocabulary

ODD = [None, True, False, -1, 0, 1, 3, 7, 10**6, 10**9, 10**12 + 1, 10**18, 10**30, 0.5, float('nan'),
       '', 'x', '1', 'x'*10**5, [], [0],
       [1, 0], [0, 0], [-1], ['a'], [0.5], [True], [None], [[0]], list(range(10**5)), {}, {'a': 1}, {'a': [0]}]
RECORD = 'kept', 'block_size', 'block', 'format', 'vocabulary', 'quant_method'
SIZES = ('hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads', 'num_key_value_heads',
         'head_dim', 'vocab_size', 'max_position_embeddings', 'type_vocab_size', 'n_embd', 'n_layer', 'n_head',
         'n_inner', 'n_positions')
NAMES = 'attn_implementation', '_attn_implementation', '_attn_implementation_internal'
IDS = torch.arange(5, 21)[None]
SECONDS, MEMORY = 20, 4_000_000_000


def settled(family, **config):
    "A tiny model without some of its heads and blocks"
    model = tiny_model(family, **config)
    economy = Economy(model, tokens=16, block_size=8)
    economy.values = torch.rand(len(economy), generator=torch.Generator().manual_seed(3))
    economy.clear(0.7)
    return settle(economy)


def models():
    tied = settled('llama', tie_word_embeddings=True, head='ForCausalLM')
    tokens, width = tied.get_input_embeddings().weight.shape
    factored = settle_vocabulary(tied, tokens//2, 8, torch.arange(tokens).flip(0), torch.ones(tokens), torch.eye(width))
    return dict(bert=settled('bert'), gpt2=settled('gpt2'), factored=factored)


class Lies:
    "One kind of folder, and ways in which it lies"
    def __init__(self, folder, model, rng):
        self.folder, self.cls, self.rng = folder, type(model), rng
        save(model, folder)
        self.config = json.loads((folder/'config.json').read_text())
        self.tensors = load_file(folder/'model.safetensors')
        self.bytes = (folder/'model.safetensors').read_bytes()
        with torch.no_grad(): self.answers = model.eval()(IDS).logits

    def write(self, place, config=None, weights=None, tensors=None):
        shutil.copytree(self.folder, place)
        if config is not None: (place/'config.json').write_text(json.dumps(config))
        if weights is not None: (place/'model.safetensors').write_bytes(weights)
        if tensors is not None: save_file(tensors, place/'model.safetensors', metadata={'format': 'pt'})

    def of_record(self): # An entry of the record, or of a list in it
        record = json.loads(json.dumps(self.config['quantization_config']))
        name, value = self.rng.choice(RECORD), self.rng.choice(ODD)
        if self.rng.random() < 0.5:
            kept, name = record['kept'], self.rng.choice([*record['kept'], 'nowhere'])
            if self.rng.random() < 0.5 and kept.get(name): value = self.changed(kept[name], value)
            kept[name] = value
        else: record[name] = value
        return dict(config={**self.config, 'quantization_config': record}), f'{name}={value!r:.60}'

    def changed(self, agents, value): # A list that is nearly right
        agents = list(agents)
        agents[self.rng.randrange(len(agents))] = value
        return agents

    def of_sizes(self):
        name = self.rng.choice([s for s in SIZES if s in self.config])
        size = self.config[name] or 32
        value = self.rng.choice([v for v in ODD if v != size] + [size*2, size//2])
        return dict(config={**self.config, name: value}), f'{name}={value!r:.60}'

    def of_names(self):
        name, value = self.rng.choice(NAMES), self.rng.choice(['compecon', 'compecon_watched_1', 'compecon_new'])
        return dict(config={**self.config, name: value}), f'{name}={value}'

    def torn(self):
        size = self.rng.randrange(len(self.bytes))
        return dict(weights=self.bytes[:size]), f'cut at {size}'

    def of_header(self): # Data have no check: what is changed there cannot be known
        data = bytearray(self.bytes)
        at = self.rng.randrange(8 + int.from_bytes(self.bytes[:8], 'little'))
        data[at] ^= 1 << self.rng.randrange(8)
        return dict(weights=bytes(data)), f'byte {at} is {bytes(data[at:at + 1])}'

    def of_tensors(self):
        tensors, name = dict(self.tensors), self.rng.choice([k for k, v in self.tensors.items() if v.numel()])
        how = self.rng.choice(['missing', 'renamed', 'shorter', 'longer', 'flat', 'empty'])
        t = tensors.pop(name)
        if how == 'renamed': tensors[f'module.{name}'] = t
        flat = t.flatten() if t.ndim > 1 else t[None]
        new = dict(shorter=t[:-1], longer=torch.cat([t, t[:1]]), flat=flat, empty=t[:0])
        if how in new: tensors[name] = new[how].contiguous()
        return dict(tensors=tensors), f'{name} {how}'


KINDS = ('of_record', 'of_sizes', 'of_names', 'torn', 'of_header', 'of_tensors')


def judged(lies, place):
    "What a process says of a folder, and what that is worth"
    def go(say):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY + resident(), resource.RLIM_INFINITY))
        with torch.no_grad(): logits = load_whole(lies.cls, place)(IDS).logits
        say('same' if torch.allclose(logits, lies.answers, atol=1e-5) else 'other answers')
    started = time.time()
    code, said = common.in_child(go, SECONDS)
    if code is None: return 'unclear', f'more than {SECONDS} s'
    if not said: return 'unclear', f'exit code {code}'
    if said[-1] == 'other answers': return 'wrong', said[-1]
    sentence = said[-1] == 'same' or said[-1].startswith('ValueError: ') and len(said) == 1 and len(said[0]) < 700
    return 'clear' if sentence and time.time() - started < SECONDS/2 else 'unclear', said[-1]


def resident(): # Bytes of this process, in memory or not
    return int(Path('/proc/self/statm').read_text().split()[0])*resource.getpagesize()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--short', action='store_true')
    parser.add_argument('--tries', type=int, default=400, help='of each kind (400)')
    parser.add_argument('--all', action='store_true', help='print what was said of each folder')
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    rng, rows, tries = random.Random(args.seed), [], 12 if args.short else args.tries
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(prefix='compecon-configs-') as folder:
        folders = [Lies(Path(folder, name), model, rng) for name, model in models().items()]
        for kind in KINDS:
            counts = Counter()
            for i in range(tries):
                lies, place = rng.choice(folders), Path(folder, 'liar')
                change, name = getattr(lies, kind)()
                lies.write(place, **change)
                found, said = judged(lies, place)
                counts[found] += 1
                if args.all or found != 'clear': print(f'{found}: {lies.folder.name} {name}: {said:.300}', flush=True)
                shutil.rmtree(place)
            rows.append(dict(campaign=kind.replace('_', ' '), tried=tries, clear=counts['clear'],
                             wrong=counts['wrong'], unclear=counts['unclear']))
    common.report('configurations', rows, args.short)


if __name__ == '__main__': main()
