"""A reward model for a real language model, from public preference data, beside Qwen2.5-Math-RM's
own scores. --files are pairs of any shape in docs/your-data.md. --solutions has eight solutions of
Qwen2.5-Math per problem, scored by Qwen2.5-Math-RM:

    {"idx", "question", "response", "is_correct", "rm_score"}

    python recipes/preferences.py --files a.jsonl,b.jsonl --out runs/pref
    python reward.py --init DIR --pairs runs/pref/train.jsonl \\
        --eval_data runs/pref/held_out.jsonl --queries none --max_len 256 --batch_size 16 \\
        --micro_batch 4 --lr 2e-5 --out runs/pref/rm
    python recipes/preferences.py --model runs/pref/rm --solutions qwen_math_rm8.jsonl

How does a judge agree with the labels of the same pairs, by each of the six criteria? And what does
a reward model learn from the criteria of the judge?

    python -m data.label --pairs runs/pref/train.jsonl --judge DIR --out judge.jsonl
    python -m data.label --pairs runs/pref/train.jsonl --report judge.jsonl --write judged.jsonl
    python reward.py --pairs judged.jsonl --weights overall=1,truthfulness=2 ...

Measured: LOG.md, "a reward model of the real 135M model on public preferences".
"""
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.label import draw  # noqa: E402
from data.pairs import PairFile  # noqa: E402
from lib.args import cli, require  # noqa: E402
from lib.files import read_jsonl, write_jsonl  # noqa: E402
from lib.optim import setup  # noqa: E402
from reward import RewardModel  # noqa: E402


@dataclass
class Args:
    files: str = ""                  # preference files, joined by commas: convert them
    out: str = "runs/pref"           # where train.jsonl and held_out.jsonl go
    held_out: int = 8                # one of so many prompts is held out, with all its pairs
    model: str = ""                  # a reward model to compare with the scores in --solutions
    solutions: str = ""              # scored solutions
    seed: int = 0                    # of the split
    device: str = "auto"             # auto, cpu, cuda[:N]
    dtype: str = "auto"              # auto, float32, bfloat16


def against_qwen(model: RewardModel, rows: list[dict]) -> dict[str, float]:
    """Over the problems with right and wrong solutions: how often a right one scores above a wrong
    one, how often the best-scored is right, and the correlation with Qwen's scores inside a
    problem; the first two also for Qwen's own scores and for the length."""
    problems = {}
    for row in rows:
        problems.setdefault(row["idx"], []).append(row)
    mixed = [p for p in problems.values() if len({r["is_correct"] for r in p}) == 2]
    flat = [r for p in mixed for r in p]
    ours = iter(model.score([r["question"] for r in flat], [r["response"] for r in flat], 8))
    out, inside = {"problems": len(mixed)}, []
    for row in flat:
        row |= {"ours": next(ours), "longer": float(len(row["response"])), "Qwen": row["rm_score"]}
    for p in mixed:
        pair = torch.tensor([[r["ours"] for r in p], [r["rm_score"] for r in p]])
        inside.append(torch.corrcoef(pair)[0, 1].item())
    for name in ("ours", "Qwen", "longer"):
        wins = [good[name] > bad[name] for p in mixed for good in p for bad in p
                if good["is_correct"] > bad["is_correct"]]
        best = [sorted((r[name], r["is_correct"]) for r in p)[-1][1] for p in mixed]
        out[f"right above wrong, {name}"] = sum(wins) / len(wins)
        out[f"best of 8, {name}"] = sum(best) / len(best)
    out["random"] = sum(r["is_correct"] for r in flat) / len(flat)
    return out | {"correlation with Qwen": sum(inside) / len(inside)}


def main(args: Args) -> None:
    if args.model:
        device, autocast = setup(args)
        rows = [row for _, row in read_jsonl(args.solutions)]
        with autocast:
            found = against_qwen(RewardModel.from_pretrained(args.model, device=device), rows)
        print("\n".join(f"{name}: {value:.3f}" for name, value in found.items()))
        return
    require(bool(args.files), "nothing to do: give --files or --model and --solutions")
    pairs = [pair for path in args.files.split(",") for pair in PairFile(path)]
    require(args.held_out > 1, f"--held_out {args.held_out}: must be 2 or more")
    random.Random(args.seed).shuffle(pairs)
    parts = {"train": [], "held_out": []}
    for pair in pairs:
        number = draw(args.seed, json.dumps(pair["prompt"], sort_keys=True))
        parts["train" if number % args.held_out else "held_out"].append(pair)
    for name, some in parts.items():
        write_jsonl(Path(args.out) / f"{name}.jsonl", some)
        print(f"{args.out}/{name}.jsonl: {len(some)} pairs")


if __name__ == "__main__":
    cli(main, Args)
