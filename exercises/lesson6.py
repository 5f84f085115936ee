"""Lesson 6, the reward model. Replace each `raise`; `make exercise N=6` checks you."""


def last_hidden(hidden, lengths):
    """hidden (B, T, C) of rows padded on the right, lengths (B,) -> (B, C) at each last real token.
    """
    raise NotImplementedError


def listwise_loss(scores, right):
    """Qwen2.5-Math's loss of one query's 6 responses: scores (6,), right (6,) bool with k true ->
    -1 / (k (6 - k)) times the sum of log sigmoid(r_right - r_wrong) over all such pairs."""
    raise NotImplementedError


def best_of(scores, verdicts):
    """scores (Q, n), verdicts (Q, n), integers 0 and 1 -> share of queries whose best-scored
    response is right."""
    raise NotImplementedError
