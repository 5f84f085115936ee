"""What goes wrong outside the program: kills, disks, torn and planted files; and inside it: numbers
that are not finite. R numbers: docs/requirements.md. `make test-faults` prints how many kills were
survived."""
import contextlib
import ast
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import (
    interrupt_at, letter_queries, log, no_samples, refuses, stage_args, teach_letters, weights,
    write_rows)

import lib.args
from lib import optim
import lib.run
import dpo
import grpo
import pretrain
import reward
import sft
from lib.args import InputError
from lib.upcycle import upcycle
import tasks.queries
from model import MLP, PRESETS
from reward import RewardModel
from sample import load_policy

resource = pytest.importorskip("resource", reason="limits of Unix")
ROOT = Path(__file__).resolve().parents[2]
STAGES = {"pretrain": pretrain, "pretrain-moe": pretrain, "sft": sft, "dpo": dpo, "reward": reward,
          "grpo": grpo}
MOE = {"sft-moe": sft, "dpo-moe": dpo, "reward-moe": reward, "grpo-moe": grpo}  # from an MoE
KILLS = 20  # a stage


@pytest.fixture(scope="session")
def inputs(texts, tokenizer, tmp_path_factory):
    """Arguments of a run of six steps with a state every second, for each stage."""
    path = tmp_path_factory.mktemp("inputs")
    policy = str(teach_letters(tokenizer, path / "policy"))
    base = path / "base"
    model, _ = load_policy(policy, "cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.9)
    model.save_pretrained(base)
    scorer = RewardModel.from_language_model(load_policy(policy, "cpu")[0], tokenizer)
    torch.nn.init.normal_(scorer.head.weight, generator=optim.rng(1))
    scorer.save_pretrained(path / "scorer")
    tokenizer.save_pretrained(path / "scorer")
    docs = write_rows(path / "docs.jsonl", [{"text": text} for text in texts])
    chats = write_rows(path / "chats.jsonl", [{"messages": [
        {"role": "user", "content": f"Say {i} " + "again and " * (i % 4)},
        {"role": "assistant", "content": f"{i}, " * (1 + i % 5) + "done."}]} for i in range(10)])
    pairs = write_rows(path / "pairs.jsonl", [
        {"prompt": f"Is {i} even?", "chosen": "yes, " * (i % 3) + "yes", "rejected": "no"}
        for i in range(10)])
    common_args = {"device": "cpu", "dtype": "float32", "save_every": 2, "warmup": 1, "seed": 3}
    pretraining = common_args | {
        "data": docs, "tokenizer": policy, "model": "micro", "tokens": 6 * 4 * 33 + 20,
        "seq_len": 32, "batch_tokens": 4 * 32, "micro_batch": 3, "eval_every": 3}
    pairwise = common_args | {"init": policy, "batch_size": 4, "micro_batch": 3, "epochs": 2.4}
    dense = {
        "pretrain": pretraining, "pretrain-moe": pretraining | {"model": "micro-moe"},
        "sft": pairwise | {"data": chats},
        "dpo": pairwise | {"data": pairs, "base": str(base), "merge_alpha": 1e-3,
                           "max_new_tokens": 8, "allow_unsafe_code": True},
        "reward": pairwise | {"pairs": pairs, "queries": "none", "max_new_tokens": 8},
        "grpo": common_args | {
            "init": policy, "reward_model": str(path / "scorer"), "steps": 6, "batch_queries": 2,
            "max_new_tokens": 8, "kl": 0.01, "lr": 1e-3, "inner_steps": 2, "micro_batch": 5,
            "queries": letter_queries(path / "queries.jsonl")}}
    experts = upcycle(load_policy(policy, "cpu")[0], PRESETS["micro-moe"], seed=0)
    experts.save_pretrained(path / "experts")
    tokenizer.save_pretrained(path / "experts")
    start = {"init": str(path / "experts")}
    return dense | {name: dense[name[:-4]] | start | ({"base": ""} if name == "dpo-moe" else {})
                    for name in MOE}


def in_forks(stage, inputs, work, kills, seed=0) -> dict:
    """tests/robustness/faults.py in a process of its own."""
    job = {"stage": (STAGES | MOE)[stage].__name__, "args": inputs[stage], "work": str(work),
           "kills": kills, "seed": seed}
    (work / "job.json").write_text(json.dumps(job))
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "robustness" / "faults.py", work / "job.json"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def outcome(folder: Path) -> dict:
    """All that a run left, without what is timed or says where it lies; the batches of each step,
    which must be the same in each process that came to it."""
    run, found = folder / "run", {}
    for file in sorted(run.rglob("*")):
        if file.is_file() and file.name not in ("run.json", "log.jsonl", "state.pt", "lock"):
            found[str(file.relative_to(run))] = file.read_bytes()
    found["log"] = [{k: v for k, v in row.items() if k != "tokens_per_s"} for row in log(run)]
    record = json.loads((run / "run.json").read_text())
    found["result"] = [record[k] for k in ("finished", "result", "skipped_steps", "stage")]
    batches = {}
    for line in (folder / "order").read_text().splitlines():
        step, batch = json.loads(line)
        assert batches.setdefault(step, batch) == batch
    return found | {"batches": batches}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="os.fork and /proc of Linux")
@pytest.mark.parametrize("stage", STAGES | MOE)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(stage, inputs, tmp_path, survived):
    """R4.4: killed by SIGKILL anywhere, continued by --resume: every file, every log line and each
    batch are those of the run that was left alone."""
    done = in_forks(stage, inputs, tmp_path, KILLS, seed=list(STAGES | MOE).index(stage))
    assert done["told"][0] == ["finished"]
    whole = outcome(tmp_path / "whole")
    assert [row["step"] for row in whole["log"]] == [1, 2, 3, 4, 5, 6] == sorted(whole["batches"])
    assert "model.safetensors" in whole and not any("state" in name for name in whole)
    for i, told in enumerate(done["told"][1:]):
        where = [k if isinstance(k, dict) else done["moments"][k - 1] for k in done["kills"][i]]
        assert told[-1] in ("finished", "was finished"), (where, told)
        got = outcome(tmp_path / f"kill{i}")
        assert got.keys() == whole.keys() and all(got[k] == whole[k] for k in whole), (where, told)
        for place, moment in zip(where, told, strict=False):
            if moment == "killed":
                kind = place_of(place, done["kills"][i], done["moments"])
                survived[stage].update(["kills", kind])


def place_of(moment, kill, moments) -> str:
    """A column of the table."""
    if isinstance(moment, dict):
        return "clock"
    if moment in ("forward", "step", "log"):
        return moment
    last = max(i for i, label in enumerate(moments) if label == "log")
    return "state" if "state.pt" in moment else "finish" if kill[0] > last else "other files"


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="os.fork and /proc of Linux")
def test_no_stage_needs_the_network(inputs, tmp_path):
    """R4, point 6: every connection, look-up and server raises. All stages, in one process."""
    for stage in STAGES:
        (tmp_path / stage).mkdir()
        assert in_forks(stage, inputs, tmp_path / stage, 0)["told"] == [["finished"]]


# ---------------------------------------------------------------------------------------------
# disks and torn files, on the SFT stage: what writes is in common.py and the same in all

@pytest.fixture
def tune(inputs, tmp_path, monkeypatch):
    """tune(name, ...) runs six steps of SFT in tmp_path/name."""
    no_samples(monkeypatch, sft)

    def tune(name, **values):
        args = inputs["sft"] | {"out": str(tmp_path / name), "lr": 5e-4} | values
        return sft.main(stage_args(sft, **args))
    return tune


@pytest.fixture
def stopped(tune, tmp_path, monkeypatch):
    """The same run left alone in `whole`; and stopped in its fourth step in `run`: three log lines
    and the state of step 2. Gives the path of `run`."""
    tune("whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, sft, 4)
        tune("run")
    return tmp_path / "run"


@contextlib.contextmanager
def file_limit(n):
    """No file can grow beyond n bytes, as on a disk that is full. The kernel refuses the write
    half-way, whether Python, torch or safetensors makes it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def same(a, b) -> None:
    """Two finished runs: files and logs, but for times."""
    assert log(a) == log(b)
    for file in a.iterdir():
        if file.name not in ("run.json", "log.jsonl"):
            assert file.read_bytes() == (b / file.name).read_bytes(), file.name
    assert {f.name for f in a.iterdir()} == {f.name for f in b.iterdir()}


@pytest.mark.parametrize("where, limit", [
    ("state.pt", "half the state"), ("model.safetensors", "half the model"),
    ("log.jsonl", "half a line"), ("run.json", "a few bytes")])
def test_a_full_disk_is_one_line_and_costs_nothing(where, limit, tune, stopped):
    """R4.4: the files that were there are as before, nothing half-written stays, and when there is
    room again the run goes on to the same end."""
    state = stopped / "state" / "state.pt"
    before, size = state.read_bytes(), state.stat().st_size
    limit = {"half the state": size // 2, "half the model": size // 9,
             "half a line": len("".join((stopped / "log.jsonl").open().readlines()[:2])) + 20,
             "a few bytes": 300}[limit]
    name, resume = "run", {"resume": True}
    if where == "model.safetensors":  # smaller than a state: this run saves none
        name, resume = "run2", {"save_every": 99}
    if where == "run.json":
        name, resume = "run2", {}
    out = stopped.parent / name
    # pytest captures what is printed in a file, which must not meet the limit first.
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), file_limit(limit):
        message = refuses(lambda: tune(name, **resume), str(out), where, "cannot be written")
    assert "File too large" in message
    assert state.read_bytes() == before and not list(out.rglob("*.tmp"))
    tune(name, **resume | {"resume": where != "run.json"})
    same(stopped.parent / "whole", out)


def test_a_real_full_disk(tune, stopped, tmp_path):
    """The same on a file system of 2 MB, where the first state fits and the next to it does not."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    try:
        refuses(lambda: tune("disk/run"), "state.pt", "No space left on device")
        assert torch.load(disk / "run" / "state" / "state.pt", weights_only=True)["step"] == 2
        subprocess.run([*mount[:4], "remount,size=9m", *mount[5:]], check=True)
        tune("disk/run", resume=True)
        same(tmp_path / "whole", disk / "run")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("call, error", [
    ("fsync", OSError(28, "No space left on device")),
    ("replace", OSError(30, "Read-only file system"))])
def test_each_file_that_cannot_be_written_leaves_no_old_model(call, error, tune, stopped,
                                                              monkeypatch):
    """--overwrite of a finished run, failing at the first file written, the second, and so on:
    afterwards the directory holds no model, or the whole new one with its tokenizer."""
    tune("again", lr=0.1)
    old, path = weights(stopped.parent / "again"), stopped.parent / "again"
    real, count, loaded = getattr(os, call), 0, 0
    while True:
        calls, count = [], count + 1

        def failing(*args, calls=calls, count=count):
            calls.append(args)
            if len(calls) == count:
                raise error
            return real(*args)
        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing)
            try:
                tune("again", overwrite=True)
                break
            except InputError as told:
                assert error.strerror in str(told) and "\n" not in str(told)
        assert not list(path.rglob("*.tmp"))
        if not (path / "config.json").exists():
            refuses(lambda: load_policy(path, "cpu"), "no config.json")
            continue
        load_policy(path, "cpu")
        loaded += 1
        new = weights(path)
        assert len([n for n in old if not torch.equal(old[n], new[n])]) > 9
    assert count > 9 and loaded
    same(stopped.parent / "whole", path)


@pytest.mark.parametrize("name", ["no/such", "run"])
def test_a_directory_that_cannot_be_written_to(name, tune, tmp_path):
    """Refused in one line before or at the first file."""
    out = Path("/proc/self") / name
    if out.parents[2].is_dir() and os.name == "posix" and Path("/proc/self").exists():
        refuses(lambda: tune("x", out=str(out)), "--out", str(out))
    if os.getuid():
        locked = tmp_path / "locked"
        locked.mkdir(mode=0o555)
        refuses(lambda: tune("x", out=str(locked / name)), "--out", "cannot be written to" if
                name == "run" else "locked")


def test_a_full_disk_ends_the_command_with_code_2(inputs, tmp_path):
    """As a user sees it: one line on stderr, no traceback."""
    argv = [arg for k, v in (inputs["sft"] | {"out": tmp_path / "run"}).items()
            for arg in (f"--{k}", str(v))]
    done = subprocess.run(
        [sys.executable, ROOT / "sft.py", *argv], capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)))
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if "error" in line]
    assert "Traceback" not in done.stderr and len(errors) == 1
    assert errors[0].startswith(f"error: {tmp_path / 'run'}/state/state.pt: cannot be written (")


class Evil:
    """Unpickling it writes a file."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def spoil(state: Path, kind: str, marker: Path) -> None:
    whole = state.read_bytes()
    if kind == "evil":
        return torch.save({"step": 2, "seconds": 0.0, "model": Evil(marker)}, state)
    if kind == "other":
        return torch.save({"step": 2, "seconds": 0.0, "model": {"w": torch.ones(2)}}, state)
    state.write_bytes({"empty": b"", "one byte": whole[:1], "half": whole[:len(whole) // 2],
                       "all but the end": whole[:-20], "zeros": bytes(len(whole)),
                       "garbage": bytes(range(256)) * 9, "text": b"step 2\n", "bare pickle":
                       pickle.dumps(Evil(marker))}[kind])


@pytest.mark.parametrize("kind", ["empty", "one byte", "half", "all but the end", "zeros",
                                  "garbage", "text", "other", "evil", "bare pickle"])
def test_a_torn_or_planted_state(kind, tune, stopped, tmp_path):
    """The file is named, and what to do; nothing in it is run; the log is as it was."""
    state, before = stopped / "state" / "state.pt", (stopped / "log.jsonl").read_bytes()
    spoil(state, kind, tmp_path / "marker")
    refuses(lambda: tune("run", resume=True), str(state), "not a whole state", "delete it")
    assert not (tmp_path / "marker").exists() and (stopped / "log.jsonl").read_bytes() == before
    state.unlink()
    tune("run", resume=True)  # as the message says
    same(tmp_path / "whole", stopped)


@pytest.mark.parametrize("tail", ['{"step": 4, "loss": 0.', "\0\0\0\0", "\n\n[]\n"])
def test_a_torn_log_does_not_stop_a_resume(tail, tune, stopped, tmp_path):
    """What stands after the state's last step is not even read."""
    with open(stopped / "log.jsonl", "a") as file:
        file.write(tail)
    tune("run", resume=True)
    same(tmp_path / "whole", stopped)


def test_what_is_said_of_a_run_that_saved_nothing_or_everything(tune, stopped, monkeypatch):
    """Killed before its first state: from step 0. After its model: from the last state. Finished,
    or never begun: one line."""
    path = stopped.parent
    refuses(lambda: tune("none", resume=True), "nothing to resume", "no run.json")
    for name, args in (("early", {"save_every": 99}), ("late", {})):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            if name == "early":
                interrupt_at(patch, sft, 4)
            else:
                patch.setattr(lib.run.Run, "write_record", late(lib.run.Run.write_record))
            tune(name, **args)
        assert (path / name / "model.safetensors").exists() == (name == "late")
        refuses(lambda name=name, args=args: tune(name, **args), "interrupted", "--resume")
        tune(name, resume=True, **args)
        same(path / "whole", path / name)
        refuses(lambda name=name, args=args: tune(name, resume=True, **args), "it is finished")


def late(real):
    def write_record(run, result):
        if result["finished"]:
            raise KeyboardInterrupt
        real(run, result)
    return write_record


# ---------------------------------------------------------------------------------------------
# loading is safe

def test_planted_files_in_a_model_directory_are_not_loaded(inputs, tmp_path):
    """No pickle and no code of a model directory is ever touched, by any name that transformers or
    torch would load; and where only a pickle holds the weights, that is one line."""
    path, marker = tmp_path / "planted", tmp_path / "marker"
    shutil.copytree(inputs["sft"]["init"], path)
    bomb, code = pickle.dumps(Evil(marker)), f"import os\nos.mkdir({str(marker)!r})\n"
    for name in ("pytorch_model.bin", "pytorch_model-00001-of-00001.bin", "model.pt", "model.pth",
                 "model.ckpt", "consolidated.00.pth", "training_args.bin", "optimizer.pt",
                 "scheduler.pt", "rng_state.pth", "tokenizer.pkl", "tokenizer.model", "data.pkl"):
        (path / name).write_bytes(bomb)
    for name in ("modeling_qwen2.py", "tokenization_qwen2.py", "configuration_qwen2.py",
                 "__init__.py", "sitecustomize.py", "conftest.py"):
        (path / name).write_text(code)
    (path / "pytorch_model.bin.index.json").write_text(json.dumps(
        {"weight_map": {"model.norm.weight": "pytorch_model.bin"}}))
    config = json.loads((path / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_qwen2.Qwen2",
                          "AutoConfig": "configuration_qwen2.Config"}
    (path / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer_config.json", "tokenizer.json"):
        fields = json.loads((path / name).read_text())
        fields["auto_map"] = {"AutoTokenizer": ["tokenization_qwen2.Tokenizer", None]}
        (path / name).write_text(json.dumps(fields))
    model, _ = load_policy(path, "cpu")
    want = weights(inputs["sft"]["init"])
    assert all(torch.equal(p, want[name]) for name, p in model.named_parameters())
    (path / "model.safetensors").rename(tmp_path / "elsewhere")
    refuses(lambda: load_policy(path, "cpu"), "no model.safetensors")
    for planted in (bomb, b"", b"PK\x03\x04" + bomb):
        (path / "model.safetensors").write_bytes(planted)
        refuses(lambda: load_policy(path, "cpu"), "not a safetensors file")
    (tmp_path / "elsewhere").rename(path / "model.safetensors")
    for name in ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json",
                 "config.json"):
        kept = (path / name).read_bytes()
        (path / name).write_bytes(bomb)
        refuses(lambda: load_policy(path, "cpu"), name)
        (path / name).write_bytes(kept)
    assert not marker.exists()
    pickle.loads(bomb)  # the bomb works
    assert marker.exists()


# ---------------------------------------------------------------------------------------------
# numbers that are not finite

@pytest.fixture
def poison(monkeypatch):
    """poison(stage, steps): in these steps (from 1) the MLP of layer 1 gives nan in training, or
    with gradient=True gives what it should and sends nan back."""
    handles = []

    def poison(stage, steps, gradient=False):
        step, mlps, real = [1], [], stage.clip_and_step

        def hook(module, inputs, output):
            if not isinstance(module, MLP) or not torch.is_grad_enabled():
                return None
            if module not in mlps:
                mlps.append(module)
            if step[0] not in steps or mlps.index(module) != 1:
                return None
            if gradient:
                output.register_hook(lambda g: g * math.nan)
                return None
            return output * math.nan

        def clip_and_step(*args):
            norm = real(*args)
            step[0] += 1
            return norm
        monkeypatch.setattr(stage, "clip_and_step", clip_and_step)
        while handles:
            handles.pop().remove()
        handles.append(torch.nn.modules.module.register_module_forward_hook(hook))
    yield poison
    for handle in handles:
        handle.remove()


@pytest.fixture
def short(inputs, tmp_path, monkeypatch):
    """short(stage, ...) runs a stage, with a short look at samples, in tmp_path/run."""
    real = tasks.queries.builtin
    monkeypatch.setattr(tasks.queries, "builtin", lambda split, n, seed=0: real(split, 1, seed))

    def short(stage, **values):
        args = inputs[stage] | {"out": str(tmp_path / "run")} | values
        return STAGES[stage].main(stage_args(STAGES[stage], **args))
    return short


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_a_step_that_is_not_finite_is_skipped_counted_and_recorded(stage, gradient, short, tmp_path,
                                                                   poison):
    """R4.5: its row tells the batch; no other row is touched by it, and JSON has null where nan
    was. The steps after it go on from finite weights."""
    poison(STAGES[stage], (2, 4, 5), gradient)
    short(stage, **{"inner_steps": 1} if stage == "grpo" else {})
    rows = log(tmp_path / "run")
    assert [row.get("skipped") for row in rows] == [None, 1, None, 1, 2, None]
    for row in rows:
        bad = row["step"] in (2, 4, 5)
        assert (row["grad_norm"] is None) == bad
        assert (row["loss"] is None) == (bad and not gradient)
        assert ("batch" in row) == bad
        if bad:
            assert len(row["batch"]) == (2 if stage == "grpo" else 4)
    text = "".join((tmp_path / "run" / f).read_text() for f in ("log.jsonl", "run.json"))
    assert "NaN" not in text and "Infinity" not in text
    assert json.loads((tmp_path / "run" / "run.json").read_text())["skipped_steps"] == 3
    assert all(w.isfinite().all() for w in weights(tmp_path / "run").values())


@pytest.mark.parametrize("stage", STAGES)
def test_five_such_steps_in_a_row_end_the_run(stage, short, tmp_path, poison):
    """R4.5: one line that names the log with the batches, also where the run was continued between
    them; the state from before is there."""
    poison(STAGES[stage], range(2, 7))
    one = {"inner_steps": 1} if stage == "grpo" else {}
    message = refuses(lambda: short(stage, **one), "step 6", "5 times in a row", "log.jsonl")
    state = torch.load(tmp_path / "run" / "state" / "state.pt", weights_only=True)
    assert state["step"] == 4 and all(w.isfinite().all() for w in state["model"].values())
    before = log(tmp_path / "run")
    poison(STAGES[stage], range(0, 7))
    assert refuses(lambda: short(stage, resume=True, **one)) == message
    assert [{k: v for k, v in row.items() if k != "tokens_per_s"} for row in before] == [
        {k: v for k, v in row.items() if k != "tokens_per_s"} for row in log(tmp_path / "run")]


# ---------------------------------------------------------------------------------------------
# the other numbers that every stage must get right

@pytest.mark.parametrize("stage", [s for s in STAGES if s != "pretrain-moe"])
def test_the_split_into_micro_batches_changes_no_step(stage, short, tmp_path):
    """R4.1: the loss is over the whole step's tokens, answers or pairs: the first step's loss and
    gradient norm are those of one micro-batch, whether it is cut into 1s, or into 3s and a rest."""
    one = {"grpo": {"steps": 1, "inner_steps": 1}, "pretrain": {"tokens": 4 * 33 + 20}}
    rows = []
    for micro_batch in (64, 3, 1):
        short(stage, micro_batch=micro_batch, overwrite=True,
              **one.get(stage, {"epochs": 0.4}))
        (row,) = log(tmp_path / "run")
        rows.append(row)
    for row in rows[1:]:
        assert row["grad_norm"] == pytest.approx(rows[0]["grad_norm"], rel=1e-4)
        assert row["loss"] == pytest.approx(rows[0]["loss"], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_bfloat16_is_autocast_over_float32_weights(stage, inputs, short, tmp_path):
    """R4.6: at a learning rate of 1e-6 the weights of every layer move; in bfloat16 they would be
    rounded back."""
    start = {} if stage.startswith("pretrain") else {"base": ""} if stage == "dpo" else {}
    init = inputs[stage].get("init", "")
    if not init:  # pre-training starts from scratch: after one step, from what that saved
        short(stage, lr=1e-50, tokens=4 * 33 + 20, overwrite=True)
        shutil.copytree(tmp_path / "run", init := tmp_path / "start")
        start = {"init": str(init), "tokenizer": ""}
    short(stage, dtype="bfloat16", lr=1e-6, overwrite=True, **start)
    before, after = weights(init), weights(tmp_path / "run")
    assert {w.dtype for w in after.values()} == {torch.float32}
    moved = {name: (w != before[name]).float().mean().item() for name, w in after.items()
             if name in before and w.ndim == 2 and w.numel() and "embed" not in name}
    assert min(moved.values()) > 0.9 and sum(moved.values()) / len(moved) > 0.99, moved


@pytest.mark.parametrize("stage", [s for s in STAGES if s != "pretrain-moe"])
def test_micro_batches_of_1_2_and_all_give_the_same_weights(stage, inputs, short, tmp_path,
                                                            monkeypatch):
    """R4.1: the divisor is the whole step's count of supervised tokens, answers or pairs, whatever
    the cut. By plain gradient descent in steps of 1, as Adam's first step is the sign of a gradient
    and would make a difference of 1e-9 one of the learning rate."""
    def descent(model, *args, **kwargs):
        return torch.optim.SGD(model.parameters(), 1.0)
    for module in (pretrain, sft, reward, grpo, dpo):
        if hasattr(module, "adamw"):
            monkeypatch.setattr(module, "adamw", descent)
    monkeypatch.setattr(torch.optim, "AdamW", lambda params, *args, **kwargs: torch.optim.SGD(
        params, 1.0))
    one = {"grpo": {"steps": 1, "inner_steps": 1}, "pretrain": {"tokens": 4 * 33 + 20},
           "dpo": {"epochs": 0.4, "base": ""}}
    runs = []
    for micro_batch in (64, 2, 1):
        short(stage, micro_batch=micro_batch, overwrite=True, warmup=0, lr=1.0,
              **one.get(stage, {"epochs": 0.4}))
        (row,) = log(tmp_path / "run")
        runs.append((row["loss"], weights(tmp_path / "run")))
    start = weights(inputs[stage]["init"]) if "init" in inputs[stage] else {}
    (loss, all_at_once), *others = runs
    moved = [(w - start.get(name, torch.zeros(()))).abs().max() for name, w in all_at_once.items()]
    assert max(moved) > 1e-3
    for other_loss, w in others:
        assert other_loss == pytest.approx(loss, rel=1e-6, abs=1e-6)
        for name in w:
            torch.testing.assert_close(w[name], all_at_once[name], atol=1e-6, rtol=0)


@pytest.mark.slow
def test_a_compiled_run_compiles_nothing_after_its_first_steps(inputs, short, monkeypatch):
    """R4.8: all six steps, held-out losses and the ragged micro-batch included."""
    import torch._dynamo.utils as dynamo
    graphs, real = [], pretrain.clip_and_step

    def clip_and_step(*args):
        graphs.append(dynamo.counters["stats"]["unique_graphs"])
        return real(*args)
    monkeypatch.setattr(pretrain, "clip_and_step", clip_and_step)
    dynamo.counters.clear()
    try:
        short("pretrain", compile=True, attention="fused")
    finally:
        pretrain.kernels.set_default_impl()
    # The held-out losses after step 3 are of a single row here, a size that compiles once more.
    assert len(graphs) == 6 and 0 < graphs[1] == graphs[2]
    assert graphs[3] == dynamo.counters["stats"]["unique_graphs"] <= graphs[2] + 1


# ---------------------------------------------------------------------------------------------
# what the source must not hold

SOURCES = sorted(
    path
    for room in ("", "data/", "tasks/", "tasks/sandbox/", "lib/", "bench/", "recipes/")
    for path in ROOT.glob(f"{room}*.py")
)


def test_no_source_unpickles_or_runs_code_of_a_model():
    """Every torch.load says weights_only=True; nothing else that would run what it reads."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                given = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert given.get("weights_only") == "True", (path, node.lineno)
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = {alias.name for alias in node.names} | {getattr(node, "module", "")}
                assert not names & {"pickle", "dill", "joblib", "shelve", "cloudpickle"}
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert ast.unparse(node.value) == "False", (path, node.value.lineno)


def test_nothing_needs_what_macos_and_windows_lack(tmp_path):
    """Every module can be imported without fork, SIGALRM, SIGKILL, resource and fcntl, and a file
    with programs to check is refused in one line where they cannot run."""
    names = [p.stem for p in ROOT.glob("*.py")] + [
        f"{room}.{p.stem}" for room in ("data", "tasks", "lib") for p in ROOT.glob(f"{room}/*.py")
        if p.stem not in ("__init__", "__main__")]
    (tmp_path / "q.jsonl").write_text(json.dumps({"prompt": "p", "domain": "code", "check": {
        "kind": "code", "language": "python", "tests": "assert 1"}}))
    program = (
        "import os, sys, signal, torch, torch._dynamo\n"
        "for name in ('resource', 'fcntl'): sys.modules[name] = None\n"
        "for name in ('fork', 'killpg', 'setsid', 'waitid'): delattr(os, name)\n"
        "del signal.SIGALRM, signal.SIGKILL, signal.alarm, signal.setitimer\n"
        f"for name in {names}: __import__(name)\n"
        "import types, lib.args, lib.run, tasks.queries\n"
        "from tasks import sandbox\n"
        "sandbox.os = types.SimpleNamespace(name='nt')\n"
        "path, lib.run.Path = lib.run.Path, lambda name: path('nowhere')\n"
        "assert not lib.run.peak_rss_mb() > 0\n"
        "lib.run.Path = path\n"
        "try: tasks.queries.load(sys.argv[1])\n"
        "except lib.args.InputError as error: print(error)\n")
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "q.jsonl"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("a check in python: needs POSIX (Linux, macOS, WSL)")
