"""The exercises of docs/: each check passes a right answer (mostly the project's own function) and
fails a wrong one; nothing but `raise` stands in the files that readers fill in."""
import inspect
import math
from collections import Counter

import exercises
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lib import optim
import dpo
import grpo
import kernels
import model
import reward


def bad(f):
    """An answer that is nearly right: what it gives first is off by a tenth, or is missing."""
    def worse(*args):
        out = f(*args)
        first = out[0] if isinstance(out, tuple) else out
        if isinstance(first, dict):
            return dict(list(first.items())[1:])
        if isinstance(first, (list, set)):
            return type(first)(list(first)[1:]), *out[1:]
        if isinstance(first, (str, type(None))):
            return (*out, "") if isinstance(out, tuple) else 0.1
        first = (first + 0.1) * 1.1
        return (first, *out[1:]) if isinstance(out, tuple) else first
    return worse


def count_pairs(words):
    counts = Counter()
    for word, n in words.items():
        for pair in zip(word, word[1:], strict=False):
            counts[pair] += n
    return counts


def merge(word, pair, new):
    out = []
    for symbol in word:
        if out and (out[-1], symbol) == pair:
            out[-1] = new
        else:
            out.append(symbol)
    return tuple(out)


def rope(x, theta):
    T, D = x.shape
    config = model.Config(hidden_size=D, num_attention_heads=1, num_key_value_heads=1,
                          rope_theta=theta)
    return model.apply_rope(x[None, None], *model.rope(torch.arange(T)[None], config))[0, 0]


def route(logits, k, normalise):
    weight, expert = logits.softmax(-1).topk(k)
    return weight / weight.sum(-1, keepdim=True) if normalise else weight, expert


def pack(documents, length):
    flat = [(token, i) for i, document in enumerate(documents) for token in document]
    rows = [flat[i:i + length] for i in range(0, len(flat) - length + 1, length)]
    return [[t for t, _ in row] for row in rows], [[i for _, i in row] for row in rows]


def keep_passing(samples, per_query):
    out = {}
    for query, text, score, finished in sorted(samples, key=lambda s: len(s[1])):
        texts = out.setdefault(query, [])
        if score == 1 and finished and text not in texts and len(texts) < per_query:
            texts.append(text)
    return {query: texts for query, texts in out.items() if texts}


def online_softmax(scores, values, block):
    m, norm = torch.tensor(-1e30, dtype=scores.dtype), torch.zeros((), dtype=scores.dtype)
    acc = torch.zeros_like(values[0])
    for s, v in zip(scores.split(block), values.split(block), strict=True):
        new = torch.maximum(m, s.max())
        p, rescale = (s - new).exp(), (m - new).exp()
        m, norm, acc = new, norm * rescale + p.sum(), acc * rescale + p @ v
    return acc / norm


def optimal_split(flops, A, B, alpha, beta):
    N = (alpha * A / (beta * B)) ** (1 / (alpha + beta)) * (flops / 6) ** (beta / (alpha + beta))
    return N, flops / 6 / N


SOLUTIONS = {
    "count_pairs": count_pairs, "merge": merge,
    "bits_per_byte": lambda nats, tokens, n_bytes: nats * tokens / math.log(2) / n_bytes,
    "rms_norm": lambda x, weight, eps: weight * F.rms_norm(x, x.shape[-1:], None, eps),
    "rope": rope, "route": route, "pack": pack,
    "step_loss": lambda sums, counts: sum(sums) / sum(counts),
    "balance_loss": lambda probs, expert: model.load_balancing_loss([(probs, expert)])[0],
    "targets": lambda ids, mask: ids[1:].masked_fill(mask[1:] == 0, -100),
    "cosine": optim.lr_at, "keep_passing": keep_passing,
    "sequence_logprob": lambda logits, ids, mask: (
        logits.log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0] * mask[1:]).sum(),
    "dpo_loss": lambda *args: dpo.dpo_loss(*args)[0],
    "pull": lambda h, beta: beta * torch.sigmoid(-beta * h),
    "last_hidden": lambda hidden, lengths: hidden[torch.arange(len(hidden)), lengths - 1],
    "listwise_loss": lambda scores, right: reward.preference_loss(
        scores[right][:, None], scores[~right][None]).mean(),
    "best_of": lambda scores, verdicts: verdicts.float().gather(
        1, scores.argmax(1, keepdim=True)).mean(),
    "advantages": grpo.group_advantages,
    "clipped": lambda new, old, A, eps: torch.minimum(
        (new - old).exp() * A, (new - old).exp().clamp(1 - eps, 1 + eps) * A),
    "k3": lambda new, ref: (ref - new).exp() - (ref - new) - 1,
    "online_softmax": online_softmax,
    "tiles": lambda T, block: {(i, j) for i in range(-(-T // block)) for j in range(i + 1)},
    "chunked_loss": lambda hidden, weight, ids, chunk: kernels.linear_cross_entropy(
        hidden, weight, ids),
    "power_law": lambda x, y: tuple(
        f(c) for f, c in zip((lambda c: math.exp(c), float),
                             np.polyfit(x.log().numpy(), y.log().numpy(), 1)[::-1], strict=True)),
    "optimal_split": optimal_split,
    "inside": lambda curve: (lambda best: best if min(curve) < best < max(curve) else None)(
        min(curve, key=curve.get)),
}
CHECKS = [check for checks in exercises.CHECKS.values() for check in checks]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_check_passes_what_is_right_and_fails_what_is_nearly(check):
    solution = SOLUTIONS[check.__name__]
    check(solution)
    with pytest.raises((AssertionError, TypeError, AttributeError)):
        check(bad(solution))


@pytest.mark.parametrize("lesson", exercises.CHECKS)
def test_the_file_of_a_lesson_waits_to_be_written(lesson, capsys):
    module = exercises.load(lesson)
    names = [name for name, f in inspect.getmembers(module, inspect.isfunction)]
    assert sorted(names) == sorted(check.__name__ for check in exercises.CHECKS[lesson])
    assert exercises.main(str(lesson)) == 1
    assert capsys.readouterr().out.count("not written yet") == 3


def test_an_unknown_lesson_is_one_line(capsys):
    assert exercises.main("10") == 2
    assert capsys.readouterr().err == "error: which lesson? make exercise N=1 .. N=9\n"


def test_a_wrong_answer_is_shown_with_its_line_and_what_was_asked(tmp_path, monkeypatch, capsys):
    (tmp_path / "exercises").mkdir()
    answer = tmp_path / "exercises" / "lesson1.py"
    answer.write_text("def count_pairs(words):\n    return words['x']\n\n"
                      "def merge(*_):\n    return None\n\ndef bits_per_byte(*_):\n    return 1.0\n")
    monkeypatch.setattr(exercises, "ROOT", tmp_path)
    assert exercises.main("1") == 1
    shown = capsys.readouterr().out
    assert "count_pairs: KeyError: 'x' (your line 2)\n    in the check same(dict(f({" in shown
    assert "expected 0.25\n    in the check close(f(math.log(2), 10, 40), 0.25)" in shown
    answer.write_text("def f(:\n")
    assert exercises.main("1") == 1
    assert capsys.readouterr().out.endswith("lesson1.py:1: invalid syntax\n")
