"""The order in which GRPO asks its queries (Qwen2.5 report, 4.3).

The report takes queries by the variance of the reward model's scores over their responses, highest
first. Three points are our choice. The variances are those of the initial policy's responses. The
domains take turns, because scores spread more in one domain than in another, so that a single order
would put whole stretches of one domain together. And a variance that does not repeat between the
two halves of the responses does not decide (docs/LOG.md, docs/findings.md). For that, each query
needs four responses or more.
"""
import random
from collections import defaultdict

import torch

MIN_CORRELATION = 0.2  # below it, a variance says too little of a query to order by it


def query_order(scores):
    """scores (Q, G) -> indices (Q,), queries with the highest variance of their scores first.

    If all answers to a query score alike, there is nothing to tell apart. Ties keep their order."""
    return scores.var(dim=1, unbiased=False).argsort(descending=True, stable=True)


def split_half_correlation(scores) -> float:
    """scores (Q, G) -> how well the variances of one half of the responses predict the other's.

    This is Spearman's rank correlation; 0 where all variances of a half are equal."""
    ranks = []
    for half in (scores[:, ::2], scores[:, 1::2]):
        variances = half.var(dim=1, unbiased=False)
        _, group, counts = variances.unique(return_inverse=True, return_counts=True)
        rank = (counts.cumsum(0) - counts / 2)[group]  # equal variances share their mean rank
        ranks.append(rank - rank.mean())
    return torch.cosine_similarity(*ranks, dim=0).item()


def order_by_domain(queries: list[dict], verdicts, model_scores, rewards, seed: int) -> list[int]:
    """Return the order of the queries: the domains in turn, within each by variance.

    verdicts, model_scores (or None) and rewards are (Q, G). The variance of a few responses may be
    noise. We use the reward model's scores if their split-half correlation reaches MIN_CORRELATION,
    else the verdicts, else chance."""
    by_domain = defaultdict(list)
    for i, query in enumerate(queries):
        by_domain[query["domain"]].append(i)
    place = {}  # of a query within its own domain
    for domain, members in by_domain.items():
        order = random.Random(seed).sample(members, len(members))
        found = "chance"  # the verdicts replace it, and the scores replace both
        for name, values in (("verdicts", verdicts), ("scores", model_scores)):
            if values is None:
                continue
            correlation = split_half_correlation(values[members])
            print(f"{domain}: split-half correlation of the {name}' variance {correlation:.2f}")
            if correlation >= MIN_CORRELATION:
                order = [members[i] for i in query_order(values[members])]
                found = f"the {name}' variance"
        print(f"{domain}: queries ordered by {found}")
        place |= {i: rank for rank, i in enumerate(order)}
    # All first places, then all second ones, ...; among equal places, by variance of the rewards.
    return sorted(query_order(rewards).tolist(), key=place.get)
