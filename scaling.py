"""Scaling laws for hyper-parameters and for the loss (report section 3.2).

The report: how the best learning rate and batch size depend on model size N and data size D was
measured on dense models of 44M to 14B and MoEs of 44M to 1B *activated* parameters, on 0.8B to
600B tokens; then the loss at those settings, as a function of architecture and data, compares MoEs
with dense models. Neither forms nor coefficients are disclosed. The forms here are open work's:

    lr* = a N^b D^c,  batch* = a N^b D^c       Step Law (arXiv 2503.04715), fitted in logarithms
    L(N, D) = E + A / N^alpha + B / D^beta     Chinchilla (2203.15556), as refitted by Epoch AI

N: parameters that a token meets, without embedding and head; D, batch: tokens; loss: nats a token.
Another schedule, data or way to count N gives other coefficients (a cosine has another best lr than
a constant), so every row of rows.csv says what it was measured with.

    python scaling.py                              # 68 runs of micro models, a minute or two
    python scaling.py --sizes 128x4,192x4,256x6,tiny --tokens 4e6,8e6,16e6 --seq_len 256 ...
    python scaling.py --rows runs/scaling/rows.csv --budget 1e15            # fit again, and plan

Expect of the first the method in small, not a result. An optimum on the edge of its grid is no
measurement: it is flagged, left out of the fit, and asks for a wider grid. On so few tokens the
smallest batch is always best, so there is no batch law; and the intervals are wide.
"""
import contextlib
import csv
import io
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import common
import data
import pretrain
from common import InputError, Run, require
from model import PRESETS
from tokenizer import Tokenizer


@dataclass
class Args:
    out: str = "runs/scaling"        # where rows.csv, log.jsonl and run.json go
    rows: str = ""                   # fit this CSV (ours, or Step Law's) instead of training
    sizes: str = "16x2,32x2,64x2,32x2-moe"         # WIDTHxLAYERS[-moe], or presets of model.py
    tokens: str = "5e3,1e4,2e4"                    # training tokens D
    lrs: str = "2e-3,4e-3,8e-3,16e-3,32e-3,64e-3"  # grid of peak learning rates
    batches: str = "128,256,512"                   # grid of batch sizes, in tokens
    budget: float = 0.0              # plan: training FLOPs, 6 N D
    N: float = 0.0                   # plan: activated non-embedding parameters
    D: float = 0.0                   # plan: training tokens
    bootstrap: int = 50              # resamples of the loss law; five times as many of the others
    data: str = ""                   # as in pretrain.py; empty: some of the built-in corpus
    tokenizer: str = ""              # as in pretrain.py; needed with --data
    seq_len: int = 64                # positions a row
    seed: int = 0                    # of weights, data order and bootstrap
    device: str = "auto"             # auto, cpu, cuda[:N]
    dtype: str = "auto"              # auto, float32, bfloat16 (autocast over float32 weights)
    resume: bool = False             # keep the rows that --out has and train what is missing
    overwrite: bool = False          # replace what --out holds


# ---------------------------------------------------------------------------------------------
# reference formulas, for comparison only

def flops(N: float, D: float, layers=0, width=0, seq_len=0, vocab_size=0) -> float:
    """Training FLOPs 6 N D and, where the shape is given, what this leaves out: the head and
    attention's scores (all, though half are masked). Nothing at 7B, most of a micro model. Without
    the head, and 72 L C^2 for 6 N, it is DeepSeek's M D."""
    return (6 * (N + vocab_size * width) + 12 * layers * width * seq_len) * D


def step_law(N: float, D: float) -> tuple[float, float]:
    """(lr, batch) of arXiv 2503.04715: N without vocabulary; the last lr is 1e-5, not 10%."""
    return 1.79 * N ** -0.713 * D ** 0.307, 0.58 * D ** 0.571


def deepseek_law(C: float) -> tuple[float, float]:
    """(lr, batch) of arXiv 2401.02954, fitted at C 1e17 to 2e19 (some copies print 0.3188)."""
    return 0.3118 * C ** -0.1250, 0.2920 * C ** 0.3271


# ---------------------------------------------------------------------------------------------
# laws

class Law:
    """Coefficients are floats; in `draws`, the same law over the bootstrap, arrays. spread: sd of
    the residual logarithms. widen: sqrt(n / (n - k)), for k coefficients make the residuals of n
    cells, which the draws come from, too small by that. cells: {N, D, value, edge}, those on an
    edge (not fitted) included."""

    def interval(self, N: float, D: float) -> tuple[float, float]:
        """95%, for one more cell: the law's uncertainty and the scatter of a cell around it."""
        centre, samples = np.log(self.predict(N, D)), np.log(self.draws.predict(N, D))
        noise = np.random.default_rng(0).normal(0, self.spread, samples.shape)
        samples = centre + (samples - centre) * self.widen + noise
        return tuple(np.exp(np.percentile(samples, [2.5, 97.5])).tolist())

    def ci(self, name: str) -> tuple[float, float]:
        """95% interval of a coefficient."""
        value = getattr(self, name)
        samples = value + (getattr(self.draws, name) - value) * self.widen
        return tuple(np.percentile(samples, [2.5, 97.5]).tolist())

    def show(self, name: str) -> str:
        return "{:.3f} [{:.3f}, {:.3f}]".format(getattr(self, name), *self.ci(name))


@dataclass
class HyperparameterLaw(Law):
    """exp(a) N^b D^c"""
    a: float
    b: float
    c: float
    draws: "HyperparameterLaw" = None
    spread: float = 0.0
    widen: float = 1.0
    cells: tuple = ()

    def predict(self, N: float, D: float) -> float:
        return np.exp(self.a + self.b * math.log(N) + self.c * math.log(D))

    def __str__(self):
        edges = sum(cell["edge"] for cell in self.cells)
        return (f"{math.exp(self.a):.3g} N^{self.show('b')} D^{self.show('c')}: {len(self.cells)} "
                f"cells less {edges} on an edge, scatter {self.spread:.0%}")


@dataclass
class LossLaw(Law):
    E: float
    A: float
    B: float
    alpha: float
    beta: float
    draws: "LossLaw" = None
    spread: float = 0.0
    widen: float = 1.0
    cells: tuple = ()

    def predict(self, N: float, D: float) -> float:
        return self.E + self.A / N ** self.alpha + self.B / D ** self.beta

    def __str__(self):
        return (f"{self.show('E')} + {self.A:.4g} / N^{self.show('alpha')} + {self.B:.4g} / "
                f"D^{self.show('beta')}: scatter {self.spread:.2%}")


CHINCHILLA = LossLaw(1.69, 406.4, 410.7, 0.34, 0.28)           # as published (2203.15556)
EPOCH = LossLaw(1.81686, 482.006, 2085.434, 0.34781, 0.36585)  # its points refitted (2404.10102)


def resample(n: int, bootstrap: int, seed: int):
    """(bootstrap, n) weights of sum n: Rubin's Bayesian bootstrap. Whole cells drawn with
    replacement would, of few cells, too often all have one N."""
    return np.random.default_rng(seed).dirichlet(np.ones(n), bootstrap) * n


def cells_of(rows) -> dict[tuple, dict]:
    """{(N, D): {(lr, batch): loss}}, sorted. Repeats are averaged: a minimum would favour the point
    tried most often. A diverged run (nan) is a point of infinite loss."""
    cells = {}
    for r in rows:
        N, D, lr, batch, loss = (float(r[k]) for k in ("N", "D", "lr", "batch_tokens", "loss"))
        cells.setdefault((N, D), {}).setdefault((lr, batch), []).append(loss)
    return {cell: {p: math.fsum(v) / len(v) if all(map(math.isfinite, v)) else math.inf
                   for p, v in sorted(cells[cell].items())} for cell in sorted(cells)}


def optimum(points: dict[tuple, float], axis: int) -> tuple[float, bool]:
    """(best lr (axis 0) or batch (1) of one cell, whether it is on the edge of its grid).

    The lowest point of the loss minimised over the other variable, refined by a parabola in the
    logarithm through the points within a factor of 3: the valley is so flat that noise moves the
    lowest point by a step or two. (Step Law's table scatters 7% about its lr law then, not 20%.)"""
    profile = {}
    for point, loss in points.items():
        profile[point[axis]] = min(loss, profile.get(point[axis], math.inf))
    x, y = np.log(sorted(profile)), np.array([profile[k] for k in sorted(profile)])
    i = int(y.argmin())
    if i in (0, len(x) - 1):
        return math.exp(x[i]), True
    near = (abs(x - x[i]) < math.log(3)) & np.isfinite(y)
    near[i - 1:i + 2] = np.isfinite(y[i - 1:i + 2])
    curve, slope = np.polyfit(x[near] - x[i], y[near], 2)[:2] if near.sum() > 2 else (0, 0)
    move = -slope / (2 * curve) if curve > 0 else 0.0  # never beyond the neighbours of the lowest
    return math.exp(np.clip(x[i] + move, x[i - 1], x[i + 1])), False


def fit_hyperparameter_law(rows, target="lr", terms="ND", bootstrap=1000, seed=0):
    """Least squares on the logarithms of the cells' optima. rows: dicts N, D, lr, batch_tokens,
    loss. target: lr or batch. terms: exponents to fit, others stay 0 (Step Law's batch: "D").
    InputError when the cells off the edges do not determine the exponents."""
    require(target in ("lr", "batch"), f"target wants lr or batch, got {target!r}")
    found = {cell: optimum(p, int(target == "batch")) for cell, p in cells_of(rows).items()}
    cells = [{"N": N, "D": D, "value": v, "edge": edge} for (N, D), (v, edge) in found.items()]
    logs = np.log([[c["N"], c["D"], c["value"]] for c in cells if not c["edge"]]).reshape(-1, 3)
    free, n = [0, *(i for i in (1, 2) if "_ND"[i] in terms)], len(logs)
    X, y = np.concatenate((np.ones((n, 1)), logs[:, :2]), axis=1)[:, free], logs[:, 2]
    require(n > len(free) == np.linalg.matrix_rank(X, tol=1e-6), f"no law for {target}: {n} cells "
            f"({len(cells) - n} more are on an edge) do not determine {len(free)} coefficients")

    def solve(weights):
        coef, root = np.zeros(3), np.sqrt(weights)
        coef[free] = np.linalg.lstsq(X * root[:, None], y * root, rcond=None)[0]
        return coef

    coef = solve(np.ones(n))
    draws = np.array([solve(w) for w in resample(n, bootstrap, seed)])
    spread = math.sqrt(((y - X @ coef[free]) ** 2).sum() / (n - len(free)))
    return HyperparameterLaw(*coef.tolist(), HyperparameterLaw(*draws.T), spread,
                             math.sqrt(n / (n - len(free))), tuple(cells))


def fit_loss_law(N, D, loss, bootstrap=0, seed=0) -> LossLaw:
    """Minimise sum_i Huber_1e-3(LSE(e, a - alpha log N_i, b - beta log D_i) - log L_i), E = exp(e)
    and so on (Chinchilla eq. 3), by L-BFGS from the best points of a grid. The sum, not the mean:
    by the mean the published fit stopped too early (Epoch AI). Logs are centred, for raw, a and
    alpha are nearly one direction. InputError for fewer than 6 points."""
    x, y, z = (torch.as_tensor(v, dtype=torch.float64).log() for v in (N, D, loss))
    require(len(x) > 5, f"no loss law: {len(x)} cells do not determine 5 coefficients")
    x0, y0, z0, one = x.mean(), y.mean(), z.mean(), torch.ones_like(x)

    def objective(p, weights):
        e, a, b, alpha, beta = p[..., None].unbind(-2)
        terms = torch.broadcast_tensors(e, a - alpha * (x - x0), b - beta * (y - y0))
        error = torch.logsumexp(torch.stack(terms), 0) + z0 - z
        huber = torch.nn.functional.huber_loss(error, 0 * error, reduction="none", delta=1e-3)
        return (weights * huber).sum(-1) / 1e-3

    def minimise(start, weights, steps=200):
        p = start.clone().requires_grad_()
        lbfgs = torch.optim.LBFGS([p], max_iter=steps, tolerance_grad=1e-9, tolerance_change=1e-13,
                                  history_size=10, line_search_fn="strong_wolfe")

        def closure():
            lbfgs.zero_grad()
            value = objective(p, weights)
            value.backward()
            return value
        lbfgs.step(closure)
        return p.detach()

    def law(p):  # p (5,) or (R, 5)
        e, a, b, alpha, beta = p.unbind(-1)
        scale = [(v + z0).exp() for v in (e, a + alpha * x0, b + beta * y0)]
        return LossLaw(*(v.numpy() if v.ndim else v.item() for v in (*scale, alpha, beta)))

    share, power = (0.05, 0.2, 0.5, 0.8), (0.1, 0.3, 0.6, 1.0)
    grid = torch.cartesian_prod(*map(one.new_tensor, (share, share, share, power, power)))
    grid[:, :3] = grid[:, :3].log()
    starts = grid[objective(grid, one).argsort()[:4]]
    best = min((minimise(p, one) for p in starts), key=lambda p: objective(p, one).item())
    away = best.clone()  # where E is near 0, exp(e) is flat: from there no draw would leave
    away[0] = away[0].clamp(min=math.log(0.3))
    draws = [min((minimise(p, w, 60) for p in (best, away)), key=lambda p, w=w: objective(p, w))
             for w in one.new_tensor(resample(len(x), bootstrap, seed))]
    error = z - law(best).predict(x.exp(), y.exp()).log()
    keys = ("N", "D", "value")
    return replace(law(best), draws=law(torch.stack(draws)) if draws else None,
                   spread=math.sqrt((error ** 2).sum() / (len(x) - 5)),
                   widen=math.sqrt(len(x) / (len(x) - 5)),
                   cells=tuple(dict(zip(keys, map(float, c), strict=True), edge=False)
                               for c in zip(N, D, loss, strict=True)))


def fit(rows, bootstrap=100, seed=0) -> dict[str, Law]:
    """The laws for lr, batch and loss; one that the cells do not determine is left out, with a
    line that says why. A cell's loss is that of its best run: the report trains once more at the
    predicted optimum; on a grid such a run is there already."""
    best = {cell: min(points.values()) for cell, points in cells_of(rows).items()}
    best = [(*cell, loss) for cell, loss in best.items() if loss < math.inf]
    laws = {}
    for name in ("lr", "batch", "loss"):
        try:
            laws[name] = fit_loss_law(*np.array(best).reshape(-1, 3).T, bootstrap, seed) \
                if name == "loss" else fit_hyperparameter_law(rows, name, "ND", 5 * bootstrap, seed)
        except InputError as error:
            print(f"  {error}")
    return laws


def plan(laws: dict[str, Law], budget=0.0, N=0.0, D=0.0) -> dict:
    """Print and return one run's N, D, lr, batch and loss with intervals, and say where it leaves
    the fitted range (R6.4). Two of budget (FLOPs, 6 N D), N and D give the third; one alone is
    spent compute-optimally: for 6 N D = budget, L is lowest at alpha A/N^alpha = beta B/D^beta."""
    require(1 <= bool(budget) + bool(N) + bool(D) <= 2, "plan wants one or two of budget, N and D")
    if bool(budget) + bool(N) + bool(D) == 1:
        loss = laws.get("loss")
        require(loss is not None and loss.alpha > 0 < loss.beta, "no loss law that falls with N "
                "and D, so no compute-optimal run: plan wants two of budget, N and D")
        ratio = loss.alpha * loss.A / (loss.beta * loss.B)
        if D:
            N = (ratio * D ** loss.beta) ** (1 / loss.alpha)
        elif N:
            D = (N ** loss.alpha / ratio) ** (1 / loss.beta)
        else:
            N = (ratio * (budget / 6) ** loss.beta) ** (1 / (loss.alpha + loss.beta))
    N, D = N or budget / 6 / D, D or budget / 6 / N
    out = {"N": N, "D": D, "flops": flops(N, D), "extrapolates": []}
    print(f"plan: N {N:.4g}, D {D:.4g} tokens, 6 N D = {out['flops']:.3g} FLOPs")
    for name, law in laws.items():
        out[name], out[name + "_interval"] = float(law.predict(N, D)), law.interval(N, D)
        print("  {:<6}{:.4g}  [{:.4g}, {:.4g}]".format(name, out[name], *out[name + "_interval"]))
        for axis in "ND":
            seen, value = [c[axis] for c in law.cells if not c["edge"]], out[axis]
            if not min(seen) <= value <= max(seen):
                far = value / (max(seen) if value > max(seen) else min(seen))
                out["extrapolates"].append(f"{name} in {axis}, {far:.3g} x the nearest fitted")
    print("  extrapolates: " + ("; ".join(out["extrapolates"]) or "no, inside the fitted range"))
    print("  elsewhere: Step Law lr %.3g, batch %.3g; DeepSeek lr %.3g, batch %.3g"
          % (*step_law(N, D), *deepseek_law(flops(N, D))))
    return out


# ---------------------------------------------------------------------------------------------
# rows: read and measured

def read_rows(path: str | Path) -> list[dict]:
    """rows.csv, or a table of Step Law: there `bs` counts sequences of 2,048 tokens, the final loss
    to use is the smoothed one, and the N of an MoE is `Na`, the activated part."""
    with common.open_text(path) as file:
        rows = list(csv.DictReader(file))
    have = rows[0].keys() if rows else ()
    foreign, moe = "bs" in have, "Na" in have
    names = {"N": "Na" if moe else "N", "D": "D", "lr": "lr",
             "batch_tokens": "bs" if foreign else "batch_tokens",
             "loss": "smooth loss" if foreign else "loss"}
    missing = [name for name in names.values() if name not in have]
    require(not missing, f"{path}: no column {', '.join(missing)}")
    for number, row in enumerate(rows, 2):
        try:
            row |= {name: float(row[column]) for name, column in names.items()}
        except (TypeError, ValueError):
            raise InputError(f"{path}:{number}: {', '.join(names)} must be numbers") from None
        row["batch_tokens"] *= 2048 if foreign else 1
        row.setdefault("kind", "moe" if moe else "dense")
    return rows


def write_rows(path: Path, rows: list[dict]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    common.write_atomic(path, text.getvalue())


def add_preset(name: str) -> None:
    """ "64x2": 64 wide (heads of 16), 2 layers; "-moe": 2 of 8 experts and a shared one, together
    as wide as the dense MLP, so that both meet a token with about the same N."""
    (width, _, layers), moe = name.removesuffix("-moe").partition("x"), name.endswith("-moe")
    require(name in PRESETS or width.isdigit() and layers.isdigit(),
            f"--sizes wants presets or WIDTHxLAYERS[-moe], got {name!r}")
    if name not in PRESETS:
        C = int(width)
        F = max(1, C // 6) * 16
        PRESETS[name] = replace(
            PRESETS["micro-moe" if moe else "micro"], hidden_size=C, intermediate_size=F,
            num_hidden_layers=int(layers), num_attention_heads=max(1, C // 16),
            num_key_value_heads=1, moe_intermediate_size=F // 4 * moe,
            shared_expert_intermediate_size=F // 2 * moe)


def prepare(args: Args, tokens: float) -> Args:
    """Without --data: part of the built-in corpus and a tokenizer, made once for all runs. Pieces
    of 1,000 characters, so that the fiftieth held out is a few dozen of them and not one file."""
    if args.data:
        require(bool(args.tokenizer), "--data wants --tokenizer: all runs must share one")
        return args
    made = replace(args, data=f"{args.out}/data", tokenizer=f"{args.out}/tokenizer")
    if args.resume and Path(made.tokenizer).is_dir():
        return made  # another corpus would have another held-out loss
    sources = data.builtin_corpus(args.seed, max_mb=max(0.4, tokens * 4e-6))
    texts = [doc["text"] for docs in sources.values() for doc in docs]
    pieces = [text[i:i + 1000] for text in texts for i in range(0, len(text), 1000)]
    pieces = pieces[::max(1, len(pieces) // max(600, int(tokens / 100)))]  # read again in every run
    common.write_jsonl(f"{made.data}/builtin.jsonl", ({"text": text} for text in pieces))
    tokenizer = Tokenizer.train((t for t in pieces if not data.is_held_out(t)), 384)
    tokenizer.save_pretrained(made.tokenizer)
    return made


def measure(args: Args, size: str, D: float, lr: float, batch: float, device) -> dict:
    """One run of pretrain.py -> a row of rows.csv (R6.1). Its directory is used again by the next.
    Warm-up is a tenth of the steps: a fixed number would favour small batches."""
    shared = {name: getattr(args, name) for name in
              ("data", "tokenizer", "seq_len", "seed", "device", "dtype")}
    asked = pretrain.Args(out=f"{args.out}/last", model=size, tokens=int(D), lr=lr, overwrite=True,
                          batch_tokens=int(batch), warmup=int(D / batch / 10), micro_batch=64,
                          eval_every=10**9, save_every=10**9, **shared)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        loss = pretrain.main(asked)["val_loss"]
    count = common.read_json(f"{asked.out}/run.json")["result"]
    return {"kind": "moe" if PRESETS[size].num_experts else "dense", "size": size,
            "N": count["active"] - count["total"] + count["non_embedding"], "D": D, "lr": lr,
            "batch_tokens": batch, "loss": loss, "warmup": asked.warmup, "seed": args.seed,
            "schedule": f"cosine to {asked.final_lr}", "seq_len": args.seq_len,
            "data": args.data, "device": str(device), "dtype": args.dtype}


def descend(value, shape: tuple[int, int], at: tuple[int, int]) -> tuple[int, int]:
    """Walk from `at` to a grid point that none of its four neighbours beats: about 6 runs in place
    of the whole grid. Right if the loss has one valley over (lr, batch), as Step Law found, that is
    not so narrow and diagonal that all four neighbours lie on its walls."""
    while True:
        near = [(at[0] + i, at[1] + j) for i, j in ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1))]
        best = min((p for p in near if 0 <= p[0] < shape[0] and 0 <= p[1] < shape[1]), key=value)
        if best == at:
            return at
        at = best


def sweep(args: Args, run: Run, rows: list[dict], device) -> list[dict]:
    lrs, batches, tokens = axes = [
        sorted(common.parse_value(name, part, float) for part in getattr(args, name).split(","))
        for name in ("lrs", "batches", "tokens")]
    require(all(axis[0] > 0 for axis in axes), "--lrs, --batches and --tokens must be positive")
    for size in args.sizes.split(","):
        add_preset(size)
    prepared = prepare(args, tokens[-1])
    same = {"data": prepared.data, "seq_len": str(args.seq_len), "seed": str(args.seed)}
    require(all(r.get(k) == v for r in rows for k, v in same.items()), f"--resume: {run.path} has "
            "rows of another --data, --seq_len or --seed: take another --out")
    done = {(r["size"], r["D"], r["lr"], r["batch_tokens"]): r for r in rows}
    shape, cells = (len(lrs), len(batches)), [(s, D) for s in args.sizes.split(",") for D in tokens]
    at, bar = (shape[0] // 2, shape[1] // 2), tqdm(cells, desc="scaling", disable=None)
    for number, (size, D) in enumerate(bar, 1):
        def value(point, size=size, D=D):
            key = size, D, lrs[point[0]], batches[point[1]]
            if key not in done:
                done[key] = measure(prepared, *key, device)
                rows.append(done[key])
                write_rows(run.path / "rows.csv", rows)
            loss = float(done[key]["loss"])
            return loss if math.isfinite(loss) else math.inf
        at = descend(value, shape, at)  # from the last cell's optimum: neighbours' are near
        best = done[size, D, lrs[at[0]], batches[at[1]]]
        run.log(number, len(cells), bar, runs=len(rows),
                **{k: best[k] for k in ("N", "D", "lr", "batch_tokens", "loss")})
    return rows


# ---------------------------------------------------------------------------------------------

def held_out_check(rows: list[dict], args: Args) -> dict:
    """Fit without the largest cell, predict it, and say of each prediction if it held (R6.2)."""
    cells = cells_of(rows)
    N, D = max(cells, key=lambda cell: flops(*cell))
    points, out = cells[N, D], {"N": N, "D": D}
    print(f"largest cell held out: N {N:.4g}, D {D:.4g}, predicted from the others")
    measured = {"lr": optimum(points, 0), "batch": optimum(points, 1),
                "loss": (min(points.values()), False)}
    rest = [r for r in rows if (float(r["N"]), float(r["D"])) != (N, D)]
    for name, law in fit(rest, args.bootstrap, args.seed).items():
        (value, edge), (low, high) = measured[name], law.interval(N, D)
        out[name] = "on an edge, so not measured" if edge else \
            "held" if low <= value <= high else "MISSED"
        print(f"  {name:<6}{law.predict(N, D):.4g}  [{low:.4g}, {high:.4g}]  measured {value:.4g}: "
              f"{out[name]}")
    return out


def main(args: Args) -> dict:
    # set-up, rows
    require(args.bootstrap > 1, f"--bootstrap wants at least 2, got {args.bootstrap}")
    device, _ = common.setup(args)
    path, run = Path(args.rows or f"{args.out}/rows.csv"), None
    rows = read_rows(path) if args.rows or (args.resume and path.exists()) else []
    if not args.rows:  # rows.csv is all the state there is, so Run is not asked for its own
        run = Run(replace(args, resume=False, overwrite=args.overwrite or args.resume), "scaling")
        run.begin()
        rows = sweep(args, run, rows, device)
    kinds = {kind: [r for r in rows if r["kind"] == kind] for kind in ("dense", "moe")}
    kind = "dense" if kinds["dense"] else "moe"
    print(f"{len(rows)} runs. N: activated non-embedding parameters; FLOPs: 6 N D")

    # laws
    result = {"runs": len(rows), "held_out": held_out_check(kinds[kind], args)}
    print(f"{kind}, all cells, with 95% intervals")
    laws = fit(kinds[kind], args.bootstrap, args.seed)
    for name, law in laws.items():
        print(f"  {name:<6}{law}")
        result[name] = {k: (v, *law.ci(k)) for k, v in vars(law).items()
                        if isinstance(v, float) and k not in ("spread", "widen")}
    for (N, D), points in cells_of(kinds["moe"]).items():
        if kind == "dense" and "loss" in laws:
            low, high = laws["loss"].interval(N, D)
            print(f"  MoE of N {N:.4g}, D {D:.4g}: loss {min(points.values()):.4f}; a dense model "
                  f"of that N {laws['loss'].predict(N, D):.4f} [{low:.4f}, {high:.4f}]")

    # plan, save
    asked = {name: getattr(args, name) for name in ("budget", "N", "D")}
    if not any(asked.values()):  # for show: ten times the FLOPs of the largest run
        N, D = max(cells_of(kinds[kind]), key=lambda cell: flops(*cell))
        asked |= {"N": N * 10 ** 0.5, "D": D * 10 ** 0.5}
    result["plan"] = plan(laws, **asked)
    if run:
        run.write_record({"finished": True, "seconds": round(run.seconds(), 1), "result": result})
        print(f"scaling: {run.path}/rows.csv ready after {run.seconds():.0f} s")
    return result


if __name__ == "__main__":
    common.cli(main, Args)
