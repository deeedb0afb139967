"""How much perplexity does a decoder lose with its parameters, without any training, by ours and by rivals?

Run:  python experiments/untrained.py --data DATA [--methods repair,osscar,...] [--params 0.9,0.8,0.7,0.5] [--seeds 3]
          [--texts wikitext,python] [--windows 96] [--steps 0] [--products bfloat16]

SmolLM2-135M (instruction-tuned, dequantised from 4 bits) as it comes. Every method sees the same windows of 256 tokens,
drawn by the seed from the first nine tenths of WikiText-103's validation split, or from Python's language reference,
and is scored on the first --test-tokens of WikiText-103's test split (as WikiText counts), in windows of 512 tokens.
`score` is perplexity by the token, `relative` what it loses. `params` is the share of the whole model's parameters
that was asked for, `achieved` what the settled model has.

`repair` is compecon.shrink as it comes, with one look for all sizes of a seed; `repair-layers` leaves the vocabulary as
it is, which is what all others do. Methods of compecon.lab.rivals choose single neurons where `repair` has blocks of
32; those with a setting that matters are tried with two (`flap-even`, `slimgpt-even`, `grail-strong`). `fisher` and
`magnitude` are methods of compecon.shrink that change no weights. `sleb` looks at --looks windows only, for it runs the
model once for each layer that is left and each that goes. `slicegpt` counts its maps and a head of its own. With
--steps, the small models recover for so many steps of 4 windows, taught by the dense one.

`says` is how the model goes on from PROMPTS, drawn at a temperature of .7, and `surprise` the nats a token by which
the dense model is surprised of that.

Products are in bfloat16, of methods and for scores (a perplexity moves by a thousandth). `seconds` (of `repair`, the
look is in each) and `memory_mb` (the most that the process held) are a method's own. A run leaves its line in RECORDS
when it ends; run again, the script resumes.
"""
import copy
import time
from functools import partial
from pathlib import Path

import torch

from compecon.economy import Economy
from compecon.lab.decoders import count_params, first_tokens
from compecon.lab.records import append_line, now, provenance, read_runs
from compecon.lab.rivals import RIVALS, flap, grail, slice_gpt, sliced_params, slimgpt
from compecon.lab.scripts import is_recorded, read_args, script_parser
from compecon.lab.wikitext import (SMOLLM2, detokenize, encode, lm_batches, lm_loss, load_decoder, load_wikitext,
                                   perplexity, python_reference, tune)
from compecon.settle import settle
from compecon.shrink import SHRINK_METHODS, shrink_to_all

OTHERS = {**RIVALS, 'flap-even': partial(flap, even=True), 'slimgpt-even': partial(slimgpt, rising=0.),
          'grail-strong': partial(grail, ridge=0.1)}
OURS = {name: dict(method=name) for name in SHRINK_METHODS} | {'repair-layers': dict(vocabulary=False)}
METHODS, TEXTS, LENGTH = (*OURS, *OTHERS, 'slicegpt'), ('wikitext', 'python'), 256
PROMPTS = ('The river rises in the mountains and', 'After the war, the town', 'The band recorded its second album in',
           'The bird is found in')


class Memory:
    "The most that this process holds while it is entered, in megabytes; nothing where Linux does not say"
    megabytes = None
    def __enter__(self):
        try: Path('/proc/self/clear_refs').write_text('5')
        except OSError: pass
        return self
    def __exit__(self, *_):
        status = Path('/proc/self/status')
        if not status.exists(): return
        peak = next(line for line in status.read_text().splitlines() if line.startswith('VmHWM'))
        self.megabytes = int(peak.split()[1])/1024


def products(args): return torch.autocast('cpu', getattr(torch, args.products), enabled=args.products != 'float32')


class Subject:
    "A decoder, what methods see of a text, and how it is scored"
    def __init__(self, args):
        self.args = args
        self.dense, self.tokenizer = load_decoder(SMOLLM2)
        wikitext = load_wikitext(args.data)
        validation = wikitext['validation']
        texts = dict(wikitext=detokenize(validation[:len(validation)*9//10]), python=python_reference()['train'])
        self.ids = {name: encode(self.tokenizer, texts[name]) for name in args.texts}
        self.test = first_tokens(wikitext['test'], args.test_tokens)
        with products(args): self.score_of_dense, (_, self.surprise) = self.score(self.dense), self.writes(self.dense)

    def score(self, model): return perplexity(model, self.tokenizer, self.test, 512, 512, detokenize)['token']

    def writes(self, model): # A continuation of each prompt, and the nats a token of four of each by the dense model
        torch.manual_seed(0)
        texts, nats = [], []
        for prompt in PROMPTS:
            x = self.tokenizer(prompt, return_tensors='pt')
            with torch.no_grad():
                ids = model.generate(**x, do_sample=True, temperature=0.7, min_new_tokens=48, max_new_tokens=48,
                                     num_return_sequences=4, pad_token_id=0)
                logits = self.dense(ids).logits[:, x['input_ids'].shape[1] - 1:-1].float()
            nats.append(torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, -48:]).item())
            texts.append(self.tokenizer.decode(ids[0]))
        return texts, sum(nats)/len(nats)

    def windows(self, text, seed): # Pairs of inputs and next tokens
        batches = lm_batches(self.ids[text], LENGTH, 4, seed)
        return batches[:self.args.windows//4]

    def smaller(self, method, shares, pairs, seed):
        "For each share a smaller model, how many parameters it has, and the seconds it took"
        if method in OURS:
            batches = [dict(x, attention_mask=torch.ones_like(x['input_ids'])) for x, _ in pairs]
            budgets = [f'{share} params' for share in shares]
            found = shrink_to_all(self.dense, budgets, batches, seed=seed, progress=False, **OURS[method])
            for small, report in found:
                yield small, count_params(small), sum(s for step, s in report.seconds.items() if step != 'report')
        else:
            for share in shares:
                start = time.perf_counter()
                small, params = self.by_rival(method, share, pairs)
                yield small, params, time.perf_counter() - start

    def by_rival(self, method, share, pairs):
        if method == 'slicegpt':
            width = max(w for w in range(1, self.dense.config.hidden_size)
                        if sliced_params(self.dense, w) <= share*count_params(self.dense))
            return slice_gpt(self.dense, width, [x for x, _ in pairs]), sliced_params(self.dense, width)
        economy = Economy(copy.deepcopy(self.dense), LENGTH, block_size=1)
        options = dict(loss_func=lm_loss) if method == 'sleb' else {}
        OTHERS[method](economy, f'{share} params', pairs[:self.args.looks//4] if method == 'sleb' else pairs, **options)
        small = settle(economy)
        return small, count_params(small)


def run(subject, text, method, shares, seed, args):
    pairs, dense = subject.windows(text, seed), subject.score_of_dense
    models = subject.smaller(method, shares, pairs, seed)
    for share in shares:
        with Memory() as memory, products(args): small, params, seconds = next(models)
        if args.steps:
            with products(args): tune(small, pairs, args.steps, args.lr, subject.dense, seed=seed)
        with products(args): found, (says, surprise) = subject.score(small), subject.writes(small)
        append_line(dict(model=SMOLLM2, text=text, method=method, seed=seed, params=share,
                         achieved=params/count_params(subject.dense), steps=args.steps, metric='perplexity',
                         score=found, dense=dense, relative=found/dense - 1, seconds=round(seconds, 1),
                         memory_mb=memory.megabytes, windows=args.windows, test_tokens=args.test_tokens,
                         products=args.products, says=says, surprise=surprise, dense_surprise=subject.surprise,
                         **{**args.origin, 'when': now()}), args.records)
        says = f'{text}, {method} seed {seed} at {share}: {found:.2f} ({found/dense - 1:+.0%}), {seconds:.0f} s'
        print(says, flush=True)


def table(runs):
    "Perplexity gained, in percent: mean over seeds and their number"
    cells = runs.groupby(['text', 'steps', 'method', 'params']).relative.agg(['mean', 'count'])
    shown = cells.apply(lambda r: f'{100*r["mean"]:+.0f} ({r["count"]:.0f})', axis=1)
    return shown.unstack('params').fillna('').to_markdown()


def done(text, method, share, seed, args):
    wanted = dict(text=text, method=method, params=share, seed=seed, steps=args.steps, windows=args.windows,
                  test_tokens=args.test_tokens, products=args.products)
    return is_recorded(read_runs(args.records).to_dict('records'), wanted)


def main():
    methods = 'repair,grail,osscar,slimgpt,flap,wanda_sp,shortgpt,fisher'
    parser = script_parser(__doc__, data=dict(required=True), methods=methods, seeds=1,
                           records='results/untrained.jsonl')
    parser.add_argument('--texts', default='wikitext', help='that methods see, separated by commas: wikitext, python')
    parser.add_argument('--params', default='0.9,0.8,0.7,0.5', help="shares of the dense model's parameters")
    parser.add_argument('--windows', type=int, default=96, help='of 256 tokens, that methods see; with --records of '
                        'its own for another number')
    parser.add_argument('--looks', type=int, default=4, help='windows that sleb sees')
    parser.add_argument('--steps', type=int, default=0, help='of recovery')
    parser.add_argument('--lr', type=float, default=2e-4, help='of recovery')
    parser.add_argument('--products', default='bfloat16', choices=('bfloat16', 'float32'), help='their factors')
    parser.add_argument('--test-tokens', type=int, default=10_000, help='of the test split that is read')
    args = read_args(parser, dict(methods=METHODS, texts=TEXTS), apart=['records'])
    args.origin, subject = provenance(), Subject(args)
    for seed in range(args.first, args.first + args.seeds):
        for text in args.texts:
            for method in args.methods:
                shares = [s for s in map(float, args.params.split(',')) if not done(text, method, s, seed, args)]
                if shares: run(subject, text, method, shares, seed, args)
    print(table(read_runs(args.records)))


if __name__ == '__main__': main()
