"""What campaigns share: tiny models, work in a process of its own, and the table of what was found."""
import os
import signal
import time
import traceback
import warnings
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE='1', OMP_NUM_THREADS='1', TOKENIZERS_PARALLELISM='false', MPLBACKEND='agg')
warnings.filterwarnings('ignore')

import pandas as pd
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast
from transformers.utils import logging

from compecon.agents import tiny_model
from compecon.lab.loading import load_whole
from compecon.lab.records import append_line, provenance

RECORDS = Path(__file__).parents[2]/'results'/'campaigns.jsonl'

torch.set_num_threads(1)
logging.set_verbosity_error()
logging.disable_progress_bar()


def marked(mark, **config):
    "A tiny BERT that is known by a number in its weights"
    model = tiny_model('bert', vocab_size=64, **config)
    model.classifier.bias.data.fill_(mark)
    return model


def letters():
    "A tokenizer that knows letters"
    vocabulary = ['[PAD]', '[UNK]', *'abcdefghijklmnopqrstuvwxyz.,']
    found = Tokenizer(models.WordLevel({t: i for i, t in enumerate(vocabulary)}, unk_token='[UNK]'))
    found.pre_tokenizer = pre_tokenizers.Split('', 'isolated')
    return PreTrainedTokenizerFast(tokenizer_object=found, pad_token='[PAD]', unk_token='[UNK]',
                                   model_input_names=['input_ids', 'attention_mask'])


def mark_of(folder):
    "The number by which a model on disk is known, `None` if it is not whole"
    try: return int(load_whole(AutoModelForSequenceClassification, folder).classifier.bias[0])
    except ValueError: return None


def in_child(f, timeout=120.):
    """Call `f(say)` in a forked process: its exit code and the lines it said, the last of which is what it raised

    The code is minus a signal, and `None` if it took too long."""
    read, write = os.pipe()
    pid, end = os.fork(), time.time() + timeout
    if pid == 0: _call(f, write)
    os.close(write)
    while not (ended := os.waitpid(pid, os.WNOHANG))[0] and time.time() < end: time.sleep(0.002)
    if not ended[0]:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    with open(read, errors='replace') as said: lines = said.read().splitlines()
    return (os.waitstatus_to_exitcode(ended[1]) if ended[0] else None), lines


def _call(f, write):
    code = 1
    def say(line): os.write(write, f'{line}\n'.encode())
    try:
        f(say)
        code = 0
    except BaseException: say(traceback.format_exc(limit=-1).strip().splitlines()[-1])
    finally: os._exit(code)


def report(name, rows, short=False):
    "Print the table, and keep it unless it is short; exit code 1 if anything is wrong"
    print(pd.DataFrame(rows).fillna(0).to_markdown(index=False, floatfmt='.0f'), flush=True)
    if not short: keep(name, rows)
    if any(row['wrong'] for row in rows): raise SystemExit(1)


def keep(name, rows):
    "Append rows to the records, from which the page of results makes its table"
    origin = provenance()
    for row in rows: append_line(dict(of=name, **row, **origin), RECORDS)
