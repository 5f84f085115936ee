"""Power laws and loss laws: their forms, fits and intervals, and the published ones.

    y = a x1^b1 x2^b2                                 PowerLaw, of the best learning rate and batch
    L = E + A / (N R^g)^alpha + B / D^beta            LossLaw; R: total / activated N of an MoE

scaling.py says what N, D, C and R count, and fits these laws to cells of runs. Read fit_power
first: least squares on logarithms, then the same fit again for each resample of the cells.
"""
import math
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from lib.args import require

HUBER_DELTA = 1e-3                   # of the loss law, as Chinchilla's


@dataclass
class Law:
    """A law on logarithms: log y = form(coef, log x), where x has one value per axis."""
    axes: str                        # what y depends on: letters of N, D, C and R
    coef: np.ndarray                 # (k,)
    seen: list = None                # (low, high) per axis: the range of the cells
    # A fitted law also has:
    x: np.ndarray = None             # (n, axes): the cells
    y: np.ndarray = None             # (n,)
    draws: np.ndarray = None         # (resamples, k): coef of every bootstrap resample
    spread: float = 0.0              # standard deviation of the residuals of log y
    edges: int = 0                   # cells that were left out: their optimum is on an edge

    def __getitem__(self, name: str) -> float:
        """Return a coefficient by its name; those that scale are kept as logarithms."""
        column = self.names.index(name)
        value = float(self.coef[column])
        return math.exp(value) if name in self.scales else value

    def predict(self, **x):
        logs = [np.log(x[axis]) for axis in self.axes]
        return np.exp(self.form(self.coef, logs))

    def interval(self, **x) -> tuple[float, float]:
        """Return a 95% interval for one new cell: the law's uncertainty and a cell's scatter."""
        logs = [math.log(x[axis]) for axis in self.axes]
        samples = self.form(self.draws, logs)
        rng = np.random.default_rng(0)
        noise = rng.normal(0, self.spread, len(samples))
        centre = self.form(self.coef, logs)
        low, high = self.percentiles(centre, samples, noise)
        return math.exp(low), math.exp(high)

    def ci(self, name: str) -> tuple[float, float]:
        """Return a 95% interval for a coefficient."""
        column = self.names.index(name)
        low, high = self.percentiles(self.coef[column], self.draws[:, column])
        if name in self.scales:
            return math.exp(low), math.exp(high)
        return low, high

    def percentiles(self, centre, samples, noise=0.0) -> tuple[float, float]:
        """Return the 2.5% and 97.5% percentiles of widened samples.

        k fitted coefficients make n residuals, and so a bootstrap of them, too small by
        sqrt((n - k) / n). Without `student`, 95% intervals of 9 simulated cells cover 85%; with
        it, 91-92%."""
        n = len(self.y)
        freedom = n - len(self.names)
        deviation = (samples - centre) * math.sqrt(n / freedom)
        widened = centre + (deviation + noise) * student(freedom)
        low, high = np.percentile(widened, [2.5, 97.5])
        return float(low), float(high)

    def fitted(self, log_x, log_y, draws) -> "Law":
        """Return this law with the cells that it was fitted to and its bootstrap."""
        residuals = log_y - self.form(self.coef, log_x.T)
        freedom = len(log_y) - len(self.names)
        variance = (residuals ** 2).sum() / freedom
        x = np.exp(log_x)
        return replace(
            self,
            seen=list(zip(x.min(0), x.max(0), strict=True)),
            x=x,
            y=np.exp(log_y),
            draws=draws,
            spread=math.sqrt(variance),
        )


class PowerLaw(Law):
    """y = a x1^b1 x2^b2. coef: log a, then the exponents, which are named as their axes."""
    scales = ("a",)

    @property
    def names(self) -> tuple[str, ...]:
        return ("a", *self.axes)

    @staticmethod
    def form(coef, logs):
        log_y = coef[..., 0]
        for column, log_x in enumerate(logs, 1):
            log_y = log_y + coef[..., column] * log_x
        return log_y


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
        terms = loss_terms(coef, *logs)
        return np.logaddexp.reduce(np.broadcast_arrays(*terms))


def loss_terms(coef, log_n, log_d, log_r=0.0):
    """Return the logarithms of the three terms of a loss law. coef: (..., 6)"""
    e, a, b, alpha, beta, g = np.moveaxis(coef, -1, 0)
    model_term = a - alpha * (log_n + g * log_r)
    data_term = b - beta * log_d
    return e, model_term, data_term


def student(freedom: int) -> float:
    """Return the 97.5% quantile of Student's t over the normal one, by its series (within 2% from
    4 degrees of freedom on)."""
    z = 1.96
    first = (z ** 2 + 1) / 4
    second = (5 * z ** 4 + 16 * z ** 2 + 3) / 96
    return 1 + first / freedom + second / freedom ** 2


# --- published laws -------------------------------------------------------------------------------

def coefficients(scales: list[float], exponents: list[float]) -> np.ndarray:
    return np.array([math.log(scale) for scale in scales] + exponents)


STEP_LAW = [(2.1e8, 1.1e9), (4e9, 1e11)]        # ranges of N and D
CHINCHILLA = [(5.7e7, 1.6e10), (8.2e8, 3.2e11)]
DEEPSEEK = [(1e17, 2e19)]                       # range of C
EPOCH_REFIT = coefficients([1.81686, 482.006, 2085.434], [0.34781, 0.36585, 0.0])
HOFFMANN = coefficients([1.69, 406.4, 410.7], [0.34, 0.28, 0.0])
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
        "Epoch AI": LossLaw("ND", EPOCH_REFIT, CHINCHILLA),
        "Chinchilla": LossLaw("ND", HOFFMANN, CHINCHILLA),
    },
}


# --- fits -----------------------------------------------------------------------------------------

def resample(n: int, bootstrap: int, seed: int) -> np.ndarray:
    """Return (bootstrap, n) weights of sum n: Rubin's Bayesian bootstrap. If few whole cells were
    drawn with replacement, all of them would too often have one N."""
    rng = np.random.default_rng(seed)
    return n * rng.dirichlet(np.ones(n), bootstrap)


def fit_power(axes: str, x, y, bootstrap=1000, seed=0, edges=0) -> PowerLaw:
    """Fit a power law by least squares on logarithms.

    x: (n, axes), y: (n,). edges: how many more cells the caller has left out. InputError if the
    cells do not determine the exponents."""
    log_x = np.log(np.reshape(x, (-1, len(axes))))
    log_y = np.log(y)
    design = np.column_stack([np.ones(len(log_x)), log_x])
    n, k = design.shape
    rank = np.linalg.matrix_rank(design, tol=1e-6)
    require(n > k and rank == k, f"no law: {n} cells ({edges} more are on an edge) do not "
            f"determine {k} coefficients")
    equal_weights = np.ones((1, n))
    weights = np.concatenate([equal_weights, resample(n, bootstrap, seed)])
    hessian = (weights[:, None] * design.T) @ design
    moments = (weights * log_y) @ design
    coef = np.linalg.solve(hessian, moments[..., None])[..., 0]
    return PowerLaw(axes, coef[0], edges=edges).fitted(log_x, log_y, coef[1:])


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
    if R is None:
        R = np.ones(n)
    log_x = np.log(np.stack([N, D, R], -1).astype(float))
    log_loss = np.log(loss)
    centre = log_x.mean(0) * [1, 1, 0]
    centred = (log_x - centre).T
    level = log_loss.mean()
    equal_weights = np.ones((1, n))
    best = minimise(loss_starts(level), centred, log_loss, equal_weights, steps=300)[:1]
    starts = best.repeat(bootstrap, 0)
    least_e = level + math.log(0.1)
    starts[:, 0] = np.maximum(starts[:, 0], least_e)  # no step leads away from E = 0
    weights = resample(n, bootstrap, seed)
    draws = minimise(starts, centred, log_loss, weights, steps=100)
    for coef in (best, draws):
        coef[:, 1:3] += coef[:, 3:5] * centre[:2]  # of N and D that are not centred
    return LossLaw(axes, best[0]).fitted(log_x[:, :len(axes)], log_loss, draws)


def loss_starts(level: float) -> np.ndarray:
    """Return 27 rows of coefficients: at the mean cell, whose log L is `level`, E has one of three
    shares of the loss, and the two other terms share the rest."""
    rows = []
    exponents = (0.1, 0.4, 1.0)
    for share, alpha, beta in product((0.05, 0.3, 0.8), exponents, exponents):
        e = level + math.log(share)
        rest = level + math.log((1 - share) / 2)
        rows.append([e, rest, rest, alpha, beta, 0.3])
    return np.array(rows)


def loss_residuals(p, log_x, log_loss):
    """Return the residuals (B, n) of coefficients p (B, 6), and their Jacobian (B, n, 6)."""
    log_n, log_d, log_r = log_x
    alpha, g = p[:, 3:4], p[:, 5:]
    e, model_term, data_term = loss_terms(p[:, None], log_n, log_d, log_r)
    total = np.logaddexp(e, model_term)
    total = np.logaddexp(total, data_term)
    # The derivative of a log of a sum of exponentials by one exponent is its share of the sum.
    constant_share = np.exp(e - total)
    model_share = np.exp(model_term - total)
    data_share = np.exp(data_term - total)
    columns = [
        constant_share,
        model_share,
        data_share,
        -model_share * (log_n + g * log_r),
        -data_share * log_d,
        -model_share * alpha * log_r,
    ]
    residuals = total - log_loss
    return residuals, np.stack(columns, -1)


def huber(residuals):
    size = np.abs(residuals)
    linear = HUBER_DELTA * (size - HUBER_DELTA / 2)
    return np.where(size < HUBER_DELTA, size ** 2 / 2, linear)


def minimise(p, log_x, log_loss, weights, steps: int):
    """Improve every row of p (B, 6), and return the rows in the order of their objective.

    A step is Levenberg-Marquardt's for the weighted least squares that touch the Huber loss from
    above. Chinchilla's L-BFGS, with all resamples at once, stopped too early, and one after the
    other took ten times as long (docs/LOG.md)."""
    damping = np.full(len(p), 1e-2)
    for _ in range(steps):
        residuals, jacobian = loss_residuals(p, log_x, log_loss)
        size = np.maximum(np.abs(residuals), 1e-12)
        slope = np.minimum(1, HUBER_DELTA / size)  # of the Huber loss, over the residual
        slope = weights * slope
        weighted = jacobian * slope[..., None]
        transposed = np.swapaxes(weighted, 1, 2)
        hessian = transposed @ jacobian
        gradient = transposed @ residuals[..., None]
        diagonal = np.einsum("bii->bi", hessian)  # a view
        diagonal *= 1 + damping[:, None]
        diagonal += 1e-12
        step = np.linalg.solve(hessian, gradient)
        new_p = p - step[..., 0]
        new_residuals, _ = loss_residuals(new_p, log_x, log_loss)
        change = weights * (huber(new_residuals) - huber(residuals))
        better = change.sum(-1) < 0
        p = np.where(better[:, None], new_p, p)
        factor = np.where(better, 0.2, 5)
        damping = np.clip(damping * factor, 1e-9, 1e9)
    residuals, _ = loss_residuals(p, log_x, log_loss)
    objective = (weights * huber(residuals)).sum(-1)
    order = objective.argsort()
    return p[order]
