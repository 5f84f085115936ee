"""Lesson 3, pre-training. Replace each `raise`; `make exercise N=3` checks you."""


def pack(documents, length):
    """Token lists -> rows of exactly `length` tokens of the concatenated documents, and for each
    token the number of its document (0, 1, ...). The incomplete last row is dropped."""
    raise NotImplementedError


def step_loss(sums, counts):
    """Each micro-batch's summed loss and number of targets -> the step's mean loss per target. A
    micro-batch may have no targets at all."""
    raise NotImplementedError


def balance_loss(probs, expert):
    """Router probabilities (N, E) and chosen experts (N, k) -> E * sum_e f_e P_e, with f_e the
    number of times e was chosen per token, P_e its mean probability."""
    raise NotImplementedError
