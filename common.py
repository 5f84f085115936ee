"""What must be the same in every stage, and nothing else: the command line made from a dataclass,
device and dtype, the learning-rate schedule, the optimizer, atomic files, the run directory.

There is no Trainer here. Each stage writes its own loop; these are functions that it calls.

Nothing random is hidden: every stage draws its data order and its samples from generators seeded
by (seed, step), see `rng`. A checkpoint therefore is weights + optimizer + step, and a resumed
run equals an uninterrupted one bit for bit on a CPU (tests/test_faults.py).
"""
import contextlib
import ctypes
import dataclasses
import difflib
import gzip
import inspect
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from tqdm import tqdm

from distributed import (
    RANK, WORLD, cut_state, first, gathered, join, load_state, lost, save_state, whole)

STRIKES = 5  # bad steps in a row that are no accident of one batch any more: the run stops


class InputError(ValueError):
    """Bad input from the user: shown as one line (what, where, what to do), exit code 2."""


class Diverged(InputError):
    """The loss or the gradient stays nan or infinite."""


# ---------------------------------------------------------------------------------------------
# command line

def field_help(Args) -> dict[str, str]:
    """The trailing comment of each dataclass field: the one place where an option is described."""
    pattern = re.compile(r"^\s+(\w+):[^#]*#\s*(.*)$", re.M)
    return dict(pattern.findall(inspect.getsource(Args)))


def parse_value(name: str, text: str, kind: type):
    """Text of a flag -> bool, int, float or str. `3e6` is accepted where an int is wanted."""
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if kind is int and float(text) != int(float(text)):
            raise ValueError
        value = int(float(text)) if kind is int else kind(text)
    except (ValueError, KeyError, OverflowError):
        raise InputError(f"--{name} wants {kind.__name__}, got {text!r}") from None
    # No flag has a use for less than nothing, for nan, or for more than a machine can count.
    most = math.inf if kind is float else 2**63
    require(kind is str or 0 <= value < most, f"--{name} wants a number from 0 on, got {text}")
    return value


def parse_args(Args, argv: list[str] | None = None):
    """`--field value`, `--field=value`, `--flag` for booleans -> an Args. Flags are field names."""
    argv = list(sys.argv[1:] if argv is None else argv)
    fields, values = {f.name: f for f in dataclasses.fields(Args)}, {}
    if {"-h", "--help"} & set(argv):
        print(usage(Args), flush=True)
        raise SystemExit(0)
    while argv:
        flag, has_value, text = argv.pop(0).partition("=")
        name = flag[2:]
        if not flag.startswith("--") or name not in fields:
            near = [f for f in fields if name and (name in f or f in name)]
            near = difflib.get_close_matches(name, fields, 1) or near
            hint = f"; did you mean --{near[0]}?" if near else "; --help lists the flags"
            raise InputError(f"unknown argument {flag!r}{hint}")
        if name in values:
            raise InputError(f"--{name} is given twice")
        kind = fields[name].type
        if not has_value:
            if kind is bool and (not argv or argv[0].startswith("--")):
                text = "true"
            elif not argv or argv[0].startswith("--"):
                raise InputError(f"--{name} wants a value")
            else:
                text = argv.pop(0)
                while argv and argv[0][:1] != "-" and "comma" in field_help(Args).get(name, ""):
                    text += "," + argv.pop(0)  # as a shell leaves --data *.jsonl
        values[name] = parse_value(name, text, kind)
    return Args(**values)


def usage(Args) -> str:
    module = inspect.getmodule(Args)
    helps = field_help(Args)
    lines = [(module.__doc__ or "").strip(), "", "flags (default):"]
    for f in dataclasses.fields(Args):
        default = f"({f.default})" if f.default != "" else "()"
        lines.append(f"  --{f.name:<16} {default:<14} {helps.get(f.name, '')}")
    return "\n".join(lines)


def one_line(main, *args) -> None:
    """main(*args). Bad input, or a reader of the output who has gone, is one line and an exit code:
    a bug in the program itself keeps its traceback."""
    try:
        main(*args)
        sys.stdout.flush()
    except BrokenPipeError:
        print("stopped: nobody reads the output any more, as after `| head`", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still to be said
        raise SystemExit(141) from None
    except InputError as error:
        if first():
            print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def cli(main, Args, **commands) -> None:
    """Run a stage from the command line, or with `stage.py word --flags` what `commands` has under
    that word."""
    argv = sys.argv[1:]
    if argv and argv[0] in commands:
        main = commands[argv.pop(0)]
        if {"-h", "--help"} & set(argv):
            print(main.__doc__)
            return
    args = None

    def run() -> None:
        nonlocal args
        join()
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
        args = parse_args(Args, argv)
        main(args)
    if RANK:
        sys.stdout = open(os.devnull, "w")  # the first process speaks for all
    try:
        one_line(run)
    except (KeyboardInterrupt, RuntimeError) as error:
        if not isinstance(error, KeyboardInterrupt) and not lost(error):
            raise
        why = ": another process is gone" * lost(error)
        hint = ""
        if hasattr(args, "resume"):
            hint = "; continue with the same command and --resume" if \
                (Path(args.out) / "run.json").exists() else "; nothing saved yet"
        if first():
            print("stopped" + why + hint, file=sys.stderr)
        raise SystemExit(130) from None


def require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


def positive(args, *names: str) -> None:
    """Refuse an Args in which one of these numbers is zero or less."""
    for name in names:
        value = getattr(args, name)
        require(value > 0, f"--{name} must be positive, got {value}")


# ---------------------------------------------------------------------------------------------
# device, randomness, optimizer, schedule

def pick_device(device: str = "auto", dtype: str = "auto") -> tuple[torch.device, torch.dtype]:
    """Choose by trying: a tiny forward and backward, not a table of capabilities (R0.2). bfloat16
    means autocast over float32 master weights: in pure bf16 an update of 1e-6 is rounded away
    (R4.6). CUDA is written for but not yet measured on a GPU."""
    require(device == "auto" or device.split(":")[0] in ("cpu", "cuda"),
            f"--device wants auto, cpu or cuda[:N], got {device!r}")
    names = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}
    require(dtype in names, f"--dtype wants one of {', '.join(names)}, got {dtype!r}")
    devices = [device] if device != "auto" else ["cuda"] * torch.cuda.is_available() + ["cpu"]
    for candidate in devices:
        for kind in [names[dtype]] if names[dtype] else [torch.bfloat16, torch.float32]:
            if dtype == "auto" and candidate == "cpu" and kind is torch.bfloat16:
                continue  # slower than float32 on processors without bf16 matrix units
            try:
                x = torch.ones(1, 1, 8, 16, device=candidate, dtype=kind, requires_grad=True)
                F.scaled_dot_product_attention(x @ x.mT @ x, x, x).sum().backward()
                return torch.device(candidate), kind
            except (RuntimeError, AssertionError) as error:
                reason = str(error).splitlines()[0]
    raise InputError(f"--device {device} --dtype {dtype} does not work here: {reason}")


def keep_freed_memory() -> None:
    """glibc hands large blocks back to the system when they are freed, and every 4 KB of the next
    one is a page fault: 8 to 18% of a small training step. Let it keep blocks of up to 32 MB,
    1 GB in all. Any other C library goes on as it does. And oneDNN keeps what it prepared for the
    last 1,024 shapes of a product, half a GB where lengths are always new, as in GRPO: 256 do."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")  # read at its first product
    with contextlib.suppress(OSError, AttributeError, TypeError):  # TypeError: Windows
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD


def setup(args, rows: int = 0) -> tuple[torch.device, torch.amp.autocast]:
    """Seed, pick the device, and return it with the autocast context that forwards run under.
    rows: of a step. Several processes compute in step, so each must have as many."""
    require(rows % WORLD == 0, f"a batch of {rows} rows does not divide by {WORLD} processes")
    torch.manual_seed(args.seed)
    keep_freed_memory()
    torch.set_float32_matmul_precision("high")  # TF32 on CUDA; no effect on a CPU
    device, dtype = pick_device(args.device, args.dtype)
    print(f"device {device}, {str(dtype)[6:]}, {torch.get_num_threads()} threads, seed {args.seed}"
          + f", {WORLD} processes" * (WORLD > 1))
    return device, torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def rng(*key: int, device="cpu") -> torch.Generator:
    """A generator that is a pure function of its key, such as (seed, step)."""
    seed = 0
    for part in key:
        seed = (seed * 1_000_003 + part + 1) % (2**63 - 25)
    return torch.Generator(device).manual_seed(seed)


def lr_at(step: int, steps: int, peak: float, warmup: int, final: float) -> float:
    """Linear warm-up over `warmup` steps, at most half of all, so that a short run reaches its peak
    too; then cosine from `peak` to exactly `final * peak` at the last step. `final` 0.1 is both
    Qwen1's pre-training and Qwen2.5's SFT (7e-6 -> 7e-7)."""
    warmup = min(warmup, steps // 2)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def adamw(model: torch.nn.Module, lr: float, weight_decay: float, betas=(0.9, 0.95)):
    """AdamW that decays matrices only: shrinking norms and biases has no regularising sense."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in params if p.ndim >= 2], "weight_decay": weight_decay},
              {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=1e-8, fused=True)


def epoch_order(step: int, batch_size: int, n: int, seed: int) -> list[int]:
    """The rows of one step: positions of an endless sequence of shuffled epochs, so that an epoch
    sees every row once, and the batch is a pure function of (seed, step)."""
    positions = range(step * batch_size, (step + 1) * batch_size)
    return [int(shuffled(n, seed, p // n)[p % n]) for p in positions]


@lru_cache(2)  # not drawn anew for each step: a million rows take 20 ms
def shuffled(n: int, seed: int, epoch: int) -> torch.Tensor:
    return torch.randperm(n, generator=rng(seed, epoch))


def pad_rows(rows: list[list[int]], pad_id: int) -> torch.Tensor:
    """Ragged rows -> (B, T) int64, padded on the right."""
    longest = max(map(len, rows))
    return torch.tensor([row + [pad_id] * (longest - len(row)) for row in rows])


def clip_and_step(model, optimizer, lr: float, max_norm: float, loss: float = 0.0) -> float:
    """Clip the global gradient norm, step with `lr`, zero the gradients. Returns the norm before
    clipping. Where it or the step's loss is not finite, weights and optimizer stay as they are and
    what is returned is not finite either: `Run.log` counts such steps (R4.5)."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm).item() + 0.0 * loss
    if math.isfinite(norm):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


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


# ---------------------------------------------------------------------------------------------
# files

def open_text(path: str | Path):
    path = Path(path)
    require(path.is_file(), f"{path}: no such file")
    try:
        return (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None


def read_jsonl(path: str | Path):
    """Yields (line number from 1, object) of a .jsonl or .jsonl.gz; blank lines are skipped."""
    with open_text(path) as file:
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    row = json.loads(line)
                    require(isinstance(row, dict), f"{path}:{number}: want a JSON object a line")
                    yield number, row
        except InputError:
            raise
        except json.JSONDecodeError as error:
            where = f"{error.msg}, column {error.colno}"
            raise InputError(f"{path}:{number}: not JSON ({where})") from None
        except (UnicodeDecodeError, EOFError, OSError, zlib.error) as error:
            raise InputError(f"{path}: cannot be read as UTF-8 text ({error})") from None
        except (ValueError, RecursionError) as error:  # a number, or nesting, without end
            raise InputError(f"{path}:{number}: cannot be read ({error})") from None


def read_json(path: str | Path) -> dict:
    with open_text(path) as file:
        try:
            value = json.load(file)
        except (ValueError, RecursionError, OSError) as error:
            raise InputError(f"{path}: not JSON ({error})") from None
    require(isinstance(value, dict), f"{path}: want a JSON object")
    return value


@contextlib.contextmanager
def writing(path):
    """A disk that is full or cannot be written to is told in one line."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # Python's, torch's, safetensors'
        if lost(error):
            raise
        known = [e.strerror or str(e) for e in (error, error.__context__) if isinstance(e, OSError)]
        reason = (known or str(error).splitlines())[0]
        raise InputError(f"{path}: cannot be written ({reason}); what was there is still there"
                         ) from None


@contextlib.contextmanager
def replacing(path: str | Path):
    """Gives a temporary name to write under, then renames: a reader sees the old file or the new
    one. After a crash of the machine too, by fsync: else the rename may reach the disk before the
    bytes do, and leave an empty file. So no older copy is kept beside it (R4.4)."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            mask = os.umask(0)  # can only be read by setting it
            os.umask(mask)
            os.chmod(temporary, 0o666 & ~mask)  # safetensors' own files are for their owner only
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)  # half of a file, on a disk that is full


def write_atomic(path: str | Path, content: str) -> None:
    if RANK == 0:  # all processes come here with the same content
        with replacing(path) as temporary:
            temporary.write_text(content, encoding="utf-8")


def plain(x):
    """For JSON, which has no nan and no infinity: null."""
    return json.loads(json.dumps(x), parse_constant=lambda name: None)


def write_jsonl(path: str | Path, rows) -> None:
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def checksums(args: dict) -> dict[str, str]:
    """Of each file that an argument names, as --data a.jsonl,b.txt or --reward my.py:score do, and
    of the record of each run that one starts from."""
    out = {}
    values = [value for key, value in args.items() if isinstance(value, str) and key != "out"]
    for name in ",".join(values).split(","):
        paths = (name, name.rpartition(":")[0], f"{name}/run.json")
        path = next(filter(os.path.isfile, paths), "")
        if os.access(path, os.R_OK):
            crc = 0
            with open(path, "rb") as file:
                while block := file.read(2**20):
                    crc = zlib.crc32(block, crc)
            out[path] = f"{crc:08x}"
    return out


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

    def begin(self, model=None, optimizer=None) -> int:
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
            with writing(f"--out {self.path}"):
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
        write_atomic(self.path / "run.json", json.dumps(plain(record), indent=1) + "\n")

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
            where = "".join(sum(gathered(self.found), [])[:1])  # some may have found nothing
            row |= {"skipped": self.strikes + 1, "batch": list(batch), "first": where}
        if RANK == 0:
            with writing(self.log_file), open(self.log_file, "a", encoding="utf-8") as file:
                file.write(json.dumps(plain(row)) + "\n")
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
            {"domain": r.query["domain"], "prompt": r.query["prompt"], "response": r.text,
             "score": r.score, "finished": r.finished, **dict(zip(columns, more, strict=True))}
            for r, *more in zip(rollouts, *columns.values(), strict=True)))

    def save_state(self, step: int, model, optimizer) -> None:
        """The training state after `step` steps, and before it the log of these steps (R4.4)."""
        with writing(self.log_file), open(self.log_file, "rb+") as file:
            os.fsync(file.fileno())
        if WORLD > 1:
            path = self.path / "state" / f"{step:09d}"
            with writing(path):
                save_state(path, model, optimizer, step=step, seconds=self.seconds())
            return
        state = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                 "seconds": self.seconds()}
        with replacing(self.state_file) as temporary, open(temporary, "wb") as file:
            torch.save(state, file)  # to a name, torch would not tell why a write failed

    def seconds(self) -> float:
        return self.previous_seconds + time.time() - self.started

    def finish(self, model, tokenizer, **result) -> None:
        """Save the model as a Hugging Face directory, mark the run finished, drop state/."""
        model = whole(model, "meta" if RANK else "cpu")
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
