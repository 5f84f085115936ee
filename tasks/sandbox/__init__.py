"""Run a model's code against unit tests under limits, and believe only a proven pass.

A policy under training searches for anything that its reward calls a pass, so three things
matter: never hang, never leak a process, never pay for a pass that is not one.

    run() --socket--> supervisor: own session, namespaces, files of its own (`isolation`)
                        `--> child: limits, no privileges, seccomp, no environment
      Python    1 read the tests and key A   2 compile   3 run the code   4 run the tests
                5 only now read key B from the socket; answering A + B is the pass
      others    1 compile or parse the code, the tests and, after the last of them, our statement
                that prints A, then B   2 run   3 "AB" in the output and status 0 are the pass

`sys.exit(0)`, `os._exit(0)`, a killed process or a printed "ok" never get to A + B and score 0.
In Python `assert` is bytecode, so patching AssertionError changes nothing; patched builtins are put
back before the tests. In tests no comparison may mix a plain value and an object of a class made by
the code (its `__eq__` may always say yes), alone or inside a list, tuple, set or dict; the price:
an honest class of one's own, even a namedtuple, compares only with its like.

THIS IS A RESOURCE LIMITER, NOT A SECURITY BOUNDARY: run hostile code in a container or a VM. Not
stopped: holes in the kernel, all of which is in reach; reading /usr and the toolchains; code that
studies this file (Python: frames hold A and the tests, the socket holds B; others: both stand in
the program's own text; having both forges a pass); patched library modules (`math.fabs = ...`) and
test globals; operators that do not compare (an `__sub__` that returns 0); outside Python also
patched comparisons (`operator==`, `equals`) and library functions; memory summed over processes
(64 of them at the limit each); programs under way when this process gets SIGKILL (their CPU limit
ends them, sleep does not; an empty folder stays). Each layer that `Result.isolation` lacks leaves
more open: without "files" all that your user may read and write, without "network" and "seccomp"
the network, without "pids" and "seccomp" processes that call setsid().
`require_isolation=True` refuses to run then.

`python -m tasks.sandbox` tries every language. POSIX only; elsewhere `run` raises RuntimeError.
C and C++ need a linker that knows --wrap (macOS's does not).
"""
import ast
import contextlib
import errno
import functools
import glob
import marshal
import os
import re
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
ENVIRONMENT = {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1"}  # of the child until it clears it
COMPILER = {"RLIMIT_CORE": 0, "RLIMIT_FSIZE": 64 << 20, "RLIMIT_NPROC": 256, "RLIMIT_NOFILE": 1024}
DISK = 64 << 20  # bytes of all files of a run together, where it has files of its own
SHOWN = 10_000  # bytes of stdout and of stderr kept in a Result
REQUIRED = ("pids", "network", "files", "no new privileges", "limits")
INVALID = (SyntaxError, ValueError, RecursionError, MemoryError)  # all that compile() raises


@dataclass(frozen=True)
class Result:
    passed: bool  # the tests ran to their end (without tests: the program did) and proved it
    stage: str  # where it ended: "static" (did not compile), "run" (the code) or "tests"
    reason: str  # one line; "" when passed
    stdout: str
    stderr: str
    seconds: float  # wall time, start-up included
    isolation: tuple = ()  # the layers that held, as the child reports before it runs the code


# ---------------------------------------------------------------------------------------------
# languages

@dataclass(frozen=True)
class Language:
    file: str  # the program's name: code + between + tests + after
    check: str  # parses or compiles it
    run: str
    install: str  # Debian's command; elsewhere packages are called much the same
    between: str = "\n"
    after: str = ""  # prints KEY_A, then KEY_B. Apart: who prints his own text prints no "AB"
    before: str = ""
    entry: tuple = ("$^", "")  # a pattern and its replacement: renames the main() that ours calls
    seconds: float = 10.0  # added to the time limit for the check
    # Runtimes that reserve gigabytes of addresses are held by RLIMIT_DATA: memory they may write.
    memory: str = "RLIMIT_DATA"


# The linker gives start-up code our __wrap_main for main, and main for __real_main.
C_AFTER = """
int sandbox_real(int, char **) __asm__("__real_main");
int sandbox_wrap(int n, char **v) __asm__("__wrap_main");
int sandbox_wrap(int n, char **v) {
    int status = sandbox_real(n, v);
    if (!status) __builtin_printf("%s%s\\n", "KEY_A", "KEY_B");
    return status;
}
"""
# The code may have made assert a macro that does nothing.
C = dict(between="\n#undef NDEBUG\n#include <assert.h>\n", after=C_AFTER, memory="RLIMIT_AS")
# console.assert only prints: in the block of the tests it throws. `any` is for TypeScript.
JS_BEFORE = """const $JSON = Object.freeze(JSON), $console = console;
for (const c of [Object, Array, Number, String, Boolean])
    Object.defineProperty(c.prototype, 'toJSON', {value: undefined});
"""
JS_BETWEEN = """
;{ const JSON = $JSON, console = {...$console, assert(...a%s) {
    if (!a[0]) throw Error('assertion failed ' + a.slice(1)); }};
"""
JS_AFTER = "\n}\nprocess.stdout.write('KEY_A'); process.stdout.write('KEY_B\\n');\n"
# Assigning POSIXLY_CORRECT calls nothing, and then `unset` is found before a function of that name.
BASH_BETWEEN = """
POSIXLY_CORRECT=1
\\unset -f [ test printf echo set builtin command unalias true false let return eval || exit 1
\\unalias -a
\\unset POSIXLY_CORRECT
trap - EXIT ERR DEBUG; set -e
"""
JVM = "-Xss8m -XX:+UseSerialGC -XX:TieredStopAtLevel=1 -XX:-UsePerfData"
LANGUAGES = {
    "python": Language("main.py", "", "", "", seconds=0, memory="RLIMIT_AS"),
    "javascript": Language(
        "main.js", "node --check main.js", "node main.js", "apt-get install nodejs",
        JS_BETWEEN % "", JS_AFTER, JS_BEFORE),
    "typescript": Language(
        "main.ts", "tsc --target es2022 --module commonjs --noEmitOnError main.ts", "node main.js",
        "apt-get install nodejs npm && npm install -g typescript", JS_BETWEEN % ": any[]", JS_AFTER,
        "declare const process: any, require: any, module: any;\n" + JS_BEFORE, seconds=20),
    "c": Language("main.c", "cc -O1 -w -o main main.c -lm -Wl,--wrap=main", "./main",
                  "apt-get install gcc libc6-dev", **C),
    "c++": Language("main.cc", "c++ -O1 -w -o main main.cc -Wl,--wrap=main", "./main",
                    "apt-get install g++", **C),
    "java": Language(
        "Main.java", f"javac {JVM.replace('-X', '-J-X')} -nowarn Main.java",
        f"java {JVM} -Xmx256m -ea -cp . Harness", "apt-get install default-jdk-headless",
        after="\nclass Harness { public static void main(String[] a) throws Throwable { Main.main(a"
        '); System.out.print("KEY_A"); System.out.println("KEY_B"); } }\n'),
    "rust": Language(
        "main.rs", "rustc --edition 2021 -A warnings -C debuginfo=0 -o main main.rs", "./main",
        "apt-get install rustc", entry=(r"\bfn\s+main\s*\(\s*\)", "fn tested_main()"),
        after="""
fn main() {
    let status = std::process::Termination::report(tested_main());
    if format!("{status:?}") == format!("{:?}", std::process::ExitCode::SUCCESS) {
        for text in ["KEY_A", "KEY_B", "\\n"] { print!("{}", text) }
    }
}
"""),
    "go": Language(
        "main.go", "go build -o main main.go", "./main", "apt-get install golang-go",
        entry=(r"\bfunc\s+main\s*\(\s*\)", "func testedMain()"), seconds=60,
        after='\nfunc main() { testedMain(); print("KEY_A", "KEY_B", "\\n") }\n'),
    "bash": Language("main.sh", "bash -n main.sh", "bash main.sh", "apt-get install bash",
                     BASH_BETWEEN, "\nprintf '%s%s\\n' KEY_A KEY_B\n", memory="RLIMIT_AS"),
    "perl": Language("main.pl", "perl -c main.pl", "perl main.pl", "apt-get install perl", "\n;\n",
                     "\n;print STDOUT 'KEY_A', 'KEY_B', \"\\n\";\n", memory="RLIMIT_AS"),
    "ruby": Language("main.rb", "ruby -c main.rb", "ruby main.rb", "apt-get install ruby",
                     after='\nSTDOUT.write("KEY_A", "KEY_B", "\\n")\n'),
    "php": Language(
        "main.php", "php -n -l main.php", "php -n main.php", "apt-get install php-cli",
        "\n?><?php ini_set('zend.assertions', '1'); ini_set('assert.exception', '1');\n",
        "\n;fwrite(STDOUT, 'KEY_A'); fwrite(STDOUT, \"KEY_B\\n\");\n", memory="RLIMIT_AS"),
    "lua": Language(
        "main.lua", "lua -e assert(loadfile('main.lua'))",
        "lua main.lua", "apt-get install lua5.4", "\n;\n",
        "\nio.stdout:write('KEY_A', 'KEY_B', '\\n')\n", memory="RLIMIT_AS"),
}


@functools.lru_cache(None)
def _find(word: str) -> str | None:
    path = shutil.which(word)
    if path and os.path.basename(os.path.realpath(path)) == "rustup":  # it needs its user's files
        found = subprocess.run([path, "--print", "sysroot"], capture_output=True, text=True)
        path = shutil.which(os.path.join(found.stdout.strip(), "bin", os.path.basename(path)))
    return os.path.abspath(path) if path else None


@functools.lru_cache(None)
def _commands(language: str) -> list | None:
    """The argument lists of the check and of the run; None where a program is missing."""
    lists = [command.split() for command in (LANGUAGES[language].check, LANGUAGES[language].run)]
    for words in filter(None, lists):
        words[0] = words[0] if words[0].startswith("./") else _find(words[0])
    return lists if all(not words or words[0] for words in lists) else None


def languages() -> dict[str, str]:
    """All languages: "" where `run` accepts it on this machine, else what is missing."""
    if os.name != "posix":
        return dict.fromkeys(LANGUAGES, "needs POSIX (Linux, macOS, WSL)")
    return {name: "" if _commands(name) else row.install for name, row in LANGUAGES.items()}


# ---------------------------------------------------------------------------------------------
# the child: functions of the built-in modules only, whose code travels in `python -c` (start-up is
# nearly all of the time of a run)

def _libc():
    """call(name, arguments) of a C function: did it return 0? (`import ctypes` takes longer.)"""
    import _ctypes

    class Int(_ctypes._SimpleCData):
        _type_ = "i"

    class Function(_ctypes.CFuncPtr):
        _flags_, _restype_ = _ctypes.FUNCFLAG_CDECL, Int

    library = _ctypes.dlopen(None, 0)
    return lambda name, *args: Function(_ctypes.dlsym(library, name))(*args) == 0


def _private_root(call, root, view, disk):
    """A root directory in memory: toolchains read-only, an empty /tmp, and nothing else."""
    import posix
    options = b"mode=755,nr_inodes=8192,size=%d" % disk
    if not call("mount", b"tmpfs", root.encode(), b"tmpfs", 6, options):  # no setuid, no devices
        return False
    for kind, path in view:
        here = root + path
        if kind == "file":
            posix.close(posix.open(here, posix.O_CREAT | posix.O_WRONLY))
        else:
            posix.mkdir(here, 0o755)
        # a recursive bind, then read-only, no setuid files, in trees no devices either
        if kind in ("tree", "file") and not (
                call("mount", path.encode(), here.encode(), None, 0x5000, None) and
                call("mount", None, here.encode(), None, 0x1023 | 4 * (kind == "tree"), None)):
            return False
    # subset=pid: no /proc/sys, where the user root of the machine may write without any capability
    call("mount", b"proc", root.encode() + b"/proc", b"proc", 14, b"subset=pid")
    posix.chdir(root)
    return call("pivot_root", b".", b".") and call("umount2", b".", 2)


def _start():
    import marshal
    import posix
    import resource
    import sys

    def read(n):  # unbuffered: what is not asked for stays in the kernel
        data = b""
        while len(data) < n:
            data += posix.read(link, min(n - len(data), 1 << 20)) or posix._exit(3)
        return data

    link, call = posix.dup(0), None
    job = marshal.loads(read(int(read(10))))
    posix.dup2(posix.open("/dev/null", posix.O_RDONLY), 0)
    posix.environ.clear()
    layers, home, program = job["layers"], job["folder"], job["filter"]
    try:
        call = _libc() if sys.platform == "linux" else None
    except (ImportError, OSError):
        pass
    if call and job["view"]:
        try:
            # NPROC does not bind root. From Linux 6.14 on pid_max is a namespace's own; before, it
            # is the machine's, and root may set it even here: never write it there.
            if tuple(map(int, posix.uname().release.split("-")[0].split(".")[:2])) >= (6, 14):
                fd = posix.open("/proc/sys/kernel/pid_max", posix.O_WRONLY)
                posix.write(fd, b"400")
                posix.close(fd)
        except (OSError, ValueError):
            pass
        try:
            if _private_root(call, home, job["view"], job["disk"]):
                layers, home = [*layers, "files"], "/tmp"
                posix.chdir(home)
        except OSError:
            pass  # run without this layer
    child = posix.fork()
    if child:  # the first process of its namespace: when it ends the kernel kills all others
        try:
            pid = None
            while pid != child:
                pid, status = posix.wait()
            posix.write(link, b"exit status %d before the end\n" % posix.waitstatus_to_exitcode(
                status))
        finally:  # a parent that has its answer reads no second one
            posix._exit(0)
    if call:  # the supervisor keeps its capabilities, so that the child may not trace it
        if call("capset", (0x20080522).to_bytes(4, sys.byteorder) + bytes(4), bytes(24)):
            layers = [*layers, "no capabilities"]
        if call("prctl", 38, 1, 0, 0, 0):
            layers = [*layers, "no new privileges"]
        pointer = id(program) + bytes.__basicsize__ - 1  # where CPython keeps the data of bytes
        header = (len(program) // 8).to_bytes(2, sys.byteorder) + bytes(6)
        if program and call("prctl", 22, 2, header + pointer.to_bytes(8, sys.byteorder)):
            layers = [*layers, "seccomp"]

    def limit(limits):
        kept = True
        for name, value in limits.items():
            try:
                resource.setrlimit(getattr(resource, name), (value, value))
            except (AttributeError, OSError, ValueError):
                kept = False  # unknown to this system, or lower already
        return kept

    layers = [*layers, *["limits"] * limit(job["compiler"] or job["limits"])]
    missing = [name for name in job["required"] if name not in layers]
    posix.write(link, (",".join(layers) + "\n").encode())
    if missing:
        posix.write(link, f"refused: without {', '.join(missing)}\n".encode())
        posix._exit(1)
    if job["file"] == "main.py":
        _python(job, link, read)
    else:
        _program(job, link, home, limit)


def _program(job, link, home, limit):
    """Checks, then runs the file with its commands. What it reports is no proof, "AB" is."""
    import posix
    fd, source = posix.open(job["file"], posix.O_WRONLY | posix.O_CREAT, 0o644), job["source"]
    while source:
        source = source[posix.write(fd, source):]
    posix.close(fd)
    env = {"HOME": home, "TMPDIR": home, **job["env"]}
    for command, done in job["commands"]:
        pid = posix.posix_spawn(command[0], command, env)
        status = posix.waitstatus_to_exitcode(posix.waitpid(pid, 0)[1])
        if status:
            posix.write(link, b"exit status %d\n" % status)
            posix._exit(1)
        if done[:1] == b".":  # what the check printed ("syntax OK") is not the program's output
            for fd in 1, 2:
                posix.ftruncate(fd, 0)
                posix.lseek(fd, 0, 0)
        posix.write(link, done)  # a dot a stage: the stage is known even if the process dies
        limit(job["limits"])
    posix._exit(0)


def _python(job, link, read):
    import builtins
    import marshal
    import posix
    import sys
    tests, names, saved = job["tests"], vars(builtins), dict(vars(builtins))
    # `if __name__ == "__main__"` is meant for a program, not for functions under test.
    module = type(sys)("candidate" if tests else "__main__")
    sys.modules[module.__name__] = module  # dataclasses, pickle and typing look it up
    scalars, frame = {int, float, complex, bool, str, bytes, type(None)}, sys._getframe
    seen = {}  # by frame and number of the comparison: was its last operand foreign?
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

    def side(x, number, first):  # around each operand of a comparison
        here, kind = (id(frame(1)), number), foreign(x)
        if not first and kind != seen[here]:
            raise TypeError("a plain value compared with an object of the code's own class")
        seen[here] = kind
        return x

    write, leave, report, key = posix.write, posix._exit, sys.excepthook, job["key"]
    try:
        program = compile(job["source"], job["file"], "exec", dont_inherit=True)
        write(link, b".")
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


# -s -S: no site-packages, twice as fast. -B: no cache files. -u: what was printed survives a kill.
# A code object fits only the Python that made it: of a virtual environment, the one it is based on.
PYTHON = (getattr(sys, "_base_executable", None) or sys.executable, "-s", "-S", "-B", "-u", "-c",
          "import marshal\nfor _code in marshal.loads(%r):\n    globals()[_code.co_name] = type("
          "lambda: 0)(_code, globals())\n_start()" % marshal.dumps(
              [f.__code__ for f in (_libc, _private_root, _start, _program, _python)]))


class _Sides(ast.NodeTransformer):
    count = 0

    def visit_Compare(self, node):  # f(1) == 2  ->  __side__(f(1), 7, True) == __side__(2, 7, ...)
        self.generic_visit(node)
        if not any(isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops):  # not overloadable
            self.count += 1
            node.left, *node.comparators = [
                ast.Call(ast.Name("__side__", ast.Load()),
                         [x, ast.Constant(self.count), ast.Constant(x is node.left)], [])
                for x in [node.left, *node.comparators]]
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


# ---------------------------------------------------------------------------------------------
# isolation, as far as this system has it. Always on: namespaces and files of its own cost 2 to 4 ms
# of the 13 to 19 of a Python run (bench/RESULTS.md), little beside generation.

@functools.lru_cache(None)
def _view() -> tuple:
    """What a program sees of the files: the system's programs and libraries, this Python, the
    toolchains found; (kind, path), parents first. And its PATH."""
    tools = sorted({words[0] for name in LANGUAGES for words in _commands(name) or ()
                    if words and words[0] != "./main"})
    wanted = ["/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/alternatives",
              "/etc/ld.so.cache", *glob.glob("/etc/java*"), sys.base_prefix]
    private = {"/", *map(os.path.expanduser, ("~", "~/.local"))}
    for tool in tools:  # its folder, or the one around bin/, which holds lib/ and share/ too
        for folder in {os.path.dirname(tool), os.path.dirname(os.path.realpath(tool))}:
            parent = os.path.dirname(folder)
            wanted.append(folder if parent in private else parent)
    steps = {path: ("dir", path) for path in ("/tmp", "/proc", "/dev")}
    devices = [f"/dev/{name}" for name in ("null", "zero", "random", "urandom")]
    for path in [*filter(os.path.exists, sorted(wanted, key=len)), *devices]:
        above = [path[:i] for i, c in enumerate(path) if c == "/" and i]
        if path in steps or any(steps.get(p, ("dir",))[0] != "dir" for p in above):
            continue  # inside another
        steps |= {p: ("dir", p) for p in above if p not in steps}
        steps[path] = "tree" if os.path.isdir(path) else "file", path
    path = dict.fromkeys([*map(os.path.dirname, tools), "/usr/local/bin", "/usr/bin", "/bin"])
    return tuple(steps.values()), ":".join(path)


def _launchers() -> dict:
    """Commands that start a child in namespaces of its own: without a network, and with its own
    process ids, so that when the first of them dies the kernel kills the rest, even what setsid()
    took out of our kill's reach. unshare leaves the files to the child (`_private_root`)."""
    steps, _ = _view()
    bwrap = [word for kind, path in steps if kind != "dir" and not path.startswith("/dev")
             for word in ("--ro-bind", path, path)]
    return {"unshare": ["unshare", *"--user --map-root-user --net --pid --ipc --uts --mount --fork "
                        "--kill-child".split()],
            "bwrap": ["bwrap", *"--unshare-all --die-with-parent --cap-drop ALL --proc /proc --dev "
                      f"/dev --size {DISK} --tmpfs /tmp".split(), *bwrap, "--chdir", "/tmp"]}


@functools.lru_cache(None)
def _launcher() -> tuple:
    """The first of them that works here, ("", []) where none does: the system lacks or forbids it.
    (A distribution may allow bubblewrap what it forbids to unshare.)"""
    for name, command in _launchers().items() if os.name == "posix" else ():
        path = shutil.which(name)
        if path and not subprocess.run([path, *command[1:], PYTHON[0], "-S", "-c", ""],
                                       capture_output=True, timeout=10).returncode:
            return name, [path, *command[1:]]
    return "", []


@functools.lru_cache(None)
def _filter(alone: bool) -> bytes:
    """A seccomp program made by libseccomp, b"" without it: no tracing of other processes, no
    kernel interfaces that tests of algorithms never need, no sockets but local ones. Not `alone` in
    namespaces: also nothing that would leave our kill's reach or kill others."""
    names = ("ptrace process_vm_readv process_vm_writev pidfd_getfd kcmp mount umount2 pivot_root "
             "move_mount open_tree fsopen fsmount unshare setns bpf perf_event_open userfaultfd io_"
             "uring_setup keyctl add_key request_key kexec_load init_module finit_module").split()
    if not alone:
        names += "setsid setpgid kill tkill rt_sigqueueinfo pidfd_send_signal".split()
    try:
        import ctypes  # only here: 3 ms
        library = ctypes.CDLL("libseccomp.so.2")
    except (ImportError, OSError):
        return b""
    library.seccomp_init.restype = ctypes.c_void_p
    context, deny = ctypes.c_void_p(library.seccomp_init(0x7FFF0000)), 0x50000 | errno.EPERM

    class Compare(ctypes.Structure):
        _fields_ = [("argument", ctypes.c_uint), ("operator", ctypes.c_int),
                    ("a", ctypes.c_uint64), ("b", ctypes.c_uint64)]

    for name in names:
        number = library.seccomp_syscall_resolve_name(name.encode())
        if number >= 0:  # else this processor or this library does not know it
            library.seccomp_rule_add_array(context, deny, number, 0, None)
    number = library.seccomp_syscall_resolve_name(b"socket")
    other = Compare(0, 1, socket.AF_UNIX, 0)  # 1: not equal
    if library.seccomp_rule_add_array(context, deny, number, 1, ctypes.byref(other)):
        return b""
    with tempfile.TemporaryFile() as file:
        return b"" if library.seccomp_export_bpf(context, file.fileno()) else (
            file.seek(0) or file.read())


# ---------------------------------------------------------------------------------------------
# running

def run(code: str, language: str = "python", tests: str = "", timeout: float = 5.0,
        memory_mb: int = 512, require_isolation: bool = False) -> Result:
    """Runs `code`, then `tests` (Python, scripts: statements with asserts, in the same namespace;
    C, C++, Java, Rust, Go: what holds main(), in Java class Main's) in a new process. `timeout`:
    seconds of wall time; `memory_mb`: MiB of memory of each process. Whatever the code does is a
    Result; raises RuntimeError when the language does not run here or, with `require_isolation`,
    when a layer of REQUIRED is missing; OSError when no process can be started."""
    if os.name != "posix" or language not in LANGUAGES or not _commands(language):
        raise RuntimeError(f"cannot run {language!r} here; can (POSIX only): "
                           f"{[name for name, lack in languages().items() if not lack]}")
    row, start, python = LANGUAGES[language], time.monotonic(), language == "python"
    key_a, key_b = secrets.token_hex(16), secrets.token_hex(16)
    try:
        if not code.strip():  # it would end without an error, and an empty answer must not pay
            raise ValueError("empty program")
        prepared = _compile_python(tests, "tests") if python and tests.strip() else b""
        source = code if python else re.sub(*row.entry, row.before + code + row.between + tests) \
            + row.after.replace("KEY_A", key_a).replace("KEY_B", key_b)
        source = source.encode()  # a lone surrogate is a ValueError
    except INVALID as error:
        return Result(False, "static", " ".join(str(error).split()), "", "", 0.0)
    (launcher, prefix), (view, path) = _launcher(), _view()
    # Output goes to nameless files: a pipe needs a reader, and its last holder may never end.
    link, theirs = socket.socketpair()
    with (link, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err,
          tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True) as folder):
        ends = (b".." if tests.strip() else b".", b"done\n")
        message = marshal.dumps({
            "file": row.file, "source": source, "tests": prepared, "key": key_a.encode(),
            "commands": [] if python else list(zip(_commands(language), ends, strict=True)),
            "limits": LIMITS | {"RLIMIT_CPU": int(timeout) + 2, row.memory: memory_mb << 20},
            "compiler": {} if python else COMPILER | {
                "RLIMIT_CPU": int(timeout + row.seconds) + 2,
                "RLIMIT_DATA": max(2048, memory_mb) << 20},  # a limit can only be lowered later
            "disk": DISK,
            "folder": "/tmp" if launcher == "bwrap" else folder,
            "view": view if launcher == "unshare" else (), "filter": _filter(bool(launcher)),
            "env": {"PATH": path, "LANG": "C.UTF-8"}, "required": REQUIRED * require_isolation,
            "layers": ["session", "environment", "directory", *["pids", "network"] * bool(launcher),
                       *["files"] * (launcher == "bwrap")]})
        with theirs:  # the fixed hash seed keeps the order of sets, so the verdict, repeatable
            process = subprocess.Popen([*prefix, *PYTHON], stdin=theirs, stdout=out, stderr=err,
                                       cwd=folder, env=ENVIRONMENT, start_new_session=True)
        try:
            message = b"%010d%b%b" % (len(message), message, key_b.encode())
            layers, said, late = _converse(link, message, timeout, row.seconds)
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        texts = [os.pread(f.fileno(), COMPILER["RLIMIT_FSIZE"], 0) for f in (out, err)]
    if said.startswith(b"refused"):  # the code cannot say so: a dot precedes it
        raise RuntimeError(said.decode().strip())
    seconds, proof, verdict = time.monotonic() - start, (key_a + key_b).encode(), said.lstrip(b".")
    stage = ("static", "run", "tests")[min(len(said) - len(verdict), 2)]
    passed = not late and (secrets.compare_digest(verdict, proof + b"\n") if python else
                           verdict == b"done\n" and any(proof in text for text in texts))
    texts = [text.replace(proof + b"\n", b"")[:SHOWN].decode("utf-8", "replace") for text in texts]
    lines = [line for text in texts[::-1] for line in text.splitlines() if line.strip()]
    reason = verdict.decode("utf-8", "replace").strip()
    if late:
        reason = f"time limit of {timeout:g} s"
    elif not verdict.endswith(b"\n"):
        reason = "killed before the end"
    elif not python and lines and not passed:  # what the compiler or the runtime had to say
        reason += ": " + next((line for line in lines if "rror" in line), lines[0]).strip()
    return Result(passed, stage, "" if passed else reason[:500], *texts, seconds,
                  tuple(filter(None, layers.decode().split(","))))


def _converse(link, message: bytes, timeout: float, extra: float) -> tuple:
    """Sends the job; (layers that held, what the child said, was it late)."""
    answer, late, deadline = b"", False, time.monotonic() + timeout + extra
    try:
        link.settimeout(timeout + extra)
        link.sendall(message)
        while answer.count(b"\n") < 2 and len(answer) < 8192:
            link.settimeout(max(deadline - time.monotonic(), 1e-3))
            chunk = link.recv(4096)
            answer += chunk
            if not chunk:
                break
            if extra and b"\n." in answer:  # it compiled: from now on its own time counts
                deadline, extra = time.monotonic() + timeout, 0
    except TimeoutError:
        late = True
    except ConnectionError:
        pass  # it died before it had read all
    layers, _, said = answer.partition(b"\n")
    return layers, said[:said.find(b"\n") + 1 or None], late


def run_many(jobs: list[dict], workers: int | None = None) -> list[Result]:
    """`run(**job)` for each job, in order, on `workers` threads (default: one a usable core).
    Identical jobs run once: a policy that converges repeats itself."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    keys = [tuple(sorted(job.items())) for job in jobs]
    with ThreadPoolExecutor(workers or cores) as pool:
        futures = {key: pool.submit(run, **dict(key)) for key in dict.fromkeys(keys)}
        return [futures[key].result() for key in keys]


SAMPLES = {  # f squares; what it must do to pass
    "python": ("def f(x):\n    return x * x", "assert f(3) == 9"),
    "javascript": ("const f = x => x * x", "console.assert(f(3) === 9)"),
    "typescript": ("const f = (x: number): number => x * x", "console.assert(f(3) === 9)"),
    "c": ("int f(int x) { return x * x; }", "int main() { assert(f(3) == 9); }"),
    "c++": ("auto f(int x) { return x * x; }", "int main() { assert(f(3) == 9); }"),
    "java": ("class Solution { int f(int x) { return x * x; } }", "public class Main { public stati"
             "c void main(String[] a) { if (new Solution().f(3) != 9) throw new Error(); } }"),
    "rust": ("fn f(x: i32) -> i32 { x * x }", "fn main() { assert_eq!(f(3), 9); }"),
    "go": ("package main\nfunc f(x int) int { return x * x }",
           "func main() { if f(3) != 9 { panic(f(3)) } }"),
    "bash": ("f() { echo $(($1 * $1)); }", "[ $(f 3) = 9 ]"),
    "perl": ("sub f { $_[0] * $_[0] }", "die unless f(3) == 9;"),
    "ruby": ("def f(x) = x * x", "raise unless f(3) == 9"),
    "php": ("<?php function f($x) { return $x * $x; }", "assert(f(3) === 9);"),
    "lua": ("function f(x) return x * x end", "assert(f(3) == 9)"),
}
