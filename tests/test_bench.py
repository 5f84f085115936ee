"""The benchmark harness's pure functions; its numbers are nobody's assertion."""
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from helpers import ROOT
from known_laws import make_rows

from lib.args import InputError
from lib.cells import measure_cells, write_rows
from lib.laws import PUBLISHED
from lib.plan import count, flops
from model import PRESETS
from scaling import fit_cells


def from_bench(monkeypatch, name):
    """Import a module of bench/ for one test."""
    monkeypatch.syspath_prepend(ROOT / "bench")  # undone at the end, with what the module changes
    yield importlib.import_module(name)
    sys.modules.pop(name)


@pytest.fixture()
def harness(monkeypatch):
    yield from from_bench(monkeypatch, "harness")


def test_spread_is_the_median_and_the_range_in_significant_digits(harness):
    assert harness.spread([3.0, 1.0, 2.34567]) == "2.35 (1–3)"
    assert harness.spread([1234.5, 2345.6, 999.0]) == "1,234 (999–2,346)"


@pytest.mark.parametrize("a, b, text", [
    ([1, 2, 3, 4], [1, 2, 3, 5], "75.0% of 4 equal"),
    ([1.0, 2.0], [1.0, 2.2], "within 9.1e-02"),
    ([1], [1, 2], "lengths 1 and 2")])
def test_agreement(harness, a, b, text):
    assert harness.agreement(a, b) == text


def test_table_takes_ratios_round_by_round_to_the_last_system(harness):
    def rows(*seconds):
        return [{"cpu": s, "wall": 2 * s, "work": 8, "flops": 4e9, "dtype": "fp32",
                 "check": [1, 2]} for s in seconds]
    head, _, ours, peer = harness.table("tokens", {"x": {"ours": rows(1.0, 2.0, 4.0),
                                                         "peer": rows(2.0, 2.0, 2.0)}}, {"fp32": 8})
    assert head.split(" | ")[2:7] == ["tokens per CPU s", "per wall s", "ratio", "GFLOP/s",
                                      "of GEMM"]
    # 8 / 2 s; the slowest and the fastest round; 2/1, 2/2 and 2/4 of the peer's time
    assert ours == "| x | ours | 4 (2–8) | 2 (1–4) | 1 (0.5–2) | 2 | 25% |  |"
    assert peer == "| x | peer | 4 (4–4) | 2 (2–2) | 1 | 2 | 25% | 100.0% of 2 equal |"


def test_a_round_that_failed_shifts_no_other(harness):
    """Ours has lost round 0, the peer round 1; both ran in round 2 only: 6 s against 3."""
    ours = [{"cpu": 1.0, "wall": 1, "round": 1}, {"cpu": 3.0, "wall": 1, "round": 2}]
    peer = [{"cpu": 9.0, "wall": 1, "round": 0}, {"cpu": 6.0, "wall": 1, "round": 2}]
    assert harness.round_ratios(ours, peer) == [2.0]
    row = harness.table("steps", {"x": {"ours": ours[:1], "peer": peer}}, {}, {"x": 1.5})[2]
    assert "| none | 1.5 missed |" in row


def test_a_machine_whose_cpuinfo_is_arms(harness, monkeypatch):
    text = "processor\t: 0\nBogoMIPS\t: 48.00\nCPU implementer\t: 0x41\n"
    monkeypatch.setattr(harness.Path, "exists", lambda self: True)
    monkeypatch.setattr(harness.Path, "read_text", lambda self: text)
    monkeypatch.setattr(harness.metadata, "version", lambda name: "2")
    assert harness.machine().startswith(harness.platform.machine() + "; python ")


def test_timed_leaves_the_warm_up_out(harness):
    calls = []
    out = harness.timed(lambda: calls.append(0) or len(calls), repeats=2, warmup=1)
    assert out["result"] == 3 and out["cpu"] >= 0 and out["wall"] > 0


def test_table_names_the_target_beside_the_ratio_of_the_first_system(harness):
    runs = {"x": {"ours": [{"cpu": 1.0, "wall": 1}], "peer": [{"cpu": 1.5, "wall": 1}]}}
    for aim, word in (1.5, "met"), (1.6, "missed"):
        head, _, ours, peer = harness.table("steps", runs, {}, {"x": aim})
        assert "| ratio | target |" in head
        assert f"| 1.5 | {aim} {word} |" in ours and "| 1 |  |" in peer


@pytest.mark.slow
def test_the_gpu_script_runs_at_toy_sizes_on_a_cpu():
    """Every measurement gives its line, but for what a CPU or a machine without peers lacks."""
    out = subprocess.run([sys.executable, str(ROOT / "bench" / "gpu.py"), "--tiny"], text=True,
                         capture_output=True, timeout=600,
                         env=dict(os.environ, OMP_NUM_THREADS="1"))
    assert out.returncode == 0, out.stderr
    for name in ("attention T 32, document mask, sdpa", "cross-entropy", "T 64, packed, dense mask",
                 "training tiny, T 64, packed", "MoE of equal active size", "DPO update",
                 "GRPO update", "rollouts tiny, batch 4, ours"):
        assert name in out.stdout
    for line in out.stdout.splitlines():
        if "FAILED" in line:
            assert "flex" in line or "transformers" in line, line
    check = next(line for line in out.stdout.splitlines() if line.startswith("packed rows"))
    gaps = dict(re.findall(r"(sdpa|fused|mask) ([0-9.e+-]+)", check.split(": ")[1]))
    assert float(gaps["fused"]) < 0.05 < 0.2 < float(gaps["mask"])  # attention matters


def test_a_gpu_measurement_that_fails_or_comes_too_late_is_a_line(harness, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny"])
    monkeypatch.syspath_prepend(ROOT / "bench")  # from which the harness takes itself
    import gpu
    gpu.measure("a kernel", lambda: 1 / 0)
    gpu.measure("two", lambda x: f"{x} ms", 2)
    monkeypatch.setattr(gpu, "began", gpu.began - gpu.LIMIT - 1)
    gpu.measure("three", lambda: "3 ms")
    said = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert said == ["a kernel FAILED: ZeroDivisionError: division by zero", "two 2 ms",
                    "three left out: 420 s are over"]
    sys.modules.pop("gpu")


def test_the_gpu_model(harness, monkeypatch):
    """Its FLOPs are those of lib/plan.py; a memory-bound and a launch-bound operation by hand; the
    committed table; and FlexAttention is worth 1.6 times, also if a dense mask cost nothing."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    import gpu_model
    config = PRESETS["0.5B"]
    assert gpu_model.Work(bytes=2.8e12).seconds() == pytest.approx(1)
    assert gpu_model.Work(flops=6e14, bytes=1e12, kernels=3).seconds() == pytest.approx(1)
    assert gpu_model.Work(flops=1, kernels=5).seconds() == pytest.approx(30e-6)
    assert gpu_model.causal_pairs(4, False) == 1 + 2 + 3 + 4
    T = 4096
    blocks = sum(work.flops for work in gpu_model.block_without_attention(config, T))
    logits = sum(work.flops for work in gpu_model.head(config, T))
    assert sum(work.flops for work in gpu_model.head_before(config, T)) == pytest.approx(
        4 / 3 * logits)  # logits twice
    total = config.num_hidden_layers * blocks + logits
    assert total == pytest.approx(flops(count(config)["N"], T, config), rel=0.001)
    dense, flex = (sum(work.flops for work in gpu_model.attention(config, 1, T, False, kind))
                   for kind in ("dense", "flex"))
    assert dense == 14 * T * T * config.hidden_size and flex == pytest.approx(dense / 2, rel=0.04)

    assert "\n".join(gpu_model.lines()) in (ROOT / "bench" / "RESULTS.md").read_text()
    for dense_rate in (gpu_model.DENSE, gpu_model.FLASH):
        monkeypatch.setattr(gpu_model, "DENSE", dense_rate)
        before, after = (sum(gpu_model.training(config, T, True, kind, kind == "flex", 1).values())
                         for kind in ("dense", "flex"))
        assert before / after > 1.6
    sys.modules.pop("gpu_model")


def test_scaling_curves_fit_the_exponent_of_a_known_law(harness, monkeypatch):
    """y = 3 x^2 has exponent 2; a constant, 0; and the last two points are fitted alone."""
    monkeypatch.syspath_prepend(ROOT / "bench")  # which the harness takes off the path
    import scaling_curves
    rows = {"batch": [{"x": x, "s": 3 * x**2, "MB": 100} for x in (1, 2, 4)],
            "length": [{"x": x, "s": y, "MB": x} for x, y in ((1, 1), (2, 1), (4, 4))]}
    batch, length = scaling_curves.table(rows)[2:]
    assert batch == ("| batch (rows of 128) | 1, 2, 4 | 3, 12, 48 | 2.00 (2.00) | 100, 100, 100 | "
                     "0.00 (0.00) |")
    assert "| 1, 1, 4 | 1.00 (2.00) | 1, 2, 4 | 1.00 (1.00) |" in length
    sys.modules.pop("scaling_curves")


def test_a_point_of_the_scaling_curves():
    out = subprocess.run([sys.executable, str(ROOT / "bench" / "scaling_curves.py"), "--worker",
                          "parameters", "64"], text=True, capture_output=True, timeout=120)
    assert out.returncode == 0, out.stderr
    point = json.loads(out.stdout)
    assert point["x"] == 261_440 and point["s"] > 0


def test_plots_of_the_laws(tmp_path, capsys, monkeypatch):
    """A picture per table: of each of four sizes the optima, the law and two published laws."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    import plot_laws
    rows = make_rows(0.001, seed=1)
    write_rows(tmp_path / "rows.csv", rows)
    args = plot_laws.Args(data=f"{tmp_path}/rows.csv", out=str(tmp_path / "out"), bootstrap=10)
    figure, panels = MagicMock(), [MagicMock() for _ in range(3)]
    figure.savefig = lambda path, **_: Path(path).write_text("png")
    pyplot = MagicMock(subplots=lambda *args, **kwargs: (figure, [panels]))
    monkeypatch.setitem(sys.modules, "matplotlib", MagicMock(pyplot=pyplot))
    plot_laws.main(args)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["dense.png"]
    assert [panel.loglog.call_count for panel in panels] == [16, 16, 0]
    law = fit_cells(measure_cells(rows))["lr"]
    lines = [call.args[:2] for call in panels[0].loglog.call_args_list[:3]]
    assert lines[1][1] == pytest.approx(law.predict(N=5e7, D=lines[1][0]))
    assert lines[2][1] == pytest.approx(PUBLISHED["lr"]["Step Law"].predict(N=5e7, D=lines[2][0]))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match="pip install matplotlib"):
        plot_laws.main(args)
    sys.modules.pop("plot_laws")


@pytest.fixture()
def records(monkeypatch):
    yield from from_bench(monkeypatch, "records")


def test_records_group_whole_speeches_and_lose_no_character(records):
    text = "\n\n".join(f"SPEAKER {i}:\n" + "word " * (i % 7 + 1) for i in range(300))
    documents = records.speeches(text, size=500)
    assert "".join(documents) == text
    assert all(document.startswith("SPEAKER") for document in documents)
    assert max(map(len, documents)) < 500 + 60


def test_a_record_fills_its_budget_by_two_probes(records, monkeypatch):
    """A program that takes 2 s to start and 0.5 s per unit gets 0.95 * 30 s: 53 units."""
    asked = []

    def run(command, threads):
        units = int(command[command.index("--steps") + 1])
        asked.append(units)
        return records.Run("", 2 + 0.5 * units, 0.0)

    monkeypatch.setattr(records, "run", run)
    done = records.run_for(["grpo.py"], "--steps", 3, budget=30.0, threads=1)
    assert asked == [3, 9, 53] and done.seconds == 28.5


def test_no_record_without_a_speed_or_over_its_time(records, monkeypatch, tmp_path, capsys):
    """Two probes of nearly equal time would ask for any number of steps."""
    monkeypatch.setattr(records, "run", lambda command, threads: records.Run("", 10.0, 0.0))
    with pytest.raises(SystemExit, match="too close to tell the speed"):
        records.run_for(["grpo.py"], "--steps", 3, budget=30.0, threads=1)
    monkeypatch.setattr(records, "RECORDS", tmp_path / "RECORDS.md")
    records.append("a", "1.0", records.Run("", 31.0, 0.0), 30.0)
    assert "in 31 s instead of 30" in capsys.readouterr().out
    assert not records.RECORDS.exists()
    records.append("a", "1.0", records.Run("", 29.0, 0.0), 30.0)
    assert "| a | **1.0** | 29 |" in records.RECORDS.read_text()
