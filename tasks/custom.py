"""A reward of your own."""
import functools
import runpy
import sys
import traceback
from pathlib import Path

from lib.args import InputError, require

@functools.cache
def own_reward(name: str):
    """"my_reward.py:score" -> that function of yours, score(query, response) -> 0 to 1. It runs
    with all your rights, so it comes from the command line, never from a file of queries."""
    path, _, function = name.rpartition(":")
    require(path != "", f"--reward wants file.py:function, got {name!r}")
    require(Path(path).is_file(), f"--reward {name}: {path}: no such file")
    # What it imports from beside it may be called as one of our modules: its own data/, not ours.
    folder, here = Path(path).resolve().parent, Path(__file__).resolve().parents[1]
    sys.path.insert(0, str(folder))
    names = {file.stem for file in folder.glob("*.py")
             if (here / file.name).exists() or (here / file.stem).is_dir()}
    ours = {n: sys.modules.pop(n) for n in names if n in sys.modules and folder != here}
    try:
        found = runpy.run_path(path).get(function)
    except Exception as error:
        raise InputError(f"--reward {name}{line_in(name, error)}: {type(error).__name__}: {error}"
                         ) from None
    finally:
        sys.modules.update(ours)
    require(callable(found), f"--reward {name}: {path} defines no function {function}")
    return found


def line_in(name: str, error: Exception) -> str:
    """Where in the file of a --reward an error arose, or that it cannot be called."""
    path = name.rpartition(":")[0]
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
    return f", line {lines[-1]}" if lines else \
        " as score(query, response)" * isinstance(error, TypeError)
