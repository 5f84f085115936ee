"""What must be the same in every stage, and nothing else: the command line made from a dataclass,
device and dtype, the learning-rate schedule, the optimizer, atomic files, the run directory.

There is no Trainer here. Each stage writes its own loop; these are functions that it calls.

Nothing random is hidden: every stage draws its data order and its samples from generators seeded
by (seed, step), see `rng`. A checkpoint therefore is weights + optimizer + step, and a resumed
run equals an uninterrupted one bit for bit on a CPU (tests/robustness/test_faults.py).
"""
import dataclasses
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm

from lib.args import InputError, require
from lib.dist import RANK, WORLD, cut_state, all_gather, load_state, save_state, full_model
from lib.files import (
    checksums,
    json_safe,
    read_json,
    read_jsonl,
    atomic_path,
    write_atomic,
    write_jsonl,
    disk_errors,
)

STRIKES = 5  # bad steps in a row that are no accident of one batch any more: the run stops


class Diverged(InputError):
    """The loss or the gradient stays nan or infinite."""


def watch(model, found: list[str]) -> list:
    """Hooks that put into an empty `found` the first module whose output in training, or weight
    whose gradient, is not finite. A look at every activation takes time: for use after a bad step.
    """
    def look(what: str, *args) -> None:  # args: module, inputs, output; or only a gradient
        training = len(args) == 1 or torch.is_grad_enabled()
        if training and not found and torch.is_tensor(args[-1]) and not args[-1].isfinite().all():
            found.append(what)
    hooks = [module.register_forward_hook(partial(look, f"output of {name}"))
             for name, module in model.named_modules()]
    return hooks + [p.register_hook(partial(look, f"gradient of {name}"))
                    for name, p in model.named_parameters() if p.requires_grad]


def peak_rss_mb() -> float:
    """Peak resident memory of this process in MB; nan where the OS does not tell (Windows)."""
    try:  # Linux, where ru_maxrss also counts the program that started this one
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e6
    except (OSError, IndexError):
        pass
    try:
        import resource
    except ImportError:
        return float("nan")
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is bytes on macOS, else KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def build_once(path: str | Path, *command) -> None:
    """Make `path` with `python -m command...` unless it exists. The first process does it, the
    others wait. The command is printed, so that a reader can run and change it."""
    if RANK == 0 and not Path(path).exists():
        words = [str(word) for word in command]
        print("$ python -m " + " ".join(words), flush=True)
        here = Path(__file__).resolve().parents[1]
        environment = os.environ | {"PYTHONPATH": str(here)}
        for name in ("RANK", "WORLD_SIZE"):  # torchrun's: the program must not join the group
            environment.pop(name, None)
        done = subprocess.run([sys.executable, "-m", *words], env=environment)
        require(done.returncode == 0, f"`python -m {' '.join(words)}` failed, see above")
    all_gather(None)


# ---------------------------------------------------------------------------------------------
# the run directory

class Run:
    """A stage's --out directory: run.json (what was asked and what came out), log.jsonl (one
    object a step, exactly what is shown), samples.jsonl, the model, and state/ while training.

    A run killed at any moment goes on with the same command and --resume: from its last state, or
    from step 0 where there is none yet; also when the model is written, until run.json, the last
    file, says finished. A file given to it that is another by then is told, and noted there."""

    def __init__(self, args, stage: str):
        self.path, self.stage, self.args = Path(args.out), stage, dataclasses.asdict(args)
        self.started, self.previous_seconds = time.time(), 0.0
        self.log_file, self.state_file = self.path / "log.jsonl", self.path / "state" / "state.pt"
        self.skipped, self.strikes, self.hooks, self.found = 0, 0, [], []
        record = read_json(self.path / "run.json") if (self.path / "run.json").exists() else {}
        asked = {k: v for k, v in self.args.items() if k not in ("resume", "overwrite")}
        finished = record.get("finished")
        if args.resume:
            why = "it is finished" if finished else "it was not begun: no run.json"
            require(record and not finished, f"{self.path}: nothing to resume ({why})")
            had = record.get("args")
            require(isinstance(had, dict), f"{self.path}/run.json: no args")
            had = {k: v for k, v in had.items() if k in asked}
            diff = [f"{k} {had.get(k)!r} -> {v!r}" for k, v in asked.items() if had.get(k) != v]
            require(not diff, f"{self.path}: --resume with other arguments: {', '.join(diff)}")
        elif record and not args.overwrite:
            # A run that was refused before its first step leaves nothing to protect.
            steps = any(f.exists() and f.stat().st_size for f in (self.log_file, self.state_file))
            what = "a finished run" if finished else "an interrupted run (--resume to continue it)"
            require(not finished and not steps,
                    f"{self.path} holds {what}: pass --overwrite or another --out")
        # One process saves state.pt, several a directory: whichever was completed last.
        states = [self.state_file, *self.path.glob("state/*/.metadata")]
        self.state = max((f for f in states if f.exists()), key=lambda f: f.stat().st_mtime,
                         default=None)
        self.resumed = args.resume and self.state is not None
        # {name: {step after which it was so: checksum}}
        self.files = record.get("files", {}) if self.resumed else {}
        init = self.args.get("init")
        require(not init or Path(init).resolve() != self.path.resolve(),
                f"--out {self.path} is --init too, which would be lost: choose another --out")
        parent = next(p for p in (self.path, *self.path.absolute().parents) if p.exists())
        require(parent.is_dir() and os.access(parent, os.W_OK),
                f"--out {self.path}: {parent} is not a directory that can be written to")

    def start_or_resume(self, model=None, optimizer=None) -> int:
        """Create the directory and return step 0; with --resume, restore the last state, drop later
        log lines and return its step. Until here nothing was written: a refusal loses nothing."""
        self.model, self.optimizer, self.stopping, step = model, optimizer, False, 0
        if self.resumed:
            try:
                if self.state.name == ".metadata":
                    state = load_state(self.state.parent, model, optimizer)
                else:
                    # weights_only: a state is tensors and numbers; a pickle could run any code.
                    state = torch.load(self.state, map_location="cpu", weights_only=True)
                    state = cut_state(state, model, optimizer)
                    model.load_state_dict(state["model"])
                    optimizer.load_state_dict(state["optimizer"])
                step, self.previous_seconds = state["step"], state["seconds"]
            except Exception as error:  # whatever the unpickler makes of a torn or foreign file
                raise InputError(f"{self.state}: not a whole state of this run "
                                 f"({type(error).__name__}); delete it, and --resume starts again "
                                 "from step 0") from None
            # One line a step: what was logged after the state, or torn, is not even read.
            rows = [row for _, row in islice(read_jsonl(self.log_file), step)]
            write_jsonl(self.log_file, rows)
            self.skipped = sum("skipped" in row for row in rows)
            self.strike(rows[-1].get("skipped", 0) if rows else 0)
        elif RANK == 0:
            with disk_errors(f"--out {self.path}"):
                self.path.mkdir(parents=True, exist_ok=True)
                if self.state_file.parent.exists():
                    shutil.rmtree(self.state_file.parent)
                for name in ("eval.json", "eval_samples.jsonl"):  # of the model that was here
                    (self.path / name).unlink(missing_ok=True)
                self.log_file.write_text("", encoding="utf-8")
        if self.args["resume"]:
            print(f"resumed {self.path} after step {step}")
        if RANK == 0:
            self.note_files(step)
        if optimizer and WORLD == 1 and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self.interrupt)
            signal.signal(signal.SIGTERM, self.interrupt)
        return step

    def note_files(self, step: int) -> None:
        """No refusal, since a --reward with an error gets mended: a changed file is told."""
        news = not self.resumed
        for name, new in checksums(self.args).items():
            known = self.files.setdefault(name, {str(step): new})
            if [*known.values()][-1] != new:
                print(f"{name} has changed since this run began: from here on it is another run")
                known[str(step)], news = new, True
        if news:
            self.write_record({"finished": False})

    def interrupt(self, *_) -> None:
        """Ctrl-C, or SIGTERM from a batch system: the step at hand is finished and its state saved.
        A second one ends at once."""
        self.stopping = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        print("\nstopping after this step; Ctrl-C again stops at once", file=sys.stderr)

    def write_record(self, result: dict) -> None:
        try:
            git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True,
                                 text=True, cwd=Path(__file__).parent).stdout.strip()
        except OSError:
            git = ""  # not installed
        record = {"stage": self.stage, "args": self.args, "parent": self.args.get("init", ""),
                  "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
                  "git": git, "python": platform.python_version(),
                  "torch": torch.__version__, "seed": self.args["seed"], "files": self.files,
                  **result}
        write_atomic(self.path / "run.json", json.dumps(json_safe(record), indent=1) + "\n")

    def strike(self, strikes: int) -> None:
        """So many steps in a row were skipped: from the first on, look for the module at fault."""
        self.strikes, self.found[:] = strikes, []
        if strikes and not self.hooks:
            self.hooks = watch(self.model, self.found)
        while self.hooks and not strikes:
            self.hooks.pop().remove()

    def log(self, step: int, steps: int, bar: tqdm, batch=(), **metrics) -> None:
        """Append to log.jsonl; show on the bar, or as a dozen lines without a terminal. A step
        that `clip_and_step` skipped also tells how many in a row it is, its batch (the stage's row
        numbers, or prompts), and from the second on where the fault began."""
        row = {"step": step, **{k: float(f"{v:.7g}") if isinstance(v, float) else v
                                for k, v in metrics.items()}}
        bad, where = not math.isfinite(metrics.get("grad_norm", 0.0)), ""
        if bad:
            where = "".join(sum(all_gather(self.found), [])[:1])  # some may have found nothing
            row |= {"skipped": self.strikes + 1, "batch": list(batch), "first": where}
        if RANK == 0:
            with disk_errors(self.log_file), open(self.log_file, "a", encoding="utf-8") as file:
                file.write(json.dumps(json_safe(row)) + "\n")
        shown = {k: f"{v:.4g}" if abs(v) < 1e4 else f"{v:.0f}" for k, v in metrics.items()
                 if isinstance(v, (int, float))}
        bar.set_postfix(shown, refresh=False)
        if bar.disable and (step in (1, steps) or step % max(1, steps // 10) == 0):
            print(f"{self.stage} {step}/{steps} " + " ".join(f"{k} {v}" for k, v in shown.items()),
                  flush=True)
        self.skipped += bad
        self.strike((self.strikes + 1) * bad)
        if self.strikes == STRIKES:
            raise Diverged(f"step {step}: loss or gradient not finite {STRIKES} times in a row, "
                           f"first in the {where or 'loss'}; the batches are in "
                           f"{self.log_file}. Lower --lr, or look at these rows")
        if self.stopping and step < steps:
            self.save_state(step, self.model, self.optimizer)
            raise KeyboardInterrupt

    def save_samples(self, rollouts, **columns) -> None:
        """samples.jsonl: what the model answered and what that was worth. columns: more of each."""
        write_jsonl(self.path / "samples.jsonl", (
            {"domain": r.query.get("domain", ""), "prompt": r.query["prompt"], "response": r.text,
             "score": r.score, "finished": r.finished, **dict(zip(columns, more, strict=True))}
            for r, *more in zip(rollouts, *columns.values(), strict=True)))

    def save_state(self, step: int, model, optimizer) -> None:
        """The training state after `step` steps, and before it the log of these steps (R4.4)."""
        with disk_errors(self.log_file), open(self.log_file, "rb+") as file:
            os.fsync(file.fileno())
        if WORLD > 1:
            path = self.path / "state" / f"{step:09d}"
            with disk_errors(path):
                save_state(path, model, optimizer, step=step, seconds=self.seconds())
            return
        state = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                 "seconds": self.seconds()}
        with atomic_path(self.state_file) as temporary, open(temporary, "wb") as file:
            torch.save(state, file)  # to a name, torch would not tell why a write failed

    def seconds(self) -> float:
        return self.previous_seconds + time.time() - self.started

    def finish(self, model, tokenizer, **result) -> None:
        """Save the model as a Hugging Face directory, mark the run finished, drop state/."""
        model = full_model(model, "meta" if RANK else "cpu")
        if RANK == 0:
            model.save_pretrained(self.path)
        tokenizer.save_pretrained(self.path)
        stops = {"eos_token_id": list(tokenizer.stop_ids), "pad_token_id": tokenizer.pad_id}
        write_atomic(self.path / "generation_config.json", json.dumps(stops, indent=1) + "\n")
        self.write_record({"finished": True, "seconds": round(self.seconds(), 1),
                           "peak_rss_mb": round(peak_rss_mb()), "skipped_steps": self.skipped,
                           "result": result})
        if RANK == 0:  # with what a killed save left
            shutil.rmtree(self.state_file.parent, ignore_errors=True)
        print(f"{self.stage}: {self.path} ready after {self.seconds():.0f} s")
