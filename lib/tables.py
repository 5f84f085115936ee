"""Means with their intervals, and tables of results."""
import math
import re
from html import escape
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

from lib.args import require
from lib.files import read_jsonl

MARKDOWN = str.maketrans({"|": "\\|", "\n": "\\n"})  # in the cells of a table
CODE = re.compile(r"\A`(.*)`\Z", re.DOTALL)


def interval(values: list[float], least: float = 0.0) -> dict[str, float]:
    """Return the mean of per-query values in [least, 1] and its normal 95% interval."""
    n = len(values)
    mean = sum(values) / n
    squares = sum((value - mean) ** 2 for value in values)
    error = 1.96 * math.sqrt(squares / max(1, n - 1) / n)
    low = max(least, mean - error)
    high = min(1.0, mean + error)
    return {"mean": mean, "low": low, "high": high, "n": n}


def cell(value: dict[str, float], form: str = ".1f") -> str:
    """Return an interval in percent: "52.6 [48.2, 57.0]"."""
    mean = format(100 * value["mean"], form)
    low = format(100 * value["low"], form)
    high = format(100 * value["high"], form)
    return f"{mean} [{low}, {high}]"


def prompt_text(prompt: str | list[dict]) -> str:
    """Return a query's prompt as text; a conversation has one line per message."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message.get('content') or ''}" for message in prompt)


class Table(NamedTuple):
    """Rows of text. A cell in `backticks` is code."""
    title: str
    head: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        rule = ["---"] * len(self.head)
        lines = []
        for row in (self.head, rule, *self.rows):
            line = "|"
            for text in row:
                line += f" {text.translate(MARKDOWN)} |"
            lines.append(line)
        return "\n".join(lines)

    def html(self) -> str:
        lines = []
        for row in (self.head, *self.rows):
            line = ""
            for text in row:
                content = CODE.sub(r"<code>\1</code>", escape(text))
                line += f"<td>{content}</td>"
            lines.append(f"<tr>{line}</tr>")
        return '<div class="wide"><table>' + "\n".join(lines) + "</table></div>"


def metric_tables(stages: dict[str, dict]) -> list[Table]:
    """Return a table of pass@1 and one of greedy accuracy, stages x domains, from {stage: metrics}.
    """
    tables = []
    first = next(iter(stages.values()))
    for metric, label in (("pass@1", "pass@1 (mean score)"), ("greedy", "greedy")):
        domains = first[metric]
        rows = []
        for name, metrics in stages.items():
            values = metrics[metric]
            rows.append([name] + [cell(values[domain]) for domain in domains])
        n = domains["total"]["n"]
        title = f"{label} on {n} held-out queries, % [95% interval]"
        tables.append(Table(title, [f"{label}, %", *domains], rows))
    return tables


def print_groups(args) -> None:
    """python grpo.py inspect --out RUN: four groups of its last step, best answer first."""
    path = Path(args.out) / "samples.jsonl"
    require(path.is_file(), f"{path}: no such file; a run writes it when it ends")
    rows = [row for _, row in read_jsonl(path)]
    require(rows and "advantage" in rows[0], f"{path} is of no GRPO run")
    for prompt, group in groupby(rows, key=itemgetter("prompt")):
        print(prompt_text(prompt))
        print(" score  reward  advantage  answer")
        for row in sorted(group, key=itemgetter("advantage"), reverse=True):
            numbers = "{score:6.2f} {reward:7.3f} {advantage:+10.3f}".format(**row)
            print(f"{numbers}  {row['response']!r}")
        print()
