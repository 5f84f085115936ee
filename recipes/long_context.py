"""Long context on a laptop: what the report's section 3.3 does to 32K and 1M, at 256 to 2,048.

Qwen2.5 goes from 4,096 tokens with RoPE base 10,000 to 32,768 with base 1,000,000 (ABF), and is
stretched 4x at inference. Qwen2.5-Turbo grows in four stages instead, to 262,144. Here STAGES are
four lengths with a RoPE base each, through which the demo's base model goes one after another: in
every stage 40% of the sequences have the current maximum, as Turbo's. After each stage, and for the
shortcuts that skip the training (YaRN, and dual chunk attention with YaRN's temperature), this
measures

  - the loss by position on real text of 2,048 tokens, and
  - a needle grid: a line "The code is 47." somewhere in so much real text, asked at its end; the
    share of answers with both digits right, by length and by depth of the line.

The real text is Python's own sources, here of modules that neither the demo nor this recipe trains
on: what the corpus of data/ holds beyond the 3 MB that the demo reads.

    python recipes/long_context.py                     # after `make demo`

(From scratch, 3 million tokens did not teach a model of this size to look a code up, see LOG.md,
"a small model that finds needles": the demo's model can, because its questions need it.)

Writes table.md, result.json and, with matplotlib, long_context.png to --out.
"""
import json
import math
import random
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lib import checkpoint  # noqa: E402
from data import corpus  # noqa: E402
import kernels  # noqa: E402
import pretrain  # noqa: E402
from lib.args import cli, positive, require  # noqa: E402
from lib.files import write_atomic, write_jsonl  # noqa: E402
from lib.long_context import extended  # noqa: E402
from lib.optim import setup  # noqa: E402
from model import Config, Qwen2  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402

# (length, RoPE base): Turbo's lengths / 128. Its report gives one base, 1e7; that the base grows
# with the length is Qwen2.5-1M's way, and these values are our choice.
STAGES = ((256, 1e4), (512, 1e6), (1024, 5e6), (2048, 1e7))
TRAINED = tuple(length for length, _ in STAGES)
SHORT, FARTHEST = TRAINED[0], TRAINED[-1]
LENGTHS, DEPTHS = (128, 256, 512, 1024, 2048), (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass
class Args:
    out: str = "runs/long_context"   # where everything goes; what is there is replaced
    init: str = "runs/demo/pretrain"  # base model to start from
    tokens: int = 1_500_000          # of the first stage
    more_tokens: int = 500_000       # of each further stage
    n: int = 40                      # needle questions a cell
    texts: int = 24                  # held-out texts for the loss by position
    seed: int = 0                    # of everything
    device: str = "auto"             # auto, cpu, cuda[:N]
    dtype: str = "auto"              # auto, float32, bfloat16


# ---------------------------------------------------------------------------------------------
# data

def filler(r, text: str, n_chars: int) -> list[str]:
    """Consecutive lines of real text, n_chars in all."""
    at = r.randrange(max(1, len(text) - n_chars))
    return text[at:at + n_chars].split("\n")


def needle(r, lines: list[str], depth: float) -> tuple[str, str]:
    """Hide a code in the lines, at 0 = before all of them, 1 = after -> (text, the answer)."""
    line, lines = f"The code is {r.randrange(10)}{r.randrange(10)}.", list(lines)
    lines.insert(round(depth * len(lines)), line)
    return "\n".join(lines), "\n" + line


def needle_text(r, tokenizer, book: str, n_tokens: int, depth: float) -> str:
    """A needle document of about n_tokens; the end of the filler is cut to fit."""
    room = n_tokens - 2 * len(tokenizer.encode("\nThe code is 47."))
    ids = tokenizer.encode("\n".join(filler(r, book, n_tokens * 8)))[:room]
    return "".join(needle(r, tokenizer.decode(ids).split("\n"), depth))


def training_documents(r, tokenizer, book: str, longest: int, n_tokens: int):
    """Needle documents. Of their tokens, 40% stand in documents that fill a row of `longest` + 1
    with their end token exactly (a longer one would lose its question), the others in shorter ones,
    whose lengths are spread evenly in the logarithm."""
    full_tokens = shorter_tokens = 0
    missing = 0  # tokens by which the last document that should fill a row was too short
    while full_tokens + shorter_tokens < n_tokens:
        if full_tokens <= 0.4 * (full_tokens + shorter_tokens):
            text = needle_text(r, tokenizer, book, longest + missing, r.random())
            size = len(tokenizer.encode(text))
            if size != longest:  # tokens were joined where the needle was put in
                missing += longest - size
                continue
            full_tokens += size
        else:
            wanted = int(2 ** r.uniform(5, math.log2(longest - 20)))
            text = needle_text(r, tokenizer, book, wanted, r.random())
            shorter_tokens += len(tokenizer.encode(text))
        yield {"text": text, "source": "needles"}


def write_data(args: Args, tokenizer) -> list[str]:
    """-> real texts that nothing here trains on; writes the training files of all stages."""
    demo, more = (corpus.builtin_corpus(args.seed, mb) for mb in (3.0, 8.0))  # one begins the other
    train = [doc["text"] for doc in demo["stdlib_code"] if len(doc["text"]) > 300]
    unseen = [doc["text"] for doc in more["stdlib_code"][len(demo["stdlib_code"]):]]
    # Whole files for the rows of full length, and their functions for the shorter documents.
    parts = [part for text in train for part in text.split("\n\n\n") if len(part) > 100]
    for length in TRAINED:
        n_tokens = (args.tokens if length == SHORT else args.more_tokens) // 2
        where, r = Path(args.out) / f"data{length}", random.Random(f"{args.seed} {length}")
        write_jsonl(where / "text.jsonl", ({"source": "text", "text": t} for t in train + parts))
        write_jsonl(where / "needles.jsonl",
                    training_documents(r, tokenizer, "\n".join(train), length, n_tokens))
    return unseen


# ---------------------------------------------------------------------------------------------
# measurements

@torch.no_grad()
def loss_by_position(model: Qwen2, rows: torch.Tensor) -> torch.Tensor:
    """rows (n, T+1) -> mean loss of each of the T positions."""
    total = 0.0
    for row in rows.split(4):
        hidden = model.hidden(row[:, :-1])
        total = total + kernels.linear_cross_entropy(hidden, model.head_weight, row[:, 1:],
                                                     reduction="none").sum(0)
    return total / len(rows)


@torch.no_grad()
def needle_accuracy(model, tokenizer, book: str, length: int, depth: float, n: int,
                    seed: int) -> float:
    """Share of n questions, of about `length` tokens, whose two digits are the likeliest tokens."""
    right, r = 0, random.Random(f"{seed} {length} {depth}")
    for _ in range(n):
        text = needle_text(r, tokenizer, book, length, depth)
        ids = torch.tensor([tokenizer.encode(text)], device=model.head_weight.device)
        assert 0.9 * length < ids.shape[1] < 1.1 * length, (ids.shape, length)
        # The text ends in two digits and a full stop, one token each.
        logits = model.hidden(ids[:, :-1])[0, -3:-1] @ model.head_weight.T
        right += int((logits.argmax(-1) == ids[0, -3:-1]).all())
    return right / n


def measure(model, tokenizer, rows, book: str, args: Args) -> dict:
    losses = loss_by_position(model, rows)
    edges = [0, *TRAINED]
    grid = [[needle_accuracy(model, tokenizer, book, length, depth, args.n, args.seed)
             for depth in DEPTHS] for length in LENGTHS]
    return {"loss": [losses[a:b].mean().item() for a, b in zip(edges, edges[1:], strict=False)],
            "curve": losses.view(-1, 64).mean(1).tolist(), "needle": grid}


# ---------------------------------------------------------------------------------------------

def table(results: dict[str, dict]) -> str:
    lines = ["| | loss at 0-255 | 256-511 | 512-1023 | 1024-2047 | "
             + " | ".join(f"needle {n}" for n in LENGTHS) + " |", "|---" * (5 + len(LENGTHS)) + "|"]
    for name, r in results.items():
        cells = [f"{x:.2f}" for x in r["loss"]]
        cells += [f"{100 * sum(row) / len(row):.0f}" for row in r["needle"]]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(results: dict[str, dict], path: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig = plt.figure(figsize=(12, 6.4), layout="constrained")
    top, bottom = fig.subfigures(2, 1, height_ratios=(1.25, 1))
    axis = top.subplots()
    for name, r in results.items():
        axis.plot([64 * i + 32 for i in range(len(r["curve"]))], r["curve"], lw=1.2, label=name)
    for x in TRAINED[:-1]:
        axis.axvline(x, color="grey", lw=0.8, ls=":")
    axis.set(xlabel="position (dotted: the training lengths)", ylabel="loss")
    axis.legend(fontsize=8, ncol=2)
    for axis, (name, r) in zip(bottom.subplots(1, len(results)), results.items(), strict=True):
        axis.imshow(torch.tensor(r["needle"]).T, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axis.set_xticks(range(len(LENGTHS)), LENGTHS, fontsize=7, rotation=45)
        axis.set_yticks(range(len(DEPTHS)), [f"{d:.0%}" for d in DEPTHS], fontsize=7)
        axis.set_title(name, fontsize=8)
    bottom.supylabel("depth of the needle", fontsize=8)
    bottom.supxlabel("tokens", fontsize=8)
    fig.savefig(path, dpi=110)


def main(args: Args) -> None:
    positive(args, "tokens", "more_tokens", "n", "texts")
    out = Path(args.out)
    trained = checkpoint.read_config(args.init, Config).trained_length
    require(trained <= SHORT,
            f"--init {args.init} was trained at {trained} tokens, more than {SHORT}")
    tokenizer = Tokenizer.from_pretrained(args.init)
    unseen = write_data(args, tokenizer)
    init = args.init
    for length, base in STAGES:
        pretrain.main(pretrain.Args(
            out=str(out / f"stage{length}"), init=init, data=str(out / f"data{length}"),
            seq_len=length, rope_theta=base, long_share=0.4, weights="text=0.5,needles=0.5",
            tokens=args.tokens if length == SHORT else args.more_tokens,
            lr=1e-3 if length == SHORT else 5e-4, batch_tokens=max(1024, length),
            eval_every=10**6, seed=args.seed, device=args.device, dtype=args.dtype, overwrite=True))
        init = str(out / f"stage{length}")

    device, autocast = setup(args)
    rows = [tokenizer.encode(text)[:FARTHEST + 1] for text in unseen if len(text) > 3 * FARTHEST]
    rows = torch.tensor([row for row in rows if len(row) > FARTHEST][:args.texts], device=device)
    book = "\n".join(unseen)
    ways = {  # name: (length of the stage, changes of its model's config)
        "trained at 256": (256, lambda c: c),
        "theta 1e6, no training": (256, lambda c: replace(c, rope_theta=1e6)),
        "YaRN 8x, no training": (256, lambda c: extended(c, yarn=8.0)),
        "then 512, theta 1e6": (512, lambda c: c),
        "  and YaRN 4x": (512, lambda c: extended(c, yarn=4.0)),
        "  and DCA + temperature, 4x": (512, lambda c: extended(c, dca=True)),
        "then 1,024, theta 5e6": (1024, lambda c: c),
        "then 2,048, theta 1e7": (2048, lambda c: c),
    }
    results = {}
    for name, (length, change) in ways.items():
        model = Qwen2.from_pretrained(out / f"stage{length}", device=device)
        model.config = change(model.config)
        with autocast:
            results[name.strip()] = measure(model, tokenizer, rows, book, args)
        print(table(results).splitlines()[-1], flush=True)
    text = f"{len(rows)} texts, {args.n} questions a cell, 5 depths, seed {args.seed}\n\n"
    write_atomic(out / "result.json", json.dumps(results, indent=1))
    write_atomic(out / "table.md", text + table(results) + "\n")
    plot(results, out / "long_context.png")
    print(text + table(results))


if __name__ == "__main__":
    cli(main, Args)
