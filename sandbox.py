"""Run a model's code against unit tests under limits, and believe only a proven pass.

A policy under training searches for anything that its reward calls a pass, so three things
matter: never hang, never leak a process, never pay for a pass that is not one.

    run() --socket--> child: own session, limits, empty directory and environment
      1 read the tests and key A   2 compile   3 run the code   4 run the tests
      5 only now read key B from the socket; answering A + B is the pass

`sys.exit(0)`, `os._exit(0)`, a killed process or a printed "ok" never get to A + B and score 0.
`assert` is bytecode, so patching AssertionError changes nothing; patched builtins are put back
before the tests. In tests no comparison may mix a plain value and an object of a class made by
the code (its `__eq__` may always say yes), alone or inside a list, tuple, set or dict; the price:
an honest class of one's own, even a namedtuple, compares only with its like.

THIS IS A RESOURCE LIMITER, NOT A SECURITY BOUNDARY: run hostile code in a container or a VM. Not
stopped: reading and writing every file your user may; code that studies this file (frames hold A
and the tests, the socket holds B: having both forges a pass); patched library modules
(`math.fabs = ...`) and test globals; operators that do not compare (an `__sub__` that returns 0);
memory summed over processes; many small files; fork bombs of root, whom RLIMIT_NPROC does not
bind (the time limit ends them). Where `isolation()` is empty also the network, and grandchildren
that call setsid() or kill your other processes.

`python sandbox.py` shows verdicts. POSIX only; elsewhere `check` works, `run` raises RuntimeError.
"""
import ast
import contextlib
import functools
import marshal
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

# Per process. NPROC counts all processes of the user (of its namespace, where there is one).
LIMITS = {"RLIMIT_CORE": 0, "RLIMIT_FSIZE": 1 << 20, "RLIMIT_NPROC": 64, "RLIMIT_NOFILE": 64}
SHOWN = 10_000  # bytes of stdout and of stderr kept in a Result
INVALID = (SyntaxError, ValueError, RecursionError, MemoryError)  # all that compile() raises


@dataclass(frozen=True)
class Result:
    passed: bool  # the tests ran to their end (without tests: the program did) and proved it
    stage: str  # where it ended: "static" (did not compile), "run" (the code) or "tests"
    reason: str  # one line; "" when passed
    stdout: str
    stderr: str
    seconds: float  # wall time, start-up included


def _child():
    """The child's whole program. Its code object travels inside `python -c`: linted like any
    function, no parsing there. Hence no globals, no closures, and built-in modules only, because
    start-up is nearly all of the time of a run."""
    import builtins
    import marshal
    import posix
    import resource
    import sys

    def read(n):  # unbuffered: what is not asked for stays in the kernel
        data = b""
        while len(data) < n:
            data += posix.read(link, min(n - len(data), 1 << 20)) or posix._exit(3)
        return data

    link, names, saved = posix.dup(0), vars(builtins), dict(vars(builtins))
    posix.dup2(posix.open("/dev/null", posix.O_RDONLY), 0)
    posix.environ.clear()
    code, file, tests, limits, key = marshal.loads(read(int(read(10))))
    for name, value in limits.items():
        try:
            resource.setrlimit(getattr(resource, name), (value, value))
        except (AttributeError, OSError, ValueError):
            pass  # unknown to this system, or lower already
    # `if __name__ == "__main__"` is meant for a program, not for functions under test.
    module = type(sys)("candidate" if tests else "__main__")
    sys.modules[module.__name__] = module  # dataclasses, pickle and typing look it up
    scalars, held = {int, float, complex, bool, str, bytes, type(None)}, []
    inside = {kind: kind.__iter__ for kind in (list, tuple, set, frozenset)} | {dict: dict.items}

    def foreign(x):  # does x hold an object whose comparisons the tested code may have written?
        kind = type(x)
        if kind in scalars:
            return False
        home = sys.modules.get(kind.__module__)
        if kind.__flags__ & 1 << 9 and (  # the flag of every class that Python code made
                home is module or getattr(home, kind.__name__, None) is not kind):
            return True  # and no library module holds it, unlike Counter or Fraction
        return any(any(map(foreign, items(x))) for base, items in inside.items()
                   if issubclass(kind, base))

    def side(x, count):  # around each operand of a comparison; the last one knows how many
        held.append(foreign(x))
        if count and len(set(held[-count:])) == 2:
            raise TypeError("a plain value compared with an object of the code's own class")
        return x

    write, leave, report = posix.write, posix._exit, sys.excepthook
    try:
        program = compile(code, file, "exec", dont_inherit=True)
        write(link, b".")  # a dot a stage: the stage is known even if the process dies
        exec(program, vars(module))
        if tests:
            write(link, b".")
            names.clear()
            names.update(saved)
            vars(module).update(__builtins__=builtins, __side__=side)
            exec(marshal.loads(tests), vars(module))
        write(link, key + read(32) + b"\n")
        leave(0)  # at once: no atexit handlers, no waiting for threads
    except BaseException as error:  # SystemExit too: the end was not reached
        names.update(saved)
        report(type(error), error, error.__traceback__)
        text = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        write(link, text.encode("utf-8", "replace") + b"\n")
        leave(1)


class _Sides(ast.NodeTransformer):
    def visit_Compare(self, node):  # f(1) == 2  ->  __side__(f(1), 0) == __side__(2, 2)
        self.generic_visit(node)
        if not any(isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops):  # not overloadable
            counts = [0] * len(node.ops) + [len(node.ops) + 1]
            node.left, *node.comparators = [
                ast.Call(ast.Name("__side__", ast.Load()), [x, ast.Constant(n)], [])
                for x, n in zip([node.left, *node.comparators], counts, strict=True)]
        return node

    def visit_Assert(self, node):
        node.msg = node.msg or ast.Constant(ast.unparse(node.test))
        return self.generic_visit(node)


@functools.lru_cache(1024)  # the same tests judge every response to a query
def _compile_python(source: str, file: str) -> bytes:
    with warnings.catch_warnings():  # "\d" only warns, but is an error under -W error
        warnings.simplefilter("ignore")
        tree = ast.parse(source, file)
        if file == "tests":
            tree = ast.fix_missing_locations(_Sides().visit(tree))
        return marshal.dumps(compile(tree, file, "exec", dont_inherit=True))


# A language a row: the program's file name, (source, file name) -> what the child executes (raises
# INVALID), the command of the child. A code object fits only the Python that made it.
# -s -S: no site-packages, twice as fast. -B: no cache files. -u: what was printed survives a kill.
LANGUAGES = {"python": ("main.py", _compile_python, (
    sys.executable, "-s", "-S", "-B", "-u", "-c",
    f"import marshal\nexec(marshal.loads({marshal.dumps(_child.__code__)!r}))"))}


def languages() -> list[str]:
    """The languages that `run` accepts on this machine."""
    return [name for name, row in LANGUAGES.items() if os.name == "posix" and row[2][0]]


def check(code: str, language: str = "python") -> str:
    """"" when the code compiles, else one line why not; KeyError for an unknown language. Executes
    nothing, but parses here; `run` does it in the child, where a crash of the parser is only a
    verdict."""
    file, compiler, _ = LANGUAGES[language]
    try:
        compiler(code, file)
    except INVALID as error:
        return " ".join(f"{type(error).__name__}: {error}".split())
    return "" if code.strip() else "empty program"


@functools.lru_cache(None)
def isolation() -> tuple:
    """The command that gives a child no network and its own process ids: when their first process
    dies the kernel kills the rest (--kill-child: even if setsid() took it out of our kill's reach).
    Empty where the system lacks it or forbids it. Costs a few ms a run."""
    prefix = (shutil.which("unshare"), "--user", "--map-root-user", "--net", "--pid", "--fork",
              "--kill-child")
    return prefix if prefix[0] and not subprocess.run(
        [*prefix, "true"], capture_output=True, timeout=10).returncode else ()


def run(code: str, language: str = "python", tests: str = "", timeout: float = 5.0,
        memory_mb: int = 512) -> Result:
    """Runs `code`, then `tests` (statements with asserts, in the same namespace) in a new process.
    `timeout`: seconds of wall time; `memory_mb`: MiB of address space of each process. Whatever the
    code does is a Result; raises RuntimeError when the language does not run here, OSError when no
    process can be started."""
    if language not in languages():
        raise RuntimeError(f"cannot run {language!r} here; can: {languages()} (POSIX only)")
    (file, compiler, command), start = LANGUAGES[language], time.monotonic()
    try:
        prepared = compiler(tests, "tests") if tests.strip() else b""
        source = code.encode()  # a lone surrogate is a ValueError
        if not code.strip():  # it would end without an error, and an empty answer must not pay
            raise ValueError("empty program")
    except INVALID as error:
        return Result(False, "static", " ".join(str(error).split()), "", "", 0.0)
    limits = LIMITS | {"RLIMIT_CPU": int(timeout) + 2, "RLIMIT_AS": memory_mb << 20}
    key_a, key_b = secrets.token_hex(16).encode(), secrets.token_hex(16).encode()
    message = marshal.dumps((source, file, prepared, limits, key_a))
    (link, theirs), answer, late = socket.socketpair(), b"", False
    # Output goes to nameless files: a pipe needs a reader, and its last holder may never end.
    with (link, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err,
          tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True) as folder):
        with theirs:  # the fixed hash seed keeps the order of sets, so the verdict, repeatable
            process = subprocess.Popen(
                [*isolation(), *command], stdin=theirs, stdout=out, stderr=err, cwd=folder,
                env={"PYTHONHASHSEED": "0", "PYTHONUTF8": "1"}, start_new_session=True)
        try:
            with contextlib.suppress(ConnectionError):  # it died before it had read all
                link.settimeout(max(timeout, 1e-3))
                link.sendall(b"%010d%b%b" % (len(message), message, key_b))
                while not answer.endswith(b"\n") and len(answer) < 4096:
                    link.settimeout(max(start + timeout - time.monotonic(), 1e-3))
                    chunk = link.recv(4096)
                    if not chunk:
                        break
                    answer += chunk
            if not answer.endswith(b"\n"):
                process.wait(1)  # to learn how it died, before the kill
        except (TimeoutError, subprocess.TimeoutExpired):
            late = True
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        texts = [os.pread(f.fileno(), SHOWN, 0).decode("utf-8", "replace") for f in (out, err)]
    said = answer.lstrip(b".")
    stage = ("static", "run", "tests")[min(len(answer) - len(said), 2)]
    passed = secrets.compare_digest(said, key_a + key_b + b"\n")
    reason = "" if passed else said.decode("utf-8", "replace").strip()
    if late:
        reason = f"time limit of {timeout:g} s"
    elif not said.endswith(b"\n"):  # a negative status is the number of the signal
        reason = f"exit status {process.returncode} before the end"
    return Result(passed, stage, reason, *texts, time.monotonic() - start)


def run_many(jobs: list[dict], workers: int | None = None) -> list[Result]:
    """`run(**job)` for each job, in order, on `workers` threads (default: one a usable core).
    Identical jobs run once: a policy that converges repeats itself."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    keys = [tuple(sorted(job.items())) for job in jobs]
    with ThreadPoolExecutor(workers or cores) as pool:
        futures = {key: pool.submit(run, **dict(key)) for key in dict.fromkeys(keys)}
        return [futures[key].result() for key in keys]


def main():
    tests = "assert f(2) == 4\nassert f(3) == 9"
    good = "def f(x): return x * x\n"
    demos = {
        "good": good, "wrong": "def f(x): return x + x", "syntax error": "def f(x:",
        "endless loop": "while True: pass", "10 GB": "x = bytearray(10 ** 10)",
        "output flood": "while True: print('x' * 9999)", "sys.exit(0)": "import sys; sys.exit(0)",
        "os._exit(0)": "import os; os._exit(0)", "prints ok": "f = lambda x: print('passed')",
        "__eq__": "class E:\n def __eq__(self, other): return True\ndef f(x): return E()",
        "grandchild": good + "import os, time\nif os.fork() == 0: os.setsid(), time.sleep(99)",
        "network": good + "import socket; socket.create_connection(('192.0.2.1', 80), 0.5)"}
    print(f"languages {languages()}; network and processes isolated: {bool(isolation())}")
    results = run_many([{"code": code, "tests": tests, "timeout": 2.0} for code in demos.values()])
    for name, r in zip(demos, results, strict=True):
        print(f"{name:13}{'PASS' if r.passed else 'fail':5}{r.stage:7}{r.seconds:6.3f} s "
              f"{r.reason[:90]}")


if __name__ == "__main__":
    main()
