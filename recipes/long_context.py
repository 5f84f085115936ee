"""Long context on a laptop: what the report's section 3.3 does to 32K and 128K, at 256 to 2,048.

The demo's base model goes on at 256 tokens with RoPE base 10,000, then at 512 with base 1,000,000
(ABF), and at inference is stretched 4x, to 2,048, by YaRN or by dual chunk attention (DCA) with
YaRN's temperature. For each way, and for the shortcuts that skip the training, this measures

  - the loss by position on real text of 2,048 tokens, and
  - a needle grid: a line "The code is 47." somewhere in so much real text, asked at its end; the
    share of answers with both digits right, by length and by depth of the line.

The real text is Python's own sources, here of modules that neither the demo nor this recipe trains
on: what the corpus of data/ holds beyond the 3 MB that the demo reads.

    python recipes/long_context.py                     # after `make demo`; 10 minutes on one core

(From scratch, 3 million tokens did not teach a model of this size to look a code up, see LOG.md,
"a small model that finds needles": the demo's model can, because its questions need it.)

Writes table.md, result.json and, with matplotlib, long_context.png to --out.
"""
import json
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
from lib.optim import setup  # noqa: E402
from model import Config, Qwen2  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402

SHORT, LONG, FARTHEST = 256, 512, 2048
LENGTHS, DEPTHS = (128, 256, 512, 1024, 2048), (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass
class Args:
    out: str = "runs/long_context"   # where everything goes; what is there is replaced
    init: str = "runs/demo/pretrain"  # base model to start from
    tokens: int = 1_500_000          # of the training at 256
    more_tokens: int = 500_000       # of the training at 512
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


def training_documents(r, texts: list[str], longest: int, n_bytes: int):
    """Needle documents of up to about `longest` tokens of 3 bytes."""
    while n_bytes > 0:
        size = int(2 ** r.uniform(4, (longest * 3).bit_length()))
        lines = filler(r, r.choice(texts), min(size, longest * 3 - 60))
        text = "".join(needle(r, lines, r.random()))
        yield {"text": text}
        n_bytes -= len(text)


def write_data(args: Args) -> list[str]:
    """-> real texts that nothing here trains on; writes the training files of both stages."""
    demo, more = (corpus.builtin_corpus(args.seed, mb) for mb in (3.0, 8.0))  # one begins the other
    train = [doc["text"] for name in ("stdlib_code", "stdlib_docstrings") for doc in demo[name]]
    train = [text for text in train if len(text) > 300]
    unseen = [doc["text"] for doc in more["stdlib_code"][len(demo["stdlib_code"]):]]
    for length, tokens in ((SHORT, args.tokens), (LONG, args.more_tokens)):
        where, r = Path(args.out) / f"data{length}", random.Random(f"{args.seed} {length}")
        write_jsonl(where / "text.jsonl", ({"source": "text", "text": text} for text in train))
        write_jsonl(where / "needles.jsonl", ({"source": "needles", **row} for row in
                                              training_documents(r, train, length, 2 * tokens)))
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
    room = length - 2 * len(tokenizer.encode("\nThe code is 47."))
    for _ in range(n):
        lines = tokenizer.encode("\n".join(filler(r, book, length * 8)))[:room]
        text = "".join(needle(r, tokenizer.decode(lines).split("\n"), depth))
        ids = torch.tensor([tokenizer.encode(text)], device=model.head_weight.device)
        assert 0.9 * length < ids.shape[1] < 1.1 * length, (ids.shape, length)
        # The text ends in two digits and a full stop, one token each.
        logits = model.hidden(ids[:, :-1])[0, -3:-1] @ model.head_weight.T
        right += int((logits.argmax(-1) == ids[0, -3:-1]).all())
    return right / n


def measure(model, tokenizer, rows, book: str, args: Args) -> dict:
    losses = loss_by_position(model, rows)
    edges = [0, SHORT, LONG, 1024, FARTHEST]
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
    for x in (SHORT, LONG):
        axis.axvline(x, color="grey", lw=0.8, ls=":")
    axis.set(xlabel="position (dotted: the two training lengths)", ylabel="loss")
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
    unseen = write_data(args)
    short, long = out / "short", out / "long"
    common = {"batch_tokens": 1024, "weights": "text=0.5,needles=0.5", "eval_every": 10**6,
              "seed": args.seed, "device": args.device, "dtype": args.dtype, "overwrite": True}
    pretrain.main(pretrain.Args(out=str(short), init=args.init, data=str(out / f"data{SHORT}"),
                                seq_len=SHORT, tokens=args.tokens, lr=1e-3, **common))
    pretrain.main(pretrain.Args(out=str(long), init=str(short), data=str(out / f"data{LONG}"),
                                seq_len=LONG, tokens=args.more_tokens, rope_theta=1e6, lr=5e-4,
                                **common))

    device, autocast = setup(args)
    tokenizer = Tokenizer.from_pretrained(short)
    rows = [tokenizer.encode(text)[:FARTHEST + 1] for text in unseen if len(text) > 3 * FARTHEST]
    rows = torch.tensor([row for row in rows if len(row) > FARTHEST][:args.texts], device=device)
    book = "\n".join(unseen)
    ways = {  # name: (model, changes of its config)
        "trained at 256": (short, lambda c: c),
        "theta 1e6, no training": (short, lambda c: replace(c, rope_theta=1e6)),
        "YaRN 8x, no training": (short, lambda c: c.extended(yarn=8.0)),
        "theta 1e6 + training at 512": (long, lambda c: c),
        "  then YaRN 4x": (long, lambda c: c.extended(yarn=4.0)),
        "  then DCA + temperature, 4x": (long, lambda c: c.extended(dca=True)),
    }
    results = {}
    for name, (path, change) in ways.items():
        model = Qwen2.from_pretrained(path, device=device)
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
