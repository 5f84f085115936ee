"""The command line that is made from a dataclass, and errors that are one line.

A stage lists its options once, as the fields of its `Args`. A field's name is the flag, its default
is the flag's default, and the comment behind it is the text of --help.
"""
import argparse
import dataclasses
import difflib
import inspect
import math
import os
import re
import signal
import sys
from pathlib import Path

from lib.dist import RANK, init_distributed, is_first_to_report, is_peer_failure

RENAMED = {"recompute": "gradient_checkpointing", "clip": "max_grad_norm",
           "aggregate": "loss_type", "normalise": "scale_rewards", "group": "num_generations",
           "order": "query_order", "nll": "rpo_alpha", "held_out": "eval_data"}
# Control characters but tab and newline, and direction marks: they command a terminal. Half a
# surrogate pair, which cannot be printed.
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
BOOLS = {"true": True, "1": True, "false": False, "0": False}


class InputError(ValueError):
    """Raised for bad user input. `cli` prints it as one line (what, where, what to do) and exits
    with code 2."""


def require(condition: bool, message: str) -> None:
    """Raise InputError(message) unless the condition holds."""
    if not condition:
        raise InputError(message)


def positive(args, *names: str) -> None:
    """Refuse an Args in which one of these numbers is zero or less."""
    for name in names:
        value = getattr(args, name)
        require(value > 0, f"--{name} must be positive, got {value}")


def parse_args(Args, argv: list[str]):
    """Return an Args made from `--field value`, `--field=value`, or `--field` alone for a bool."""
    if "-h" in argv or "--help" in argv:
        print(usage(Args), flush=True)
        raise SystemExit(0)
    fields = {field.name: field for field in dataclasses.fields(Args)}
    comments = field_help(Args)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False,
                                     argument_default=argparse.SUPPRESS)
    for name, field in fields.items():
        options = {}
        if field.type is bool:
            options = {"nargs": "?", "const": "true"}
        elif "comma" in comments.get(name, ""):
            options = {"nargs": "+"}  # as a shell expands `--data *.jsonl`; joined below
        parser.add_argument(f"--{name}", action="append", **options)
    try:
        found, unknown = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise InputError(str(error)) from None
    if unknown:
        refuse_unknown(unknown[0], fields)
    values = {}
    for name, uses in vars(found).items():
        require(len(uses) == 1, f"--{name} is given twice")
        text = uses[0] if isinstance(uses[0], str) else ",".join(uses[0])
        values[name] = parse_value(name, text, fields[name].type)
    return Args(**values)


def parse_value(name: str, text: str, kind: type):
    """Return the text of a flag as bool, int, float or str. An int may be written as `3e6`."""
    if kind is str:
        return text
    wrong_type = f"--{name} must be of type {kind.__name__}, got {text!r}"
    if kind is bool:
        require(text.lower() in BOOLS, wrong_type)
        return BOOLS[text.lower()]
    try:
        number = float(text)
    except ValueError:
        raise InputError(wrong_type) from None
    require(kind is float or number.is_integer(), wrong_type)
    # No flag has a use for a negative number, for nan, or for more than a machine can count.
    limit = math.inf if kind is float else 2**63
    require(0 <= number < limit, f"--{name} must be at least 0 and below {limit:.3g}, got {text}")
    if kind is int and text.isdecimal():
        return int(text)  # a float holds 53 bits
    return kind(number)


def refuse_unknown(argument: str, names) -> None:
    """Raise InputError with the new name of a renamed flag, or with the most similar name."""
    name = argument.lstrip("-").partition("=")[0]
    new_name = RENAMED.get(name)
    require(new_name not in names, f"--{name} is now called --{new_name}")
    similar = difflib.get_close_matches(name, names, 1)
    hint = f"did you mean --{similar[0]}?" if similar else "--help lists the flags"
    raise InputError(f"unknown argument {argument!r}; {hint}")


def field_help(Args) -> dict[str, str]:
    """Return the trailing comment of each field, read from the source of the dataclass."""
    pattern = re.compile(r"^\s+(\w+):[^#]*#\s*(.*)$", re.MULTILINE)
    return dict(pattern.findall(inspect.getsource(Args)))


def usage(Args) -> str:
    """Return the text of --help: the docstring of the stage, then one line per flag."""
    module = inspect.getmodule(Args)
    comments = field_help(Args)
    lines = [(module.__doc__ or "").strip(), "", "flags (default):"]
    for field in dataclasses.fields(Args):
        flag = f"--{field.name} ({field.default})"
        lines.append(f"  {flag:<33} {comments.get(field.name, '')}")
    return "\n".join(lines)


def handle_stop_signals(handler=signal.default_int_handler) -> None:
    """Call handler on Ctrl-C, SIGTERM and SIGHUP. The default one raises KeyboardInterrupt.

    Under `nohup` SIGHUP is ignored, and stays so."""
    signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGTERM, handler)
    hangup = getattr(signal, "SIGHUP", None)  # Windows has none
    if hangup is not None and signal.getsignal(hangup) is not signal.SIG_IGN:
        signal.signal(hangup, handler)


def printable(text: str) -> str:
    """Return text with its control characters written out, as \\x1b for ESC."""
    return CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def filter_output() -> None:
    """Make all that is printed from now on `printable`: a model's answer, or a stranger's file,
    could otherwise send commands to the terminal."""
    if hasattr(sys.stdout, "reconfigure"):  # a terminal's encoding may lack a letter
        sys.stdout.reconfigure(errors="backslashreplace")
    write = sys.stdout.write
    sys.stdout.write = lambda text: write(printable(text))


def exit_on_input_error(main, *args) -> None:
    """Call main(*args) and report bad input in one line. A bug keeps its traceback."""
    filter_output()
    try:
        main(*args)
        sys.stdout.flush()
    except BrokenPipeError:
        print("stopped: nobody reads the output any more, as after `| head`", file=sys.stderr)
        # Python flushes stdout once more when it exits, and that must not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except InputError as error:
        if is_first_to_report():
            print(f"error: {printable(str(error))}", file=sys.stderr)
        raise SystemExit(2) from None


def cli(main, Args, **commands) -> None:
    """Run a stage. `stage.py word --flags` runs commands["word"] instead of `main`."""
    argv = sys.argv[1:]
    if argv and argv[0] in commands:
        main = commands[argv.pop(0)]
        if "-h" in argv or "--help" in argv:
            print(main.__doc__)
            return
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")  # the first process speaks for all
    exit_on_input_error(run_until_stopped, main, Args, argv)


def run_until_stopped(main, Args, argv: list[str]) -> None:
    """Parse argv and call main(args). If Ctrl-C, SIGTERM or the loss of another process stops it,
    say in one line how to continue, and exit with code 130."""
    args = None
    try:
        init_distributed()
        handle_stop_signals()
        args = parse_args(Args, argv)
        main(args)
    except (KeyboardInterrupt, RuntimeError) as error:
        peer_failed = is_peer_failure(error)
        if isinstance(error, RuntimeError) and not peer_failed:
            raise
        message = "stopped"
        if peer_failed:
            reason, _, _ = str(error).partition("\n")
            message = f"stopped: another process is gone ({printable(reason)})"
        if hasattr(args, "resume"):
            has_begun = (Path(args.out) / "run.json").exists()
            advice = "continue with the same command and --resume"
            message += f"; {advice if has_begun else 'nothing saved yet'}"
        if is_first_to_report():
            print(message, file=sys.stderr)
        raise SystemExit(130) from None
