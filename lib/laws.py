"""Power laws and loss laws: their forms, fits and intervals, and the published ones.

    y = a x1^b1 x2^b2                                 PowerLaw, of the best learning rate and batch
    L = E + A / (N R^g)^alpha + B / D^beta            LossLaw; R: total / activated N of an MoE

scaling.py says what N, D, C and R count, and fits these laws to cells of runs. Read fit_power
first: least squares on logarithms, then the same fit again for each resample of the cells.
"""
import math
from dataclasses import dataclass
from itertools import product

import numpy as np

from lib.args import require

HUBER_DELTA = 1e-3                   # of the loss law, as Chinchilla's


@dataclass
class Law:
    """A law on logarithms: log y = form(coef, log x), where x has one value per axis."""
    axes: str                        # what y depends on: letters of N, D, C and R
    coef: np.ndarray                 # (k,)
    seen: np.ndarray = None          # (axes, 2): lowest and highest of the cells
    # A fitted law also has:
    x: np.ndarray = None             # (n, axes): the cells
    y: np.ndarray = None             # (n,)
    draws: np.ndarray = None         # (resamples, k): coef of every bootstrap resample
    spread: float = 0.0              # standard deviation of the residuals of log y
    edges: int = 0                   # cells that were left out: their optimum is on an edge

    def __post_init__(self):
        if self.x is None:
            return
        self.seen = np.column_stack([self.x.min(0), self.x.max(0)])
        logs = np.log(self.x.T)
        residuals = np.log(self.y) - self.form(self.coef, logs)
        freedom = len(self.y) - len(self.names)
        variance = (residuals ** 2).sum() / freedom
        self.spread = math.sqrt(variance)

    def __getitem__(self, name: str) -> float:
        """Return a coefficient by its name; those that scale are kept as logarithms."""
        column = self.names.index(name)
        value = float(self.coef[column])
        return math.exp(value) if name in self.scales else value

    def predict(self, **x):
        logs = [np.log(x[axis]) for axis in self.axes]
        return np.exp(self.form(self.coef, logs))

    def interval(self, **x) -> np.ndarray:
        """Return a 95% interval for one new cell: the law's uncertainty and a cell's scatter."""
        logs = [np.log(x[axis]) for axis in self.axes]
        rng = np.random.default_rng(0)
        noise = rng.normal(0, self.spread, len(self.draws))
        centre = self.form(self.coef, logs)
        samples = self.form(self.draws, logs)
        return np.exp(self.percentiles(centre, samples, noise))

    def ci(self, name: str) -> np.ndarray:
        """Return a 95% interval for a coefficient."""
        column = self.names.index(name)
        ends = self.percentiles(self.coef[column], self.draws[:, column])
        if name in self.scales:
            return np.exp(ends)
        return ends

    def percentiles(self, centre, samples, noise=0.0) -> np.ndarray:
        """Return the 2.5% and 97.5% percentiles of widened samples.

        k fitted coefficients make n residuals, and so a bootstrap of them, too small by
        sqrt((n - k) / n). Without `student`, 95% intervals of 9 simulated cells cover 85%; with
        it, 91-92%."""
        n = len(self.y)
        freedom = n - len(self.names)
        deviation = (samples - centre) * math.sqrt(n / freedom)
        widened = centre + (deviation + noise) * student(freedom)
        return np.percentile(widened, [2.5, 97.5])


class PowerLaw(Law):
    """y = a x1^b1 x2^b2. coef: log a, then the exponents, which are named as their axes."""
    scales = ("a",)

    @property
    def names(self) -> tuple[str, ...]:
        return ("a", *self.axes)

    @staticmethod
    def form(coef, logs):
        log_x = np.array(np.broadcast_arrays(*logs))
        return coef[..., 0] + coef[..., 1:] @ log_x


class LossLaw(Law):
    """L = E + A / (N R^g)^alpha + B / D^beta. coef: log E, log A, log B, alpha, beta, and g, which
    has no effect if the axes lack R. An MoE's loss is that of a dense model of R^g times its
    activated N."""
    scales = ("E", "A", "B")

    @property
    def names(self) -> tuple[str, ...]:
        names = ("E", "A", "B", "alpha", "beta", "g")
        return names[:3 + len(self.axes)]

    @staticmethod
    def form(coef, logs):
        log_n, log_d, log_r = [*logs, 0.0][:3]  # without an axis R, R is 1
        e, a, b, alpha, beta, g = coef.T
        model_term = a - alpha * (log_n + g * log_r)
        data_term = b - beta * log_d
        total = np.logaddexp(e, model_term)
        return np.logaddexp(total, data_term)


def student(freedom: int) -> float:
    """Return the 97.5% quantile of Student's t over the normal one: below 4 degrees of freedom from
    a table, above by its series (within 2%)."""
    table = [math.nan, 6.483, 2.195, 1.624]
    if freedom < len(table):
        return table[freedom]
    # (z^2 + 1) / 4 and (5 z^4 + 16 z^2 + 3) / 96, where z = 1.96
    return 1 + 1.2104 / freedom + 1.4402 / freedom ** 2


# --- published laws -------------------------------------------------------------------------------

def coefficients(scales: list[float], exponents: list[float]) -> np.ndarray:
    return np.concatenate([np.log(scales), exponents])


STEP_LAW = [(2.1e8, 1.1e9), (4e9, 1e11)]        # ranges of N and D
CHINCHILLA = [(5.7e7, 1.6e10), (8.2e8, 3.2e11)]
DEEPSEEK = [(1e17, 2e19)]                       # range of C
PUBLISHED = {
    # Step Law counts N without the vocabulary; its last learning rate is 1e-5, not 10% of the peak.
    # DeepSeek LLM is arXiv 2401.02954; some copies print 0.3188.
    "lr": {
        "Step Law": PowerLaw("ND", coefficients([1.79], [-0.713, 0.307]), STEP_LAW),
        "DeepSeek": PowerLaw("C", coefficients([0.3118], [-0.1250]), DEEPSEEK),
    },
    "batch": {
        "Step Law": PowerLaw("D", coefficients([0.58], [0.571]), STEP_LAW[1:]),
        "DeepSeek": PowerLaw("C", coefficients([0.2920], [0.3271]), DEEPSEEK),
    },
    # Chinchilla's points as refitted by Epoch AI (2404.10102), and as published
    "loss": {
        "Epoch AI": LossLaw(
            "ND", coefficients([1.81686, 482.006, 2085.434], [0.34781, 0.36585, 0.0]), CHINCHILLA),
        "Chinchilla": LossLaw(
            "ND", coefficients([1.69, 406.4, 410.7], [0.34, 0.28, 0.0]), CHINCHILLA),
    },
}


# --- fits -----------------------------------------------------------------------------------------

def resample(n: int, bootstrap: int, seed: int) -> np.ndarray:
    """Return weights (1 + bootstrap, n) of sum n: equal ones, then Rubin's Bayesian bootstrap. If
    few whole cells were drawn with replacement, all of them would too often have one N."""
    equal = np.ones(n)
    rng = np.random.default_rng(seed)
    return np.vstack([equal, n * rng.dirichlet(equal, bootstrap)])


def fit_power(axes: str, x, y, bootstrap=1000, seed=0, edges=0) -> PowerLaw:
    """Fit a power law by least squares on logarithms.

    x: (n, axes), y: (n,). edges: how many more cells the caller has left out. InputError if the
    cells do not determine the exponents."""
    x = np.reshape(x, (-1, len(axes)))
    log_y = np.log(y)
    design = np.column_stack([np.ones(len(x)), np.log(x)])
    n, k = design.shape
    rank = np.linalg.matrix_rank(design, tol=1e-6)
    require(n > k and rank == k, f"no law: {n} cells ({edges} more are on an edge) do not "
            f"determine {k} coefficients")
    weights = resample(n, bootstrap, seed)
    weighted = weights[:, None] * design.T
    hessian = weighted @ design
    moments = weighted @ log_y
    solved = np.linalg.solve(hessian, moments[..., None])
    coef = solved[..., 0]
    return PowerLaw(axes, coef[0], x=x, y=np.array(y), draws=coef[1:], edges=edges)


def fit_loss(N, D, loss, bootstrap=200, seed=0, R=None) -> LossLaw:
    """Fit a loss law by Chinchilla's objective (eq. 3), with R also its g:

        sum_i w_i Huber(log(exp(e) + exp(a - alpha log N_i) + exp(b - beta log D_i)) - log L_i)

    N, D, loss, R: (n,). InputError with too few cells. It is the sum: divided by n, the published
    fit stopped too early (Epoch AI). As Chinchilla, we start from a grid, of 27 points here; every
    resample of the bootstrap starts from the best result. N and D are centred: otherwise a and
    alpha are nearly one direction, and draws stop early where E is near 0."""
    axes = "ND" if R is None else "NDR"
    n = len(loss)
    k = 3 + len(axes)
    require(n > k, f"no loss law: {n} cells do not determine {k} coefficients")
    sizes = len(set(N))
    lengths = len(set(D))
    require(min(sizes, lengths) > 2,  # of two, a term's exponent may be anything
            f"no loss law: {sizes} different N and {lengths} different D, but it needs 3 of each")
    if R is None:
        R = np.ones(n)
    x = np.stack([N, D, R], -1)
    log_x = np.log(x)
    log_loss = np.log(loss)
    centre = log_x.mean(0) * [1, 1, 0]
    centred = (log_x - centre).T
    design = loss_design(*centred)
    level = log_loss.mean()
    weights = resample(n, bootstrap, seed)
    ranked = minimise(loss_starts(level), design, log_loss, weights[0], steps=300)
    best = ranked[:1]
    starts = best.repeat(bootstrap, 0)
    starts[:, 0] = starts[:, 0].clip(level + math.log(0.1))  # no step leads away from E = 0
    draws = minimise(starts, design, log_loss, weights[1:], steps=100)
    for coef in (best, draws):
        coef[:, 1:3] += coef[:, 3:5] * centre[:2]  # of N and D that are not centred
        coef[:, 5] /= coef[:, 3]                   # g, from alpha g
    return LossLaw(axes, best[0], x=x[:, :len(axes)], y=np.array(loss), draws=draws)


def loss_design(log_n, log_d, log_r) -> np.ndarray:
    """Return (3, 6, n): the logarithms of the three terms are linear in log E, log A, log B, alpha,
    beta and alpha g."""
    design = np.zeros((3, 6, len(log_n)))
    design[[0, 1, 2], [0, 1, 2]] = 1
    design[1, 3] = -log_n
    design[1, 5] = -log_r
    design[2, 4] = -log_d
    return design


def loss_starts(level: float) -> np.ndarray:
    """Return 27 rows of coefficients: at the mean cell, whose log L is `level`, E has one of three
    shares of the loss, and the two other terms share the rest."""
    rows = []
    exponents = (0.1, 0.4, 1.0)
    for share, alpha, beta in product((0.05, 0.3, 0.8), exponents, exponents):
        e = level + math.log(share)
        rest = level + math.log((1 - share) / 2)
        rows.append([e, rest, rest, alpha, beta, 0.3 * alpha])
    return np.array(rows)


def loss_residuals(p, design, log_loss):
    """Return the residuals (B, n) of coefficients p (B, 6), and their Jacobian (B, 6, n)."""
    terms = p @ design                       # (3, B, n)
    total = np.logaddexp.reduce(terms)
    # The derivative of a log of a sum of exponentials by one exponent is its share of the sum.
    shares = np.exp(terms - total)
    jacobian = np.einsum("tbn,tkn->bkn", shares, design)
    return total - log_loss, jacobian


def huber(residuals):
    size = np.abs(residuals)
    inside = np.minimum(size, HUBER_DELTA)
    return inside * (size - inside / 2)


def minimise(p, design, log_loss, weights, steps: int):
    """Improve every row of p (B, 6) in place, and return the rows in the order of their objective.

    A step is Levenberg-Marquardt's for the weighted least squares that touch the Huber loss from
    above. Chinchilla's L-BFGS, with all resamples at once, stopped too early, and one after the
    other took ten times as long (docs/LOG.md)."""
    damping = np.full(len(p), 1e-2)
    for _ in range(steps):
        residuals, jacobian = loss_residuals(p, design, log_loss)
        slope = HUBER_DELTA / np.maximum(np.abs(residuals), HUBER_DELTA)  # over the residual
        slope *= weights
        weighted = jacobian * slope[:, None]
        hessian = weighted @ np.swapaxes(jacobian, 1, 2)
        gradient = weighted @ residuals[..., None]
        diagonal = np.einsum("bii->bi", hessian)  # a view
        diagonal *= 1 + damping[:, None]
        diagonal += 1e-12
        step = np.linalg.solve(hessian, gradient)
        new_p = p - step[..., 0]
        new_residuals, _ = loss_residuals(new_p, design, log_loss)
        change = weights * (huber(new_residuals) - huber(residuals))
        better = change.sum(-1) < 0
        p[better] = new_p[better]
        damping[better] *= 0.2
        damping[~better] *= 5
    residuals, _ = loss_residuals(p, design, log_loss)
    objective = (weights * huber(residuals)).sum(-1)
    return p[objective.argsort()]
