"""Draws the pictures of docs/ from the code itself and from finished runs (needs matplotlib):

    python docs/pictures.py --run runs/demo --moe runs/moe

--run: what `make demo` left; --moe: `pretrain.py --model tiny-moe` (lesson 2). Black on white with
few colours: they are read on paper too."""
import math
import sys
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path
from pydoc_data.topics import topics

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import matplotlib
import torch

import kernels
import tasks.queries
from lib.args import cli
from lib.files import read_json, read_jsonl
from grpo import group_advantages, shaped_reward
from model import Config, rope_frequencies
from reward import RewardModel
from sample import load_policy, rollout
from tokenizer import Tokenizer, count_pretokens, train_bpe

matplotlib.use("Agg")
import matplotlib.pyplot as plt

IMG = Path(__file__).parent / "img"
BLUE, RED, GREY = "#2b6cb0", "#c05621", "#a0aec0"


@dataclass
class Args:
    run: str = "runs/demo"           # directory of a demo
    moe: str = "runs/moe"            # run of a small MoE


def axes(width=5.2, height=2.6, **kwargs):
    fig, axis = plt.subplots(figsize=(width, height), **kwargs)
    for one in [axis] if not hasattr(axis, "__len__") else axis:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(alpha=0.25, lw=0.5)
        one.tick_params(labelsize=8)
    return axis


def save(name: str) -> None:
    plt.tight_layout()
    plt.savefig(IMG / f"{name}.png", dpi=130, metadata={"Software": None})
    plt.close()
    print(IMG / f"{name}.png")


def log(path) -> list[dict]:
    return [row for _, row in read_jsonl(Path(path) / "log.jsonl")]


def smooth(values, n=9):
    return [sum(part) / len(part) for i in range(len(values))
            if (part := values[max(0, i - n):i + n + 1])]


def vocabulary() -> None:
    texts = [text for _, text in sorted(topics.items())]
    held_out, train = "\n".join(texts[::5]), [t for i, t in enumerate(texts) if i % 5]
    merges = train_bpe(count_pretokens(train), 3800)
    sizes = [256, 300, 400, 512, 768, 1024, 1536, 2048, 3072, 4078]
    tokens = [bytes([b]) for b in range(256)] + [a + b for a, b in merges]
    per_token = []
    for size in sizes:
        tokenizer = Tokenizer({t: i for i, t in enumerate(tokens[:size])},
                              merges=merges[:size - 256])
        per_token.append(len(held_out.encode()) / len(tokenizer.encode(held_out)))
    axis = axes()
    axis.plot(sizes, per_token, "o-", color=BLUE, ms=4)
    axis.set_xscale("log", base=2)
    axis.set_xlabel("tokens in the vocabulary")
    axis.set_ylabel("bytes per unseen token")
    save("01-vocabulary")


def wavelengths() -> None:
    axis, config = axes(), Config(hidden_size=128, num_attention_heads=1, num_key_value_heads=1)
    for label, colour, c in (
            ("RoPE, base 10,000", GREY, replace(config, rope_theta=1e4)),
            ("RoPE, base 1,000,000", BLUE, config),
            ("the same with YaRN, factor 4", RED, replace(config, yarn_factor=4.0))):
        axis.plot(2 * math.pi / rope_frequencies(c)[0], label=label, color=colour)
    axis.axhline(32768, color="black", lw=0.8, ls="--")
    axis.text(0, 45000, "training length 32,768", fontsize=7)
    axis.set_yscale("log")
    axis.set_xlabel("pair of dimensions")
    axis.set_ylabel("wavelength, tokens")
    axis.legend(fontsize=7, frameon=False)
    save("02-rope")


def experts(path: str) -> None:
    rows, axis = log(path), axes()
    for layer in range(len(rows[0]["expert_max"])):
        steps = [row["step"] for row in rows]
        axis.plot(steps, smooth([row["expert_max"][layer] for row in rows]), color=RED, lw=1,
                  label="busiest expert" if not layer else "")
        axis.plot(steps, smooth([row["expert_min"][layer] for row in rows]), color=BLUE, lw=1,
                  label="idlest expert" if not layer else "")
    axis.axhline(1, color="black", lw=0.8, ls="--")
    axis.set_xlabel("step")
    axis.set_ylabel("load / fair share")
    axis.set_title("a line for each layer", fontsize=8)
    axis.legend(fontsize=7, frameon=False)
    save("02-experts")


def loss(root: Path) -> None:
    rows, axis = log(root / "pretrain"), axes()
    axis.plot([r["tokens"] for r in rows], [r["loss"] for r in rows], color=GREY, lw=0.5)
    axis.plot([r["tokens"] for r in rows], smooth([r["loss"] for r in rows], 25), color=BLUE)
    axis.axhline(math.log(2048), color="black", lw=0.8, ls="--")
    axis.text(rows[-1]["tokens"] * 0.7, math.log(2048) - 0.6, "ln 2,048", fontsize=7)
    axis.set_xlabel("tokens")
    axis.set_ylabel("loss, nats per token")
    save("03-loss")


def mask(root: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(root / "sft")
    messages = [
        {"role": "system", "content": "Be brief."},
        *tasks.queries.demonstrations(4)[0]["messages"],
    ]
    ids, flags = tokenizer.render(messages)
    _, axis = plt.subplots(figsize=(7, 2.4))
    axis.axis("off")
    x, y = 0.0, 0.0
    for i, flag in zip(ids, flags, strict=True):
        text = tokenizer.decode([i]).replace("\n", "⏎").replace(" ", "·")
        width = 0.9 + 0.72 * len(text)
        if x + width > 84:
            x, y = 0.0, y - 1.5
        axis.add_patch(plt.Rectangle((x, y), width - 0.2, 1.15, ec="white",
                                     fc="#f6c89f" if flag else "#e2e8f0"))
        axis.text(x + width / 2 - 0.1, y + 0.52, text, ha="center", va="center", fontsize=7,
                  family="monospace")
        x += width
    axis.text(0, y - 1.3, "orange: trained (mask 1), the end of the turn included; grey: only read",
              fontsize=8)
    axis.set_xlim(0, 85)
    axis.set_ylim(y - 2, 1.5)
    save("04-mask")


def margins(root: Path) -> None:
    rows, (left, right) = log(root / "dpo"), axes(7, 2.6, ncols=2)
    steps = [r["step"] for r in rows]
    left.plot(steps, [r["reward_chosen"] for r in rows], color=BLUE, label="chosen")
    left.plot(steps, [r["reward_rejected"] for r in rows], color=RED, label="rejected")
    left.axhline(0, color="black", lw=0.8, ls="--")
    left.set_ylabel("implicit reward")
    left.legend(fontsize=7, frameon=False)
    right.plot(steps, [r["accuracy"] for r in rows], color=BLUE)
    right.set_ylabel("share of pairs in order")
    right.set_ylim(0, 1.02)
    for axis in (left, right):
        axis.set_xlabel("step")
    save("05-margins")


def rewards(root: Path, policy, tokenizer, reward_model):
    queries = tasks.queries.builtin("val", 96, 0)
    groups = rollout(policy, tokenizer, queries, 8, 128, 1.0, 0, tasks.queries.score_many)
    answers = [a for group in groups for a in group]
    scores = reward_model.score([a.prompt_ids for a in answers], [a.ids for a in answers])
    scores = torch.tensor(scores).view(len(groups), 8)
    right = torch.tensor([[a.score == 1 for a in group] for group in groups])
    gaps = torch.cat([(row[good][:, None] - row[~good]).flatten()
                      for row, good in zip(scores, right, strict=True)])
    axis = axes()
    axis.hist(gaps.tolist(), bins=40, color=BLUE, alpha=0.7)
    axis.axvline(0, color="black", lw=0.8, ls="--")
    axis.set_title(f"in order: {(gaps > 0).float().mean():.0%} of {len(gaps)} pairs", fontsize=8)
    axis.set_xlabel("reward of a right answer less that of a wrong one")
    axis.set_ylabel("pairs")
    save("06-rewards")
    return groups, scores


def advantages(groups, scores) -> None:
    """Of the group with half of its answers right whose texts are shortest."""
    def badness(i):
        return (abs(sum(a.score for a in groups[i]) - 4), sum(len(a.text) for a in groups[i]))
    i = min(range(len(groups)), key=badness)
    verified = torch.tensor([[a.score for a in groups[i]]])
    values = group_advantages(shaped_reward(verified, scores[i:i + 1]), "none")[0].tolist()
    order = sorted(range(8), key=values.__getitem__)
    _, axis = plt.subplots(figsize=(7, 2.9))
    axis.barh(range(8), [values[j] for j in order],
              color=[BLUE if groups[i][j].score == 1 else RED for j in order])
    texts = [groups[i][j].text.replace("\n", " ")[:52] for j in order]
    axis.set_yticks(range(8), texts, fontsize=7, family="monospace")
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(textwrap.fill(groups[i][0].query["prompt"], 120), fontsize=7, x=0.2)
    axis.set_xlabel("advantage (blue: right, red: wrong)", fontsize=8)
    axis.tick_params(axis="x", labelsize=8)
    save("07-advantages")


def blocks() -> None:
    lengths, total = [300, 900, 150, 500, 198], 2048
    segments = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None]
    q = torch.zeros(1, 1, total, 16)
    _, panels = plt.subplots(1, 2, figsize=(6, 3.1))
    titles = "one document", "five packed"
    for axis, ids, title in zip(panels, (None, segments), titles, strict=True):
        n = 0
        for i, j, keep, _ in kernels.query_blocks(q, q, ids, None):
            high, masked = i.stop - i.start, j.stop - keep.shape[-1]
            n += high * (j.stop - j.start)
            for a, b, color in ((j.start, masked, BLUE), (masked, j.stop, "#90cdf4")):
                axis.add_patch(plt.Rectangle((a, i.start), b - a, high, ec="white", fc=color))
        axis.set_title(f"{title}: {n / total ** 2:.0%} of the scores", fontsize=8)
        axis.set_xlim(0, total)
        axis.set_ylim(total, 0)
        axis.set_aspect("equal")
        axis.tick_params(labelsize=7)
        axis.set_xlabel("key", fontsize=8)
        axis.set_ylabel("query", fontsize=8)
    save("08-blocks")


STYLE = """
  text { font: 13px system-ui, sans-serif; fill: #1a202c; text-anchor: middle }
  .name { font-weight: 600; font-size: 13.5px }
  .small { font-size: 12px; fill: #4a5568 }
  rect { fill: #ebf4ff; stroke: #2b6cb0 }
  path { stroke: #718096; stroke-width: 1.5; fill: none; marker-end: url(#tip) }
  marker path { fill: #718096; stroke: none; marker-end: none }
  @media (prefers-color-scheme: dark) {
    text { fill: #edf2f7 } .small { fill: #a0aec0 } rect { fill: #1a365d; stroke: #63b3ed }
  }"""


def pipeline(root: Path) -> None:
    """Draw README's picture: each stage with its file, its section of the report, the seconds that
    it took in the demo's run, and what its model then passes. An SVG, because that can follow the
    reader's dark mode."""
    data = root / "data" / "report.json"
    tokenizer_seconds = (root / "tokenizer" / "vocab.json").stat().st_mtime - data.stat().st_mtime
    stages = [("corpus", "data/", "3.1", read_json(data)["seconds"], ""),
              ("tokenizer", "tokenizer.py", "2", tokenizer_seconds, "")]
    for name, title, section in (
            ("pretrain", "pre-training", "3.1"), ("sft", "SFT", "4.1"), ("dpo", "DPO", "4.2"),
            ("reward", "reward model", "4.3"), ("grpo", "GRPO", "4.3")):
        evaluation, passed = root / "evaluation" / name / "eval.json", ""
        if evaluation.exists():
            total = read_json(evaluation)["metrics"]["pass@1"]["total"]
            passed = f"passes {100 * total['mean']:.0f}%"
        seconds = read_json(root / name / "run.json")["seconds"]
        stages.append((title, f"{name}.py", section, seconds, passed))
    parts = []
    for i, (title, file, section, seconds, passed) in enumerate(stages):
        x = 4 + 126 * i
        parts.append(f'<rect x="{x}" y="4" width="108" height="106" rx="8"/>')
        if i > 0:
            parts.append(f'<path d="M{x - 17} 57 h10"/>')
        lines = (("name", 26, title), ("", 47, file), ("small", 66, f"report {section}"),
                 ("small", 84, f"{seconds:.0f} s"), ("", 103, passed))
        for kind, y, text in lines:
            parts.append(f'<text class="{kind}" x="{x + 54}" y="{y}">{text}</text>')
    tip = ('<marker id="tip" viewBox="0 0 6 6" refX="5" refY="3" markerWidth="6" markerHeight="6" '
           'orient="auto"><path d="M0 0 L6 3 L0 6 z"/></marker>')
    body = "\n".join(parts)
    (IMG / "pipeline.svg").write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 872 114" width="872">\n'
        f"<style>{STYLE}</style>\n<defs>{tip}</defs>\n{body}\n</svg>\n", encoding="utf-8")
    print(IMG / "pipeline.svg")


def main(args: Args) -> None:
    IMG.mkdir(exist_ok=True)
    root = Path(args.run)
    pipeline(root)
    vocabulary()
    wavelengths()
    experts(args.moe)
    loss(root)
    mask(root)
    margins(root)
    policy, tokenizer = load_policy(root / "sft", "cpu")
    advantages(*rewards(root, policy, tokenizer, RewardModel.from_pretrained(root / "reward")))
    blocks()


if __name__ == "__main__":
    cli(main, Args)
