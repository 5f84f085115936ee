"""Review of preference pairs (report sections 4.2 and 4.3): by programs, and by people.

dpo.py calls `review`, which drops what nothing should be learned from. The rest of this file is a
terminal in which a person judges pairs, blind: what the automatic label says is not shown, and the
two answers stand in a random order. Labels are appended as they are typed; started again, it goes
on where it stopped.

    python -m data.label --pairs runs/dpo/pairs.jsonl --out ada.jsonl  # one file each
    python -m data.label --pairs runs/dpo/pairs.jsonl --report ada.jsonl,bob.jsonl --write out.jsonl

The second line says how far people agree with the automatic labels and, by Cohen's kappa, with each
other; with --write it also writes the pairs as the majority sees them, for `dpo.py --data` and
`reward.py --pairs`. The criteria are the report's six for reward labels; how its people weighed
them is not disclosed: here a verdict is theirs to give, and criteria are noted beside it.
"""
import hashlib
import json
import os
import sys
import time
import unicodedata
from collections import Counter
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from data.pairs import read_pairs
from lib.args import cli, require
from lib.files import read_jsonl, write_jsonl, disk_errors

CRITERIA = {"t": "truthfulness", "h": "helpfulness", "c": "conciseness", "r": "relevance",
            "s": "harmlessness", "d": "debiasing"}
HELP = """A or B is the better one: a, b. Equally good: =   Neither should be learned from: x
Before that you may note criteria: small letter, A is better by it; capital, B is
  truthful t/T  helpful h/H  concise c/C  relevant r/R  harmless (safe) s/S  unbiased d/D
one pair back: u   stop: q"""


@dataclass
class Args:
    pairs: str = "runs/dpo/pairs.jsonl"  # preference pairs (JSONL)
    out: str = "labels.jsonl"        # where labels go, one file a person
    report: str = ""                 # label files joined by commas: compare them instead
    write: str = ""                  # with --report: the pairs as most people see them (JSONL)
    seed: int = 0                    # with --out: of the order, and of which answer is A


# ---------------------------------------------------------------------------------------------
# by people

def draw(seed, pair: str) -> int:
    """A number that looks random but is always the same for this seed and pair."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {pair}".encode(), digest_size=6).digest(), "big")


def by_id(path: str) -> dict[str, dict]:
    """Pairs by a hash of what they say, so that labels survive another order of the file."""
    def name(pair):
        said = json.dumps([pair["prompt"], pair["chosen"], pair["rejected"]], sort_keys=True)
        return hashlib.blake2b(said.encode(), digest_size=8).hexdigest()
    return {name(pair): pair for pair in read_pairs(path)}


def text_of(side) -> str:
    """A text or messages, for a terminal: control characters could move its cursor or colour it."""
    if not isinstance(side, str):
        side = "\n".join(f"{m['role']}: {m['content']}" for m in side)
    return "".join("\ufffd" if unicodedata.category(c)[0] == "C" and c not in "\n\t" else c
                   for c in side)


def keystrokes():
    """Characters as they are typed; from a pipe, or on Windows, whole lines of them."""
    try:
        import termios
        import tty
    except ImportError:
        termios = None
    if termios is None or not sys.stdin.isatty():
        for line in sys.stdin:
            yield from line.strip()
        return
    settings = termios.tcgetattr(sys.stdin)
    try:
        tty.setcbreak(sys.stdin, termios.TCSADRAIN)  # keeps what was typed ahead
        while key := sys.stdin.read(1):
            yield key
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, settings)


def judge(keys, a: str, b: str) -> dict:
    """Keys up to a verdict, shown as they are typed -> the verdict, and what was noted by which
    criterion, in terms of the pair: "chosen" or "rejected", whichever is A and whichever B."""
    verdicts = {"a": a, "b": b, "=": "tie", "x": "skip", "u": "undo", "q": "quit"}
    typed, noted = "", {}
    for key in keys:
        typed += key
        print(text_of(key), end="", flush=True)
        if key in verdicts:
            return {"verdict": verdicts[key], "criteria": noted, "keys": typed}
        if key.lower() in CRITERIA:
            noted[CRITERIA[key.lower()]] = a if key.islower() else b
    return {"verdict": "quit"}


def label(args: Args) -> None:
    pairs, path = by_id(args.pairs), Path(args.out)
    with disk_errors(path):
        path.touch()
        whole = path.read_bytes()
        os.truncate(path, whole.rfind(b"\n") + 1)  # half a line, of a full disk or a lost machine
    done = {row.get("pair") for _, row in read_jsonl(path)}
    # Each person's own order and sides: with the same ones, two who always press A would agree.
    seed = f"{args.seed} {path.name}"
    todo = sorted(pairs.keys() - done, key=lambda pair: draw(seed, pair))
    print(f"{len(pairs) - len(todo)} of {len(pairs)} pairs are labelled in {path}\n{HELP}")
    keys, at = keystrokes(), 0
    while at < len(todo):
        pair, started = pairs[todo[at]], time.time()
        a, b = ("chosen", "rejected") if draw(seed, todo[at]) % 2 else ("rejected", "chosen")
        for name, side in ((f"question {at + 1} of {len(todo)}", "prompt"), ("A", a), ("B", b)):
            print(f"\n---- {name} ----\n{text_of(pair[side])}")
        print("\na b = x u q > ", end="", flush=True)
        row = judge(keys, a, b)
        print()
        if row["verdict"] == "quit":
            break
        if row["verdict"] == "undo":
            at = max(0, at - 1)
            continue
        row = {"pair": todo[at], "a": a, "seconds": round(time.time() - started, 1)} | row
        with disk_errors(path), open(path, "ab", buffering=0) as file:  # one line in one write
            file.write(json.dumps(row).encode() + b"\n")
            os.fsync(file.fileno())
        at += 1
    print(f"pairs left: {len(todo) - at}; labels are in {path}")


# ---------------------------------------------------------------------------------------------
# report

def kappa(first: list, second: list) -> float:
    """Cohen's kappa: agreement beyond chance, (p_o - p_e) / (1 - p_e), where p_e is how often two
    people who answer at random, each as often this or that as these two did, would agree."""
    n = len(first)
    observed = sum(x == y for x, y in zip(first, second, strict=True)) / n
    a, b = Counter(first), Counter(second)
    expected = sum(a[k] * b[k] for k in a) / n**2
    return (observed - expected) / (1 - expected) if expected < 1 else 1.0


def share(hits, n: int) -> str:
    return f"{100 * hits / n:.1f}% of {n}" if n else "none"


def report(args: Args) -> None:
    pairs, people = by_id(args.pairs), {}
    for path in args.report.split(","):
        rows = {row["pair"]: row for _, row in read_jsonl(path) if row.get("pair") in pairs}
        require(len(rows) > 0, f"{path}: no label of a pair in {args.pairs}")
        people[path] = rows  # the last line on a pair counts
    for path, rows in people.items():
        sides = [r for r in rows.values() if r["verdict"] in ("chosen", "rejected")]
        agree = sum(r["verdict"] == "chosen" for r in sides)
        print(f"{path}: agrees with the automatic label in {share(agree, len(sides))}; "
              f"{len(rows) - len(sides)} ties or skipped; A preferred in "
              f"{share(sum(r['verdict'] == r['a'] for r in sides), len(sides))}")
        for name in CRITERIA.values():
            noted = [r["criteria"][name] for r in rows.values() if name in r["criteria"]]
            if noted:
                print(f"  by {name}: with the label in {share(noted.count('chosen'), len(noted))}")
    for one, two in combinations(people, 2):
        both = sorted(people[one].keys() & people[two].keys())
        # "chosen" and "rejected" would tell what neither could see: half of the pairs are turned.
        turn = {"chosen": "rejected", "rejected": "chosen"}
        votes = [[turn.get(v, v) if draw("kappa", pair) % 2 else v for pair in both
                  for v in [people[who][pair]["verdict"]]] for who in (one, two)]
        same = sum(x == y for x, y in zip(*votes, strict=True))
        print(f"{one} and {two}: agree in {share(same, len(both))}"
              + (f", Cohen's kappa {kappa(*votes):.3f}" if both else ""))
    if args.write:
        out, counts = [], Counter()
        for name, pair in pairs.items():
            votes = Counter(rows[name]["verdict"] for rows in people.values() if name in rows)
            (best, n), *others = votes.most_common() or [("chosen", 1)]  # nobody's: as it was
            best = "drawn" if others and others[0][1] == n else best
            counts[best if votes else "not judged"] += 1
            if best == "rejected":
                pair = pair | {"chosen": pair["rejected"], "rejected": pair["chosen"]}
            if best in ("chosen", "rejected"):
                out.append(pair)
        write_jsonl(args.write, out)
        print(f"{args.write}: {len(out)} of {len(pairs)} pairs; " + ", ".join(
            f"{n} {what}" for what, n in counts.items()))


def main(args: Args) -> None:
    (report if args.report else label)(args)


if __name__ == "__main__":
    cli(main, Args)
