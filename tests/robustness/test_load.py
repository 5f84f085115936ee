"""Hours of work in a few minutes, or in as many as LOAD_MINUTES says: memory, files and processes
of a run that does not end must stay what they are. `make test-load` prints the table."""
import ctypes
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import letter_queries, log, teach, write_rows

import tasks.queries
from reward import RewardModel
from sample import load_policy

ROOT = Path(__file__).resolve().parents[2]
MINUTES = float(os.environ.get("LOAD_MINUTES", "3"))
linux = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="/proc of Linux")


@pytest.fixture
def orphans():
    """Processes whose parent ended become ours, so that they are counted."""
    prctl, become_subreaper = ctypes.CDLL(None).prctl, 36
    prctl(become_subreaper, 1, 0, 0, 0)
    yield
    prctl(become_subreaper, 0, 0, 0, 0)


def descendants(pid: int) -> set[int]:
    """All processes below one that still run; what has ended and is ours by adoption is buried."""
    parents, dead = {}, set()
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = status.read_text().rsplit(")", 1)[1].split()[:2]
        except OSError:  # it has just ended
            continue
        parents[int(status.parent.name)] = int(parent)
        if state == "Z":
            dead.add(int(status.parent.name))
            if int(parent) == os.getpid():
                os.waitpid(int(status.parent.name), 0)
    found, new = set(), {pid}
    while new:
        new = {child for child, parent in parents.items() if parent in new} - found
        found |= new
    return found - dead


def measure(pid: int) -> dict:
    """Resident MB, without pages shared with a file; descriptors; threads."""
    status = dict(line.split(":\t", 1) for line in
                  Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line)
    return {"anonymous_mb": int(status["RssAnon"].split()[0]) / 1024,
            "descriptors": len(os.listdir(f"/proc/{pid}/fd")), "threads": int(status["Threads"])}


@linux
@pytest.mark.slow
def test_grpo_that_does_not_end_stays_as_it_is(tokenizer, tmp_path, orphans):
    """Policy, reference, reward model, sandbox and states: what each step takes is given back.
    Programs that go wrong, hang, or leave a child behind are among what the policy answers."""
    programs = ["def f():\n    return 1", "def f():\n    return 2", "def f(:", "while 1: pass",
                "import os\nif os.fork() == 0:\n    os.setsid()\n    while 1: pass"]
    talks = [("Write f.", f"```python\n{program}\n```") for program in programs]
    policy = teach(tokenizer, tmp_path / "policy",
                   [*talks, ("Pick A.", "A."), ("Pick A.", "B.")], steps=80)
    scorer = RewardModel.from_language_model(load_policy(policy, "cpu")[0], tokenizer)
    scorer.save_pretrained(tmp_path / "scorer")
    tokenizer.save_pretrained(tmp_path / "scorer")
    queries = write_rows(tmp_path / "queries.jsonl", [
        {"prompt": "Write f.", "domain": "code",
         "check": {"kind": "code", "language": "python", "tests": "assert f() == 1"}}])
    with open(queries, "a") as file:
        file.write(Path(letter_queries(tmp_path / "letters.jsonl")).read_text())
    scratch, out = tmp_path / "scratch", tmp_path / "run"
    scratch.mkdir()
    argv = {"init": policy, "reward_model": tmp_path / "scorer", "queries": queries, "out": out,
            "steps": 10**6, "batch_queries": 3, "max_new_tokens": 48, "kl": 0.01, "lr": 1e-6,
            "inner_steps": 2, "save_every": 20, "device": "cpu"}
    process = subprocess.Popen(
        [sys.executable, ROOT / "grpo.py", *(f"--{k}={v}" for k, v in argv.items())],
        env=os.environ | {"TMPDIR": str(scratch)}, stdout=open(tmp_path / "output", "w"),
        stderr=subprocess.STDOUT)
    rows, steps, started = [], 0, time.monotonic()
    print(f"\n{'minutes':>8}{'steps':>8}{'MB':>9}{'descriptors':>12}{'threads':>8}{'children':>9}"
          f"{'scratch':>8}")
    while time.monotonic() - started < MINUTES * 60 or steps < 60:
        time.sleep(MINUTES / 2)  # 120 rows
        assert process.poll() is None, (tmp_path / "output").read_text()[-2000:]
        steps = (out / "log.jsonl").read_bytes().count(b"\n") if out.exists() else 0
        rows.append({"minutes": (time.monotonic() - started) / 60, "steps": steps,
                     **measure(process.pid), "children": len(descendants(os.getpid())) - 1,
                     "scratch": sum(1 for _ in scratch.rglob("*"))})
        print("{minutes:8.2f}{steps:8}{anonymous_mb:9.1f}{descriptors:12}{threads:8}{children:9}"
              "{scratch:8}".format(**rows[-1]), flush=True)
    process.send_signal(signal.SIGINT)
    assert process.wait(300) == 130
    time.sleep(1)
    assert not descendants(os.getpid()) and not list(scratch.iterdir())
    said = [row for row in log(out) if 0 < row["pass_rate"] < 1]
    assert len(said) > 10
    third = len(rows) // 3
    for name, slack in (("anonymous_mb", 8), ("descriptors", 0), ("threads", 0), ("children", 4),
                        ("scratch", 40)):
        early, late = (statistics.median(row[name] for row in part)
                       for part in (rows[third:2 * third], rows[-third:]))
        assert late <= early + slack, (name, early, late)


@linux
@pytest.mark.slow
def test_sft_reads_100000_lines_in_the_memory_of_1000(micro_run, tmp_path):
    """The file is read row by row: a hundred times the lines take a few MB more."""
    peaks = {}
    for n in (1000, 100_000):
        write_rows(tmp_path / "chats.jsonl", ({"messages": [
            {"role": "user", "content": f"Say {i}. " + "And again. " * (i % 40)},
            {"role": "assistant", "content": f"{i}"}]} for i in range(n)))
        argv = {"init": micro_run, "data": tmp_path / "chats.jsonl", "out": tmp_path / f"run{n}",
                "n_data": n, "epochs": 320 / n, "device": "cpu"}
        subprocess.run([sys.executable, ROOT / "sft.py", *(f"--{k}={v}" for k, v in argv.items())],
                       check=True, capture_output=True)
        record = json.loads((tmp_path / f"run{n}" / "run.json").read_text())
        assert record["result"]["conversations"] == n and len(log(tmp_path / f"run{n}")) == 20
        peaks[n] = record["peak_rss_mb"]
    print(f"\npeak MB by lines: {peaks}")
    assert peaks[100_000] < peaks[1000] + 40


def test_verdicts_of_a_long_run_are_forgotten(monkeypatch):
    """MAX_VERDICTS programs are remembered, or hours of RL keep all that was ever sampled."""
    query = {"prompt": "", "domain": "code",
             "check": {"kind": "code", "language": "python", "tests": "assert f() == 1"}}
    monkeypatch.setattr(tasks.queries, "VERDICTS", {i: True for i in range(10_500)})
    monkeypatch.setattr(tasks.queries, "MAX_VERDICTS", 10_000)
    assert tasks.queries.score(query, "def f(): return 1") == 1.0
    assert (
        len(tasks.queries.VERDICTS) == 10_000
        and 10_499 in tasks.queries.VERDICTS
        and 0 not in tasks.queries.VERDICTS
    )
