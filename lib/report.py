"""Report a whole run: what each stage cost, what it gained and how sure that is, its curves, and
answers worth reading, before and after.

    python -m lib.report --run runs/demo

It reads run.json and log.jsonl of each stage's directory, and what evaluate.py wrote to
RUN/evaluation/STAGE. The stage "base" is the model that a run began with: it has an evaluation
only. report.md (for a terminal or a repository) and report.html (the same with curves, one file
without scripts, for any browser) are written into the run's directory.
"""
import json
import math
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import fmean

from lib.args import cli, require
from lib.files import read_json, read_jsonl, write_atomic
from lib.tables import Table, cell, interval, metric_tables, prompt_text

# The stages in their order, each with the numbers of its log that show whether it went well.
CURVES = {
    "pretrain": ("loss", "val_loss", "grad_norm"),
    "sft": ("loss", "grad_norm"),
    "sft_control": ("loss", "grad_norm"),
    "dpo": ("accuracy", "reward_chosen", "reward_rejected", "loss"),
    "rl_first": ("pass_rate", "reward", "entropy", "frac_zero_std"),
    "reward": ("accuracy", "loss"),
    "grpo": ("pass_rate", "own", "reward", "entropy", "frac_zero_std", "length", "kl"),
}
STORY = ("base", "pretrain", "sft", "dpo", "grpo")
COMPARISONS = (("base", "sft"), ("base", "grpo"), ("pretrain", "sft"), ("sft", "dpo"),
               ("dpo", "grpo"), ("sft", "grpo"), ("sft", "sft_control"), ("sft_control", "grpo"))


@dataclass
class Args:
    run: str = "runs/demo"           # directory that holds a directory for each stage


@dataclass
class Stage:
    name: str
    record: dict                     # run.json; of the base model seed and command only
    metrics: dict                    # of its evaluation; empty: it is not evaluated
    answers: list[dict]              # eval_samples.jsonl
    log: list[dict]                  # log.jsonl


# ---------------------------------------------------------------------------------------------
# reading

def collect(root: Path) -> list[Stage]:
    """Return the stages whose directories or evaluations are in root, in their order."""
    stages = []
    asked = {}      # what an evaluation asked -> a stage that was asked it
    for name in ("base", *CURVES):
        evaluation = root / "evaluation" / name
        record = read_json(root / name / "run.json", missing_ok=True)
        scored = read_json(evaluation / "eval.json", missing_ok=True)
        if not record and not scored:
            continue
        if scored:
            require(not record or scored.get("run") == record, f"{root / name} was trained again "
                    "after its evaluation; run evaluate.py again")
            settings = scored["settings"]
            question = (settings.get("queries"), settings.get("n"), settings.get("reward"),
                        settings.get("domain_key", ""))
            asked[question] = name
            if not record:
                command = f"evaluate.py --init {settings['init']}"
                record = {"seed": settings["seed"], "command": command}
        answers = read_rows(evaluation / "eval_samples.jsonl")
        log = read_rows(root / name / "log.jsonl")
        stages.append(Stage(name, record, scored.get("metrics", {}), answers, log))
    require(len(stages) > 0, f"--run {root}: must be a directory that holds those of stages "
            f"({', '.join(CURVES)})")
    require(len(asked) < 2, f"--run {root}: {' and '.join(asked.values())} were evaluated on other "
            "queries or by another --reward or --domain_key; run evaluate.py again")
    return stages


def read_rows(path: Path) -> list[dict]:
    return [row for _, row in read_jsonl(path)] if path.exists() else []


# ---------------------------------------------------------------------------------------------
# tables, which both formats show

def stage_table(stages: list[Stage]) -> Table:
    """Return one row per stage: what it cost, and what its model passes."""
    rows = []
    for stage in stages:
        seconds = "" if stage.name == "base" else "not finished"
        if "seconds" in stage.record:
            seconds = f"{stage.record['seconds']:.0f}"
        row = [stage.name, seconds, str(stage.record.get("peak_rss_mb", ""))]
        for metric in ("pass@1", "greedy"):
            total = stage.metrics.get(metric, {}).get("total")
            row.append("" if total is None else f"{100 * total['mean']:.1f}")
        bits = stage.metrics.get("bits_per_byte")
        row.append("" if bits is None else f"{bits:.3f}")
        rows.append(row)
    head = ["stage", "seconds", "peak MB", "pass@1, %", "greedy, %", "bits per byte"]
    return Table("The stages", head, rows)


def question_table(answers: dict[str, list[dict]]) -> Table:
    """Show what each stage says to one question, if there is one. It is not chosen by hand: it is
    the first question of the test that the last stage answers rightly by greedy decoding, and no
    earlier one does."""
    names = [name for name in STORY if name in answers]
    columns = [answers[name] for name in names]
    for rows in zip(*columns, strict=False):
        *before, last = [row["greedy_score"] for row in rows]
        if before and last == 1 and max(before) < 1:
            cells = [[name, f"`{row['greedy']}`"] for name, row in zip(names, rows, strict=True)]
            question = prompt_text(rows[0]["prompt"]).replace("\n", " ")
            return Table(f"One question: {question}", ["stage", "its answer"], cells)
    return Table("", [], [])


def tables_of(stages: list[Stage]) -> list[Table]:
    """Return all tables; the first two, or one where no question is found, fit a terminal."""
    answers = {stage.name: stage.answers for stage in stages if stage.answers}
    evaluated = {stage.name: stage.metrics for stage in stages if stage.metrics}
    tables = [stage_table(stages), question_table(answers)]
    if evaluated:
        tables += metric_tables(evaluated)
    tables.append(gains(answers))
    tables = [table for table in tables if table.rows]
    if answers:
        tables += answer_tables(answers)
    commands = [[stage.name, f"`python {stage.record['command']}`"] for stage in stages]
    tables.append(Table("Commands", ["stage", "command"], commands))
    return tables


def gains(answers: dict[str, list[dict]]) -> Table:
    """Compare stages query by query. How hard a query is cancels out, so these intervals are
    narrower than those of the two means."""
    rows = []
    for before, after in COMPARISONS:
        old = answers.get(before, [])
        new = answers.get(after, [])
        same_queries = [row["prompt"] for row in old] == [row["prompt"] for row in new]
        if old and same_queries:
            row = [before, after]
            for key in ("pass@1", "greedy_score"):
                differences = [b[key] - a[key] for a, b in zip(old, new, strict=True)]
                row.append(cell(interval(differences, least=-1.0), "+.1f"))
            rows.append(row)
    head = ["from", "to", "pass@1", "greedy"]
    return Table("Gains on the same queries, in points", head, rows)


def answer_tables(answers: dict[str, list[dict]]) -> list[Table]:
    """Count the queries that were learned, lost and are still wrong between SFT (or the first stage
    evaluated) and the last one, and show one of each domain: the largest change."""
    names = list(answers)
    after = names[-1]
    before = "sft" if "sft" in names else names[0]
    pairs = []
    for old, new in zip(answers[before], answers[after], strict=False):
        pairs.append((new["greedy_score"] - old["greedy_score"], old, new))
    pairs.sort(key=lambda pair: pair[0])
    from_best = pairs[::-1]
    full = 1 - 1e-6                    # sums of parts round
    chosen = {
        f"Learned from {before} to {after}": [pair for pair in pairs if pair[0] > 0],
        f"Lost from {before} to {after}": [pair for pair in from_best if pair[0] < 0],
        f"Below the full score after {after}": [
            pair for pair in from_best if pair[2]["greedy_score"] < full],
    }
    tables = []
    for title, some in chosen.items():
        rows = {}
        for _, old, new in some:       # the last one of each domain stays
            check = json.dumps(new["check"], ensure_ascii=False)
            rows[new["domain"]] = [new["domain"], prompt_text(new["prompt"]), f"`{old['greedy']}`",
                                   f"`{new['greedy']}`", check]
        head = ["domain", "query", before, after, "checked by"]
        shown = [rows[domain] for domain in sorted(rows)]
        tables.append(Table(f"{title}: {len(some)} queries", head, shown))
    return tables


# ---------------------------------------------------------------------------------------------
# the page

STYLE = """
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; padding: 1rem }
.wide { overflow-x: auto } table { border-collapse: collapse }
th, td { padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #8886; text-align: left;
  vertical-align: top }
code { display: block; min-width: 11rem; white-space: pre-wrap; overflow-wrap: anywhere }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1rem }
figure { margin: 0 } svg { width: 100%; display: block; background: #8882 }
polyline { fill: none; stroke: #37c; stroke-width: 2; vector-effect: non-scaling-stroke }
"""


def curve(rows: list[dict], name: str) -> str:
    """Draw a number of the log over the steps, as the means of 50 parts of the run. name: one of
    CURVES, so it need not be escaped."""
    points = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), (int, float))]
    if len(points) < 2:
        return ""
    size = math.ceil(len(points) / 50)
    parts = [points[i:i + size] for i in range(0, len(points), size)]
    means = [fmean(value for _, value in part) for part in parts]
    low, high = min(means), max(means)
    first, last = points[0][0], points[-1][0]
    corners = []
    for part, mean in zip(parts, means, strict=True):
        left = 300 * (part[0][0] - first) / (last - first)
        top = 95 - 90 * (mean - low) / (high - low or 1)       # an svg's y runs downwards
        corners.append(f"{left:.1f},{top:.1f}")
    return (f'<figure><svg viewBox="0 0 300 100" role="img" aria-label="{name}">'
            f'<polyline points="{" ".join(corners)}"/></svg><figcaption><b>{name}</b>: '
            f'{means[0]:.4g} → {means[-1]:.4g}, from {low:.4g} to {high:.4g}, '
            f'steps {first}–{last}</figcaption></figure>')


def section(table: Table) -> str:
    return f"<h2>{escape(table.title)}</h2>{table.html()}"


def as_html(title: str, tables: list[Table], stages: list[Stage]) -> str:
    parts = [f"<h1>{escape(title)}</h1>"]
    for table in tables[:2]:
        parts.append(section(table))
    parts.append("<h2>Curves</h2>")
    for stage in stages:
        if not stage.log:
            continue
        figures = "".join(curve(stage.log, metric) for metric in CURVES.get(stage.name, ()))
        parts.append(f'<h3>{stage.name}</h3><div class="grid">{figures}</div>')
    for table in tables[2:]:
        parts.append(section(table))
    return ('<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
            f'content="width=device-width"><title>{escape(title)}</title><style>{STYLE}</style>'
            "</head><body>" + "\n".join(parts) + "</body></html>\n")


# ---------------------------------------------------------------------------------------------

def main(args: Args) -> None:
    root = Path(args.run)
    stages = collect(root)
    seconds = sum(stage.record.get("seconds", 0) for stage in stages)
    title = f"{root.name}: seed {stages[-1].record['seed']}, {seconds / 60:.1f} minutes of training"
    tables = tables_of(stages)
    lines = [f"# {title}\n"]
    for table in tables:
        lines.append(f"## {table.title}\n\n{table.markdown()}\n")
    if not any(stage.metrics for stage in stages):
        lines.append(f"No stage is evaluated yet; `python evaluate.py --init {root}/STAGE --out "
                     f"{root}/evaluation/STAGE` does it.\n")
    markdown = "\n".join(lines)
    write_atomic(root / "report.md", markdown)
    write_atomic(root / "report.html", as_html(title, tables, stages))
    for table in tables[:2]:
        print(f"\n{table.title}\n\n{table.markdown()}")
    print(f"\nIntervals, gains, curves and more answers: {root}/report.md and report.html")


if __name__ == "__main__":
    cli(main, Args)
