"""Lesson 9, scaling laws. Replace each `raise`; `make exercise N=9` checks you."""


def power_law(x, y):
    """Least squares in log-log space: y = a x^b -> (a, b)."""
    raise NotImplementedError


def optimal_split(flops, A, B, alpha, beta):
    """L = E + A / N^alpha + B / D^beta under flops = 6 N D -> the best (N, D), by hand."""
    raise NotImplementedError


def inside(curve):
    """curve: {learning rate: loss} -> the best learning rate, or None where it lies on the edge of
    the grid, so that the true optimum may be outside."""
    raise NotImplementedError
