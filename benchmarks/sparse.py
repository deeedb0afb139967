"""Sparse execution: products over open blocks against torch, and packed models against plain ones.

Run:  python benchmarks/sparse.py [--models bert,minilm] [--tokens 1,16,128,1024] [--open 1,0.75,0.6,0.5,0.25]
          [--parts ffn,attention,model,error,logits,score] [--seconds 8] [--device cpu] [--data DATA]

Every line of OUT/kernels.jsonl is one way to compute with a share of the agents open: its time as a share of dense
torch's, interleaved, in thread time, with quartiles; its error against float64; what it reads and computes in a second
(at one token beside a plain sum over as much memory, in the same rounds). Weights of `compecon` lie in huge pages;
`torch:dense, huge pages` is torch with the same. One thread, at least 12 layers with weights of their own (fewer would
stay in the caches), another random open set for each layer. `compecon` is ours, with weights as float32, bfloat16 or
int8, and products in that type; its peers are `masked` (everything is computed), `index_select` (open weights are
copied together), `bmm` (block by block, in a batch), and torch's dynamic int8. `model` has whole models: agents opened
by a router for each sequence, or settled, in torch, packed, and in ONNX Runtime. Its records at 0.4 compare those that
a user would choose from. `error` is the distance from float64 of feed-forward networks of all-MiniLM and SmolLM2 with
their own weights and inputs (of Python's language reference), beside that of torch's dynamic int8. `logits` is how far
SmolLM2's logits go from float32 on 1,024 tokens of that text, and how often the likeliest token stays. `score` is what
all-MiniLM keeps of STS-B (Spearman, the half of validation that no choice sees; DATA as for shrink.py) in each engine,
dense and with 40 % of its FLOPs.

`--tables` prints what is in OUT already, and measures nothing. Goals are printed beside what was reached.
"""
import copy
import tempfile
import time
from functools import partial
from pathlib import Path

import onnxruntime
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, AutoTokenizer, BertConfig, BertForSequenceClassification

from shrink import HALVES, scores, texts_of
from shrink import rows_of as rows_of_stsb
from compecon import native
from compecon.agents import example_inputs, find_agents
from compecon.economy import Economy
from compecon.export import load_exported, quantize_onnx, write_onnx
from compecon.flops import latency
from compecon.kernels import ACTIVATIONS, down, ffn, open_set, pack_down, pack_up, up
from compecon.lab.finetune import MINILM, model_source
from compecon.lab.records import append_line, provenance
from compecon.lab.scripts import read_args, script_parser
from compecon.lab.wikitext import SMOLLM2, load_decoder, python_reference
from compecon.packed import pack
from compecon.router import ContextualEconomy, calibrate, pack_router
from compecon.settle import settle
from compecon.shrink import shrink

MODELS = dict(
    bert=dict(hidden_size=768, num_hidden_layers=12, intermediate_size=3072, num_attention_heads=12),
    minilm=dict(hidden_size=384, num_hidden_layers=6, intermediate_size=1536, num_attention_heads=12))
PARTS = 'ffn', 'attention', 'model', 'error', 'logits', 'score'
APART = 'error', 'logits', 'score'  # of models of their own
LAYERS, BLOCK, HEADS_OPEN = 12, 32, 7
KEPT_AS = {'': None, ':bfloat16': torch.bfloat16, ':int8': torch.int8}  # names of ours, and how weights are kept
TOKENS = 1, 16, 128, 1024
GOALS = {'compecon:int8': (.12, .14, .15, .17), 'compecon:bfloat16': (.18, .25, .30, .32)}  # BERT's size, 60 % open
OF_INT8, OF_ENGINE = .7, {1: 2., 16: 1.2, 128: 1.2}  # of dense torch int8; of a settled model in ONNX Runtime int8


def some(n, share, groups=1):
    "Open sets, each of as many blocks"
    mask = torch.zeros(groups, n, dtype=torch.bool)
    for row in mask: row[torch.randperm(n)[:max(1, round(share*n))]] = True
    return mask


def features(blocks, width):
    "Numbers of the features of some blocks"
    return blocks[:, None].mul(width).add(torch.arange(width, device=blocks.device)).flatten()


def timed(calls, seconds, device):
    "Interleaved; in thread time on a processor with one thread"
    once = latency(calls, rounds=2, warmup=1, turn=0.001).ms.sum()/1e3
    rounds = int(min(40, max(5, seconds/(len(calls)*0.05 + 2*once))))
    alone = device == 'cpu' and torch.get_num_threads() == 1
    return latency(calls, rounds=rounds, clock=time.thread_time if alone else time.perf_counter)


def quantised(module):
    "With torch's dynamic int8"
    return torch.ao.quantization.quantize_dynamic(module, {nn.Linear})


def in_all_layers(way): return lambda: [way(i) for i in range(LAYERS)]


def relative(y, exact): return ((y.double() - exact).norm()/exact.norm()).item()


class FFNs:
    "Feed-forward networks of one size with weights of their own, in each layout that is compared"
    def __init__(self, config, tokens, device):
        self.hidden, self.neurons, self.tokens = config['hidden_size'], config['intermediate_size'], tokens
        self.device, self.blocks = device, self.neurons//BLOCK
        self.x = torch.randn(1, tokens, self.hidden, device=device)
        self.layers = [self._weights() for _ in range(LAYERS)]
        self.packed = {name: [self._packed(*l, dtype) for l in self.layers] for name, dtype in KEPT_AS.items()}
        panels = [p for ls in self.packed.values() for (a, _), _, (c, _), _ in ls for p in (a, c)]
        self.paged = [[w.clone() for w in l] for l in self.layers]
        native.huge_pages([*panels, *(w for l in self.paged for w in l)])
        self.batched = [self._batched(*l) for l in self.layers]
        self.int8_modules = [self._quantised(*l) for l in self.layers] if device == 'cpu' else []

    def _weights(self):
        def random(*shape, scale): return torch.randn(*shape, device=self.device)*scale
        H, N = self.hidden, self.neurons
        return random(N, H, scale=.03), random(N, scale=.1), random(H, N, scale=.03), random(H, scale=.1)

    def _packed(self, a, b, c, e, dtype): return pack_up(a, BLOCK, dtype), b, pack_down(c, BLOCK, dtype), e

    def _batched(self, a, b, c, e): # One matrix a block
        up = a.view(self.blocks, BLOCK, self.hidden).transpose(1, 2).contiguous()
        return up, b.view(self.blocks, 1, BLOCK), c.T.contiguous().view(self.blocks, BLOCK, self.hidden), e

    def _quantised(self, a, b, c, e):
        m = nn.Sequential(nn.Linear(self.hidden, self.neurons), nn.GELU(), nn.Linear(self.neurons, self.hidden))
        m[0].weight.data, m[0].bias.data, m[2].weight.data, m[2].bias.data = a, b, c, e
        return quantised(m)

    def open(self, share):
        "Draw open sets: one a layer, and one a token of each layer"
        self.sets = [open_set(some(self.blocks, share).to(self.device)) for _ in range(LAYERS)]
        self.rows = [features(s.block, BLOCK) for s in self.sets]
        self.masks = [torch.zeros(self.neurons, device=self.device).index_fill(0, r, 1) for r in self.rows]
        if self.tokens > 1:
            self.by_token = [open_set(some(self.blocks, share, self.tokens).to(self.device)) for _ in range(LAYERS)]

    # Ways to compute layer `i`

    def _plain(self, a, b, c, e): return F.linear(F.gelu(F.linear(self.x[0], a, b)), c, e)
    def dense(self, i): return self._plain(*self.layers[i])
    def dense_paged(self, i): return self._plain(*self.paged[i])
    def dense_int8(self, i): return self.int8_modules[i](self.x)

    def masked(self, i):
        a, b, c, e = self.layers[i]
        return F.linear(F.gelu(F.linear(self.x[0], a, b))*self.masks[i], c, e)

    def selected(self, i):
        (a, b, c, e), r = self.layers[i], self.rows[i]
        return self._plain(a.index_select(0, r), b.index_select(0, r), c.index_select(1, r), e)

    def bmm(self, i):
        (a, b, c, e), k = self.batched[i], self.sets[i].block
        h = F.gelu(torch.bmm(self.x.expand(len(k), -1, -1), a[k]) + b[k])
        return torch.bmm(h, c[k]).sum(0) + e

    def ours(self, i, kept_as=''): return ffn(self.x, *self.packed[kept_as][i], self.sets[i])
    def by_tokens(self, i): return ffn(self.x.transpose(0, 1), *self.packed[''][i], self.by_token[i])

    def ways(self):
        "Name -> function of a layer's number"
        ways = {'torch:dense, huge pages, all open': self.dense_paged, 'torch:masked': self.masked,
                'torch:index_select': self.selected, 'torch:bmm': self.bmm}
        ways |= {f'compecon{name}': partial(self.ours, kept_as=name) for name in KEPT_AS}
        if self.tokens > 1: ways['compecon:token sets'] = self.by_tokens
        if self.int8_modules: ways['torch:int8, all open'] = self.dense_int8
        return ways

    def exact(self, token_sets):
        "What the first layer gives in float64"
        (a, _), b, (c, _), e = self.packed[''][0]
        x, opened = (self.x.transpose(0, 1), self.by_token[0]) if token_sets else (self.x, self.sets[0])
        x, a, b, c, e = (t.double() for t in (x, a, b, c, e))
        gate = None, None, None
        y = torch.ops.compecon.ffn_reference(x, a, None, b, *gate, c, None, e, opened.group, opened.block,
                                             ACTIVATIONS['gelu'])
        return y.view(self.tokens, self.hidden)


def memory_like(ffns, share):
    "As much memory as `compecon` reads at one token, or nothing"
    if ffns.tokens > 1 or ffns.device != 'cpu': return None
    memory = torch.ones(round(share*2*ffns.hidden*ffns.neurons*LAYERS))
    native.huge_pages([memory])
    return memory


def ffn_rows(config, tokens, shares, seconds, device):
    "Records of feed-forward networks alone"
    ffns = FFNs(config, tokens, device)
    for share in shares:
        ffns.open(share)
        ways, memory = ffns.ways(), memory_like(ffns, share)
        calls = {'dense': in_all_layers(ffns.dense)}
        if memory is not None: calls['read'] = memory.sum
        times = timed(calls | {k: in_all_layers(way) for k, way in ways.items()}, seconds, device)
        reads = None if memory is None else memory.nbytes/times.ms['read']/1e6
        for name, way in ways.items(): yield ffn_row(ffns, name, way, share, times, reads)


def ffn_row(ffns, name, way, share, times, reads):
    t, seconds = times.loc[name], times.ms[name]/1e3/LAYERS
    token_sets, all_open = name.endswith('token sets'), 'all open' in name
    opened = ffns.by_token[0] if token_sets else ffns.sets[0]
    computed = 1 if name == 'torch:masked' or all_open else opened.share
    bytes_each = dict(bfloat16=2, int8=1).get(name.split(':')[-1].split(',')[0], 4)
    weights = 2*ffns.hidden*ffns.neurons*computed
    error = None if all_open else relative(way(0).view(ffns.tokens, ffns.hidden), ffns.exact(token_sets))
    return dict(op='ffn', shape=f'{ffns.hidden}x{ffns.neurons}', batch=1, tokens=ffns.tokens, open=round(share, 4),
                backend=name, dense_ratio=t.ratio, low=t.low, high=t.high, ms=seconds*1e3,
                dense_ms=times.ms['dense']/LAYERS, error=error, gb_s=weights*bytes_each/seconds/1e9, read_gb_s=reads,
                tflop_s=2*ffns.tokens*weights/seconds/1e12)


class Attentions:
    "Attention of one size with weights of its own, some heads open"
    def __init__(self, config, tokens, batch, device):
        self.hidden, self.heads = config['hidden_size'], config['num_attention_heads']
        self.dim, self.tokens, self.batch, self.device = self.hidden//self.heads, tokens, batch, device
        self.x = torch.randn(1, batch*tokens, self.hidden, device=device)
        self.layers = [self._weights() for _ in range(LAYERS)]
        self.fused = {name: [self._fused(*l, dtype) for l in self.layers] for name, dtype in KEPT_AS.items()}
        native.huge_pages([p for ls in self.fused.values() for (a, _), _, (c, _), _ in ls for p in (a, c)])
        self.int8_modules = [self._quantised(*l) for l in self.layers] if device == 'cpu' else []
        self.sets = [open_set(some(self.heads, HEADS_OPEN/self.heads).to(device)) for _ in range(LAYERS)]

    def _weights(self): # Of query, key, value and output
        H = self.hidden
        weights = [torch.randn(H, H, device=self.device)*.05 for _ in range(4)]
        return weights, [torch.randn(H, device=self.device)*.1 for _ in range(4)]

    def _quantised(self, weights, biases): # Query, key, value and output
        modules = nn.ModuleList(nn.Linear(self.hidden, self.hidden) for _ in weights)
        for m, w, b in zip(modules, weights, biases): m.weight.data, m.bias.data = w, b
        return quantised(modules)

    def _fused(self, weights, biases, dtype): # A block is what a head reads: query, key and value
        by_head = torch.stack([w.view(self.heads, self.dim, self.hidden) for w in weights[:3]], 1)
        bias = torch.stack([b.view(self.heads, self.dim) for b in biases[:3]], 1)
        up = pack_up(by_head.reshape(3*self.hidden, self.hidden), 3*self.dim, dtype)
        return up, bias.reshape(3*self.hidden), pack_down(weights[3], self.dim, dtype), biases[3]

    def _attend(self, *projected): # Query, key and value, `(batch*tokens, heads*dim)`
        q, k, v = (t.view(self.batch, self.tokens, -1, self.dim).transpose(1, 2) for t in projected)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    # Ways to compute layer `i`

    def dense(self, i):
        weights, biases = self.layers[i]
        qkv = [F.linear(self.x[0], w, b) for w, b in zip(weights[:3], biases[:3])]
        return F.linear(self._attend(*qkv), weights[3], biases[3])

    def dense_int8(self, i):
        *projections, out = self.int8_modules[i]
        return out(self._attend(*(p(self.x[0]) for p in projections)))

    def selected(self, i):
        (weights, biases), r = self.layers[i], features(self.sets[i].block, self.dim)
        pairs = zip(weights[:3], biases[:3])
        qkv = [F.linear(self.x[0], w.index_select(0, r), b.index_select(0, r)) for w, b in pairs]
        return F.linear(self._attend(*qkv), weights[3].index_select(1, r), biases[3])

    def ours(self, i, kept_as=''):
        a, b, c, e = self.fused[kept_as][i]
        h = up(self.x, a, b, self.sets[i]).view(-1, self.batch, self.tokens, 3*self.dim)
        h = F.scaled_dot_product_attention(*h.split(self.dim, -1))
        return down(h.reshape(len(h), self.batch*self.tokens, self.dim), c, e, self.sets[i])


def attention_rows(config, tokens, batch, seconds, device):
    "Records of projections and attention over open heads"
    attentions = Attentions(config, tokens, batch, device)
    hidden, n = attentions.hidden, attentions.heads
    ways = {f'compecon{name}': partial(attentions.ours, kept_as=name) for name in KEPT_AS}
    exact = attentions.selected(0).view(-1, hidden).double()
    errors = {name: relative(way(0).view(-1, hidden), exact) for name, way in ways.items()}
    ways['torch:index_select'] = attentions.selected
    if attentions.int8_modules: ways['torch:int8, all open'] = attentions.dense_int8
    calls = {'dense': attentions.dense, **ways}
    times = timed({k: in_all_layers(way) for k, way in calls.items()}, seconds, device)
    for name in ways:
        t = times.loc[name]
        yield dict(op='attention', shape=f'{hidden}, {HEADS_OPEN} of {n} heads', batch=batch, tokens=tokens,
                   open=HEADS_OPEN/n, backend=name, dense_ratio=t.ratio, low=t.low, high=t.high, ms=t.ms/LAYERS,
                   dense_ms=times.ms['dense']/LAYERS, error=errors.get(name))


def ways_to_run(model, x, tokens, share, folder):
    "Name -> a function of inputs, and the share of FLOPs as achieved"
    economy = ContextualEconomy(copy.deepcopy(model), tokens=tokens)
    economy.log_values.data = torch.randn(len(economy), device=economy.log_values.device)
    nn.init.normal_(economy.model.router.bids.weight, std=3.)
    spent = calibrate(economy, [(x, None)], share)['mean']
    static = Economy(copy.deepcopy(model), tokens=tokens)
    static.values = economy.log_values.detach().exp()
    achieved = static.clear(share)
    small, paged = settle(static), copy.deepcopy(model)
    native.huge_pages(paged.parameters())
    packed = {f'settled, packed{name}': (pack(small, dtype=dtype), achieved) for name, dtype in KEPT_AS.items()}
    routed = {f'packed, router{name}': (pack_router(economy, dtype), spent) for name, dtype in KEPT_AS.items()}
    engines = {f'settled, {k}': (f, achieved) for k, f in onnx_ways(small, x, folder/'small').items()}
    engines |= {f'dense, {k}': (f, 1.) for k, f in onnx_ways(model, x, folder/'dense').items()}
    return {'dense, huge pages': (paged, 1.), 'masked, router': (economy.model, spent), **routed,
            'settled': (small, achieved), **packed, 'packed, all open': (pack(model), 1.), **engines,
            'dense, torch int8': (quantised(copy.deepcopy(model)), 1.),
            'settled, torch int8': (quantised(copy.deepcopy(small)), achieved)}


def onnx_ways(model, x, folder):
    "ONNX Runtime on a processor, with its own dynamic int8 and without"
    if next(model.parameters()).device.type != 'cpu' or torch.get_num_threads() > 1: return {}
    folder.mkdir(parents=True, exist_ok=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    file = write_onnx(model, x, folder/'model.onnx')
    feed = {k: v.numpy() for k, v in x.items()}
    def way(file):
        session = onnxruntime.InferenceSession(str(file), options)
        return lambda **_: session.run(None, feed)
    return {'ONNX Runtime': way(file), 'ONNX Runtime int8': way(quantize_onnx(file))}


def model_rows(name, config, tokens, batch, shares, seconds, device):
    "Records of whole models"
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**config, max_position_embeddings=1024)).eval().to(device)
    x = example_inputs(model, tokens, batch, seed=0)
    for share in shares:
        with tempfile.TemporaryDirectory() as folder: made = ways_to_run(model, x, tokens, share, Path(folder))
        calls = {'dense': lambda: model(**x)} | {k: lambda m=m: m(**x) for k, (m, _) in made.items()}
        times = timed(calls, seconds, device)
        for backend, (_, flops) in made.items():
            t = times.loc[backend]
            yield dict(op='model', shape=name, batch=batch, tokens=tokens, open=share, flops_ratio=flops,
                       backend=backend, dense_ratio=t.ratio, low=t.low, high=t.high, ms=t.ms,
                       dense_ms=times.ms['dense'])


def inputs_of(model, batch):
    "Of each feed-forward network: itself, and the rows that it reads"
    found, hooks = {}, []
    for s in (s for s in find_agents(model, BLOCK) if s.kind == 'block'):
        def keep(module, args, s=s): found[s.name] = s, args[0].flatten(0, -2)[:256]
        hooks.append(s.in_projs[0].register_forward_pre_hook(keep))
    model(**batch)
    for h in hooks: h.remove()
    return found.values()


def errors_of(sublayer, x):
    "Distances from float64 of one feed-forward network with its own inputs"
    first, out = sublayer.in_projs, sublayer.out_proj
    activation, gated = ('gelu', False) if len(first) == 1 else ('silu', True)
    act = dict(gelu=F.gelu, silu=F.silu)[activation]
    def plain(x, first, out):
        h = act(first[0](x))
        return out(h*first[1](x) if gated else h)
    exact = plain(x.double(), [copy.deepcopy(p).double() for p in first], copy.deepcopy(out).double())
    opened = open_set(torch.ones(out.weight.shape[1]//BLOCK).bool())
    def ours(dtype):
        ups = [pack_up(p.weight, BLOCK, dtype) for p in first]
        gate = dict(gate=ups[0], gate_bias=first[0].bias) if gated else {}
        up = ups[-1], first[-1].bias
        return ffn(x[None], *up, pack_down(out.weight, BLOCK, dtype), out.bias, opened, activation, **gate)[0]
    errors = {f'compecon{name}': relative(ours(dtype), exact) for name, dtype in KEPT_AS.items()}
    *narrow, narrow_out = quantised(nn.ModuleList(copy.deepcopy([*first, out])))
    return errors | {'torch:int8': relative(plain(x, narrow, narrow_out), exact)}


def windows_of(tokenizer):
    "Four windows of 256 tokens of Python's language reference"
    text = python_reference()['train'][:40_000]
    return tokenizer(text, return_tensors='pt')['input_ids'][:, 1:1025].view(4, 256)


def error_rows():
    "Records of errors in all-MiniLM and SmolLM2, the mean over their layers and the largest"
    source = model_source(MINILM)
    minilm = AutoModel.from_pretrained(source).eval(), AutoTokenizer.from_pretrained(source)
    for name, (model, tokenizer) in {MINILM: minilm, SMOLLM2: load_decoder(SMOLLM2)}.items():
        ids = windows_of(tokenizer)
        of_layers = pd.DataFrame([errors_of(s, x) for s, x in inputs_of(model, dict(input_ids=ids))])
        for backend, errors in of_layers.items():
            yield dict(op='error', shape=name, batch=1, tokens=256, open=1., backend=backend, error=errors.mean(),
                       largest=errors.max(), layers=len(errors))


def in_engines(model, batch, folder):
    "The model by backend: float32 and int8 of torch, ours, and ONNX Runtime's int8, whose file lies in the folder"
    ways = {'torch': model, 'torch int8': quantised(copy.deepcopy(model))}
    ways |= {f'packed{name}': pack(model, dtype=dtype) for name, dtype in KEPT_AS.items()}
    file = write_onnx(model, batch, Path(folder, 'model.onnx'))
    return ways | {'ONNX Runtime int8': load_exported(quantize_onnx(file))}


def logits_rows():
    "Records of SmolLM2's logits in each engine"
    model, tokenizer = load_decoder(SMOLLM2)
    batch = dict(input_ids=windows_of(tokenizer))
    exact = model(**batch).logits
    with tempfile.TemporaryDirectory() as folder:
        for backend, way in in_engines(model.eval(), batch, folder).items():
            logits = torch.as_tensor(way(**batch).logits)
            same = (logits.argmax(-1) == exact.argmax(-1)).double().mean().item()
            yield dict(op='logits', shape=SMOLLM2, open=1., tokens=256, batch=4, backend=backend,
                       error=relative(logits, exact.double()), same=same)


@torch.inference_mode(False)  # `shrink` takes gradients
def score_rows(data):
    "Records of what all-MiniLM keeps of STS-B in each engine"
    source, third = model_source(MINILM), {'third': HALVES['third']}
    dense, tokenizer = AutoModel.from_pretrained(source).eval(), AutoTokenizer.from_pretrained(source)
    rows, texts = rows_of_stsb(data, 'validation'), texts_of(rows_of_stsb(data, 'train'))
    small, report = shrink(dense, 0.4, texts, tokenizer, progress=False)
    for share, model in {1.: dense, report.achieved: small}.items():
        with tempfile.TemporaryDirectory() as folder:
            ways = in_engines(model, dict(tokenizer(texts[:2], padding=True, return_tensors='pt')), folder)
        for backend, way in ways.items():
            score = scores(way, tokenizer, rows, third)['third']
            yield dict(op='score', shape=MINILM, open=round(share, 2), tokens=0, batch=1, backend=backend, score=score)


def rows_of(part, name, tokens, shares, args):
    "Records of one part of the script, for one model and size"
    config, batch, length = MODELS[name], *((8, 128) if tokens == 1024 else (1, tokens))
    if part == 'ffn': return ffn_rows(config, tokens, shares, args.seconds, args.device)
    if part == 'attention': return attention_rows(config, length, batch, args.seconds, args.device)
    shares = [s for s in shares if s in (0.6, 0.4, 0.25)]
    return model_rows(name, config, length, batch, shares, 2*args.seconds, args.device)


def tables(file):
    "What README.md of this folder shows, for each device"
    text = []
    records = pd.read_json(file, lines=True)
    records = records[records.variant == records.variant.iloc[-1]]  # and not of older kernels
    for device, rows in records[~records.op.isin(APART)].groupby('device'):
        rows['size'] = [f'{int(b)} x {t}' if b > 1 else str(t) for b, t in zip(rows.batch, rows.tokens)]
        rows['time'] = [f'{r:.2f}' for r in rows.dense_ratio]
        text.append(device)
        for op in PARTS:
            of_op = rows[rows.op == op].drop_duplicates(['shape', 'open', 'backend', 'size'], keep='last')
            if of_op.empty: continue
            of_op = of_op.sort_values(['batch', 'tokens']).assign(open=of_op.open.round(2))
            table = of_op.pivot_table('time', ['shape', 'open', 'backend'], 'size', aggfunc='last', sort=False)
            text.append(table.reset_index().to_markdown(index=False))
    logits = records[records.op == 'logits'].drop_duplicates('backend', keep='last')
    if len(logits): text.append(logits.set_index('backend')[['error', 'same']].round(3).to_markdown())
    scored = records[records.op == 'score']
    if len(scored): text.append(scored.pivot_table('score', 'backend', 'open', sort=False).round(4).to_markdown())
    return '\n\n'.join([*text, goals(records)])


def goals(records):
    "What was to be reached, beside what was: the latest records"
    same = ['op', 'shape', 'open', 'backend', 'batch', 'tokens']
    latest = records.assign(open=records.open.round(2)).drop_duplicates(same, keep='last').set_index(same)
    of_time = latest.get('dense_ratio', pd.Series(dtype=float))
    def time(*key): return of_time.get(key, float('nan'))
    rows = []
    for tokens in TOKENS:
        dense = time('ffn', '768x3072', .6, 'torch:int8, all open', 1, tokens)
        for backend, of_tokens in GOALS.items():
            reached = time('ffn', '768x3072', .6, backend, 1, tokens)
            rows.append((f'FFN, {backend}', tokens, of_tokens[TOKENS.index(tokens)], reached))
        rows.append(('FFN, compecon:int8 over dense torch int8', tokens, OF_INT8,
                     time('ffn', '768x3072', .6, 'compecon:int8', 1, tokens)/dense))
    for tokens, goal in OF_ENGINE.items():
        routed, settled = (time('model', 'minilm', .4, backend, 1, tokens)
                           for backend in ('packed, router:int8', 'settled, ONNX Runtime int8'))
        rows.append(('MiniLM, routed int8 over settled in ONNX Runtime int8', tokens, goal, routed/settled))
    for name in (MINILM, SMOLLM2):
        ours, theirs = (latest.error.get(('error', name, 1., backend, 1, 256), float('nan'))
                        for backend in ('compecon:int8', 'torch:int8'))
        rows.append((f'{name}, error of int8 over that of torch int8', 256, 2., ours/theirs))
    table = pd.DataFrame(rows, columns=['what', 'tokens', 'goal', 'reached']).dropna()
    return table.assign(met=table.reached <= table.goal).round(3).to_markdown(index=False)


def arguments():
    parser = script_parser(__doc__, threads=1, device='cpu',
                           out=dict(default='results', help='folder of kernels.jsonl'))
    parser.add_argument('--models', default='bert,minilm', help=f'of {", ".join(MODELS)} (bert,minilm)')
    parser.add_argument('--tokens', default='1,16,128,1024', help='1024 are 8 sequences of 128 (1,16,128,1024)')
    parser.add_argument('--open', default='1,0.75,0.6,0.5,0.4,0.25', help='shares of the agents')
    parser.add_argument('--parts', default=','.join(PARTS[:5]), help=f'of {", ".join(PARTS)} (all but the last)')
    parser.add_argument('--seconds', type=float, default=8., help='for each row of a table')
    parser.add_argument('--tables', action='store_true', help='print the tables of what is in OUT, and measure nothing')
    return read_args(parser, dict(models=MODELS, parts=PARTS))


@torch.inference_mode()
def measure(args, file):
    "Append a record for each model, size, part, share and way"
    loaded, origin = native.load(args.device.split(':')[0]), provenance(args.device)
    print(loaded.how, loaded.variant, loaded.why)
    shares = [float(o) for o in args.open.split(',')]
    cases = [(part, name, int(tokens)) for name in args.models for tokens in args.tokens.split(',')
             for part in args.parts if part not in APART]
    def keep(row, name):
        append_line(dict(row, model=name, variant=loaded.variant, **origin), file)
        shown = row.get('dense_ratio', row.get('error', row.get('score')))
        print(row['op'], name, row['tokens'], row['open'], row['backend'], round(shown, 4), flush=True)
    for part, name, tokens in cases:
        for row in rows_of(part, name, tokens, shares, args): keep(row, name)
    for row in error_rows() if 'error' in args.parts else (): keep(row, row['shape'])
    for row in logits_rows() if 'logits' in args.parts else (): keep(row, row['shape'])
    for row in score_rows(args.data) if 'score' in args.parts else (): keep(row, row['shape'])


def main():
    args = arguments()
    file = Path(args.out, 'kernels.jsonl')
    if not args.tables:
        torch.manual_seed(0)
        measure(args, file)
    print(tables(file))


if __name__ == '__main__': main()
