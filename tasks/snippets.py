"""Turn Python functions whose docstrings hold doctests into tasks with tests.

The report synthesises code instructions from snippets of repositories and keeps what passes unit
tests (section 4.1). A model writes there what a template writes here: the docstring becomes the
prompt, its examples become the tests, the function and what it uses become the solution.

    python -m tasks snippets --out tasks.jsonl              # the standard library's own functions
    python -m tasks snippets --dir my_code --out tasks.jsonl
"""
import ast
import sysconfig
from collections import Counter
from doctest import DocTestParser, Example
from pathlib import Path

from lib.args import require
from tasks.check_tests import find_problems
from tasks.queries import score_many

PARSER = DocTestParser()
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test"}  # directories


def python_files(directory: str) -> list[Path]:
    """Return the Python files of a directory, or with "" those of the standard library."""
    root = Path(directory or sysconfig.get_paths()["stdlib"])
    require(root.is_dir(), f"--dir {directory}: no such directory")
    return [path for path in sorted(root.rglob("*.py"))
            if not SKIPPED.intersection(path.relative_to(root).parts)]


# ---------------------------------------------------------------------------------------------
# the parts of a task

def test_of(example: Example) -> str:
    """Return an example as a line of the tests; "" where it shows an error or prints a text."""
    code = example.source.strip()
    if example.exc_msg:
        return ""
    if not example.want:
        return code
    try:
        expression = ast.parse(code, mode="eval")
    except SyntaxError:  # a statement that prints
        return ""
    if isinstance(expression.body, ast.Call) and ast.unparse(expression.body.func) == "print":
        return ""
    return f"assert repr({ast.unparse(expression)}) == {example.want.strip()!r}"


def names_in(node: ast.AST) -> set[str]:
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


def bound_names(statement: ast.stmt) -> set[str]:
    """Return the names that a statement at the top of a module defines or imports."""
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        return {statement.name}
    names = set()
    for node in ast.walk(statement):
        if isinstance(node, ast.alias):
            names.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def source_of(source: str, part: ast.stmt) -> str:
    """Return the text of a statement, with the decorators of a function or class."""
    decorators = getattr(part, "decorator_list", [])
    texts = [f"@{ast.get_source_segment(source, decorator)}" for decorator in decorators]
    return "\n".join([*texts, ast.get_source_segment(source, part)])


def whole_solution(source: str, tree: ast.Module, function: ast.FunctionDef) -> str:
    """Return the function with the imports, constants and helpers of its module that it uses."""
    used = names_in(function)
    chosen = {function}
    while more := {part for part in tree.body if bound_names(part) & used} - chosen:
        chosen |= more
        for part in more:
            used |= names_in(part)
    parts = [part for part in tree.body if part in chosen]
    return "\n\n".join(source_of(source, part) for part in parts)


def task_of(source: str, tree: ast.Module, function: ast.FunctionDef) -> dict | None:
    """Return a query with its solution, or None if no example shows a value.

    The prompt keeps the first example, because the form of a result is often said nowhere else."""
    try:
        pieces = PARSER.parse(ast.get_docstring(function))
    except ValueError:  # a blank is missing, or an indentation is wrong
        return None
    examples = [piece for piece in pieces if isinstance(piece, Example)]
    tests = "\n".join(filter(None, map(test_of, examples)))
    if "assert repr(" not in tests:
        return None
    words = "".join(piece for piece in pieces if isinstance(piece, str)).strip()
    first = next(example for example in examples if example.want)
    signature = f"{function.name}({ast.unparse(function.args)})"
    return {"prompt": f"Write a Python function `{signature}`.\n\n{words}\n\nFor example:\n"
                      f">>> {first.source}{first.want}".strip(),
            "domain": "code", "check": {"kind": "code", "language": "python", "tests": tests},
            "solution": whole_solution(source, tree, function)}


def snippet_tasks(directory: str) -> list[dict | None]:
    """Return what `task_of` makes of each function whose docstring holds an example."""
    tasks = []
    for path in python_files(directory):
        try:
            source = path.read_text("utf-8")
            tree = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError):  # no Python 3, or no text
            continue
        for statement in tree.body:
            is_function = isinstance(statement, ast.FunctionDef)
            if is_function and ">>>" in (ast.get_docstring(statement) or ""):
                tasks.append(task_of(source, tree, statement))
    return tasks


def kept_tasks(tasks: list[dict | None]) -> tuple[list[dict], Counter]:
    """Return the tasks whose solution passes the tests while an answer that does nothing fails,
    and how many were dropped for which reason. The sandbox runs the code."""
    asked = [task for task in tasks if task]
    passed = score_many(asked, [task["solution"] for task in asked])
    problems = find_problems([{"check": task["check"]} for task in asked])
    dropped = Counter()
    kept = []
    for task, solved, problem in zip(asked, passed, problems, strict=True):
        if problem or not solved:
            dropped[problem.partition(":")[0] or "its solution fails without its module"] += 1
        else:
            kept.append(task)
    if len(asked) < len(tasks):
        dropped["no example shows a value"] = len(tasks) - len(asked)
    return kept, dropped
