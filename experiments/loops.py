"""Do transformers' Trainer and fastai end alike? Same dense model, budget, market, teacher, steps and learning rates.

Run:  python experiments/loops.py --data ../shared/data [--tasks stsb,cola,mnli] [--budgets 0.4] [--seeds 3]
          [--methods trainer,fastai]

`trainer` is EconomyTrainer, `fastai` a Learner with EconomyCallback and Distill. Two epochs of the first 2,048
training samples, 32 a step, in the loop's own random order, AdamW without weight decay, a rate that rises for a tenth
of the steps and falls to 0, a MeasuredMarket and the dense model as a teacher. The settled model is scored on the
halves of the validation part that benchmarks/shrink.py tells apart: `validation`, and `third`, which no choice has
seen. Dense models and records are those of benchmarks/shrink.py, in OUT (results/shrink), made if they are not there:
one for all seeds, which are those of training. Every run leaves its two lines in RECORDS as soon as it ends; run
again, the script resumes.

A quick test: --samples 256 --out FOLDER --records FOLDER/loops.jsonl.
"""
import copy
import hashlib
import tempfile
import time
from functools import partial

import torch
from fastai.callback.schedule import ParamScheduler, SchedLin, combine_scheds
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from fastai.torch_core import set_seed
from scipy.stats import t
from transformers import TrainingArguments

from compecon.callback import Distill, EconomyCallback, HFCallback, hf_collate
from compecon.lab.agreement import loss_of, score
from compecon.lab.experiment import TASKS, Plan, read_data
from compecon.lab.finetune import predict
from compecon.lab.records import append_line, now, provenance, read_runs
from compecon.lab.scripts import dense_bench, is_recorded, read_args, script_parser
from compecon.trainer import EconomyTrainer

TRAIN, EPOCHS, BS, LR, WARM = 2048, 2, 32, 2e-4, 0.1


def is_third(row): return hashlib.sha1(f'third {row["idx"]}'.encode()).digest()[0] % 2 == 1


def collate(samples, pad_id):
    "A batch for a Trainer: labels are in the dictionary"
    x, y = hf_collate([(s['x'], s['y']) for s in samples], pad_id)
    return {k: v for k, v in x.items() if k != 'idx'} | dict(labels=y)


def by_trainer(bench, model, budget, seed):
    samples = [dict(x=x, y=y) for x, y in bench.samples['train']]
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder, num_train_epochs=EPOCHS, per_device_train_batch_size=BS, learning_rate=LR,
            lr_scheduler_type='linear', warmup_steps=WARM, weight_decay=0., max_grad_norm=0., seed=seed, use_cpu=True,
            report_to='none', save_strategy='no', logging_strategy='no', disable_tqdm=True, remove_unused_columns=False)
        trainer = EconomyTrainer(budget, model=model, args=args, train_dataset=samples, teacher=bench.dense,
                                 tokens=bench.tokens, data_collator=partial(collate, pad_id=bench.pad_id))
        trainer.train()
    return trainer.settle()


def by_fastai(bench, model, budget, seed):
    set_seed(seed)
    samples, adamw = bench.samples['train'], partial(OptimWrapper, opt=torch.optim.AdamW)
    dl = DataLoader(samples, bs=BS, shuffle=True, num_workers=0, create_batch=partial(hf_collate, pad_id=bench.pad_id))
    rate = combine_scheds([WARM, 1 - WARM], [SchedLin(0., LR), SchedLin(LR, 0.)])
    cb = EconomyCallback(budget, tokens=bench.tokens)
    cbs = [HFCallback(), cb, Distill(bench.dense), ParamScheduler(dict(lr=rate))]
    learn = Learner(DataLoaders(dl, dl), model, loss_of(bench.task), cbs=cbs, opt_func=adamw, wd=0.)
    with learn.no_bar(), learn.no_logging(): learn.fit(EPOCHS)
    return cb.settle()


LOOPS = dict(trainer=by_trainer, fastai=by_fastai)


def scores(bench, model):
    "By half of the validation part"
    samples = bench.samples['validation']
    logits, labels = predict(model, samples), torch.tensor([y for _, y in samples])
    third = torch.tensor([is_third(x) for x, _ in samples])
    metric = next(iter(bench.task.metrics))
    return metric, {split: score(bench.task, logits[rows], labels[rows])[metric]
                    for split, rows in (('validation', ~third), ('third', third))}


def run(bench, method, budget, seed, args):
    known = dict(task=bench.task.name, method=method, seed=seed, budget=budget, epochs=EPOCHS, train=TRAIN,
                 samples=args.samples)
    if is_recorded(read_runs(args.records).to_dict('records'), known): return
    start = time.perf_counter()
    small = LOOPS[method](bench, copy.deepcopy(bench.dense).train(), budget, seed).eval()
    seconds = round(time.perf_counter() - start, 1)
    (metric, found), (_, dense) = scores(bench, small), scores(bench, bench.dense)
    achieved = bench.flops(small)/bench.flops(bench.dense)
    for split, number in found.items():
        append_line(dict(model=args.plan.model, unit='flops', achieved=achieved, split=split, metric=metric,
                         score=number, dense=dense[split], seconds=seconds, **known,
                         **{**args.origin, 'when': now()}), args.records)
    print(known, f'{achieved:.4f}', {k: round(v, 4) for k, v in found.items()}, f'{seconds:.0f} s', flush=True)


def table(records):
    "Means over seeds and how far the loops are apart, with an interval of 95 % for paired seeds"
    runs = read_runs(records)
    by = runs.pivot_table(index=['task', 'budget', 'split', 'seed'], columns='method', values='score').dropna()
    by['apart'] = 100*(by.trainer - by.fastai)
    found = by.groupby(level=[0, 1, 2]).agg(trainer=('trainer', 'mean'), fastai=('fastai', 'mean'),
                                           apart=('apart', 'mean'), sd=('apart', 'std'), seeds=('apart', 'size'))
    found['interval'] = t.ppf(0.975, found.seeds - 1)*found.sd/found.seeds**0.5
    return found.round(4).to_markdown()


def main():
    parser = script_parser(__doc__, tasks='stsb,cola,mnli', budgets='0.4', methods=','.join(LOOPS), seeds=3,
                           samples=None, out='results/shrink', records='results/loops.jsonl')
    args = read_args(parser, dict(tasks=TASKS, methods=LOOPS))
    args.origin = provenance()
    for task in args.tasks:
        args.plan = Plan(task=task, data=args.data, epochs=0)
        bench = dense_bench(args.plan, 0, read_data(args.plan, args.samples), args.out)
        bench.samples['train'] = bench.samples['train'][:TRAIN]
        for seed in range(args.first, args.first + args.seeds):
            for budget in args.budgets:
                for method in args.methods: run(bench, method, budget, seed, args)
    print(table(args.records))


if __name__ == '__main__': main()
