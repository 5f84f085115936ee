"""common.py: the command line, the schedule, files that are whole or absent, the run directory.
R numbers: docs/requirements.md."""
import gzip
import importlib
import json
import math
import os
import platform
import signal
import subprocess
import sys
import zlib
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

import lib.args
from lib import files
from lib import optim
import lib.run
from lib.args import InputError, parse_args
from lib.files import read_jsonl
from lib.optim import adamw, clip_and_step, lr_at, rng
from lib.run import Run
from model import PRESETS, Qwen2

ROOT = Path(__file__).resolve().parents[1]
STAGES = [name for name in ("pretrain", "sft", "dpo", "reward", "grpo", "scaling", "evaluate",
                            "sample", "data") if (ROOT / f"{name}.py").exists()]


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


# ---------------------------------------------------------------------------------------------
# command line

def test_flags_become_typed_fields():
    args = parse_args(Args, "--tokens 3e6 --lr=7e-6 --doc_mask --out a=b --resume false".split())
    assert args == Args(out="a=b", tokens=3_000_000, lr=7e-6, doc_mask=True)
    assert type(args.tokens) is int
    assert parse_args(Args, []) == Args() and parse_args(Args, ["--lr", "1e21"]).lr == 1e21
    assert parse_args(Args, ["--doc_mask=TRUE", "--seed", "0", "--lr", ".5"]) == Args(
        doc_mask=True, seed=0, lr=0.5)
    assert parse_args(Args, ["--doc_mask", "1", "--overwrite"]) == Args(doc_mask=True,
                                                                        overwrite=True)


def test_lists_may_come_as_a_shell_expands_them():
    @dataclass
    class Lists:
        data: str = ""       # files, comma-separated
        weights: str = ""    # shares
    args = parse_args(Lists, "--data a.jsonl.gz b.txt c.parquet --weights a=1".split())
    assert args == Lists("a.jsonl.gz,b.txt,c.parquet", "a=1")
    for argv in ("--data a -weights", "--weights a=1 b=2"):
        with pytest.raises(InputError, match="unknown argument"):
            parse_args(Lists, argv.split())


@pytest.mark.parametrize("argv, message", [
    ("--tokens 1.5", "--tokens wants int, got '1.5'"),
    ("--tokens 1e400", "--tokens wants int"), ("--tokens nan", "--tokens wants int"),
    ("--seed -1", "--seed wants a number from 0 on, got -1"), ("--lr nan", "from 0 on, got nan"),
    ("--lr inf", "from 0 on, got inf"), ("--seed 1e30", "from 0 on, got 1e30"),
    ("--tokens x", "--tokens wants int, got 'x'"), ("--lr ten", "--lr wants float"),
    ("--doc_mask maybe", "--doc_mask wants bool, got 'maybe'"),
    ("--tokens", "--tokens wants a value"), ("--tokens --lr 1", "--tokens wants a value"),
    ("--tokens=", "--tokens wants int, got ''"),
    ("--lr 1 --lr 2", "--lr is given twice"), ("--lr 1 --lr=1", "--lr is given twice"),
    ("extra", "unknown argument 'extra'"), ("-lr 1", "unknown argument '-lr'"),
    ("--mask 1", "'--mask'; did you mean --doc_mask?"),
    ("--tokens_total 1", "did you mean --tokens?"),
    ("--doc-mask", "did you mean --doc_mask?"), ("--tokesn 5", "did you mean --tokens?"),
    ("--zzz 1", "'--zzz'; --help lists the flags")])
def test_bad_flags_are_refused_in_one_line(argv, message):
    with pytest.raises(InputError) as error:
        parse_args(Args, argv.split())
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("stage", STAGES)
def test_every_flag_of_every_stage_is_described(stage, capsys):
    Stage = importlib.import_module(stage).Args
    assert lib.args.field_help(Stage).keys() >= {f.name for f in fields(Stage)}
    with pytest.raises(SystemExit) as stopped:
        parse_args(Stage, ["--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0
    for f in fields(Stage):
        assert f"--{f.name} " in shown
        assert lib.args.field_help(Stage)[f.name].strip(), f.name
        assert f.type in (bool, int, float, str)
        if f.type is not bool:  # every default survives being written out
            assert parse_args(Stage, [f"--{f.name}={f.default}"]) == Stage()


def test_help_shows_default_and_comment(capsys):
    with pytest.raises(SystemExit):
        parse_args(Args, ["-h"])
    assert '--tokens           (10)           how many: "3e6" works' in capsys.readouterr().out


@dataclass
class Choice:
    what: str = ""  # to do


def fake_stage(args):
    if args.what == "input":
        raise InputError("data.jsonl:3: not JSON")
    if args.what == "stop":
        raise KeyboardInterrupt
    if args.what == "term":
        os.kill(os.getpid(), signal.SIGTERM)
    if args.what == "bug":
        raise IndexError


@pytest.mark.parametrize("argv, code, message", [
    ("--what input", 2, "error: data.jsonl:3: not JSON\n"), ("--what stop", 130, "stopped\n"),
    ("--what term", 130, "stopped\n"),
    ("--waht x", 2, "error: unknown argument '--waht'; did you mean --what?\n")])
def test_exit_codes(argv, code, message, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["stage.py", *argv.split()])
    with pytest.raises(SystemExit) as stopped:
        lib.args.cli(fake_stage, Choice)
    assert stopped.value.code == code
    shown = capsys.readouterr().err
    assert shown == message


@pytest.mark.parametrize("begun, words", [
    (True, "same command and --resume"), (False, "stopped; nothing saved yet")])
def test_an_interrupted_stage_says_how_to_go_on(begun, words, capsys, monkeypatch, tmp_path):
    """One that can: sample.py has no --resume."""
    if begun:
        (tmp_path / "run.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", ["stage.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        lib.args.cli(lambda args: fake_stage(Choice("stop")), Args)
    assert words in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["stage.py", "--what", "bug"])
    with pytest.raises(IndexError):
        lib.args.cli(fake_stage, Choice)


def test_bad_input_is_one_line_and_exit_code_2():
    """In a real process: no traceback."""
    done = subprocess.run([sys.executable, ROOT / "pretrain.py", "--tokens", "many"],
                          capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: --tokens wants int, got 'many'\n")


# ---------------------------------------------------------------------------------------------
# randomness, schedule, optimizer

@pytest.mark.parametrize("device, dtype, message", [
    ("tpu", "auto", "--device wants"), ("cpu", "float16", "--dtype wants"),
    ("cuda:99", "auto", "--device cuda:99 --dtype auto does not work here")])
def test_devices_are_tried_and_refused_clearly(device, dtype, message):
    """R0.2."""
    with pytest.raises(InputError, match=message) as error:
        optim.pick_device(device, dtype)
    assert "\n" not in str(error.value)


def test_device_auto_works():
    device, dtype = optim.pick_device()
    assert torch.ones(2, device=device, dtype=dtype).sum() == 2
    assert optim.pick_device("cpu") == (torch.device("cpu"), torch.float32)
    assert optim.pick_device("cpu", "bfloat16")[1] == torch.bfloat16


def test_learning_rate_ends_exactly_at_the_final_share():
    """7e-6 -> 7e-7."""
    for steps, warmup in ((100, 10), (100, 0), (2, 0), (50, 24)):
        rates = [lr_at(s, steps, 7e-6, warmup, 0.1) for s in range(steps)]
        assert rates[-1] == pytest.approx(7e-7, rel=1e-12)
        assert max(rates) == rates[warmup] == pytest.approx(7e-6, rel=1e-12)
        up, down = rates[:warmup + 1], rates[warmup:]
        assert up == sorted(up) and down == sorted(down, reverse=True) and up[0] > 0
    assert lr_at(4, 100, 1.0, 9, 0.1) == pytest.approx(0.5)  # linear
    half = lr_at(50, 101, 1.0, 0, 0.1)                       # cosine: the middle is the mean
    assert half == pytest.approx(0.55)
    assert lr_at(0, 1, 1.0, 0, 0.1) == 1.0
    assert lr_at(5, 10, 1.0, 2, 1.0) == 1.0
    assert lr_at(2, 5, 1.0, 50, 0.1) == 1.0                  # a warm-up longer than the run


def test_rng_is_a_pure_function_of_its_key():
    def draw(*key):
        return torch.rand(4, generator=rng(*key)).tolist()
    torch.manual_seed(1)
    a = draw(0, 3)
    torch.manual_seed(2)
    assert draw(0, 3) == a
    keys = [(s, t) for s in range(30) for t in range(30)] + [(s,) for s in range(30)]
    assert len({tuple(draw(*key)) for key in keys}) == len(keys)


def test_an_epoch_sees_every_row_once():
    """R2.6: a pure function of (seed, step); also where a batch spans epochs."""
    for n, batch in ((12, 4), (10, 4), (3, 8)):
        seen = [row for step in range(3 * n) for row in optim.epoch_order(step, batch, n, seed=1)]
        epochs = [seen[i:i + n] for i in range(0, len(seen) - n + 1, n)]
        assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
        assert len({tuple(e) for e in epochs}) > 1
    assert optim.epoch_order(5, 4, 100, 1) == optim.epoch_order(5, 4, 100, 1)
    assert optim.epoch_order(5, 4, 100, 1) != optim.epoch_order(5, 4, 100, 2)


def test_only_matrices_decay():
    """R: norms and biases never; with zero gradients a step multiplies the rest by 1 - lr * wd."""
    torch.manual_seed(0)
    model = Qwen2(PRESETS["micro-moe"])
    for p in model.parameters():
        p.data.add_(1.0)
        p.grad = torch.zeros_like(p)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = adamw(model, lr=0.1, weight_decay=0.5)
    assert clip_and_step(model, optimizer, 0.1, 1.0) == 0.0
    for name, p in model.named_parameters():
        factor = 1.0 if p.ndim == 1 else 0.95
        torch.testing.assert_close(p, before[name] * factor, msg=name)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(before)


def test_gradients_are_clipped_to_the_global_norm_and_zeroed():
    model = torch.nn.ModuleList([torch.nn.Linear(2, 2, bias=False) for _ in range(2)])
    for p, value in zip(model.parameters(), (3.0, 4.0), strict=True):
        p.data.zero_()
        p.grad = torch.tensor([[value, 0.0], [0.0, 0.0]])
    optimizer = torch.optim.SGD(model.parameters(), lr=99.0)
    assert clip_and_step(model, optimizer, 1.0, max_norm=0.5) == pytest.approx(5.0)
    assert [p[0, 0].item() for p in model.parameters()] == pytest.approx([-0.3, -0.4], rel=1e-4)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_gradient_skips_the_step(bad):
    """R4.5: weights and optimizer stay as they were, and the norm says so."""
    model = torch.nn.Linear(2, 2)
    optimizer = adamw(model, 0.1, 0.1)
    model(torch.ones(1, 2)).sum().backward()
    clip_and_step(model, optimizer, 0.1, 1.0)
    before = [p.detach().clone() for p in model.parameters()]
    (model(torch.ones(1, 2)).sum() * bad).backward()
    assert not math.isfinite(clip_and_step(model, optimizer, 0.1, 1.0))
    model(torch.ones(1, 2)).sum().backward()
    assert not math.isfinite(clip_and_step(model, optimizer, 0.1, 1.0, loss=bad))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())
    assert {s["step"].item() for s in optimizer.state.values()} == {1.0}


def test_rows_are_padded_on_the_right():
    assert optim.pad_rows([[1, 2], [], [3]], 9).tolist() == [[1, 2], [9, 9], [3, 9]]


# ---------------------------------------------------------------------------------------------
# files

def test_jsonl_round_trip_with_line_numbers(tmp_path):
    rows = [{"text": "a\nb\u2028c \"é🙂\""}, {"n": 1.5}]
    files.write_jsonl(tmp_path / "x.jsonl", rows)
    assert [row for _, row in read_jsonl(tmp_path / "x.jsonl")] == rows
    with gzip.open(tmp_path / "x.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write('{"a": 1}\n\n  \n{"b": 2}')
    assert list(read_jsonl(tmp_path / "x.jsonl.gz")) == [(1, {"a": 1}), (4, {"b": 2})]


@pytest.mark.parametrize("name, content, message", [
    ("x.jsonl", b'{"a": 1}\n{"a": }\n', "x.jsonl:2: not JSON"),
    ("x.jsonl", b'{"a": 1}\n\n[1]\n', "x.jsonl:3: want a JSON object"),
    ("x.jsonl", b'{"a": "\xff"}\n', "x.jsonl: cannot be read as UTF-8"),
    ("x.jsonl.gz", b'{"a": 1}\n', "x.jsonl.gz: cannot be read"),
    ("x.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 999, mtime=0)[:-9], "x.jsonl.gz: cannot be read"),
    ("x.jsonl.gz", gzip.compress(b"", mtime=0)[:10] + b"\xff" * 99, "x.jsonl.gz: cannot be read"),
    ("x.jsonl", None, "x.jsonl: no such file")])
def test_bad_jsonl_names_file_and_line(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        list(read_jsonl(tmp_path / name))
    assert "\n" not in str(error.value)


def test_bad_json_names_the_file(tmp_path):
    for content in ("{", "[]", "\udcff"):
        (tmp_path / "x.json").write_text(content, errors="surrogateescape")
        with pytest.raises(InputError, match="x.json: "):
            files.read_json(tmp_path / "x.json")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    """R4.4."""
    path = tmp_path / "deep" / "file"
    files.write_atomic(path, "old")
    with pytest.raises(UnicodeEncodeError):
        files.write_atomic(path, "new \ud800")  # fails half-way: a bug keeps its traceback
    assert path.read_text() == "old"

    def full(self, *args, **kwargs):
        with open(self, "w") as file:
            file.write("ne")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(InputError, match="file: cannot be written .No space left on device.; what"):
        files.write_atomic(path, "new")
    assert path.read_text() == "old" and [p.name for p in path.parent.iterdir()] == ["file"]


# ---------------------------------------------------------------------------------------------
# the run directory

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


class Saved:  # what finish needs of a tokenizer
    stop_ids, pad_id = (2, 1), 3

    def save_pretrained(self, path):
        pass


def begun(args):
    run = Run(args, "stage")
    run.start_or_resume()
    return run


def finish(run):
    model = Qwen2(PRESETS["micro"])
    run.finish(model, Saved(), loss=1.0)


def test_a_run_does_not_replace_the_model_that_it_starts_from(tmp_path):
    for out in ("run", "other/../run"):
        with pytest.raises(InputError, match="is --init too"):
            Run(Args(out=str(tmp_path / out), init=str(tmp_path / "run"), overwrite=True), "test")


def test_a_finished_run_is_not_overwritten(tmp_path):
    args = Args(out=str(tmp_path / "run"), seed=7)
    finish(begun(args))
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["finished"] and record["seed"] == 7 and record["result"] == {"loss": 1.0}
    assert record["args"]["out"] == args.out and record["torch"] == torch.__version__
    stops = json.loads((tmp_path / "run" / "generation_config.json").read_text())
    assert stops == {"eos_token_id": [2, 1], "pad_token_id": 3}
    with pytest.raises(InputError, match="holds a finished run: pass --overwrite or another"):
        Run(args, "stage")
    with pytest.raises(InputError, match="nothing to resume"):
        Run(Args(out=args.out, seed=7, resume=True), "stage")
    run = Run(Args(out=args.out, overwrite=True), "stage")
    assert json.loads((run.path / "run.json").read_text())["finished"]  # nothing is lost yet
    (run.path / "eval.json").write_text("{}")
    run.start_or_resume()
    assert not json.loads((tmp_path / "run" / "run.json").read_text())["finished"]
    assert not (run.path / "eval.json").exists()  # it was the other model's


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


def test_the_log_keeps_small_numbers(tmp_path):
    """A learning rate of 7e-7 is not 1e-6, nor 0."""
    run = begun(Args(out=str(tmp_path / "run")))
    log(run, 1, lr=7e-7, loss=7.6246189, tokens=4096, expert=[0.5])
    (_, row), = read_jsonl(tmp_path / "run" / "log.jsonl")
    assert row == {"step": 1, "lr": 7e-7, "loss": pytest.approx(7.6246189, rel=1e-6),
                   "tokens": 4096, "expert": [0.5]}


def test_git_is_not_needed(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    begun(Args(out=str(tmp_path / "run")))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["git"] == ""


def test_files_that_arguments_name(tmp_path):
    """In lists, before a function's name, a run's record; no other directory, number or word."""
    a, b = tmp_path / "a.jsonl", tmp_path / "b.py"
    a.write_bytes(bytes(range(256)) * 5000)  # more than one block
    b.write_text("")
    args = {"data": f"{a},{tmp_path}", "reward": f"{b}:f", "n": 3, "x": "", "out": str(tmp_path)}
    want = {str(a): f"{zlib.crc32(a.read_bytes()):08x}", str(b): "00000000"}
    assert files.checksums(args) == want
    (tmp_path / "run.json").write_text("")
    assert files.checksums(args) == want | {f"{tmp_path}/run.json": "00000000"}


def test_an_out_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="--out .*file"):
        Run(Args(out=str(tmp_path / "file" / "run")), "stage")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_is_kept():
    """Large tensors cause no page faults once there were as many; handed back, one of 8 MB costs
    2,048 (what glibc does by itself depends on what came before, so here it is told to hand back).
    In processes of their own, since the setting stays."""
    program = """if True:
        import resource, sys, torch
        from lib import optim
        if sys.argv[1:]:
            optim.keep_freed_memory()
        faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        def work():
            return len([torch.ones(2**21) for _ in range(4)])
        for _ in range(4):
            work()
        before = faults()
        for _ in range(5):
            work()
        print(faults() - before)"""
    env = dict(os.environ, MALLOC_MMAP_THRESHOLD_="131072")
    back, kept = (int(subprocess.run([sys.executable, "-c", program, *flag], cwd=ROOT, text=True,
                                     env=env, capture_output=True, check=True).stdout)
                  for flag in ([], ["keep"]))
    assert kept < 1000 < 20 * 2048 <= back


@pytest.mark.skipif(sys.platform != "linux", reason="macOS does not inherit it")
def test_peak_memory_is_not_that_of_the_program_that_started_this_one():
    ballast = b"x" * 600_000_000
    out = subprocess.run([sys.executable, "-c", "import lib.run; print(lib.run.peak_rss_mb())"],
                         cwd=ROOT,
                         capture_output=True, text=True, check=True).stdout
    assert 10 < float(out) < lib.run.peak_rss_mb() - len(ballast) / 2e6
