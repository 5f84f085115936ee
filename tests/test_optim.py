"""lib/optim.py: devices, randomness, the schedule, the optimizer, padding.
R numbers: docs/requirements.md."""
import math
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lib import optim
from lib.args import InputError
from lib.optim import adamw, clip_and_step, default_lr, lr_at, rng
from model import PRESETS, Qwen2

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("device, dtype, message", [
    ("tpu", "auto", "--device must be"), ("cpu", "float16", "--dtype must be"),
    ("cuda:99", "auto", "--device cuda:99 --dtype auto does not work here")])
def test_devices_are_tried_and_refused_clearly(device, dtype, message):
    """R0.2."""
    with pytest.raises(InputError, match=message) as error:
        optim.pick_device(device, dtype)
    assert "\n" not in str(error.value)


def test_device_auto_works():
    device, dtype = optim.pick_device()
    assert torch.ones(2, device=device, dtype=dtype).sum() == 2
    assert optim.pick_device("cpu") == (torch.device("cpu"), torch.float32)
    assert optim.pick_device("cpu", "bfloat16")[1] == torch.bfloat16


def test_learning_rate_ends_exactly_at_the_final_share():
    """7e-6 -> 7e-7."""
    for steps, warmup in ((100, 10), (100, 0), (2, 0), (50, 24)):
        rates = [lr_at(s, steps, 7e-6, warmup, 0.1) for s in range(steps)]
        assert rates[-1] == pytest.approx(7e-7, rel=1e-12)
        assert max(rates) == rates[warmup] == pytest.approx(7e-6, rel=1e-12)
        up, down = rates[:warmup + 1], rates[warmup:]
        assert up == sorted(up) and down == sorted(down, reverse=True) and up[0] > 0
    assert lr_at(4, 100, 1.0, 9, 0.1) == pytest.approx(0.5)  # linear
    half = lr_at(50, 101, 1.0, 0, 0.1)                       # cosine: the middle is the mean
    assert half == pytest.approx(0.55)
    assert lr_at(0, 1, 1.0, 0, 0.1) == 1.0
    assert lr_at(5, 10, 1.0, 2, 1.0) == 1.0
    assert lr_at(2, 5, 1.0, 50, 0.1) == 1.0                  # a warm-up longer than the run


def test_rng_is_a_pure_function_of_its_key():
    def draw(*key):
        return torch.rand(4, generator=rng(*key)).tolist()
    torch.manual_seed(1)
    a = draw(0, 3)
    torch.manual_seed(2)
    assert draw(0, 3) == a
    keys = [(s, t) for s in range(30) for t in range(30)] + [(s,) for s in range(30)]
    assert len({tuple(draw(*key)) for key in keys}) == len(keys)


def test_an_epoch_sees_every_row_once():
    """R2.6: a pure function of (seed, step); also where a batch spans epochs."""
    for n, batch in ((12, 4), (10, 4), (3, 8)):
        seen = [row for step in range(3 * n) for row in optim.epoch_order(step, batch, n, seed=1)]
        epochs = [seen[i:i + n] for i in range(0, len(seen) - n + 1, n)]
        assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
        assert len({tuple(e) for e in epochs}) > 1
    assert optim.epoch_order(5, 4, 100, 1) == optim.epoch_order(5, 4, 100, 1)
    assert optim.epoch_order(5, 4, 100, 1) != optim.epoch_order(5, 4, 100, 2)


def test_only_matrices_decay():
    """R: norms and biases never; with zero gradients a step multiplies the rest by 1 - lr * wd."""
    torch.manual_seed(0)
    model = Qwen2(PRESETS["micro-moe"])
    for p in model.parameters():
        p.data.add_(1.0)
        p.grad = torch.zeros_like(p)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = adamw(model, lr=0.1, weight_decay=0.5)
    assert clip_and_step(model, optimizer, 0.1, 1.0) == 0.0
    for name, p in model.named_parameters():
        factor = 1.0 if p.ndim == 1 else 0.95
        torch.testing.assert_close(p, before[name] * factor, msg=name)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(before)


def test_gradients_are_clipped_to_the_global_norm_and_zeroed():
    model = torch.nn.ModuleList([torch.nn.Linear(2, 2, bias=False) for _ in range(2)])
    for p, value in zip(model.parameters(), (3.0, 4.0), strict=True):
        p.data.zero_()
        p.grad = torch.tensor([[value, 0.0], [0.0, 0.0]])
    optimizer = torch.optim.SGD(model.parameters(), lr=99.0)
    assert clip_and_step(model, optimizer, 1.0, max_norm=0.5) == pytest.approx(5.0)
    assert [p[0, 0].item() for p in model.parameters()] == pytest.approx([-0.3, -0.4], rel=1e-4)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_gradient_skips_the_step(bad):
    """R4.5: weights and optimizer stay as they were, and the norm says so."""
    model = torch.nn.Linear(2, 2)
    optimizer = adamw(model, 0.1, 0.1)
    model(torch.ones(1, 2)).sum().backward()
    clip_and_step(model, optimizer, 0.1, 1.0)
    before = [p.detach().clone() for p in model.parameters()]
    (model(torch.ones(1, 2)).sum() * bad).backward()
    assert not math.isfinite(clip_and_step(model, optimizer, 0.1, 1.0))
    model(torch.ones(1, 2)).sum().backward()
    assert not math.isfinite(clip_and_step(model, optimizer, 0.1, 1.0, loss=bad))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())
    assert {s["step"].item() for s in optimizer.state.values()} == {1.0}


def test_rows_are_padded_on_the_right():
    assert optim.pad_rows([[1, 2], [], [3]], 9).tolist() == [[1, 2], [9, 9], [3, 9]]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_is_kept():
    """Large tensors cause no page faults once there were as many; handed back, one of 8 MB costs
    2,048 (what glibc does by itself depends on what came before, so here it is told to hand back).
    In processes of their own, since the setting stays."""
    program = """if True:
        import resource, sys, torch
        from lib import optim
        if sys.argv[1:]:
            optim.keep_freed_memory()
        faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        def work():
            return len([torch.ones(2**21) for _ in range(4)])
        for _ in range(4):
            work()
        before = faults()
        for _ in range(5):
            work()
        print(faults() - before)"""
    env = dict(os.environ, MALLOC_MMAP_THRESHOLD_="131072")
    back, kept = (int(subprocess.run([sys.executable, "-c", program, *flag], cwd=ROOT, text=True,
                                     env=env, capture_output=True, check=True).stdout)
                  for flag in ([], ["keep"]))
    assert kept < 1000 < 20 * 2048 <= back


@pytest.mark.parametrize("parameters, factor, expected", [
    (1_050_000, 1.0, 5e-4), (135_000_000, 1.0, 1e-4), (7_000_000_000, 1.0, 7e-6),  # as listed
    (1000, 1.0, 5e-4), (72_000_000_000, 1.0, 7e-6),                  # level outside
    (round((1.05e6 * 1.35e8) ** 0.5), 1.0, (5e-4 * 1e-4) ** 0.5),     # half way in logarithms
    (135_000_000, 10.0, 1e-3)])
def test_the_default_learning_rate_goes_by_size(parameters, factor, expected, capsys):
    class Model:
        def count_parameters(self):
            return {"total": parameters}

    assert default_lr("sft", Model(), factor) == pytest.approx(expected, rel=1e-6)
    shown = capsys.readouterr().out
    times = "10 x the rate " if factor == 10 else ""
    assert f"lr {expected:.2g}, {times}for {parameters:,} parameters" in shown
    assert "7e-06 at 7e+09" in shown


def test_cudnn_attention_is_off_after_the_set_up():
    """It plans anew for every shape, which is every micro-batch and every decoded token."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    optim.setup(SimpleNamespace(seed=0, device="cpu", dtype="auto"))
    assert not torch.backends.cuda.cudnn_sdp_enabled()
