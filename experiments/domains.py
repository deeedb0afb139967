"""Does opening by input pay where inputs differ in kind? Prose and code's reference, in one decoder.

Run:  python experiments/domains.py --data DATA [--budgets 0.9,0.8,0.7] [--seeds 3] [--windows 32] [--records FILE]

SmolLM2-135M as it comes. Values of its agents (heads, and blocks of 32 neurons) are Fisher's, of WikiText-103's
validation split and of Python's language reference, on --windows windows of 256 tokens of each, drawn by the seed.
At the same budget, audited, four ways to choose what is open:

- `shared`: one set, by the mean of both values (each summing to 1);
- `own`: a set for each kind of text, and somebody who knows the kind;
- `other`: the set of the other kind;
- `routed`: the sequence chooses between the two sets, by its mean word vector: the nearer of the two means of the
  windows that were looked at. `right` is how often it chooses its own. (It reads the words that are predicted; what it
  can tell from them is one bit.)

What is scored is perplexity by the token, in windows of 256, of the first --test-tokens tokens of WikiText's test split
and of the reference's. Nothing is trained or repaired: what is closed opens again for the next sequence. Gates stay on
the model; that a set for each sequence is as fast as one set is measured in benchmarks/sparse.py. A run leaves its line
in RECORDS when it ends; run again, the script resumes.
"""
import torch
import torch.nn.functional as F

from compecon.economy import Economy
from compecon.importance import fisher
from compecon.lab.records import append_line, now, provenance, read_runs
from compecon.lab.scripts import is_recorded, read_args, script_parser
from compecon.lab.wikitext import (SMOLLM2, detokenize, encode, lm_batches, lm_loss, load_decoder, load_wikitext,
                                   python_reference)

LENGTH, SETS = 256, ('shared', 'own', 'other', 'routed')
KINDS = 'prose', 'code'


class Subject:
    "A decoder with gates, and texts of two kinds"
    def __init__(self, args):
        self.args = args
        self.model, tokenizer = load_decoder(SMOLLM2)
        wikitext, reference = load_wikitext(args.data), python_reference()
        looked_at = detokenize(wikitext['validation']), reference['train']
        scored = detokenize(wikitext['test']), reference['test']
        self.looked_at = dict(zip(KINDS, (encode(tokenizer, t) for t in looked_at)))
        self.scored = {kind: self.rows(encode(tokenizer, t)) for kind, t in zip(KINDS, scored)}
        self.economy = Economy(self.model, LENGTH)
        self.dense = {kind: self.perplexity(kind, lambda rows: None) for kind in KINDS}

    def rows(self, ids): # Windows to be scored
        n = min(self.args.test_tokens, len(ids) - 1)//LENGTH
        return ids[:n*LENGTH].view(n, LENGTH)

    def look(self, seed):
        "By kind of text: values, which sum to 1, and the mean word vector"
        self.values, self.means = {}, {}
        for kind, ids in self.looked_at.items():
            pairs = lm_batches(ids, LENGTH, 4, seed)[:self.args.windows//4]
            values = fisher(self.economy, pairs, lm_loss)
            self.values[kind] = values/values.sum()
            self.means[kind] = torch.cat([self.words(x['input_ids']) for x, _ in pairs]).mean(0)

    @torch.no_grad()
    def words(self, ids): return self.model.get_input_embeddings()(ids).mean(1) # A vector for each sequence

    def cleared(self, values, budget): # An open set, and what it spends
        self.economy.values = values
        spent = self.economy.clear(budget)
        return self.economy.open.clone(), spent

    def chosen(self, rows): # The kind that each sequence looks like
        means = torch.stack([self.means[kind] for kind in KINDS])
        return torch.cdist(self.words(rows), means).argmin(1)

    @torch.no_grad()
    def perplexity(self, kind, opened):
        "By the token; `opened(rows)` is what is open for each of them, all agents if `None`"
        total, count = 0., 0
        for rows in self.scored[kind].split(4):
            masks = opened(rows)
            masks = torch.ones(len(rows), len(self.economy)) if masks is None else masks.float()
            with self.economy.forcing(masks), torch.autocast('cpu', torch.bfloat16): logits = self.model(rows).logits
            logits, targets = logits[:, :-1].flatten(0, 1).float(), rows[:, 1:].flatten()
            total += F.cross_entropy(logits, targets, reduction='sum').item()
            count += len(targets)
        return float(torch.tensor(total/count).exp())

    def run(self, kind, sets, budget):
        "Fields of a record"
        other = KINDS[1 - KINDS.index(kind)]
        own, spent = self.cleared(self.values[kind], budget)
        others, spent_by_other = self.cleared(self.values[other], budget)
        shared, spent_by_shared = self.cleared((self.values[kind] + self.values[other])/2, budget)
        by_kind = torch.stack([own if k == kind else others for k in KINDS])
        open_sets = dict(shared=lambda rows: shared.expand(len(rows), -1), own=lambda rows: own.expand(len(rows), -1),
                         other=lambda rows: others.expand(len(rows), -1),
                         routed=lambda rows: by_kind[self.chosen(rows)])
        score = self.perplexity(kind, open_sets[sets])
        right = (self.chosen(self.scored[kind]) == KINDS.index(kind)).float().mean().item()
        achieved = dict(shared=spent_by_shared, own=spent, other=spent_by_other,
                        routed=right*spent + (1 - right)*spent_by_other)[sets]
        same = (own & others).sum().item()/(own | others).sum().item()
        return dict(achieved=achieved, score=score, dense=self.dense[kind], relative=score/self.dense[kind] - 1,
                    right=right, same=same)


def table(runs):
    "Percent by which perplexity rises, the mean over seeds and their number"
    cells = runs.groupby(['text', 'sets', 'budget']).relative.agg(['mean', 'count'])
    return cells.apply(lambda r: f'{100*r["mean"]:+.0f} ({r["count"]:.0f})', axis=1).unstack('budget').to_markdown()


def main():
    parser = script_parser(__doc__, data=dict(required=True), budgets='0.9,0.8,0.7', seeds=3, threads=1,
                           records='results/domains.jsonl')
    parser.add_argument('--windows', type=int, default=32, help='of 256 tokens of each text, that are looked at')
    parser.add_argument('--test-tokens', type=int, default=8192, help='of each text, that are scored')
    args = read_args(parser, apart=['records'])
    origin, subject = provenance(), Subject(args)
    for seed in range(args.first, args.first + args.seeds):
        wanted = [dict(text=kind, sets=sets, budget=budget, seed=seed, windows=args.windows,
                       test_tokens=args.test_tokens) for budget in args.budgets for kind in KINDS for sets in SETS]
        left = [w for w in wanted if not is_recorded(read_runs(args.records).to_dict('records'), w)]
        if left: subject.look(seed)
        for w in left:
            found = subject.run(w['text'], w['sets'], w['budget'])
            append_line(dict(model=SMOLLM2, **w, **found, **{**origin, 'when': now()}), args.records)
            print(f'{w["text"]}, {w["sets"]} at {w["budget"]}, seed {seed}: {found["score"]:.2f} '
                  f'({found["relative"]:+.0%}, {found["achieved"]:.4f})', flush=True)
    print(table(read_runs(args.records)))


if __name__ == '__main__': main()
