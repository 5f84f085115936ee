"""lib/args.py: the command line made from a dataclass, errors in one line.
R numbers: docs/requirements.md."""
import importlib
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

import lib.args
from lib.args import InputError, parse_args

ROOT = Path(__file__).resolve().parents[1]
STAGES = ["pretrain", "sft", "dpo", "reward", "grpo", "scaling", "evaluate", "sample",
          "data.__main__", "data.quality", "data.label", "tasks.__main__", "lib.report"]


@dataclass
class Args:
    out: str = "runs/x"      # where to
    tokens: int = 10         # how many: "3e6" works
    lr: float = 1e-3         # peak
    max_grad_norm: float = 1.0  # of the gradient
    doc_mask: bool = False   # documents apart
    seed: int = 0            # of all
    init: str = ""           # from where
    resume: bool = False     # go on
    overwrite: bool = False  # replace


def test_flags_become_typed_fields():
    args = parse_args(Args, "--tokens 3e6 --lr=7e-6 --doc_mask --out a=b --resume false".split())
    assert args == Args(out="a=b", tokens=3_000_000, lr=7e-6, doc_mask=True)
    assert type(args.tokens) is int
    assert parse_args(Args, []) == Args() and parse_args(Args, ["--lr", "1e21"]).lr == 1e21
    assert parse_args(Args, ["--doc_mask=TRUE", "--seed", "0", "--lr", ".5"]) == Args(
        doc_mask=True, seed=0, lr=0.5)
    assert parse_args(Args, ["--seed", "9007199254740993"]).seed == 2**53 + 1  # no float is
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
    ("--tokens 1.5", "--tokens must be of type int, got '1.5'"),
    ("--tokens 1e400", "--tokens must be of type int"),
    ("--tokens nan", "--tokens must be of type int"),
    ("--seed -1", "--seed must be at least 0 and below 9.22e+18, got -1"),
    ("--lr nan", "at least 0 and below inf, got nan"), ("--lr -1", "at least 0 and below inf"),
    ("--lr inf", "at least 0 and below inf, got inf"), ("--seed 1e30", "9.22e+18, got 1e30"),
    ("--tokens x", "--tokens must be of type int, got 'x'"),
    ("--lr ten", "--lr must be of type float"),
    ("--doc_mask maybe", "--doc_mask must be of type bool, got 'maybe'"),
    ("--tokens", "--tokens: expected one argument"),
    ("--tokens --lr 1", "--tokens: expected one argument"),
    ("--tokens=", "--tokens must be of type int, got ''"),
    ("--lr 1 --lr 2", "--lr is given twice"), ("--lr 1 --lr=1", "--lr is given twice"),
    ("extra", "unknown argument 'extra'"), ("-lr 1", "unknown argument '-lr'"),
    ("--mask 1", "'--mask'; did you mean --doc_mask?"),
    ("--tokens_total 1", "did you mean --tokens?"), ("--tok 5", "unknown argument '--tok'"),
    ("--doc-mask", "did you mean --doc_mask?"), ("--tokesn 5", "did you mean --tokens?"),
    ("--clip 1", "--clip is now called --max_grad_norm"),
    ("--clip=1", "--clip is now called --max_grad_norm"), ("--nll 1", "unknown argument '--nll'"),
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
    assert '--tokens (10)                     how many: "3e6" works' in capsys.readouterr().out


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


def test_the_loss_of_another_process_keeps_its_cause(capsys, monkeypatch):
    def main(args):
        raise RuntimeError("[gloo/tcp.cc:9] Connection closed by peer\nsecond line")
    monkeypatch.setattr(sys, "argv", ["stage.py"])
    with pytest.raises(SystemExit) as stopped:
        lib.args.cli(main, Choice)
    assert stopped.value.code == 130
    expected = "stopped: another process is gone ([gloo/tcp.cc:9] Connection closed by peer)\n"
    assert capsys.readouterr().err == expected


def test_a_letter_that_stdout_does_not_have_is_escaped():
    code = "import lib.args; lib.args.filter_output(); print('caf\\u00e9 \\u4e16 \\ud83d')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.stdout == "caf\\xe9 \\u4e16 \\ud83d\n", done.stderr


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["stage.py", "--what", "bug"])
    with pytest.raises(IndexError):
        lib.args.cli(fake_stage, Choice)


def test_bad_input_is_one_line_and_exit_code_2():
    """In a real process: no traceback."""
    done = subprocess.run([sys.executable, ROOT / "pretrain.py", "--tokens", "many"],
                          capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: --tokens must be of type int, got 'many'\n"


def test_what_is_printed_cannot_command_the_terminal(monkeypatch, capsys):
    """Text of a model or of a stranger's file: ESC moves the cursor, U+202E turns the line."""
    def main(args):
        print("\x1b[2J\x1b]0;title\x07 caf\u00e9\tsure\u202e\r \u0645 \x9b")
        raise InputError("file \x1b[31mred")
    monkeypatch.setattr(sys, "argv", ["x.py"])
    with pytest.raises(SystemExit):
        lib.args.cli(main, Args)
    out, err = capsys.readouterr()
    assert out == "\\x1b[2J\\x1b]0;title\\x07 caf\u00e9\tsure\\u202e\\r \u0645 \\x9b\n"
    assert err == "error: file \\x1b[31mred\n"


def test_half_a_surrogate_pair_can_be_printed():
    """As emoji that were cut leave it in a JSON file."""
    assert lib.args.printable("a\ud83d b") == "a\\ud83d b"
