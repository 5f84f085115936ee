"""sandbox.py against its requirements R9.1-R9.4; the oracles are /proc, a plain interpreter and
published solutions. Run with -s to see the rates."""
import ast
import json
import os
import pathlib
import random
import socket
import subprocess
import sys
import tempfile
import time
import types

import pytest

import sandbox

ROOT = pathlib.Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data" / "code"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="no ../shared/data")
needs_proc = pytest.mark.skipif(not pathlib.Path("/proc/self/stat").exists(), reason="no /proc")
pytestmark = pytest.mark.skipif(os.name != "posix", reason="run() needs POSIX")

GOOD = "def f(x):\n    return x * x\n"
WRONG = "def f(x):\n    return x + x\n"
TESTS = "assert f(2) == 4\nassert f(3) == 9"


@pytest.fixture(params=["isolated", "bare"])
def isolation(request, monkeypatch):
    """Both ways to start a child: in namespaces, and as on systems that lack them."""
    if request.param == "bare":
        monkeypatch.setattr(sandbox, "isolation", lambda: ())
    elif not sandbox.isolation():
        pytest.skip("no user namespaces here")
    return request.param


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Private directories are made here, so a process of a run is known by its cwd."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def alive(folder):
    found = []
    for entry in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(entry / "cwd").startswith(str(folder)):
                found.append(int(entry.name))
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
    end = time.monotonic() + 3  # SIGKILL is sent; the kernel may need a moment
    while alive(folder) and time.monotonic() < end:
        time.sleep(0.02)
    assert alive(folder) == [] and children() == [] and list(folder.iterdir()) == []


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
        assert sandbox.check(code) and "\n" not in sandbox.check(code)
        r = sandbox.run(code, tests="assert True")
        assert not r.passed and r.stage in ("static", "run") and r.reason and "\n" not in r.reason
    assert sandbox.check(GOOD) == sandbox.check("import os; os._exit(1)") == ""
    assert sandbox.run("f(", tests=TESTS).stage == "static"
    broken = sandbox.run(GOOD, tests="assert (")
    assert not broken.passed and "tests" in broken.reason


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
    "dunder side": WRONG + "__side__ = lambda x, n: 4",
    "trace": WRONG + "import sys\nsys.settrace(lambda *a: None)",
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


def test_patched_builtins_are_put_back():
    """R9.4"""
    code = WRONG + "import builtins\nbuiltins.abs = lambda x: 0\nbuiltins.all = lambda x: True"
    assert not sandbox.run(code, tests="assert abs(f(3) - 9) < 1e-6").passed
    assert not sandbox.run(code, tests="assert all(f(i) == i * i for i in range(9))").passed


@pytest.mark.parametrize("tests", [
    "assert f(1) == 2", "assert 2 == f(1)", "assert not f(1) != 2", "assert f(1) in [2, 3]",
    "assert 2 in f(1)", "assert 1 < f(1) < 3", "assert [f(1)] == [2]", "assert (1, f(1)) == (1, 2)",
    "assert {'a': [f(1)]} == {'a': [2]}", "assert {f(1)} == {2}", "def check(g):\n"
    "    assert g(1) == 2\ncheck(f)", "assert all(f(i) == i + 1 for i in range(3))"])
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
    tests = ("import resource\nassert resource.getrlimit(resource.RLIMIT_CPU) == (9, 9)\n"
             "assert resource.getrlimit(resource.RLIMIT_AS)[0] == 256 << 20\n"
             "assert resource.getrlimit(resource.RLIMIT_NPROC)[0] <= 64")
    assert sandbox.run("pass", tests=tests, timeout=7.5, memory_mb=256).passed


FORK = "import os, time\nfor _ in range({n}):\n    if os.fork() == 0:\n        {child}\n"


@needs_proc
@pytest.mark.parametrize("child, n", [("time.sleep(99)", 50), (
    "os.close(1)\n        os.execv('/bin/sleep', ['sleep', '99'])", 5)])
@pytest.mark.parametrize("end", ["", "time.sleep(99)", "os._exit(0)"])
def test_grandchildren_are_killed(child, n, end, isolation, folder):
    """R9.1: forked processes that hold the socket and the output end with the run. (50: within
    NPROC; root is not bound by it, so that a real bomb would be no bounded test.)"""
    start = time.monotonic()
    r = sandbox.run(GOOD + FORK.format(n=n, child=child) + end, tests=TESTS, timeout=1.2)
    assert time.monotonic() - start < 4
    assert r.passed == (end == "")
    assert_nothing_left(folder)


@needs_proc
def test_setsid_does_not_escape_namespaces(folder):
    """R9.1: a daemon that left the session dies too, whether or not the program itself left."""
    if not sandbox.isolation():
        pytest.skip("no user namespaces here; documented as not stopped")
    daemon = FORK.format(n=3, child="os.setsid(); time.sleep(99)")
    assert sandbox.run(GOOD + daemon, tests=TESTS).passed
    assert_nothing_left(folder)
    leader = "import os\nos.setsid()\n" + daemon + "time.sleep(99)"
    assert not sandbox.run(leader, timeout=1.0).passed
    assert_nothing_left(folder)
    sandbox.run("import os, signal\nos.kill(-1, signal.SIGKILL)")  # we are still here to see this


@needs_proc
def test_many_time_outs_leave_nothing(isolation, folder):
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
    assert first.startswith("{} [] " + str(folder)) and second == "''"
    assert r.passed == (isolation == "bare"), r  # no network in a namespace, not even loopback
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
    program = ("import os, sys, signal\nfor n in ('resource', 'fcntl'):\n"
               "    sys.modules[n] = None\nfor n in ('fork', 'killpg', 'setsid'): delattr(os, n)\n"
               "del signal.SIGKILL, signal.SIGALRM\nimport sandbox\nprint(sandbox.check('f('))")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "SyntaxError" in done.stdout, done.stderr
    with pytest.raises(RuntimeError, match="cobol"):
        sandbox.run(GOOD, language="cobol")
    monkeypatch.setattr(sandbox, "os", types.SimpleNamespace(name="nt"))
    assert sandbox.languages() == []
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
def test_200_time_outs(isolation, folder):
    """R9.1 in full."""
    jobs = [{"code": f"import os, time\nos.fork()\ntime.sleep(99) #{i}", "timeout": 0.2}
            for i in range(200)]
    assert not any(r.passed for r in sandbox.run_many(jobs, 8))
    assert_nothing_left(folder)


def test_demo():
    done = subprocess.run([sys.executable, "sandbox.py"], cwd=ROOT, capture_output=True, text=True)
    passed = [line.split()[0] for line in done.stdout.splitlines() if " PASS " in line]
    assert done.returncode == 0 and passed == ["good", "grandchild"], done.stdout
