"""tasks/query_order.py: by variance, by domain, and by chance where variances are noise."""
import pytest
import torch

from tasks.query_order import order_by_domain, query_order, split_half_correlation


def test_query_order():
    """Population variance over each row, highest first, ties in their order (report 4.3)."""
    scores = torch.tensor([[1.0, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0], [0, 1, 0, 0]])
    assert query_order(scores).tolist() == [3, 1, 4, 0, 2]
    assert query_order(scores * 100 - 50).tolist() == [3, 1, 4, 0, 2]


def test_split_half_correlation():
    """By hand: halves with ties (ranks 1 2 3 and 1.5 1.5 3), halves that agree, that oppose each
    other, and that say nothing; and against Spearman's formula, 1 - 6 sum d^2 / (n^3 - n)."""
    tied = torch.tensor([[0.0, 0, 1, 1], [0, 0, 2, 1], [0, 0, 3, 3]])
    assert split_half_correlation(tied) == pytest.approx(0.75**0.5)
    spread = torch.tensor([[0.0, 0, 1, 1], [0, 0, 2, 2], [0, 0, 3, 3]])
    assert split_half_correlation(spread) == pytest.approx(1)
    opposed = torch.tensor([[0.0, 0, 1, 3], [0, 0, 2, 2], [0, 0, 3, 1]])
    assert split_half_correlation(opposed) == pytest.approx(-1)
    for nothing in (torch.zeros(3, 4), spread[:1], spread[:, :2]):
        assert split_half_correlation(nothing) == 0
    scores = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    places = [half.var(1).argsort().argsort() for half in (scores[:, ::2], scores[:, 1::2])]
    expected = 1 - 6 * ((places[0] - places[1]) ** 2).sum().item() / (30**3 - 30)
    assert split_half_correlation(scores) == pytest.approx(expected, abs=1e-5)


def test_order_where_variances_are_noise(capsys):
    """Per domain: the scores order where their halves agree, else the verdicts, else chance. The
    domains take turns, and every query is there once."""
    g = torch.Generator().manual_seed(1)
    n = 60
    spread = torch.rand(n, 1, generator=g)
    signal = spread * torch.randn(n, 16, generator=g)
    passes = (torch.rand(n, 16, generator=g) < spread / 2).float()
    alike = torch.zeros(n, 16)
    domains = {"a": (signal, alike), "b": (alike, passes), "c": (alike, alike)}
    queries = [{"domain": domain, "prompt": i} for domain in domains for i in range(n)]
    scores = torch.cat([pair[0] for pair in domains.values()])
    verified = torch.cat([pair[1] for pair in domains.values()])
    order = order_by_domain(queries, verified, scores, scores, seed=0)
    assert sorted(order) == list(range(3 * n))
    ordered = [queries[i] for i in order]
    assert {query["domain"] for query in ordered[:3]} == set("abc")
    found = {d: [query["prompt"] for query in ordered if query["domain"] == d] for d in domains}
    assert found["a"] == query_order(signal).tolist()
    assert found["b"] == query_order(passes).tolist()
    assert found["c"] not in (list(range(n)), found["a"], found["b"])
    said = capsys.readouterr().out
    assert "a: queries ordered by the scores' variance" in said
    assert "b: queries ordered by the verdicts' variance" in said
    assert "c: queries ordered by chance" in said
    assert "c: split-half correlation of the scores' variance 0.00" in said
