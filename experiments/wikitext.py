"""How much perplexity does a decoder lose when it loses a quarter, a half, two thirds of its parameters?

Run:  python experiments/wikitext.py --data ../shared/data [--model smollm2] [--params 0.74,0.52,0.33]
          [--methods successive-halving,repair,taylor,fisher,magnitude] [--seeds 1]
or:   accelerate launch --multi_gpu --num_processes 2 experiments/wikitext.py --data ../shared/data --seeds 2 ...

The second command works with a GPU or without: the processes share out the seeds, and find the same models and scores
as one. Every run is a line of RECORDS (results/wikitext.jsonl) as soon as it ends; run again, the script resumes. Dense
models are kept in OUT (results/wikitext/models). All methods start from the same tuned dense model, with the same steps
of recovery; the recorded cost includes what each looks at before. compecon.lab.decoders has the steps.

Data. --data is a folder with `wikitext-103/{validation,test}.txt`, the hub without it, or 'python' (the language
reference of this Python). The training split is not used: the dense model is tuned, agents are scored and small models
recover on the first nine tenths of the articles of the validation split; choices (which candidate is best) are made on
--held-tokens of the last tenth. The test split is read once for each run, for its last number: the first --test-tokens
of it (as WikiText counts: words and ends of lines), all of it without, in windows of --context tokens, --stride apart.
`score` is word perplexity; `metrics` has that of tokens as well, `relative` the loss of each.

Parameters. A share is one of the *whole* model, embeddings included, as in SIMPLE (Tao et al. 2023), whose figures for
GPT-2 are 14.23 dense, and 15.10, 16.51, 19.08 at 0.74, 0.52, 0.33. SIMPLE narrows the residual stream, and embeddings
with it; here heads and neurons are removed and embeddings stay (21 % of SmolLM2-135M), so layers have to lose more.
--without-embeddings takes the share of the layers' parameters only. `achieved` is the share that was asked for,
`achieved_params` and `achieved_layers` are both.

Methods. `successive-halving` compares Taylor and Fisher values at several head weights, in trials of an eighth and a
quarter of the steps; the others choose once. `repair` adds 0.3 of what agents write to Fisher's values (both in shares
of their sum), and refits output projections by least squares before recovery. It learns from more windows (--refit)
than importance scores look at: they are cheap, four passes forward, and what it needs to know is more. `any-price` is
one checkpoint for all shares: the same values without a refit, and as many steps as specialists for all shares take
together, each at a random share. `dense:more` is the dense model with the same recovery steps, to compare with. Token
embeddings are frozen throughout. 'smollm2' is instruction-tuned and was dequantised from 4 bits: see `note`. With
--steps 0 there is no recovery. With --dtype bfloat16 products are made in bfloat16, in all but the tests; weights and
their updates stay in float32.

On two slow cores: --batch 2 --dtype bfloat16 --refit 96 --test-tokens 20000 --context 512 --stride 512 --steps 60
--dense-steps 120 --threads 1, some ten minutes a run, with --lr 2e-4 for repair and 3e-4 for taylor, fisher and
any-price: chosen among three on held-out articles, for repair and for taylor (a rate that mends a broken model breaks a
mended one). --refit 96 holds 4.5 GB. On a graphics card: --windows 8.
"""
import math
from pathlib import Path

import torch

from compecon.lab.bench import DENSE_MORE, RunLog, prepare_dense, record_run
from compecon.lab.decoders import ANY_PRICE, DECODER_METHODS, DecoderBench, DecoderPlan, check_params, read_corpus
from compecon.lab.scripts import by_seed, left_to_do, read_args, script_parser
from compecon.lab.wikitext import SMOLLM2, load_decoder

METHODS = 'successive-halving,repair,taylor,fisher,magnitude'
SIZES = dict(  # fields of DecoderPlan, with their help
    length='tokens of a window in training', batch='windows of a step', steps='of recovery, for every method',
    lr='of recovery', hidden='weight of hidden states in recovery', dense_steps='of the dense model',
    dense_lr='of the dense model', looks='windows that importance scores see', refit='windows that a repair fits',
    block_size='neurons of a block', context='tokens seen at once, in the test',
    stride='tokens between windows, in the test', held_tokens='of the text for choices', windows='scored at once')


def arguments():
    parser = script_parser(
        __doc__, methods=METHODS, seeds=1, out='results/wikitext', records='results/wikitext.jsonl',
        data=dict(help="folder with wikitext-103/<split>.txt; the hub without it; or 'python'"),
        device='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--raw', action='store_true', help='the edition without <unk>')
    parser.add_argument('--model', default=SMOLLM2, help="'smollm2', a folder, or a decoder on the hub")
    parser.add_argument('--params', default='0.74,0.52,0.33', help="shares of the dense model's parameters")
    parser.add_argument('--without-embeddings', action='store_true', help='shares of the layers only')
    for field, what in SIZES.items():
        default = DecoderPlan.__dataclass_fields__[field].default
        names = [f'--{field.replace("_", "-")}', *(['--block'] if field == 'block_size' else [])]
        parser.add_argument(*names, type=type(default), default=default, help=f'{what} ({default})')
    parser.add_argument('--dtype', default='float32', choices=('float32', 'bfloat16'),
                        help='of products in training and scores; tests are in float32')
    parser.add_argument('--test-tokens', type=int,
                        help='only the first so many of the test split, as WikiText counts; all without it')
    return parser


def plan_of(args):
    fields = {name: getattr(args, name) for name in DecoderPlan.__dataclass_fields__}
    return DecoderPlan(**fields | dict(params=tuple(args.params.split(','))))


def wanted(plan, methods, seeds):
    "Seed, method and budget of each run: the dense model first, then those whose training is shared"
    once = [('dense', 1.), *((m, 1.) for m in methods if m == DENSE_MORE)]
    family = [(m, p) for m in methods if m == ANY_PRICE for p in plan.params]
    others = [(m, p) for p in plan.params for m in methods if m not in (ANY_PRICE, DENSE_MORE)]
    return [(s, m, p) for s in seeds for m,p in (*once, *family, *others)]


def say_dense(record):
    metrics = record['metrics']
    by_unit = f"{record['score']:.2f} by the word, {metrics['token']:.2f} by the token, on {metrics['words']} words"
    print(f"seed {record['seed']} dense: {by_unit}; held out {record['held_out']:.2f}", flush=True)


def say(record):
    where, relative = f"seed {record['seed']} {record['method']} at {record['budget']}", record['relative']
    loss = f"{record['score']:.2f} ({relative['word']:+.1%} by the word, {relative['token']:+.1%} by the token)"
    before = record.get('held_out_before', math.nan)
    held = f"held out {before:.2f} before recovery, {record['held_out']:.2f} after"
    left = f"layers {record['achieved_layers']:.3f}, FLOPs {record['achieved_flops']:.3f}"
    print(f"{where}: {loss}, {held}, {left}, {record['train_seconds']:.0f} s", flush=True)


def report(runs):
    token, loss = [m['token'] for m in runs.metrics], [r['word'] for r in runs.relative]
    columns = ['seed', 'budget', 'method', 'achieved_params', 'score', 'token', 'loss', 'dense']
    table = runs.assign(token=token, loss=loss)[columns].sort_values(['budget', 'seed', 'score'])
    print(table.to_markdown(index=False, floatfmt='.3f'))


def run(plan, log, todo, models):
    "All that is left to do"
    texts, (pretrained, tokenizer) = read_corpus(plan), load_decoder(plan.model)
    check_params(plan, pretrained)
    for seed, runs in by_seed(todo):
        bench = prepare_dense(DecoderBench(plan, seed, pretrained, tokenizer, texts, models), log, models)
        say_dense(log.find('dense', seed, 1.))
        for _, method, share in runs:
            if method != 'dense': say(record_run(bench, log, method, share))


def main():
    parser = arguments()
    args = read_args(parser, dict(methods=DECODER_METHODS))
    try:
        plan = plan_of(args)
        log, runs = RunLog(args.records, plan, args.device), wanted(
            plan, args.methods, range(args.first, args.first + args.seeds))
        todo = left_to_do(log.missing(runs))
        if todo: run(plan, log, todo, Path(args.out)/'models')
    except ValueError as e: parser.error(str(e))
    done = log.runs()
    done = done[[(r.seed, r.method, r.budget) in runs for r in done.itertuples()]]
    if len(done): report(done)


if __name__ == '__main__': main()
