"""scaling.py: laws recovered from rows made by known laws, published numbers and refits, the edges
of grids, and a sweep in small."""
import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import kernels
import scaling
from common import InputError, parse_args
from model import PRESETS, Qwen2

SHARED = Path(__file__).parents[1].parent / "shared" / "data" / "scaling"
LRS = [1e-4 * 2 ** (i / 2) for i in range(14)]
BATCHES = [2 ** 14 * 2 ** (i / 2) for i in range(16)]
shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data beside this checkout")


def true_lr(N, D):
    return 0.1 * N ** -0.5 * D ** 0.2


def true_batch(N, D):
    return 20.0 * N ** 0.1 * D ** 0.4


def make_rows(noise=0.0, seed=0, sizes=(5e7, 1e8, 2e8, 4e8), tokens=(2e9, 5e9, 1e10, 2e10),
              lrs=LRS):
    """Losses with one valley, a parabola in the logarithms, at the optimum of a known law."""
    rng = np.random.default_rng(seed)
    return [{"N": N, "D": D, "lr": lr, "batch_tokens": b,
             "loss": scaling.EPOCH.predict(N, D) + 0.02 * math.log(lr / true_lr(N, D)) ** 2
             + 0.01 * math.log(b / true_batch(N, D)) ** 2 + noise * rng.normal()}
            for N in sizes for D in tokens for lr in lrs for b in BATCHES]


# ---------------------------------------------------------------------------------------------
# hyper-parameter law

def test_exact_law_is_recovered():
    rows = make_rows()
    lr, batch = (scaling.fit_hyperparameter_law(rows, t, bootstrap=20) for t in ("lr", "batch"))
    assert (lr.a, lr.b, lr.c) == pytest.approx((math.log(0.1), -0.5, 0.2), abs=1e-6)
    assert (batch.a, batch.b, batch.c) == pytest.approx((math.log(20.0), 0.1, 0.4), abs=1e-6)
    assert lr.predict(N=1e9, D=1e11) == pytest.approx(true_lr(1e9, 1e11), rel=1e-5)
    assert lr.interval(N=1e9, D=1e11) == pytest.approx([true_lr(1e9, 1e11)] * 2, rel=1e-4)
    assert lr.spread < 1e-6 and not any(c["edge"] for c in lr.cells)


@pytest.mark.parametrize("target, exponents", [("lr", (-0.5, 0.2)), ("batch", (0.1, 0.4))])
def test_noisy_law_is_inside_its_intervals(target, exponents):
    """95% intervals: of 20 data sets, at most 3 may miss (P(more) = 1.6% at the nominal level)."""
    missed = np.zeros(2)
    for seed in range(20):
        law = scaling.fit_hyperparameter_law(make_rows(0.002, seed), target, bootstrap=100)
        for i, (name, true) in enumerate(zip("bc", exponents, strict=True)):
            low, high = law.ci(name)
            missed[i] += not low <= true <= high
            assert high - low < 0.3
    assert missed.max() <= 3


def test_edge_is_flagged_and_left_out():
    """A grid that ends below the best lr of the smallest models (R6.3)."""
    lrs = [lr for lr in LRS if lr < 0.8 * true_lr(5e7, 5e9)]
    rows = make_rows(lrs=lrs)
    law = scaling.fit_hyperparameter_law(rows, "lr", bootstrap=20)
    edges = [c for c in law.cells if c["edge"]]
    assert {(c["N"], c["D"]) for c in edges} >= {(5e7, D) for D in (5e9, 1e10, 2e10)}
    assert 0 < len(edges) < len(law.cells)
    assert (law.b, law.c) == pytest.approx((-0.5, 0.2), abs=0.02)
    with pytest.raises(InputError, match="16 more are on an edge"):
        scaling.fit_hyperparameter_law(make_rows(lrs=LRS[:2]), "lr")


def test_optimum_by_hand():
    grid = {(lr, 1.0): (math.log2(lr) - 0.25) ** 2 for lr in (0.5, 1.0, 2.0)}
    assert scaling.optimum(grid, 0) == (pytest.approx(2 ** 0.25), False)
    assert scaling.optimum({**grid, (4.0, 1.0): math.inf}, 0)[0] == pytest.approx(2 ** 0.25)
    assert scaling.optimum({**grid, (2.0, 1.0): math.inf}, 0) == (1.0, False)  # no parabola left
    assert scaling.optimum({(2.0, 1.0): 1.0, (4.0, 1.0): 2.0}, 0) == (2.0, True)
    # the best batch of each lr: (2, 9) beats what batch 1 says
    assert scaling.optimum({**grid, (2.0, 9.0): -1.0, (4.0, 9.0): 1.0}, 0)[0] > 1.5


def test_order_and_units_do_not_matter():
    rows = make_rows(0.002)
    shuffled = [rows[i] for i in np.random.default_rng(1).permutation(len(rows))]
    a, b = (scaling.fit_hyperparameter_law(r, "lr", bootstrap=20) for r in (rows, shuffled))
    assert (a.a, a.b, a.c) == (b.a, b.b, b.c) and (a.draws.b == b.draws.b).all()
    scaled = [{**r, "lr": 7 * r["lr"], "D": r["D"] / 1e9} for r in rows]
    c = scaling.fit_hyperparameter_law(scaled, "lr", bootstrap=2)
    assert (c.b, c.c) == pytest.approx((a.b, a.c), abs=1e-9)


def test_repeats_are_averaged_and_diverged_runs_ignored():
    rows = make_rows(sizes=(5e7, 1e8), tokens=(2e9, 5e9))
    law = scaling.fit_hyperparameter_law(rows, "lr", bootstrap=2)
    luck = np.random.default_rng(0).random(len(rows))  # of two seeds, alike on average only
    lucky = [{**r, "loss": r["loss"] + d} for r, u in zip(rows, luck, strict=True) for d in (-u, u)]
    nans = [{**r, "loss": math.nan} if r["lr"] == LRS[-1] else r for r in lucky]
    for other in (lucky, nans):
        again = scaling.fit_hyperparameter_law(other, "lr", bootstrap=2)
        assert (again.b, again.c) == pytest.approx((law.b, law.c), abs=1e-9)


def test_terms_and_too_few_cells():
    rows = make_rows(sizes=(1e8,))
    with pytest.raises(InputError, match="do not determine 3"):
        scaling.fit_hyperparameter_law(rows, "lr")  # one N: its exponent is anything
    law = scaling.fit_hyperparameter_law(rows, "lr", terms="D", bootstrap=2)
    assert law.b == 0 and law.c == pytest.approx(0.2, abs=1e-6)
    with pytest.raises(InputError, match="target"):
        scaling.fit_hyperparameter_law(rows, "wd")


# ---------------------------------------------------------------------------------------------
# loss law

def grid_points(n=5):
    N, D = (torch.tensor(v).double() for v in zip(
        *[(1e7 * 4 ** i, 1e9 * 4 ** j) for i in range(n) for j in range(n)], strict=True))
    return N, D


def test_exact_loss_law_is_recovered():
    N, D = grid_points()
    for true in (scaling.CHINCHILLA, scaling.EPOCH):
        law = scaling.fit_loss_law(N, D, true.predict(N, D))
        for name in ("E", "A", "B", "alpha", "beta"):
            assert getattr(law, name) == pytest.approx(getattr(true, name), rel=2e-3), name
        assert law.spread < 1e-5


def test_noisy_loss_law_and_an_outlier():
    """The Huber loss bounds the pull of one bad run; the interval covers a new run."""
    N, D = grid_points()
    true, rng = scaling.EPOCH, torch.Generator().manual_seed(0)
    loss = true.predict(N, D) * (0.002 * torch.randn(len(N), generator=rng).double()).exp()
    loss[7] *= 1.3
    law = scaling.fit_loss_law(N, D, loss, bootstrap=20)
    for name in ("E", "alpha", "beta"):
        assert getattr(law, name) == pytest.approx(getattr(true, name), rel=0.1), name
    low, high = law.interval(N=1e11, D=1e13)
    assert low < true.predict(1e11, 1e13) < high
    order = torch.randperm(len(N), generator=rng)
    again = scaling.fit_loss_law(N[order], D[order], loss[order])
    assert again.predict(1e10, 1e11) == pytest.approx(law.predict(1e10, 1e11), rel=1e-4)
    with pytest.raises(InputError, match="5 cells"):
        scaling.fit_loss_law(N[:5], D[:5], loss[:5])


@shared
def test_chinchilla_refit():
    """Epoch AI's refit and standard errors (2404.10102), without the 5 points that they drop: the
    highest losses, models trained on less than half a token a parameter."""
    rows = list(csv.DictReader(open(SHARED / "chinchilla_extracted.csv")))
    rows = sorted(rows, key=lambda r: float(r["loss"]))[:-5]
    N, C, loss = (torch.tensor([float(r[k]) for r in rows]).double()
                  for k in ("Model Size", "Training FLOP", "loss"))
    D = C / 6 / N
    assert len(rows) == 240
    law, epoch = scaling.fit_loss_law(N, D, loss), scaling.EPOCH
    for name, error in {"E": 0.026, "A": 125, "B": 1293, "alpha": 0.015, "beta": 0.021}.items():
        assert abs(getattr(law, name) - getattr(epoch, name)) < error / 4, name

    def huber(law):
        return torch.nn.functional.huber_loss(law.predict(N, D).log(), loss.log(), delta=1e-3,
                                              reduction="sum").item()
    assert huber(law) <= huber(epoch) * (1 + 1e-6)  # as good a minimum as theirs
    assert law.beta / (law.alpha + law.beta) == pytest.approx(0.513, abs=0.005)


# ---------------------------------------------------------------------------------------------
# published numbers

def test_known_answers():
    assert scaling.flops(7e9, 1e12) == 4.2e22
    assert scaling.step_law(1e8, 2e9) == pytest.approx((2.537e-3, 118_663), rel=3e-4)
    assert scaling.step_law(7e9, 1.4e12) == pytest.approx((9.166e-4, 4_998_815), rel=3e-4)
    assert scaling.deepseek_law(1e17) == pytest.approx((2.338e-3, 106_190), rel=3e-4)
    assert scaling.deepseek_law(1e20) == pytest.approx((9.860e-4, 1_017_145), rel=3e-4)
    assert scaling.CHINCHILLA.predict(1e9, 2e10) == pytest.approx(2.580, abs=5e-4)
    assert scaling.EPOCH.predict(1e9, 2e10) == pytest.approx(2.529, abs=5e-4)


@pytest.mark.parametrize("name", ["micro", "micro-moe"])
def test_flops_against_a_counter(name, monkeypatch):
    """R6.1: within 1%; what is left are norms and biases, in N but in no matrix product. torch's
    counter knows neither a CPU's fused attention nor grouped matmuls: the reference kernels."""
    monkeypatch.setattr(kernels, "expert_mlp", kernels.expert_mlp_reference)
    config, T = PRESETS[name], 128
    model, old = Qwen2(config), kernels.use("reference")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, T, dtype=torch.long))
    kernels.use(*old)
    count = model.count_parameters()
    N = count["active"] - count["total"] + count["non_embedding"]
    ours = scaling.flops(N, T, config.num_hidden_layers, config.hidden_size, T, config.vocab_size)
    assert ours == pytest.approx(3 * counter.get_total_flops(), rel=0.01)


@shared
def test_step_law_dense():
    rows = scaling.read_rows(SHARED / "steplaw_dense.csv")
    lr = scaling.fit_hyperparameter_law(rows, "lr")
    batch = scaling.fit_hyperparameter_law(rows, "batch", terms="D")
    assert len(rows) == 1402 and len(lr.cells) == 12 and not any(c["edge"] for c in lr.cells)
    # The table holds 12 of their 17 cells: exponents agree within both their and our errors.
    for value, (low, high), published, sd in ((lr.b, lr.ci("b"), -0.713, 0.030), (
            lr.c, lr.ci("c"), 0.307, 0.019), (batch.c, batch.ci("c"), 0.571, 0.019)):
        assert low - 2 * sd < published < high + 2 * sd and low < value < high
    gaps = []
    for (N, D), points in scaling.cells_of(rows).items():
        want = lr.predict(N, D), batch.predict(N, D)
        near = min(points, key=lambda p: sum(math.log(a / b) ** 2
                                             for a, b in zip(p, want, strict=True)))
        gaps.append(points[near] / min(points.values()) - 1)
    assert max(gaps) < 0.0035 and sum(gaps) / len(gaps) < 0.0015


@shared
def test_step_law_moe_counts_activated_parameters():
    rows = scaling.read_rows(SHARED / "steplaw_moe.csv")
    assert {r["kind"] for r in rows} == {"moe"}
    assert sorted({r["N"] for r in rows}) == [187973632, 232579072, 590436352]
    law = scaling.fit_hyperparameter_law(rows, "lr", bootstrap=20)
    assert len(law.cells) == 9 and law.c > 0
    assert {r["batch_tokens"] for r in rows} == {2048 * float(r["bs"]) for r in rows}


# ---------------------------------------------------------------------------------------------
# plan

def test_plan(capsys):
    laws = scaling.fit(make_rows(), bootstrap=5)
    for budget in (1e19, 1e21):
        out = scaling.plan(laws, budget=budget)
        assert out["flops"] == pytest.approx(budget)
        worse = [laws["loss"].predict(out["N"] * f, out["D"] / f) for f in (0.9, 1.1)]
        assert out["loss"] < min(worse)
        for alone in ("N", "D"):  # the same line of optima from N or D alone
            again = scaling.plan(laws, **{alone: out[alone]})
            assert (again["N"], again["D"]) == pytest.approx((out["N"], out["D"]))
    assert out["extrapolates"] and "x the nearest fitted" in capsys.readouterr().out
    inside = scaling.plan(laws, N=1e8, D=5e9)
    assert not inside["extrapolates"] and "no, inside" in capsys.readouterr().out
    assert inside["lr"] == pytest.approx(true_lr(1e8, 5e9), rel=1e-4)
    assert scaling.plan(laws, budget=6e18, N=1e8)["D"] == pytest.approx(1e10)
    for bad in ({}, {"budget": 1e20, "N": 1e8, "D": 1e9}):
        with pytest.raises(InputError, match="one or two"):
            scaling.plan(laws, **bad)
    with pytest.raises(InputError, match="no loss law"):
        scaling.plan({"lr": laws["lr"]}, budget=1e20)


# ---------------------------------------------------------------------------------------------
# rows and the sweep

def test_rows_are_read_back_or_refused(tmp_path):
    rows = make_rows(sizes=(1e8,), tokens=(2e9,))[:5]
    scaling.write_rows(tmp_path / "rows.csv", rows)
    again = scaling.read_rows(tmp_path / "rows.csv")
    assert [{k: r[k] for k in rows[0]} for r in again] == rows and again[0]["kind"] == "dense"
    (tmp_path / "a.csv").write_text("N,D,lr,loss\n1,2,3,4\n")
    (tmp_path / "b.csv").write_text("N,D,lr,batch_tokens,loss\n1,2,3,4,5\n1,2,x,4,5\n")
    with pytest.raises(InputError, match="no column batch_tokens"):
        scaling.read_rows(tmp_path / "a.csv")
    with pytest.raises(InputError, match="b.csv:3"):
        scaling.read_rows(tmp_path / "b.csv")


def test_descend_finds_the_bottom_with_few_runs():
    seen = set()

    def value(point):
        seen.add(point)
        return (point[0] - 5) ** 2 + (point[1] - 1) ** 2 + 0.5 * (point[0] - 5) * (point[1] - 1)
    assert scaling.descend(value, (7, 6), (3, 3)) == (5, 1)
    assert len(seen) < 20
    assert scaling.descend(lambda p: -p[0], (4, 1), (0, 0)) == (3, 0)


def test_sizes():
    for name in ("32x2", "32x2-moe", "tiny"):
        scaling.add_preset(name)
    dense, moe = ({k: v for k, v in Qwen2(PRESETS[n]).count_parameters().items()}
                  for n in ("32x2", "32x2-moe"))
    assert moe["active"] == pytest.approx(dense["active"], rel=0.02)
    assert moe["total"] > dense["total"]
    with pytest.raises(InputError, match="WIDTHxLAYERS"):
        scaling.add_preset("32by2")


def test_sweep_in_small(tmp_path, capsys):
    """The whole stage: rows with their provenance (R6.1), laws it can fit, --resume, --rows."""
    flags = ["--out", str(tmp_path / "s"), "--sizes", "16x1,16x1-moe", "--tokens", "512,1024",
             "--lrs", "4e-3,16e-3", "--batches", "128,256", "--bootstrap", "5"]
    result = scaling.main(parse_args(scaling.Args, [*flags, "--N", "1e4", "--D", "1e5"]))
    said = capsys.readouterr().out
    rows = scaling.read_rows(tmp_path / "s" / "rows.csv")
    assert result["runs"] == len(rows) >= 12 and {r["kind"] for r in rows} == {"dense", "moe"}
    assert "no law for lr: 0 cells (2 more are on an edge)" in said and "plan: N 1e+04" in said
    for row in rows:
        assert row["schedule"] == "cosine to 0.1" and row["device"] == "cpu" and row["seed"] == "0"
        assert 4 < row["loss"] < 6.5
        assert row["warmup"] == str(int(row["D"] / row["batch_tokens"] / 10))
    assert len({r["loss"] for r in rows}) == len(rows)
    count = {kind: Qwen2(PRESETS[name]).count_parameters() for kind, name in
             (("dense", "16x1"), ("moe", "16x1-moe"))}  # N leaves out embedding and idle experts
    for row in rows:
        assert row["N"] == count[row["kind"]]["active"] - 16 * PRESETS["16x1"].vocab_size
    with pytest.raises(InputError, match="overwrite"):
        scaling.main(parse_args(scaling.Args, flags))
    before = (tmp_path / "s" / "rows.csv").read_text()
    scaling.main(parse_args(scaling.Args, [*flags, "--resume", "--N", "1e4", "--D", "1e5"]))
    assert (tmp_path / "s" / "rows.csv").read_text() == before  # nothing was trained again
    with pytest.raises(InputError, match="another --data, --seq_len or --seed"):
        scaling.main(parse_args(scaling.Args, [*flags, "--resume", "--seed", "1"]))


def test_fit_of_given_rows_checks_itself(tmp_path, capsys):
    scaling.write_rows(tmp_path / "rows.csv", make_rows(0.001, seed=1))
    args = scaling.Args(rows=str(tmp_path / "rows.csv"), bootstrap=10, budget=1e20)
    result = scaling.main(args)
    assert result["held_out"]["N"] == 4e8 and result["held_out"]["D"] == 2e10
    verdicts = [result["held_out"][k] for k in ("lr", "batch", "loss")]
    assert set(verdicts) <= {"held", "MISSED"} and verdicts.count("held") >= 2  # of 95% each
    said = capsys.readouterr().out
    assert "Step Law" in said and "extrapolates: " in said
    assert not Path("runs/scaling").exists() or "ready after" not in said  # it writes nothing
