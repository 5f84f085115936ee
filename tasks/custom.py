"""A reward of your own: --reward my_reward.py:score of grpo.py and evaluate.py.

The function gets the query, as it stands in its file, and the response, and returns a number from 0
to 1. It runs with all your rights, so its name comes from the command line only, never from a file
of queries. It gets a copy of the query, a time limit (--reward_timeout), and may change the working
directory. Nothing protects a run from os._exit() in it, or from C code that hangs.
"""
import contextlib
import copy
import functools
import math
import os
import runpy
import signal
import sys
import threading
import traceback
from pathlib import Path

from lib.args import InputError, require

ROOT = Path(__file__).resolve().parents[1]


@functools.cache
def own_reward(name: str):
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
        ours = {module: sys.modules.pop(module) for module in same_name if module in sys.modules}
    try:
        with own_code(f"--reward {name}", path):
            found = runpy.run_path(path).get(function)
    finally:
        sys.modules.update(ours)
    require(callable(found), f"--reward {name}: {path} defines no function {function}")
    return found


def own_score(name: str, query: dict, response: str, timeout: float = 60.0) -> float:
    """Return what the function says of a response. InputError if it fails, returns no number, or
    takes more than `timeout` seconds."""
    path = name.rpartition(":")[0]
    shown = f"for the response {response[:200]!r}"
    function = own_reward(name)
    with own_code(name, path, f", {shown} to {str(query['prompt'])[:200]!r}", timeout):
        value = function(copy.deepcopy(query), response)
    with own_code(name, path, f", {shown}"):
        is_text = isinstance(value, str | bytes | bytearray)  # float("1") and float(b"1") are 1
        score = math.nan if value is None or is_text else float(value)  # of numpy and torch too
    require(0 <= score <= 1, f"{name} gave {value!r}, not a number from 0 to 1, {shown}")
    return score


@contextlib.contextmanager
def own_code(name: str, path: str, about: str = "", timeout: float = 60.0):
    """Run the user's code in the block, and report in one line whatever it raises.

    The working directory is restored, or a relative --out would lie elsewhere. The alarm that ends
    code which takes too long exists on Unix only, in the main thread."""
    has_alarm = hasattr(signal, "setitimer")
    has_alarm = has_alarm and threading.current_thread() is threading.main_thread()
    directory = os.getcwd()

    def stop(*_):
        raise TimeoutError(f"no answer within {timeout:g} seconds (--reward_timeout)")

    if has_alarm:
        before = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, timeout)
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit too: it would end the run as if it had succeeded
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
                 if frame.filename == path]
        where = f", line {lines[-1]}" if lines else ""
        if isinstance(error, TypeError) and not lines:
            where = " as score(query, response)"
        reason = " ".join(traceback.format_exception_only(error)[-1].split())[:300]
        reason = reason.removeprefix(f"{type(error).__module__}.")
        raise InputError(f"{name}{where}: {reason}{about}") from None
    finally:
        if has_alarm:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        os.chdir(directory)
