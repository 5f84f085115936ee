"""Programs judged a second: ours in namespaces, ours without them, and a bare interpreter.

Each program defines a function and passes one assert; the bare interpreter (`python -S`, no limits,
no proof of the pass, the same check and run for other languages) is what cannot be undercut. One
at a time; "pool" is 500 through run_many with 8 threads. Wall time stands in both columns: the
time of what the kernel kills is in nobody's account. Other work on the core counts, so compare
within a round.
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
    one(-1)  # finds the toolchains, fills the page cache
    start = time.perf_counter()
    if case.endswith("pool") and many:
        many(range(count))
    else:
        for i in range(count):
            one(i)
    seconds = time.perf_counter() - start
    return {"cpu": seconds, "wall": seconds, "work": count,
            "extra": {"ms a program": 1e3 * seconds / count}}


def ours(namespaces):
    def fn(case):
        harness.ours()
        from tasks import sandbox
        from tasks.sandbox.isolation import launchers
        if not namespaces:
            sandbox.find_launcher = lambda: launchers()["bare"]
        language = case.split()[0]
        code, tests = sandbox.SAMPLES[language]

        def job(i):  # texts differ: run_many runs equal ones once
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
    row, (code, tests) = sandbox.LANGUAGES[language], sandbox.SAMPLES[language]
    commands = [c for c in sandbox.find_commands(language) if c] or [
        [sys.executable, "-s", "-S", "-B", row.file]]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, row.file).write_text(row.before + code + row.between + tests + row.after)

        def one(_):
            for command in commands:
                subprocess.run(command, cwd=folder, check=True, capture_output=True)
        return measure(case, one)


SYSTEMS = {"ours": (ours(True), None), "ours, no namespaces": (ours(False), None),
           "no sandbox": (bare, None)}
CASES = {case: list(SYSTEMS) for case in PROGRAMS}

if __name__ == "__main__":
    harness.main("Sandbox", "programs", SYSTEMS, CASES)
