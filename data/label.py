"""Labels of preference pairs by people and by a judge (report sections 4.2 and 4.3).

A person judges pairs in the terminal, blind: the automatic label is not shown, and the two answers
stand in a random order. Each label is written after Enter, and a second start continues where the
first one stopped. A judge (data/judge.py) scores both answers by the report's six criteria.

    python -m data.label --pairs runs/dpo/pairs.jsonl --out ada.jsonl  # one file per person
    python -m data.label --pairs runs/dpo/pairs.jsonl --out judge.jsonl --judge runs/demo/grpo
    python -m data.label --pairs runs/dpo/pairs.jsonl --report ada.jsonl,bob.jsonl --write out.jsonl

The last command reports how often people agree with the automatic labels and with each other.
--write adds their labels to the pairs, for `dpo.py --data` and `reward.py --pairs` (--weights). The
report does not disclose how its people weighed the six criteria: here a person gives a verdict,
"overall", and may note criteria beside it.
"""
import hashlib
import json
import os
import sys
from collections import defaultdict
from dataclasses import dataclass
from itertools import chain, combinations
from pathlib import Path

from tqdm import tqdm

from data.judge import Judge
from data.pairs import CRITERIA, PairFile
from lib.args import cli, require
from lib.files import as_row, disk_errors, parse_json, read_jsonl, write_jsonl
from lib.optim import setup

LETTERS = dict(zip("thcrsd", CRITERIA, strict=True))
VOTES = {"chosen": 1.0, "tie": 0.5, "rejected": 0.0}
VERDICTS = (*VOTES, "skip")
TIE = 0.05  # points between two scores of a judge; our choice
HELP = """A or B is the better one: a, b. Equally good: =   Neither should be learned from: x
Before that you may note criteria: small letter, A is better by it; capital, B is
  truthful t/T  helpful h/H  concise c/C  relevant r/R  harmless (safe) s/S  unbiased d/D
stop: q"""


@dataclass
class Args:
    pairs: str = "runs/dpo/pairs.jsonl"  # preference pairs (JSONL)
    out: str = "labels.jsonl"        # where labels go, one file per person
    report: str = ""                 # label files joined by commas: compare them instead
    write: str = ""                  # with --report: the pairs as most people see them (JSONL)
    judge: str = ""                  # model that labels in place of a person: its directory ...
    judge_url: str = ""              # ... or its name on this server, http://HOST:PORT/v1
    seed: int = 0                    # with --out: of the order, and of which answer is A
    device: str = "auto"             # of the judge: auto, cpu, cuda[:N]
    dtype: str = "auto"              # of the judge: auto, float32, bfloat16


def draw(seed, pair: str) -> int:
    """Return a number that looks random but is always the same for this seed and pair."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {pair}".encode(), digest_size=6).digest(), "big")


def by_id(path: str) -> dict[str, dict]:
    """Return the pairs by a hash of their text: labels survive another order of the file."""
    pairs = {}
    for pair in PairFile(path):
        parts = [pair["prompt"], pair["chosen"], pair["rejected"]]
        if pair.get("tools"):
            parts.append(pair["tools"])
        said = json.dumps(parts, sort_keys=True)
        name = hashlib.blake2b(said.encode(), digest_size=8).hexdigest()
        pairs[name] = pair
    return pairs


# ---------------------------------------------------------------------------------------------
# a session

def text_of(prompt) -> str:
    """Return a text, or messages as one text. `cli` makes control characters visible."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message.get('content') or message.get('tool_calls', '')}"
                     for message in prompt)


def judge(lines, a: str, b: str) -> dict:
    """Read letters up to a verdict: `ha` notes a criterion, then judges. The rest of the line is
    not read: it would judge the next pair, which nobody has seen yet. `a` and `b` say which of the
    pair, "chosen" or "rejected", is A and B; the label is in these terms."""
    verdicts = {"a": a, "b": b, "=": "tie", "x": "skip", "q": "quit"}
    noted = {}
    for key in chain.from_iterable(lines):
        if key in verdicts:
            return {"verdict": verdicts[key], "criteria": noted}
        if key.lower() in LETTERS:
            noted[LETTERS[key.lower()]] = a if key.islower() else b
    return {"verdict": "quit"}


def labelled_pairs(path: Path) -> set[str]:
    """Return the pairs that a label file holds, after cutting off half a last line: what a full
    disk or a crash leaves. Creates the file. A file of anything else is refused and not touched."""
    with disk_errors(path):
        path.touch()
        lines = path.read_bytes().split(b"\n")
    torn = lines.pop()
    found = set()
    for number, line in enumerate(lines, start=1):
        if line.strip():
            row = as_row(parse_json(line, path, number), path, number)
            require(isinstance(row.get("pair"), str), f'{path}:{number}: no label: no "pair"')
            found.add(row["pair"])
    if torn:
        start = b'{"pair"'
        require(torn[:len(start)] == start[:len(torn)],
                f"--out {path}: its last line is not the beginning of a label")
        with disk_errors(path):
            os.truncate(path, path.stat().st_size - len(torn))
    return found


def append_label(path: Path, row: dict) -> None:
    with disk_errors(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def label(args: Args) -> None:
    """Show each pair that has no label yet, and append what the person types."""
    pairs = by_id(args.pairs)
    path = Path(args.out)
    # Order and sides depend on the person's file: else two who always press A would agree.
    seed = f"{args.seed} {path.name}"
    todo = sorted(pairs.keys() - labelled_pairs(path), key=lambda name: draw(seed, name))
    print(f"{len(pairs) - len(todo)} of {len(pairs)} pairs are labelled in {path}\n{HELP}")
    while todo:
        name = todo[0]
        pair = pairs[name]
        a, b = ("chosen", "rejected") if draw(seed, name) % 2 else ("rejected", "chosen")
        print(f"\n---- question, {len(todo)} left ----\n{text_of(pair['prompt'])}")
        print(f"\n---- A ----\n{pair[a]}\n\n---- B ----\n{pair[b]}")
        print("\na b = x q, then Enter > ", end="", flush=True)
        row = judge(sys.stdin, a, b)
        if row["verdict"] == "quit":
            break
        append_label(path, {"pair": name, "a": a} | row)
        todo.pop(0)
    print(f"pairs left: {len(todo)}; labels are in {path}")


def label_by_judge(args: Args) -> None:
    """Append a judge's label of each pair that has none."""
    pairs = by_id(args.pairs)
    path = Path(args.out)
    device, autocast = setup(args)
    scorer = Judge(args.judge, args.judge_url, device)
    for name in tqdm(sorted(pairs.keys() - labelled_pairs(path)), "judge", disable=None):
        pair = pairs[name]
        question = text_of(pair["prompt"])
        with autocast:
            chosen = scorer.score_answer(question, pair["chosen"])
            rejected = scorer.score_answer(question, pair["rejected"])
        append_label(path, {"pair": name} | compare(chosen, rejected))


def compare(chosen: dict[str, float], rejected: dict[str, float]) -> dict:
    """Return a judge's label: the better answer by each criterion and, as its verdict, by the mean
    of the six scores (our choice). Gaps below TIE are ties."""
    criteria = {name: verdict(chosen[name] - rejected[name]) for name in CRITERIA}
    gap = (sum(chosen.values()) - sum(rejected.values())) / len(CRITERIA)
    return {"verdict": verdict(gap), "criteria": criteria}


def verdict(gap: float) -> str:
    if abs(gap) < TIE:
        return "tie"
    return "chosen" if gap > 0 else "rejected"


# ---------------------------------------------------------------------------------------------
# the report

def report(args: Args) -> None:
    """Print how people agree with the label and with each other; --write their labels."""
    pairs = by_id(args.pairs)
    people = {}  # label file -> {pair: label}
    for path in args.report.split(","):
        labels = read_labels(path, pairs)
        require(len(labels) > 0, f"{path}: no label of a pair in {args.pairs}")
        people[path] = labels
        report_person(path, list(labels.values()))
    for one, two in combinations(people, 2):
        same = [people[one][name]["verdict"] == people[two][name]["verdict"]
                for name in people[one] if name in people[two]]
        print(f"{one} and {two}: agree in {share(same)}")
    if args.write:
        write_labels(args.write, pairs, list(people.values()))


def read_labels(path: str, pairs: dict[str, dict]) -> dict[str, dict]:
    """Return {pair: label} of the pairs that are known; the last line on a pair counts."""
    labels = {}
    for line, row in read_jsonl(path):
        name = str(row.get("pair"))
        if name in pairs:
            criteria = row.get("criteria")
            require(row.get("verdict") in VERDICTS and isinstance(criteria, dict)
                    and all(value in VERDICTS for value in criteria.values()),
                    f'{path}:{line}: a label must have a "verdict" and "criteria", and each must '
                    f"be one of {', '.join(VERDICTS)}")
            labels[name] = row
    return labels


def share(hits: list[bool]) -> str:
    return f"{100 * sum(hits) / len(hits):.1f}% of {len(hits)}" if hits else "none"


def report_person(path: str, labels: list[dict]) -> None:
    decided = [row for row in labels if row["verdict"] in ("chosen", "rejected")]
    agree = [row["verdict"] == "chosen" for row in decided]
    chose_a = [row["verdict"] == row["a"] for row in decided if "a" in row]  # a judge sees no sides
    print(f"{path}: agrees with the automatic label in {share(agree)}; "
          f"{len(labels) - len(decided)} ties or skipped; A preferred in {share(chose_a)}")
    for name in CRITERIA:
        noted = [row["criteria"].get(name) for row in labels]
        agree = [verdict == "chosen" for verdict in noted if verdict in ("chosen", "rejected")]
        if agree:
            print(f"  by {name}: with the label in {share(agree)}")


def write_labels(path: str, pairs: dict[str, dict], people: list[dict]) -> None:
    """Write the pairs with their `mean_votes` as "criteria", which become soft labels in training.

    Where most prefer the rejected answer, the two change places. A pair that nobody judged stays as
    it was; one that half of the people would skip is left out."""
    out = []
    for name, pair in pairs.items():
        labels = [one[name] for one in people if name in one]
        skips = sum(row["verdict"] not in VOTES for row in labels)
        if not labels:
            out.append(pair)
        elif 2 * skips < len(labels):
            votes = mean_votes(labels)
            if votes["overall"] < 0.5:
                pair = pair | {"chosen": pair["rejected"], "rejected": pair["chosen"]}
                votes = {criterion: 1 - vote for criterion, vote in votes.items()}
            out.append(pair | {"criteria": votes})
    write_jsonl(path, out)
    print(f"{path}: {len(out)} of {len(pairs)} pairs")


def mean_votes(labels: list[dict]) -> dict[str, float]:
    """Return, for "overall" and each noted criterion, the share of labels that prefer the chosen
    answer. A tie counts half."""
    votes = defaultdict(list)
    for row in labels:
        verdicts = row["criteria"] | {"overall": row["verdict"]}
        for name, verdict in verdicts.items():
            if verdict in VOTES:
                votes[name].append(VOTES[verdict])
    return {name: sum(some) / len(some) for name, some in votes.items()}


def main(args: Args) -> None:
    require(args.report or Path(args.out).resolve() != Path(args.pairs).resolve(),
            f"--out {args.out} is --pairs: labels need a file of their own")
    if args.report:
        report(args)
    elif args.judge or args.judge_url:
        label_by_judge(args)
    else:
        label(args)


if __name__ == "__main__":
    cli(main, Args)
