"""Run a model's code against unit tests under limits, and accept only a proven pass.

A policy under training exploits whatever its reward calls a pass. So a run never hangs, leaves no
process behind, and passes only with a proof that the tests reached their end:

    run() --socket--> supervisor: own session, namespaces, private files (isolation.py)
                        `--> child: limits, no privileges, seccomp, no environment (child.py)
    Python  The child reads key B after the last test, and sends key A + key B.
    others  The program prints key A + key B in its last statement (languages.py).

The tests have builtins of their own. In Python they compare plain values only with plain values,
any other type with its like. The price: an honest class, even a namedtuple, does too. Only bash
programs may fork, and Python's that import multiprocessing, concurrent or subprocess: a copy of the
program could try an answer.

THIS IS A RESOURCE LIMITER, NOT A SECURITY BOUNDARY: run hostile code in a container or a VM.
docs/trust.md has the table of what was tried, what held and what is left. Besides, memory is not
summed over processes: each of 64 may use the limit. The stages refuse to run code without the
layers "files" and "pids", unless they get --allow_unsafe_code.

`python -m tasks.sandbox` tries every language. `run` needs POSIX; C and C++ need a linker with
--wrap, which macOS lacks.
"""
import ast
import contextlib
import functools
import marshal
import os
import re
import secrets
import signal
import socket
import subprocess
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

from tasks.sandbox.isolation import (
    child_command,
    count_threads,
    find_launcher,
    fork_filter,
    hide_memory,
    seccomp_filter,
    visible_files,
)
from tasks.sandbox.languages import LANGUAGES, SAMPLES, Language, find_commands

__all__ = ["LANGUAGES", "SAMPLES", "Result", "count_cores", "is_isolated", "isolation_gaps",
           "languages", "run", "run_many"]

# Per process, except NPROC, which counts the processes of the user (or of its namespace).
LIMITS = {"RLIMIT_CORE": 0, "RLIMIT_FSIZE": 1 << 20, "RLIMIT_NPROC": 64, "RLIMIT_NOFILE": 64}
COMPILER_LIMITS = {"RLIMIT_CORE": 0, "RLIMIT_FSIZE": 64 << 20, "RLIMIT_NPROC": 256,
                   "RLIMIT_NOFILE": 1024}
SHOWN = 10_000  # bytes of stdout and of stderr kept in a Result
# What a program can do where a layer is missing.
HARM = {
    "pids": "outlive its run, and slow down your other processes",
    "network": "use the network",
    "files": "read and change every file that you can, tokens and keys included",
    "no new privileges": "use setuid programs",
    "limits": "use up memory, disk or processes",
}
# A fixed hash seed makes the order of sets, and with it the verdict, repeatable.
ENVIRONMENT = {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"}
GUARD_MARK = b"\0the guard of child.py"
STARTS_PROCESSES = re.compile(r"^\s*(?:import|from)\s+(?:multiprocessing|concurrent|subprocess)\b",
                              re.MULTILINE)
COMPILE_ERRORS = (SyntaxError, ValueError, RecursionError, MemoryError)  # all that compile() raises


@dataclass(frozen=True)
class Result:
    passed: bool  # the tests (without tests: the program) ran to their end and proved it
    stage: str  # where the run ended: "static" (did not compile), "run" (the code) or "tests"
    reason: str  # one line; "" if passed
    stdout: str
    stderr: str
    seconds: float  # wall time, including start-up
    isolation: tuple = ()  # the layers that held, as the child reports before it runs the code


def languages() -> dict[str, str]:
    """Return per language "" if `run` accepts it on this machine, else what is missing."""
    if os.name != "posix":
        return dict.fromkeys(LANGUAGES, "needs POSIX (Linux, macOS, WSL)")
    return {name: "" if find_commands(name) else row.install for name, row in LANGUAGES.items()}


@functools.lru_cache(None)
def isolation_gaps() -> dict[str, str]:
    """Return {layer: what a program can do without it} for the layers that do not hold here."""
    layers = run("pass").isolation
    gaps = {layer: harm for layer, harm in HARM.items() if layer not in layers}
    if "seccomp" in layers:  # it denies sockets
        gaps.pop("network", None)
    return gaps


def is_isolated() -> bool:
    """Return whether the layers hold without which the stages refuse to run a model's code."""
    return isolation_gaps().keys().isdisjoint(("files", "pids"))


class _GuardComparisons(ast.NodeTransformer):
    """Rewrite f(1) == 2 to guard(f(1), 7, True, False) == guard(2, 7, False, True), 7 being its
    number, and the last two whether the operand is the first, and whether it is the last.

    `comparison_guard` in child.py is that function; GUARD_MARK stands for it until then. An assert
    gets its own text as its message.
    """

    count = 0

    def visit_Compare(self, node):
        self.generic_visit(node)
        if any(isinstance(operator, (ast.Is, ast.IsNot)) for operator in node.ops):
            return node  # no class can overload these
        self.count += 1
        operands = [node.left, *node.comparators]
        for i, operand in enumerate(operands):
            place = (self.count, i == 0, i == len(operands) - 1)
            arguments = [operand, *map(ast.Constant, place)]
            operands[i] = ast.Call(ast.Constant(GUARD_MARK), arguments, [])
        node.left = operands[0]
        node.comparators = operands[1:]
        return node

    def visit_Assert(self, node):
        if node.msg is None:
            node.msg = ast.Constant(ast.unparse(node.test))
        return self.generic_visit(node)


@functools.lru_cache(1024)  # the same tests judge every response to a query
def _compile_tests(tests: str) -> bytes:
    """Return the marshalled code object of Python tests with guarded comparisons."""
    with warnings.catch_warnings():  # "\d" only warns, but is an error under -W error
        warnings.simplefilter("ignore")
        tree = _GuardComparisons().visit(ast.parse(tests, "tests"))
        code = compile(ast.fix_missing_locations(tree), "tests", "exec", dont_inherit=True)
    return marshal.dumps(code)


class _Answer(NamedTuple):
    """What the child said; the protocol stands in child.py."""

    layers: tuple[str, ...]
    dots: int  # the stages that it reached
    verdict: str  # one line, or ours if the child was late or died before its own


def _converse(link, message: bytes, timeout: float, check_seconds: float) -> _Answer:
    """Send the job and the keys, and return what the child answers (the protocol of child.py)."""
    answer = b""
    end = "killed before the end"
    checking = check_seconds > 0
    deadline = time.monotonic() + timeout + check_seconds
    try:
        link.settimeout(timeout + check_seconds)
        link.sendall(message)
        while answer.count(b"\n") < 2 and len(answer) < 8192:
            link.settimeout(max(deadline - time.monotonic(), 1e-3))
            chunk = link.recv(4096)
            if not chunk:
                break
            answer += chunk
            if checking and b"\n." in answer:  # it compiled: from now on its own time counts
                checking = False
                deadline = time.monotonic() + timeout
    except TimeoutError:
        end = f"time limit of {timeout:g} s"
    except ConnectionError:
        pass  # the child died before it had read everything
    layers, _, said = answer.decode("utf-8", "replace").partition("\n")
    verdict = said.lstrip(".")
    line, newline, _ = verdict.partition("\n")
    dots = len(said) - len(verdict)
    return _Answer(tuple(filter(None, layers.split(","))), dots, line if newline else end)


def _run_child(command, job: dict, key_b: str, timeout: float, check_seconds: float) -> tuple:
    """Start the child in an empty folder, converse, kill it; return (answer, stdout, stderr)."""
    packed = marshal.dumps(job)
    message = b"%010d%b%b" % (len(packed), packed, key_b.encode())
    # Output goes to nameless files: a pipe needs a reader, and its last holder may never end.
    link, child_end = socket.socketpair()
    # In the folder: only there does Landlock let the code open them again, as /dev/stdout.
    with (link,
          tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True) as folder,
          tempfile.TemporaryFile(dir=folder) as out, tempfile.TemporaryFile(dir=folder) as err):
        with child_end:
            process = subprocess.Popen(command, stdin=child_end, stdout=out, stderr=err,
                                       cwd=folder, env=ENVIRONMENT, start_new_session=True)
        try:
            answer = _converse(link, message, timeout, check_seconds)
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        most = COMPILER_LIMITS["RLIMIT_FSIZE"]
        return answer, os.pread(out.fileno(), most, 0), os.pread(err.fileno(), most, 0)


def _limits(row: Language, timeout: float, memory_mb: int, own_pids: bool) -> tuple[dict, dict]:
    """Return the limits of the check and of the run; the child can only lower them later."""
    check = COMPILER_LIMITS | {"RLIMIT_CPU": int(timeout + row.check_seconds) + 2,
                               "RLIMIT_DATA": max(2048, memory_mb) << 20}
    run = LIMITS | {"RLIMIT_CPU": int(timeout) + 2, row.memory_limit: memory_mb << 20}
    if not own_pids:  # then the kernel counts all threads of this user, those of other runs too
        present = count_threads() + LIMITS["RLIMIT_NPROC"] * (os.cpu_count() or 1)
        check["RLIMIT_NPROC"] += present
        run["RLIMIT_NPROC"] += present
    return check, run


def _first_error(stderr: str, stdout: str) -> str:
    """Return the first line in which a compiler or a runtime names an error, or the first line."""
    lines = [line.strip() for line in f"{stderr}\n{stdout}".splitlines() if line.strip()]
    errors = [line for line in lines if "rror" in line]
    return (errors + lines + [""])[0]


def _require_start(answer: _Answer, err: bytes) -> None:
    """Raise OSError if the sandbox itself failed: this is no verdict on the code, which comes after
    the layers and the first dot."""
    messages = err[-500:].decode("utf-8", "replace").strip().splitlines() or ["no message"]
    if answer.dots == 0 and answer.verdict == "too many processes":
        messages = [answer.verdict]
    elif answer.layers or answer.verdict.startswith("time limit"):
        return
    raise OSError(f"the sandbox could not start a process: {messages[-1]}")


def run(code: str, language: str = "python", tests: str = "", timeout: float = 5.0,
        memory_mb: int = 512) -> Result:
    """Run `code`, then `tests`, in a new process; whatever the code does is a Result.

    tests: in Python and in scripts, statements with asserts in the code's namespace; in C, C++,
        Java, Rust and Go, what holds main(), in Java the class Main.
    timeout: seconds of wall time. memory_mb: MiB of memory of each process.
    Raise RuntimeError if the language does not run here, OSError if no process can be started.
    """
    lack = languages().get(language, "not among " + ", ".join(LANGUAGES))
    if lack:
        raise RuntimeError(f"cannot run {language!r} here: {lack}")
    start = time.monotonic()
    row = LANGUAGES[language]
    is_python = language == "python"
    key_a = secrets.token_hex(16)
    key_b = secrets.token_hex(16)
    compiled_tests = b""
    try:
        if not code.strip():  # it would end without an error, and an empty answer must not pay
            raise ValueError("empty program")
        if is_python and tests.strip():
            compiled_tests = _compile_tests(tests)
        source = code if is_python else row.program(code, tests, key_a, key_b)
        source = source.encode()  # a lone surrogate is a ValueError
    except COMPILE_ERRORS as error:
        return Result(False, "static", " ".join(str(error).split()), "", "", 0.0)
    launcher = find_launcher()
    own_pids = launcher != ""
    if not own_pids:
        hide_memory()
    check_limits, run_limits = _limits(row, timeout, memory_mb, own_pids)
    may_fork = row.forks or is_python and STARTS_PROCESSES.search(code)
    job = visible_files() | {
        "file": row.file, "source": source, "commands": find_commands(language),
        "has_tests": bool(tests.strip()), "compiled_tests": compiled_tests,
        "guard_mark": GUARD_MARK, "key": key_a.encode(), "launcher": launcher,
        "check_limits": check_limits, "run_limits": run_limits,
        "filter": seccomp_filter(own_pids), "no_fork": b"" if may_fork else fork_filter(),
    }
    command = child_command(launcher)
    answer, out, err = _run_child(command, job, key_b, timeout, row.check_seconds)
    seconds = time.monotonic() - start
    _require_start(answer, err)
    proof_line = f"{key_a}{key_b}\n".encode()
    if is_python:
        passed = answer.verdict == key_a + key_b
    else:
        passed = answer.verdict == "exit status 0" and (proof_line in out or proof_line in err)
    stdout = out.replace(proof_line, b"")[:SHOWN].decode("utf-8", "replace")
    stderr = err.replace(proof_line, b"")[:SHOWN].decode("utf-8", "replace")
    reason = "" if passed else answer.verdict.strip()
    if reason.startswith("exit status") and not is_python:
        reason = f"{reason}: {_first_error(stderr, stdout)}".removesuffix(": ")
    stage = ("static", "run", "tests")[min(answer.dots, 2)]
    return Result(passed, stage, reason[:500], stdout, stderr, seconds, answer.layers)


def count_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # macOS lacks it
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run_many(jobs: list[dict], workers: int | None = None) -> list[Result]:
    """Return `run(**job)` of each job, in order, on `workers` threads (default: one per core).

    Identical jobs run once: a policy that converges repeats itself.
    """
    keys = [tuple(sorted(job.items())) for job in jobs]
    with ThreadPoolExecutor(workers or count_cores()) as pool:
        futures = {key: pool.submit(run, **dict(key)) for key in dict.fromkeys(keys)}
        return [futures[key].result() for key in keys]
