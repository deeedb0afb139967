"""What is left of a MiniLM at several budgets, with quality and time: the README's picture.

Run:  python benchmarks/picture.py --data DATA [--budgets 0.6,0.3,0.1] [--out results]

all-MiniLM as it comes, made smaller by `shrink` on 512 sentences of STS-B's training part, without labels and without
training. OUT/picture.jsonl has, for the dense model and for each budget, which heads and blocks are left, Spearman's
correlation on STS-B (the half of validation that no choice sees), and milliseconds of a forward pass over 16 tokens in
ONNX Runtime, int8, on one thread, the median of turns.
"""
import tempfile
import time
from pathlib import Path
from statistics import median

import onnxruntime
import torch
from transformers import AutoModel, AutoTokenizer

from shrink import HALVES, scores, texts_of
from shrink import rows_of as rows_of_stsb
from compecon.agents import example_inputs
from compecon.economy import Economy
from compecon.export import quantize_onnx, write_onnx
from compecon.lab.finetune import MINILM, model_source
from compecon.lab.records import append_line, provenance
from compecon.lab.scripts import read_args, script_parser
from compecon.picture import who_is_open
from compecon.shrink import shrink_to_all


def session_of(model, folder):
    "The model as an int8 graph on one thread"
    x = example_inputs(model, 16)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    file = quantize_onnx(write_onnx(model, x, Path(folder, 'model.onnx')))
    session = onnxruntime.InferenceSession(str(file), options, providers=['CPUExecutionProvider'])
    wanted = {i.name for i in session.get_inputs()}
    whole = dict(x, attention_mask=torch.ones_like(x['input_ids']), token_type_ids=torch.zeros_like(x['input_ids']))
    return session, {k: v.numpy() for k, v in whole.items() if k in wanted}


def milliseconds(models, rounds=60, calls=20):
    "Medians, in turns"
    with tempfile.TemporaryDirectory() as work:
        sessions = []
        for i, model in enumerate(models):
            folder = Path(work, str(i))
            folder.mkdir()
            sessions.append(session_of(model, folder))
    times = [[] for _ in sessions]
    for _ in range(rounds):
        for (session, x), of_model in zip(sessions, times):
            start = time.perf_counter()
            for _ in range(calls): session.run(None, x)
            of_model.append(1e3*(time.perf_counter() - start)/calls)
    return [median(t) for t in times]


def main():
    args = read_args(script_parser(__doc__, data=dict(required=True), budgets='0.6,0.3,0.1', threads=1, out='results'))
    source = model_source(MINILM)
    dense, tokenizer = AutoModel.from_pretrained(source).eval(), AutoTokenizer.from_pretrained(source)
    texts, rows = texts_of(rows_of_stsb(args.data, 'train')), rows_of_stsb(args.data, 'validation')
    economy = Economy(AutoModel.from_pretrained(source).eval(), tokens=16)
    economy.clear(1.)
    made = [(dense, 1., who_is_open(economy))]
    for small, report in shrink_to_all(dense, args.budgets, texts, tokenizer, progress=False):
        made.append((small, report.achieved, report.agents))
    times, origin = milliseconds([model for model, *_ in made]), provenance()
    for budget, (model, achieved, agents), ms in zip((1., *args.budgets), made, times):
        score = scores(model, tokenizer, rows, {'third': HALVES['third']})['third']
        append_line(dict(model=MINILM, budget=budget, achieved=achieved, score=score, ms=ms,
                         agents=agents.to_dict('records'), **origin), Path(args.out, 'picture.jsonl'))
        print(f'{achieved:.3f}: Spearman {score:.3f}, {ms:.2f} ms, {agents.open.sum()} agents', flush=True)


if __name__ == '__main__': main()
