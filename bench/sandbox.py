"""Programs judged per second: our sandbox with and without namespaces, and a bare interpreter.

Each program defines a function and passes one assert. The bare interpreter (`python -S`, in other
languages the same check and run) has no limits and no proof of the pass: nothing can be faster.
Programs run one at a time, except in "pool", which is 500 through run_many with 8 threads. Both
columns hold wall time, because no account holds the time of what the kernel kills. Other work on
the core counts too, so compare within a round.
"""
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import harness

PROGRAMS = {"python": 100, "python pool": 500, "javascript": 20, "bash": 50, "c++": 10, "java": 5}


def measure(case, one, many=None):
    count = PROGRAMS[case]
    one(-1)  # find the toolchains, fill the page cache
    start = time.perf_counter()
    if case.endswith("pool") and many:
        many(range(count))
    else:
        for i in range(count):
            one(i)
    seconds = time.perf_counter() - start
    return {"cpu": seconds, "wall": seconds, "work": count,
            "extra": {"ms per program": 1e3 * seconds / count}}


def ours(namespaces):
    def fn(case):
        harness.ours()
        from tasks import sandbox
        if not namespaces:
            sandbox.find_launcher = lambda: ""
        language = case.split()[0]
        code, tests = sandbox.SAMPLES[language]

        def job(i):  # each text differs: run_many runs identical jobs once
            return {"code": code + "\n" * (i + 1), "language": language, "tests": tests,
                    "timeout": 20.0}

        def many(numbers):
            assert all(r.passed for r in sandbox.run_many([job(i) for i in numbers], 8))

        def one(i):
            result = sandbox.run(**job(i))
            assert result.passed, result
            assert namespaces == ("pids" in result.isolation), result.isolation
        return measure(case, one, many)
    return fn


def bare(case):
    harness.ours()
    from tasks import sandbox
    language = case.split()[0]
    row = sandbox.LANGUAGES[language]
    code, tests = sandbox.SAMPLES[language]
    if language == "python":
        commands = [[sys.executable, "-s", "-S", "-B", row.file]]
    else:
        commands = sandbox.find_commands(language)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, row.file).write_text(row.program(code, tests, "", ""))

        def one(_):
            for command in commands:
                subprocess.run(command, cwd=folder, check=True, capture_output=True)
        return measure(case, one)


SYSTEMS = {"ours": (ours(True), None), "ours, no namespaces": (ours(False), None),
           "no sandbox": (bare, None)}
CASES = {case: list(SYSTEMS) for case in PROGRAMS}

if __name__ == "__main__":
    harness.main("Sandbox", "programs", SYSTEMS, CASES)
