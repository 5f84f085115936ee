"""lib/run.py: the run directory. R numbers: docs/requirements.md."""
import io
import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

import lib.run
from lib.args import InputError
from lib.files import read_jsonl
from lib.optim import adamw, clip_and_step
from lib.run import Diverged, Run
from model import PRESETS, Qwen2

ROOT = Path(__file__).resolve().parents[1]
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass
class Args:
    out: str = "runs/x"      # where to
    tokens: int = 10         # how many: "3e6" works
    lr: float = 1e-3         # peak
    doc_mask: bool = False   # documents apart
    seed: int = 0            # of all
    init: str = ""           # from where
    resume: bool = False     # go on
    overwrite: bool = False  # replace


def small():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 3)
    return model, adamw(model, 0.1, 0.0)


def step(model, optimizer):
    model(torch.ones(1, 3)).square().sum().backward()
    clip_and_step(model, optimizer, 0.1, 1.0)


def log(run, n, **metrics):
    with tqdm(disable=True) as bar:
        run.log(n, 99, bar, **(metrics or {"loss": 1.0}))


class Saved:  # what save needs of a tokenizer
    def save_pretrained(self, path):
        pass


def begun(args):
    run = Run(args, "stage")
    run.start_or_resume()
    return run


def finish(run):
    model = Qwen2(PRESETS["micro"])
    run.save(model, Saved())
    run.finish(loss=1.0)


def test_a_run_does_not_replace_the_model_that_it_starts_from(tmp_path):
    for out in ("run", "other/../run"):
        with pytest.raises(InputError, match="is --init too"):
            Run(Args(out=str(tmp_path / out), init=str(tmp_path / "run"), overwrite=True), "test")
    with pytest.raises(InputError, match="is --init too"):
        Run(Args(out=str(tmp_path), init=str(tmp_path / "adapter"), overwrite=True), "test")
    Run(Args(out=str(tmp_path), init=str(tmp_path / "other"), overwrite=True), "test")


def test_a_finished_run_is_not_overwritten(tmp_path):
    args = Args(out=str(tmp_path / "run"), seed=7)
    finish(begun(args))
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["finished"] and record["seed"] == 7 and record["result"] == {"loss": 1.0}
    assert record["args"]["out"] == args.out and record["torch"] == torch.__version__
    with pytest.raises(InputError, match="holds a finished run: pass --overwrite or another"):
        Run(args, "stage")
    with pytest.raises(InputError, match="nothing to resume"):
        Run(Args(out=args.out, seed=7, resume=True), "stage")
    run = Run(Args(out=args.out, overwrite=True), "stage")
    assert json.loads((run.path / "run.json").read_text())["finished"]  # nothing is lost yet
    (run.path / "adapter").mkdir()
    (run.path / "model.safetensors.index.json").write_text("{}")
    run.start_or_resume()
    assert not json.loads((tmp_path / "run" / "run.json").read_text())["finished"]
    # Until the new model is there, --init must not load the old one.
    left = {file.name for file in run.path.iterdir()}
    assert left == {"run.json", "log.jsonl", "state"}


def test_a_model_from_elsewhere_is_not_removed(tmp_path):
    (tmp_path / "model.safetensors").write_text("precious")
    begun(Args(out=str(tmp_path)))
    assert (tmp_path / "model.safetensors").read_text() == "precious"


def interrupted(path, saves=1):
    run, (model, optimizer) = begun(Args(out=str(path))), small()
    for n in range(1, 4):
        step(model, optimizer)
        log(run, n)
        if n <= saves:
            run.save_state(n, model, optimizer)
    return run


def test_an_interrupted_run_is_resumed_only_with_its_own_arguments(tmp_path):
    """R4.4: a changed config is refused with a diff; log lines after the state are dropped."""
    interrupted(tmp_path / "run", saves=2)
    out = str(tmp_path / "run")
    with pytest.raises(InputError, match=r"an interrupted run.*--resume to continue"):
        Run(Args(out=out), "stage")
    with pytest.raises(InputError, match=r"other arguments: tokens 10 -> 11, lr 0.001 -> 0.5$"):
        Run(Args(out=out, resume=True, tokens=11, lr=0.5), "stage")
    run, (model, optimizer) = Run(Args(out=out, resume=True), "stage"), small()
    assert run.start_or_resume(model, optimizer) == 2
    rows = [row["step"] for _, row in read_jsonl(tmp_path / "run" / "log.jsonl")]
    assert rows == [1, 2]
    other, other_optimizer = small()
    for _ in range(3):
        step(other, other_optimizer)
    step(model, optimizer)
    assert torch.equal(model.weight, other.weight)


def test_a_run_that_saved_nothing_is_resumed_from_the_start(tmp_path):
    interrupted(tmp_path / "run", saves=0)
    with pytest.raises(InputError, match="--resume to continue it.*--overwrite"):
        Run(Args(out=str(tmp_path / "run")), "stage")
    run = Run(Args(out=str(tmp_path / "run"), resume=True), "stage")
    assert run.start_or_resume(*small()) == 0 and not run.log_file.read_text()


def test_a_run_refused_before_its_first_step_does_not_block_the_next(tmp_path):
    """Correcting a bad flag and running again needs no --overwrite."""
    begun(Args(out=str(tmp_path / "run"), tokens=1))
    begun(Args(out=str(tmp_path / "run"), tokens=2))


def test_a_save_killed_half_way_leaves_the_state_before(tmp_path, monkeypatch):
    """R4.4; and the torn file does not stop `finish`."""
    run, (model, optimizer) = interrupted(tmp_path / "run"), small()

    def torn(state, file):
        file.write(b"half")
        raise KeyboardInterrupt
    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(KeyboardInterrupt):
        run.save_state(3, model, optimizer)
    monkeypatch.undo()
    run = Run(Args(out=str(tmp_path / "run"), resume=True), "stage")
    assert run.start_or_resume(*small()) == 1
    finish(run)
    assert not (tmp_path / "run" / "state").exists()


def test_a_moved_run_goes_on(tmp_path):
    interrupted(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "moved")
    run = Run(Args(out=f"{tmp_path / 'moved'}/", resume=True), "stage")
    assert run.start_or_resume(*small()) == 1
    finish(run)


@pytest.mark.parametrize("error", [
    OSError(5, "Input/output error"), MemoryError("no room"), torch.OutOfMemoryError("no room"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory, no room")])
def test_a_state_that_may_be_whole_is_not_to_be_deleted(error, tmp_path, monkeypatch):
    interrupted(tmp_path / "run")

    def failing(*args, **kwargs):
        raise error
    monkeypatch.setattr(torch, "load", failing)
    run = Run(Args(out=str(tmp_path / "run"), resume=True), "stage")
    with pytest.raises(InputError, match="cannot be loaded .*(no room|Input/output)") as told:
        run.start_or_resume(*small())
    assert "delete" not in str(told.value)


def test_the_log_keeps_small_numbers(tmp_path):
    """A learning rate of 7e-7 is not 1e-6, nor 0."""
    run = begun(Args(out=str(tmp_path / "run")))
    log(run, 1, lr=7e-7, loss=7.6246189, tokens=4096, expert=[0.5])
    (_, row), = read_jsonl(tmp_path / "run" / "log.jsonl")
    assert row == {"step": 1, "lr": 7e-7, "loss": pytest.approx(7.6246189, rel=1e-6),
                   "tokens": 4096, "expert": [0.5]}


HOLDER = """
import sys, time
from tests.test_run import Args, begun, finish
run = begun(Args(out=sys.argv[1]))
print("begun", flush=True)
if sys.stdin.readline() == "finish\\n":
    finish(run)
print("done", flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that writes to tmp_path/run."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path / "run"], text=True,
                               cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == "begun\n"
    yield process
    process.kill()
    process.wait()


def test_a_directory_has_one_run_at_a_time(tmp_path, holder):
    """Whatever the flags: the second process is refused, and told who writes there. A killed
    process, as by a batch system, leaves nothing that stands in the way of the next."""
    path = tmp_path / "run"
    before = {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()}
    for flags in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(InputError, match=f"run is in use: process {holder.pid} on "):
            Run(Args(out=str(path), **flags), "stage")
    assert before == {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()}
    holder.kill()
    holder.wait()
    begun(Args(out=str(path)))


def test_a_run_that_another_process_made_meanwhile_is_not_replaced(tmp_path, holder):
    """Both found the directory free. The other one finished while this one read its data."""
    run = Run(Args(out=str(tmp_path / "free")), "stage")
    (tmp_path / "run").rename(tmp_path / "free")
    with pytest.raises(InputError, match=f"in use: process {holder.pid}"):
        run.start_or_resume()
    run.lock_file = None
    (tmp_path / "free").rename(tmp_path / "run")
    holder.stdin.write("finish\n")
    holder.stdin.flush()
    assert holder.stdout.readline() and holder.stdout.readline() == "done\n"
    (tmp_path / "run").rename(tmp_path / "free")
    with pytest.raises(InputError, match="holds a finished run"):
        run.start_or_resume()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_signals_end_the_run_after_a_saved_step(name, tmp_path):
    """Ctrl-C, a batch system's SIGTERM, and the SIGHUP of a closed terminal."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # even if the tests run under nohup
        run = Run(Args(out=str(tmp_path / "run")), "stage")
        run.start_or_resume(*small())
        os.kill(os.getpid(), getattr(signal, name))
        with pytest.raises(KeyboardInterrupt):
            log(run, 1)
        assert torch.load(run.state_file, weights_only=True)["step"] == 1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_finished_run_takes_no_signals(tmp_path):
    """A sweep goes on after each of its runs: Ctrl-C then ends it, not a run that is over."""
    run = Run(Args(out=str(tmp_path / "run")), "stage")
    run.start_or_resume(*small())
    finish(run)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_a_diverged_run_takes_no_signals(tmp_path):
    """A sweep notes such a run without a loss and goes on."""
    run = Run(Args(out=str(tmp_path / "run")), "stage")
    run.start_or_resume(*small())
    bar = tqdm(disable=True)
    with pytest.raises(Diverged):
        for step in range(1, 6):
            run.log(step, 9, bar, grad_norm=math.nan)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_nohup_stays_in_force(tmp_path):
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        run = Run(Args(out=str(tmp_path / "run")), "stage")
        run.start_or_resume(*small())
        os.kill(os.getpid(), signal.SIGHUP)
        log(run, 1)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_the_command_can_be_pasted_into_a_shell(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/x/sft.py", "--system", "Be brief; be kind."])
    begun(Args(out=str(tmp_path / "run")))
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["command"] == "sft.py --system 'Be brief; be kind.'"


def test_what_is_built_sees_the_users_modules(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("import sys, lib.run\nopen(sys.argv[1], 'w').close()")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    lib.run.build_once(tmp_path / "made", "mine", tmp_path / "made")
    assert (tmp_path / "made").exists()


def test_a_full_disk_under_the_lock_is_one_line(tmp_path, monkeypatch):
    class Full(io.StringIO):
        def fileno(self):
            return os.open(tmp_path / "lock", os.O_CREAT)

        def flush(self):
            raise OSError(28, "No space left on device")
    monkeypatch.setattr(lib.run, "open", lambda *args, **kwargs: Full(), raising=False)
    with pytest.raises(InputError, match="cannot be written .No space left"):
        begun(Args(out=str(tmp_path / "run")))


def test_a_system_without_vmhwm_has_no_peak(monkeypatch):
    monkeypatch.setattr(Path, "exists", lambda self: True)
    monkeypatch.setattr(Path, "read_text", lambda self: "Name: x\n")
    assert lib.run.peak_rss_mb() == 0.0


def test_git_is_not_needed(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    begun(Args(out=str(tmp_path / "run")))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["git"] == ""


def test_an_out_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="--out .*file"):
        Run(Args(out=str(tmp_path / "file" / "run")), "stage")


@pytest.mark.skipif(sys.platform != "linux", reason="macOS does not inherit it")
def test_peak_memory_is_not_that_of_the_program_that_started_this_one():
    ballast = b"x" * 600_000_000
    out = subprocess.run([sys.executable, "-c", "import lib.run; print(lib.run.peak_rss_mb())"],
                         cwd=ROOT,
                         capture_output=True, text=True, check=True).stdout
    assert 10 < float(out) < lib.run.peak_rss_mb() - len(ballast) / 2e6
