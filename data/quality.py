"""Models that judge pre-training data: which documents are good, which domain they belong to, and
which generated answers to believe (report section 3.1).

The report scores every document with Qwen2-Instruct models along several dimensions, balances the
domains that such models tell apart, and filters synthetic data with reward models. Its prompts,
dimensions and thresholds are not disclosed; ours are our choice. There are two scorers:

  judge       A chat model scores each document from 1 to 5 by four criteria (data/judge.py).
  classifier  Softmax regression on hashed word 1- and 2-grams, trained in seconds: the cheap
              stand-in. From numbers (people's verdicts, or a judge's scores of a sample) it learns
              what is good, from names which domain is which.

    python -m data.quality --labels web_labels.jsonl                    # cross-validated AUC
    python -m data.quality --labels web_labels.jsonl --data runs/data --keep 0.5 --out runs/good
    python -m data.quality --labels domains.jsonl --label domain --data runs/good --out runs/dom
    python -m data.quality --judge runs/demo/grpo --data runs/data --out runs/judged
    python -m data.quality --judge_url http://localhost:8000/v1 --labels web_labels.jsonl
    python -m data.quality --generate 1000 --policy runs/demo/grpo --reward_model runs/rm ...

--out gets report.json and one .jsonl per source, each document with its "scores". With domain names
as labels it gets one .jsonl per domain, and the weights of pretrain.py sample domains down and up.
"""
import json
from dataclasses import asdict, dataclass
from itertools import cycle

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import tasks.queries
from data import dedup
from data import documents
from data.judge import Judge
from lib.args import cli, positive, require
from lib.files import read_jsonl, write_atomic
from lib.optim import rng, setup
from reward import RewardModel
from sample import load_policy
from tasks.__main__ import rejection_sample


@dataclass
class Args:
    out: str = "runs/quality"        # directory for {source}.jsonl and report.json
    data: str = ""                   # documents to score: directory or files, comma-separated
    labels: str = ""                 # .jsonl of labelled texts: train the classifier on them
    label: str = "label"             # their field: numbers (more is better) or names (domains)
    judge: str = ""                  # model directory that scores documents, or a server's model
    judge_url: str = ""              # server of OpenAI's chat protocol, http://HOST:PORT/v1
    judge_chars: int = 2000          # characters of a document that the judge reads
    keep: float = 1.0                # share of the text to keep, the best first
    generate: int = 0                # questions that --policy answers; instead of all the above
    policy: str = ""                 # chat model that answers them
    responses: int = 4               # answers per question
    allow_unsafe_code: bool = False  # judge code although the sandbox lacks layers of isolation
    reward_model: str = ""           # orders the answers that pass their check; empty: all stay
    seed: int = 0                    # of the folds, training and sampling
    device: str = "auto"             # auto, cpu, cuda[:N]
    dtype: str = "auto"              # auto, float32, bfloat16
    overwrite: bool = False          # replace what --out holds


# ---------------------------------------------------------------------------------------------
# the classifier

BUCKETS = 2**17
FOLDS = 5            # of the cross-validation on --labels
EPOCHS = 8           # so few are the only regularisation
QUALITY = "quality"  # the class, and the score, that numbers teach


def read_labels(path: str, field: str) -> tuple[list[str], torch.Tensor, list[str]]:
    """Return texts, targets (n, classes) and class names. A name becomes a class. A number becomes
    the probability of "quality" against "low", by its place between the least and the greatest."""
    texts = []
    labels = []
    for number, row in read_jsonl(path):
        scores = row.get("scores")  # written by an earlier run with a judge
        if isinstance(scores, dict):
            row = row | scores
        text = row.get("text")
        label = row.get(field)
        require(isinstance(text, str) and isinstance(label, (int, float, str)),
                f'{path}:{number}: must have a "text" and a number or a name under "{field}"')
        texts.append(text)
        labels.append(label)
    names = [label for label in labels if isinstance(label, str)]
    require(len(names) in (0, len(labels)) and len(set(labels)) > 1,
            f'{path}: "{field}" must hold numbers only or names only, and more than one of them')
    if names:
        classes = sorted(set(names))
        numbers = [classes.index(name) for name in names]
        return texts, torch.eye(len(classes))[numbers], classes
    high = torch.tensor(labels).float()
    high = (high - high.min()) / (high.max() - high.min())
    return texts, torch.stack((1 - high, high), 1), ["low", QUALITY]


def features(text: str) -> torch.Tensor:
    """Return the bag of a text: (n,) int64, the buckets of its words and word pairs, each once."""
    ids = dedup.word_ids(text)
    words = dedup.ngram_hashes(ids, 1)
    pairs = dedup.ngram_hashes(ids, 2)
    buckets = np.concatenate([words, pairs]) % np.uint64(BUCKETS)
    return torch.from_numpy(np.unique(buckets).astype(np.int64))


class Classifier(nn.Module):
    """Logits of a bag = bias + the sum of its features' rows / sqrt(number of features). Without
    the root, long documents saturate; with a mean, they say nothing."""

    def __init__(self, classes: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(BUCKETS, classes))
        self.bias = nn.Parameter(torch.zeros(classes))

    def forward(self, bags: list[torch.Tensor]):
        rows = F.embedding(torch.cat(bags), self.weight)
        sums = []
        for some in rows.split([len(bag) for bag in bags]):
            sums.append(some.sum(0) / max(1, len(some)) ** 0.5)
        return self.bias + torch.stack(sums)


def train(bags: list, targets: torch.Tensor, seed: int) -> Classifier:
    """Fit a classifier to targets, (n, classes) probabilities."""
    model = Classifier(targets.shape[1])
    generator = rng(seed)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(bags), generator=generator).split(64):
            logits = model([bags[i] for i in batch])
            loss = F.cross_entropy(logits, targets[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model


def classify(model: Classifier, classes: list[str], text: str) -> dict[str, float]:
    """Return the probability of each domain, or of "quality" alone."""
    logits = model([features(text)])[0]
    scores = dict(zip(classes, logits.softmax(-1).tolist(), strict=True))
    return {QUALITY: scores[QUALITY]} if QUALITY in scores else scores


def cross_validate(bags: list, targets: torch.Tensor, folds: int, seed: int) -> torch.Tensor:
    """Return (n, classes) probabilities, each by a model that has not seen the text. The texts
    should be without near-duplicates, as those that `python -m data` writes are."""
    fold = torch.randperm(len(bags), generator=rng(seed, 1)) % folds
    probs = torch.zeros_like(targets)
    for k in range(folds):
        seen = (fold != k).nonzero().flatten()
        new = (fold == k).nonzero().flatten()
        if len(new):
            model = train([bags[i] for i in seen], targets[seen], seed)
            logits = model([bags[i] for i in new])
            probs[new] = logits.detach().softmax(-1)
    return probs


def auc(scores, labels) -> float:
    """Return the probability that a good document outscores a bad one; ties count half."""
    scores = np.asarray(scores)
    good = np.asarray(labels, dtype=bool)
    _, place, count = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (count.cumsum() - (count - 1) / 2)[place]  # from 1; equal scores share their mean
    n_good = good.sum()
    wins = ranks[good].sum() - n_good * (n_good + 1) / 2
    return float(wins / (n_good * (len(good) - n_good)))


def agreement(probs, targets, classes) -> dict:
    """Return how well the held-out predictions agree with the labels."""
    right = probs.argmax(-1) == targets.argmax(-1)
    result = {"documents": len(targets), "agreement": right.float().mean().item()}
    if QUALITY in classes:
        result["auc"] = auc(probs[:, 1], targets[:, 1] > 0.5)
    return result


# ---------------------------------------------------------------------------------------------
# what is kept

def best(scores, sizes, keep: float) -> np.ndarray:
    """Select the documents of highest score that hold a share `keep` of all the text: (n,) bool.
    The one in which the share is reached is the last. By number of documents, a score that prefers
    long ones would hardly drop anything."""
    order = np.argsort(-np.asarray(scores), kind="stable")
    sizes = np.maximum(sizes, 1)[order]  # so that with keep=1 empty documents stay
    text_before = sizes.cumsum() - sizes
    kept = np.zeros(len(order), dtype=bool)
    kept[order] = text_before < keep * sizes.sum()
    return kept


def best_documents(args: Args, scorers: list, classes: list[str], autocast):
    """Yield the documents of --data to keep, with their scores. If the classes are domains, the
    most probable one becomes the source. What is kept depends on all scores, and documents need
    not fit in memory, so --data is read twice."""
    rows = []
    sizes = []
    with autocast:
        for document in tqdm(documents.read_all(args.data), "scores", disable=None):
            scores = {}
            for scorer in scorers:
                scores |= scorer(document["text"])
            rows.append(scores)
            sizes.append(len(document["text"]))
    ranks = [scores.get(QUALITY, scores.get("mean", 0.0)) for scores in rows]
    kept = best(ranks, sizes, args.keep)
    for document, scores, good in zip(documents.read_all(args.data), rows, kept, strict=True):
        if good:
            if classes and QUALITY not in classes:
                domain = max(classes, key=scores.get)
                document["source"] = documents.as_source(domain)
            yield document | {"scores": scores}


# ---------------------------------------------------------------------------------------------
# synthetic data

def generated(args: Args, device, autocast):
    """Yield documents made of what --policy answers to questions of the split that pre-training
    documents are made of, if it passes its check (report sections 3.1 and 4.1). With
    --reward_model, only the best answer to each question stays, and of these the share --keep."""
    policy, tokenizer = load_policy(args.policy, device)
    queries = tasks.queries.builtin("sft", args.generate, args.seed)
    tasks.queries.require_isolation(queries, args.allow_unsafe_code)
    domains = {query["prompt"]: query["domain"] for query in queries}
    with autocast:
        rows = rejection_sample(policy, tokenizer, queries, args.responses, 128, args.seed)
    print(f"  {len(rows)} different answers of {len(queries)} x {args.responses} pass their check")
    prompts = [row["messages"][0]["content"] for row in rows]
    answers = [row["messages"][1]["content"] for row in rows]
    rewards = [0.0] * len(rows)
    chosen = range(len(rows))
    if args.reward_model and rows:
        scorer = RewardModel.from_pretrained(args.reward_model, device=device)
        with autocast:
            rewards = scorer.score(prompts, answers)
        best = {}
        for i in sorted(chosen, key=rewards.__getitem__):
            best[prompts[i]] = i  # the later one has the higher reward
        chosen = sorted(best.values(), key=rewards.__getitem__, reverse=True)
        chosen = chosen[:max(1, round(args.keep * len(chosen)))]
    for i, form in zip(chosen, cycle(tasks.queries.FORMS), strict=False):
        yield {"text": form.format(prompts[i], answers[i]), "kind": "synthetic",
               "source": f"generated_{domains[prompts[i]]}", "scores": {"reward": rewards[i]}}


# ---------------------------------------------------------------------------------------------

def main(args: Args) -> dict:
    device, autocast = setup(args)
    positive(args, "judge_chars", "keep", "responses")
    judged = args.judge or args.judge_url
    require(args.labels or judged or args.generate, "pass --labels, --judge or --generate")
    require(not args.generate or not (args.labels or judged or args.data),
            "--generate makes documents: pass it without --data, --labels and --judge")
    require(not args.generate or args.keep == 1 or args.reward_model,
            "--generate with --keep needs --reward_model, which says what is best")
    require(args.generate or args.labels or args.data,
            "--judge has nothing to score: pass --data or --labels")
    out = documents.new_directory(args.out, args.overwrite, args.data, args.labels)
    report = {"args": asdict(args)}
    scorers = []
    classes = []
    if args.generate:
        report["sources"] = documents.write_sources(out, generated(args, device, autocast))
    if judged:
        judge = Judge(args.judge, args.judge_url, device, args.judge_chars)
        scorers.append(judge.score_document)
    if args.labels:
        texts, targets, classes = read_labels(args.labels, args.label)
        require(args.keep == 1 or judged or QUALITY in classes,
                f'--keep needs scores to go by, but "{args.label}" holds names: pass --judge')
        bags = [features(text) for text in texts]
        probs = cross_validate(bags, targets, FOLDS, args.seed)
        report["classifier"] = agreement(probs, targets, classes)
        print(f"classifier, {FOLDS} folds: {report['classifier']}")
        classifier = train(bags, targets, args.seed)
        scorers.append(lambda text: classify(classifier, classes, text))
    if judged and QUALITY in classes:
        with autocast:
            rows = [judge.score_document(text) for text in tqdm(texts, "judge", disable=None)]
        good = targets[:, 1] > 0.5
        report["judge"] = {name: auc([row[name] for row in rows], good) for name in rows[0]}
        print(f"judge, AUC: {report['judge']}")
    if args.data:
        kept = best_documents(args, scorers, classes, autocast)
        report["sources"] = documents.write_sources(out, kept)
        require(len(report["sources"]) > 0, f"--data {args.data} holds no document")
    write_atomic(out / "report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    print(f"quality: {out} ready: {report.get('sources', {})}")
    return report


if __name__ == "__main__":
    cli(main, Args)
