"""Models that judge pre-training data (report section 3.1): which documents are good, which domain
they are of, which generated answers to believe.

The report scores every document by Qwen2-Instruct models along several dimensions, balances
domains that these models tell apart, and filters synthetic data by reward models. Its prompts,
dimensions and thresholds are not disclosed: those below are our choice. Two scorers:

  judge       a Qwen2 directory reads the document, then one question a dimension, and the score is
              the expectation over the tokens 1 to 5. Sampling one digit would tell five levels
              apart; the probabilities rank documents even where a small model always says 3.
  classifier  softmax regression on hashed word 1- and 2-grams: seconds to train, the cheap stand-in
              where a judge cannot read everything. It learns from numbers (people's verdicts, or a
              judge's scores of a sample) what is good, from names which domain is which.

    python -m data.quality --labels web_labels.jsonl                    # cross-validated AUC
    python -m data.quality --labels web_labels.jsonl --data runs/data --keep 0.5 --out runs/good
    python -m data.quality --labels domains.jsonl --label domain --data runs/good --out runs/dom
    python -m data.quality --judge runs/demo/grpo --data runs/data --out runs/judged
    python -m data.quality --generate 1000 --policy runs/demo/grpo --reward_model runs/rm ...

--out gets a .jsonl a source (a domain, where names were learned: weights of pretrain.py then sample
domains down and up), each document with its "scores", and report.json.
"""
import json
from dataclasses import asdict, dataclass
from os.path import commonprefix

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from data import dedup
from data import documents
import tasks.queries
from lib.args import cli, positive, require
from lib.files import read_jsonl, write_atomic
from lib.optim import pad_rows, rng, setup
from reward import RewardModel
from sample import load_policy, read_prompts, rollout

DIMENSIONS = {
    "knowledge": "How much could a student learn from this text?",
    "clarity": "How clear and well written is this text?",
    "reasoning": "How much does this text explain and reason?",
    "cleanliness": "How free of advertisements, menus and broken pieces is this text?",
}
QUESTION = "\n\n{} Answer with a number from 1 (not at all) to 5 (very)."


@dataclass
class Args:
    out: str = "runs/quality"        # directory for {source}.jsonl and report.json
    data: str = ""                   # documents to score: directory or files, comma-separated
    labels: str = ""                 # .jsonl of labelled texts: train the classifier on them
    label: str = "label"             # their field: numbers (more is better) or names (domains)
    folds: int = 5                   # of the cross-validation on --labels
    judge: str = ""                  # model directory that scores documents
    judge_tokens: int = 512          # of a document that the judge reads
    keep: float = 1.0                # share of the text to keep, the best first
    generate: int = 0                # questions that --policy answers; instead of all the above
    policy: str = ""                 # chat model that answers them
    responses: int = 4               # answers a question
    reward_model: str = ""           # orders the answers that pass their check; empty: all stay
    seed: int = 0                    # of folds, training and sampling
    device: str = "auto"             # auto, cpu, cuda[:N]
    dtype: str = "auto"              # auto, float32, bfloat16
    overwrite: bool = False          # replace what --out holds


# ---------------------------------------------------------------------------------------------
# the judge

@torch.no_grad()
def judge(model, tokenizer, text: str, max_tokens: int = 512) -> dict[str, float]:
    """A score in [1, 5] a dimension. The questions come last, so the document is read once."""
    text = tokenizer.decode(tokenizer.encode(text)[:max_tokens]).rstrip("\ufffd")
    prompts = [tokenizer.render([{"role": "user", "content": text + QUESTION.format(question)}],
                                add_generation_prompt=True)[0] for question in DIMENSIONS.values()]
    shared = len(commonprefix(prompts))
    _, cache = read_prompts(model, [prompt[:shared] for prompt in prompts])
    rest = [prompt[shared:] for prompt in prompts]
    hidden = model.hidden(pad_rows(rest, 0).to(model.head_weight.device), cache=cache)
    last = hidden[torch.arange(len(rest)), [len(row) - 1 for row in rest]]
    digits = torch.tensor([tokenizer.encode(digit)[0] for digit in "12345"])
    logits = (last.float()[:, None] * model.head_weight[digits]).sum(-1)  # no autocast: rank finely
    scores = (logits.softmax(-1).cpu() @ torch.arange(1.0, 6.0)).tolist()  # among the five
    return dict(zip(DIMENSIONS, scores, strict=True)) | {"mean": sum(scores) / len(scores)}


# ---------------------------------------------------------------------------------------------
# the classifier

BUCKETS = 2**17
QUALITY = "quality"  # the score that numbers teach


def features(text: str) -> torch.Tensor:
    """(n,) int64: the buckets of the words and word pairs that occur, each once."""
    ids = dedup.word_ids(text)
    grams = np.concatenate([dedup.ngram_hashes(ids, n) for n in (1, 2)]) % np.uint64(BUCKETS)
    return torch.from_numpy(np.unique(grams).astype(np.int64))


class Classifier(nn.Module):
    """Logits of a bag = bias + sum of its features' rows / sqrt(how many). Without the root, long
    documents saturate; with a mean, they say nothing."""

    def __init__(self, classes: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(BUCKETS, classes))
        self.bias = nn.Parameter(torch.zeros(classes))

    def forward(self, bags: list[torch.Tensor]):
        sizes = torch.tensor([len(bag) for bag in bags])
        return self.bias + F.embedding_bag(
            torch.cat(bags), self.weight, sizes.cumsum(0) - sizes, mode="sum",
            per_sample_weights=sizes.clamp_min(1).rsqrt().repeat_interleave(sizes))


def train(bags: list, targets: torch.Tensor, seed: int, epochs: int = 8) -> Classifier:
    """targets (n, classes): probabilities. Few epochs are the regularisation."""
    model, generator = Classifier(targets.shape[1]), rng(seed)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(epochs):
        for batch in torch.randperm(len(bags), generator=generator).split(64):
            loss = F.cross_entropy(model([bags[i] for i in batch]), targets[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model


def classify(model: Classifier, classes: list[str], text: str) -> dict[str, float]:
    probs = dict(zip(classes, model([features(text)])[0].softmax(-1).tolist(), strict=True))
    return {QUALITY: probs[QUALITY]} if QUALITY in probs else probs


def cross_validate(texts: list[str], bags: list, targets: torch.Tensor, folds: int, seed: int):
    """(n, classes) probabilities, each by a model that saw neither the text nor a near-duplicate:
    these fall into one fold together."""
    near = dedup.NearDuplicates()
    first = [near.find(text)[0] for text in texts]
    group = [i if j < 0 else j for i, j in enumerate(first)]
    fold = torch.randperm(len(texts), generator=rng(seed, 1))[group] % folds
    probs = torch.zeros_like(targets)
    for k in range(folds):
        seen, new = ((fold != k).nonzero().flatten(), (fold == k).nonzero().flatten())
        if len(new):
            model = train([bags[i] for i in seen], targets[seen], seed)
            probs[new] = model([bags[i] for i in new]).detach().softmax(-1)
    return probs


def auc(scores, labels) -> float:
    """The probability that a good document outscores a bad one; ties count half."""
    scores, good = np.asarray(scores), np.asarray(labels, dtype=bool)
    gap = scores[good][:, None] - scores[~good]
    return float((gap > 0).mean() + (gap == 0).mean() / 2)


def best(scores, sizes, keep: float) -> np.ndarray:
    """(n,) bool: the documents of highest score that hold a share `keep` of all the text. By
    documents, a score that likes long ones would hardly drop anything."""
    order = np.argsort(-np.asarray(scores), kind="stable")
    kept = np.zeros(len(order), dtype=bool)
    kept[order] = np.cumsum(np.asarray(sizes)[order]) <= keep * np.sum(sizes)
    return kept


def read_labels(path: str, field: str) -> tuple[list[str], torch.Tensor, list[str]]:
    """-> texts, targets (n, classes), names of the classes. Numbers become probabilities of "low"
    and "quality" by their place between the least and the greatest."""
    rows = []
    for number, row in read_jsonl(path):
        row = row | row.get("scores", {})  # a judge's, of another run
        good = isinstance(row.get("text"), str) and isinstance(row.get(field), (int, float, str))
        require(good, f'{path}:{number}: want a "text" and a number or a name under "{field}"')
        rows.append((row["text"], row[field]))
    texts, labels = zip(*rows, strict=True) if rows else ((), ())
    named = {isinstance(label, str) for label in labels}
    require(len(named) == 1 and len(set(labels)) > 1,
            f'{path}: want numbers only or names only under "{field}", and more than one of them')
    if named == {True}:
        classes = sorted(set(labels))
        return texts, torch.eye(len(classes))[[classes.index(x) for x in labels]], classes
    high = (torch.tensor(labels).float() - min(labels)) / (max(labels) - min(labels))
    return texts, torch.stack((1 - high, high), 1), ["low", QUALITY]


def agreement(probs, targets, classes) -> dict:
    """How the held-out folds agree with the labels."""
    right = probs.argmax(-1) == targets.argmax(-1)
    more = {"auc": auc(probs[:, 1], targets[:, 1] > 0.5)} if QUALITY in classes else {}
    return {"documents": len(targets), "agreement": right.float().mean().item(), **more}


# ---------------------------------------------------------------------------------------------
# synthetic data

def generated(args: Args, device, autocast):
    """Yields documents: --policy answers questions of the split that pre-training documents are
    made of, what fails its check goes (report 3.1 and 4.1), and of a question's passing answers
    the one with the highest reward stays; last, the share --keep of highest reward."""
    policy, tokenizer = load_policy(args.policy, device)
    queries = tasks.queries.builtin("sft", args.generate, args.seed)
    with autocast:
        groups = rollout(
            policy,
            tokenizer,
            queries,
            args.responses,
            128,
            seed=args.seed,
            score=tasks.queries.score_many,
        )
    passed = [a for group in groups for a in {a.text: a for a in group if a.score == 1}.values()]
    total = args.generate * args.responses
    print(f"  {len(passed)} different answers of {total} pass their check")
    rewards = [0.0] * len(passed)
    if args.reward_model and passed:
        scorer = RewardModel.from_pretrained(args.reward_model, device=device)
        with autocast:
            rewards = scorer.score([a.query["prompt"] for a in passed], [a.text for a in passed])
        best = {a.query["prompt"]: (r, a) for r, a in sorted(
            zip(rewards, passed, strict=True), key=lambda pair: pair[0])}
        ranked = sorted(best.values(), key=lambda pair: -pair[0])
        rewards, passed = zip(*ranked[:round(args.keep * len(ranked))], strict=True)
    for i, (reward, a) in enumerate(zip(rewards, passed, strict=True)):
        yield {
            "text": tasks.queries.FORMS[i % len(tasks.queries.FORMS)].format(
                a.query["prompt"], a.text
            ),
            "source": f"generated_{a.query['domain']}",
            "kind": "synthetic",
            "scores": {"reward": reward},
        }


# ---------------------------------------------------------------------------------------------

def main(args: Args) -> dict:
    device, autocast = setup(args)
    positive(args, "folds", "judge_tokens", "keep", "responses")
    require(args.labels or args.judge or args.generate, "want --labels, --judge or --generate")
    out = documents.new_directory(args.out, args.overwrite)
    report, scorers, classes = {"args": asdict(args)}, [], []
    if args.generate:
        report["sources"] = documents.write_sources(out, generated(args, device, autocast))
    if args.judge:
        model, tokenizer = load_policy(args.judge, device)

        def by_judge(text):
            with autocast:
                return judge(model, tokenizer, text, args.judge_tokens)
        scorers.append(by_judge)
    if args.labels:
        texts, targets, classes = read_labels(args.labels, args.label)
        bags = [features(text) for text in texts]
        probs = cross_validate(texts, bags, targets, args.folds, args.seed)
        report["classifier"] = agreement(probs, targets, classes)
        print(f"classifier, {args.folds} folds: {report['classifier']}")
        classifier = train(bags, targets, args.seed)
        scorers.append(lambda text: classify(classifier, classes, text))
    if args.judge and QUALITY in classes:
        rows = [by_judge(text) for text in tqdm(texts, "judge", disable=None)]
        report["judge"] = {name: auc([row[name] for row in rows], targets[:, 1] > 0.5)
                           for name in rows[0]}
        print(f"judge, AUC: {report['judge']}")
    if args.data:
        # Two passes: what is kept depends on all scores, and documents need not fit in memory.
        rows, sizes = [], []
        for doc in tqdm(documents.read_all(args.data), "scores", disable=None):
            rows.append({k: v for scorer in scorers for k, v in scorer(doc["text"]).items()})
            sizes.append(len(doc["text"]))
        keep = best([row.get(QUALITY, row.get("mean", 0.0)) for row in rows], sizes, args.keep)

        def kept():
            for doc, row, good in zip(documents.read_all(args.data), rows, keep, strict=True):
                if good:
                    domain = max(classes, key=row.get) if classes and QUALITY not in row else None
                    yield doc | {"source": domain or doc["source"], "scores": row}
        report["sources"] = documents.write_sources(out, kept())
    write_atomic(out / "report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    print(f"quality: {out} ready: {report.get('sources', {})}")
    return report


if __name__ == "__main__":
    cli(main, Args)
