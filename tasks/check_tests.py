"""Find the queries whose tests decide nothing, before a model is trained or judged on them.

Tests that call nothing, or that only print, let every answer pass. Tests that import what the
sandbox lacks, or that end the program themselves, let no answer pass. So an answer that does
nothing must fail, and the query's own "solution", where it has one, must pass.
"""
import builtins
import keyword
import re
from concurrent.futures import ThreadPoolExecutor

from tasks import sandbox
from tasks.code_blocks import asked_names, whole_program

COMPILED = ("c", "c++", "java", "rust", "go")  # their tests hold main()
# A statement that ends the program as a success, or with a status that only the run knows.
EXIT = re.compile(
    r"(?:^|[;{}:)]|&&|\b(?:then|else|do|raise)\b)\s*(?:sys\.|os\.|process\.|System\.|POSIX::|"
    r"std::process::)?(?:_?exit!?(?!\w|\s*=)|Exit\b|quit\(|SystemExit\b)"
    r"(?!\s*\(?\s*(?:[1-9'\"-]|EXIT_FAILURE|false))|unittest\.main\b", re.M)
COMMENTS = dict.fromkeys(("python", "bash", "perl", "ruby", "php"), "#") | {"lua": "--"}
# The key is printed before a promise settles, and a promise that never settles ends node with 0.
PROMISE = re.compile(r"\b(?:async|await)\b|\.then\(")
# What fails however right the answer is. A syntax error does too, but not behind a prefix, whose
# last function may be open.
NEVER_PASSES = re.compile(
    r"\(tests, line \d+\)|(?:ModuleNotFound|Import|Permission)Error|No such file or directory|"
    r"Cannot find module|Can't locate \S+ in @INC|cannot load such file|module '\S+' not found|"
    r"package \S+ does not exist|can't find crate")
SYNTAX_ERROR = re.compile(r"SyntaxError|syntax error")

# Answers that do no work, however often a test calls NAME. The first returns nothing, which
# `assert not f(4)` rightly accepts, so a second returns something, as for `assert f(2)`.
IDLE = {
    "python": ["def NAME(*given, **named): pass", "def NAME(*given, **named): return 'text'"],
    "javascript": ["globalThis.NAME ??= function () {};",
                   "globalThis.NAME ??= function () { return {}; };"],
    "bash": ["command_not_found_handle() { true; }", "command_not_found_handle() { echo text; }"],
    "perl": ["#"], "ruby": ["#"], "lua": ["--"], "php": ["<?php"], "go": ["package main"],
}


def idle_program(check: dict, template: str) -> str:
    """Return a program that defines what the tests name, but does no work. Where the template names
    no function, it is empty."""
    taken = {*keyword.kwlist, *dir(builtins)} if check["language"] == "python" else set()
    names = {name for name in asked_names(check["tests"]) - taken if name.isidentifier()}
    lines = {template.replace("NAME", name) for name in names | {"unasked"}}
    return check.get("prefix", "") + "\n" + "\n".join(sorted(lines))


def run(check: dict, program: str) -> sandbox.Result:
    return sandbox.run(program, check["language"], check["tests"], timeout=20.0)


def problem_of(query: dict) -> str:
    """Return why the tests of a query decide nothing, or "". Only queries of code can have one."""
    check = query["check"]
    if check["kind"] != "code":
        return ""
    language = check["language"]
    comment = COMMENTS.get(language, "//")
    statements = re.sub(rf"(?:^|\s){comment}.*", "", check["tests"], flags=re.M)
    if EXIT.search(statements):
        return "its tests end the program, but must reach their last line; an assert can decide"
    if language in ("javascript", "typescript") and PROMISE.search(statements):
        return "its tests wait for a promise, which may never settle; they must be synchronous"
    if language in COMPILED and not re.search(r"\bmain\s*\(", check["tests"]):
        return "its tests must hold main()"
    if language == "bash" and re.search(r"\bset\s+\+\w*e", check["tests"]):
        return "its tests turn off `set -e`, and no answer passes without it"
    for template in IDLE.get(language, ["//"]):
        idle = run(check, idle_program(check, template))
        if not idle.passed:
            break
    if idle.passed:
        return "its tests let an answer pass that does nothing"
    is_broken = "prefix" not in check and SYNTAX_ERROR.search(idle.reason)
    if is_broken or NEVER_PASSES.search(idle.reason):
        return f"its tests let no answer pass: {idle.reason}"
    if query.get("solution"):
        solved = run(check, whole_program(query["solution"], check))
        # A run that is late proves nothing, because this machine may be busy.
        if not solved.passed and "time limit" not in solved.reason:
            return f"its own solution fails: {solved.reason}"
    return ""


def find_problems(queries: list[dict]) -> list[str]:
    """Return `problem_of` each query, several at a time."""
    with ThreadPoolExecutor(sandbox.count_cores()) as pool:
        return list(pool.map(problem_of, queries))
