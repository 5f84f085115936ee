"""Lesson 5, DPO. Replace each `raise`; `make exercise N=5` checks you."""


def sequence_logprob(logits, ids, mask):
    """logits (T, V), ids (T,), mask (T,) -> the sum of log p(ids[t + 1] | ids[: t + 1]) over the
    positions whose target is the response's."""
    raise NotImplementedError


def dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta):
    """Summed log-probabilities (B,) -> losses (B,). Finite for any finite input."""
    raise NotImplementedError


def pull(h, beta):
    """How hard a pair pulls: -dL/dh of the DPO loss as a function of h, without autograd."""
    raise NotImplementedError
