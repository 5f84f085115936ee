"""Scaling laws: learning rate, batch size and loss as functions of model and data size (report
section 3.2).

The report measures the best learning rate and batch size for models of size N on D tokens, dense
and MoE, and at these settings compares the loss of both. It discloses neither laws nor runs. We
take the forms from open work, and fit them to open runs and to our own:

    lr* = a N^b D^c,  batch* = a N^b D^c     Step Law (arXiv 2503.04715; its batch has no N)
    L(N, D) = E + A / N^alpha + B / D^beta   Chinchilla (2203.15556), as refitted by Epoch AI
    N -> N R^g                               for an MoE, our choice: R = total / activated N

N counts the parameters that a token meets, without embedding and head. D and batch are in tokens,
C = 6 N D in FLOPs, the loss in nats per token. Another schedule gives other coefficients, so every
row of rows.csv records its settings.

    python scaling.py                            # sweep: 162 runs of micro models, then fit
    python scaling.py fit --data a.csv,b.csv     # fit again, from tables of runs
    python scaling.py plan --model 7B --tokens 18e12 --gpus 64

Expect: the method on a small scale. No law of the batch comes out, since on so few tokens the
smallest batch of the grid is best. An optimum on the edge of its grid is no measurement: it is
marked, and left out of the fit. recipes/scaling.md has a longer sweep and fits of published runs.
"""
import contextlib
import io
import math
import re
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
from tqdm import tqdm

import pretrain
from data import corpus, mixture
from lib import files, optim
from lib.args import InputError, cli, parse_value, positive, require
from lib.cells import Cell, Row, grid_rows, measure_cells, write_rows
from lib.laws import PUBLISHED, Law, fit_loss, fit_power
from lib.plan import count, plan_machines, plan_settings
from lib.run import Diverged, Run
from model import PRESETS
from tokenizer import Tokenizer


@dataclass
class Args:
    out: str = "runs/scaling"        # sweep: directory of rows.csv, log.jsonl and run.json
    data: str = ""                   # fit, plan: tables of runs, with commas (fit: --out's rows)
    bootstrap: int = 200             # resamples of the loss law; five times as many of the others
    degree: int = 3                  # of a cell's loss surface; 0: its lowest run is the optimum
    within: float = 0.01             # fit the surface to runs this close to the lowest loss
    sizes: str = "16x2,32x2,64x2"    # sweep: WIDTHxLAYERS[-moe], or presets
    tokens: str = ""                 # training tokens; sweep: a list (empty: 5e3,1e4,2e4)
    lrs: str = "2e-3,4e-3,8e-3,16e-3,32e-3,64e-3"  # sweep: grid of peak learning rates
    batches: str = "128,256,512"     # sweep: grid of batch sizes, in tokens
    seeds: int = 1                   # sweep: runs per setting; their mean loss counts
    model: str = ""                  # plan: a preset of model.py, or N as a number
    gpus: int = 8                    # plan: how many GPUs share the model (FSDP)
    micro_batch: int = 1             # plan: rows per GPU at a time
    gradient_checkpointing: bool = False  # plan: pretrain.py's --gradient_checkpointing
    lora: int = 0                    # plan: rank of adapters on a frozen base; 0: train all weights
    seq_len: int = 0                 # positions per row (0: 64 in a sweep, 4096 in a plan)
    mfu: float = 0.4                 # plan: share of the peak FLOPS that is reached, an assumption
    peak_tflops: float = 989.0       # plan: peak of one GPU (H100, bf16, dense)
    gpu_gb: float = 80.0             # plan: memory of one GPU
    seed: int = 0                    # of corpus and bootstrap, and the first of --seeds
    device: str = "auto"             # sweep: auto, cpu, cuda[:N]
    dtype: str = "auto"              # sweep: auto, float32, bfloat16
    resume: bool = False             # sweep: keep the rows in --out, train only what is missing
    overwrite: bool = False          # sweep: replace what --out holds


# --- fit: the laws of tables of runs --------------------------------------------------------------

def fit_cells(cells: list[Cell], bootstrap=200, seed=0) -> dict[str, Law]:
    """Fit lr, batch (of N and D, and as Step Law's, of D alone) and loss. If the cells do not
    determine a law, it is left out, and a line says why."""
    laws = {}
    for name, axes in (("lr", "ND"), ("batch", "ND"), ("batch(D)", "D"), ("loss", "ND")):
        target = name.removesuffix("(D)")
        inside = [c for c in cells if target not in c.edges]
        x = [[getattr(c, axis) for axis in axes] for c in inside]
        y = [getattr(c, target) for c in inside]
        try:
            if name == "loss":
                N, D = np.reshape(x, (-1, 2)).T
                laws[name] = fit_loss(N, D, y, bootstrap, seed)
            else:
                edges = len(cells) - len(inside)
                laws[name] = fit_power(axes, x, y, 5 * bootstrap, seed, edges)
        except InputError as error:
            print(f"  {name}: {error}")
    return laws


def describe(name: str, law: Law) -> None:
    """Print each coefficient of a law with its 95% interval."""
    n = len(law.y)
    print(f"  {name}: {n} cells, {law.edges} more on an edge, scatter {law.spread:.2g}")
    for key in law.names:
        value = law[key]
        low, high = law.ci(key)
        interval = f"[{low:.4g}, {high:.4g}]"
        if key in law.scales and high > 1e9 * low:  # such as E where 0 fits as well
            interval = "not determined by these cells"
        print(f"    {key:<7}{value:>10.4g}  {interval}")


def report_runs(kind: str, cells: list[Cell], args: Args) -> dict[str, Law]:
    """Print each cell's best settings and return their laws. Then predict the largest quarter of
    the cells from the others, and say which intervals held."""
    print(f"\n{kind}: best settings of {len(cells)} cells")
    print("  N         D         lr        batch     loss      settings, on an edge")
    for c in cells:
        numbers = f"{c.N:<9.4g} {c.D:<9.4g} {c.lr:<9.4g} {c.batch:<9.4g} {c.loss:<9.4g}"
        print(" ", numbers, len(c.losses), *c.edges)
    laws = fit_cells(cells, args.bootstrap, args.seed)
    for name, law in laws.items():
        describe(name, law)

    by_size = sorted(cells, key=lambda cell: cell.C)
    n_held_out = math.ceil(len(cells) / 4)
    smaller = by_size[:-n_held_out]
    largest = by_size[-n_held_out:]
    print(f"  the {n_held_out} largest held out")
    others = fit_cells(smaller, args.bootstrap, args.seed)
    others.pop("batch(D)", None)  # a cell has one batch
    for c, (name, law) in product(largest, others.items()):
        predicted = law.predict(**c.axes())
        low, high = law.interval(**c.axes())
        measured = getattr(c, name)
        verdict = "held" if low <= measured <= high else "MISSED"
        if name in c.edges:
            verdict = "on an edge"
        print(f"    N {c.N:.3g} D {c.D:<8.3g} {name:<6} {predicted:.4g} "
              f"[{low:.4g}, {high:.4g}], measured {measured:.4g}: {verdict}")
    return laws


def report_parity(cells: list[Cell], args: Args) -> dict[str, Law]:
    """Report which dense model an MoE equals by one loss law of both kinds of cells: one of R^g
    times its activated N. With g = 1 it is worth its total N, with g = 0 its activated N."""
    table = [(c.N, c.R, c.D, c.loss) for c in cells]
    N, R, D, loss = np.array(table).T
    print("\nparity: one loss law of dense and MoE cells")
    law = fit_loss(N, D, loss, args.bootstrap, args.seed, R)
    describe("loss", law)
    low, high = law.ci("g")
    for ratio in sorted(set(R) - {1}):
        worth = ratio ** law["g"]
        least = ratio ** low
        most = ratio ** high
        print(f"  an MoE of {ratio:.3g} x its activated N in all equals a dense model of "
              f"{worth:.3g} x [{least:.3g}, {most:.3g}] its activated N")
    return {"loss": law}


def fit(args: Args) -> dict[str, dict[str, Law]]:
    """Fit and print the laws of the runs in --data (default: rows.csv in --out).

    Returns {"dense", "moe", "parity": {name: law}}, as far as the tables go."""
    require(args.bootstrap > 1, f"--bootstrap must be at least 2, got {args.bootstrap}")
    rows = []
    for path in (args.data or f"{args.out}/rows.csv").split(","):
        rows += grid_rows(Path(path))
    laws = {}
    all_cells = []
    for kind in ("dense", "moe"):
        of_kind = [row for row in rows if row.kind == kind]
        cells = measure_cells(of_kind, args.degree, args.within)
        if cells:
            laws[kind] = report_runs(kind, cells, args)
            all_cells += cells
    if len(laws) == 2 and len(all_cells) > 6:  # a loss law's coefficients
        laws["parity"] = report_parity(all_cells, args)
    return laws


# --- plan -----------------------------------------------------------------------------------------

def plan(args: Args, laws: dict[str, Law] | None = None) -> dict:
    """Print and return one run: N, D, FLOPs, lr, batch and loss with intervals, where it leaves the
    fitted range and, for a preset, memory and days.

    Laws come from --data, or else from publications."""
    config = PRESETS.get(args.model)
    is_moe = config is not None and config.num_experts > 0
    if laws is None and args.data:
        laws = fit(args).get("moe" if is_moe else "dense")
    laws = laws or {}
    N = count(config)["N"] if config else parse_value("model", args.model or "0", float)
    D = parse_value("tokens", args.tokens or "0", float)
    require(N > 0 and D > 0, "plan needs --model and --tokens")
    positive(args, "gpus", "micro_batch", "mfu", "peak_tflops")
    require(args.lora >= 0, f"--lora must be a rank, or 0 to train all weights, got {args.lora}")
    out = plan_settings(N, D, laws)
    if is_moe:
        total = count(config)["non_embedding"]
        lr = PUBLISHED["lr"]["Step Law"].predict(N=total, D=D)
        print(f"  an MoE of {total:.4g}: at its total N, which fits Step Law's MoE runs better "
              f"(recipes/scaling.md), lr {lr:.3g}")
    if config:
        out |= plan_machines(args, config, D)
    return out


# --- sweep ----------------------------------------------------------------------------------------

def add_preset(name: str) -> None:
    """Add "64x2" to PRESETS: 64 wide (heads of 16), 2 layers. With "-moe", 2 of 8 experts and a
    shared one are together as wide as the dense MLP, so that both have about the same N."""
    if name in PRESETS:
        return
    match = re.fullmatch(r"([1-9][0-9]*)x([1-9][0-9]*)(-moe)?", name)
    require(match, f"--sizes must be presets or WIDTHxLAYERS[-moe], got {name!r}")
    width = int(match[1])
    require(width % 16 == 0, f"--sizes {name}: the width must be a multiple of 16, a head's size")
    inner = max(1, width // 6) * 16
    config = PRESETS["micro"]
    if match[3]:
        config = replace(PRESETS["micro-moe"], moe_intermediate_size=inner // 4,
                         shared_expert_intermediate_size=inner // 2)
    PRESETS[name] = replace(
        config,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=int(match[2]),
        num_attention_heads=max(1, width // 16),
        num_key_value_heads=1,
    )


def prepare(args: Args, tokens: float) -> None:
    """Write Python's own code as documents, and a tokenizer, once for all runs. Files are cut into
    pieces of 1,000 characters, so that the held-out fiftieth is many pieces, not one file."""
    if args.resume and Path(f"{args.out}/tokenizer").is_dir():
        return  # another corpus would have another held-out loss
    megabytes = max(1.0, tokens * 4e-6)
    sources = corpus.builtin_corpus(args.seed, megabytes)
    pieces = []
    for document in sources["stdlib_code"]:
        text = document["text"]
        for start in range(0, len(text), 1000):
            pieces.append(text[start:start + 1000])
    files.write_jsonl(f"{args.out}/data/code.jsonl", [{"text": text} for text in pieces])
    training = [text for text in pieces if not mixture.is_held_out(text)]
    Tokenizer.train(training, 384).save_pretrained(f"{args.out}/tokenizer")


def measure(args: Args, size: str, D: float, lr: float, batch: float, seed: int, device) -> Row:
    """Train one model with pretrain.py, in a directory that the next run overwrites. Warm-up is a
    tenth of the steps: a fixed number of steps would favour small batches."""
    settings = {
        "lr": lr,
        "batch_tokens": int(batch),
        "warmup": int(D / batch / 10),
        "seq_len": args.seq_len,
        "seed": seed,
        "dtype": args.dtype,
    }
    asked = pretrain.Args(
        out=f"{args.out}/last",
        data=f"{args.out}/data",
        tokenizer=f"{args.out}/tokenizer",
        model=size,
        tokens=int(D),
        micro_batch=64,
        eval_every=10**9,
        save_every=10**9,
        device=args.device,
        overwrite=True,
        **settings,
    )
    loss = math.inf  # of a run that diverges: that its rate is too high is a result, too
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        with contextlib.suppress(Diverged):
            loss = pretrain.main(asked)["val_loss"]
    sizes = count(PRESETS[size])
    return Row(
        kind="moe" if PRESETS[size].num_experts else "dense",
        size=size,
        N=sizes["N"],
        total=sizes["non_embedding"],
        D=D,
        loss=loss,
        schedule=f"cosine to {asked.final_lr}",
        device=str(device),
        **settings,
    )


def parse_list(name: str, text: str) -> list[float]:
    values = sorted({parse_value(name, part, float) for part in text.split(",")})
    require(values[0] > 0, f"--{name} must be positive")
    return values


# ---------------------------------------------------------------------------------------------

def main(args: Args) -> dict:
    """Sweep: train every setting of the grid with every seed, then fit."""
    require(not args.data, "a sweep trains on the built-in corpus; --data is for fit and plan")
    device, _ = optim.setup(args)
    args = replace(args, seq_len=args.seq_len or 64, tokens=args.tokens or "5e3,1e4,2e4")
    sizes = args.sizes.split(",")
    tokens = parse_list("tokens", args.tokens)
    lrs = parse_list("lrs", args.lrs)
    batches = parse_list("batches", args.batches)
    seeds = range(args.seed, args.seed + args.seeds)
    for size in sizes:
        add_preset(size)
    path = Path(args.out) / "rows.csv"
    rows = grid_rows(path) if args.resume and path.exists() else []
    require(all(row.seq_len == args.seq_len for row in rows),
            f"--resume: {path} has rows of another --seq_len: take another --out")

    # rows.csv is all the state of a sweep, so Run must not look for a state of its own.
    run = Run(replace(args, resume=False, overwrite=args.overwrite or len(rows) > 0), "scaling")
    run.start_or_resume()
    prepare(args, tokens[-1])
    done = {(row.size, row.D, row.lr, row.batch_tokens, row.seed) for row in rows}
    grid = product(sizes, tokens, lrs, batches, seeds)
    missing = [setting for setting in grid if setting not in done]
    bar = tqdm(missing, desc="scaling", disable=None)
    for number, setting in enumerate(bar, 1):
        row = measure(args, *setting, device)
        rows.append(row)
        write_rows(path, rows)
        run.log(number, len(missing), bar, N=row.N, D=row.D, lr=row.lr, batch=row.batch_tokens,
                loss=row.loss)
    run.finish(runs=len(rows))
    return fit(args)


if __name__ == "__main__":
    cli(main, Args, sweep=main, fit=fit, plan=plan)
