"""scaling.py: laws recovered from rows of known laws, published runs and refits, and a sweep in
small. The published tables are not in the repository: their tests skip without ../shared/data."""
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from known_laws import (
    EPOCH, LRS, chinchilla_points, excess, fit_rows, grid_points, left_out, make_rows, true_lr)

import scaling
from lib.args import InputError, parse_args
from lib.cells import Cell, Row, read_table
from lib.laws import PowerLaw
from model import PRESETS, Qwen2

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data" / "scaling"
shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data beside this checkout")


def test_exact_law_is_recovered():
    laws = fit_rows(make_rows())
    lr, batch = laws["lr"], laws["batch"]
    assert (lr["a"], lr["N"], lr["D"]) == pytest.approx((0.1, -0.5, 0.2), rel=1e-4)
    assert (batch["a"], batch["N"], batch["D"]) == pytest.approx((20, 0.1, 0.4), rel=1e-4)
    x = {"N": 1e9, "D": 1e11}
    assert lr.predict(**x) == pytest.approx(true_lr(**x), rel=1e-5)
    assert lr.interval(**x) == pytest.approx([true_lr(**x)] * 2, rel=1e-4)
    assert lr.spread < 1e-6 and lr.edges == 0 and lr.seen == pytest.approx(
        np.array([(5e7, 4e8), (2e9, 2e10)]))


def test_noisy_law_is_inside_its_intervals():
    """95% intervals: of 20 data sets, at most 3 may miss (P(more) = 1.6% at the nominal level)."""
    missed = np.zeros(4)
    for seed in range(20):
        laws = fit_rows(make_rows(0.002, seed), 40)
        found = [laws[target].ci(axis) for target in ("lr", "batch") for axis in "ND"]
        for i, ((low, high), true) in enumerate(zip(found, (-0.5, 0.2, 0.1, 0.4), strict=True)):
            missed[i] += not low <= true <= high
            assert high - low < 0.3
    assert missed.max() <= 3


def test_edge_is_flagged_and_left_out(capsys):
    """A grid that ends below the best lr of the smallest models (R6.3)."""
    rows = make_rows(lrs=[lr for lr in LRS if lr < 0.8 * true_lr(5e7, 5e9)])
    cells = scaling.measure_cells(rows)
    edges = {(c.N, c.D) for c in cells if "lr" in c.edges}
    assert edges >= {(5e7, D) for D in (5e9, 1e10, 2e10)} and len(edges) < len(cells)
    law = scaling.fit_cells(cells, 4)["lr"]
    assert law.edges == len(edges) and len(law.y) == len(cells) - len(edges)
    assert (law["N"], law["D"]) == pytest.approx((-0.5, 0.2), abs=0.02)
    laws = scaling.fit_cells(scaling.measure_cells(make_rows(lrs=LRS[:2])), 4)
    said = capsys.readouterr().out.splitlines()
    assert "lr" not in laws and "16 more are on an edge" in said[0]


def test_left_out_cells_are_predicted_without_themselves():
    rows = make_rows()
    cells = scaling.measure_cells(rows)
    gaps = left_out(cells)["the other cells"]
    assert len(gaps) == 16 and max(gaps) < 1e-3  # half a grid step off at most
    cells[3].lr *= 1.9  # a wrong optimum spoils the others' predictions, never its own
    again = left_out(cells)["the other cells"]
    assert again[3] == gaps[3] and max(again) > max(gaps)
    far = PowerLaw("D", np.zeros(2))
    assert excess(cells[0], far, far) == math.inf  # no run near that


def test_parity_of_dense_and_moe(capsys):
    """MoEs that are worth R^0.4 times their activated N, beside dense models; too few say so."""
    N, D = grid_points(4)
    R = np.where(np.arange(len(N)) % 2, 1, 8 * N ** 0.0)
    loss = EPOCH.predict(N=N * R ** 0.4, D=D)
    law = scaling.fit_loss(N, D, loss, 2, R=R)
    assert law["g"] == pytest.approx(0.4, rel=1e-4) and law["alpha"] == pytest.approx(0.34781)
    assert law.predict(N=1e9, D=1e10, R=4) == pytest.approx(
        EPOCH.predict(N=1e9 * 4 ** 0.4, D=1e10), rel=1e-5)
    noise = np.exp(0.001 * np.random.default_rng(0).normal(size=len(N)))
    cells = [Cell(n, r, d, {}, measured)
             for n, r, d, measured in zip(N, R, D, loss * noise, strict=True)]
    low, high = scaling.report_parity(cells, scaling.Args(bootstrap=40))["loss"].ci("g")
    assert low < 0.4 < high and high - low < 0.3
    assert "an MoE of 8 x its activated N in all equals" in capsys.readouterr().out
    with pytest.raises(InputError, match="6 cells do not determine 6"):
        scaling.report_parity(cells[:6], scaling.Args())


@shared
def test_chinchilla_refit():
    """Epoch AI's refit (2404.10102) within a quarter of its standard errors, which the bootstrap
    agrees with, at a minimum as good as theirs."""
    N, D, loss = chinchilla_points(SHARED / "chinchilla_extracted.csv")
    law, epoch = scaling.fit_loss(N, D, loss, 60), EPOCH
    assert len(law.y) == 240
    for name, error in {"E": 0.026, "A": 125, "B": 1293, "alpha": 0.015, "beta": 0.021}.items():
        assert abs(law[name] - epoch[name]) < error / 4, name
        low, high = law.ci(name)
        assert low < epoch[name] < high and 0.6 < (high - low) / (2 * 1.96 * error) < 1.6, name

    def huber(law):
        return torch.nn.functional.huber_loss(
            torch.tensor(law.predict(N=law.x[:, 0], D=law.x[:, 1])).log(),
            torch.tensor(law.y).log(), delta=1e-3, reduction="sum").item()
    ours = replace(epoch, x=law.x, y=law.y)
    assert huber(law) <= huber(ours) * (1 + 1e-6)
    assert law["beta"] / (law["alpha"] + law["beta"]) == pytest.approx(0.513, abs=0.005)


@shared
def test_step_law_dense(capsys):
    """Published exponents inside our intervals; each cell's settings, predicted from the other 11,
    within 0.25% of its best run; so too the three largest, held out together."""
    rows = scaling.grid_rows(SHARED / "steplaw_dense.csv")
    cells = scaling.measure_cells(rows)
    laws = scaling.report_runs("dense", cells, scaling.Args(bootstrap=20))
    said = capsys.readouterr().out
    assert len(rows) == 1402 and len(laws["lr"].y) == 12 and laws["lr"].edges == 0
    for name, axis, published in (("lr", "N", -0.713), ("lr", "D", 0.307),
                                  ("batch(D)", "D", 0.571)):
        low, high = laws[name].ci(axis)
        assert low < published < high and high - low < 0.6
    assert said.count(": held") >= 8 and said.count("MISSED") <= 1
    gaps = left_out(cells)
    assert max(gaps["the other cells"]) <= 0.0025 and np.mean(gaps["the other cells"]) < 0.001
    assert max(gaps["Step Law"]) == pytest.approx(0.0031, abs=1e-4)  # the formula as published
    assert np.mean(gaps["DeepSeek"]) > 5 * np.mean(gaps["Step Law"])  # another schedule
    cells.sort(key=lambda cell: cell.C)
    others = scaling.fit_cells(cells[:-3], 2)
    assert "the 3 largest held out" in said
    assert all(excess(cell, others["lr"], others["batch"]) <= 0.0025 for cell in cells[-3:])
    # the last batch's loss instead of the smoothed one: noise favours small batches, no law
    raw = read_table(SHARED / "steplaw_dense.csv")
    noisy = [replace(r, loss=float(last["loss"])) for r, last in zip(rows, raw, strict=True)]
    last = fit_rows(noisy, degree=0)["lr"]
    assert last.spread > 3 * laws["lr"].spread


@shared
def test_step_law_moe(capsys):
    """N is the activated part. Within 0.25% from the other cells; the dense formula fails at this N
    and nearly holds at the total N, of which the table has only one."""
    rows = scaling.grid_rows(SHARED / "steplaw_moe.csv")
    assert {r.kind for r in rows} == {"moe"}
    assert sorted({r.N for r in rows}) == [187973632, 232579072, 590436352]
    table = read_table(SHARED / "steplaw_moe.csv")
    assert {r.batch_tokens for r in rows} == {2048 * float(r["bs"]) for r in table}
    cells = scaling.measure_cells(rows)
    assert len(cells) == 9 and not any(c.edges for c in cells)
    gaps = left_out(cells)
    assert max(gaps["the other cells"]) <= 0.0025
    assert np.mean(gaps["Step Law"]) > 0.01 > 10 * np.mean(gaps["Step Law at total N"])
    low, high = scaling.fit_cells(cells, 40)["lr"].ci("N")
    assert low < 0 < high and low > -0.5  # no trend in activated N, and not the dense one


def test_fit_of_given_rows(tmp_path, capsys):
    """`fit` of two tables: it says what was held out and how that went, and writes nothing."""
    scaling.write_rows(tmp_path / "rows.csv", make_rows(0.001, seed=1))
    scaling.write_rows(tmp_path / "moe.csv", [
        replace(row, kind="moe", total=4 * row.N) for row in make_rows(sizes=(1e8, 2e8))])
    args = scaling.Args(data=f"{tmp_path}/rows.csv,{tmp_path}/moe.csv", out=str(tmp_path / "out"),
                        bootstrap=10)
    tables = scaling.fit(args)
    laws, said = tables["dense"], capsys.readouterr().out.split("\nmoe:")[0]
    assert list(tables) == ["dense", "moe", "parity"]
    assert laws["lr"].ci("N")[0] < -0.5 < laws["lr"].ci("N")[1]
    assert said.count(": held") + said.count("MISSED") == 12 and said.count(": held") >= 10
    assert "the 4 largest held out" in said
    assert not (tmp_path / "out").exists()


def test_commands(tmp_path):
    """The first word is the command; a plan takes its laws from --data."""
    scaling.write_rows(tmp_path / "rows.csv", make_rows())

    def run(*words):
        return subprocess.run([sys.executable, "scaling.py", *words], cwd=ROOT,
                              capture_output=True, text=True)
    done = run("plan", "--model", "1e8", "--tokens", "5e9", "--data", str(tmp_path / "rows.csv"))
    assert f"lr    {true_lr(1e8, 5e9):.4g}" in done.stdout and done.returncode == 0
    done = run("plann", "--model", "1e8")
    assert done.returncode == 2 and "plann" in done.stderr


def test_sizes():
    for name in ("32x2", "32x2-moe", "tiny"):
        scaling.add_preset(name)
    dense, moe = ({k: v for k, v in Qwen2(PRESETS[n]).count_parameters().items()}
                  for n in ("32x2", "32x2-moe"))
    assert moe["active"] == pytest.approx(dense["active"], rel=0.02)
    assert moe["total"] > dense["total"]
    with pytest.raises(InputError, match="WIDTHxLAYERS"):
        scaling.add_preset("32by2")
    with pytest.raises(InputError, match="multiple of 16"):
        scaling.add_preset("24x2")


def test_sweep_in_small(tmp_path, capsys):
    """The whole stage: rows with their provenance (R6.1), what it can fit, --resume."""
    flags = ["--out", str(tmp_path / "s"), "--sizes", "16x1,16x1-moe", "--tokens", "512,1024",
             "--lrs", "4e-3,16e-3", "--batches", "128,256", "--bootstrap", "5"]
    scaling.main(parse_args(scaling.Args, flags))
    said = capsys.readouterr().out
    rows = scaling.grid_rows(tmp_path / "s" / "rows.csv")
    assert len(rows) == 16 and {r.kind for r in rows} == {"dense", "moe"}
    assert "no law: 0 cells (2 more are on an edge)" in said
    for row in rows:
        assert row.schedule == "cosine to 0.1" and row.device == "cpu" and row.seed == 0
        assert row.seq_len == 64 and 4 < row.loss < 6.5
        assert row.warmup == int(row.D / row.batch_tokens / 10)
    assert len({r.loss for r in rows}) == len(rows)
    count = {kind: Qwen2(PRESETS[name]).count_parameters() for kind, name in
             (("dense", "16x1"), ("moe", "16x1-moe"))}  # N leaves out embedding and idle experts
    for row in rows:
        assert row.N == count[row.kind]["active"] - 16 * PRESETS["16x1"].vocab_size
    result = json.loads((tmp_path / "s" / "run.json").read_text())["result"]
    assert result["runs"] == len(rows)
    with pytest.raises(InputError, match="overwrite"):
        scaling.main(parse_args(scaling.Args, flags))
    before = (tmp_path / "s" / "rows.csv").read_text()
    scaling.main(parse_args(scaling.Args, [*flags, "--resume"]))
    assert (tmp_path / "s" / "rows.csv").read_text() == before  # nothing was trained again
    with pytest.raises(InputError, match="another --seq_len"):
        scaling.main(parse_args(scaling.Args, [*flags, "--resume", "--seq_len", "32"]))
    scaling.main(parse_args(scaling.Args, [*flags, "--resume", "--seeds", "2"]))
    pairs = {}
    for row in scaling.grid_rows(tmp_path / "s" / "rows.csv"):
        pairs.setdefault((row.size, row.D, row.lr, row.batch_tokens), {})[row.seed] = row.loss
    both = [losses for losses in pairs.values() if len(losses) == 2]
    assert len(both) >= 4 and all(0 < abs(two[0] - two[1]) < 0.5 for two in both)


def test_a_sweep_resumes_no_other_run(tmp_path):
    """--resume on the directory of a finished run without rows.csv leaves it as it is."""
    (tmp_path / "run.json").write_text(json.dumps({"stage": "sft", "finished": True}))
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(InputError, match="holds a finished run"):
        scaling.main(scaling.Args(out=str(tmp_path), resume=True, device="cpu"))
    assert (tmp_path / "model.safetensors").read_bytes() == b"weights"


def test_a_sweep_trains_its_whole_grid_once(tmp_path, monkeypatch):
    """Every setting with every seed, then, with --resume, what a larger grid lacks and no more."""
    asked = []

    def measured(args, size, D, lr, batch, seed, device):
        asked.append((size, D, lr, batch, seed))
        return Row(size=size, N=1e4, D=D, lr=lr, batch_tokens=batch, loss=3.0, seed=seed,
                   seq_len=args.seq_len)
    monkeypatch.setattr(scaling, "measure", measured)
    monkeypatch.setattr(scaling, "prepare", lambda args, tokens: None)
    small = scaling.Args(out=str(tmp_path / "s"), sizes="16x1", tokens="512", seeds=2, seed=7,
                         lrs="2e-3,1e-3,2e-3", batches="64,128")
    scaling.main(small)
    settings = {("16x1", 512, lr, batch, seed) for lr in (1e-3, 2e-3) for batch in (64, 128)
                for seed in (7, 8)}
    assert len(asked) == 8 and set(asked) == settings
    scaling.main(replace(small, lrs="2e-3,4e-3", resume=True))
    assert len(asked) == 12 and {setting[2] for setting in asked[8:]} == {4e-3}
    assert len(scaling.grid_rows(tmp_path / "s" / "rows.csv")) == 12
    lines = (tmp_path / "s" / "log.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["lr"] == 4e-3


def test_committed_sweep(capsys):
    """R6.1, R6.2: the rows say what they were measured with, and give the recipe's numbers."""
    path = ROOT / "recipes" / "scaling.csv"
    for row in read_table(path):
        assert row["schedule"] == "cosine to 0.1" and row["seed"] in "01" and row["device"] == "cpu"
        assert int(row["warmup"]) == int(float(row["D"]) / float(row["batch_tokens"]) / 10)
    tables = scaling.fit(scaling.Args(data=str(path), degree=2, within=0.05, bootstrap=20))
    said = (ROOT / "recipes" / "scaling.md").read_text()
    for table in ("dense", "moe"):
        for name in ("lr", "batch"):
            assert all(f" {tables[table][name][axis]:.2f} [" in said for axis in "ND"), name
    assert capsys.readouterr().out.count("MISSED") == 1  # the dense batch, as the recipe says


def test_a_coefficient_that_nothing_determines_has_no_interval(capsys):
    """E, where 0 fits as well: its logarithm has no end below."""
    class Stub(dict):
        y, edges, spread, names, scales = [1.0] * 9, 0, 0.01, ("E", "alpha"), ("E",)

        def ci(self, name):
            return {"E": (1e-20, 3.0), "alpha": (0.1, 0.3)}[name]
    scaling.describe("loss", Stub(E=1e-9, alpha=0.2))
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split(maxsplit=2) == ["E", "1e-09", "not determined by these cells"]
    assert lines[2].split() == ["alpha", "0.2", "[0.1,", "0.3]"]
