"""Processes that are killed while they save a model, append records, or run a frontier: what is left of their work?

Run:  python tools/campaigns/kills.py [--short] [--random 200] [--frontiers 40] [--seed 0]

A small library in C counts what a process asks of the disk (write, fsync, rename, mkdir, unlink, ...) and kills it
before any of these, one after the other; others are killed at random moments. Afterwards the work is done again, or
goes on. `clear` is what recovered: a model at its place is the one of before or the new one, whole, and the next save
leaves nothing else; records that were written are there once; a frontier that is run again has each run once, and the
same models as one that nobody killed. With --short most frontiers and random kills are left out.
"""
import argparse
import ctypes
import hashlib
import importlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LIBRARY = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>
static long at = -1, done;
void campaign_arm(long n) { at = n; done = 0; }
long campaign_steps(void) { return done; }
static void step(void) { if (at >= 0 && ++done == at) kill(getpid(), SIGKILL); }
#define STEP(type, name, args, call) type name args { \
    static type (*real) args; if (!real) real = dlsym(RTLD_NEXT, #name); step(); return real call; }
STEP(ssize_t, write, (int f, const void *b, size_t n), (f, b, n))
STEP(ssize_t, writev, (int f, const struct iovec *b, int n), (f, b, n))
STEP(ssize_t, pwrite64, (int f, const void *b, size_t n, off64_t o), (f, b, n, o))
STEP(int, ftruncate64, (int f, off64_t n), (f, n))
STEP(int, fsync, (int f), (f))
STEP(int, rename, (const char *a, const char *b), (a, b))
STEP(int, renameat2, (int f, const char *a, int g, const char *b, unsigned int how), (f, a, g, b, how))
STEP(int, mkdir, (const char *p, mode_t m), (p, m))
STEP(int, rmdir, (const char *p), (p))
STEP(int, unlink, (const char *p), (p))
STEP(int, unlinkat, (int f, const char *p, int how), (f, p, how))
STEP(int, flock, (int f, int how), (f, how))
"""
PRELOADED = 'COMPECON_CAMPAIGN'


def preload():
    "Start this script again, with the library"
    folder = tempfile.mkdtemp(prefix='compecon-kills-')
    source, library = Path(folder, 'steps.c'), Path(folder, 'steps.so')
    source.write_text(LIBRARY)
    subprocess.run(['gcc', '-O1', '-shared', '-fPIC', str(source), '-o', str(library), '-ldl'], check=True)
    variables = {**os.environ, 'LD_PRELOAD': str(library), PRELOADED: folder}
    try: done = subprocess.run([sys.executable, *sys.argv], env=variables)
    finally: shutil.rmtree(folder)
    sys.exit(done.returncode)


def arm(step):
    "Be killed before the n-th step from here on; 0 is never"
    ctypes.CDLL(None).campaign_arm(ctypes.c_long(step))


def steps(): return ctypes.CDLL(None).campaign_steps()


class Kills:
    "One campaign: a process works until it is killed, and what is left is judged"
    def __init__(self, folder, rng):
        self.folder, self.rng, self.rows = Path(folder), rng, []

    def at_steps(self, name, prepare, work, judge, most=None):
        "Killed before every step, or before some of them at random"
        def count(say):
            arm(0)
            work(say)
            say(steps())
        prepare()
        started, (_, said) = time.time(), common.in_child(count)
        seconds, n = time.time() - started, int(said[-1])
        chosen = range(1, n + 1) if most is None else sorted(self.rng.sample(range(1, n + 1), min(most, n)))
        self.row(f'{name}, before {"each of " if most is None else ""}{len(chosen)} steps', prepare, judge,
                 [self.killed_at(work, s) for s in chosen])
        return seconds

    def killed_at(self, work, step):
        def go(say):
            arm(step)
            work(say)
        return lambda: common.in_child(go)

    def at_random(self, name, prepare, work, judge, seconds, n):
        self.row(f'{name}, at random', prepare, judge,
                 [lambda: common.in_child(work, self.rng.uniform(0, seconds)) for _ in range(n)])

    def row(self, name, prepare, judge, kills):
        counts = dict(campaign=name, tried=0, clear=0, wrong=0, lost=0, doubled=0)
        for kill in kills:
            prepare()
            code, said = kill()
            if code == 1: raise SystemExit(f'{name}: {said[-1]}')
            found = judge(said)
            counts['tried'] += 1
            counts[found] += 1
            counts['wrong'] += found != 'clear'
        self.rows.append(counts)


def saving(kills, short, n):
    "A model is saved where there is none, or over one"
    settle = importlib.import_module('compecon.settle')
    models, place = [common.marked(mark) for mark in range(3)], kills.folder/'save'/'model'
    def first():
        shutil.rmtree(place.parent, ignore_errors=True)
        place.parent.mkdir()
    def over():
        first()
        settle.save(models[0], place)
    def work(say): settle.save(models[1], place)
    def without(say):
        settle._exchange = lambda a, b: False
        work(say)
    def judge(before, beside=False): # `beside`: it may lie there under another name until the next save
        def judged(said):
            there = [f for f in place.parent.iterdir() if beside or f == place]
            found = [common.mark_of(f) for f in there]
            whole = any(mark in (0, 1) for mark in found) if beside else found in before
            settle.save(models[2], place)
            clean = common.mark_of(place) == 2 and list(place.parent.iterdir()) == [place]
            return 'clear' if whole and clean else 'lost'
        return judged
    kills.at_steps('first save', first, work, judge([[], [1]]))
    seconds = kills.at_steps('save over a model', over, work, judge([[0], [1]]))
    kills.at_random('save over a model', over, work, judge([[0], [1]]), seconds, n)
    kills.at_steps('save over a model, two renames', over, without, judge(None, beside=True), 20 if short else None)


def appending(kills, short, n):
    "Records are appended, by one process or by two"
    from compecon.lab.records import append_line, read_runs
    file = kills.folder/'records'/'runs.jsonl'
    def prepare():
        shutil.rmtree(file.parent, ignore_errors=True)
        append_line(dict(who='before', i=-1, text='x'*100), file)
    def work(say, who=0):
        for i in range(8):
            append_line(dict(who=who, i=i, text='x'*20_000), file)
            say(f'{who} {i}')
    def both(say):
        pid = os.fork()
        work(say, 0 if pid else 1)
        if pid: os.waitpid(pid, 0)
        else: os._exit(0)
    def judge(said):
        append_line(dict(who='after', i=-1, text='x'), file)
        runs = read_runs(file)
        found = [f'{r.who} {r.i}' for r in runs.itertuples()]
        if len(set(found)) < len(found): return 'doubled'
        return 'clear' if {'before -1', 'after -1', *said} <= set(found) else 'lost'
    seconds = kills.at_steps('append', prepare, work, judge, 20 if short else None)
    kills.at_random('append', prepare, work, judge, seconds, n)
    kills.at_random('append, two processes', prepare, both, judge, 2*seconds, n)


class Frontier:
    "A small plan, its models undisturbed, and what runs of it leave"
    def __init__(self, folder):
        import datasets

        from compecon.lab import experiment
        from compecon.lab.agreement import load_agreement
        datasets.disable_progress_bars()
        rows = load_agreement(64, 32)
        experiment.load_task = lambda *_: rows
        experiment.ClassifierBench.timing = dict(rounds=2, warmup=0, turn=0.001)
        self.folder, self.experiment, self.out = folder, experiment, folder/'out'
        model, tokenizer = common.marked(0), common.letters()
        tokenizer.save_pretrained(folder/'dense')
        model.save_pretrained(folder/'dense')
        self.plan = experiment.Plan(model=str(folder/'dense'), budgets=(0.5,), methods=('fisher', 'taylor'),
                                    dense_epochs=1, epochs=1, block_size=8)

    def prepare(self): shutil.rmtree(self.out, ignore_errors=True)
    def run(self, say): self.experiment.run_plan(self.plan, self.out, progress=False)
    def models(self):
        return {str(f.relative_to(self.out)): hashlib.sha1(f.read_bytes()).hexdigest()
                for f in self.out.rglob('*') if f.suffix == '.safetensors'}
    def methods(self):
        from compecon.lab.records import read_runs
        return sorted(read_runs(self.out/'runs.jsonl').method)


def experimenting(kills, n):
    "A frontier is killed, and run again"
    frontier = Frontier(kills.folder)
    code, said = common.in_child(frontier.run)
    if code: raise SystemExit(f'frontier: {said[-1]}')
    wanted, models = frontier.methods(), frontier.models()
    def judge(said):
        code, said = common.in_child(frontier.run)
        if code: raise SystemExit(f'frontier, run again: {said[-1]}')
        found = frontier.methods()
        if len(set(found)) < len(found): return 'doubled'
        return 'clear' if found == wanted and frontier.models() == models else 'lost'
    seconds = kills.at_steps('frontier', frontier.prepare, frontier.run, judge, n)
    if n > 1: kills.at_random('frontier', frontier.prepare, frontier.run, judge, seconds, n)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--short', action='store_true')
    parser.add_argument('--random', type=int, default=200, help='kills at random moments, of each kind (200)')
    parser.add_argument('--frontiers', type=int, default=40, help='that are killed, of each kind (40)')
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    if args.short: args.random, args.frontiers = 10, 1
    with tempfile.TemporaryDirectory(prefix='compecon-kills-') as folder:
        kills = Kills(folder, random.Random(args.seed))
        saving(kills, args.short, args.random)
        appending(kills, args.short, args.random)
        experimenting(kills, args.frontiers)
    common.report('kills', kills.rows, args.short)


if __name__ == '__main__':
    if PRELOADED not in os.environ: preload()
    import common
    main()
