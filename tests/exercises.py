"""The checks behind `make exercise N=3`: python tests/exercises.py 3 (reads exercises/lesson3.py).

A check takes the reader's function and asserts; tests/test_exercises.py shows that each passes a
right answer and fails a wrong one."""
import importlib.util
import math
import sys
import traceback
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]


def close(a, b, tolerance=1e-5):
    a, b = torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64)
    assert a.shape == b.shape, f"shape {tuple(a.shape)}, expected {tuple(b.shape)}"
    assert torch.allclose(a, b, rtol=tolerance, atol=tolerance), f"got {a}, expected {b}"


def same(a, b):
    assert a == b, f"got {a!r}, expected {b!r}"


# --- 1 ---------------------------------------------------------------------------------------
def count_pairs(f):
    same(dict(f({tuple("aba"): 3})), {("a", "b"): 3, ("b", "a"): 3})
    same(dict(f({tuple("aaa"): 2, tuple("a"): 9, tuple("aab"): 1})), {("a", "a"): 5, ("a", "b"): 1})


def merge(f):
    same(tuple(f(tuple("aaa"), ("a", "a"), "Z")), ("Z", "a"))
    same(tuple(f(tuple("abcab"), ("a", "b"), "ab")), ("ab", "c", "ab"))
    same(tuple(f(tuple("ba"), ("a", "b"), "ab")), ("b", "a"))


def bits_per_byte(f):
    close(f(math.log(2), 10, 40), 0.25)
    close(f(3.0, 7, 21), 1.442695)


# --- 2 ---------------------------------------------------------------------------------------
def rms_norm(f):
    close(f(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0]), 0.0), [0.848528, 2.262742])
    x = torch.tensor([[1.0, -1.0], [0.0, 0.0]])
    close(f(x, torch.ones(2), 1.0), [[0.707107, -0.707107], [0.0, 0.0]])


def rope(f):
    x = torch.tensor([[1.0, 0.0, 0.0, 0.0]] * 3)
    t, zero = torch.arange(3.0), torch.zeros(3)
    close(f(x, 100.0), torch.stack((t.cos(), zero, t.sin(), zero), 1))
    x = torch.tensor([[0.0, 1.0, 0.0, 0.0]] * 3)      # pair 1 turns 100^(2/4) = 10 times slower
    close(f(x, 100.0), torch.stack((zero, (t / 10).cos(), zero, (t / 10).sin()), 1))


def route(f):
    logits = torch.tensor([[0.0, math.log(2), math.log(5)]])
    weight, expert = f(logits, 2, False)
    close(weight, [[0.625, 0.25]])
    same(expert.tolist(), [[2, 1]])
    close(f(logits, 2, True)[0], [[5 / 7, 2 / 7]])


# --- 3 ---------------------------------------------------------------------------------------
def pack(f):
    rows, segments = f([[1, 2, 3], [4], [5, 6, 7, 8]], 3)
    same([list(r) for r in rows], [[1, 2, 3], [4, 5, 6]])
    same([list(s) for s in segments], [[0, 0, 0], [1, 2, 2]])


def step_loss(f):
    close(f([6.0, 1.0], [3, 1]), 1.75)
    close(f([0.0, 2.0], [0, 4]), 0.5)


def balance_loss(f):
    uniform = torch.full((4, 2), 0.5)
    close(f(uniform, torch.tensor([[0], [1], [0], [1]])), 1.0)
    close(f(torch.tensor([[1.0, 0.0]] * 4), torch.tensor([[0]] * 4)), 2.0)
    close(f(torch.full((3, 4), 0.25), torch.tensor([[0, 1], [1, 2], [3, 0]])), 2.0)


# --- 4 ---------------------------------------------------------------------------------------
def targets(f):
    same(torch.as_tensor(f(torch.tensor([7, 8, 9, 10]), torch.tensor([0, 1, 1, 0]))).tolist(),
         [8, 9, -100])


def cosine(f):
    close(f(0, 100, 1.0, 9, 0.1), 0.1)
    close(f(9, 100, 2.0, 9, 0.1), 2.0)
    close(f(99, 100, 7e-6, 9, 0.1) * 1e6, 0.7)
    close(f(50, 101, 1.0, 0, 0.0), 0.5)


def keep_passing(f):
    samples = [("q", "long one", 1, True), ("q", "one", 1, True), ("q", "one", 1, True),
               ("q", "no", 0, True), ("q", "cut", 1, False), ("r", "no", 0, True)]
    same({q: list(t) for q, t in f(samples, 2).items()}, {"q": ["one", "long one"]})
    same({q: list(t) for q, t in f(samples, 1).items()}, {"q": ["one"]})


# --- 5 ---------------------------------------------------------------------------------------
def sequence_logprob(f):
    logits = torch.log(torch.tensor([[0.5, 0.5], [0.2, 0.8], [0.9, 0.1]]))
    close(f(logits, torch.tensor([0, 1, 0]), torch.tensor([0, 1, 1])), math.log(0.5 * 0.2))
    close(f(logits + 3, torch.tensor([0, 1, 0]), torch.tensor([0, 0, 1])), math.log(0.2))


def dpo_loss(f):
    t = torch.tensor
    close(f(t([-3.0]), t([-4.0]), t([-3.0]), t([-4.0]), 0.1), [math.log(2)])
    close(f(t([10.0]), t([0.0]), t([0.0]), t([0.0]), 0.1), [0.313262])
    close(f(t([-5000.0]), t([0.0]), t([0.0]), t([0.0]), 0.1), [500.0])


def pull(f):
    close(f(torch.tensor(0.0), 0.1), 0.05)
    h = torch.linspace(-5, 5, 7, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(-F.logsigmoid(0.3 * h).sum(), h)
    close(f(h.detach(), 0.3), -slope)


# --- 6 ---------------------------------------------------------------------------------------
def last_hidden(f):
    hidden = torch.arange(12.0).view(2, 3, 2)
    close(f(hidden, torch.tensor([3, 1])), [[4.0, 5.0], [6.0, 7.0]])


def listwise_loss(f):
    right = torch.tensor([1, 1, 0, 0, 0, 0], dtype=torch.bool)
    close(f(torch.zeros(6), right), math.log(2))
    close(f(torch.tensor([1.0, 3.0, 0.0, 0.0, 0.0, 0.0]), right),
          (math.log1p(math.exp(-1)) + math.log1p(math.exp(-3))) / 2)


def best_of(f):
    scores = torch.tensor([[0.1, 0.9], [0.5, 0.4], [-1.0, -2.0]])
    close(f(scores, torch.tensor([[0, 1], [0, 1], [1, 0]])), 2 / 3)


# --- 7 ---------------------------------------------------------------------------------------
def advantages(f):
    close(f(torch.tensor([[1.0, 0, 0, 0, 0, 0, 0, 0]]))[0, :2], [2.645751, -0.377964], 1e-4)
    assert (f(torch.full((1, 7), 0.1)) == 0).all(), "a group of equal rewards must give exactly 0"
    close(f(torch.tensor([[0.0, 1.0], [5.0, 7.0]])), [[-1.0, 1.0], [-1.0, 1.0]], 1e-4)


def clipped(f):
    rho, A = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.0]), torch.tensor([1.0, -1.0, 1.0, -1.0, 3.0])
    close(f(rho.log(), torch.zeros(5), A, 0.2), [1.2, -1.5, 0.5, -0.8, 3.0])


def k3(f):
    close(f(torch.zeros(3), torch.tensor([0.0, 0.5, -0.5])), [0.0, 0.148721, 0.106531])


# --- 8 ---------------------------------------------------------------------------------------
def online_softmax(f):
    torch.manual_seed(0)
    scores, values = torch.randn(7, dtype=torch.float64), torch.randn(7, 2, dtype=torch.float64)
    for s in (scores, scores + 1000, scores.sort().values * 300):
        for block in (1, 3, 7, 10):
            close(f(s, values, block), s.softmax(0) @ values)


def tiles(f):
    same(set(f(4, 2)), {(0, 0), (1, 0), (1, 1)})
    same(set(f(5, 2)), {(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2)})


def chunked_loss(f):
    torch.manual_seed(0)
    hidden, weight, ids = torch.randn(10, 4), torch.randn(6, 4), torch.arange(10) % 6
    for chunk in (1, 4, 16):
        close(f(hidden, weight, ids, chunk), F.cross_entropy(hidden @ weight.T, ids))


# --- 9 ---------------------------------------------------------------------------------------
def power_law(f):
    x = torch.tensor([1.0, 10.0, 100.0, 1000.0], dtype=torch.float64)
    close(f(x, 3 * x ** -0.5), [3.0, -0.5])
    close(f(x, torch.tensor([1.0, 1.0, 1.0, 16.0], dtype=torch.float64)),
          [2 ** -0.8, 1.2 * math.log10(2)])


def optimal_split(f):
    E, A, B, alpha, beta, flops = 1.8, 482.0, 2085.4, 0.3478, 0.3658, 6e20
    N, D = f(flops, A, B, alpha, beta)
    close(6 * N * D / flops, 1.0)
    loss = lambda n: E + A / n**alpha + B / (flops / 6 / n) ** beta   # noqa: E731
    assert loss(N) <= min(loss(N * 1.01), loss(N / 1.01)), "a neighbour is better"


def inside(f):
    same(f({1e-3: 3.0, 2e-3: 2.5, 4e-3: 2.8}), 2e-3)
    same(f({1e-3: 3.0, 2e-3: 2.5, 4e-3: 2.4}), None)
    same(f({4e-3: 3.1, 1e-3: 2.0, 2e-3: 2.5}), None)


CHECKS = {1: (count_pairs, merge, bits_per_byte), 2: (rms_norm, rope, route),
          3: (pack, step_loss, balance_loss), 4: (targets, cosine, keep_passing),
          5: (sequence_logprob, dpo_loss, pull), 6: (last_hidden, listwise_loss, best_of),
          7: (advantages, clipped, k3), 8: (online_softmax, tiles, chunked_loss),
          9: (power_law, optimal_split, inside)}


def load(lesson: int):
    spec = importlib.util.spec_from_file_location(
        f"lesson{lesson}", ROOT / "exercises" / f"lesson{lesson}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(lesson: str) -> int:
    if lesson not in map(str, CHECKS):
        print(f"error: which lesson? make exercise N=1 .. N={len(CHECKS)}", file=sys.stderr)
        return 2
    try:
        module, missing = load(int(lesson)), 0
    except SyntaxError as error:
        print(f"{error.filename}:{error.lineno}: {error.msg}")
        return 1
    for check in CHECKS[int(lesson)]:
        try:
            check(getattr(module, check.__name__))
            print(f"{check.__name__}: right")
        except NotImplementedError:
            missing += 1
            print(f"{check.__name__}: not written yet")
        except Exception as error:  # whatever a half-written answer raises
            missing += 1
            frames = traceback.extract_tb(error.__traceback__)
            asked = next(frame for frame in frames if frame.name == check.__name__)
            mine = [f" (your line {f.lineno})" for f in frames if f.filename == module.__file__]
            print(f"{check.__name__}: {type(error).__name__}: {error}{''.join(mine[-1:])}\n"
                  f"    in the check {asked.line}")
    return min(1, missing)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2] or [""]))
