"""What must be the same in every stage, and nothing else: the command line made from a dataclass,
device and dtype, the learning-rate schedule, the optimizer, atomic files, the run directory.

There is no Trainer here. Each stage writes its own loop; these are functions that it calls.

Nothing random is hidden: every stage draws its data order and its samples from generators seeded
by (seed, step), see `rng`. A checkpoint therefore is weights + optimizer + step, and a resumed
run equals an uninterrupted one bit for bit on a CPU (tests/test_pipeline.py).
"""
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
import subprocess
import sys
import time
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm


class InputError(ValueError):
    """Bad input from the user: shown as one line (what, where, what to do), exit code 2."""


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
        return int(float(text)) if kind is int else kind(text)
    except (ValueError, KeyError, OverflowError):
        raise InputError(f"--{name} wants {kind.__name__}, got {text!r}") from None


def parse_args(Args, argv: list[str] | None = None):
    """`--field value`, `--field=value`, `--flag` for booleans -> an Args. Flags are field names."""
    argv = list(sys.argv[1:] if argv is None else argv)
    fields, values = {f.name: f for f in dataclasses.fields(Args)}, {}
    if {"-h", "--help"} & set(argv):
        print(usage(Args))
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


def cli(main, Args) -> None:
    """Run a stage from the command line. Only InputError becomes a one-line message: a bug in the
    program itself keeps its traceback."""
    try:
        main(parse_args(Args))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        hint = "; continue with the same command and --resume" * hasattr(Args, "resume")
        print("stopped" + hint, file=sys.stderr)
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


def setup(args) -> tuple[torch.device, torch.amp.autocast]:
    """Seed, pick the device, and return it with the autocast context that forwards run under."""
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")  # TF32 on CUDA; no effect on a CPU
    device, dtype = pick_device(args.device, args.dtype)
    print(f"device {device}, {str(dtype)[6:]}, {torch.get_num_threads()} threads, seed {args.seed}")
    return device, torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def rng(*key: int, device="cpu") -> torch.Generator:
    """A generator that is a pure function of its key, such as (seed, step)."""
    seed = 0
    for part in key:
        seed = (seed * 1_000_003 + part + 1) % (2**63 - 25)
    return torch.Generator(device).manual_seed(seed)


def lr_at(step: int, steps: int, peak: float, warmup: int, final: float) -> float:
    """Linear warm-up over `warmup` steps, then cosine from `peak` to exactly `final * peak` at the
    last step. `final` 0.1 is both Qwen1's pre-training and Qwen2.5's SFT (7e-6 -> 7e-7)."""
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
    epochs = {e: torch.randperm(n, generator=rng(seed, e)).tolist()
              for e in {p // n for p in positions}}
    return [epochs[p // n][p % n] for p in positions]


def pad_rows(rows: list[list[int]], pad_id: int) -> torch.Tensor:
    """Ragged rows -> (B, T) int64, padded on the right."""
    longest = max(map(len, rows))
    return torch.tensor([row + [pad_id] * (longest - len(row)) for row in rows])


def clip_and_step(model, optimizer, lr: float, max_norm: float) -> float:
    """Clip the global gradient norm, step with `lr`, zero the gradients. Returns the norm before
    clipping; a non-finite one skips the step and is returned, for the stage to log (R4.5)."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm).item()
    if math.isfinite(norm):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


# ---------------------------------------------------------------------------------------------
# files

def open_text(path: str | Path):
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
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
        except json.JSONDecodeError as error:
            where = f"{error.msg}, column {error.colno}"
            raise InputError(f"{path}:{number}: not JSON ({where})") from None
        except (UnicodeDecodeError, EOFError, OSError, zlib.error) as error:
            raise InputError(f"{path}: cannot be read as UTF-8 text ({error})") from None


def read_json(path: str | Path) -> dict:
    with open_text(path) as file:
        try:
            value = json.load(file)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: not JSON ({error})") from None
    require(isinstance(value, dict), f"{path}: want a JSON object")
    return value


def write_atomic(path: str | Path, content: str) -> None:
    """Write under a temporary name, then rename: a reader sees the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(content, encoding="utf-8")
    os.replace(temporary, path)


def write_jsonl(path: str | Path, rows) -> None:
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def peak_rss_mb() -> float:
    """Peak resident memory of this process in MB; nan where the OS does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return float("nan")
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


# ---------------------------------------------------------------------------------------------
# the run directory

class Run:
    """A stage's --out directory: run.json (what was asked and what came out), log.jsonl (one
    object a step, exactly what is shown), samples.jsonl, the model, and state/ while training."""

    def __init__(self, args, stage: str):
        self.path, self.stage, self.args = Path(args.out), stage, dataclasses.asdict(args)
        self.started, self.previous_seconds = time.time(), 0.0
        self.state_file = self.path / "state" / "state.pt"
        record = read_json(self.path / "run.json") if (self.path / "run.json").exists() else None
        asked = {k: v for k, v in self.args.items() if k not in ("resume", "overwrite")}
        if args.resume:
            require(record is not None and self.state_file.exists(),
                    f"{self.path}: nothing to resume (no state/state.pt)")
            had = {k: v for k, v in record["args"].items() if k in asked}
            diff = [f"{k} {had.get(k)!r} -> {v!r}" for k, v in asked.items() if had.get(k) != v]
            require(not diff, f"{self.path}: --resume with other arguments: {', '.join(diff)}")
        elif record is not None and not args.overwrite and (
                record.get("finished") or self.has_steps()):
            what = "a finished run" if record.get("finished") else "an interrupted run"
            more = " (or --resume to continue it)" * self.state_file.exists()
            raise InputError(f"{self.path} holds {what}: pass --overwrite{more} or another --out")
        self.resumed = args.resume
        parent = next(p for p in (self.path, *self.path.absolute().parents) if p.exists())
        require(parent.is_dir() and os.access(parent, os.W_OK),
                f"--out {self.path}: {parent} is not a directory that can be written to")

    def begin(self, model=None, optimizer=None) -> int:
        """Create the directory and return step 0; with --resume, restore the last state, drop later
        log lines and return its step. Until here nothing was written: a refusal loses nothing."""
        if self.resumed:
            state = torch.load(self.state_file, map_location="cpu", weights_only=True)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            self.previous_seconds = state["seconds"]
            log = self.path / "log.jsonl"
            write_jsonl(log, [row for _, row in read_jsonl(log) if row["step"] <= state["step"]])
            print(f"resumed {self.path} after step {state['step']}")
            return state["step"]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.state_file.unlink(missing_ok=True)
            (self.path / "log.jsonl").write_text("", encoding="utf-8")
            self.write_record({"finished": False})
        except OSError as error:
            raise InputError(f"--out {self.path}: {error.strerror}") from None
        return 0

    def has_steps(self) -> bool:
        """Was anything trained here? A run refused for a bad flag leaves nothing to protect."""
        log = self.path / "log.jsonl"
        return self.state_file.exists() or (log.is_file() and log.stat().st_size > 0)

    def write_record(self, result: dict) -> None:
        try:
            git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True,
                                 text=True, cwd=Path(__file__).parent).stdout.strip()
        except OSError:
            git = ""  # not installed
        record = {"stage": self.stage, "args": self.args, "parent": self.args.get("init", ""),
                  "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
                  "git": git, "python": platform.python_version(),
                  "torch": torch.__version__, "seed": self.args["seed"], **result}
        write_atomic(self.path / "run.json", json.dumps(record, indent=1) + "\n")

    def log(self, step: int, steps: int, bar: tqdm, **metrics) -> None:
        """Append to log.jsonl; show on the bar, or as ten lines in all without a terminal."""
        row = {"step": step, **{k: float(f"{v:.7g}") if isinstance(v, float) else v
                                for k, v in metrics.items()}}
        with open(self.path / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        shown = {k: f"{v:.4g}" for k, v in metrics.items() if isinstance(v, (int, float))}
        bar.set_postfix(shown, refresh=False)
        if bar.disable and (step % max(1, steps // 10) == 0 or step == steps):
            print(f"{self.stage} {step}/{steps} " + " ".join(f"{k} {v}" for k, v in shown.items()),
                  flush=True)

    def save_samples(self, rollouts) -> None:
        """samples.jsonl: what the model answered and what that was worth."""
        write_jsonl(self.path / "samples.jsonl", (
            {"domain": r.query["domain"], "prompt": r.query["prompt"], "response": r.text,
             "score": r.score, "finished": r.finished} for r in rollouts))

    def save_state(self, step: int, model, optimizer) -> None:
        """The training state after `step` steps, under a temporary name and renamed (R4.4)."""
        self.state_file.parent.mkdir(exist_ok=True)
        temporary = self.state_file.with_suffix(".tmp")
        torch.save({"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                    "seconds": self.seconds()}, temporary)
        os.replace(temporary, self.state_file)

    def seconds(self) -> float:
        return self.previous_seconds + time.time() - self.started

    def finish(self, model, tokenizer, **result) -> None:
        """Save the model as a Hugging Face directory, mark the run finished, drop state/."""
        model.save_pretrained(self.path)
        tokenizer.save_pretrained(self.path)
        stops = {"eos_token_id": list(tokenizer.stop_ids), "pad_token_id": tokenizer.eos_id}
        write_atomic(self.path / "generation_config.json", json.dumps(stops, indent=1) + "\n")
        self.write_record({"finished": True, "seconds": round(self.seconds(), 1),
                           "peak_rss_mb": round(peak_rss_mb()), "result": result})
        shutil.rmtree(self.state_file.parent, ignore_errors=True)  # with what a killed save left
        print(f"{self.stage}: {self.path} ready after {self.seconds():.0f} s")
