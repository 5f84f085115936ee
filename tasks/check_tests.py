"""Find the queries whose tests decide nothing, before a model is trained or judged on them.

Tests that call nothing, or that only print, let every answer pass. Tests that import what the
sandbox lacks, or that end the program themselves, let no answer pass. So an answer that does
nothing must fail, and the query's own "solution", where it has one, must pass.
"""
import builtins
import keyword
import re

from tasks import sandbox
from tasks.code_blocks import asked_names, whole_program

COMPILED = ("c", "c++", "java", "rust", "go")  # their tests hold main()
# A statement that ends the program as a success, or with a status that only the run knows.
EXIT = re.compile(
    r"(?:^|[;{}:)]|&&|\b(?:then|else|do|raise)\b)\s*(?:sys\.|os\.|process\.|System\.|POSIX::|"
    r"std::process::)?(?:_?exit!?(?!\w|\s*=)|Exit\b|quit\(|SystemExit\b)"
    r"(?!\s*\(?\s*(?:[1-9'\"-]|EXIT_FAILURE|false))|unittest\.main\b", re.M)
# What fails however right the answer is. A syntax error does too, but not behind a prefix, whose
# last function may be open.
NEVER_PASSES = re.compile(
    r"\(tests, line \d+\)|(?:ModuleNotFound|Import)Error|No such file or directory|"
    r"Cannot find module|Can't locate \S+ in @INC|cannot load such file|module '\S+' not found|"
    r"package \S+ does not exist|can't find crate")
SYNTAX_ERROR = re.compile(r"SyntaxError|syntax error")

# Two answers per language that do no work, however often a test calls NAME. In the first it returns
# nothing, which `assert not f(4)` rightly accepts; in the second something, as for `assert f(2)`.
IDLE = {
    "python": ("def NAME(*given, **named): pass", "def NAME(*given, **named): return object()"),
    "javascript": ("globalThis.NAME ??= function () {};",
                   "globalThis.NAME ??= function () { return {}; };"),
    "bash": ("command_not_found_handle() { true; }", "command_not_found_handle() { echo text; }"),
    "perl": ("#", "#"), "ruby": ("#", "#"), "lua": ("--", "--"), "php": ("<?php", "<?php"),
    "go": ("package main", "package main"),
}


def idle_program(check: dict, which: int) -> str:
    """Return one of the programs that do no work. Where IDLE names no function, it is empty."""
    template = IDLE.get(check["language"], ("//", "//"))[which]
    taken = {*keyword.kwlist, *dir(builtins)} if check["language"] == "python" else set()
    lines = {template.replace("NAME", "unasked")}
    for name in asked_names(check["tests"]) - taken:
        if name.isidentifier():
            lines.add(template.replace("NAME", name))
    return check.get("prefix", "") + "\n" + "\n".join(sorted(lines))


def problem_of_text(check: dict) -> str:
    """Return what is wrong with tests by their text alone, or ""."""
    if EXIT.search(check["tests"]):
        return "its tests end the program, but must reach their last line; an assert can decide"
    if check["language"] in COMPILED and not re.search(r"\bmain\s*\(", check["tests"]):
        return "its tests must hold main()"
    return ""


def find_problems(queries: list[dict]) -> list[str]:
    """Return per query why its tests decide nothing, or "". Only queries of code can have one."""
    problems = [""] * len(queries)
    coded = [i for i, query in enumerate(queries) if query["check"]["kind"] == "code"]

    def run_all(numbers: list[int], program) -> dict[int, sandbox.Result]:
        jobs = []
        for i in numbers:
            check = queries[i]["check"]
            jobs.append({"code": program(queries[i]), "language": check["language"],
                         "tests": check["tests"], "timeout": 20.0})
        return dict(zip(numbers, sandbox.run_many(jobs), strict=True))

    idle = run_all(coded, lambda query: idle_program(query["check"], 0))
    passing = [i for i in coded if idle[i].passed]
    idle |= run_all(passing, lambda query: idle_program(query["check"], 1))
    solved = run_all([i for i in coded if queries[i].get("solution")],
                     lambda query: whole_program(query["solution"], query["check"]))
    for i in coded:
        check = queries[i]["check"]
        reason = idle[i].reason
        is_broken = "prefix" not in check and SYNTAX_ERROR.search(reason)
        # A run that is late proves nothing, because this machine may be busy.
        is_wrong = i in solved and not (solved[i].passed or "time limit" in solved[i].reason)
        problems[i] = problem_of_text(check)
        if idle[i].passed:
            problems[i] = problems[i] or "its tests let an answer pass that does nothing"
        elif is_broken or NEVER_PASSES.search(reason):
            problems[i] = problems[i] or f"its tests let no answer pass: {reason}"
        elif is_wrong:
            problems[i] = problems[i] or f"its own solution fails: {solved[i].reason}"
    return problems
