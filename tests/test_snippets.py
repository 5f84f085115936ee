"""tasks/snippets.py: functions with doctests become tasks, if their tests decide something."""
import json

import pytest
from helpers import refuses, stage_args

import tasks.queries
from tasks import __main__ as program
from tasks.snippets import kept_tasks, snippet_tasks

MODULE = '''
import math
from . import sibling

SCALE = 3


def doubled(function):
    return lambda *given: 2 * function(*given)


@doubled
def helper(x):
    return x * SCALE


def area(r, *, digits=2):
    """Return the area of a circle, six times.

    >>> area(1)
    18.85
    >>> print(area(2))
    75.4
    >>> y = area(0)
    >>> y  # not printed
    0.0
    >>> area(-1)
    Traceback (most recent call last):
    ValueError: no
    """
    if r < 0:
        raise ValueError("no")
    return round(helper(math.pi * r * r), digits)


def lonely(x):
    """Needs its package.

    >>> lonely(1)
    2
    """
    return sibling.add(x)


def wrong(x):
    """Its example is false.

    >>> wrong(1)
    3
    """
    return x


def nothing(x):
    """An answer that does nothing passes.

    >>> nothing(1) == 1
    False
    """


def prints(x):
    """No value.

    >>> for i in range(2): print(i)
    0
    1
    """


def malformed(x):
    """A blank is missing.

    >>>malformed(1)
    1
    """


def no_example(x):
    return x
'''


def test_functions_become_tasks(tmp_path):
    """The one whose examples hold is kept, with its helpers and imports, and no others of its
    module; of the rest each is dropped for its reason. The examples after the first are hidden."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "ignored.py").write_text(MODULE, "utf-8")
    (tmp_path / "module.py").write_text(MODULE, "utf-8")
    (tmp_path / "python2.py").write_text("print 1", "utf-8")
    (task,), dropped = kept_tasks(snippet_tasks(str(tmp_path)))
    assert task["prompt"] == ("Write a Python function `area(r, *, digits=2)`.\n\nReturn the area "
                              "of a circle, six times.\n\nFor example:\n>>> area(1)\n18.85")
    assert task["check"]["tests"] == ("assert repr(area(1)) == '18.85'\ny = area(0)\n"
                                      "assert repr(y) == '0.0'")
    parts = [part.split("(")[0] for part in task["solution"].split("\n\n")]
    assert parts[:4] == ["import math", "SCALE = 3", "def doubled", "@doubled\ndef helper"]
    assert tasks.queries.score(task, task["solution"]) == 1
    assert tasks.queries.score(task, "def area(r): return 18.85") == 0
    assert dropped == {"its solution fails without its module": 2, "no example shows a value": 2,
                       "its tests let an answer pass that does nothing": 1}


def test_command(tmp_path, capsys):
    """The file is one that --queries reads, and its solutions are accepted there."""
    (tmp_path / "module.py").write_text(MODULE, "utf-8")
    out = tmp_path / "tasks.jsonl"
    program.snippets(stage_args(program, dir=str(tmp_path), out=str(out)))
    assert "1 of 6 Python functions" in capsys.readouterr().out
    rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert tasks.queries.load(str(out)) == rows
    refuses(lambda: program.snippets(stage_args(program, dir="nowhere", out="x")), "nowhere")


@pytest.mark.slow
def test_standard_library_is_the_built_in_source():
    names = {task["prompt"].split("`")[1].split("(")[0] for task in snippet_tasks("") if task}
    assert {"median_low", "get_close_matches", "merge"} <= names
