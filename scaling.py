"""Scaling laws: which learning rate, batch and loss for which model and data size, and what a run
would take (report section 3.2).

The report: how the best learning rate and batch size depend on model size N and data size D was
measured on dense models of 44M to 14B and MoEs of 44M to 1B *activated* parameters, on 0.8B to
600B tokens; then the loss at those settings compares MoEs with dense models. Neither forms nor
coefficients nor runs are disclosed. The forms are open work's, fitted here to open work's runs and
to our own:

    lr* = a N^b D^c,  batch* = a N^b D^c     Step Law (arXiv 2503.04715; its batch has no N)
    L(N, D) = E + A / N^alpha + B / D^beta   Chinchilla (2203.15556), as refitted by Epoch AI
    N -> N R^g                               of an MoE, our choice: R = total / activated N

N: parameters that a token meets, without embedding and head; D, batch: tokens; C: FLOPs, 6 N D;
loss: nats a token. Another schedule, data or way to count N gives other coefficients, so every row
of rows.csv says what it was measured with.

    python scaling.py                            # sweep: some 90 runs of micro models, then fit
    python scaling.py fit --data a.csv,b.csv     # every number again from tables of runs
    python scaling.py plan --model 7B --tokens 18e12 --gpus 64
    python scaling.py plan --budget 1e21 --data a.csv

Expect the method in small: on so few tokens the smallest batch is always best. An optimum on the
edge of its grid is no measurement: it is flagged, left out of the fit, and asks for a wider grid.
recipes/scaling.md has a sweep that brackets it, and what published runs give.
"""
import contextlib
import csv
import io
import math
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import lib.args
from lib import files
from lib import optim
import lib.run
from data import corpus
from data import mixture
import pretrain
from lib.args import InputError, require
from lib.run import Run
from model import PRESETS, Config, Qwen2
from tokenizer import Tokenizer


@dataclass
class Args:
    out: str = "runs/scaling"        # sweep: where rows.csv, log.jsonl and run.json go; plots
    data: str = ""                   # fit, plan: tables of runs, with commas (fit: --out's rows)
    bootstrap: int = 200             # resamples of the loss law; five times as many of the others
    degree: int = 3                  # of a cell's loss surface; 0: its lowest run is the optimum
    within: float = 0.01             # the surface is fitted to runs so near the lowest loss
    plots: bool = False              # fit, sweep: laws and optima as PNG (matplotlib)
    sizes: str = "16x2,32x2,64x2,32x2-moe"         # sweep: WIDTHxLAYERS[-moe], or presets
    tokens: str = ""                 # training tokens; sweep: a list (empty: 5e3,1e4,2e4)
    lrs: str = "2e-3,4e-3,8e-3,16e-3,32e-3,64e-3"  # sweep: grid of peak learning rates
    batches: str = "128,256,512"     # sweep: grid of batch sizes, in tokens
    seeds: int = 1                   # sweep: runs of a setting, whose mean loss counts
    model: str = ""                  # plan: a preset of model.py, or N as a number
    budget: float = 0.0              # plan: FLOPs for the best N and D; instead of these two
    gpus: int = 8                    # plan: how many share the model (FSDP)
    micro_batch: int = 1             # plan: rows a GPU at a time
    gradient_checkpointing: bool = False  # plan: pretrain.py's --gradient_checkpointing
    seq_len: int = 0                 # positions a row (0: 64 in a sweep, 4096 in a plan)
    mfu: float = 0.4                 # plan: share of the peak reached, an assumption
    peak_tflops: float = 989.0       # plan: peak of one GPU (H100, bf16, dense)
    gpu_gb: float = 80.0             # plan: memory of one GPU
    gpu_hour: float = 2.5            # plan: price of a GPU hour, an assumption
    seed: int = 0                    # of corpus and bootstrap, and the first of --seeds
    device: str = "auto"             # sweep: auto, cpu, cuda[:N]
    dtype: str = "auto"              # auto, float32, bfloat16 (a plan's auto: bfloat16)
    resume: bool = False             # sweep: keep the rows that --out has, train what is missing
    overwrite: bool = False          # sweep: replace what --out holds


# ---------------------------------------------------------------------------------------------
# laws

@dataclass
class Law:
    """log y = form(coef, log x), x along `axes`, of N, D, C and R. Of a fit also: seen, the range
    of each axis; x, y, the n cells; draws, coef over the bootstrap (R, k); spread, the sd of the
    residual logarithms; edges, how many more cells were left out."""
    axes: str
    coef: np.ndarray
    seen: tuple = ()
    x: np.ndarray = None
    y: np.ndarray = None
    draws: np.ndarray = None
    spread: float = 0.0
    edges: int = 0

    def __getitem__(self, name: str) -> float:
        value = self.coef[self.names.index(name)]
        return float(np.exp(value) if name in "aEAB" else value)

    def predict(self, **x):
        return np.exp(self.form(self.coef, *(np.log(x[axis]) for axis in self.axes)))

    def interval(self, **x) -> tuple[float, float]:
        """95%, for one more cell: the law's uncertainty and the scatter of a cell around it."""
        logs = [math.log(x[axis]) for axis in self.axes]
        samples = self.form(self.draws, *logs)
        noise = np.random.default_rng(0).normal(0, self.spread, samples.shape)
        return tuple(np.exp(self.percentiles(self.form(self.coef, *logs), samples, noise)))

    def ci(self, name: str) -> tuple[float, float]:
        """95% interval of a coefficient."""
        i, scale = self.names.index(name), np.exp if name in "EAB" else np.asarray
        found = self.percentiles(scale(self.coef[i]), scale(self.draws[:, i]))
        return tuple(np.exp(found) if name == "a" else found)

    def percentiles(self, centre, samples, noise=0.0):
        """What k coefficients leave of n residuals is too small by sqrt((n - k) / n), and so is a
        bootstrap of them. Without `student` intervals of 9 simulated cells called 95% cover 85%,
        with it 91-92%."""
        n, dof = len(self.y), len(self.y) - len(self.coef)
        spread = ((samples - centre) * math.sqrt(n / dof) + noise) * student(dof)
        return np.percentile(centre + spread, [2.5, 97.5])

    def fitted(self, X, Y, draws) -> "Law":
        """With the logs X, Y of the cells that it was fitted to."""
        errors = Y - self.form(self.coef, *X.T)
        return replace(self, x=np.exp(X), y=np.exp(Y), draws=draws,
                       seen=tuple(zip(np.exp(X.min(0)), np.exp(X.max(0)), strict=True)),
                       spread=math.sqrt((errors ** 2).sum() / (len(Y) - len(self.coef))))


def student(dof: int, z=1.96) -> float:
    """97.5% quantile of Student's t over the normal one: its series, within 2% from dof 4 on."""
    return 1 + (z * z + 1) / (4 * dof) + (5 * z ** 4 + 16 * z * z + 3) / (96 * dof ** 2)


class PowerLaw(Law):
    """a x1^b1 x2^b2; coef: log a and the exponents, which are named as their axes."""

    @property
    def names(self):
        return ("a", *self.axes)

    @staticmethod
    def form(coef, *logs):
        return coef[..., 0] + sum(coef[..., i] * x for i, x in enumerate(logs, 1))


class LossLaw(Law):
    """E + A / (N R^g)^alpha + B / D^beta; coef: log E, log A, log B, alpha, beta and, where cells
    have an R, g. An MoE's loss is then that of a dense model of R^g times its activated N."""

    @property
    def names(self):
        return ("E", "A", "B", "alpha", "beta", "g")[:len(self.coef)]

    @staticmethod
    def form(coef, n, d, r=0.0):
        e, a, b, alpha, beta, *g = np.moveaxis(coef, -1, 0)
        n = n + g[0] * r if g else n
        return np.logaddexp(np.logaddexp(e, a - alpha * n), b - beta * d)


def known(kind, axes: str, scales, exponents, *seen) -> Law:
    return kind(axes, np.array([*np.log(scales), *exponents]), seen)


PUBLISHED = {  # the last arguments: the range of each axis
    # Step Law: N without vocabulary; its last lr is 1e-5, not 10% of the peak.
    # DeepSeek LLM: arXiv 2401.02954; some copies print 0.3188.
    "lr": {"Step Law": known(PowerLaw, "ND", [1.79], [-0.713, 0.307], (2.1e8, 1.1e9), (4e9, 1e11)),
           "DeepSeek": known(PowerLaw, "C", [0.3118], [-0.1250], (1e17, 2e19))},
    "batch": {"Step Law": known(PowerLaw, "D", [0.58], [0.571], (4e9, 1e11)),
              "DeepSeek": known(PowerLaw, "C", [0.2920], [0.3271], (1e17, 2e19))},
    # Chinchilla as published, and its points as refitted by Epoch AI (2404.10102)
    "loss": {"Epoch AI": known(LossLaw, "ND", [1.81686, 482.006, 2085.434], [0.34781, 0.36585],
                               (5.7e7, 1.6e10), (8.2e8, 3.2e11)),
             "Chinchilla": known(LossLaw, "ND", [1.69, 406.4, 410.7], [0.34, 0.28])}}
EPOCH_ERRORS = {"E": 0.026, "A": 125, "B": 1293, "alpha": 0.015, "beta": 0.021}  # standard


def resample(n: int, bootstrap: int, seed: int):
    """(bootstrap, n) weights of sum n: Rubin's Bayesian bootstrap. Whole cells drawn with
    replacement would, of few cells, too often all have one N."""
    return np.random.default_rng(seed).dirichlet(np.ones(n), bootstrap) * n


def fit_power(axes: str, x, y, bootstrap=1000, seed=0, edges=0) -> PowerLaw:
    """Least squares on logarithms. x (n, axes), y (n,). InputError where these do not determine
    the exponents."""
    x, y = np.log(np.reshape(x, (-1, len(axes)))), np.log(y)
    X, (n, k) = np.c_[np.ones(len(x)), x], (len(x), len(axes) + 1)
    require(n > k == np.linalg.matrix_rank(X, tol=1e-6), f"no law: {n} cells ({edges} more are on "
            f"an edge) do not determine {k} coefficients")

    def solve(weights):  # (R, n) -> (R, k)
        right = np.einsum("rn,ni->ri", weights * y, X)[..., None]
        return np.linalg.solve(np.einsum("rn,ni,nj->rij", weights, X, X), right)[..., 0]
    law = PowerLaw(axes, solve(np.ones((1, n)))[0], edges=edges)
    return law.fitted(x, y, solve(resample(n, bootstrap, seed)))


def fit_loss(N, D, loss, bootstrap=200, seed=0, R=None) -> LossLaw:
    """Minimise sum_i Huber_1e-3(LSE(e, a - alpha log N_i, b - beta log D_i) - log L_i), E = exp(e)
    and so on (Chinchilla eq. 3), from a grid of starts; with R, log N_i + g log R_i for log N_i.
    The sum, not the mean: by the mean the published fit stopped too early (Epoch AI). All starts,
    then all resamples, at once: each step is Levenberg-Marquardt's on the least squares that touch
    the Huber loss from above. Logs are centred, for raw, a and alpha are nearly one direction."""
    X, Y = np.log(np.stack([N, D] if R is None else [N, D, R], -1).astype(float)), np.log(loss)
    k, delta = 3 + X.shape[1], 1e-3
    require(len(Y) > k, f"no loss law: {len(Y)} cells do not determine {k} coefficients")
    (n0, d0), z0 = X[:, :2].mean(0), Y.mean()
    n, d, z, r = X[:, 0] - n0, X[:, 1] - d0, Y - z0, X[:, 2:].sum(1)

    def errors(p):  # (R, k) -> (R, n), Jacobian (R, n, k)
        e, a, b, alpha, beta, *g = p.T[..., None]
        size = n + g[0] * r if g else n
        terms = np.stack(np.broadcast_arrays(e, a - alpha * size, b - beta * d), -1)
        total = np.logaddexp.reduce(terms, -1)
        share = np.exp(terms - total[..., None])
        slopes = [share[..., 1] * -size, share[..., 2] * -d, share[..., 1] * -alpha * r][:k - 3]
        return total - z, np.concatenate([share, np.stack(slopes, -1)], -1)

    def minimise(p, weights, steps):
        def huber(r):
            r = abs(r)
            return (weights * np.where(r < delta, r * r / 2, delta * (r - delta / 2))).sum(-1)
        (r, J), damp, diagonal = errors(p), np.full(len(p), 1e-2), range(k)
        for _ in range(steps):
            h = weights * np.minimum(1, delta / np.maximum(abs(r), 1e-12))
            H = np.swapaxes(J * h[..., None], 1, 2) @ J
            H[:, diagonal, diagonal] *= 1 + damp[:, None]
            H[:, diagonal, diagonal] += 1e-12
            q = p - np.linalg.solve(H, np.swapaxes(J, 1, 2) @ (h * r)[..., None])[..., 0]
            new = errors(q)
            ok = huber(new[0]) < huber(r)
            p, damp = np.where(ok[:, None], q, p), np.clip(damp * np.where(ok, 0.2, 5), 1e-9, 1e9)
            r, J = np.where(ok[:, None], new[0], r), np.where(ok[:, None, None], new[1], J)
        return p[huber(r).argsort()]

    share, power = np.log([0.05, 0.3, 0.8]), (0.1, 0.4, 1.0)
    starts = np.array(list(product(share, share, share, power, power, *[[0.3]] * (k - 5))))
    for steps, keep in ((30, 5), (300, 1)):
        starts = minimise(starts, np.ones((1, len(Y))), steps)[:keep]
    start = np.maximum(starts, [math.log(0.1), *[-math.inf] * (k - 1)])  # from E = 0 no step leaves
    draws = minimise(start.repeat(bootstrap, 0), resample(len(Y), bootstrap, seed), 100)
    uncentre = np.eye(k)
    uncentre[3, 1], uncentre[4, 2] = n0, d0
    (coef,), draws = (p @ uncentre + z0 * (np.arange(k) < 3) for p in (starts, draws))
    return LossLaw("NDR"[:k - 3], coef).fitted(X, Y, draws)


# ---------------------------------------------------------------------------------------------
# optima

def optimum(points: dict[tuple, float], degree=3, within=0.01):
    """One cell's best (lr, batch), and for each whether it is on the edge of the grid.

    The minimum of a polynomial in (log lr, log batch), fitted by least squares to the runs `within`
    of the lowest loss or, if these are few, to the nine lowest, looked for no further than half a
    grid step from them: the valley is so flat that noise moves the lowest run by a step or two.
    Degree 3 within 1% predicts left-out runs near the optima of Step Law's table as well as any
    (LOG.md). The degree is lowered to keep 1.5 runs a coefficient; with fewer than nine
    finite runs the lowest run is the optimum."""
    xy, loss = np.log(list(points)), np.array(list(points.values()))
    low, high, best = xy.min(0), xy.max(0), xy[loss.argmin()]
    edge = (best == low) | (best == high)
    near = loss <= max(loss.min() * (1 + within), np.sort(loss)[:9][-1])
    enough = [d for d in range(2, degree + 1) if near.sum() >= 0.75 * (d + 1) * (d + 2)]
    if enough and math.isfinite(loss[near].max()) and (low < high).all():
        centre, step = xy[near].mean(0), [np.median(np.diff(np.unique(x))) for x in xy.T]
        powers = [p for p in product(range(enough[-1] + 1), repeat=2) if sum(p) <= enough[-1]]

        def terms(at):
            return np.stack([((at - centre) ** p).prod(-1) for p in powers], -1)
        coef, found = np.linalg.lstsq(terms(xy[near]), loss[near], rcond=None)[0], xy[near]
        patch = np.array(list(product(np.linspace(-0.5, 0.5, 21), repeat=2))) * step
        for zoom in range(7):
            found = (found[:, None] + patch * 0.1 ** zoom).reshape(-1, 2).clip(low, high)
            found = found[[(terms(found) @ coef).argmin()]]
        best = found[0]
        edge |= (best == low) | (best == high)
    return tuple(np.exp(best).tolist()), tuple(edge.tolist())


def measure_cells(rows, degree=3, within=0.01) -> list[dict]:
    """Runs -> cells of one (N, R, D), with `points` {(lr, batch): loss}. Repeats are averaged: a
    minimum would favour the point tried most often. A diverged run (nan) has an infinite loss. A
    cell's loss is that of its best run: the report trains once more at the predicted optimum."""
    groups, cells = {}, []
    for r in rows:
        N, D, lr, batch, loss = (float(r[k]) for k in ("N", "D", "lr", "batch_tokens", "loss"))
        points = groups.setdefault((N, float(r.get("total") or N) / N, D), {})
        points.setdefault((lr, batch), []).append(loss if math.isfinite(loss) else math.inf)
    for N, R, D in sorted(groups):
        points = {p: math.fsum(v) / len(v) for p, v in sorted(groups[N, R, D].items())}
        (lr, batch), edge = optimum(points, degree, within)
        cells.append({"N": N, "R": R, "D": D, "C": flops(N, D), "lr": lr, "batch": batch,
                      "loss": min(points.values()), "points": points,
                      "edge": {"lr": edge[0], "batch": edge[1], "loss": False}})
    return cells


def fit_cells(cells, bootstrap=200, seed=0, show=print, loss=True) -> dict[str, Law]:
    """The laws for lr, batch (of N and D, and as Step Law's, of D alone) and loss; one that the
    cells do not determine is left out, with a line that says why."""
    laws = {}
    for name, target, axes in (("lr", "lr", "ND"), ("batch", "batch", "ND"),
                               ("batch(D)", "batch", "D"), ("loss", "loss", "ND"))[:3 + loss]:
        inside = [c for c in cells if not c["edge"][target] and c[target] < math.inf]
        x, y = [[c[axis] for axis in axes] for c in inside], [c[target] for c in inside]
        try:
            laws[name] = fit_loss(*np.reshape(x, (-1, 2)).T, y, bootstrap, seed) \
                if name == "loss" else fit_power(axes, x, y, 5 * bootstrap, seed,
                                                 len(cells) - len(inside))
        except InputError as error:
            show(f"  {name}: {error}")
    return laws


def excess(cell, lr: Law, batch: Law, N=None) -> float:
    """How much worse than the cell's best run the run nearest to the two laws' settings (at another
    N) is, a share; inf if none is within a factor of 2. 0.25% is near-optimal to DeepSeek."""
    x, points = {"N": N or cell["N"], "D": cell["D"], "C": cell["C"]}, cell["points"]
    want = np.log2([lr.predict(**x), batch.predict(**x)])
    away = {p: np.log2(p) - want for p in points}
    near = min(points, key=lambda p: math.hypot(*away[p]))
    return points[near] / cell["loss"] - 1 if max(abs(away[near])) <= 1 else math.inf


def left_out(cells) -> dict[str, list[float]]:
    """{rule: its excess, a cell each}; "the other cells": by laws fitted without the cell."""
    out = {}
    for c in cells:
        rules = {label: (PUBLISHED["lr"][label], law, c["N"])
                 for label, law in PUBLISHED["batch"].items()}
        if c["R"] != 1:
            rules["Step Law at total N"] = *rules["Step Law"][:2], c["N"] * c["R"]
        laws = fit_cells([o for o in cells if o is not c], 2, show=lambda line: None, loss=False)
        if {"lr", "batch"} <= laws.keys():
            rules["the other cells"] = laws["lr"], laws["batch"], c["N"]
        for label, (lr, batch, N) in rules.items():
            out.setdefault(label, []).append(excess(c, lr, batch, N))
    return out


# ---------------------------------------------------------------------------------------------
# reports: each prints a table and returns its laws

def describe(name: str, law: Law, published: Law = None) -> None:
    """A line a coefficient: the fit with its 95% interval, the published value and if it is inside.
    `a` is not compared: it follows from the exponents."""
    print(f"  {name}: {len(law.y)} cells, {law.edges} more on an edge, scatter {law.spread:.2g}")
    for key in law.names:
        (low, high), said = law.ci(key), ""
        if published and key in published.names and key != "a":
            inside = "inside" if low <= published[key] <= high else "OUTSIDE"
            said = f"  published {published[key]:.4g}: {inside}"
        print(f"    {key:<7}{law[key]:>10.4g}  [{low:.4g}, {high:.4g}]{said}")


def report_runs(kind: str, rows, args: Args) -> tuple[list[dict], dict[str, Law]]:
    """Runs over a grid of (lr, batch) in cells of (N, D): the optima, the laws, the largest quarter
    of the cells predicted from the others, and each cell's settings predicted from all others."""
    cells = measure_cells(rows, args.degree, args.within)
    print(f"{kind}: {len(rows)} runs, best settings of {len(cells)} cells (* on an edge, left out)")
    for c in cells:
        lr, batch = (f"{c[k]:.3g}{'*' * c['edge'][k]}" for k in ("lr", "batch"))
        print(f"  N {c['N']:<9.3g} D {c['D']:<9.3g} lr {lr:<10} batch {batch:<10} "
              f"loss {c['loss']:.4f}  ({len(c['points'])} settings)")
    laws = fit_cells(cells, args.bootstrap, args.seed)
    for name, law in laws.items():
        describe(name, law, PUBLISHED[name[:5]]["Step Law"] if name in ("lr", "batch(D)") else None)
    cells.sort(key=lambda c: c["C"])
    largest = cells[-math.ceil(len(cells) / 4):]
    held = fit_cells(cells[:-len(largest)], args.bootstrap, args.seed, lambda line: None)
    print(f"  the {len(largest)} largest held out" + ": too few cells remain" * (not held))
    for c, name in product(largest, [name for name in held if name != "batch(D)"]):
        low, high = held[name].interval(**c)
        verdict = "on an edge" if c["edge"][name] else \
            "held" if low <= c[name] <= high else "MISSED"
        print(f"    N {c['N']:.3g} D {c['D']:<8.3g} {name:<6} {held[name].predict(**c):.4g} "
              f"[{low:.4g}, {high:.4g}], measured {c[name]:.4g}: {verdict}")
    rules = left_out(cells)
    if {"lr", "batch"} <= held.keys():
        rules["all but the largest"] = [excess(c, held["lr"], held["batch"]) for c in largest]
    for label, gaps in rules.items():
        print(f"  nearest run to {label:<20} loses {np.mean(gaps):.3%}, at most {max(gaps):.3%}; "
              f"within 0.25% of the best in {sum(g <= 0.0025 for g in gaps)} of {len(gaps)} cells")
    return cells, laws


def report_parity(dense, moe, args: Args) -> dict[str, Law]:
    """The report's question: which dense model does an MoE equal? One loss law of both kinds of
    cells says R^g times its activated N; g = 1 would make it worth its total N, g = 0 nothing."""
    N, R, D, loss = np.array([[c[k] for k in ("N", "R", "D", "loss")] for c in dense + moe]).T
    print("\nparity: one loss law of dense and MoE cells")
    law = fit_loss(N, D, loss, args.bootstrap, args.seed, R)
    describe("loss", law)
    for R in sorted({c["R"] for c in moe}):
        low, high = (R ** g for g in law.ci("g"))
        print(f"  an MoE of {R:.3g} x its activated N in all equals a dense model of "
              f"{R ** law['g']:.3g} x [{low:.3g}, {high:.3g}] its activated N")
    return {"loss": law}


def report_points(rows, args: Args) -> dict[str, Law]:
    """Chinchilla's points against Epoch AI's refit and its standard errors; like Epoch, without the
    5 highest losses: models trained on less than half a token a parameter."""
    rows = sorted(rows, key=lambda r: float(r["loss"]))[:-5]
    N, C, loss = np.array([[float(r[k]) for k in ("Model Size", "Training FLOP", "loss")]
                           for r in rows]).T
    law = fit_loss(N, C / 6 / N, loss, args.bootstrap, args.seed)
    epoch = PUBLISHED["loss"]["Epoch AI"]
    describe("loss", law, epoch)
    away = (f"{name} {abs(law[name] - epoch[name]) / error:.2f}"
            for name, error in EPOCH_ERRORS.items())
    print(f"  standard errors of Epoch AI's refit away: {', '.join(away)}; N* grows as "
          f"C^{law['beta'] / (law['alpha'] + law['beta']):.3f} (Epoch AI: 0.513)")
    return {"loss": law}


def fit(args: Args) -> dict[str, dict[str, Law]]:
    """The laws of all tables of --data, printed: {"dense", "moe", "points" or "parity": {name:
    law}}, as far as the tables go."""
    require(args.bootstrap > 1, f"--bootstrap wants at least 2, got {args.bootstrap}")
    out, cells = {}, {"dense": [], "moe": []}
    for path in map(Path, (args.data or f"{args.out}/rows.csv").split(",")):
        print(f"\n{path}")
        if "Model Size" in read_table(path)[0]:
            try:
                out["points"] = report_points(read_table(path), args)
            except (InputError, KeyError, ValueError) as error:
                raise InputError(f"{path}: no table of Chinchilla's points ({error})") from None
            continue
        rows = grid_rows(path)
        for kind in cells:
            if some := [r for r in rows if r["kind"] == kind]:
                cells[kind], out[kind] = report_runs(kind, some, args)
    if all(cells.values()) and sum(map(len, cells.values())) > 6:  # the law's coefficients
        out["parity"] = report_parity(*cells.values(), args)
    if args.plots:
        plot(out, Path(args.out))
    return out


def plot(tables: dict[str, dict[str, Law]], folder: Path) -> None:
    """A PNG a table: best lr and batch over D, a colour a size, with the law (line) and Step Law's
    and DeepSeek's (dashed, dotted); predicted against measured loss."""
    try:
        from matplotlib import pyplot
    except ImportError:
        return print("no plots: pip install matplotlib")
    folder.mkdir(parents=True, exist_ok=True)
    for table, laws in tables.items():
        laws = {name: law for name, law in laws.items() if name != "batch(D)"}
        figure, panels = pyplot.subplots(1, len(laws), figsize=(5 * len(laws), 4), squeeze=False)
        for axes, (name, law) in zip(panels[0], laws.items(), strict=True):
            axes.set(title=f"{table}: {name}")
            if name == "loss":
                axes.plot(law.y, law.predict(**dict(zip(law.axes, law.x.T, strict=True))), "o")
                axes.plot(np.sort(law.y), np.sort(law.y), "k-")
                axes.set(xlabel="measured", ylabel="predicted")
                continue
            D = np.geomspace(*law.seen[1])
            for i, N in enumerate(np.unique(law.x[:, 0])):
                color, here = f"C{i}", law.x[:, 0] == N
                axes.loglog(law.x[here, 1], law.y[here], "o", color=color, label=f"N {N:.3g}")
                for each, style in zip([law, *PUBLISHED[name].values()], "- -- :".split(),
                                       strict=True):
                    axes.loglog(D, each.predict(N=N, D=D, C=6 * N * D), style, color=color)
            axes.set(xlabel="D, tokens")
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncol=2)  # hides no line
        figure.savefig(folder / f"{table}.png", bbox_inches="tight")
        print(f"plot {folder}/{table}.png")


# ---------------------------------------------------------------------------------------------
# tables

def read_table(path: Path) -> list[dict]:
    with files.open_text(path) as file:
        try:
            rows = list(csv.DictReader(file))
        except (UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"{path}: not a CSV in UTF-8 ({error})") from None
    require(bool(rows), f"{path}: no rows")
    return rows


def grid_rows(path: Path) -> list[dict]:
    """rows.csv, or a table of Step Law: there `bs` counts sequences of 2,048 tokens, the final loss
    to use is the smoothed one (that of the last batch alone favours small batches by its noise),
    and the N of an MoE is `Na`, the activated part."""
    rows = read_table(path)
    foreign, moe = "bs" in rows[0], "Na" in rows[0]
    columns = {"N": "Na" if moe else "N", "D": "D", "lr": "lr",
               "batch_tokens": "bs" if foreign else "batch_tokens",
               "loss": "smooth loss" if foreign else "loss"}
    for number, row in enumerate(rows, 2):
        row.setdefault("kind", "moe" if moe else "dense")
        row |= {"total": row["N"]} if moe else {}
        try:
            row |= {name: float(row[column]) for name, column in columns.items()}
            good = all(0 < row[name] < math.inf or name == "loss" for name in columns)
        except (KeyError, TypeError, ValueError):
            good = False
        require(good, f"{path}:{number}: want positive numbers {', '.join(columns.values())}")
        row["batch_tokens"] *= 2048 if foreign else 1
    return rows


def write_rows(path: Path, rows: list[dict]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    files.write_atomic(path, text.getvalue())


# ---------------------------------------------------------------------------------------------
# plan

def flops(N: float, D: float, layers=0, width=0, seq_len=0, vocab_size=0) -> float:
    """Training FLOPs 6 N D and, where the shape is given, what this leaves out: the head and
    attention's scores (all, though half are masked). Little at 7B, most of a micro model. Without
    the head, and 72 L C^2 for 6 N, it is DeepSeek's M D."""
    return (6 * (N + vocab_size * width) + 12 * layers * width * seq_len) * D


def count(config: Config) -> dict[str, int]:
    """count_parameters without making any, and N: activated, without embedding and head."""
    with torch.device("meta"):
        sizes = Qwen2(config).count_parameters()
    return sizes | {"N": sizes["active"] - sizes["total"] + sizes["non_embedding"]}


def memory(config: Config, gpus: int, rows: int, seq_len: int, bf16=True, cuda=True,
           recompute=False) -> dict:
    """Bytes a GPU at the peak of pretrain.py's step under full sharding (FSDP): when the forward of
    a micro-batch ends and gradients of an earlier one exist. Activations: what autograd keeps of
    model.py, counted tensor by tensor: in a block 2 C of float32 (what the norms read), and in the
    products' dtype 4 C (norms' output, queries, attention's output), keys, values, gate and up; an
    MoE block 1 C for the shared expert, and as experts in one grouped product keep them, on CUDA,
    3 C and twice the inner activations more an expert.
    Gathered: autocast's bf16 copies of all weights on one GPU, but for an MLP's last; on several a
    block at a time, twice, and its gradient. Recomputed: what goes into each block, and all of one
    block, with the gradients of three inner activations, but not while the head's logits exist. Not
    counted: CUDA's context, oneDNN's buffers, communication, fragmentation."""
    sizes, C, V, tokens = count(config), config.hidden_size, config.vocab_size, rows * seq_len
    size, k, H = 2 if bf16 else 4, config.num_experts_per_tok, config.num_attention_heads
    kept, one = 2 * 4 * C, 0                    # final norm, gradient of the hidden
    cast = sizes["total"] - (0 if config.tie_word_embeddings else V * C)
    for sparse in map(config.is_sparse, range(config.num_hidden_layers)):
        routed = sparse * k * config.moe_intermediate_size
        inner = config.shared_expert_intermediate_size if sparse else config.intermediate_size
        full = 4 * (2 * C + H + sparse * config.num_experts) + size * (
            (4 + sparse * (1 + 3 * k * cuda)) * C + 2 * config.num_key_value_heads * config.head_dim
            + (2 + 2 * cuda) * routed + 2 * inner)
        kept += 4 * C if recompute else full
        one = max(one, full + 3 * size * (routed + inner))
        cast -= C * inner
    activations, logits = tokens * kept, 3 * 4 * (2 ** 27 if cuda else 2 ** 21)
    if recompute:
        activations += max(0, tokens * one - logits)
    rest, block = sizes["total"] - sizes["non_embedding"], \
        sizes["non_embedding"] // config.num_hidden_layers
    return {"weights": 4 * sizes["total"] / gpus, "gradients": 4 * sizes["total"] / gpus,
            "AdamW": 8 * sizes["total"] / gpus, "activations": activations,
            "gathered": 2 * cast * bf16 if gpus == 1 else 4 * rest + block * (2 * size + 4),
            "head": 4 * V * C + logits}


def plan(args: Args, laws: dict[str, Law] | None = None) -> dict:
    """Print and return one run: N, D, FLOPs, lr, batch and loss with intervals, where it leaves the
    fitted range (R6.4), and for a preset memory, days and cost. A --budget is spent
    compute-optimally: for 6 N D = budget, L is lowest at alpha A / N^alpha = beta B / D^beta. A law
    that --data does not give is a published one, and then its interval is the range of the
    published, no confidence interval."""
    config = PRESETS.get(args.model)
    if laws is None and args.data:
        with contextlib.redirect_stdout(io.StringIO()):
            tables = fit(args)
        kind = "moe" if config and config.num_experts else "dense"
        laws = tables.get(kind, {}) | tables.get("points", {})
        print(f"laws of {args.data}: {', '.join(laws)}")
    laws = laws or {}
    N = count(config)["N"] if config else lib.args.parse_value("model", args.model or "0", float)
    D, C = lib.args.parse_value("tokens", args.tokens or "0", float), args.budget
    require([N > 0, D > 0, C > 0] in ([True, True, False], [False, False, True]),
            "plan wants --model and --tokens, or --budget alone, positive")
    lib.args.positive(args, "gpus", "micro_batch", "mfu", "peak_tflops", "gpu_hour")
    if C:
        loss = laws.get("loss", PUBLISHED["loss"]["Epoch AI"])
        require(loss["alpha"] > 0 < loss["beta"], "the loss law does not fall with N and D, so no "
                "compute-optimal run: plan wants --model and --tokens")
        ratio = loss["alpha"] * loss["A"] / (loss["beta"] * loss["B"])
        N = (ratio * (C / 6) ** loss["beta"]) ** (1 / (loss["alpha"] + loss["beta"]))
        D = C / 6 / N
    out = {"N": N, "D": D, "C": flops(N, D), "extrapolates": []}
    print(f"plan: N {N:.4g}, D {D:.4g} tokens, 6 N D = {out['C']:.3g} FLOPs")
    for name, published in PUBLISHED.items():
        others = {label: float(law.predict(**out)) for label, law in published.items()}
        law = laws.get(name) or [*published.values()][0]
        low, high = law.interval(**out) if name in laws else sorted(others.values())
        out |= {name: float(law.predict(**out)), name + "_interval": (low, high)}
        print(f"  {name:<6}{out[name]:.4g}  [{low:.4g}, {high:.4g}]  "
              + "the range of: " * (name not in laws)
              + ", ".join(f"{label} {value:.4g}" for label, value in others.items()))
        for axis, (low, high) in zip(law.axes, law.seen, strict=True):
            if not low <= out[axis] <= high:
                far = out[axis] / (high if out[axis] > high else low)
                out["extrapolates"].append(f"{name} in {axis}, {far:.3g} x the nearest fitted")
    print("  EXTRAPOLATES: " + "; ".join(out["extrapolates"]) if out["extrapolates"] else
          "  inside the fitted range")
    return out | (plan_machines(args, config, N, D) if config else {})


def plan_machines(args: Args, config: Config, N: float, D: float) -> dict:
    """Memory, days and cost of a preset, with every assumption."""
    seq_len, sizes, bf16 = args.seq_len or 4096, count(config), args.dtype != "float32"
    if config.num_experts:
        lr = PUBLISHED["lr"]["Step Law"].predict(N=sizes["non_embedding"], D=D)
        print(f"  an MoE of {sizes['total']:.4g}: at its total N, which fits Step Law's MoE runs "
              f"better (recipes/scaling.md), lr {lr:.3g}")
    need = memory(
        config, args.gpus, args.micro_batch, seq_len, bf16, True, args.gradient_checkpointing
    )
    total = sum(need.values()) / 1e9
    print(
        f"  memory a GPU: {total:.1f} GB of {args.gpu_gb:g}: "
        + ", ".join(f"{name} {value / 1e9:.2f}" for name, value in need.items())
        + f"\n    (FSDP over {args.gpus}, float32 weights and states, "
        f"{'bf16' if bf16 else 'float32'} compute, {args.micro_batch} x {seq_len} tokens, "
        f"{'' if args.gradient_checkpointing else 'no '}gradient checkpointing; "
        "without context and buffers, 1-3 GB)"
    )
    if total > args.gpu_gb:
        print(
            "    DOES NOT FIT: more --gpus, a smaller --micro_batch or --seq_len, or "
            "--gradient_checkpointing"
        )
    work = flops(N, D, config.num_hidden_layers, config.hidden_size, seq_len, config.vocab_size)
    work *= 4 / 3 if args.gradient_checkpointing else 1  # a forward pass more
    hours = work / (args.gpus * args.peak_tflops * 1e12 * args.mfu) / 3600
    cost = hours * args.gpus * args.gpu_hour
    print(f"  time: {work:.3g} FLOPs with head and attention at {seq_len} = {hours / 24:.1f} days, "
          f"{cost:,.0f} at {args.gpu_hour:g} a GPU hour\n    ({args.gpus} GPUs, "
          f"{args.peak_tflops:g} TFLOPS peak, MFU {args.mfu:g} assumed, no restarts)")
    return {"memory": need, "memory_gb": total, "training_flops": work, "days": hours / 24,
            "cost": cost}


# ---------------------------------------------------------------------------------------------
# sweep

def add_preset(name: str) -> None:
    """ "64x2": 64 wide (heads of 16), 2 layers; "-moe": 2 of 8 experts and a shared one, together
    as wide as the dense MLP, so that both meet a token with about the same N."""
    (width, _, layers), moe = name.removesuffix("-moe").partition("x"), name.endswith("-moe")
    require(name in PRESETS or width.isdigit() and layers.isdigit()
            and min(int(width), int(layers)) > 0,
            f"--sizes wants presets or WIDTHxLAYERS[-moe], got {name!r}")
    if name not in PRESETS:
        C, F = int(width), max(1, int(width) // 6) * 16
        PRESETS[name] = replace(
            PRESETS["micro-moe" if moe else "micro"], hidden_size=C, intermediate_size=F,
            num_hidden_layers=int(layers), num_attention_heads=max(1, C // 16),
            num_key_value_heads=1, moe_intermediate_size=F // 4 * moe,
            shared_expert_intermediate_size=F // 2 * moe)


def prepare(args: Args, tokens: float) -> None:
    """Part of the built-in corpus and a tokenizer, made once for all runs. Pieces of 1,000
    characters, so that the fiftieth held out is a few dozen of them and not one file."""
    if args.resume and Path(f"{args.out}/tokenizer").is_dir():
        return  # another corpus would have another held-out loss
    sources = corpus.builtin_corpus(args.seed, max_mb=max(1.0, tokens * 4e-6))
    texts = [doc["text"] for docs in sources.values() for doc in docs]
    pieces = [text[i:i + 1000] for text in texts for i in range(0, len(text), 1000)]
    pieces = pieces[::max(1, len(pieces) // max(1000, int(tokens / 250)))]  # every run reads them
    files.write_jsonl(f"{args.out}/data/builtin.jsonl", ({"text": text} for text in pieces))
    Tokenizer.train(
        (text for text in pieces if not mixture.is_held_out(text)), 384
    ).save_pretrained(f"{args.out}/tokenizer")


def measure(args: Args, size: str, D: float, lr: float, batch: float, seed: int, device) -> dict:
    """One run of pretrain.py -> a row of rows.csv (R6.1). Its directory is used again by the next.
    Warm-up is a tenth of the steps: a fixed number would favour small batches."""
    asked = pretrain.Args(
        out=f"{args.out}/last", data=f"{args.out}/data", tokenizer=f"{args.out}/tokenizer",
        model=size, tokens=int(D), lr=lr, batch_tokens=int(batch), warmup=int(D / batch / 10),
        seq_len=args.seq_len, micro_batch=64, eval_every=10**9, save_every=10**9, seed=seed,
        device=args.device, dtype=args.dtype, overwrite=True)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            loss = pretrain.main(asked)["val_loss"]
        except lib.run.Diverged:
            loss = math.inf  # a rate that is too high is a result
    sizes = count(PRESETS[size])
    return {"kind": "moe" if PRESETS[size].num_experts else "dense", "size": size, "N": sizes["N"],
            "total": sizes["non_embedding"], "D": D, "lr": lr, "batch_tokens": batch, "loss": loss,
            "warmup": asked.warmup, "seed": seed, "schedule": f"cosine to {asked.final_lr}",
            "seq_len": args.seq_len, "device": str(device), "dtype": args.dtype}


def descend(value, shape: tuple[int, int], at: tuple[int, int]) -> tuple[int, int]:
    """Walk from `at` to a grid point that none of its eight neighbours beats: about 11 runs in
    place of the whole grid, which also surround the optimum for the fit of its surface. Diagonals
    count: the valley runs along them, a higher rate for a larger batch."""
    while True:
        near = [(at[0] + i, at[1] + j) for i, j in product((0, 1, -1), repeat=2)]
        best = min((p for p in near if 0 <= p[0] < shape[0] and 0 <= p[1] < shape[1]), key=value)
        if best == at:
            return at
        at = best


def sweep(args: Args, run: Run, rows: list[dict], device) -> None:
    """Add to rows, and to rows.csv, each cell's runs from the last cell's optimum to its own."""
    lrs, batches, tokens = axes = [
        sorted(lib.args.parse_value(name, part, float) for part in getattr(args, name).split(","))
        for name in ("lrs", "batches", "tokens")]
    require(all(axis[0] > 0 for axis in axes), "--lrs, --batches and --tokens must be positive")
    require(all(r["seq_len"] == str(args.seq_len) for r in rows),
            f"--resume: {run.path} has rows of another --seq_len: take another --out")
    for size in args.sizes.split(","):
        add_preset(size)
    run.start_or_resume()
    prepare(args, tokens[-1])
    done = {(r["size"], r["D"], r["lr"], r["batch_tokens"], int(r["seed"])): r for r in rows}
    shape, cells = (len(lrs), len(batches)), list(product(args.sizes.split(","), tokens))
    at, bar = (shape[0] // 2, shape[1] // 2), tqdm(cells, desc="scaling", disable=None)
    for number, cell in enumerate(bar, 1):
        def value(point, cell=cell):
            keys = [(*cell, lrs[point[0]], batches[point[1]], args.seed + i)
                    for i in range(args.seeds)]
            for key in keys:
                if key not in done:
                    done[key] = measure(args, *key, device)
                    rows.append(done[key])
                    write_rows(run.path / "rows.csv", rows)
            loss = sum(done[key]["loss"] for key in keys) / len(keys)
            return loss if math.isfinite(loss) else math.inf
        at = descend(value, shape, at)
        run.log(number, len(cells), bar, N=count(PRESETS[cell[0]])["N"], D=cell[1], lr=lrs[at[0]],
                batch_tokens=batches[at[1]], loss=value(at), runs=len(rows))


# ---------------------------------------------------------------------------------------------

def main(args: Args) -> dict:
    """The sweep, and its fit."""
    require(not args.data, "a sweep trains on the built-in corpus; --data is for fit and plan")
    device, _ = optim.setup(args)
    args = replace(args, seq_len=args.seq_len or 64, tokens=args.tokens or "5e3,1e4,2e4")
    path = Path(args.out) / "rows.csv"
    rows = grid_rows(path) if args.resume and path.exists() else []
    # rows.csv is all the state there is, so Run is not asked for its own
    run = Run(replace(args, resume=False, overwrite=args.overwrite or args.resume), "scaling")
    sweep(args, run, rows, device)
    run.write_record({"finished": True, "seconds": round(run.seconds(), 1),
                      "result": {"runs": len(rows)}})
    return fit(args)


if __name__ == "__main__":
    lib.args.cli(main, Args, sweep=main, fit=fit, plan=plan)
