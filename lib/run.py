"""The run directory: what a stage writes to --out, and how an interrupted run continues.

There is no Trainer here. Each stage writes its own loop, and calls a Run to start or resume, to log
a step, to save a state, and to save the model and finish.

A stage draws its data order and its samples from generators that are seeded by (seed, step), see
lib/optim.py. A state is therefore weights, optimizer and step, and a resumed run equals an
uninterrupted one bit for bit on a CPU (tests/robustness/test_faults.py).
"""
import dataclasses
import json
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm

from lib.args import InputError, handle_stop_signals, require
from lib.checkpoint import save_adapter
from lib.dist import RANK, WORLD, all_gather, full_model, full_state, load_full_state
from lib.files import (
    atomic_path, disk_errors, json_safe, read_json, read_jsonl, write_atomic, write_jsonl)
from lib.lora import adapters

try:
    import fcntl
except ImportError:  # Windows: a run directory is not locked there
    fcntl = None

MAX_BAD_STEPS = 5  # so many in a row are no accident of one batch: the run stops


class Diverged(InputError):
    """Raised when loss or gradient were not finite for MAX_BAD_STEPS steps in a row."""


def build_once(path: str | Path, *command) -> None:
    """Make `path` with `python -m command...` unless it exists.

    The first process does it, the others wait. The command is printed, so that a reader can run and
    change it."""
    if RANK == 0 and not Path(path).exists():
        words = [str(word) for word in command]
        line = "python -m " + " ".join(words)
        print(f"$ {line}", flush=True)
        here = Path(__file__).resolve().parents[1]
        path_before = os.environ.get("PYTHONPATH")
        paths = [str(here), path_before] if path_before else [str(here)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        for name in ("RANK", "WORLD_SIZE"):  # torchrun's: the program must not join the group
            environment.pop(name, None)
        done = subprocess.run([sys.executable, "-m", *words], env=environment)
        require(done.returncode == 0, f"`{line}` failed, see above")
    all_gather(None)


def require_writable(out: Path) -> None:
    """Refuse an --out that cannot be written to, before a run computes what it would lose."""
    folder = out.absolute()
    while not folder.exists():
        folder = folder.parent
    require(folder.is_dir() and os.access(folder, os.W_OK),
            f"--out {out}: {folder} is not a directory that can be written to")


class Run:
    """The --out directory of a stage: run.json (arguments and result), log.jsonl (one object per
    step), samples.jsonl, the model, and state/ while training.

    A run that is killed at any moment continues with the same command and --resume: from its last
    state, or from step 0 if there is none. The last file to be written is the run.json that says
    "finished", so a run killed while it saves its model can be resumed too."""

    def __init__(self, args, stage: str):
        """Check --out, --resume and --overwrite. Nothing but state/lock is written yet, so
        a refusal loses nothing."""
        self.path = Path(args.out)
        self.log_file = self.path / "log.jsonl"
        self.state_file = self.path / "state" / "state.pt"
        self.lock_file = None
        self.stage = stage
        self.args = dataclasses.asdict(args)
        save_dtype = self.args.get("save_dtype", "")
        require(save_dtype in ("", "float32", "bfloat16", "float16"),
                f"--save_dtype must be float32, bfloat16 or float16, got {save_dtype!r}")
        self.started = time.perf_counter()
        self.previous_seconds = 0.0  # of the runs that this one resumes
        self.bad_steps = 0  # how many steps in a row were not finite, up to now
        self.skipped_steps = 0  # how many were not finite in all
        self.stopping = False
        init = self.args.get("init")
        replaced = (self.path.resolve(), (self.path / "adapter").resolve())
        require(not init or Path(init).resolve() not in replaced,
                f"--out {self.path} is --init too, which would be lost: choose another --out")
        require_writable(self.path)
        if self.state_file.parent.exists():  # a run is going on here, or was killed
            self.lock()
        self.check_record()

    def check_record(self) -> None:
        """Refuse to resume a run that is finished, never begun, or had other arguments; and to
        replace one that is finished, or has made at least one step."""
        record = read_json(self.path / "run.json", missing_ok=True)
        finished = record.get("finished")
        has_state = self.state_file.exists()
        self.resumed = self.args["resume"] and has_state
        if self.args["resume"]:
            reason = "it is finished" if finished else "it was not begun: no run.json"
            require(record and not finished, f"{self.path}: nothing to resume ({reason})")
            before = record.get("args")
            require(isinstance(before, dict), f"{self.path}/run.json: no args")
            changes = []
            for name, value in self.args.items():
                if name not in ("resume", "overwrite", "out") and before.get(name) != value:
                    changes.append(f"{name} {before.get(name)!r} -> {value!r}")
            shown = ", ".join(changes[:10])
            require(not changes, f"{self.path}: a resumed run takes the steps of an uninterrupted "
                    f"one, so --resume refuses other arguments: {shown}")
        elif record and not self.args["overwrite"]:
            has_steps = self.log_file.exists() and self.log_file.stat().st_size > 0
            what = "a finished run" if finished else "an interrupted run (--resume to continue it)"
            require(not finished and not has_steps and not has_state,
                    f"{self.path} holds {what}: pass --overwrite or another --out")

    def lock(self) -> None:
        """Keep other processes from writing to this directory until this one ends. InputError if
        another one holds the lock. However a process ends, the system gives its lock back, so
        state/lock may stay behind, and a batch system may kill a job and start it again."""
        if RANK > 0 or fcntl is None or self.lock_file is not None:
            return
        path = self.state_file.with_name("lock")
        this = f"process {os.getpid()} on {platform.node()}"
        with disk_errors(f"--out {self.path}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            self.lock_file = open(path, "a+", encoding="utf-8")
        try:
            fcntl.flock(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.lock_file.seek(0)
            other = self.lock_file.read() or "another process"
            require(other == this, f"--out {self.path} is in use: {other} writes to it; wait for "
                    "it, stop it, or choose another --out")
            return
        except OSError:  # a file system without locks, as some clusters have
            return
        with disk_errors(f"--out {self.path}"):
            self.lock_file.truncate(0)
            self.lock_file.write(this)
            self.lock_file.flush()

    def start_or_resume(self, model=None, optimizer=None) -> int:
        """Create the directory and return step 0. With --resume, load the last state, drop the log
        lines after it, and return its step."""
        self.model = model
        self.optimizer = optimizer
        self.lock()
        self.check_record()  # once more: another run may have begun and ended meanwhile
        step = 0
        if self.resumed:
            step = self.load_state()
            # Keep the log of the steps until then; the lines after them may be torn.
            rows = [row for _, row in islice(read_jsonl(self.log_file), step)]
            write_jsonl(self.log_file, rows)
            self.skipped_steps = sum("skipped" in row for row in rows)
            self.bad_steps = rows[-1].get("skipped", 0) if rows else 0
        else:
            self.clear()
            self.write_record({"finished": False})
        if self.args["resume"]:
            print(f"resumed {self.path} after step {step}")
        if optimizer is not None and WORLD == 1:
            handle_stop_signals(self.interrupt)
        return step

    def load_state(self) -> int:
        """Load state.pt into model and optimizer, and return its step."""
        try:
            # weights_only: a state is tensors and numbers; any other pickle could run any code.
            # Of several processes, each maps the file into memory and reads its own parts.
            state = torch.load(self.state_file, map_location="cpu", weights_only=True,
                               mmap=WORLD > 1)
            load_full_state(state, self.model, self.optimizer)
            self.previous_seconds = state["seconds"]
            return state["step"]
        except Exception as error:  # a torn or foreign file can raise almost anything
            no_room = "allocate memory" in str(error)  # torch on a CPU: a plain RuntimeError
            if no_room or isinstance(error, (OSError, MemoryError, torch.OutOfMemoryError)):
                raise InputError(f"{self.state_file}: cannot be loaded ({error})") from None
            raise InputError(f"{self.state_file}: not a whole state of this run "
                             f"({type(error).__name__}); delete it, and --resume starts again "
                             "from step 0") from None

    def clear(self) -> None:
        """Create the directory, and remove what belongs to an earlier run in it. If this run is
        killed, --init must not load the model of the earlier one."""
        if RANK > 0:
            return
        with disk_errors(f"--out {self.path}"):
            self.path.mkdir(parents=True, exist_ok=True)
            if (self.path / "run.json").exists():
                for pattern in ("config.json", "*.safetensors*", "samples.jsonl"):
                    for file in self.path.glob(pattern):
                        file.unlink()
                shutil.rmtree(self.path / "adapter", ignore_errors=True)
            self.state_file.unlink(missing_ok=True)
            self.log_file.write_text("", encoding="utf-8")

    def interrupt(self, *_) -> None:
        """Let the current step finish and save its state, after Ctrl-C, a batch system's SIGTERM or
        the SIGHUP of a closed terminal. A second signal ends the run at once."""
        self.stopping = True
        handle_stop_signals()
        print("\nstopping after this step; Ctrl-C again stops at once", file=sys.stderr)

    def log(self, step: int, steps: int, bar: tqdm, batch=(), **metrics) -> None:
        """Append the metrics of a step to log.jsonl, and show them.

        A step that `clip_and_step` skipped (its grad_norm is not finite) also gets "skipped", how
        many it is in a row, and its "batch": the stage's row numbers, or prompts. Raises Diverged
        after MAX_BAD_STEPS of them, and KeyboardInterrupt when the user has asked to stop."""
        row = {"step": step}
        for name, value in metrics.items():
            row[name] = float(f"{value:.7g}") if isinstance(value, float) else value
        if math.isfinite(metrics.get("grad_norm", 0.0)):
            self.bad_steps = 0
        else:
            self.bad_steps += 1
            self.skipped_steps += 1
            row["skipped"] = self.bad_steps
            row["batch"] = list(batch)
        if RANK == 0:
            with disk_errors(self.log_file), open(self.log_file, "a", encoding="utf-8") as file:
                file.write(json.dumps(json_safe(row)) + "\n")
        self.show(step, steps, bar, metrics)
        if self.bad_steps == MAX_BAD_STEPS:
            handle_stop_signals()  # a sweep goes on: Ctrl-C must not ask this run to stop
            raise Diverged(f"step {step}: loss or gradient not finite {MAX_BAD_STEPS} times in a "
                           f"row; the batches are in {self.log_file}. Lower --lr, or look at these "
                           "rows")
        if self.stopping and step < steps:
            self.save_state(step, self.model, self.optimizer)
            raise KeyboardInterrupt

    def show(self, step: int, steps: int, bar: tqdm, metrics: dict) -> None:
        """Show the numbers on the bar or, without a terminal, as about ten lines per run."""
        shown = {}
        for name, value in metrics.items():
            if isinstance(value, (int, float)):
                shown[name] = f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
        bar.set_postfix(shown, refresh=False)
        every = max(1, steps // 10)
        if bar.disable and (step in (1, steps) or step % every == 0):
            text = " ".join(f"{name} {value}" for name, value in shown.items())
            print(f"{self.stage} {step}/{steps} {text}", flush=True)

    def save_state(self, step: int, model, optimizer) -> None:
        """Save what --resume needs to continue after `step` steps, in one file for any number of
        processes."""
        state = full_state(model, optimizer)
        if RANK > 0:
            return
        # The log first, since a state promises the lines of all its steps.
        with disk_errors(self.log_file), open(self.log_file, "rb+") as file:
            os.fsync(file.fileno())
        state |= {"step": step, "seconds": self.seconds()}
        # Given a name instead of a file, torch would not say why a write failed.
        with atomic_path(self.state_file) as temporary, open(temporary, "wb") as file:
            torch.save(state, file)

    def save_samples(self, rollouts, **columns) -> None:
        """Write samples.jsonl: the model's answers and their scores. columns: more values of each
        answer, as lists."""
        rows = []
        for i, rollout in enumerate(rollouts):
            row = {"domain": rollout.query.get("domain", ""), "prompt": rollout.query["prompt"],
                   "response": rollout.text, "score": rollout.score, "finished": rollout.finished}
            for name, values in columns.items():
                row[name] = values[i]
            rows.append(row)
        write_jsonl(self.path / "samples.jsonl", rows)

    def seconds(self) -> float:
        """Return the time that the run has taken, resumed runs included."""
        return self.previous_seconds + time.perf_counter() - self.started

    def write_record(self, result: dict) -> None:
        """Write run.json: what was run, with which arguments and versions, and `result`."""
        try:
            git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True,
                                 text=True, cwd=Path(__file__).parent).stdout.strip()
        except OSError:
            git = ""  # not installed
        record = {"stage": self.stage, "args": self.args, "git": git,
                  "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
                  "python": platform.python_version(), "torch": torch.__version__,
                  "seed": self.args["seed"]}
        record |= result
        write_atomic(self.path / "run.json", json.dumps(json_safe(record), indent=1) + "\n")

    def save(self, model, tokenizer) -> None:
        """Save the model as a Hugging Face directory, before sampling and measuring can fail."""
        model = full_model(model, "meta" if RANK else "cpu")
        if RANK == 0:
            dtype = self.args.get("save_dtype") or model.config.torch_dtype
            model.save_pretrained(self.path, dtype)
            if adapters(model):
                save_adapter(model, self.path / "adapter", self.args["init"])
                tokenizer.save_pretrained(self.path / "adapter")
        tokenizer.save_pretrained(self.path)

    def finish(self, **result) -> None:
        """Mark the run finished in run.json, with its result, and drop state/."""
        self.write_record({"finished": True, "seconds": round(self.seconds(), 1),
                           "peak_rss_mb": round(peak_rss_mb()),
                           "skipped_steps": self.skipped_steps, "result": result})
        handle_stop_signals()  # a sweep goes on: Ctrl-C must not ask this run to stop
        if RANK == 0:
            shutil.rmtree(self.state_file.parent, ignore_errors=True)
            if self.lock_file is not None:
                self.lock_file.close()
        print(f"{self.stage}: {self.path} ready after {self.seconds():.0f} s")


def peak_rss_mb() -> float:
    """Return the peak resident memory of this process in MB, or 0 where there is no /proc."""
    status = Path("/proc/self/status")
    if not status.exists():  # getrusage would also count the program that started this one
        return 0.0
    _, found, rest = status.read_text().partition("VmHWM:")  # some containers do not have it
    return int(rest.split()[0]) * 1024 / 1e6 if found else 0.0
