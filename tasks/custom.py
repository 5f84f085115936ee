"""A reward of your own: --reward my_reward.py:score of grpo.py and evaluate.py.

The function gets the query, as it stands in its file, and the response, and returns a number from 0
to 1. It runs with all your rights, so its name comes from the command line only, never from a file
of queries.
"""
import functools
import math
import runpy
import sys
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
        found = runpy.run_path(path).get(function)
    except Exception as error:  # whatever stands in the file
        raise InputError(f"--reward {name}{line_in(name, error)}: {type(error).__name__}: {error}"
                         ) from None
    finally:
        sys.modules.update(ours)
    require(callable(found), f"--reward {name}: {path} defines no function {function}")
    return found


def own_score(name: str, query: dict, response: str) -> float:
    """Return what the function says of a response. InputError if it fails or returns no number."""
    shown = f"for the response {response[:200]!r}"
    try:
        value = own_reward(name)(query, response)
    except Exception as error:  # whatever stands in the function
        raise InputError(f"{name}{line_in(name, error)}: {type(error).__name__}: {error}, "
                         f"{shown} to {str(query['prompt'])[:200]!r}") from None
    try:
        score = math.nan if isinstance(value, str) else float(value)  # of numpy and torch too
    except (TypeError, ValueError):
        score = math.nan
    require(0 <= score <= 1, f"{name} gave {value!r}, not a number from 0 to 1, {shown}")
    return score


def line_in(name: str, error: Exception) -> str:
    """Return the line of the file in which an error arose, or that it cannot be called."""
    path = name.rpartition(":")[0]
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
             if frame.filename == path]
    if lines:
        return f", line {lines[-1]}"
    if isinstance(error, TypeError):
        return " as score(query, response)"
    return ""
