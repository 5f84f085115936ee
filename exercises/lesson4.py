"""Lesson 4, SFT. Replace each `raise`; `make exercise N=4` checks you."""


def targets(ids, mask):
    """ids (T,) and mask (T,), 1 on what the assistant says -> T - 1 targets: position t predicts
    ids[t + 1], and -100 stands where that is not the assistant's."""
    raise NotImplementedError


def cosine(step, steps, peak, warmup, final):
    """Linear warm-up, (step + 1) / (warmup + 1) of the peak, then a cosine that is at the peak at
    step `warmup` and at final * peak at the last step, steps - 1."""
    raise NotImplementedError


def keep_passing(samples, per_query):
    """Rejection sampling: [(query, text, score, finished)] -> {query: texts}, the shortest
    `per_query` different texts that finished with score 1; no query without any."""
    raise NotImplementedError
