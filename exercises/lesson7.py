"""Lesson 7, GRPO. Replace each `raise`; `make exercise N=7` checks you."""


def advantages(rewards):
    """rewards (Q, G) -> (reward - group mean) / population standard deviation; exactly 0 in a group
    of equal rewards, even of seven times 0.1."""
    raise NotImplementedError


def clipped(logprobs, old_logprobs, advantages, eps):
    """Per token (..., same shapes): min(rho A, clip(rho, 1 - eps, 1 + eps) A)."""
    raise NotImplementedError


def k3(logprobs, ref_logprobs):
    """The estimate of KL(pi, ref) at tokens drawn from pi: pi_ref/pi - log(pi_ref/pi) - 1."""
    raise NotImplementedError
