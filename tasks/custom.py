"""A reward of your own: --reward my_reward.py:score of grpo.py and evaluate.py.

The function gets the query, as it stands in its file, and the response. If it has a third argument
without a default, this is a Sample, and responses that were cut reach it too. It returns a number
from 0 to 1, or {"reward": number, NAME: value, ...}, whose other values GRPO logs.

It runs with all your rights, so its name comes from the command line only, never from a file of
queries. It gets copies, a time limit (--reward_timeout), and may change the working directory.
Nothing protects a run from os._exit() in it, or from C code that hangs.
"""
import contextlib
import copy
import functools
import inspect
import math
import os
import runpy
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from lib.args import InputError, require

ROOT = Path(__file__).resolve().parents[1]


class Sample(NamedTuple):
    """What a reward may see of a response besides its text."""
    ids: list[int]   # its tokens, up to and including the stop id
    truncated: bool  # cut at --max_new_tokens


class OwnReward(NamedTuple):
    function: Callable
    path: str  # of its file
    takes_sample: bool


@functools.cache
def own_reward(name: str) -> OwnReward:
    """Return the function of "file.py:function". InputError if there is none."""
    path, _, function = name.rpartition(":")
    require(path != "", f"--reward must be file.py:function, got {name!r}")
    require(Path(path).is_file(), f"--reward {name}: {path}: no such file")
    # A module beside the file may be called as one of ours, such as its own data/. Ours step aside
    # while the file is read.
    folder = Path(path).resolve().parent
    sys.path.insert(0, str(folder))
    same_name = {file.stem for file in folder.glob("*.py")
                 if (ROOT / file.name).exists() or (ROOT / file.stem).is_dir()}
    ours = {}
    if folder != ROOT:
        ours = {module: sys.modules.pop(module) for module in same_name & sys.modules.keys()}
    try:
        with own_code(f"--reward {name}", path):
            found = runpy.run_path(path).get(function)
    finally:
        sys.modules.update(ours)
    require(callable(found), f"--reward {name}: {path} defines no function {function}")
    with own_code(f"--reward {name}", path):
        parameters = inspect.signature(found).parameters.values()
    required = [p for p in parameters if p.kind <= p.POSITIONAL_OR_KEYWORD and p.default is p.empty]
    return OwnReward(found, path, takes_sample=len(required) == 3)


def sees_truncated(query: dict) -> bool:
    """Return whether a cut response is scored, too: else it gets 0, whatever it contains."""
    check = query["check"]
    return check["kind"] == "own" and own_reward(check["function"]).takes_sample


def own_score(query: dict, response: str, rollout=None) -> float:
    """Return what the query's function says of a response, and add its other values to the rollout.
    InputError if it fails, returns no numbers, or takes more than the check's "timeout" seconds."""
    name = query["check"]["function"]
    about = f", for the response {response[:200]!r} to {str(query['prompt'])[:200]!r}"
    own = own_reward(name)
    arguments = [copy.deepcopy(query), response]
    if own.takes_sample and rollout is None:
        arguments.append(Sample([], truncated=False))
    elif own.takes_sample:
        arguments.append(Sample(list(rollout.ids), not rollout.finished))
    with own_code(name, own.path, about, query["check"]["timeout"]):
        value = own.function(*arguments)
        values = value if isinstance(value, dict) else {"reward": value}
        parts = {part: as_number(number) for part, number in values.items()}
    score = parts.pop("reward", math.nan)
    require(0 <= score <= 1 and all(map(math.isfinite, parts.values())), f"{name} gave "
            f"{value!r:.300}, not a number from 0 to 1 (or a dict of numbers with it as "
            f'"reward"){about}')
    if rollout is not None:
        rollout.parts = parts
    return score


def as_number(value) -> float:
    """Return a number of Python, numpy or torch as a float, and nan for texts and None."""
    is_text = isinstance(value, str | bytes | bytearray)  # float("1") and float(b"1") are 1
    return math.nan if value is None or is_text else float(value)


@contextlib.contextmanager
def own_code(name: str, path: str, about: str = "", timeout: float = 60.0):
    """Run the user's code in the block, and report in one line whatever it raises.

    The working directory is restored, or a relative --out would lie elsewhere. The alarm that ends
    code which takes too long exists on Unix only, in the main thread."""
    is_main = threading.current_thread() is threading.main_thread()
    has_alarm = is_main and hasattr(signal, "setitimer")
    directory = os.getcwd()

    late = TimeoutError(f"no answer within {timeout:g} seconds (--reward_timeout)")
    was_stopped = False

    def stop(*_):
        nonlocal was_stopped
        was_stopped = True
        raise late

    if has_alarm:
        before = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, timeout)
    try:
        yield
        if was_stopped:  # the code has caught what `stop` raised
            raise late
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit too: it would end the run as if it had succeeded
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
                 if frame.filename == path]
        where = f", line {lines[-1]}" if lines else ""
        if isinstance(error, TypeError) and not lines:
            where = " as score(query, response)"
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise InputError(f"{name}{where}: {reason}{about}") from None
    finally:
        if has_alarm:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        os.chdir(directory)
