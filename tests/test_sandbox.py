"""tasks/sandbox against its requirements R9.1-R9.4; the oracles are /proc, a plain interpreter and
published solutions. Run with -s to see the rates."""
import ast
import dataclasses
import json
import os
import pathlib
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types

import pytest

from helpers import stage_args
from lib.args import InputError
from tasks import sandbox
from tasks.queries import Program, require_isolation, run_programs
from tasks.sandbox.isolation import (
    child_command,
    count_threads,
    find_launcher,
    seccomp_filter,
    visible_files,
)
from tasks.sandbox.languages import Language, find_commands, find_program

ROOT = pathlib.Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data" / "code"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="no ../shared/data")
needs_proc = pytest.mark.skipif(not pathlib.Path("/proc/self/stat").exists(), reason="no /proc")
pytestmark = pytest.mark.skipif(os.name != "posix", reason="run() needs POSIX")

HERE = [name for name, lack in sandbox.languages().items() if not lack]

GOOD = "def f(x):\n    return x * x\n"
WRONG = "def f(x):\n    return x + x\n"
TESTS = "assert f(2) == 4\nassert f(3) == 9"


@pytest.fixture(autouse=True)
def forget_gaps():
    yield
    sandbox.isolation_gaps.cache_clear()


def forbid_namespaces(monkeypatch):
    """As on systems that lack or refuse them."""
    monkeypatch.setattr(sandbox, "find_launcher", lambda: "")
    sandbox.isolation_gaps.cache_clear()


def works(launcher):
    """Whether the launcher starts a child, which finds no job and ends with status 3."""
    command = child_command(launcher)
    return shutil.which(command[0]) and subprocess.run(command, stdin=subprocess.DEVNULL,
                                                       capture_output=True).returncode == 3


@pytest.fixture(params=["unshare", "bwrap", ""], ids=["unshare", "bwrap", "bare"])
def isolation(request, monkeypatch):
    """All ways to start a child: in namespaces, and as on systems that lack them."""
    if not works(request.param):
        pytest.skip(f"{request.param} is missing or not allowed here")
    monkeypatch.setattr(sandbox, "find_launcher", lambda: request.param)
    return request.param


@pytest.fixture
def may_fork(monkeypatch):
    """Forks in every language, as in bash or without libseccomp: what they leave must die."""
    monkeypatch.setattr(sandbox, "fork_filter", lambda: b"")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Private directories are made here, so a process of a run is known by its cwd."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    OTHERS.clear()
    if pathlib.Path("/proc/self/stat").exists():
        OTHERS.update(alive(tmp_path))
    return tmp_path


OTHERS = {}  # containers of this machine, alive before a test


def alive(folder):
    """{pid: start time} of processes that work in the folder, or in any process ids but ours."""
    found, ours = {}, os.readlink("/proc/self/ns/pid")
    for entry in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(entry / "cwd").startswith(str(folder)) or (
                    os.readlink(entry / "ns/pid") != ours):
                found[entry.name] = (entry / "stat").read_text().rpartition(")")[2].split()[19]
        except OSError:
            pass
    return found


def children():
    """Processes, zombies included, whose parent is this one."""
    found = []
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == os.getpid():
            found.append(stat.parent.name)
    return found


def assert_nothing_left(folder):
    """Of what is alive now, and was not before, nothing is in a few seconds: SIGKILL is sent, the
    kernel may need a moment, and other users' sandboxes may run on this machine."""
    end, suspects = time.monotonic() + 12, alive(folder).items() - OTHERS.items()
    while suspects and time.monotonic() < end:
        time.sleep(0.02)
        suspects &= alive(folder).items()
    assert not suspects and children() == [] and list(folder.iterdir()) == []


def rows(name):
    return [json.loads(line) for line in (DATA / name).read_text().splitlines()]


def benchmark_jobs():
    jobs = [{"code": r["prompt"] + r["canonical_solution"],
             "tests": f"{r['test']}\ncheck({r['entry_point']})"} for r in rows("humaneval.jsonl")]
    jobs += [{"code": r["code"], "tests": "\n".join([r["test_setup_code"], *r["test_list"]])}
             for r in rows("mbpp_train.jsonl")]
    return [{**job, "timeout": 20.0} for job in jobs]


def test_good_and_wrong(isolation):
    r = sandbox.run(GOOD + "print('hi')", tests=TESTS)
    assert (r.passed, r.stage, r.reason, r.stdout) == (True, "tests", "", "hi\n")
    assert 0 < r.seconds < 5
    r = sandbox.run(WRONG, tests=TESTS)
    assert (r.passed, r.stage, r.reason) == (False, "tests", "AssertionError: f(3) == 9")
    r = sandbox.run("x = 1 / 0")
    assert (r.passed, r.stage) == (False, "run") and "ZeroDivisionError" in r.reason
    assert "line 1" in r.stderr
    assert sandbox.run("print(input)\nif __name__ == '__main__': print('main')").stdout.endswith(
        "main\n")
    assert sandbox.run(GOOD + "if __name__ == '__main__': f(int(input()))", tests=TESTS).passed


def test_static_check():
    for code in ("def f(x:", "x = '", "\0", "x = '\ud800'", "1" + "+1" * 100_000, "", " \n"):
        r = sandbox.run(code, tests="assert True")
        assert not r.passed and r.stage in ("static", "run") and r.reason and "\n" not in r.reason
    assert sandbox.run("f(", tests=TESTS).stage == "static"
    broken = sandbox.run(GOOD, tests="assert (")
    assert not broken.passed and "tests" in broken.reason


E = "class E:\n    def __eq__(self, o): return True\n    def __hash__(self): return hash(4)\n"
CHEATS = {  # R9.4: each defines an f that is wrong, and must not pass
    "sys.exit": "import sys; sys.exit(0)",
    "sys.exit in f": "import sys\ndef f(x): sys.exit(0)",
    "os._exit": "import os; os._exit(0)",
    "os._exit in f": "import os\ndef f(x): os._exit(0)",
    "SystemExit": "raise SystemExit",
    "kill": "import os; os.kill(os.getpid(), 9)\nos.abort()",
    "exec": "import os\ndef f(x): os.execv('/bin/true', ['true'])",
    "atexit": WRONG + "import atexit, os\natexit.register(os._exit, 0)",
    "excepthook": WRONG + "import sys, os\nsys.excepthook = lambda *a: os._exit(0)",
    "prints": WRONG + "print('passed\\n', flush=True)",
    "AssertionError": WRONG + "import builtins\nclass A(Exception): pass\n"
    "builtins.AssertionError = A\nAssertionError = None",
    "builtins": WRONG + "import builtins\nbuiltins.exec = builtins.compile = lambda *a: None\n"
    "builtins.len = builtins.getattr = builtins.any = builtins.set = lambda *a: 0",
    "__eq__": "class E:\n    def __eq__(self, o): return True\ndef f(x): return E()",
    "__eq__ of an int": "class E(int):\n    def __eq__(self, o): return True\ndef f(x): return E()",
    "__eq__ = bool": "class E:\n    __eq__ = bool\ndef f(x): return E()",
    "__module__": "class E:\n    __module__ = 'builtins'\n    def __eq__(s, o): return True\n"
    "def f(x): return E()",
    "metaclass": "class M(type):\n    def __eq__(s, o): return True\nclass E(metaclass=M): pass\n"
    "def f(x): return E",
    "marshal": WRONG + "import marshal\nmarshal.loads = lambda b: compile('', 'x', 'exec')",
    "__main__": WRONG + "import __main__\n__main__.exec = lambda *a: None",
    "dunder side": WRONG + "__guard__ = lambda x, n, first: 4",
    "trace": WRONG + "import sys\nsys.settrace(lambda *a: None)",
    "mock.ANY": "from unittest.mock import ANY\ndef f(x): return ANY",
    "ALWAYS_EQ": "from test.support import ALWAYS_EQ\ndef f(x): return ALWAYS_EQ",
    "weakref.proxy": E + "import weakref\ne = E()\ndef f(x): return weakref.proxy(e)",
    "mappingproxy": "import types\nclass D(dict):\n    def __eq__(self, o): return True\n"
    "d = D()\ndef f(x): return types.MappingProxyType(d)",
    "UserList": E + "import collections\n"
    "def f(x):\n    u = collections.UserList(); u.data = E(); return u",
    "Fraction": E + "import fractions\n"
    "def f(x):\n    q = fractions.Fraction(1); q._numerator = E(); return q",
    "metaclass flags": "class M(type):\n    __flags__ = 0\nclass E(metaclass=M):\n"
    "    def __eq__(s, o): return True\ndef f(x): return E()",
    "metaclass hash": "class M(type):\n    def __eq__(s, o): return True\n"
    "    def __hash__(s): return hash(int)\nclass E(metaclass=M):\n"
    "    def __eq__(s, o): return True\ndef f(x): return E()",
    "class in a library": E + "import math\nE.__module__ = 'math'\nmath.E = E\n"
    "def f(x): return E()",
    "class in Counter's place": E + "import collections\ncollections.Counter = E\n"
    "E.__module__ = 'collections'\nE.__name__ = E.__qualname__ = 'Counter'\n"
    "def f(x): return E()",
    "module of its own": "import sys, types\nm = sys.modules['m'] = types.ModuleType('m')\n"
    "exec('class E:\\n    def __eq__(s, o): return True', m.__dict__)\ndef f(x): return m.E()",
    "type patched in f": E + "import builtins\ndef f(x):\n"
    "    builtins.type = builtins.id = lambda o: int\n    return E()",
    "guard patched in f": "def f(x):\n    globals()['__guard__'] = lambda *a: 0\n    return 0",
    "copies that guess": """
import os, sys
class Quiet:
    def write(self, text): os._exit(0)
    def flush(self): pass
sys.stderr = Quiet()
def f(x):
    for guess in range(10):
        if (pid := os.fork()) == 0: return guess
        if os.waitpid(pid, 0)[1]: return guess  # it had nothing to report, so it passed
""",
    "writes on all fds": WRONG + "import os\nfor fd in range(3, 20):\n"
    "    try: os.write(fd, b'..passed\\n')\n    except OSError: pass",
    "frames": WRONG + """
import os, sys
frame, seen = sys._getframe(), []
while frame:
    seen += [v for v in frame.f_locals.values() if isinstance(v, bytes)]
    frame = frame.f_back
for fd in range(3, 20):
    for value in seen:
        try: os.write(fd, b'..' + value + b'\\n')
        except OSError: pass
""",
    "reads all fds": WRONG + """
import os
for fd in range(3, 20):
    try:
        os.set_blocking(fd, False)
        data = os.read(fd, 9999)
        os.write(fd, b'.' + data + b'\\n')
    except OSError: pass
""",
}


@pytest.mark.parametrize("name", CHEATS)
def test_cheats_score_zero(name):
    """R9.4"""
    r = sandbox.run(CHEATS[name], tests=TESTS, timeout=3.0)
    assert not r.passed and r.reason, r


def test_an_operand_is_seen_as_it_is_compared():
    """A list that was plain when the first operand was read, and is not when it is compared."""
    code = E + "l = []\ndef f(x): return l\ndef g(x):\n    l.append(E())\n    return [4]"
    assert not sandbox.run(code, tests="assert f(2) == g(4)").passed
    holds = "assert f(2).keys() == {4}"
    assert not sandbox.run(E + "def f(x): return {E(): 1}", tests=holds).passed
    assert sandbox.run("def f(x): return {2 * x: 1}", tests=holds).passed
    deque = "import collections\nassert f(2) == collections.deque([4])"
    assert not sandbox.run(
        E + "from collections import deque\ndef f(x): return deque([E()])", tests=deque).passed
    assert sandbox.run(
        "from collections import deque\ndef f(x): return deque([x + x])", tests=deque).passed


def test_a_trace_function_cannot_jump():
    code = ("import sys\ndef jump(frame, event, arg):\n"
            "    if event == 'line' and frame.f_lineno == 2: frame.f_lineno = 3\n    return jump\n"
            "def f(x):\n    sys.settrace(jump); sys._getframe(1).f_trace = jump\n    return 4")
    assert not sandbox.run(code, tests=TESTS + "\ndone = 1").passed


def test_a_copy_proves_nothing(may_fork):
    """Where no filter denies fork, a copy that reaches the end of the tests has no proof."""
    code = "import os\ndef f(x):\n    if os.fork(): os.wait(); os._exit(0)\n    return x * x"
    assert not sandbox.run(code, tests=TESTS).passed


def test_patched_builtins_are_put_back():
    """R9.4"""
    code = "import builtins\ndef f(x):\n    builtins.abs = lambda x: 0\n    return 0"
    assert not sandbox.run(code, tests="f(1)\nassert abs(f(3) - 9) < 1e-6").passed
    code = WRONG + "import builtins\nbuiltins.abs = lambda x: 0\nbuiltins.all = lambda x: True"
    assert not sandbox.run(code, tests="assert abs(f(3) - 9) < 1e-6").passed
    assert not sandbox.run(code, tests="assert all(f(i) == i * i for i in range(9))").passed


@pytest.mark.parametrize("tests", [
    "assert set(f((3, 4))) == set((3,))",
    "def check(g):\n    assert set(g((3, 4))) == {3}\ncheck(f)",
    "for i in range(3):\n    assert f([i]) == [i + 1]", "assert abs(f([2])) == 3",
    "def test():\n    assert all(f([i]) == i for i in range(3))\ntest()"])
def test_a_builtin_that_the_code_hides_is_there_for_the_tests(tests):
    code = ("def f(x): return ()\ndef set(x): return 0\nrange = lambda *x: []\n"
            "def abs(x): return 3\ndef all(x): return True")
    assert not sandbox.run(code, tests=tests).passed


def test_a_function_may_have_the_name_of_a_builtin():
    """The tests may ask for it, and helpers of the code may have such a name."""
    code = "def sum(a, b): return a * b\ndef f(a): return sum(a, a)"
    assert sandbox.run(code, tests="assert sum(3, 4) == 12").passed
    assert sandbox.run(code, tests="def check(g):\n    assert g(3, 4) == 12\ncheck(sum)").passed
    assert sandbox.run(code, tests="assert f(3) == 9 and sum([1, 2]) == 3").passed
    assert sandbox.run(code, tests="import math\nassert f(math.floor(3.5)) == 9").passed


@pytest.mark.parametrize("tests", [
    "assert f(1) == 2", "assert 2 == f(1)", "assert not f(1) != 2", "assert f(1) in [2, 3]",
    "assert 2 in f(1)", "assert 1 < f(1) < 3", "assert [f(1)] == [2]", "assert (1, f(1)) == (1, 2)",
    "assert {'a': [f(1)]} == {'a': [2]}", "assert {f(1)} == {2}", "def check(g):\n"
    "    assert g(1) == 2\ncheck(f)", "assert all(f(i) == i + 1 for i in range(3))",
    "assert f(1) == (2 == 2)", "assert f(1) == len([x for x in range(9) if x > 2])",
    "assert f(1) in [x for x in range(9) if x > 2]", "def other(n):\n"
    "    return 1 if n < 2 else n * other(n - 1)\nassert f(3) == other(3)"])
def test_always_equal_object(tests):
    """R9.4: an object that agrees to every comparison, in the shapes in which tests compare."""
    yes = "\n".join(f"    def __{m}__(self, o): return True"
                    for m in "eq lt le gt ge contains".split())
    evil = f"class E:\n{yes}\n    def __ne__(self, o): return False\n    def __hash__(self):" \
           " return hash(2)\ndef f(x): return E()"
    namespace = {}
    exec(evil + "\n" + tests, namespace)  # it does fool a plain interpreter
    assert not sandbox.run(evil, tests=tests).passed


def test_honest_objects_compare():
    """The rewriting of comparisons must not cost honest code its pass."""
    code = ("import collections, dataclasses, fractions, decimal\n"
            "def count(s): return collections.Counter(s)\n"
            "def half(): return fractions.Fraction(1, 2)\n"
            "def group():\n    d = collections.defaultdict(list); d[1].append(2); return d\n"
            "@dataclasses.dataclass\nclass P:\n    x: int\n"
            "def nothing(): return None\n")
    tests = ("assert count('aab') == {'a': 2, 'b': 1}\nassert half() == 0.5\n"
             "assert group() == {1: [2]}\nassert P(1) == P(1) and P(1) != P(2)\n"
             "assert [P(1)] == [P(1)] and P(1) is not None and P(3) in [P(2), P(3)]\n"
             "assert nothing() is None and nothing() == None\nassert 1 < 2 < 3 and not 1 < 3 < 2\n"
             "assert 'a' not in 'xyz' and 1 not in {2: 1} and abs(half() - 0.5) < 1e-9\n"
             "assert type(half()) == fractions.Fraction and decimal.Decimal('1') == 1\n"
             "assert [x for x in range(9) if x % 2 == 0 and x > 3] == [4, 6, 8]")
    r = sandbox.run(code, tests=tests)
    assert r.passed, r
    assert not sandbox.run(code, tests="assert P(1) == P(2)").passed


@pytest.mark.parametrize("code, reason", [
    ("while True: pass", "time"), ("import time; time.sleep(99)", "time"),
    ("import signal, time\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n"
     "    except (OSError, ValueError): pass\nwhile True: time.sleep(9)", "time"),
    ("while True:\n    try:\n        while True: pass\n    except BaseException: pass", "time"),
    ("import os, time\nos.closerange(0, 99)\ntime.sleep(99)", "time"),  # closes the socket
    ("x = bytearray(10 ** 10)", "MemoryError"),
    ("x = []\nwhile True: x.append(bytearray(10 ** 8))", "MemoryError"),
    ("while True: print('x' * 10 ** 4)", "File too large"),
    ("with open('big', 'wb') as f:\n    while True: f.write(bytes(10 ** 6))", "File too large"),
    ("x = [open('/dev/null') for _ in range(1000)]", "Too many open files"),
    ("def f(): f()\nf()", "RecursionError"), ("input()", "EOFError"),
    ("import sys; sys.exit(0)", "SystemExit"), ("import os; os._exit(7)", "exit status 7"),
    ("import ctypes; ctypes.string_at(0)", "exit status -11")])
def test_limits(code, reason, folder):
    """R9.2: every way to use too much ends in time, fails for that reason, and leaves nothing."""
    r = sandbox.run(code, tests="assert True", timeout=1.0 if reason == "time" else 9.0)
    assert not r.passed and r.stage == "run" and reason in r.reason and r.seconds < 10
    assert len(r.stdout) <= sandbox.SHOWN
    assert_nothing_left(folder)


def test_limits_are_set():
    """R9.2: those too that the tests above cannot meet (root has no NPROC)."""
    most = 64 if find_launcher() else count_threads() + 64 * os.cpu_count() + 99
    tests = ("import resource\nassert resource.getrlimit(resource.RLIMIT_CPU) == (9, 9)\n"
             "assert resource.getrlimit(resource.RLIMIT_AS)[0] == 256 << 20\n"
             f"assert resource.getrlimit(resource.RLIMIT_NPROC)[0] <= {most}")
    assert sandbox.run("pass", tests=tests, timeout=7.5, memory_mb=256).passed


FORK = "import os, time\nfor _ in range({n}):\n    if os.fork() == 0:\n        {child}\n"


@needs_proc
@pytest.mark.parametrize("child, n", [("time.sleep(99)", 50), (
    "os.close(1)\n        os.execv('/bin/sleep', ['sleep', '99'])", 5)])
@pytest.mark.parametrize("end", ["", "time.sleep(99)", "os._exit(0)"])
def test_grandchildren_are_killed(child, n, end, isolation, folder, may_fork):
    """R9.1: forked processes that hold the socket and the output end with the run. (50: within
    NPROC; root is not bound by it, so that a real bomb would be no bounded test.)"""
    start = time.monotonic()
    r = sandbox.run(GOOD + FORK.format(n=n, child=child) + end, tests=TESTS, timeout=1.2)
    assert time.monotonic() - start < 4
    assert r.passed == (end == "")
    assert_nothing_left(folder)


@needs_proc
def test_setsid_does_not_escape_namespaces(folder, may_fork):
    """R9.1: a daemon that left the session dies too, whether or not the program itself left."""
    if "pids" not in sandbox.run("pass").isolation:
        pytest.skip("no user namespaces here; documented as not stopped")
    daemon = FORK.format(n=3, child="os.setsid(); time.sleep(99)")
    assert sandbox.run(GOOD + daemon, tests=TESTS).passed
    assert_nothing_left(folder)
    leader = "import os\nos.setsid()\n" + daemon + "time.sleep(99)"
    assert not sandbox.run(leader, timeout=1.0).passed
    assert_nothing_left(folder)
    sandbox.run("import os, signal\nos.kill(-1, signal.SIGKILL)")  # we are still here to see this


@needs_proc
def test_many_time_outs_leave_nothing(isolation, folder, may_fork):
    """R9.1: 30 time-outs with a grandchild each: no process, no zombie, flat memory and fds."""
    def rss():
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    code = FORK.format(n=1, child="time.sleep(99)") + "time.sleep(99)\n"
    sandbox.run_many([{"code": code + f"#{i}", "timeout": 0.2} for i in range(4)], 4)
    memory, fds = rss(), len(os.listdir("/proc/self/fd"))
    results = sandbox.run_many([{"code": code + f"{i}", "timeout": 0.2} for i in range(30)], 4)
    assert all(not r.passed and "time limit" in r.reason for r in results)
    assert rss() - memory < 4 << 20 and len(os.listdir("/proc/self/fd")) == fds
    assert_nothing_left(folder)


def test_environment_is_private(isolation, folder, monkeypatch):
    """R9.3"""
    monkeypatch.setenv("SECRET_TOKEN", "s3cret")
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = ("import os, sys, socket\nprint(dict(os.environ), os.listdir(), os.getcwd())\n"
                "open('x', 'w').write('x')\nos.mkdir('d'); open('d/y', 'w').close()\n"
                "os.chmod('d', 0)\nprint(repr(sys.stdin.read()))\n"
                f"socket.create_connection({server.getsockname()}, 1)")
        r = sandbox.run(code)
    first, second = r.stdout.splitlines()
    home = "/tmp" if "files" in r.isolation else str(folder)
    assert first.startswith("{} [] " + home) and second == "''"
    assert r.passed != ({"network", "seccomp"} & {*r.isolation} != set()), r  # not even loopback
    assert "s3cret" not in sandbox.run("import subprocess\nprint(subprocess.run('/usr/bin/env', "
                                       "capture_output=True))").stdout
    assert list(folder.iterdir()) == []


def test_verdict_is_repeatable():
    """The order of a set of strings depends on the hash seed; a reward must not."""
    jobs = [{"code": f"print(list({{'a', 'b', 'c', 'd'}})) #{i}"} for i in range(6)]
    assert len({r.stdout for r in sandbox.run_many(jobs)}) == 1


def test_run_many(monkeypatch):
    jobs = [{"code": GOOD, "tests": TESTS}, {"code": WRONG, "tests": TESTS},
            {"tests": TESTS, "code": GOOD}, {"code": "f(", "tests": TESTS}] * 2
    calls, real = [], sandbox.run
    monkeypatch.setattr(sandbox, "run", lambda **job: calls.append(job) or real(**job))
    results = sandbox.run_many(jobs, workers=3)
    assert [r.passed for r in results] == [True, False, True, False] * 2
    assert len(calls) == 3 and sandbox.run_many([]) == []


def test_large_and_odd_inputs():
    big = GOOD + "x = '" + "é" * 400_000 + "'\n"
    assert sandbox.run(big, tests="assert len(x) == 400_000").passed
    assert not sandbox.run("import os; os._exit(0)" + " " * 10 ** 6, tests=TESTS).passed
    assert sandbox.run("print('é')").stdout == "é\n"
    assert sandbox.run("import os; os.write(1, b'\\xff')").stdout == "\ufffd"


def test_refused_elsewhere(monkeypatch):
    """R9.2: no POSIX module is needed to import; running is refused with the reason."""
    program = (
        "import os, sys, signal\nfor n in ('resource', 'fcntl'):\n"
        "    sys.modules[n] = None\nfor n in ('fork', 'killpg', 'setsid'): delattr(os, n)\n"
        "del signal.SIGKILL, signal.SIGALRM\nfrom tasks import sandbox\nprint(sandbox.languages())"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "python" in done.stdout, done.stderr
    with pytest.raises(RuntimeError, match="cobol"):
        sandbox.run(GOOD, language="cobol")
    monkeypatch.setattr(sandbox, "os", types.SimpleNamespace(name="nt"))
    assert all("POSIX" in lack for lack in sandbox.languages().values())
    with pytest.raises(RuntimeError, match="POSIX"):
        sandbox.run(GOOD)


def mutants(jobs, count):
    """One operator or small constant of the solution changed."""
    swaps = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Lt: ast.LtE, ast.Gt: ast.Lt,
             ast.LtE: ast.Gt, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
             ast.Mod: ast.Mult, ast.And: ast.Or, ast.Or: ast.And, ast.FloorDiv: ast.Mult}
    rng, out = random.Random(0), []
    for job in rng.sample(jobs, len(jobs)):
        tree = ast.parse(job["code"])
        spots = [n for n in ast.walk(tree) if type(getattr(n, "op", None)) in swaps
                 or isinstance(n, ast.Compare) and type(n.ops[0]) in swaps
                 or isinstance(n, ast.Constant) and type(n.value) is int]
        if spots and len(out) < count:
            node = rng.choice(spots)
            if isinstance(node, ast.Constant):
                node.value += 1
            elif isinstance(node, ast.Compare):
                node.ops[0] = swaps[type(node.ops[0])]()
            else:
                node.op = swaps[type(node.op)]()
            out.append({**job, "code": ast.unparse(tree)})
    return out


def plain_verdict(job):
    """Second implementation: an interpreter without any defence. None: out of time."""
    program = f"{job['code']}\n{job['tests']}\n"
    try:
        return subprocess.run([sys.executable, "-S", "-"], input=program, text=True,
                              capture_output=True, timeout=job["timeout"]).returncode == 0
    except subprocess.TimeoutExpired:
        return None


def judge_mutants(count):
    jobs = [{**job, "timeout": 1.5} for job in mutants(benchmark_jobs(), count)]
    results = sandbox.run_many(jobs)
    rate = sum(not r.passed for r in results) / len(jobs)
    print(f"\nmutants that fail: {rate:.1%} of {len(jobs)}")
    assert rate > 0.7
    for job, r in list(zip(jobs, results, strict=True))[:100]:
        plain = None if "time limit" in r.reason else plain_verdict(job)
        assert plain in (None, r.passed), (job, r)


@needs_data
def test_canonical_solutions_pass():
    jobs = random.Random(0).sample(benchmark_jobs(), 40)
    results = sandbox.run_many(jobs)
    assert [r for r in results if not r.passed] == []
    print(f"\n{sum(r.seconds for r in results) / len(results) * 1e3:.1f} ms a run")


@needs_data
def test_mutants_fail():
    """Verdicts equal those of a plain interpreter, and most mutants are caught."""
    judge_mutants(20)


@pytest.mark.slow
@needs_data
def test_all_canonical_solutions_and_mutants():
    failed = [r for r in sandbox.run_many(benchmark_jobs()) if not r.passed]
    assert failed == []
    judge_mutants(500)


@pytest.mark.slow
@needs_proc
def test_200_time_outs(isolation, folder, may_fork):
    """R9.1 in full."""
    jobs = [{"code": f"import os, time\nos.fork()\ntime.sleep(99) #{i}", "timeout": 0.2}
            for i in range(200)]
    assert not any(r.passed for r in sandbox.run_many(jobs, 8))
    assert_nothing_left(folder)


# ---------------------------------------------------------------------------------------------
# hostile programs: none passes, none outlives its run, none changes or learns what is outside

LOOP = "\nwhile True: pass"
LIBC = "import ctypes, os\nc = ctypes.CDLL(None, use_errno=True)\n"
HOSTILE = {
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "thread bomb": "import threading, time\nwhile True:\n"
    "    threading.Thread(target=time.sleep, args=[99]).start()",
    "shell bomb": "import subprocess\nsubprocess.run(['/bin/bash', '-c', 'f(){ f|f& };f;sleep 9'])",
    "memory": "x = bytearray(10 ** 11)",
    "memory in steps": "x = []\nwhile True: x.append(bytearray(10 ** 7))",
    "memory mapped": "import mmap\nx = mmap.mmap(-1, 10 ** 11)",
    "memory shared": "x = open('/dev/shm/sandbox-test', 'wb')\nwhile True: x.write(bytes(10 ** 6))",
    "memory of children": "import os\nfor _ in range(3): os.fork()\nx = bytearray(10 ** 9)",
    "huge integer": "x = 9 ** 9 ** 9",
    "integer as text": "x = str(7 ** 10 ** 7)",
    "slow regex": "import re\nre.match('(a|a)*b', 'a' * 99)",
    "disk, one file": "with open('x', 'wb') as f:\n    while True: f.write(bytes(10 ** 6))",
    "disk, many files": "for i in range(10 ** 9):\n    open(str(i), 'w').write('x' * 99)",
    "disk, many MB": "for i in range(10 ** 5): open(str(i), 'wb').write(bytes(10 ** 6))",
    "disk, sparse": "import os\nopen('x', 'w')\nos.truncate('x', 1 << 40)",
    "deep directories": "import os\nwhile True:\n    os.mkdir('d'); os.chdir('d')",
    "stdout flood": "while True: print('x' * 10 ** 5)",
    "stderr flood": "import os\nwhile True: os.write(2, b'x' * 10 ** 5)",
    "flood by children": "import os\nos.fork(); os.fork()\nwhile True: os.write(1, b'y' * 10 ** 5)",
    "loop": LOOP,
    "loop without signals": "import signal\nfor s in range(1, 65):\n"
    "    try: signal.signal(s, signal.SIG_IGN)\n    except (OSError, ValueError): pass" + LOOP,
    "loop around everything": "while True:\n    try:\n        while True: pass\n"
    "    except BaseException: pass",
    "sleep": "import time\ntime.sleep(99)",
    "endless input": "open('/dev/zero', 'rb').read()",
    "endless pipe": "import os\nos.mkfifo('p')\nopen('p').read()",
    "stops itself": "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)" + LOOP,
    "recursion": "def g(): g()\ng()",
    "stack overflow": "import sys\nsys.setrecursionlimit(10 ** 9)\ndef g(x): g([x] and sorted([x], "
    "key=g))\ng(1)",
    "nested parser": "eval('(' * 10 ** 6)",
    "crash": "import ctypes\nctypes.string_at(0)",
    "zip bomb": "import io, zlib\nd = zlib.compress(bytes(10 ** 8))\n"
    "x = [zlib.decompress(d) for _ in range(10 ** 4)]",
    "zip bomb to disk": "import zipfile\nwith zipfile.ZipFile('z', 'w', 8) as z:\n"
    "    z.writestr('a', bytes(10 ** 8))\nzipfile.ZipFile('z').extractall()",
    "child holds the pipes": "import os, time\nif os.fork() == 0: time.sleep(99)",
    "daemon": "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
    "        os.closerange(0, 64)\n        time.sleep(99)\n    os._exit(0)",
    "daemon of a leader": "import os, time\nif os.fork() == 0:\n    os.setsid()\n"
    "    time.sleep(99)\nos.setsid()\ntime.sleep(99)",
    "no parent-death signal": LIBC + "c.prctl(1, 0)\nif os.fork() == 0:\n"
    "    c.prctl(1, 0)\n    os.setsid()" + LOOP.replace("\n", "\n    ") + LOOP,
    "closes everything": "import os\nos.closerange(0, 99)" + LOOP,
    "connects": "import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)",
    "datagram": "import socket\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
    "s.sendto(b'x', ('127.0.0.1', {port}))\ns.sendto(b'x', ('8.8.8.8', 53))",
    "looks up a name": "import socket\nprint(socket.gethostbyname('example.org'), 'OPEN')",
    "abstract socket": "import socket\ns = socket.socket(socket.AF_UNIX)\ns.connect('\\0{name}')\n"
    "s.send(b'x')",
    "raw sockets": "import socket\nfor family in (16, 17, 40):\n"
    "    try: socket.socket(family, socket.SOCK_RAW); print('OPEN')\n    except OSError: pass",
    "environment of others": "import glob\nfor p in glob.glob('/proc/*/environ'):\n"
    "    try: print(open(p, 'rb').read().replace(b'\\0', b' '))\n    except OSError: pass\n1 / 0",
    "memory of the parent": "print(open('/proc/{pid}/mem', 'rb').read(1))",
    "files of the parent": "print(open('/proc/{pid}/cwd/README.md').read(), 'OPEN')",
    "reads outside": "print(open('{outside}').read())",
    "reads by another root": "import os\nfor p in range(9):\n    try: print(open(f'/proc/{p}/root"
    "{outside}').read())\n    except OSError: pass",
    "writes outside": "open('{outside}', 'w').write('changed')",
    "removes outside": "import os\nos.remove('{outside}')",
    "removes the folder": "import shutil\nshutil.rmtree('{folder}')",
    "symlink": "import os\nos.symlink('{outside}', 'x')\nprint(open('x').read())\nopen('x', 'w')",
    "symlink for the cleanup": "import os\nos.symlink('{folder}', 'x')\nos.chmod('.', 0)\n1 / 0",
    "hard link": "import os\nos.link('{outside}', 'x')\nopen('x', 'w').write('changed')",
    "leaves a file": "open('/tmp/sandbox-left', 'w')\nopen('/var/tmp/sandbox-left', 'w')",
    "SysV memory": LIBC + "print('OPEN' if c.shmget(0, 1 << 20, 0o1600) >= 0 else '')\n"
    "print('OPEN' if c.msgget(0, 0o1600) >= 0 or c.semget(0, 1, 0o1600) >= 0 else '')\n1 / 0",
    "message queue": LIBC + "n = {'x86_64': 240, 'aarch64': 180}[os.uname().machine]\n"
    "print('OPEN' if c.syscall(n, b'sandbox-test', 0o102, 0o600, None) >= 0 else '')\n1 / 0",
    "namespace by clone": LIBC + "n = {'x86_64': 56, 'aarch64': 220}[os.uname().machine]\n"
    "print('OPEN' if c.syscall(n, 0x10000011, 0, 0, 0, 0) >= 0 else '')\n1 / 0",
    "namespace by clone3": LIBC + "a = (ctypes.c_uint64 * 11)()\na[0], a[4] = 0x10000000, 17\n"
    "print('OPEN' if c.syscall(435, a, 88) >= 0 else '')\n1 / 0",
    "limits of the parent": "import resource\n"
    "resource.prlimit({pid}, resource.RLIMIT_NOFILE, (64, 64))\nprint('OPEN')",
    "priority of the parent": "import os\nos.setpriority(0, {pid}, 19)\nprint('OPEN')",
    "mounts": LIBC + "print(c.mount(b'/dev', b'/tmp', None, 4096, None))\n"
    "print('OPEN' if os.listdir('.') else '')",
    "makes read-only writable": LIBC + "print(c.mount(None, b'/usr', None, 4128, None))\n"
    "open('/usr/sandbox-left', 'w')",
    "a user namespace more": LIBC + "print(c.unshare(0x10020000))\n"
    "print('OPEN' if c.mount(b'/dev', b'/tmp', None, 4096, None) == 0 else '')",
    "chroot": "import os\nos.chroot('.')\nprint('OPEN')",
    "device": "import os\nos.mknod('d', 0o60666, os.makedev(254, 0))\nprint('OPEN', open('d'))",
    "kernel settings": "open('/proc/sys/kernel/hostname', 'w').write('changed')",
    "kernel crash handler": "open('/proc/sys/kernel/core_pattern', 'a').write('changed')",
    "raises limits": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))\n"
    "x = bytearray(10 ** 9)\nprint('OPEN')",
    "kills the parent": "import os\nos.kill({pid}, 9)",
    "stops the parent": "import os, signal\nos.kill({pid}, signal.SIGSTOP)",
    "kills all": "import os\nos.kill(-1, 9)",
    "kills its group": "import os\nos.killpg(0, 9)",
    "kills the supervisor": "import os\nos.kill(os.getppid(), 9)\nos.kill(1, 9)" + LOOP,
    "traces the parent": LIBC + "print('OPEN' if c.ptrace(16, {pid}, None, None) == 0 else '')\n"
    "print('OPEN' if c.ptrace(16, os.getppid(), None, None) == 0 else '')",
    "memory of the supervisor": "import os\nprint(open(f'/proc/{os.getppid()}/mem', 'wb'), 'OPEN')",
}
# What only namespaces or a limited disk stop, and what would be a real bomb for root.
NAMESPACES_ONLY = {"fork bomb", "shell bomb", "kills the supervisor", "disk, many files",
                   "disk, many MB", "deep directories", "memory of the supervisor"}


def contained(folder, program, monkeypatch, slack=0.0, **kwargs):
    """Runs it with a server, a file and a secret in reach, and looks at what it did."""
    monkeypatch.setenv("SECRET_TOKEN", "s3cret")
    most = pathlib.Path("/proc/sys/kernel/pid_max")  # in a namespace its own; never the machine's
    processes = most.read_text()
    outside = folder.parent / "outside.txt"
    outside.write_text("s3cret")
    private = folder / "private"  # so that it can be told from what is a run's
    private.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(private))
    name = f"sandbox-{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        local.bind("\0" + name)
        local.listen()
        values = {"port": server.getsockname()[1], "pid": os.getpid(), "outside": outside,
                  "folder": folder.parent, "name": name}
        for key, value in values.items():
            program = program.replace("{%s}" % key, str(value))
        start = time.monotonic()
        r = sandbox.run(program, **kwargs)
        assert time.monotonic() - start < kwargs["timeout"] + slack + 3
        for listener in (server, local):
            listener.settimeout(0)
            with pytest.raises(BlockingIOError):
                listener.accept()
    assert not r.passed and r.reason, r
    assert "s3cret" not in r.stdout + r.stderr and "OPEN" not in r.stdout, r
    assert outside.read_text() == "s3cret" and most.read_text() == processes
    assert len(r.stdout) <= sandbox.SHOWN and len(r.stderr) <= sandbox.SHOWN
    for path in ("/tmp/sandbox-left", "/var/tmp/sandbox-left", "/usr/sandbox-left",
                 "/dev/shm/sandbox-test"):
        assert not os.path.exists(path)
    assert_nothing_left(private)
    return r


def resident():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@needs_proc
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile(name, folder, monkeypatch, may_fork):
    """R9.1-R9.4 in namespaces."""
    if not find_launcher():
        pytest.skip("no user namespaces here")
    before = resident()
    r = contained(folder, HOSTILE[name], monkeypatch, tests=TESTS, timeout=0.5)
    assert resident() - before < 8 << 20
    print(f"\n{name}: {r.reason[:70]}")


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in HOSTILE if name not in NAMESPACES_ONLY])
def test_hostile_without_namespaces(name, folder, monkeypatch, may_fork):
    forbid_namespaces(monkeypatch)
    if not seccomp_filter(False) or "files" not in sandbox.run("pass").isolation:
        pytest.skip("no libseccomp or no Landlock here")
    contained(folder, HOSTILE[name], monkeypatch, tests=TESTS, timeout=1.0)


# ---------------------------------------------------------------------------------------------
# isolation, other languages

def test_layers_and_refusal(isolation):
    """The result says which layers held, and `isolation_gaps` which did not."""
    r = sandbox.run("pass")
    assert {"session", "environment", "directory", "limits"} <= {*r.isolation}
    if isolation == "":
        assert not {"pids", "network"} & {*r.isolation}  # "files": where the kernel has Landlock
        assert "pids" in sandbox.isolation_gaps()
    elif {*sandbox.HARM} <= {*r.isolation}:
        assert not sandbox.isolation_gaps()
    assert "too many processes" in sandbox.run(
        "import os\nfor i in range(3, 9):\n    try: os.write(i, b'too many processes\\n')\n"
        "    except OSError: pass\n1 / 0").reason  # forged: a Result, not an exception


@needs_proc
@pytest.mark.parametrize("name", ["reads outside", "writes outside", "memory of the parent",
                                  "environment of others", "abstract socket", "SysV memory",
                                  "limits of the parent", "namespace by clone"])
def test_files_without_namespaces(name, folder, monkeypatch):
    """Landlock and seccomp hold where namespaces are refused; the slow test tries them all."""
    test_hostile_without_namespaces(name, folder, monkeypatch, None)


@needs_proc
@pytest.mark.parametrize("name", ["reads outside", "writes outside", "disk, many MB",
                                  "kernel settings", "memory of the supervisor"])
def test_files_in_bubblewrap(name, folder, monkeypatch):
    """bwrap makes the private root, and its supervisor has no more rights than the child."""
    if not works("bwrap"):
        pytest.skip("no bubblewrap here")
    monkeypatch.setattr(sandbox, "find_launcher", lambda: "bwrap")
    contained(folder, HOSTILE[name], monkeypatch, tests=TESTS, timeout=2.0)


@pytest.mark.parametrize("unshare, bwrap, found", [(3, 3, "unshare"), (1, 3, "bwrap"), (1, 1, "")])
def test_the_first_launcher_that_works(unshare, bwrap, found, tmp_path, monkeypatch):
    """A system that forbids a launcher lets it end before child.py, which ends with 3."""
    for name, status in (("unshare", unshare), ("bwrap", bwrap)):
        (tmp_path / name).write_text(f"#!/bin/sh\nexit {status}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("tasks.sandbox.isolation.child_command", child_command.__wrapped__)
    assert find_launcher.__wrapped__() == found


@needs_proc
@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_memory_is_hidden_without_namespaces():
    """PR_GET_DUMPABLE of the parent, in a process of its own because nothing undoes it."""
    program = ("import ctypes\nfrom tasks import sandbox\nsandbox.find_launcher = lambda: ''\n"
               "c = ctypes.CDLL(None)\nprint(c.prctl(3), sandbox.run('pass').passed, c.prctl(3))")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "1 True 0\n", done


CODE = {"prompt": "p", "check": {"kind": "code", "language": "python", "tests": TESTS}}


def test_gaps_are_named_and_refused(monkeypatch, capsys):
    queries = [{"prompt": "p", "check": {"kind": "math", "answer": "1"}}, CODE]
    if not {*sandbox.HARM} - {*sandbox.run("pass").isolation}:
        require_isolation(queries, False)
        assert capsys.readouterr().out == ""
    forbid_namespaces(monkeypatch)
    assert "pids" in sandbox.isolation_gaps()
    require_isolation(queries[:1], False)  # nothing to run
    assert capsys.readouterr().out == ""
    with pytest.raises(InputError, match="without 'pids' .*--allow_unsafe_code"):
        require_isolation(queries, False)
    require_isolation(queries, True)
    assert capsys.readouterr().out.count("without 'pids' it can ") == 1


def test_every_stage_refuses(micro_run, tmp_path, monkeypatch):
    """Nothing is sampled, and no option but --allow_unsafe_code helps."""
    import data.quality
    import dpo
    import evaluate
    import grpo
    import reward
    import tasks.__main__ as rejection
    forbid_namespaces(monkeypatch)
    out = str(tmp_path / "out")
    stages = [(dpo, dpo.main, {"init": micro_run, "out": out}),
              (grpo, grpo.main, {"init": micro_run, "out": out}),
              (reward, reward.main, {"init": micro_run, "out": out}),
              (evaluate, evaluate.main, {"init": micro_run}),
              (rejection, rejection.rejection, {"init": micro_run, "out": out}),
              (data.quality, data.quality.main, {"policy": micro_run, "generate": 4, "out": out})]
    for module, main, values in stages:
        sampler = "rejection_sample" if module is data.quality else "rollout"
        monkeypatch.setattr(module, sampler, lambda *a, **k: pytest.fail("samples"))
        values["allow_unsafe_code"] = False
        if hasattr(module.Args, "overwrite"):
            values["overwrite"] = True
        with pytest.raises(InputError, match="--allow_unsafe_code"):
            main(stage_args(module, **values))


def test_a_harness_that_fails_gives_no_verdict(monkeypatch):
    """No process for the child, or none of it: an error in one line, never a score of 0."""
    program = ("import posix, runpy, sys\n"
               "def fail(*a): raise BlockingIOError(11, 'try again')\n"
               "posix.{} = fail\nrunpy.run_path(sys.argv[1], run_name='__main__')")
    forbid_namespaces(monkeypatch)
    python, child = sys.executable, child_command("")[-1]
    for command, language in [(["/bin/false"], "python"),
                              ([python, "-c", program.format("fork"), child], "python"),
                              ([python, "-c", program.format("posix_spawn"), child], "bash")]:
        monkeypatch.setattr(sandbox, "child_command", lambda _, c=command: c)
        code, tests = sandbox.SAMPLES[language]
        with pytest.raises(OSError, match="could not start a process: .*(message|again|many)"):
            sandbox.run(code, language, tests)
        with pytest.raises(InputError, match="code cannot be judged"):
            run_programs([Program(code, language, tests)])
    monkeypatch.undo()
    assert sandbox.run(GOOD, tests=TESTS).passed


@needs_proc
def test_limit_counts_what_is_there():
    """RLIMIT_NPROC counts all threads of a user: without process ids of its own a run may have 64
    and as many for each run beside it, more than there are."""
    before = count_threads()
    stop = threading.Event()
    threads = [threading.Thread(target=stop.wait) for _ in range(40)]
    for thread in threads:
        thread.start()
    _, limits = sandbox._limits(sandbox.LANGUAGES["c"], 1.0, 64, own_pids=False)
    stop.set()
    assert before >= 2 and before + 20 + 64 * os.cpu_count() < limits["RLIMIT_NPROC"]
    _, limits = sandbox._limits(sandbox.LANGUAGES["c"], 1.0, 64, own_pids=True)
    assert limits["RLIMIT_NPROC"] == 64


def test_cargo_is_not_visible(tmp_path, monkeypatch):
    """rustup's proxies may be hard links, in the folder that holds the token of crates.io."""
    cargo, tools = tmp_path / ".cargo/bin", tmp_path / ".rustup/toolchains/stable/bin"
    for folder, text in ((cargo, f"echo {tools.parent}"), (tools, "exit 0")):
        folder.mkdir(parents=True)
        (folder / "rustc").write_text(f"#!/bin/sh\n{text}\n")
        (folder / "rustc").chmod(0o755)
    (cargo.parent / "credentials.toml").write_text("token")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", f"{cargo}:{os.environ['PATH']}")
    caches = (find_program, find_commands, visible_files)
    for function in caches:
        function.cache_clear()
    try:
        bound = [path for path, _ in visible_files()["bound"]]
    finally:
        for function in caches:
            function.cache_clear()
    assert str(tools.parent) in bound
    assert not any(path == str(cargo.parent) or path in map(str, cargo.parents) for path in bound)


def test_a_missing_toolchain_is_named(monkeypatch):
    monkeypatch.setitem(sandbox.LANGUAGES, "cobol", Language(
        "main.cob", "no-such-compiler main.cob", "./main", "apt-get install gnucobol"))
    assert sandbox.languages()["cobol"] == "apt-get install gnucobol"
    with pytest.raises(RuntimeError, match="cobol"):
        sandbox.run("x", "cobol")
    assert set(sandbox.SAMPLES) == set(sandbox.LANGUAGES) - {"cobol"}


@pytest.mark.slow
@pytest.mark.parametrize("language", sandbox.LANGUAGES)
def test_language_in_all_ways(language, isolation, folder):
    test_language(language, folder)


@pytest.mark.parametrize("language", sandbox.LANGUAGES)
def test_language(language, folder):
    if language not in HERE:
        pytest.skip(f"no {language} here: {sandbox.languages()[language]}")
    code, tests = sandbox.SAMPLES[language]
    r = sandbox.run(code, language, tests, timeout=20.0)
    assert (r.passed, r.stage, r.reason, r.stdout) == (True, "tests", "", ""), r
    r = sandbox.run(code.replace("*", "+"), language, tests, timeout=20.0)
    assert not r.passed and r.stage == "tests" and r.reason, r
    r = sandbox.run(code + "\n)(", language, tests, timeout=20.0)
    assert not r.passed and r.stage == "static" and r.reason, r
    assert_nothing_left(folder)


EARLY = {  # statements that end the program with status 0, and texts that claim success
    "javascript": ["process.exit(0)", "process.reallyExit(0)",
                   "process.on('uncaughtException', () => process.exit(0))",
                   "console.assert = () => {}", "console.log('ok'); process.exit()",
                   "Object.defineProperty(console, 'assert', {value: () => {}})",
                   "globalThis.JSON.stringify = () => ''",
                   "console.log(require('fs').readFileSync(__filename, 'utf8'))"],
    "typescript": ["process.exit(0)", "console.assert = () => {}"],
    "c": ["#include <stdlib.h>\n__attribute__((constructor)) void g() { exit(0); }",
          "#include <unistd.h>\n__attribute__((constructor)) void g() { _exit(0); }",
          "#define assert(x)", "#define NDEBUG",
          "int main(void) { return 0; }\n#define main() unused(void)",
          "int main(void) { return 0; }\n#define main tests_main",
          'int evil(int n, char **v) __asm__("__real_main");\n'
          "int evil(int n, char **v) { return 0; }",
          "#include <stdio.h>\n__attribute__((constructor)) void g() { puts(\"passed\"); }"],
    "c++": ["#include <cstdlib>\nstruct G { G() { std::_Exit(0); } } g;", "#define assert(x)",
            "#include <cstdlib>\nstruct G { G() { std::quick_exit(0); } } g;",
            "int main() { return 0; }\n#define main tests_main"],
    "java": ["class S { int f(int x) { System.exit(0); return 1; } }",
             "class S { int f(int x) { Runtime.getRuntime().halt(0); return 1; } }"],
    "rust": ["fn g() -> i32 { std::process::exit(0) }",
             "fn g() -> i32 { 0 }\nmacro_rules! assert_eq { ($($t:tt)*) => {} }",
             "fn g() -> i32 { 0 }\nfn main() {}\n#[cfg(test)]"],
    "go": ["import \"os\"\nfunc init() { os.Exit(0) }"],
    "bash": ["exit 0", "exec true", "trap 'exit 0' ERR", "trap 'exit 0' EXIT", "[() { return 0; }",
             "set() { :; }; printf() { :; }", "unset() { :; }; [() { return 0; }",
             "readonly -f f; [() { return 0; }; readonly -f [", "kill -9 $$", "cat $0; exit",
             "alias [=true", "BASH_ENV=x; echo passed; exit",
             "mkdir b; ln -s /bin/true b/[; PATH=$PWD/b:$PATH; enable -n ["],
    "perl": ["exit 0;", "$SIG{__DIE__} = sub { exit 0 };", "use POSIX; POSIX::_exit(0);",
             "print 'passed'; exit;", "END { $? = 0 }", "__END__", "use subs 'die';\nsub die { 1 }",
             "BEGIN { *CORE::GLOBAL::die = sub { 1 } }",
             "BEGIN { open F, '<', $0; my $t = join '', <F>; $t =~ s/^die unless.*//m;\n"
             "open F, '>', $0; print F $t; close F }"],
    "ruby": ["exit!(0)", "at_exit { exit!(0) }", "abort", "__END__", "exec '/bin/true'"],
    "php": ["exit(0);", "ini_set('zend.assertions', '0');", "ini_set('assert.exception', '0');",
            "register_shutdown_function(function () { exit(0); }); throw new Exception();",
            "set_error_handler(function () { exit(0); });", "__halt_compiler();"],
    "lua": ["os.exit(0)", "os.exit(true, true)", "print('passed') os.exit(0)", "do return end"],
}


@pytest.mark.parametrize("language", EARLY)
def test_early_exits_score_zero(language, folder):
    """R9.4 outside Python: nothing but the statement after the last test is a pass."""
    if language not in HERE:
        pytest.skip(f"no {language} here: {sandbox.languages()[language]}")
    code, tests = sandbox.SAMPLES[language]
    wrong = code.replace("*", "+")
    for cheat in EARLY[language]:
        if language == "java":
            program = cheat.replace("class S ", "class Solution ")
        elif language == "rust":
            program = wrong.replace("x + x", "g()") + cheat
        else:
            program = f"{wrong}\n{cheat}\n"
        if language == "go":
            program = wrong.replace("package main", "package main\n" + cheat)
        r = sandbox.run(program, language, tests, timeout=10.0)
        assert not r.passed and r.reason, (cheat, r)
    assert_nothing_left(folder)


BASH_LISTS = [  # tests that f passes if it squares, and that it fails if it doubles
    "[ $(f 3) = 9 ] && echo ok", "[ $(f 3) = 9 ] && [ $(f 4) = 16 ]", "[ $(f 3) = 9 ] && true",
    "test $(f 3) -eq 9 && test $(f 4) -eq 16 && echo passed\necho done", "! [ $(f 3) = 6 ]",
    "! [[ $(f 3) = 6 ]]\necho done", "! f 3 | grep -q 6", "f 3 | grep -q 9 && echo ok",
    "[[ $(f 3) == 9 ]] && [[ $(f 4) == 16 ]] # both\n[ $(f 2) = 4 ]", "! diff <(f 3) <(echo 6)",
    "[ $(f 3) = 9 ] &&\n  [ $(f 4) = 16 ]", "[ $(f 3) = 9 ] \\\n  && [ $(f 4) = 16 ]",
    "for i in 3 4; do\n  [ $(f $i) = $((i * i)) ] && echo $i\ndone", "[ $(f 3) = 6 ] && exit 1",
    "if [ $(f 3) = 9 ] && [ $(f 4) = 16 ]; then\n  echo ok\nelse\n  exit 1\nfi",
    "t() {\n  [ -z \"$1\" ] && return 0\n  [ $(f 3) = 9 ]\n}\nt 1",
    "x=0\n[ -n \"$y\" ] && x=1\n[ $(f 3) = 9 ]", "[ $(f 3) = 9 ] || exit 1",
    "[ $(f 3) = 6 ] && { echo no; exit 1; }\ntrue", "if [ $(f 3) = 6 ]; then\n  exit 1\nelse\n"
    "  # no && test\n  true\nfi", "case $(f 3) in\n  9) true && echo ok ;;\n  *) false ;;\nesac",
    "t=$(cat <<'E'\n! a\nb && true\nE\n)\n[ \"$t\" = $'! a\\nb && true' ]\n[ $(f 3) = 9 ]",
    "! grep -q 6 <<E\n$(f 3)\nE\necho done", "x=$((1 << y))\n[ $(f 3) = 9 ] && true",
    "cat <<-E > t\n\t! $(f 3)\n\tE\n! [ \"$(cat t)\" = '! 6' ]",
    "[ $(f 3) = 9 ] || [ $(f 3) = 8 ]", "for i in 1 3; do\n  [ $i = 1 ] && continue\n"
    "  [ $(f $i) = $((i * i)) ]\ndone"]


def test_bash_lists_decide():
    """`set -e` exempts lists and negations. In tests they count, and an action is none."""
    code, _ = sandbox.SAMPLES["bash"]
    for program, passed in ((code, True), (code.replace("*", "+"), False)):
        results = sandbox.run_many([{"code": program, "language": "bash", "tests": tests}
                                    for tests in BASH_LISTS])
        wrong = [tests for tests, r in zip(BASH_LISTS, results, strict=True) if r.passed != passed]
        assert not wrong, (passed, wrong)
    assert not sandbox.run("#", "bash", "! [ $(f 3) = 6 ]").passed  # there is no f


DEVICES = [  # code and tests that need /dev/fd, /dev/stdin, /dev/stderr, /dev/shm
    ("bash", "f() { echo 9; }", "diff <(f 3) <(echo 9)"),
    ("bash", "f() { mapfile -t a < <(printf '%s\\n' \"$@\" | sort -n); echo ${a[0]}; }",
     "[ $(f 3 2) = 2 ]"),
    ("bash", "f() { cat /dev/stdin; }", "[ $(echo 9 | f) = 9 ]"),
    ("bash", "f() { echo x > /dev/stderr; echo 9 > /dev/stdout; }", "[ $(f) = 9 ]"),
    ("python", "import multiprocessing\n\n\ndef g(x):\n    return x * x\n\n\ndef f(x):\n"
     "    with multiprocessing.Pool(2) as pool:\n        return pool.map(g, [x])[0]",
     "assert f(3) == 9"),
    ("python", "from multiprocessing.pool import ThreadPool\n\n\ndef f(x):\n    with ThreadPool(2)"
     " as pool:\n        return sum(pool.map(lambda y: y * x, [x]))", "assert f(3) == 9"),
    ("python", "from multiprocessing.shared_memory import SharedMemory\n\n\ndef f(x):\n"
     "    m = SharedMemory(create=True, size=9)\n    m.buf[0] = x * x\n    y = m.buf[0]\n"
     "    m.close()\n    m.unlink()\n    return y", "assert f(3) == 9")]


@pytest.mark.parametrize("language, code, tests", DEVICES)
def test_devices(language, code, tests, isolation):
    if isolation == "" and "multiprocessing" in code:
        pytest.skip("without a private root /dev/shm is the machine's, and Landlock denies it")
    r = sandbox.run(code, language, tests, timeout=20.0)
    assert r.passed, r


def test_numpy_is_there_for_the_tests_only(isolation):
    """HumanEval+ imports it. The code that is tested has no library but Python's."""
    tests = "import numpy as np\nassert np.allclose([f(3)], [9.0])"
    assert sandbox.run(GOOD, tests=tests, timeout=20.0).passed
    r = sandbox.run(WRONG, tests=tests, timeout=20.0)
    assert (r.passed, r.stage) == (False, "tests") and "AssertionError" in r.reason
    r = sandbox.run(f"import numpy\n{GOOD}", tests=tests, timeout=20.0)
    assert (r.passed, r.stage) == (False, "run") and "No module named 'numpy'" in r.reason


COPIES = {  # in other languages: a copy for each guess, until one of them passes
    "c": """
#include <stdlib.h>
#include <stdio.h>
#include <unistd.h>
#include <sys/wait.h>
int f(int x) {
    for (int guess = 0; guess < 20; guess++) {
        int status, pid = fork();
        if (!pid) { freopen("/dev/null", "w", stderr); return guess; }
        waitpid(pid, &status, 0);
        if (WIFEXITED(status) && !WEXITSTATUS(status)) _exit(0);
    }
    exit(1);
}""",
    "perl": "sub f { for my $guess (0..20) { my $p = fork; "
            "if (!$p) { $SIG{__DIE__} = sub { kill 9, $$ }; return $guess } "
            "waitpid $p, 0; exit 0 if !$? } exit 1 }",
    "javascript": """
const f = x => {
    if (process.env.G) return +process.env.G;
    for (let g = 0; g < 20; g++) {
        const env = {G: String(g)};
        const copy = require('child_process').spawnSync(process.execPath, [__filename], {env});
        if (copy.status === 0) return g;
    } };""",
}


@pytest.mark.parametrize("language", COPIES)
def test_copies_that_guess(language, folder):
    if language not in HERE or not seccomp_filter(True):
        pytest.skip(f"no {language} or no libseccomp here")
    r = sandbox.run(COPIES[language], language, sandbox.SAMPLES[language][1], timeout=10.0)
    assert not r.passed and r.reason, r


def test_rust_macros_are_put_back():
    """An attribute at the end of the code does not take away the first of them."""
    if "rust" not in HERE:
        pytest.skip("no rust here")
    macro = "\nmacro_rules! assert { ($($t:tt)*) => {} }\n#[cfg(test)]"
    tests = "fn main() { assert!(f(3) == 9, \"{}\", f(3)); }"
    assert not sandbox.run("fn f(x: i32) -> i32 { x + x }" + macro, "rust", tests).passed
    assert sandbox.run("fn f(x: i32) -> i32 { x * x }", "rust", tests, timeout=20.0).passed


def test_bash_keeps_errexit():
    """`f` itself may not turn off what makes a failed test end the program."""
    tests = "f 3\n[ $r = 9 ]"
    assert not sandbox.run("f() { set +e; r=$(($1 + $1)); }", "bash", tests).passed
    assert sandbox.run("f() { r=$(($1 * $1)); }", "bash", tests).passed
    assert not sandbox.run("f() { :; }; grep() { :; }", "bash", "f 3 | grep -q 9").passed


FOREIGN = {
    "bash bomb": ("bash", ":(){ :|:& };:\nsleep 99"),
    "bash daemon": ("bash", "(setsid sleep 99 &)\nsleep 99"),
    "c recursion": ("c", "int f(int x) { return f(x + 1) + 1; }\nint main() { return f(1); }"),
    "c memory": ("c", "#include <stdlib.h>\n#include <string.h>\n"
                 "int main() { for (;;) memset(malloc(1 << 20), 1, 1 << 20); }"),
    "c compiler input": ("c", "#include \"/dev/zero\"\nint main() { return 1; }"),
    "c reads": ("c", "#include \"{outside}\"\nint main() { return 1; }"),
    "c++ compiler": ("c++", "template<int N> struct A { A<N + 1> a; };\nA<0> a;\nint main() {}"),
    "javascript loop": ("javascript", "while (true);"),
    "javascript memory": ("javascript", "const x = []; while (1) x.push(new Array(1e6).fill(1));"),
    "javascript children": ("javascript", "require('child_process').spawn('sleep', ['99'],"
                            " {detached: true, stdio: 'ignore'}).unref(); process.exit(1)"),
    "javascript connects": ("javascript", "require('net').connect({port}, '127.0.0.1')"
                            ".on('error', e => process.exit(1))"),
    "java memory": ("java", "public class Main { public static void main(String[] a) { var x ="
                    " new java.util.ArrayList<int[]>(); while (true) x.add(new int[1 << 20]); } }"),
    "java threads": ("java", "public class Main { public static void main(String[] a) {"
                     " while (true) new Thread(() -> { while (true); }).start(); } }"),
    "perl bomb": ("perl", "while (1) { fork }"),
    "perl reads": ("perl", "open(F, '<', '{outside}'); print <F>; die"),
    "php output": ("php", "<?php while (true) echo str_repeat('x', 100000);"),
    "lua text": ("lua", "print(string.rep('x', 1 << 40))"),
    "ruby sleep": ("ruby", "trap('TERM') {}; sleep"),
}


@needs_proc
@pytest.mark.parametrize("name", FOREIGN)
def test_hostile_elsewhere(name, folder, monkeypatch, may_fork):
    language, program = FOREIGN[name]
    if language not in HERE or not find_launcher():
        pytest.skip(f"no {language} or no namespaces here")
    row = sandbox.LANGUAGES[language]
    monkeypatch.setitem(sandbox.LANGUAGES, language, dataclasses.replace(row, check_seconds=2.5))
    r = contained(folder, program, monkeypatch, language=language, timeout=1.0, slack=2.5)
    print(f"\n{name}: {r.reason[:70]}")


def humanevalx_jobs(language):
    key, head = {"javascript": ("js", ""), "java": ("java", ""),
                 "c++": ("cpp", "#include <bits/stdc++.h>\nusing namespace std;\n")}[language]
    return [{"code": head + r["prompt"] + r["canonical_solution"], "language": language,
             "tests": r["test"], "timeout": 20.0} for r in rows(f"humanevalx_{key}.jsonl")]


LIBRARY = re.compile("boost/|MD5|js-md5")  # three programs include what is no part of these
# Their own tests refute these two; console.assert prints that, and node ends with status 0.
REFUTED = {("javascript", 112), ("javascript", 155)}


def judge_humanevalx(language, numbers, mutants):
    """The published solutions pass, and a share of one-token mutants of them fails."""
    if language not in HERE:
        pytest.skip(f"no {language} here: {sandbox.languages()[language]}")
    jobs = humanevalx_jobs(language)
    results = dict(zip(numbers, sandbox.run_many([jobs[i] for i in numbers]), strict=True))
    failed = {i: r for i, r in results.items() if not r.passed}
    assert {i for i, r in failed.items() if not LIBRARY.search(r.stderr + r.stdout)} == {
        i for i in numbers if (language, i) in REFUTED}, failed
    rng, mutated = random.Random(0), []
    good = sorted(set(numbers) - set(failed))
    for i in rng.sample(good, min(mutants, len(good))):
        body = jobs[i]["code"]
        swaps = {" < ": " <= ", " > ": " < ", " <= ": " > ", " >= ": " > ", "==": "!=",
                 " + ": " - ", " - ": " + ", " * ": " + ", " % ": " * ", "&&": "||", "||": "&&"}
        start = max(body.rfind("*/"), body.find("public", body.find("class Solution")), 0)
        spots = [m for m in re.finditer(r" (?:[<>]=?|[-+*%]) |[=]=|&&|\|\||\b\d+\b", body)
                 if m.start() > start]
        if spots:
            m = rng.choice(spots)
            new = body[:m.start()] + (swaps.get(m[0]) or str(int(m[0]) + 1)) + body[m.end():]
            mutated.append({**jobs[i], "code": new, "timeout": 5.0})
    verdicts = sandbox.run_many(mutated)
    ran = [r for r in verdicts if r.stage != "static"]
    print(f"\n{language}: {len(numbers) - len(failed)} of {len(numbers)} solutions pass "
          f"(fail: {sorted(failed)}); {sum(not r.passed for r in ran)} of {len(ran)} mutants that "
          f"compile fail, {len(verdicts) - len(ran)} do not compile")
    assert sum(not r.passed for r in verdicts) >= 0.6 * len(verdicts)


@needs_data
@pytest.mark.parametrize("language", ["javascript", "java", "c++"])
def test_humanevalx(language):
    judge_humanevalx(language, [0, 112, 155] if language == "javascript" else [53], 0)


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize("language", ["javascript", "java", "c++"])
def test_all_of_humanevalx(language):
    judge_humanevalx(language, range(164), 100)


@needs_data
@pytest.mark.slow
def test_mbpp_verdicts():
    """Every MBPP row passes, and every row with the solution of another row fails."""
    jobs = [{"code": r["code"], "tests": "\n".join([*r["test_imports"], *r["test_list"]])}
            for r in rows("mbpp_sanitized_train.jsonl")] + benchmark_jobs()[164:]
    others = [{**job, "code": jobs[i - 1]["code"]} for i, job in enumerate(jobs)]
    right, wrong = sandbox.run_many(jobs), sandbox.run_many(others)
    print(f"\n{sum(r.passed for r in right)} of {len(jobs)} MBPP rows pass, "
          f"{sum(r.passed for r in wrong)} with the solution of another")
    assert all(r.passed for r in right)
    names = [re.search(r"(\w+)\s*\(", job["tests"].partition("assert")[2]) for job in jobs]
    for job, r, name in zip(others, wrong, names, strict=True):
        assert not r.passed or f"def {name[1]}" in job["code"], job


@needs_proc
@pytest.mark.slow
def test_500_runs_in_a_pool(folder, may_fork):
    jobs = [{"code": (GOOD, WRONG, "import os; os.fork()", "x = [0] * 10 ** 7\n" + GOOD)[i % 4]
             + f" #{i}", "tests": TESTS} for i in range(500)]
    sandbox.run_many(jobs[:8], 8)
    memory, fds, start = resident(), len(os.listdir("/proc/self/fd")), time.monotonic()
    results = sandbox.run_many(jobs, 8)
    print(f"\n{500 / (time.monotonic() - start):.0f} runs a second")
    assert [r.passed for r in results] == [True, False, False, True] * 125
    assert resident() - memory < 8 << 20 and len(os.listdir("/proc/self/fd")) == fds
    assert_nothing_left(folder)


def test_demo():
    done = subprocess.run([sys.executable, "-m", "tasks.sandbox"], cwd=ROOT, capture_output=True,
                          text=True)
    passed = [line.split()[0] for line in done.stdout.splitlines() if " PASS " in line]
    assert done.returncode == 0 and passed == HERE, done.stdout
