"""The report of a whole run: what each stage cost, what it gained and how sure that is, its curves,
and answers worth reading, before and after.

    python -m lib.report --run runs/demo

reads run.json, log.jsonl and what evaluate.py left in each stage's directory, and writes there
report.md (for a terminal or a repository), report.html (one file, no network, no scripts: open it
in any browser) and report.json (for programs).
"""
import json
from dataclasses import dataclass
from html import escape
from pathlib import Path

from evaluate import cell, interval, table
from lib.args import cli, require
from lib.files import read_json, read_jsonl, write_atomic

# Stage by stage, the numbers of its log that say whether it went well.
CURVES = {"pretrain": ("loss", "val_loss", "grad_norm"), "sft": ("loss", "grad_norm"),
          "sft_control": ("loss", "grad_norm"),
          "dpo": ("accuracy", "reward_chosen", "reward_rejected", "loss"),
          "rl_first": ("pass", "reward", "entropy", "dead"), "reward": ("accuracy", "loss"),
          "grpo": ("pass", "own", "reward", "entropy", "dead", "length", "kl")}


@dataclass
class Args:
    run: str = "runs/demo"           # directory that holds a directory for each stage


# ---------------------------------------------------------------------------------------------
# reading

def gains(chats: dict[str, list[dict]]) -> list[dict]:
    """Stage against stage, query by query: what all queries have in common, how hard they are,
    cancels, so these intervals are narrower than those of the two means."""
    out = []
    for before, after in (("pretrain", "sft"), ("sft", "dpo"), ("dpo", "grpo"), ("sft", "grpo"),
                          ("sft", "sft_control"), ("sft_control", "grpo")):
        old, new = chats.get(before, []), chats.get(after, [])
        if old and [row["prompt"] for row in old] == [row["prompt"] for row in new]:
            out.append({"from": before, "to": after} | {
                name: interval([b[key] - a[key] for a, b in zip(old, new, strict=True)], least=-1.0)
                for name, key in (("pass@1", "pass@1"), ("greedy", "greedy_score"))})
    return out


def collect(root: Path):
    """-> what goes into report.json, each stage's log, each stage's answers."""
    found = [s for s in CURVES if (root / s / "run.json").exists()]
    require(len(found) > 0, f"--run {root}: want a directory that holds those of stages "
            f"({', '.join(CURVES)})")
    stages, logs, chats, asked = [], {}, {}, {}
    for name in found:
        folder = root / name
        run, path = read_json(folder / "run.json"), folder / "eval.json"
        evaluation = read_json(path) if path.exists() else {}
        stages.append({"name": name, "seconds": run.get("seconds"),
                       "peak_rss_mb": run.get("peak_rss_mb"),
                       "command": "python " + run["command"], "result": run.get("result", {}),
                       "metrics": evaluation.get("metrics", {})})
        if evaluation:
            settings = evaluation["settings"]
            asked[tuple(settings.get(key, "") for key in ("queries", "n", "reward"))] = name
        if (folder / "log.jsonl").exists():
            logs[name] = [row for _, row in read_jsonl(folder / "log.jsonl")]
        if (folder / "eval_samples.jsonl").exists():
            chats[name] = [row for _, row in read_jsonl(folder / "eval_samples.jsonl")]
    require(len(asked) < 2, f"--run {root}: {' and '.join(asked.values())} were evaluated on other "
            "queries or by another --reward; run evaluate.py again")
    total = sum(s["seconds"] or 0 for s in stages)
    if (root / "started").exists():  # demo.sh's clock: data, tokenizer, evaluations included
        ended = max(path.stat().st_mtime for path in root.glob("*/*.json"))
        total = ended - float((root / "started").read_text())
    report = {"name": root.name, "stages": stages, "gains": gains(chats), "seed": run["seed"],
              "total_seconds": round(total),
              "sampled": "mean" if any(reward for *_, reward in asked) else "pass@1"}
    return report, logs, chats


def turned(before: list[dict], after: list[dict], sign: int) -> tuple[int, list[tuple]]:
    """How many queries' greedy scores rose (sign 1) or fell (-1), and which did most in each
    domain."""
    some = [(sign * (b["greedy_score"] - a["greedy_score"]), a, b)
            for a, b in zip(before, after, strict=False)]
    some = [(a, b) for gain, a, b in sorted(some, key=lambda row: -row[0]) if gain > 0]
    return len(some), [pair for domain in sorted({a["domain"] for a, _ in some})
                       for pair in [p for p in some if p[0]["domain"] == domain][:1]]


# ---------------------------------------------------------------------------------------------
# markdown

def stage_rows(report: dict) -> list[list[str]]:
    return [[s["name"], "not finished" if s["seconds"] is None else f"{s['seconds']:.0f}",
             str(s["peak_rss_mb"] or ""), s["command"]] for s in report["stages"]]


def as_markdown(report: dict, root: Path, chats: dict) -> str:
    lines = [f"# {report['name']}: seed {report['seed']}, {report['total_seconds'] / 60:.1f} "
             "minutes in all", ""]
    rows = [(s["name"], s["metrics"]) for s in report["stages"] if s["metrics"]]
    if rows:
        lines += ["Held-out queries, mean [95% interval]; each cell's n is in report.json.", "",
                  table(rows, report["sampled"])]
    else:
        lines.append(f"No stage is evaluated yet; `python evaluate.py --init {root}/…` does it.")
    if report["gains"]:
        lines += ["", "Gains on the same queries, in points:", "",
                  f"| from | to | {report['sampled']} | greedy |", "|---|---|---|---|"]
        lines += [f"| {g['from']} | {g['to']} | {cell(g['pass@1'], '+.1f')} | "
                  f"{cell(g['greedy'], '+.1f')} |" for g in report["gains"]]
    lines += ["", "| stage | seconds | peak MB | command |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(row)} | `{command}` |" for *row, command in stage_rows(report)]
    if "sft" in chats and "grpo" in chats:
        lines += ["", "## The same question, after SFT and after GRPO (greedy)", ""]
        for label, sign in (("learned", 1), ("lost", -1)):
            n, pairs = turned(chats["sft"], chats["grpo"], sign)
            lines += [f"{n} queries {label}; the first of each domain:", ""]
            for before, after in pairs:
                lines += [f"- **{before['prompt']}**", f"  - SFT: `{before['greedy']!r}`",
                          f"  - GRPO: `{after['greedy']!r}`"]
            lines.append("")
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------------------------------
# html

STYLE = """
:root { color-scheme: light dark; --ink: #1a202c; --soft: #5a6578; --line: #d5dbe5; --fill: #f4f6fa;
  --blue: #2b6cb0; --red: #b7471d; --paper: #fff; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf2; --soft: #9aa5b8; --line: #39414f;
  --fill: #1d222b; --blue: #73b3f2; --red: #f2935e; --paper: #13161b; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 62rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem } h2 { font-size: 1.2rem; margin-top: 2.2rem } h3 { font-size: 1rem }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; white-space: nowrap }
small, figcaption, .soft { color: var(--soft); font-size: .85rem }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1rem }
figure { margin: 0 } svg { width: 100%; height: auto; display: block; background: var(--fill) }
.raw { stroke: var(--soft); opacity: .45 } .smooth { stroke: var(--blue); stroke-width: 2 }
.raw, .smooth { fill: none; vector-effect: non-scaling-stroke }
article { border: 1px solid var(--line); border-radius: .4rem; padding: .6rem .9rem;
  margin: .8rem 0; overflow-wrap: anywhere }
pre { white-space: pre-wrap; margin: .3rem 0; background: var(--fill); padding: .4rem .6rem }
.good { color: var(--blue) } .bad { color: var(--red) } code { overflow-wrap: anywhere }
"""


def curve(rows: list[dict], name: str) -> str:
    """One small picture: the numbers of each step, and their mean over a fiftieth of the run."""
    points = [(r["step"], r[name]) for r in rows if isinstance(r.get(name), (int, float))]
    if len(points) < 2:
        return ""
    steps, values = zip(*points, strict=True)
    low, high, half = min(values), max(values), len(values) // 50
    means = [sum(part) / len(part) for i in range(len(values))
             if (part := values[max(0, i - half):i + half + 1])]

    def line(ys) -> str:
        return " ".join(f"{300 * (x - steps[0]) / (steps[-1] - steps[0]):.1f},"
                        f"{95 - 90 * (y - low) / (high - low or 1):.1f}"
                        for x, y in zip(steps, ys, strict=True))
    return (f'<figure><svg viewBox="0 0 300 100" role="img" aria-label="{escape(name)}">'
            f'<polyline class="raw" points="{line(values)}"/>'
            f'<polyline class="smooth" points="{line(means)}"/></svg><figcaption><b>{escape(name)}'
            f'</b>: {values[0]:.4g} → {values[-1]:.4g}, from {low:.4g} to {high:.4g}, steps '
            f'{steps[0]}–{steps[-1]}</figcaption></figure>')


def html_table(head: list[str], rows: list[list[str]]) -> str:
    return ('<div class="wide"><table><tr>' + "".join(f"<th>{escape(h)}</th>" for h in head)
            + "</tr>" + "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>"
                                for row in rows) + "</table></div>")


def answer(label: str, row: dict) -> str:
    good = row["greedy_score"] == 1
    return (f'<div><span class="{"good" if good else "bad"}">{"✓" if good else "✗"} '
            f'{escape(label)}</span><pre>{escape(row["greedy"])}</pre></div>')


def as_html(report: dict, logs: dict, chats: dict) -> str:
    title = f"{report['name']}: seed {report['seed']}, {report['total_seconds'] / 60:.1f} minutes"
    evaluated = [s for s in report["stages"] if s["metrics"]]
    parts = [f"<h1>{escape(title)}</h1>"]
    for metric in ("pass@1", "greedy") if evaluated else ():
        domains = list(evaluated[0]["metrics"][metric])
        n = evaluated[0]["metrics"][metric]["total"]["n"]
        label = metric.replace("pass@1", report["sampled"])
        parts += [f"<h2>{label} on {n} held-out queries, % [95% interval]</h2>",
                  html_table(["stage", *domains], [
                      [s["name"], *(cell(s["metrics"][metric][d]) for d in domains)]
                      for s in evaluated])]
    if report["gains"]:
        parts += ["<h2>Gains, query by query, in points</h2>", html_table(
            ["from", "to", report["sampled"], "greedy"],
            [[g["from"], g["to"], cell(g["pass@1"], "+.1f"), cell(g["greedy"], "+.1f")]
             for g in report["gains"]])]
    parts += ["<h2>Stages</h2>", html_table(
        ["stage", "seconds", "peak MB", "command"], stage_rows(report)), "<h2>Curves</h2>"]
    for name, rows in logs.items():
        if figures := "".join(curve(rows, metric) for metric in CURVES[name]):
            parts.append(f'<h3>{name}</h3><div class="grid">{figures}</div>')
    if "sft" in chats and "grpo" in chats:
        for label, sign in (("Learned", 1), ("Lost", -1)):
            n, pairs = turned(chats["sft"], chats["grpo"], sign)
            parts.append(f"<h2>{label} between SFT and GRPO: {n} queries</h2>")
            parts += [f"<article><b>{escape(a['prompt'])}</b>{answer('SFT', a)}{answer('GRPO', b)}"
                      "</article>" for a, b in pairs]
    if chats:
        last = list(chats)[-1]
        wrong = [row for row in chats[last] if row["greedy_score"] < 1]
        parts.append(f"<h2>Still wrong after {last}: {len(wrong)} queries</h2>")
        for domain in sorted({row["domain"] for row in wrong}):
            for row in [row for row in wrong if row["domain"] == domain][:2]:
                check = json.dumps(row["check"], ensure_ascii=False)
                parts.append(f"<article><b>{escape(row['prompt'])}</b>{answer(last, row)}"
                             f'<div class="soft">{domain}; checked by {escape(check)}</div>'
                             "</article>")
    return ('<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
            f'content="width=device-width"><title>{escape(title)}</title><style>{STYLE}</style>'
            "</head><body>" + "\n".join(parts) + "</body></html>\n")


# ---------------------------------------------------------------------------------------------

def main(args: Args) -> dict:
    root = Path(args.run)
    report, logs, chats = collect(root)
    markdown = as_markdown(report, root, chats)
    write_atomic(root / "report.json", json.dumps(report, indent=1))
    write_atomic(root / "report.md", markdown)
    write_atomic(root / "report.html", as_html(report, logs, chats))
    print("\n".join(markdown.splitlines()[:40]))
    print(f"\nwritten: {', '.join(str(root / f'report.{end}') for end in ('md', 'html', 'json'))}")
    return report


if __name__ == "__main__":
    cli(main, Args)
