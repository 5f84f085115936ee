"""torchrun: each stage on several processes does what it does on one."""
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import log, weights
from test_faults import STAGES, inputs  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]


def start(n: int, job: dict, folder: Path) -> None:
    """tests/ranks.py in n processes."""
    (folder / "job.json").write_text(json.dumps(job))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    here = {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [subprocess.Popen(
        [sys.executable, ROOT / "tests" / "ranks.py", folder / "job.json"], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=os.environ | here | {"RANK": str(i), "LOCAL_RANK": str(i)}) for i in range(n)]
    told = [rank.communicate()[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * n, told


def jobs(inputs, folder, micro_batch, stages=STAGES, **values):  # noqa: F811
    """Arguments of a run of six steps of each stage."""
    return [[STAGES[name].__name__, inputs[name] | {
        "out": str(folder / name), "micro_batch": micro_batch} | values] for name in stages]


def same(a: Path, b: Path) -> None:
    for x, y in zip(log(a), log(b), strict=True):
        assert x.keys() == y.keys()
        for key in x.keys() - {"tokens_per_s"}:
            assert x[key] == pytest.approx(y[key], rel=1e-5, abs=1e-5), (x, y)
    assert {f.name for f in a.iterdir()} == {f.name for f in b.iterdir()}
    for file in a.iterdir():
        if file.name not in ("run.json", "log.jsonl", "model.safetensors"):
            assert file.read_bytes() == (b / file.name).read_bytes(), file.name
    x, y = weights(a), weights(b)
    assert x.keys() == y.keys()
    for name in x:
        torch.testing.assert_close(x[name], y[name], rtol=0, atol=1e-5)


def test_two_processes_take_the_steps_of_one(inputs, tmp_path):  # noqa: F811
    for n in (1, 2):
        (tmp_path / str(n)).mkdir()
        start(n, {"stop": 0, "runs": jobs(inputs, tmp_path / str(n), 2 // n)}, tmp_path)
    for name in STAGES:
        same(tmp_path / "1" / name, tmp_path / "2" / name)
