"""How often do responses follow their constraints, and do other checkers agree with ours?

    python bench/ifeval.py FILE...

FILE: JSONL rows of a response with instruction_id_list and kwargs (or instruction_id and kwargs),
and the verdicts of another checker in follow_strict (or follow) where there are some. Strict judges
the response as it stands. Loose accepts it if any of 8 versions passes: with or without its first
line, its last line and its asterisks, so that a preamble such as "Sure, here it is:" does no harm.
"""
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lib.args import InputError, exit_on_input_error, require  # noqa: E402
from lib.files import read_jsonl  # noqa: E402
from tasks.ifeval import follows  # noqa: E402


class Verdict(NamedTuple):
    kind: str
    strict: bool
    loose: bool
    label: bool | None  # another checker's verdict


def loose(text: str, kind: str, kw: dict) -> bool:
    """Return whether any of the 8 versions of a response follows the constraint."""
    lines = text.split("\n")
    versions = [text]
    for part in (lines[1:], lines[:-1], lines[1:-1]):
        versions.append("\n".join(part).strip())
    versions += [version.replace("*", "") for version in versions]
    return any(follows(version, kind, kw) for version in versions)


def verdicts_of_row(row: dict) -> list[Verdict]:
    if "instruction_id_list" in row:
        kinds, kwargs = row["instruction_id_list"], row["kwargs"]
        labels = row.get("follow_strict") or [None] * len(kinds)
    else:
        kinds, kwargs, labels = [row["instruction_id"]], [row["kwargs"]], [row.get("follow")]
    verdicts = []
    for kind, kw, label in zip(kinds, kwargs, labels, strict=True):
        strict = follows(row["response"], kind, kw)
        verdicts.append(Verdict(kind, strict, loose(row["response"], kind, kw), label))
    return verdicts


def read_verdicts(paths: list[str]) -> list[list[Verdict]]:
    """Return the verdicts of every response."""
    responses = []
    for path in paths:
        for line, row in read_jsonl(path):
            try:
                responses.append(verdicts_of_row(row))
            except (LookupError, TypeError, ValueError, AttributeError) as error:
                raise InputError(f"{path}:{line}: a row must have response, instruction_id_list "
                                 f"and kwargs ({error!r})") from None
    return responses


def shares(strict: list[bool], loose: list[bool]) -> str:
    n = len(strict)
    return f"{n:5}{sum(strict) / n:9.1%}{sum(loose) / n:9.1%}"


def main(paths: list[str]) -> None:
    require(len(paths) > 0, "name files of responses with constraints")
    responses = read_verdicts(paths)
    verdicts = [verdict for response in responses for verdict in response]
    by_kind = {kind: [] for kind in sorted({verdict.kind for verdict in verdicts})}
    for verdict in verdicts:
        by_kind[verdict.kind].append(verdict)
    by_kind["all constraints"] = verdicts
    print(f"{'kind':48}{'n':>5}{'strict':>9}{'loose':>9}{'agree with the verdicts':>26}")
    for kind, rows in by_kind.items():
        labelled = [row for row in rows if row.label is not None]
        agree = sum(row.strict == row.label for row in labelled)
        print(f"{kind:48}{shares([row.strict for row in rows], [row.loose for row in rows])}"
              f"{f'{agree} of {len(labelled)}':>26}")
    strict = [all(verdict.strict for verdict in response) for response in responses]
    relaxed = [all(verdict.loose for verdict in response) for response in responses]
    print(f"{'prompts with all constraints followed':48}{shares(strict, relaxed)}")


if __name__ == "__main__":
    exit_on_input_error(main, sys.argv[1:])
