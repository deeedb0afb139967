"""The frontier of any model on any task of GLUE, by one process or by several.

Run:  python experiments/glue.py --data ../shared/data [--task cola] [--model minilm] [--budgets 0.4,0.2]
          [--methods repair,fisher] [--out results/glue]
or:   accelerate launch --multi_gpu --num_processes 2 experiments/glue.py --data ../shared/data ...

The second command starts two processes where there is no GPU, too (accelerate 1.15 starts just one for `--cpu` without
MPI); so does `torchrun --nproc_per_node 2`. Options are those of `compecon frontier`. A model is the packaged MiniLM, a
folder, or a name on the hub (as google-bert/bert-base-uncased), and without --data the task comes from the hub, too.

Several processes share out the batches of every training run and make the same steps as one. Whatever else is decided,
process 0 decides, and it keeps records and models, in a folder that all must see. Every run is a line of OUT/runs.jsonl
as soon as it ends; started again, by any number of processes, the script resumes.

A quick test: --samples 256 --out FOLDER.
"""
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from fastai.torch_core import default_device

from compecon.lab.cli import app

LAUNCHED = 'MASTER_PORT', 'OMPI_COMM_WORLD_SIZE', 'PMI_SIZE'  # what launchers put into the environment
ALONE = ('glue.py: `accelerate launch --cpu` has started one process of several. '
         'Without MPI, say --multi_gpu in place of --cpu, also where there is no GPU')


def join():
    "Join the processes that a launcher started, by gloo on CPUs"
    on_cpu = os.environ.get('ACCELERATE_USE_CPU', '').lower() == 'true'
    if on_cpu: default_device(False)
    if not any(name in os.environ for name in LAUNCHED): return
    from accelerate import PartialState
    patience = timedelta(days=1)  # the others wait while process 0 scores
    state = PartialState(cpu=on_cpu or not torch.cuda.is_available(), timeout=patience)
    if on_cpu and state.num_processes == 1: sys.exit(ALONE)


def main():
    join()
    try: app(['frontier', *sys.argv[1:]], default_map=dict(frontier=dict(task='cola', out='results/glue')))
    finally:
        if dist.is_initialized(): dist.destroy_process_group()


if __name__ == '__main__': main()
