"""Report a whole run: what each stage cost, what it gained and how sure that is, its curves, and
answers worth reading, before and after.

    python -m lib.report --run runs/demo

It reads run.json, log.jsonl and what evaluate.py left in each stage's directory. It writes
report.md (for a terminal or a repository), report.html (one file without scripts, for any browser)
and report.json (for programs) into the run's directory.
"""
import json
from collections import defaultdict
from dataclasses import dataclass
from html import escape
from pathlib import Path

from lib.args import cli, require
from lib.files import read_json, read_jsonl, write_atomic
from lib.tables import Table, cell, interval, metric_tables

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
COMPARISONS = (("pretrain", "sft"), ("sft", "dpo"), ("dpo", "grpo"), ("sft", "grpo"),
               ("sft", "sft_control"), ("sft_control", "grpo"))


@dataclass
class Args:
    run: str = "runs/demo"           # directory that holds a directory for each stage


# ---------------------------------------------------------------------------------------------
# reading

def gains(chats: dict[str, list[dict]]) -> list[dict]:
    """Compare stages query by query. How hard a query is cancels out, so these intervals are
    narrower than those of the two means."""
    out = []
    for before, after in COMPARISONS:
        old = chats.get(before, [])
        new = chats.get(after, [])
        same_queries = [row["prompt"] for row in old] == [row["prompt"] for row in new]
        if not old or not same_queries:
            continue
        gain = {"from": before, "to": after}
        for name, key in (("pass@1", "pass@1"), ("greedy", "greedy_score")):
            differences = [b[key] - a[key] for a, b in zip(old, new, strict=True)]
            gain[name] = interval(differences, least=-1.0)
        out.append(gain)
    return out


def collect(root: Path) -> tuple[dict, dict, dict]:
    """Return what goes into report.json, the log of each stage, and the answers of each stage."""
    found = [name for name in CURVES if (root / name / "run.json").exists()]
    require(len(found) > 0, f"--run {root}: must be a directory that holds those of stages "
            f"({', '.join(CURVES)})")
    stages = []
    logs = {}
    chats = {}
    asked = {}      # what an evaluation asked -> a stage that was asked it
    for name in found:
        folder = root / name
        run = read_json(folder / "run.json")
        evaluation = {"metrics": {}}
        if (folder / "eval.json").exists():
            evaluation = read_json(folder / "eval.json")
            settings = evaluation["settings"]
            question = (settings.get("queries"), settings.get("n"), settings.get("reward"))
            asked[question] = name
        if (folder / "log.jsonl").exists():
            logs[name] = [row for _, row in read_jsonl(folder / "log.jsonl")]
        if (folder / "eval_samples.jsonl").exists():
            chats[name] = [row for _, row in read_jsonl(folder / "eval_samples.jsonl")]
        stages.append({
            "name": name, "seconds": run.get("seconds"), "peak_rss_mb": run.get("peak_rss_mb"),
            "command": "python " + run["command"], "result": run.get("result", {}),
            "metrics": evaluation["metrics"],
        })
    require(len(asked) < 2, f"--run {root}: {' and '.join(asked.values())} were evaluated on other "
            "queries or by another --reward; run evaluate.py again")

    seconds = sum(stage["seconds"] or 0 for stage in stages)
    if (root / "started").exists():  # demo.sh's clock: data, tokenizer, evaluations included
        ended = max(path.stat().st_mtime for path in root.glob("*/*.json"))
        seconds = ended - float((root / "started").read_text())
    own_reward = any(reward for _, _, reward in asked)
    report = {
        "name": root.name, "stages": stages, "gains": gains(chats), "seed": run["seed"],
        "total_seconds": round(seconds), "sampled": "mean" if own_reward else "pass@1",
    }
    return report, logs, chats


# ---------------------------------------------------------------------------------------------
# tables, which both formats show

def tables_of(report: dict, chats: dict) -> list[Table]:
    tables = []
    stages = report["stages"]
    evaluated = [(stage["name"], stage["metrics"]) for stage in stages if stage["metrics"]]
    if evaluated:
        tables += metric_tables(evaluated, report["sampled"])
    if report["gains"]:
        tables.append(gains_table(report))
    tables.append(costs_table(stages))
    if "sft" in chats and "grpo" in chats:
        tables.append(changes_table("Learned", chats["sft"], chats["grpo"], 1))
        tables.append(changes_table("Lost", chats["sft"], chats["grpo"], -1))
    if chats:
        last = list(chats)[-1]
        tables.append(wrong_table(last, chats[last]))
    return tables


def gains_table(report: dict) -> Table:
    rows = []
    for gain in report["gains"]:
        sampled = cell(gain["pass@1"], "+.1f")
        greedy = cell(gain["greedy"], "+.1f")
        rows.append([gain["from"], gain["to"], sampled, greedy])
    return Table("Gains on the same queries, in points",
                 ["from", "to", report["sampled"], "greedy"], rows)


def costs_table(stages: list[dict]) -> Table:
    rows = []
    for stage in stages:
        seconds = "not finished" if stage["seconds"] is None else f"{stage['seconds']:.0f}"
        memory = str(stage["peak_rss_mb"] or "")
        bits = stage["metrics"].get("bits_per_byte")
        bits = "" if bits is None else f"{bits:.3f}"
        rows.append([stage["name"], seconds, memory, f"`{stage['command']}`", bits])
    return Table("Stages", ["stage", "seconds", "peak MB", "command", "bits per byte"], rows)


def changes_table(verb: str, before: list[dict], after: list[dict], sign: int) -> Table:
    """Count the queries whose greedy score rose (sign 1) or fell (sign -1), and show the largest
    change of each domain."""
    changes = []
    for old, new in zip(before, after, strict=False):
        gain = sign * (new["greedy_score"] - old["greedy_score"])
        if gain > 0:
            changes.append((gain, old, new))
    changes.sort(key=lambda change: -change[0])
    rows = {}
    for _, old, new in changes:
        row = [f"**{old['prompt']}**", f"`{old['greedy']}`", f"`{new['greedy']}`"]
        rows.setdefault(old["domain"], row)
    title = f"{verb} between SFT and GRPO: {len(changes)} queries {verb.lower()}"
    return Table(title, ["query", "SFT", "GRPO"], [rows[domain] for domain in sorted(rows)])


def wrong_table(name: str, chats: list[dict]) -> Table:
    """Show two queries of each domain that are still answered wrongly."""
    wrong = [row for row in chats if row["greedy_score"] < 1]
    shown = defaultdict(list)
    for row in wrong:
        check = json.dumps(row["check"], ensure_ascii=False)
        shown[row["domain"]].append([row["domain"], row["prompt"], f"`{row['greedy']}`", check])
    rows = []
    for domain in sorted(shown):
        rows += shown[domain][:2]
    title = f"Still wrong after {name}: {len(wrong)} queries"
    return Table(title, ["domain", "query", "answer", "checked by"], rows)


# ---------------------------------------------------------------------------------------------
# formats

def as_markdown(title: str, tables: list[Table]) -> str:
    lines = [f"# {title}", ""]
    for table in tables:
        lines += [f"## {table.title}", "", table.markdown(), ""]
    return "\n".join(lines)


STYLE = """
:root { color-scheme: light dark; --ink: #1a202c; --soft: #5a6578; --line: #d5dbe5; --fill: #f4f6fa;
  --blue: #2b6cb0; --paper: #fff; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf2; --soft: #9aa5b8; --line: #39414f;
  --fill: #1d222b; --blue: #73b3f2; --paper: #13161b; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 62rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem } h2 { font-size: 1.2rem; margin-top: 2.2rem } h3 { font-size: 1rem }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top }
code { white-space: pre-wrap; overflow-wrap: anywhere }
figcaption { color: var(--soft); font-size: .85rem }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1rem }
figure { margin: 0 } svg { width: 100%; height: auto; display: block; background: var(--fill) }
.raw { stroke: var(--soft); opacity: .45 } .smooth { stroke: var(--blue); stroke-width: 2 }
.raw, .smooth { fill: none; vector-effect: non-scaling-stroke }
"""


def curve(rows: list[dict], name: str) -> str:
    """Draw the numbers of each step, and their mean over a fiftieth of the run."""
    points = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), (int, float))]
    if len(points) < 2:
        return ""
    steps = [step for step, _ in points]
    values = [value for _, value in points]
    half = len(values) // 50
    means = []
    for i in range(len(values)):
        near = values[max(0, i - half):i + half + 1]
        means.append(sum(near) / len(near))
    low, high = min(values), max(values)

    def polyline(kind: str, ys: list[float]) -> str:
        corners = []
        for step, y in zip(steps, ys, strict=True):
            left = 300 * (step - steps[0]) / (steps[-1] - steps[0])
            top = 95 - 90 * (y - low) / (high - low or 1)      # an svg's y runs downwards
            corners.append(f"{left:.1f},{top:.1f}")
        return f'<polyline class="{kind}" points="{" ".join(corners)}"/>'
    return (f'<figure><svg viewBox="0 0 300 100" role="img" aria-label="{escape(name)}">'
            f'{polyline("raw", values)}{polyline("smooth", means)}</svg>'
            f'<figcaption><b>{escape(name)}</b>: {values[0]:.4g} → {values[-1]:.4g}, '
            f'from {low:.4g} to {high:.4g}, steps {steps[0]}–{steps[-1]}</figcaption></figure>')


def as_html(title: str, tables: list[Table], logs: dict) -> str:
    parts = [f"<h1>{escape(title)}</h1>"]
    for table in tables:
        parts += [f"<h2>{escape(table.title)}</h2>", table.html()]
    parts.append("<h2>Curves</h2>")
    for name, rows in logs.items():
        figures = "".join(curve(rows, metric) for metric in CURVES[name])
        parts.append(f'<h3>{name}</h3><div class="grid">{figures}</div>')
    return ('<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
            f'content="width=device-width"><title>{escape(title)}</title><style>{STYLE}</style>'
            "</head><body>" + "\n".join(parts) + "</body></html>\n")


# ---------------------------------------------------------------------------------------------

def main(args: Args) -> dict:
    root = Path(args.run)
    report, logs, chats = collect(root)
    minutes = report["total_seconds"] / 60
    title = f"{report['name']}: seed {report['seed']}, {minutes:.1f} minutes in all"
    tables = tables_of(report, chats)
    markdown = as_markdown(title, tables)
    if not any(stage["metrics"] for stage in report["stages"]):
        markdown += f"No stage is evaluated yet; `python evaluate.py --init {root}/…` does it.\n"
    write_atomic(root / "report.json", json.dumps(report, indent=1))
    write_atomic(root / "report.md", markdown)
    write_atomic(root / "report.html", as_html(title, tables, logs))
    print("\n".join(markdown.splitlines()[:40]))
    print(f"\nwritten: {root}/report.md, report.html and report.json")
    return report


if __name__ == "__main__":
    cli(main, Args)
