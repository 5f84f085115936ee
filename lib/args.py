"""The command line made from a dataclass, and errors that are one line."""
import dataclasses
import difflib
import inspect
import math
import os
import re
import signal
import sys
from pathlib import Path

from lib.dist import RANK, is_first_to_report, init_distributed, is_peer_failure

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


def exit_on_input_error(main, *args) -> None:
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
        if is_first_to_report():
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
        init_distributed()
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
        args = parse_args(Args, argv)
        main(args)
    if RANK:
        sys.stdout = open(os.devnull, "w")  # the first process speaks for all
    try:
        exit_on_input_error(run)
    except (KeyboardInterrupt, RuntimeError) as error:
        if not isinstance(error, KeyboardInterrupt) and not is_peer_failure(error):
            raise
        why = ": another process is gone" * is_peer_failure(error)
        hint = ""
        if hasattr(args, "resume"):
            hint = "; continue with the same command and --resume" if \
                (Path(args.out) / "run.json").exists() else "; nothing saved yet"
        if is_first_to_report():
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
