"""Tables of runs, and the best learning rate and batch size among the runs of each cell.

A cell is one model size N on D tokens; its runs differ in learning rate, batch size and seed.
"""
import csv
import io
import math
from collections import defaultdict
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path
from statistics import fmean

import numpy as np

from lib import files
from lib.args import InputError, require


@dataclass(kw_only=True)
class Row:
    """One run: a row of rows.csv, whose columns are these fields."""
    kind: str = "dense"              # or "moe"
    size: str = ""                   # preset
    N: float
    total: float = 0.0               # all parameters without embedding and head; 0: N
    D: float
    lr: float
    batch_tokens: float
    loss: float                      # nan or inf if the run diverged
    warmup: int = 0                  # steps
    seed: int = 0
    schedule: str = ""
    seq_len: int = 0
    device: str = ""
    dtype: str = ""


@dataclass
class Cell:
    N: float
    R: float                         # total / activated parameters
    D: float
    losses: dict                     # {(lr, batch): the mean loss of this setting's repeats}
    loss: float                      # the lowest of them
    lr: float = math.nan             # the optimum
    batch: float = math.nan
    edges: tuple[str, ...] = ()      # "lr" or "batch", if that optimum is on the edge of the grid

    @property
    def C(self) -> float:
        return 6 * self.N * self.D

    def axes(self) -> dict[str, float]:
        """Return the arguments of a law's predict and interval."""
        return {"N": self.N, "D": self.D, "C": self.C, "R": self.R}


# --- tables ---------------------------------------------------------------------------------------

def read_table(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV in UTF-8 as {column: text}, without the blanks that people put
    around commas. InputError if there is no row."""
    with files.open_text(path) as file:
        lines = [",".join(part.strip() for part in line.split(",")) for line in file]
    try:
        rows = list(csv.DictReader(filter(None, lines)))
    except csv.Error as error:
        raise InputError(f"{path}: not a CSV ({error})") from None
    require(rows, f"{path}: no rows")
    return rows


def grid_rows(path: Path) -> list[Row]:
    """Read rows.csv, or a table of Step Law.

    In Step Law's tables `bs` counts sequences of 2,048 tokens, and the N of an MoE is `Na`, the
    activated part. Its final loss is the smoothed one: the noise of the last batch's loss favours
    small batches."""
    rows = []
    for number, values in enumerate(read_table(path), 2):
        try:
            if "Na" in values:
                values |= {"kind": "moe", "total": values["N"], "N": values["Na"]}
            if "bs" in values:
                values["batch_tokens"] = 2048 * float(values["bs"])
                values["loss"] = values["smooth loss"]
            known = [field for field in fields(Row) if field.name in values]
            row = Row(**{field.name: field.type(values[field.name]) for field in known})
            good = all(0 < x < math.inf for x in (row.N, row.D, row.lr, row.batch_tokens))
            good = good and not row.loss <= 0 and row.kind in ("dense", "moe")
        except (KeyError, TypeError, ValueError):
            good = False
        require(good, f"{path}:{number}: N, D, lr, batch_tokens (or Step Law's bs) and loss must "
                "be positive numbers, and kind dense or moe")
        rows.append(row)
    return rows


def write_rows(path: Path, rows: list[Row]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    files.write_atomic(path, text.getvalue())


# --- optima ---------------------------------------------------------------------------------------

def optimum(losses: dict, degree=3, within=0.01) -> tuple[list[float], tuple[str, ...]]:
    """Return a cell's best [lr, batch], and which of "lr" and "batch" is on the edge of the grid.

    The valley is so flat that noise moves the lowest run by a step or two. We therefore take the
    minimum of a polynomial in (log lr, log batch), fitted to the runs within 1% of the lowest loss
    or to the nine lowest. On Step Law's table, degree 3 within 1% predicts left-out runs as well as
    any choice (docs/LOG.md, "scaling laws on published runs"). The degree is lowered until there
    are 1.5 runs per coefficient. With fewer than nine finite runs the lowest run is the optimum."""
    xy = np.log(list(losses))
    loss = np.array(list(losses.values()))
    low = xy.min(0)
    high = xy.max(0)
    best = xy[loss.argmin()]
    on_edge = (best == low) | (best == high)

    ninth_lowest = np.sort(loss)[:9][-1]
    near = loss <= max(loss.min() * (1 + within), ninth_lowest)
    while degree > 1 and near.sum() < 1.5 * len(polynomial_powers(degree)):
        degree -= 1
    if degree > 1 and np.isfinite(loss[near]).all() and (low < high).all():
        best = surface_minimum(xy, loss, near, degree)
        on_edge |= (best == low) | (best == high)
    edges = np.array(["lr", "batch"])[on_edge]
    return np.exp(best).tolist(), tuple(edges.tolist())


def polynomial_powers(degree: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(degree + 1) for j in range(degree + 1 - i)]


def surface_minimum(xy, loss, near, degree: int) -> np.ndarray:
    """Return the minimum of the polynomial that fits the runs `near`.

    xy: (runs, 2) logarithms of lr and batch. The minimum is sought inside the grid and no further
    than half a grid step from these runs, since a cubic falls without end elsewhere."""
    centre = xy[near].mean(0)

    def terms(points):
        u, v = (points - centre).T
        return np.stack([u ** i * v ** j for i, j in polynomial_powers(degree)], -1)
    coef = np.linalg.lstsq(terms(xy[near]), loss[near], rcond=None)[0]
    coef[0] = 0  # Beside a constant near 3, rounding would hide where the bottom of the valley is.
    half_step = [np.median(np.diff(np.unique(axis))) / 2 for axis in xy.T]
    patch = np.array(list(product(np.linspace(-1, 1, 21), repeat=2))) * half_step
    candidates = xy[near]
    for zoom in range(9):            # look around all runs, then ever closer around the best point
        points = candidates[:, None] + patch * 0.1 ** zoom
        points = points.reshape(-1, 2).clip(xy.min(0), xy.max(0))
        lowest = (terms(points) @ coef).argmin()
        candidates = points[[lowest]]
    return candidates[0]


def measure_cells(rows: list[Row], degree=3, within=0.01) -> list[Cell]:
    """Group runs into cells of one (N, R, D). Repeats of a setting are averaged, since a minimum
    would favour the setting tried most often. A diverged run has an infinite loss, and a cell where
    all runs diverged is left out."""
    cells = defaultdict(lambda: defaultdict(list))
    for row in rows:
        R = (row.total or row.N) / row.N
        loss = row.loss if math.isfinite(row.loss) else math.inf
        cells[row.N, R, row.D][row.lr, row.batch_tokens].append(loss)
    measured = []
    for (N, R, D), repeats in sorted(cells.items()):
        losses = {setting: fmean(repeats[setting]) for setting in sorted(repeats)}
        lowest = min(losses.values())
        if lowest < math.inf:
            (lr, batch), edges = optimum(losses, degree, within)
            measured.append(Cell(N, R, D, losses, lowest, lr, batch, edges))
    return measured
