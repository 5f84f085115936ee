"""Scaling laws: which learning rate, batch and loss for which model and data size, and what a run
would take (report section 3.2).

The report: how the best learning rate and batch size depend on model size N and data size D was
measured on dense models of 44M to 14B and MoEs of 44M to 1B *activated* parameters, on 0.8B to
600B tokens; then the loss at those settings, as a function of architecture and data, compares MoEs
with dense models. Neither forms nor coefficients nor runs are disclosed. The forms are open work's,
fitted here to open work's runs and to our own:

    lr* = a N^b D^c,  batch* = a N^b D^c     Step Law (arXiv 2503.04715; its batch has no N)
    L(N, D) = E + A / N^alpha + B / D^beta   Chinchilla (2203.15556), as refitted by Epoch AI
    N*(C) = a C^b,  D* = C / (6 N*)          IsoFLOP curves: Chinchilla, Porian et al. (2406.19146)

N: parameters that a token meets, without embedding and head; D, batch: tokens; C: FLOPs, 6 N D;
loss: nats a token. Another schedule, data or way to count N gives other coefficients, so every row
of rows.csv says what it was measured with.

    python scaling.py                       # sweep: 68 runs of micro models, a minute or two; fit
    python scaling.py fit --data PATH       # every number again from tables of runs (CSV, JSON)
    python scaling.py plan --model 7B --tokens 18e12 --gpus 64
    python scaling.py plan --budget 1e21 --data PATH

Expect of the sweep the method in small, not a result: on so few tokens the smallest batch is always
best. An optimum on the edge of its grid is no measurement: it is flagged, left out of the fit, and
asks for a wider grid.
"""
import contextlib
import csv
import io
import json
import math
import sys
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import common
import data
import pretrain
from common import InputError, Run, require
from model import PRESETS, Config, Qwen2
from tokenizer import Tokenizer


@dataclass
class Args:
    command: str = "sweep"           # sweep, fit or plan; the word alone will do
    data: str = ""                   # fit, plan: tables of runs; sweep: as in pretrain.py
    out: str = "runs/scaling"        # where rows.csv, log.jsonl, run.json and plots go
    bootstrap: int = 200             # resamples of the loss law; five times as many of the others
    degree: int = 3                  # of a cell's loss surface; 0: its lowest run is the optimum
    within: float = 0.01             # the surface is fitted to runs so near the lowest loss
    plots: bool = False              # fit, sweep: predicted against measured as PNG (matplotlib)
    sizes: str = "16x2,32x2,64x2,32x2-moe"         # sweep: WIDTHxLAYERS[-moe], or presets
    tokens: str = ""                 # training tokens; sweep: a list (empty: 5e3,1e4,2e4)
    lrs: str = "2e-3,4e-3,8e-3,16e-3,32e-3,64e-3"  # sweep: grid of peak learning rates
    batches: str = "128,256,512"     # sweep: grid of batch sizes, in tokens
    tokenizer: str = ""              # sweep: as in pretrain.py; needed with --data
    model: str = ""                  # plan: a preset of model.py, or N as a number
    budget: float = 0.0              # plan: training FLOPs, 6 N D
    gpus: int = 8                    # plan: how many share the model (FSDP)
    micro_batch: int = 1             # plan: rows a GPU at a time
    seq_len: int = 0                 # positions a row (0: 64 in a sweep, 4096 in a plan)
    mfu: float = 0.4                 # plan: share of the peak reached, an assumption
    peak_tflops: float = 989.0       # plan: peak of one GPU (H100, bf16, dense)
    gpu_gb: float = 80.0             # plan: memory of one GPU
    gpu_hour: float = 2.5            # plan: price of a GPU hour, an assumption
    seed: int = 0                    # of weights, data order and bootstrap
    device: str = "auto"             # sweep: auto, cpu, cuda[:N]
    dtype: str = "auto"              # auto, float32, bfloat16 (a plan's auto: bfloat16)
    resume: bool = False             # sweep: keep the rows that --out has, train what is missing
    overwrite: bool = False          # sweep: replace what --out holds


# ---------------------------------------------------------------------------------------------
# laws

def student(dof: int) -> float:
    """97.5% quantile of Student's t over the normal one, by its series in 1/dof, within 2% from 4
    on: few cells want wider intervals. Of simulated laws of 9 cells those called 95% then cover
    91-92%, without it 85%."""
    z = 1.96
    return 1 + (z ** 2 + 1) / (4 * dof) + (5 * z ** 4 + 16 * z ** 2 + 3) / (96 * dof ** 2)


@dataclass
class Law:
    """log y = form(coef, log x). seen: range of each axis of x, of which there are `axes`: N, D, C.
    draws: coef over the bootstrap, (R, k). x, y: the n cells fitted, spread: sd of their residual
    logarithms, edges: how many more were left out."""
    axes: str
    coef: np.ndarray
    seen: tuple = ()
    x: np.ndarray = None
    y: np.ndarray = None
    draws: np.ndarray = None
    spread: float = 0.0
    edges: int = 0

    def predict(self, **x):
        return np.exp(self.form(self.coef, *(np.log(x[axis]) for axis in self.axes)))

    def interval(self, **x) -> tuple[float, float]:
        """95%, for one more cell: the law's uncertainty and the scatter of a cell around it."""
        logs = [math.log(x[axis]) for axis in self.axes]
        samples, noise = self.form(self.draws, *logs), np.random.default_rng(0)
        noise = noise.normal(0, self.spread * student(self.dof), samples.shape)
        return tuple(np.exp(self.percentiles(self.form(self.coef, *logs), samples, noise)))

    def ci(self, name: str) -> tuple[float, float]:
        """95% interval of a coefficient."""
        i, scale = self.names.index(name), np.exp if name in "EAB" else np.asarray
        found = self.percentiles(scale(self.coef[i]), scale(self.draws[:, i]))
        return tuple(np.exp(found) if name == "a" else found)

    def percentiles(self, centre, samples, noise=0.0):
        """What k coefficients leave of n residuals is too small by sqrt((n - k) / n), and so is a
        bootstrap of them."""
        widen = math.sqrt(len(self.y) / self.dof) * student(self.dof)
        return np.percentile(centre + (samples - centre) * widen + noise, [2.5, 97.5])

    def __getitem__(self, name: str) -> float:
        value = self.coef[self.names.index(name)]
        return float(np.exp(value) if name in "aEAB" else value)

    @property
    def dof(self):
        return len(self.y) - len(self.coef)

    def finish(self, X, Y, draws) -> "Law":
        """With the logs X, Y of the cells that it was fitted to."""
        law, errors = replace(self, x=np.exp(X), y=np.exp(Y), draws=draws), Y - self.form(
            self.coef, *X.T)
        return replace(law, spread=math.sqrt((errors ** 2).sum() / law.dof),
                       seen=tuple(zip(np.exp(X.min(0)), np.exp(X.max(0)), strict=True)))

    def __str__(self):
        shown = ("{} {:.4g} [{:.4g}, {:.4g}]".format(n, self[n], *self.ci(n)) for n in self.names)
        return (f"{', '.join(shown)}; {len(self.y)} cells, {self.edges} more on an edge, scatter "
                f"{self.spread:.2g}")


class PowerLaw(Law):
    """a x1^b1 x2^b2; coef: log a and the exponents, which are named as their axes."""

    @property
    def names(self):
        return ("a", *self.axes)

    @staticmethod
    def form(coef, *logs):
        return coef[..., 0] + sum(coef[..., i] * x for i, x in enumerate(logs, 1))


class LossLaw(Law):
    """E + A / N^alpha + B / D^beta; coef: log E, log A, log B, alpha, beta."""
    names = "E", "A", "B", "alpha", "beta"

    @staticmethod
    def form(coef, n, d):
        e, a, b, alpha, beta = (coef[..., i] for i in range(5))
        return np.logaddexp(np.logaddexp(e, a - alpha * n), b - beta * d)


def known(kind, axes: str, scales, exponents, *seen) -> Law:
    return kind(axes, np.array([*np.log(scales), *exponents]), seen)


# Step Law: N without vocabulary; its last lr is 1e-5, not 10% of the peak. seen: its public table
STEP_LR = known(PowerLaw, "ND", [1.79], (-0.713, 0.307), (2.1e8, 1.1e9), (4e9, 1e11))
STEP_BATCH = known(PowerLaw, "D", [0.58], [0.571], (4e9, 1e11))
# DeepSeek LLM (2401.02954; some copies print 0.3188), fitted at 1e17 to 2e19 FLOPs
DEEPSEEK_LR = known(PowerLaw, "C", [0.3118], [-0.1250], (1e17, 2e19))
DEEPSEEK_BATCH = known(PowerLaw, "C", [0.2920], [0.3271], (1e17, 2e19))
# Chinchilla as published, and its points as refitted by Epoch AI (2404.10102)
CHINCHILLA = known(LossLaw, "ND", [1.69, 406.4, 410.7], (0.34, 0.28), (5.7e7, 1.6e10),
                   (8.2e8, 3.2e11))
EPOCH = known(LossLaw, "ND", [1.81686, 482.006, 2085.434], (0.34781, 0.36585), *CHINCHILLA.seen)
PUBLISHED = {"lr": {"Step Law": STEP_LR, "DeepSeek": DEEPSEEK_LR},
             "batch": {"Step Law": STEP_BATCH, "DeepSeek": DEEPSEEK_BATCH},
             "loss": {"Epoch AI": EPOCH, "Chinchilla": CHINCHILLA}}


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
    return law.finish(x, y, solve(resample(n, bootstrap, seed)))


def fit_loss(N, D, loss, bootstrap=200, seed=0) -> LossLaw:
    """Minimise sum_i Huber_1e-3(LSE(e, a - alpha log N_i, b - beta log D_i) - log L_i), E = exp(e)
    and so on (Chinchilla eq. 3), from a grid of starts. The sum, not the mean: by the mean the
    published fit stopped too early (Epoch AI). All starts, then all resamples, at once: each step
    is Levenberg-Marquardt's on the least squares that touch the Huber loss from above. Logs are
    centred, for raw, a and alpha are nearly one direction."""
    logs = np.log(np.stack([N, D, loss], -1).astype(float))
    require(len(logs) > 5, f"no loss law: {len(logs)} cells do not determine 5 coefficients")
    (x0, y0, z0), (x, y, z), delta = logs.mean(0), (logs - logs.mean(0)).T, 1e-3

    def errors(p):  # (R, 5) -> (R, n), Jacobian (R, n, 5)
        terms = np.stack(np.broadcast_arrays(p[:, :1], p[:, 1:2] - p[:, 3:4] * x,
                                             p[:, 2:3] - p[:, 4:] * y), -1)
        total = np.logaddexp.reduce(terms, -1)
        share = np.exp(terms - total[..., None])
        slopes = -share[..., 1:] * np.stack([x, y], -1)
        return total - z, np.concatenate([share, slopes], -1)

    def minimise(p, weights, steps=100):
        def huber(r):
            r = abs(r)
            return (weights * np.where(r < delta, r * r / 2, delta * (r - delta / 2))).sum(-1)
        (r, J), damp = errors(p), np.full(len(p), 1e-2)
        for _ in range(steps):
            h = weights * np.minimum(1, delta / np.maximum(abs(r), 1e-12))
            H = np.swapaxes(J * h[..., None], 1, 2) @ J
            H[:, range(5), range(5)] *= 1 + damp[:, None]
            H[:, range(5), range(5)] += 1e-12
            q = p - np.linalg.solve(H, np.swapaxes(J, 1, 2) @ (h * r)[..., None])[..., 0]
            new = errors(q)
            ok = huber(new[0]) < huber(r)
            p, damp = np.where(ok[:, None], q, p), np.clip(damp * np.where(ok, 0.2, 5), 1e-9, 1e9)
            r, J = np.where(ok[:, None], new[0], r), np.where(ok[:, None, None], new[1], J)
        return p, huber(r)

    uncentre = np.eye(5)
    uncentre[3, 1], uncentre[4, 2] = x0, y0
    share, power = np.log([0.05, 0.3, 0.8]), (0.1, 0.4, 1.0)
    best = np.array(list(product(share, share, share, power, power)))
    for steps, keep in ((30, 5), (300, 1)):
        best, value = minimise(best, np.ones((1, len(x))), steps)
        best = best[value.argsort()[:keep]]
    best = best[0]
    start = np.maximum(best, [math.log(0.1), *[-math.inf] * 4])  # where E is 0 no step would leave
    draws, _ = minimise(np.tile(start, (bootstrap, 1)), resample(len(x), bootstrap, seed))
    best, draws = (p @ uncentre + [z0, z0, z0, 0, 0] for p in (best, draws))
    return LossLaw("ND", best).finish(logs[:, :2], logs[:, 2], draws)


# ---------------------------------------------------------------------------------------------
# optima

def cells_of(rows) -> dict[tuple, dict]:
    """{(N, D): {(lr, batch): loss}}, sorted. Repeats are averaged: a minimum would favour the point
    tried most often. A diverged run (nan) is a point of infinite loss."""
    cells = {}
    for r in rows:
        N, D, lr, batch, loss = (float(r[k]) for k in ("N", "D", "lr", "batch_tokens", "loss"))
        cells.setdefault((N, D), {}).setdefault((lr, batch), []).append(loss)
    return {cell: {p: math.fsum(v) / len(v) if all(map(math.isfinite, v)) else math.inf
                   for p, v in sorted(cells[cell].items())} for cell in sorted(cells)}


def optimum(points: dict[tuple, float], degree=3, within=0.01):
    """One cell's best (lr, batch), and for each whether it is on the edge of the grid.

    The minimum of a polynomial in (log lr, log batch), fitted by least squares to the runs `within`
    of the lowest loss, looked for no further than half a grid step from these: the valley is so
    flat that noise moves the lowest run by a step or two. Degree 3 within 1% predicts left-out runs
    near the optima of Step Law's table as well as any (LOG.md, 2026-11-24). With fewer than 1.5
    runs a coefficient the degree is lowered, and below 2 a parabola is laid through the lowest run
    and its neighbours on each axis."""
    xy, loss = np.log(list(points)), np.array(list(points.values()))
    low, high, near = xy.min(0), xy.max(0), loss <= loss.min() * (1 + within)
    best = lowest = xy[loss.argmin()]
    enough = [d for d in range(2, degree + 1) if near.sum() >= 0.75 * (d + 1) * (d + 2)]
    if enough:
        centre, step = xy[near].mean(0), [np.median(np.diff(np.unique(x))) for x in xy.T]

        def terms(at):
            u, v = (at - centre).T
            return np.stack([u ** i * v ** j for i in range(enough[-1] + 1)
                             for j in range(enough[-1] + 1 - i)], -1)
        coef, found = np.linalg.lstsq(terms(xy[near]), loss[near], rcond=None)[0], xy[near]
        patch = np.array(list(product(np.linspace(-0.5, 0.5, 21), repeat=2))) * step
        for zoom in range(7):
            found = (found[:, None] + patch * 0.1 ** zoom).reshape(-1, 2).clip(low, high)
            found = found[[(terms(found) @ coef).argmin()]]
        best = found[0]
    elif degree:
        best = lowest.copy()
        for i in (0, 1):
            line = {x[i]: y for x, y in zip(xy, loss, strict=True) if x[1 - i] == lowest[1 - i]}
            near = sorted(x for x in line if x <= lowest[i])[-2:] + sorted(
                x for x in line if x > lowest[i])[:1]
            if len(near) == 3 and math.isfinite(sum(map(line.get, near))):
                curve, slope, _ = np.polyfit(near - lowest[i], [line[x] for x in near], 2)
                best[i] -= slope / (2 * curve) if curve > 0 else 0
    edge = np.any([lowest == low, lowest == high, best == low, best == high], axis=0)
    return tuple(np.exp(best).tolist()), tuple(edge.tolist())


def nearest(points: dict[tuple, float], lr: float, batch: float) -> float:
    """How much worse than the cell's best run the run nearest to (lr, batch) is, a share; inf if
    none is within a factor of 2."""
    away = {p: (math.log2(p[0] / lr), math.log2(p[1] / batch)) for p in points}
    near = min(points, key=lambda p: math.hypot(*away[p]))
    return points[near] / min(points.values()) - 1 if max(map(abs, away[near])) <= 1 else math.inf


def akima(x, y, at):
    """Akima's interpolation (1970): cubics whose slope at a point leans to its straighter side."""
    m = np.diff(y) / np.diff(x)
    m = np.r_[3 * m[0] - 2 * m[1], 2 * m[0] - m[1], m, 2 * m[-1] - m[-2], 3 * m[-1] - 2 * m[-2]]
    bend = abs(np.diff(m)) + 1e-12
    slope = (bend[2:] * m[1:-2] + bend[:-2] * m[2:-1]) / (bend[2:] + bend[:-2])
    i = np.clip(np.searchsorted(x, at) - 1, 0, len(x) - 2)
    h = x[i + 1] - x[i]
    s = (at - x[i]) / h
    return (y[i] * (1 + 2 * s) * (1 - s) ** 2 + h * slope[i] * s * (1 - s) ** 2
            + y[i + 1] * s * s * (3 - 2 * s) + h * slope[i + 1] * s * s * (s - 1))


def fit_isoflop(curves: dict[float, list], bootstrap=1000, seed=0) -> PowerLaw:
    """{C: [(N, loss), ...]} -> N*(C). Each minimum by Akima's interpolation of log loss over log N,
    as Porian et al. do; one at the end of its curve is left out."""
    found = {}
    for C, curve in curves.items():
        x, y = np.log(sorted(curve)).T
        if 0 < y.argmin() < len(x) - 1:
            at = np.linspace(x[0], x[-1], 20001)
            found[C] = math.exp(at[akima(x, y, at).argmin()])
    return fit_power("C", list(found), list(found.values()), bootstrap, seed,
                     len(curves) - len(found))


# ---------------------------------------------------------------------------------------------
# reports: each prints a table and returns its laws

def compare(law: Law, label: str, published: dict, error=None) -> None:
    """A line a coefficient: this fit with 95% interval, the published value, and if it is inside;
    with published standard errors, how many of them away."""
    for name, value in published.items():
        low, high = law.ci(name)
        verdict = "inside" if low <= value <= high else "OUTSIDE"
        if error:
            verdict += f", {abs(law[name] - value) / error[name]:.2f} of its standard error away"
        edges = f" ({law.edges} of {len(law.y) + law.edges} on an edge)" * bool(law.edges)
        print(f"  {label:<10}{name:<7}{law[name]:>10.4g}  [{low:.4g}, {high:.4g}]"
              f"  published {value:.4g}: {verdict}{edges}")


def measure_cells(rows, degree=3, within=0.01) -> list[dict]:
    cells = []
    for (N, D), points in cells_of(rows).items():
        best, edge = optimum(points, degree, within)
        cells.append({"N": N, "D": D, "lr": best[0], "batch": best[1], "loss": min(points.values()),
                      "edge": {"lr": edge[0], "batch": edge[1], "loss": False}, "points": points})
    return cells


def fit_cells(cells, bootstrap=200, seed=0, show=print, loss=True) -> dict[str, Law]:
    """The laws for lr, batch (of N and D, and as Step Law's, of D alone) and loss; one that the
    cells do not determine is left out, with a line that says why. A cell's loss is that of its best
    run: the report trains once more at the predicted optimum; on a grid such a run exists."""
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


def report_runs(kind: str, rows, args: Args) -> dict[str, Law]:
    """Runs over a grid of (lr, batch) in cells of (N, D): the optima, the laws, the largest quarter
    of the cells predicted from the others, and each cell's settings predicted from all others."""
    cells = measure_cells(rows, args.degree, args.within)
    print(f"{kind}: {len(rows)} runs, best settings of {len(cells)} cells (* on an edge, left out)")
    for c in cells:
        lr, batch = (f"{c[k]:.3g}{'*' * c['edge'][k]}" for k in ("lr", "batch"))
        print(f"  N {c['N']:<9.3g} D {c['D']:<9.3g} lr {lr:<10} batch {batch:<10} "
              f"loss {c['loss']:.4f}  ({len(c['points'])} runs)")
    laws = fit_cells(cells, args.bootstrap, args.seed)
    for name, published in (("lr", STEP_LR), ("batch(D)", STEP_BATCH)):
        if name in laws:
            compare(laws[name], name, {axis: published[axis] for axis in published.axes})
    for name in ("lr", "batch", "loss"):
        if name in laws:
            print(f"  {name}: {laws[name]}")
    cells.sort(key=lambda c: c["N"] * c["D"])
    largest = cells[-math.ceil(len(cells) / 4):]
    held = fit_cells(cells[:-len(largest)], args.bootstrap, args.seed, lambda line: None)
    print(f"  the {len(largest)} largest held out" + ": too few cells remain" * (not held))
    for c, name in product(largest, [name for name in held if name != "batch(D)"]):
        x = {"N": c["N"], "D": c["D"]}
        low, high = held[name].interval(**x)
        verdict = "on an edge" if c["edge"][name] else \
            "held" if low <= c[name] <= high else "MISSED"
        print(f"    N {c['N']:.3g} D {c['D']:<8.3g} {name:<6} {held[name].predict(**x):.4g} "
              f"[{low:.4g}, {high:.4g}], measured {c[name]:.4g}: {verdict}")
    rules = left_out(cells, rows)
    if {"lr", "batch"} <= held.keys():
        rules["(largest) the other cells"] = [nearest(c["points"], *(held[name].predict(
            N=c["N"], D=c["D"]) for name in ("lr", "batch"))) for c in largest]
    for label, gaps in rules.items():
        print(f"  nearest run to {label:<25} loses {np.mean(gaps):.3%}, at most {max(gaps):.3%}; "
              f"within 0.25% of the best in {sum(g <= 0.0025 for g in gaps)} of {len(gaps)} cells")
    return laws


def left_out(cells, rows) -> dict[str, list[float]]:
    """{rule for (lr, batch): the loss of the nearest run over the cell's best - 1, a cell each}.
    0.25% is what DeepSeek calls near-optimal. "the other cells": laws fitted without the cell."""
    out, total = {}, {float(r["N"]): float(r.get("total") or r["N"]) for r in rows}
    for c in cells:
        x = {"N": c["N"], "D": c["D"], "C": flops(c["N"], c["D"])}
        laws = fit_cells([o for o in cells if o is not c], 2, 0, lambda line: None, loss=False)
        rules = {"Step Law": (STEP_LR, STEP_BATCH, x),
                 "DeepSeek LLM": (DEEPSEEK_LR, DEEPSEEK_BATCH, x)}
        if total[c["N"]] != c["N"]:
            rules["Step Law at total N"] = STEP_LR, STEP_BATCH, x | {"N": total[c["N"]]}
        for name, label in (("batch", "the other cells"), ("batch(D)", "those, batch of D only")):
            if {"lr", name} <= laws.keys():
                rules[label] = laws["lr"], laws[name], x
        for label, (lr, batch, x) in rules.items():
            out.setdefault(label, []).append(nearest(c["points"], lr.predict(**x),
                                                     batch.predict(**x)))
    return out


def report_parity(dense: Law, moe) -> None:
    """The report's question: which dense model would an MoE equal? Solve the dense law for N."""
    for (N, D), points in cells_of(moe).items():
        loss, (low, high) = min(points.values()), dense.interval(N=N, D=D)
        room = loss - dense["E"] - dense["B"] * D ** -dense["beta"]
        equal = (dense["A"] / room) ** (1 / dense["alpha"]) if room > 0 else math.inf
        print(f"  MoE of N {N:.4g}, D {D:.4g}: loss {loss:.4f}; a dense model of that N "
              f"{dense.predict(N=N, D=D):.4f} [{low:.4f}, {high:.4f}], equal at N {equal:.3g}")


def columns(rows, *names):
    return (np.array([float(row[name]) for row in rows]) for name in names)


def report_points(rows, args: Args) -> dict[str, Law]:
    """Chinchilla's points against Epoch AI's refit and its standard errors; like Epoch, without the
    5 highest losses: models trained on less than half a token a parameter."""
    rows = sorted(rows, key=lambda r: float(r["loss"]))[:-5]
    N, C, loss = columns(rows, "Model Size", "Training FLOP", "loss")
    law = fit_loss(N, C / 6 / N, loss, args.bootstrap, args.seed)
    print(f"loss law of {len(loss)} points")
    compare(law, "loss", {name: EPOCH[name] for name in law.names},
            {"E": 0.026, "A": 125, "B": 1293, "alpha": 0.015, "beta": 0.021})
    print(f"  N* grows as C^{law['beta'] / (law['alpha'] + law['beta']):.3f} (Epoch AI: 0.513)")
    return {"loss": law}


def report_isoflop(rows, args: Args) -> dict[str, Law]:
    """IsoFLOP minima of plain curves, which have no published answer but must agree with a loss law
    of the same points; or Porian et al.'s, with their exponents."""
    laws, again = {}, (5 * args.bootstrap, args.seed)
    if "compute_budget" in rows[0]:
        N, C, loss = columns(rows, "parameters", "compute_budget", "final_loss")
        law = fit_loss(N, C / 6 / N, loss, args.bootstrap, args.seed)
        laws["N*"] = fit_isoflop({c: zip(N[C == c], loss[C == c], strict=True) for c in C}, *again)
        print(f"IsoFLOP curves: N* {laws['N*']}\n  a loss law of the same points, scatter "
              f"{law.spread:.2g}, says C^{law['beta'] / (law['alpha'] + law['beta']):.4f}")
        return laws
    print("IsoFLOP curves of Porian et al.: parameters/warm-up/schedule/count of N")
    for r in rows:
        label = "/".join(r[key] for key in ("hparams", "warmup", "decay", "param_count"))
        laws[label] = fit_isoflop({p["flops"]: zip(p["n_vals"], p["loss_vals"], strict=True)
                                   for p in r["optimal_pairs"]}, *again)
        compare(laws[label], f"{label:<32}", {"C": r["fit"]["n_exponent"]})
    return laws


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


def memory(config: Config, gpus: int, rows: int, seq_len: int, bf16=True, cuda=True) -> dict:
    """Bytes a GPU at the peak of pretrain.py's step under full sharding (FSDP): when the forward of
    a micro-batch ends and gradients of an earlier one exist. Activations: what autograd keeps of
    model.py, counted tensor by tensor: in a block 4 C of float32 (two norms, before and after), and
    in bf16, where autocast copies the input of each matrix, 7 C (float32: 4 C), keys and values and
    4 inner activations; an MoE block 3 C more an expert and 3 C (1 C) for router and shared expert.
    No recomputation. Not counted: CUDA's context, communication buffers, fragmentation."""
    sizes, C, V, tokens = count(config), config.hidden_size, config.vocab_size, rows * seq_len
    size, k, H = 2 if bf16 else 4, config.num_experts_per_tok, config.num_attention_heads
    kept = 3 * 4 * C                                       # final norm, gradient of the hidden
    for sparse in map(config.is_sparse, range(config.num_hidden_layers)):
        inner = k * config.moe_intermediate_size + config.shared_expert_intermediate_size \
            if sparse else config.intermediate_size
        wide = (7 if bf16 else 4) + sparse * (3 * k + (3 if bf16 else 1))
        kept += 4 * (4 * C + H + 2 + sparse * config.num_experts) + size * (
            wide * C + 2 * config.num_key_value_heads * config.head_dim + 4 * inner)
    rest, block = sizes["total"] - sizes["non_embedding"], \
        sizes["non_embedding"] // config.num_hidden_layers
    copies = 2 * (sizes["total"] - (0 if config.tie_word_embeddings else V * C)) * bf16
    return {"weights": 4 * sizes["total"] / gpus, "gradients": 4 * sizes["total"] / gpus,
            "AdamW": 8 * sizes["total"] / gpus, "activations": tokens * kept,
            "gathered": copies if gpus == 1 else 4 * rest + block * (2 * size + 4),
            "head": 4 * V * C + 3 * 4 * (2 ** 27 if cuda else 2 ** 21)}


def plan(args: Args, laws: dict[str, Law]) -> dict:
    """Print and return one run: N, D, FLOPs, lr, batch and loss with intervals, where it leaves the
    fitted range (R6.4), and for a preset memory, days and cost. Two of model, tokens and budget
    give the third; one alone is spent compute-optimally: for 6 N D = budget, L is lowest at
    alpha A / N^alpha = beta B / D^beta. A law that --data does not give is a published one, and
    then its interval is the range of the published, no confidence interval."""
    config = PRESETS.get(args.model)
    N = count(config)["N"] if config else common.parse_value("model", args.model or "0", float)
    D, C = common.parse_value("tokens", args.tokens or "0", float), args.budget
    require(min(N, D, C) >= 0 and 1 <= bool(N) + bool(D) + bool(C) <= 2,
            "plan wants one or two of --model, --tokens and --budget, positive")
    common.positive(args, "gpus", "micro_batch", "mfu", "peak_tflops", "gpu_hour")
    if bool(N) + bool(D) + bool(C) == 1:
        loss = laws.get("loss", EPOCH)
        require(loss["alpha"] > 0 < loss["beta"], "the loss law does not fall with N and D, so no "
                "compute-optimal run: plan wants two of the three")
        ratio = loss["alpha"] * loss["A"] / (loss["beta"] * loss["B"])
        if D:
            N = (ratio * D ** loss["beta"]) ** (1 / loss["alpha"])
        elif N:
            D = (N ** loss["alpha"] / ratio) ** (1 / loss["beta"])
        else:
            N = (ratio * (C / 6) ** loss["beta"]) ** (1 / (loss["alpha"] + loss["beta"]))
    N, D = N or C / 6 / D, D or C / 6 / N
    out = {"N": N, "D": D, "flops": flops(N, D), "extrapolates": []}
    print(f"plan: N {N:.4g}, D {D:.4g} tokens, 6 N D = {out['flops']:.3g} FLOPs")
    for name, published in PUBLISHED.items():
        others = {label: float(law.predict(N=N, D=D, C=6 * N * D)) for label, law in
                 published.items()}
        law = laws.get(name, [*published.values()][0])
        interval = law.interval(N=N, D=D) if name in laws else (
            min(others.values()), max(others.values()))
        out |= {name: float(law.predict(N=N, D=D)), name + "_interval": interval}
        print(f"  {name:<6}{out[name]:.4g}  [{interval[0]:.4g}, {interval[1]:.4g}]  "
              + "the range of: " * (name not in laws) + ", ".join(
                  f"{label} {value:.4g}" for label, value in others.items()))
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
        print(f"  an MoE of {sizes['total']:.4g}: at its total N, which fits Step Law's MoE runs "
              f"better (LOG.md), lr {STEP_LR.predict(N=sizes['non_embedding'], D=D):.3g}")
    need = memory(config, args.gpus, args.micro_batch, seq_len, bf16)
    total = sum(need.values()) / 1e9
    print(f"  memory a GPU: {total:.1f} GB of {args.gpu_gb:g}: "
          + ", ".join(f"{name} {value / 1e9:.2f}" for name, value in need.items())
          + f"\n    (FSDP over {args.gpus}, float32 weights and states, "
          f"{'bf16' if bf16 else 'float32'} compute, {args.micro_batch} x {seq_len} tokens, "
          "no recomputation; without context and buffers, 1-3 GB)")
    if total > args.gpu_gb:
        print("    DOES NOT FIT: more --gpus, a smaller --micro_batch, or recompute activations")
    work = flops(N, D, config.num_hidden_layers, config.hidden_size, seq_len, config.vocab_size)
    hours = work / (args.gpus * args.peak_tflops * 1e12 * args.mfu) / 3600
    print(f"  time: {work:.3g} FLOPs with head and attention at {seq_len} = {hours / 24:.1f} days, "
          f"{hours * args.gpus * args.gpu_hour:,.0f} at {args.gpu_hour:g} a GPU hour\n    "
          f"({args.gpus} GPUs, {args.peak_tflops:g} TFLOPS peak, MFU {args.mfu:g} assumed, no "
          "restarts)")
    return {"memory": need, "memory_gb": total, "training_flops": work, "days": hours / 24,
            "cost": hours * args.gpus * args.gpu_hour}


# ---------------------------------------------------------------------------------------------
# tables: read and measured

def read_table(path: Path) -> list[dict]:
    """A table of runs: CSV, or a JSON list of objects."""
    with common.open_text(path) as file:
        try:
            rows = list(csv.DictReader(file)) if path.suffix != ".json" else json.load(file)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}: not JSON ({error})") from None
    require(isinstance(rows, list) and rows and isinstance(rows[0], dict), f"{path}: no rows")
    return rows


def grid_rows(rows: list[dict], path) -> list[dict]:
    """rows.csv, or a table of Step Law: there `bs` counts sequences of 2,048 tokens, the final loss
    to use is the smoothed one (that of the last batch alone favours small batches by its noise),
    and the N of an MoE is `Na`, the activated part."""
    foreign, moe = "bs" in rows[0], "Na" in rows[0]
    names = {"N": "Na" if moe else "N", "D": "D", "lr": "lr",
             "batch_tokens": "bs" if foreign else "batch_tokens",
             "loss": "smooth loss" if foreign else "loss"}
    missing = [name for name in names.values() if name not in rows[0]]
    require(not missing, f"{path}: no column {', '.join(missing)}")
    for number, row in enumerate(rows, 2):
        if moe:
            row["total"] = row["N"]
        try:
            row |= {name: float(row[column]) for name, column in names.items()}
        except (TypeError, ValueError):
            raise InputError(f"{path}:{number}: {', '.join(names)} must be numbers") from None
        row["batch_tokens"] *= 2048 if foreign else 1
        row.setdefault("kind", "moe" if moe else "dense")
    return rows


def fit(args: Args) -> dict[str, dict[str, Law]]:
    """{table: laws} of a file or of the tables in a directory, printed."""
    path, out = Path(args.data or args.out), {}
    files = [path] if not path.is_dir() else sorted(
        f for f in path.iterdir() if f.suffix in (".csv", ".json") and f.name != "run.json")
    for file in files:
        try:
            rows = read_table(file)
            print(f"\n{file}")
            if "Model Size" in rows[0]:
                out["points"] = report_points(rows, args)
            elif {"optimal_pairs", "compute_budget"} & rows[0].keys():
                out["isoflop"] = report_isoflop(rows, args)
            else:
                rows = grid_rows(rows, file)
                kinds = {k: [r for r in rows if r["kind"] == k] for k in ("dense", "moe")}
                for kind in filter(kinds.get, kinds):
                    out[kind] = report_runs(kind, kinds[kind], args)
                if all(kinds.values()) and "loss" in out["dense"]:
                    report_parity(out["dense"]["loss"], kinds["moe"])
        except InputError as error:
            require(path.is_dir(), str(error))
            print(f"  skipped: {error}")
    return out


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
        try:
            loss = pretrain.main(asked)["val_loss"]
        except common.Diverged:
            loss = math.inf  # a rate that is too high is a result
    with torch.device("meta"):
        count = Qwen2(PRESETS[size]).count_parameters()
    return {"kind": "moe" if PRESETS[size].num_experts else "dense", "size": size,
            "N": count["active"] - count["total"] + count["non_embedding"],
            "total": count["non_embedding"], "D": D, "lr": lr, "batch_tokens": batch, "loss": loss,
            "warmup": asked.warmup, "seed": args.seed, "schedule": f"cosine to {asked.final_lr}",
            "seq_len": args.seq_len, "data": args.data, "device": str(device), "dtype": args.dtype}


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

def plot(tables: dict[str, dict[str, Law]], folder: Path) -> None:
    """predicted against measured, a PNG a law, with the published laws as references."""
    try:
        from matplotlib import pyplot
    except ImportError:
        return print("no plots: pip install matplotlib")
    folder.mkdir(parents=True, exist_ok=True)
    for table, laws in tables.items():
        for name, law in laws.items():
            x = dict(zip(law.axes, law.x.T, strict=True))
            x["C"] = x.get("C", 6 * x.get("N", 1) * x.get("D", 1))
            figure, axes = pyplot.subplots()
            for label, each in {"this fit": law, **PUBLISHED.get(name, {})}.items():
                axes.loglog(law.y, each.predict(**x), "o", label=label)
            axes.loglog(np.sort(law.y), np.sort(law.y), label="equal")
            axes.set(title=f"{table}: {name}", xlabel="measured", ylabel="predicted")
            axes.legend()
            path = folder / f"{table}-{name}.png".replace("/", "-").replace("*", "")
            figure.savefig(path)
            pyplot.close(figure)
            print(f"plot {path}")


def main(args: Args) -> dict:
    require(args.command in ("sweep", "fit", "plan"), "the command is sweep, fit or plan, not "
            f"{args.command!r}")
    require(args.bootstrap > 1, f"--bootstrap wants at least 2, got {args.bootstrap}")
    if args.command == "plan":
        laws = {}
        if args.data:
            with contextlib.redirect_stdout(io.StringIO()):
                tables = fit(args)
            preset = PRESETS.get(args.model)
            kind = "moe" if preset and preset.num_experts else "dense"
            laws = tables.get(kind, {}) | tables.get("points", {})
            print(f"laws of {args.data}: {', '.join(laws)}")
        return plan(args, laws)
    run, rows = None, None
    if args.command == "sweep":
        device, _ = common.setup(args)
        path = Path(args.out) / "rows.csv"
        rows = grid_rows(read_table(path), path) if args.resume and path.exists() else []
        # rows.csv is all the state there is, so Run is not asked for its own
        run = Run(replace(args, resume=False, overwrite=args.overwrite or args.resume), "scaling")
        run.begin()
        sweep(replace(args, seq_len=args.seq_len or 64, tokens=args.tokens or "5e3,1e4,2e4"), run,
              rows, device)
        args = replace(args, data=str(path))
    tables = fit(args)
    if args.plots:
        plot(tables, Path(args.out))
    if run:
        N, D = max(((float(r["N"]), float(r["D"])) for r in rows), key=lambda x: x[0] * x[1])
        kind = "dense" if "dense" in tables else "moe"
        planned = tables[kind] and plan(replace(  # for show, ten times the FLOPs of the largest run
            args, model=str(N * 10 ** 0.5), tokens=str(D * 10 ** 0.5)), tables[kind])
        run.write_record({"finished": True, "seconds": round(run.seconds(), 1), "result": {
            "runs": len(rows), "plan": planned, "laws": {
                f"{table} {name}": {k: (law[k], *law.ci(k)) for k in law.names}
                for table, laws in tables.items() for name, law in laws.items()}}})
        print(f"scaling: {run.path}/rows.csv ready after {run.seconds():.0f} s")
    return tables


if __name__ == "__main__":
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        sys.argv.insert(1, "--command")  # `scaling.py plan ...`
    common.cli(main, Args)
