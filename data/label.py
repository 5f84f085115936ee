"""Review of preference pairs by people (report sections 4.2 and 4.3).

A person judges pairs in the terminal, blind: the automatic label is not shown, and the two answers
stand in a random order. Each label is written after Enter, and a second start continues where the
first one stopped.

    python -m data.label --pairs runs/dpo/pairs.jsonl --out ada.jsonl  # one file per person
    python -m data.label --pairs runs/dpo/pairs.jsonl --report ada.jsonl,bob.jsonl --write out.jsonl

The second command reports how often people agree with the automatic labels and, by Cohen's kappa,
with each other. --write also writes the pairs as the majority sees them, for `dpo.py --data` and
`reward.py --pairs`. The criteria are the report's six for reward labels. It does not disclose how
its people weighed them: here a person gives the verdict, and may note criteria beside it.
"""
import hashlib
import json
import os
import sys
import unicodedata
from collections import Counter
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from data.pairs import read_pairs
from lib.args import cli, require
from lib.files import disk_errors, read_jsonl, write_jsonl

CRITERIA = {"t": "truthfulness", "h": "helpfulness", "c": "conciseness", "r": "relevance",
            "s": "harmlessness", "d": "debiasing"}
HELP = """A or B is the better one: a, b. Equally good: =   Neither should be learned from: x
Before that you may note criteria: small letter, A is better by it; capital, B is
  truthful t/T  helpful h/H  concise c/C  relevant r/R  harmless (safe) s/S  unbiased d/D
one pair back: u   stop: q"""


@dataclass
class Args:
    pairs: str = "runs/dpo/pairs.jsonl"  # preference pairs (JSONL)
    out: str = "labels.jsonl"        # where labels go, one file per person
    report: str = ""                 # label files joined by commas: compare them instead
    write: str = ""                  # with --report: the pairs as most people see them (JSONL)
    seed: int = 0                    # with --out: of the order, and of which answer is A


def draw(seed, pair: str) -> int:
    """Return a number that looks random but is always the same for this seed and pair."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {pair}".encode(), digest_size=6).digest(), "big")


def by_id(path: str) -> dict[str, dict]:
    """Return the pairs by a hash of their text: labels survive another order of the file."""
    pairs = {}
    for pair in read_pairs(path):
        said = json.dumps([pair["prompt"], pair["chosen"], pair["rejected"]], sort_keys=True)
        name = hashlib.blake2b(said.encode(), digest_size=8).hexdigest()
        pairs[name] = pair
    return pairs


# ---------------------------------------------------------------------------------------------
# a session

def text_of(side) -> str:
    """Return a text, or messages, for a terminal. Control characters could move its cursor or
    colour it, so they become U+FFFD."""
    if not isinstance(side, str):
        side = "\n".join(f"{message['role']}: {message['content'] or message['tool_calls']}"
                         for message in side)
    shown = []
    for character in side:
        control = unicodedata.category(character)[0] == "C" and character not in "\n\t"
        shown.append("\ufffd" if control else character)
    return "".join(shown)


def letters():
    """Yield the letters of each line that is typed: `ha` notes a criterion, then judges."""
    for line in sys.stdin:
        yield from line.strip()


def judge(keys, a: str, b: str) -> dict:
    """Read letters up to a verdict. `a` and `b` say which of the pair, "chosen" or "rejected", is A
    and B; the verdict and the noted criteria are in these terms."""
    verdicts = {"a": a, "b": b, "=": "tie", "x": "skip", "u": "undo", "q": "quit"}
    noted = {}
    for key in keys:
        if key in verdicts:
            return {"verdict": verdicts[key], "criteria": noted}
        if key.lower() in CRITERIA:
            noted[CRITERIA[key.lower()]] = a if key.islower() else b
    return {"verdict": "quit"}


def labelled_pairs(path: Path) -> set[str]:
    """Return the pairs that a label file holds, after cutting off half a last line: what a full
    disk or a crash leaves. Creates the file."""
    with disk_errors(path):
        path.touch()
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    return {row.get("pair") for _, row in read_jsonl(path)}


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
    keys = letters()
    at = 0
    while at < len(todo):
        name = todo[at]
        pair = pairs[name]
        a, b = ("chosen", "rejected") if draw(seed, name) % 2 else ("rejected", "chosen")
        print(f"\n---- question {at + 1} of {len(todo)} ----\n{text_of(pair['prompt'])}")
        print(f"\n---- A ----\n{text_of(pair[a])}")
        print(f"\n---- B ----\n{text_of(pair[b])}")
        print("\na b = x u q, then Enter > ", end="", flush=True)
        row = judge(keys, a, b)
        if row["verdict"] == "quit":
            break
        if row["verdict"] == "undo":
            at = max(0, at - 1)
            continue
        append_label(path, {"pair": name, "a": a} | row)
        at += 1
    print(f"pairs left: {len(todo) - at}; labels are in {path}")


# ---------------------------------------------------------------------------------------------
# the report

def kappa(first: list, second: list) -> float:
    """Return Cohen's kappa: agreement beyond chance, (p_o - p_e) / (1 - p_e). Here p_e is how often
    two people would agree who answer at random, but each answer as often as these two."""
    n = len(first)
    observed = sum(x == y for x, y in zip(first, second, strict=True)) / n
    a = Counter(first)
    b = Counter(second)
    expected = sum(a[answer] * b[answer] for answer in a) / n**2
    return (observed - expected) / (1 - expected) if expected < 1 else 1.0


def share(hits, n: int) -> str:
    return f"{100 * hits / n:.1f}% of {n}" if n else "none"


def report(args: Args) -> None:
    """Print how people agree with the label and with each other; --write what they agree on."""
    pairs = by_id(args.pairs)
    people = {}  # label file -> {pair: label}
    for path in args.report.split(","):
        labels = {row["pair"]: row for _, row in read_jsonl(path) if row.get("pair") in pairs}
        require(len(labels) > 0, f"{path}: no label of a pair in {args.pairs}")
        people[path] = labels  # the last line on a pair counts
    for path, labels in people.items():
        report_person(path, list(labels.values()))
    for one, two in combinations(people, 2):
        both = sorted(people[one].keys() & people[two].keys())
        first = blind_verdicts(people[one], both)
        second = blind_verdicts(people[two], both)
        same = sum(x == y for x, y in zip(first, second, strict=True))
        beyond_chance = f", Cohen's kappa {kappa(first, second):.3f}" if both else ""
        print(f"{one} and {two}: agree in {share(same, len(both))}{beyond_chance}")
    if args.write:
        write_majority(args.write, pairs, list(people.values()))


def report_person(path: str, labels: list[dict]) -> None:
    decided = [row for row in labels if row["verdict"] in ("chosen", "rejected")]
    agree = sum(row["verdict"] == "chosen" for row in decided)
    chose_a = sum(row["verdict"] == row["a"] for row in decided)
    print(f"{path}: agrees with the automatic label in {share(agree, len(decided))}; "
          f"{len(labels) - len(decided)} ties or skipped; "
          f"A preferred in {share(chose_a, len(decided))}")
    for name in CRITERIA.values():
        noted = [row["criteria"][name] for row in labels if name in row["criteria"]]
        if noted:
            print(f"  by {name}: with the label in {share(noted.count('chosen'), len(noted))}")


def blind_verdicts(labels: dict[str, dict], names: list[str]) -> list[str]:
    """Return the verdicts on these pairs, with half of the pairs turned round. Else a good
    automatic label, which nobody sees, would make most verdicts "chosen" and so raise p_e."""
    turned = {"chosen": "rejected", "rejected": "chosen"}
    verdicts = []
    for name in names:
        verdict = labels[name]["verdict"]
        turn = draw("kappa", name) % 2
        verdicts.append(turned.get(verdict, verdict) if turn else verdict)
    return verdicts


def majority(verdicts: list[str]) -> str:
    """Return the most frequent verdict, "drawn" if there are two, or "not judged"."""
    ranked = Counter(verdicts).most_common(2)
    if not ranked:
        return "not judged"
    if len(ranked) == 2 and ranked[0][1] == ranked[1][1]:
        return "drawn"
    return ranked[0][0]


def write_majority(path: str, pairs: dict[str, dict], people: list[dict]) -> None:
    """Write the pairs as most people see them. What nobody judged stays as it was; a tie, a draw
    and what most would skip is left out."""
    out = []
    counts = Counter()
    for name, pair in pairs.items():
        verdict = majority([labels[name]["verdict"] for labels in people if name in labels])
        counts[verdict] += 1
        if verdict == "rejected":
            pair = pair | {"chosen": pair["rejected"], "rejected": pair["chosen"]}
        if verdict in ("chosen", "rejected", "not judged"):
            out.append(pair)
    write_jsonl(path, out)
    summary = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    print(f"{path}: {len(out)} of {len(pairs)} pairs; {summary}")


def main(args: Args) -> None:
    if args.report:
        report(args)
    else:
        label(args)


if __name__ == "__main__":
    cli(main, Args)
