"""Find the queries whose tests decide nothing, before a model is trained or judged on them.

Tests that only define functions let every answer pass. Tests that import what the sandbox lacks, or
that end the program themselves, let no answer pass. So we run each query twice: an empty answer
must fail, and the query's own "solution", where it has one, must pass.
"""
import re

from tasks import sandbox
from tasks.code_blocks import whole_program

COMPILED = ("c", "c++", "java", "rust", "go")  # their tests hold main()
NOTHING = {"python": "#", "bash": "#", "perl": "#", "ruby": "#", "lua": "--", "php": "<?php",
           "go": "package main"}  # an empty answer; in the other languages it is "//"
# A statement that ends the program as a success, or with a status that only the run knows.
EXIT = re.compile(
    r"(?:^|[;{}:)]|&&|\b(?:then|else|do|raise)\b)\s*(?:sys\.|os\.|process\.|System\.|POSIX::|"
    r"std::process::)?(?:_?exit!?(?!\w|\s*=)|Exit\b|quit\(|SystemExit\b)"
    r"(?!\s*\(?\s*(?:[1-9'\"-]|EXIT_FAILURE|false))|unittest\.main\b", re.M)
# What fails however right the answer is.
NEVER_PASSES = re.compile(
    r"(?:ModuleNotFound|Import)Error|Cannot find module|\b(?:describe|it|test|expect) is not "
    r"defined|Can't locate \S+ in @INC|cannot load such file|module '\S+' not found|"
    r"fatal error: \S+ No such file|package \S+ does not exist|can't find crate")


def problem_of_text(check: dict) -> str:
    """Return what is wrong with tests by their text alone, or ""."""
    if EXIT.search(check["tests"]):
        return "its tests end the program, but must reach their last line; an assert can decide"
    if check["language"] in COMPILED and not re.search(r"\bmain\s*\(", check["tests"]):
        return "its tests must hold main()"
    return ""


def find_problems(queries: list[dict], timeout: float = 20.0) -> list[str]:
    """Return per query why its tests decide nothing, or "". Only queries of code can have one.

    A run that is late proves nothing here, because this machine may be busy."""
    jobs = []
    for query in queries:
        check = query["check"]
        if check["kind"] == "code":
            nothing = f"```\n{NOTHING.get(check['language'], '//')}\n```"
            for answer in (nothing, query.get("solution") or nothing):
                jobs.append({"code": whole_program(answer, check), "language": check["language"],
                             "tests": check["tests"], "timeout": timeout})
    results = iter(sandbox.run_many(jobs))
    problems = []
    for query in queries:
        problem = ""
        if query["check"]["kind"] == "code":
            empty = next(results)
            solved = next(results)
            problem = problem_of_text(query["check"])
            if empty.passed:
                problem = problem or "an empty answer passes its tests; do they call anything?"
            elif NEVER_PASSES.search(empty.reason):
                problem = problem or f"no answer can pass its tests: {empty.reason}"
            elif query.get("solution") and not (solved.passed or "time limit" in solved.reason):
                problem = problem or f"its own solution fails: {solved.reason}"
        problems.append(problem)
    return problems
