"""How time and memory grow: one training step of our model against length, batch, vocabulary,
experts and parameters, each alone, with the exponent of a power law fitted to each curve.

    python bench/scaling_curves.py [--png curves.png] [--tiny]

Every point is a process of its own on one thread: CPU seconds of a step (forward, backward, AdamW;
the median of three) and the peak of its memory above the process with torch loaded. The exponent is
the slope of a straight line through log(measure) over log(x): 0 is constant, 1 proportional, 2
square. Over the whole curve it mixes a constant part with the law, so the slope between the last
two points stands beside it. Tables go to the screen and, with --out, to the end of a file;
matplotlib draws --png.
"""
import argparse
import json
import math
import subprocess
import sys

import harness
from harness import SMALL, memory, timed

EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=64, shared_expert_intermediate_size=64)
WIDTHS = {64: 1, 128: 2, 256: 4, 384: 6}                       # hidden size: heads
CURVES = {  # name: (unit, points, x -> (shape, batch, T))
    "length": ("tokens a row", (256, 512, 1024, 2048, 4096), lambda x: ({}, 1, x)),
    "batch": ("rows of 128", (1, 2, 4, 8, 16, 32), lambda x: ({}, x, 128)),
    "vocabulary": ("ids", (2048, 8192, 32768, 131072), lambda x: ({"vocab_size": x}, 2, 128)),
    "experts": ("experts, 2 active", (2, 4, 8, 16, 32),
                lambda x: (EXPERTS | {"num_experts": x}, 4, 256)),
    "parameters": ("hidden size, 4 layers", tuple(WIDTHS), lambda x: (
        {"hidden_size": x, "intermediate_size": x * 43 // 16 // 8 * 8, "vocab_size": 1024,
         "num_attention_heads": WIDTHS[x], "num_key_value_heads": 1}, 4, 256))}


def point(curve, x):
    """-> {x: parameters for the last curve, CPU s, MB}."""
    harness.ours()
    import torch

    import pretrain
    from lib.optim import adamw, clip_and_step, keep_freed_memory
    from model import Config, Qwen2
    keep_freed_memory()
    torch.set_num_threads(1)
    before = memory(reset=True)
    shape, batch, T = CURVES[curve][2](x)
    model = Qwen2(Config(**(SMALL | shape), max_position_embeddings=T, tie_word_embeddings=True))
    optimizer = adamw(model, 1e-4, 0.1)
    ids = torch.randint(model.config.vocab_size, (batch, T + 1))

    def step():
        pretrain.lm_loss(model, ids, None, ids[:, 1:].numel(), None).backward()
        clip_and_step(model, optimizer, 1e-4, 1.0)
    seconds = timed(step)["cpu"]
    size = model.count_parameters()["total"]
    return {"x": size if curve == "parameters" else x, "s": seconds,
            "MB": memory(peak=True) - before}


def slope(xs, ys):
    """Least squares of log y over log x."""
    xs, ys = ([math.log(v) for v in values] for values in (xs, ys))
    x0, y0 = sum(xs) / len(xs), sum(ys) / len(ys)
    return (sum((x - x0) * (y - y0) for x, y in zip(xs, ys, strict=True))
            / sum((x - x0) ** 2 for x in xs))


def table(rows):
    """rows {curve: [points]} -> lines of Markdown."""
    lines = ["| against | points | CPU s a step | exponent (last two) | MB | exponent (last two) |",
             "|---|---|---|---|---|---|"]
    for curve, points in rows.items():
        xs, unit = [p["x"] for p in points], CURVES[curve][0]
        cells = [f"{curve} ({'parameters' if curve == 'parameters' else unit})",
                 ", ".join(f"{x:,}" for x in xs)]
        for key, form in ("s", ".3g"), ("MB", ",.0f"):
            ys = [p[key] for p in points]
            cells += [", ".join(format(y, form) for y in ys),
                      f"{slope(xs, ys):.2f} ({slope(xs[-2:], ys[-2:]):.2f})"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def draw(rows, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(2, len(rows), figsize=(3 * len(rows), 5.5), layout="tight")
    for column, (curve, points) in zip(axes.T, rows.items(), strict=True):
        for axis, key, label in zip(column, ("s", "MB"), ("CPU s a step", "MB"), strict=True):
            xs, ys = [p["x"] for p in points], [p[key] for p in points]
            axis.loglog(xs, ys, "o-")
            axis.minorticks_off()
            axis.set_yticks(ys, [f"{y:.3g}" for y in ys])
            axis.set(title=f"{curve}: exponent {slope(xs, ys):.2f}", xlabel=curve, ylabel=label)
    figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(description="Scaling curves")
    parser.add_argument("--png", default="", help="draw the curves to this file (needs matplotlib)")
    parser.add_argument("--out", default="", help="append the table to this file")
    parser.add_argument("--tiny", action="store_true", help="the first two points of each curve")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(point(args.worker[0], int(args.worker[1]))))
        return
    rows = {}
    for curve, (_, xs, _) in CURVES.items():
        for x in xs[:2] if args.tiny else xs:
            done = subprocess.run([sys.executable, __file__, "--worker", curve, str(x)], text=True,
                                  stdout=subprocess.PIPE, check=True)
            rows.setdefault(curve, []).append(json.loads(done.stdout))
            print(f"  {curve} {x}: {rows[curve][-1]['s']:.3f} CPU s", flush=True)
    lines = ["## Scaling curves", "", f"`python bench/scaling_curves.py`. {harness.machine()}.", "",
             *table(rows), ""]
    print("\n".join(lines))
    if args.out:
        with open(args.out, "a", encoding="utf-8") as file:
            file.write("\n" + "\n".join(lines))
    if args.png:
        draw(rows, args.png)


if __name__ == "__main__":
    main()
