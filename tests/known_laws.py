"""Runs and points made by known laws, and how good a law's settings are, for the tests of
scaling.py, lib/laws.py and lib/cells.py."""
import csv
import math

import numpy as np

from lib.cells import Row, measure_cells
from lib.laws import PUBLISHED
from scaling import fit_cells

EPOCH, CHINCHILLA = PUBLISHED["loss"].values()
LRS = [1e-4 * 2 ** (i / 2) for i in range(14)]
BATCHES = [2 ** 14 * 2 ** (i / 2) for i in range(16)]


def true_lr(N, D):
    return 0.1 * N ** -0.5 * D ** 0.2


def true_batch(N, D):
    return 20.0 * N ** 0.1 * D ** 0.4


def make_rows(noise=0.0, seed=0, sizes=(5e7, 1e8, 2e8, 4e8), tokens=(2e9, 5e9, 1e10, 2e10),
              lrs=LRS):
    """Losses with one oblique valley, a parabola in the logarithms, at a known law's optimum."""
    rng, rows = np.random.default_rng(seed), []
    for N in sizes:
        for D in tokens:
            for lr in lrs:
                for b in BATCHES:
                    u, v = math.log(lr / true_lr(N, D)), math.log(b / true_batch(N, D))
                    loss = EPOCH.predict(N=N, D=D) + 0.02 * u * u - 0.01 * u * v + (
                        0.01 * v * v + noise * rng.normal())
                    rows.append(Row(N=N, D=D, lr=lr, batch_tokens=b, loss=float(loss)))
    return rows


def fit_rows(rows, bootstrap=4, **kwargs):
    return fit_cells(measure_cells(rows, **kwargs), bootstrap)


def grid_points(n=5):
    return np.array([(1e7 * 4 ** i, 1e9 * 4 ** j) for i in range(n) for j in range(n)]).T


def chinchilla_points(path):
    """N, D and loss of Chinchilla's runs. Like Epoch AI, we omit the 5 highest losses: models
    trained on less than half a token per parameter."""
    with open(path, encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    rows.sort(key=lambda row: float(row["loss"]))
    columns = ("Model Size", "Training FLOP", "loss")
    N, C, loss = np.array([[float(row[name]) for name in columns] for row in rows[:-5]]).T
    return N, C / 6 / N, loss


def excess(cell, lr, batch, N=None):
    """How much worse, as a share, the run nearest to two laws' settings is than the cell's best;
    inf if none is within a factor of 2. The laws may be asked for another N. DeepSeek calls 0.25%
    near-optimal."""
    x = cell.axes() | {"N": N or cell.N}
    asked = np.log2([lr.predict(**x), batch.predict(**x)])
    settings = list(cell.losses)
    steps = np.log2(settings) - asked
    nearest = np.hypot(steps[:, 0], steps[:, 1]).argmin()
    if np.abs(steps[nearest]).max() > 1:
        return math.inf
    return cell.losses[settings[nearest]] / cell.loss - 1


def left_out(cells):
    """{rule: the excess of its settings per cell}, of the published laws and of "the other cells":
    laws fitted without the cell itself. recipes/scaling.md has a table of them."""
    out = {}
    for cell in cells:
        rules = {label: (PUBLISHED["lr"][label], batch, cell.N)
                 for label, batch in PUBLISHED["batch"].items()}
        if cell.R != 1:
            rules["Step Law at total N"] = (*rules["Step Law"][:2], cell.N * cell.R)
        laws = fit_cells([other for other in cells if other is not cell], 2)
        if "lr" in laws and "batch" in laws:
            rules["the other cells"] = (laws["lr"], laws["batch"], cell.N)
        for label, rule in rules.items():
            out.setdefault(label, []).append(excess(cell, *rule))
    return out
