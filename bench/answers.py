"""How often is tasks/math_answers.py wrong? Measured on files with verdicts, or with golds only.

    python bench/answers.py FILE...
"""
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lib.args import exit_on_input_error, require  # noqa: E402
from lib.files import read_jsonl  # noqa: E402
from tasks.benchmarks import load_file  # noqa: E402
from tasks.math_answers import extract_answer, math_equal  # noqa: E402

LABELLED = [("pred", "gold", "equal"), ("solution", "ground_truth", "is_correct"),
            ("response", "gold", "is_correct")]  # columns: prediction, gold, are they the same?


def labelled_pairs(path) -> list[tuple]:
    """(prediction, gold, label) of a file with verdicts; or made from the golds of a question file:
    a gold is itself respelled, but not itself with another first digit, nor the next 10 golds."""
    rows = [row for _, row in read_jsonl(path)]
    for a, b, label in LABELLED:
        if rows and rows[0].keys() >= {a, b, label}:
            return [(extract_answer(row[a], strict=a != "pred"), extract_answer(row[b]), row[label])
                    for row in rows]
    golds = [q["check"]["answer"] for q in load_file(path) if q["check"]["kind"] == "math"]
    # Golds that differ in no more than this may be one answer written twice: no label, no pair
    bare = [re.sub(r"^\w+ ?=|\\(text|mbox|left|right|circ|[dt]?frac)|[\s\\{}$!,^]", "", gold)
            for gold in golds]
    pairs = [(f"$\\boxed{{{respell(gold)}}}$", gold, True) for gold in golds]
    for i, gold in enumerate(golds):
        changed = re.sub(r"\d", lambda digit: str(int(digit[0]) % 9 + 1), gold, count=1)
        others = [golds[j] for j in range(i + 1, min(i + 11, len(golds))) if bare[j] != bare[i]]
        pairs += [(other, gold, False) for other in [changed, *others] if other != gold]
    return pairs


def respell(gold: str) -> str:
    """1234 -> 1,234.0;  \\frac{a}{b}+c -> \\dfrac{a}{b} + c"""
    if re.fullmatch(r"-?\d{4,}", gold):
        return f"{int(gold):,}.0"
    return re.sub(r"\s*([-+=*])\s*", r" \1 ", gold.replace(r"\frac{", r"\dfrac{"))


def main(paths: list[str]):
    require(
        paths and paths != ["--help"],
        "usage: python bench/answers.py FILE...: .jsonl files with "
        "verdicts (pred gold equal) or with golds",
    )
    print(f"{'file':34}{'pairs':>8}{'agree':>9}{'false pos.':>16}{'false neg.':>14}"
          f"{'no answer':>11}")
    for path in paths:
        pairs = labelled_pairs(path)
        require(len(pairs) > 0, f"{path}: no answers of mathematics")
        wrong = [pair for pair in pairs if math_equal(*pair[:2]) != pair[2]]
        n, n_same = len(pairs), sum(label for *_, label in pairs)
        missed = sum(label for *_, label in wrong)
        print(f"{Path(path).name:34}{n:8}{1 - len(wrong) / n:9.2%}"
              f"{f'{len(wrong) - missed} of {n - n_same}':>16}{f'{missed} of {n_same}':>14}"
              f"{sum(pair[0] is None for pair in pairs):11}")
        for a, b, label in dict.fromkeys(wrong):
            print(f"    labelled {'the same' if label else 'different'}: {a}  |  {b}")


if __name__ == "__main__":
    exit_on_input_error(main, sys.argv[1:])
