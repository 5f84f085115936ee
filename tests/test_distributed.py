"""torchrun: a stage on several processes takes the steps that it takes on one."""
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ranks
import torch
from helpers import log, same_weights, weights
from test_faults import MOE, STAGES, Evil, inputs  # noqa: F401  the same runs of six steps
from safetensors.torch import load_file
from test_vllm_client import Peer

from sample import load_policy

ROOT = Path(__file__).resolve().parents[1]
STAGES_ON_TWO = STAGES | {name: MOE[name] for name in ("sft-moe", "dpo-moe", "grpo-moe")}
RECOMPUTED = ("sft", "dpo", "reward", "grpo-moe")


def start(n: int, job: dict, folder: Path):
    """tests/ranks.py: n processes -> their exit codes, and what they wrote to stderr."""
    (folder / "job.json").write_text(json.dumps(job, default=str))
    done = subprocess.run([sys.executable, ROOT / "tests" / "ranks.py", str(n),
                           folder / "job.json"], capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def run_stages(n: int, folder: Path, inputs, micro_batch, names=STAGES, **values):  # noqa: F811
    """Each stage on n processes, in folder/NAME. One process is this one."""
    folder.mkdir(exist_ok=True)
    runs = [{"stage": names[name].__name__, "args": inputs[name] | {
        "out": str(folder / name), "micro_batch": micro_batch,
        "resume": (folder / name / "state").exists()}} | values for name in names]
    if not values:
        sft = next(one for one in runs if one["stage"] == "sft")
        nan, bf16, lora = ({"out": str(folder / name)} for name in ("nan", "bf16", "lora"))
        again = [one | {"args": one["args"] | {"out": str(folder / f"recompute-{name}"),
                                               "gradient_checkpointing": True}}
                 for name, one in zip(names, runs, strict=True) if name in RECOMPUTED]
        grpo = next(one for one in runs if one["stage"] == "grpo")
        bf16_grpo = {"out": str(folder / "bf16-grpo"), "dtype": "bfloat16", "steps": 1}
        runs += [sft | {"args": sft["args"] | nan, "nan": [2, 4, 5]},
                 grpo | {"args": grpo["args"] | bf16_grpo},
                 sft | {"args": sft["args"] | bf16 | {"dtype": "bfloat16"}},
                 *again,
                 sft | {"args": sft["args"] | lora | {"lora": 2}}]
    if n > 1:
        codes, told = start(n, {"runs": runs}, folder)
        assert codes == [0] * n, told
    else:
        for one in runs:
            ranks.run(**one)
    return folder


def same(a: Path, b: Path) -> None:
    """Two finished runs: the same log, files, weights."""
    for x, y in zip(log(a), log(b), strict=True):
        assert x.keys() == y.keys()
        # DPO's first step: the policy is the reference, and rounding decides which pair is right.
        tied = {"accuracy"} if abs(x.get("margin", 1)) < 1e-6 else set()
        for key in x.keys() - {"tokens_per_s"} - tied:
            if x[key] != y[key]:  # texts, nulls; else numbers or lists of them
                rel = 1e-4 if key == "grad_norm" else 1e-5  # the rounding of all steps before
                if key in ("aux", "expert_max", "expert_min", "router_entropy"):
                    rel = 0.05  # a token whose experts are nearly tied may change its expert
                assert y[key] == pytest.approx(x[key], rel=rel, abs=1e-5), (key, x, y)
    assert {f.name for f in a.iterdir()} == {f.name for f in b.iterdir()}
    for file in a.iterdir():
        if file.is_dir():
            continue
        if file.name == "samples.jsonl":
            texts = (path.read_text("utf-8").splitlines() for path in (file, b / file.name))
            for one, two in zip(*texts, strict=True):
                one, two = json.loads(one), json.loads(two)
                assert one.keys() == two.keys()
                for key, value in one.items():  # rewards and advantages: numbers
                    assert two[key] == (pytest.approx(value, rel=1e-5, abs=1e-5)
                                        if isinstance(value, float) else value), key
        elif file.name not in ("run.json", "log.jsonl", "model.safetensors"):
            assert file.read_bytes() == (b / file.name).read_bytes(), file.name
    x, y = weights(a), weights(b)
    assert x.keys() == y.keys()
    far = torch.cat([(y[name] - x[name]).abs().flatten() for name in x])
    # AdamW divides by the gradient's own size: where that is rounding, so is a step.
    assert far.max() < 2e-3 and (far > 1e-5).float().mean() < 2e-3


@pytest.fixture(scope="module")
def one(inputs, tmp_path_factory):  # noqa: F811
    return run_stages(1, tmp_path_factory.mktemp("ranks") / "one", inputs, 2, STAGES_ON_TWO)


@pytest.fixture(scope="module")
def two(inputs, one):  # noqa: F811
    return run_stages(2, one.parent / "two", inputs, 1, STAGES_ON_TWO)


@pytest.mark.parametrize("name", STAGES_ON_TWO)
def test_two_processes_take_the_steps_of_one(name, one, two):
    """Losses, gradient norms, all that is logged, samples, files and weights; for the MoE too,
    whose balance loss is that of the rows that are computed together."""
    same(one / name, two / name)


def test_a_fault_in_one_process_is_skipped_by_all(one, two):
    """The step and its count are those of one process that meets it."""
    same(one / "nan", two / "nan")
    rows = log(two / "nan")
    assert [row.get("skipped") for row in rows] == [None, 1, None, 1, 2, None]


def test_bfloat16_is_autocast_on_several_processes_too(one, two):
    """Blocks are gathered in bfloat16, weights, gradients and sums stay in float32."""
    for x, y in zip(log(one / "bf16"), log(two / "bf16"), strict=True):
        assert y["loss"] == pytest.approx(x["loss"], rel=2e-3)
        assert y["grad_norm"] == pytest.approx(x["grad_norm"], rel=5e-2)
    assert {w.dtype for w in weights(two / "bf16").values()} == {torch.float32}
    x, y = log(one / "bf16-grpo")[0], log(two / "bf16-grpo")[0]
    assert 0 < x["kl"] < 1 and y["kl"] == pytest.approx(x["kl"], rel=0.1)  # after one inner step


@pytest.mark.parametrize("name", RECOMPUTED)
def test_recomputed_activations_change_nothing(name, one, two):
    """On one process bit for bit; on two, a block's weights are gathered for it once more. Prompts
    that are read once, and an MoE, are among them."""
    again = f"recompute-{name}"
    assert log(one / name) == log(one / again)
    assert same_weights(one / name, one / again)
    same(one / again, two / again)


def test_adapters_on_two_processes_are_those_of_one(one, two):
    """Frozen weights and adapters are sharded together; the merged model and the adapter agree."""
    same(one / "lora", two / "lora")
    a, b = (load_file(path / "lora" / "adapter" / "adapter_model.safetensors")
            for path in (one, two))
    assert a.keys() == b.keys() and any(a[name].any() for name in a if "lora_B" in name)
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=0, atol=2e-3)


def test_two_processes_share_a_server(inputs, tmp_path):  # noqa: F811
    """It is given each step's weights once, and both get answers of these: gap, the largest
    difference of log-probabilities over all of them, is rounding."""
    peer = Peer(*load_policy(inputs["grpo"]["init"], "cpu"))
    args = inputs["grpo"] | {"rollout_url": peer.url, "out": str(tmp_path / "run"),
                             "inner_steps": 1, "micro_batch": 1}
    codes, told = start(2, {"runs": [{"stage": "grpo", "args": args}]}, tmp_path)
    peer.http.shutdown()
    assert codes == [0, 0], told
    rows = log(tmp_path / "run")
    assert peer.loaded == 1 + len(rows) == 7 and all(row["logprob_gap"] < 1e-5 for row in rows)
    assert sum(row["grad_norm"] for row in rows) > 0


@pytest.mark.slow
def test_four_processes_take_the_steps_of_one(inputs, one):  # noqa: F811
    four = run_stages(4, one.parent / "four", inputs, 1)
    for name in ("nan", *STAGES):
        # The MoE's balance loss is over 4 x 1 rows here.
        if name != "pretrain-moe":
            same(one / name, four / name)


@pytest.mark.slow
@pytest.mark.parametrize("numbers", [(1, 2, 4), (4, 1, 2), (2, 4, 1)])
def test_a_state_is_continued_by_any_number_of_processes(numbers, inputs, tmp_path):  # noqa: F811
    """Stopped with the state of step 2, continued by others and stopped with that of step 4. A
    micro-batch of 4 rows is the whole step on any number, as the MoE's balance loss wants."""
    whole, parts, names = tmp_path / "whole", tmp_path / "parts", STAGES | MOE
    run_stages(1, whole, inputs, 4, names)
    for n, stop in zip(numbers, (2, 4, 0), strict=True):
        run_stages(n, parts, inputs, 4, names, stop=stop)
    for name in names:
        same(whole / name, parts / name)


@pytest.fixture
def tune(inputs, tmp_path):  # noqa: F811
    """The words of a command that runs SFT for many steps."""
    args = inputs["sft"] | {"out": tmp_path / "run", "epochs": 9999}
    return [ROOT / "sft.py", *(word for name, x in args.items() for word in (f"--{name}", str(x)))]


def test_what_is_wrong_is_told_once(tune, tmp_path):
    codes, told = start(2, {"command": [*tune, "--device", "nowhere"]}, tmp_path)
    assert codes == [2, 2] and "Traceback" not in told and told.count("error: ") == 1, told


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_run_in_one_line(victim, tune, tmp_path):
    """Under torchrun, whose own report stands below it. Torchrun ends the others by SIGTERM: on a
    busy machine that comes before they miss the one that is gone."""
    job = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
                            *tune], text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    while not (tmp_path / "run" / "state" / "state.pt").exists():
        assert job.poll() is None, job.communicate()
        time.sleep(0.01)
    workers = subprocess.run(["ps", "--ppid", str(job.pid), "-o", "pid="], text=True,
                             capture_output=True).stdout.split()
    os.kill(int(workers[victim]), signal.SIGKILL)
    told = job.communicate(timeout=120)[1]
    lines = [line for line in told.splitlines() if line.startswith("stopped")]
    assert job.returncode == 1 and len(lines) == 1, told
    assert re.fullmatch(r"stopped(: another process is gone \(.+\))?; "
                        "continue with the same command and --resume", lines[0]), lines[0]
    assert "[rank" not in told
