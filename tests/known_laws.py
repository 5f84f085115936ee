"""Runs and points made by known laws, for the tests of scaling.py, lib/laws.py and lib/cells.py."""
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


def fit_rows(rows, bootstrap=4, loss=True, **kwargs):
    return fit_cells(measure_cells(rows, **kwargs), bootstrap, loss=loss)


def grid_points(n=5):
    return np.array([(1e7 * 4 ** i, 1e9 * 4 ** j) for i in range(n) for j in range(n)]).T
