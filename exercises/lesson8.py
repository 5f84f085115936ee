"""Lesson 8, the kernels. Replace each `raise`; `make exercise N=8` checks you."""


def online_softmax(scores, values, block):
    """scores (S,), values (S, D) -> softmax(scores) @ values, reading `block` keys at a time: keep
    a running maximum, a sum and an output, and rescale them when the maximum grows."""
    raise NotImplementedError


def tiles(length, block):
    """Causal attention over `length` positions in square tiles -> the set of (query tile, key tile)
    that hold at least one visible pair."""
    raise NotImplementedError


def chunked_loss(hidden, weight, targets, chunk):
    """Mean cross-entropy of hidden (N, C) @ weight.T (V, C) without more than chunk x V logits at a
    time."""
    raise NotImplementedError
