"""Lesson 2, the model. Replace each `raise`; `make exercise N=2` checks you."""


def rms_norm(x, weight, eps):
    """x (..., C) over the root of its mean square, times weight (C,)."""
    raise NotImplementedError


def rope(x, theta):
    """x (T, D), row t at position t, rotated: pair i is (x[i], x[i + D/2]) and turns by the angle
    t * theta^(-2i/D)."""
    raise NotImplementedError


def route(logits, k, normalise):
    """Router logits (N, E) -> weights (N, k) and experts (N, k): softmax first, then the top k;
    with `normalise` the k weights are made to sum to 1."""
    raise NotImplementedError
