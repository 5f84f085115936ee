"""Run one job inside the sandbox. tasks.sandbox starts this program once per run.

It imports built-in modules only, because start-up is nearly all of a run's time. Standard input is
a socket to the parent. The protocol, in order:

  parent      10 digits, the length of the job; the job, a marshalled dict (`run` makes it);
              key B, 32 bytes, which stay unread in the socket until the last test has passed
  child       the layers of isolation that hold, and a newline: "pids,network,limits"
              "too many processes", and the end, if the check could not be started
              "." when the code compiles
              "." when the tests come next: in Python the code has run, elsewhere it has compiled
              one line, the verdict. In Python key A + key B, or the error. In other languages the
              exit status of a check that failed
  supervisor  one line when the child has ended, "exit status 0". In other languages than Python
              this is the verdict of the run; the proof is in the program's output

The supervisor is the first process of its namespaces; it forks the child.
"""
import builtins
import marshal
import posix
import resource
import sys


def read_exactly(link, count):
    """Return the next `count` bytes. Unbuffered: what is not asked for stays in the kernel."""
    data = b""
    while len(data) < count:
        chunk = posix.read(link, count - len(data))
        if not chunk:
            posix._exit(3)  # isolation.NO_JOB
        data += chunk
    return data


def find_libc():
    """Return call(name, *arguments), which calls a C function of ints. Without Linux it fails.

    The numbers that we pass to C functions below are Linux's.
    """
    try:
        import _ctypes  # importing ctypes would take longer

        library = _ctypes.dlopen(None, 0)
    except (ImportError, OSError):
        library = None
    if library is None or sys.platform != "linux":
        return lambda *_: -1

    def call(name, *arguments):
        return _ctypes.call_cdeclfunction(_ctypes.dlsym(library, name), arguments)

    return call


def limit_process_ids():
    """Allow the namespace 400 processes: RLIMIT_NPROC does not bind root.

    Before Linux 6.14 pid_max is the whole machine's, and root can set it even from here.
    """
    try:
        release = posix.uname().release.split(".")
        if (int(release[0]), int(release[1])) >= (6, 14):
            with open("/proc/sys/kernel/pid_max", "w") as setting:
                setting.write("400")
    except (OSError, ValueError):
        pass


def enter_private_root(call, root, job):
    """Fill `root` with what the job may see, and make it "/". Raise OSError where that fails."""

    def mount(source, target, kind, flags, options=None):
        if call("mount", source, target.encode(), kind, flags, options) != 0:
            raise OSError(f"cannot mount {target}")

    no_setuid, no_devices = 2, 4
    size = b"mode=755,nr_inodes=8192,size=%d" % job["disk"]
    mount(b"tmpfs", root, b"tmpfs", no_setuid | no_devices, size)
    for path in job["directories"]:
        posix.mkdir(root + path, 0o755)
    for path, path_in_view in job["bound"]:
        target = root + path_in_view
        read_only = 0x1021 | no_setuid
        if posix.stat(path).st_mode & 0o170000 == 0o040000:  # a directory
            posix.mkdir(target, 0o755)
            read_only |= no_devices
        else:
            posix.close(posix.open(target, posix.O_CREAT | posix.O_WRONLY))
        mount(path.encode(), target, None, 0x5000)  # bind it, with the mounts below it
        mount(None, target, None, read_only)  # binding ignores these flags; a remount does not
    # subset=pid: no /proc/sys, where the machine's root may write even without any capability.
    call("mount", b"proc", root.encode() + b"/proc", b"proc", 14, b"subset=pid")
    for name, target in (("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")):
        posix.symlink(f"/proc/self/fd{target}", f"{root}/dev/{name}")
    posix.chdir(root)
    if call("pivot_root", b".", b".") != 0 or call("umount2", b".", 2) != 0:
        raise OSError("cannot leave the old root")
    posix.chdir("/tmp")


def restrict_files(call, paths, packages):
    """Deny all files but `paths`, read-only, and this folder; return whether Landlock does so.

    For systems without a private root. packages: a folder that may only be listed, because Python
    looks there for numpy, which is among `paths`. Landlock also denies the memory of other
    processes. It does not cover chmod, utime and stat.
    """
    create = 444  # the numbers of these system calls are the same everywhere
    add_rule = 445
    restrict = 446
    version = call("syscall", create, None, 0, 1)
    if version < 1:
        return False
    all_rights = (1 << min(12 + version, 15)) - 1
    rules = call("syscall", create, all_rights.to_bytes(8, sys.byteorder), 8, 0)
    for path in [*paths, packages, "/proc/self", "."]:
        file = posix.open(path, posix.O_PATH | posix.O_CLOEXEC)
        rights = 1 | 4  # execute, read
        if path == ".":
            rights = all_rights
        elif path == packages:
            rights = 8
        elif posix.fstat(file).st_mode & 0o170000 == 0o040000:  # a directory
            rights |= 8  # list
        elif path.startswith("/dev/"):
            rights |= 2  # write
        rule = rights.to_bytes(8, sys.byteorder) + file.to_bytes(4, sys.byteorder)
        call("syscall", add_rule, rules, 1, rule, 0)
        posix.close(file)
    held = call("syscall", restrict, rules, 0) == 0
    posix.close(rules)
    return held


def supervise(child, link):
    """Wait for the child, then exit: the kernel kills all that is left in the namespace."""
    try:
        pid = None
        while pid != child:
            pid, status = posix.wait()
        # If the child has sent a verdict, the parent reads no second one.
        posix.write(link, b"exit status %d\n" % posix.waitstatus_to_exitcode(status))
    finally:
        posix._exit(0)


def drop_privileges(call, program):
    """Give up what the kernel lets us give up, install the seccomp program; return the layers.

    The supervisor keeps its capabilities, so that the child may not trace it.
    """
    layers = []
    capability_header = (0x20080522).to_bytes(4, sys.byteorder) + bytes(4)
    if call("capset", capability_header, bytes(24)) == 0:
        layers.append("no capabilities")
    if call("prctl", 38, 1, 0, 0, 0) == 0:  # PR_SET_NO_NEW_PRIVS
        layers.append("no new privileges")
    if install_filter(call, program):
        layers.append("seccomp")
    return layers


def install_filter(call, program):
    """Add a seccomp program to those of this process; return whether it holds."""
    # struct sock_fprog: the count of instructions and their address in this bytes object
    address = id(program) + bytes.__basicsize__ - 1
    count = len(program) // 8
    fprog = count.to_bytes(2, sys.byteorder) + bytes(6) + address.to_bytes(8, sys.byteorder)
    # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
    return count > 0 and call("prctl", 22, 2, fprog) == 0


def set_limits(limits):
    """Set the resource limits and return whether all of them hold."""
    complete = True
    for name, value in limits.items():
        try:
            resource.setrlimit(getattr(resource, name), (value, value))
        except (AttributeError, OSError, ValueError):
            complete = False  # this system does not know it, or it is lower already
    return complete


def run_commands(job, link, call):
    """Write the program to a file and check it, then become the program.

    We do not wait for the program, so that it need not be able to fork.
    """
    home = posix.getcwd()
    environment = {"HOME": home, "TMPDIR": home, "PATH": job["path"], "LANG": "C.UTF-8",
                   "OPENSSL_CONF": "/dev/null"}  # node stops if it may not read the system's
    check, run = job["commands"]
    write_file(job["file"], job["source"])
    try:
        pid = posix.posix_spawn(check[0], check, environment)
    except BlockingIOError:
        posix.write(link, b"too many processes\n")
        posix._exit(1)
    status = posix.waitstatus_to_exitcode(posix.waitpid(pid, 0)[1])
    if status:
        posix.write(link, b"exit status %d\n" % status)
        posix._exit(1)
    write_file(job["file"], job["source"])  # again: perl -c runs BEGIN blocks
    for output in (1, 2):  # "syntax OK" is not the program's output
        posix.ftruncate(output, 0)
        posix.lseek(output, 0, 0)
    posix.write(link, b".." if job["has_tests"] else b".")
    set_limits(job["run_limits"])
    install_filter(call, job["no_fork"])
    posix.execve(run[0], run, environment)


def write_file(path, data):
    with open(path, "wb") as file:
        file.write(data)


# Types of the library that compare with plain values, and how to reach what is in them. Their
# import takes time, so we do it only where the code or the tests name them.
LIBRARY = (
    ("collections", "Counter", dict.items),
    ("collections", "OrderedDict", dict.items),
    ("collections", "defaultdict", dict.items),
    ("collections", "deque", iter),
    ("fractions", "Fraction", lambda number: (number._numerator, number._denominator)),
    ("decimal", "Decimal", lambda number: ()),
)


def comparison_guard(text):
    """Return the function that stands around every operand of the tests' comparisons.

    It lets plain values compare with plain values only, and every other type with its like: the
    code may have written the __eq__ of an object, or put the object where a library asks for its
    __eq__. text: the code and the tests, as bytes.

    Types are compared by their addresses, because a metaclass may lie about everything else. All
    names are bound here, before the code can patch them.
    """
    identity = id
    type_of = type
    frame = sys._getframe
    plain = {identity(kind) for kind in (
        int, float, complex, bool, str, bytes, bytearray, range, type, type(None), type(...))}
    contents = {identity(kind): kind.__iter__ for kind in (list, tuple, set, frozenset)}
    for view in ({}.keys(), {}.values(), {}.items()):
        contents[identity(type(view))] = iter
    contents[identity(dict)] = dict.items
    kept = []  # or the address of a type that the code deletes may become another's
    for module, name, items in LIBRARY:
        if name.encode() in text:
            kind = getattr(__import__(module), name)
            kept.append(kind)
            contents[identity(kind)] = items
    operands = {}  # by frame and comparison: the operand before

    def add_kinds(value, found):
        """Add the addresses of the types in `value` that are not plain to the dict `found`."""
        kind = identity(type_of(value))
        if kind in contents:
            for item in contents[kind](value):
                if identity(type_of(item)) not in plain:
                    add_kinds(item, found)
        elif kind not in plain:
            found[kind] = True

    def guard(value, comparison, is_first, is_last):
        here = (identity(frame(1)), comparison)
        if not is_first:
            before, after = {}, {}
            add_kinds(operands.pop(here), before)
            add_kinds(value, after)
            if before != after:
                raise TypeError("a plain value compared with an object of another type")
        if not is_last:
            operands[here] = value
        return value

    return guard


def bind_guard(code, mark, guard):
    """Return the code object with `guard` in place of the constant `mark`.

    As a constant the guard is out of reach of everything that patches names.
    """
    constants = []
    for constant in code.co_consts:
        if constant == mark:
            constant = guard
        elif type(constant) is type(code):
            constant = bind_guard(constant, mark, guard)
        constants.append(constant)
    return code.replace(co_consts=tuple(constants))


def names_in(code):
    """Return the names that a code object and the functions in it use or define as globals."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if type(constant) is type(code):
            names |= names_in(constant)
    return names


def without_shadows(namespace, tests, original_builtins):
    """Return the variables of the code without those that hide a builtin from the tests.

    With `def set(x): return 0` any f would pass `assert set(f(a)) == set(b)`. The functions of the
    code keep what they see. If the tests use nothing else of the code, they may ask for a function
    called `sum`, so nothing is taken away.
    """
    shadows = {name for name in namespace if name in original_builtins and name[:2] != "__"}
    asked = names_in(tests) - original_builtins.keys()
    if not shadows or asked.isdisjoint(namespace):
        return namespace
    return {name: value for name, value in namespace.items() if name not in shadows}


def run_python(job, link):
    """Run the code, then its tests; send both keys only if the last test has passed."""
    tests = None
    if job["has_tests"]:
        guard = comparison_guard(job["source"] + job["compiled_tests"])
        tests = bind_guard(marshal.loads(job["compiled_tests"]), job["guard_mark"], guard)
    # `if __name__ == "__main__"` is meant for a program, not for functions under test.
    module = type(sys)("candidate" if tests else "__main__")
    namespace = vars(module)
    sys.modules[module.__name__] = module  # dataclasses, pickle and typing look it up
    sys.modules["__main__"] = module  # or code could replace the functions of this file
    for name in ("settrace", "_settraceallthreads"):  # a trace function may jump over the tests
        vars(sys).pop(name, None)
    names = vars(builtins)
    original_builtins = dict(names)
    # The code may replace these functions in their modules, but not our local names.
    write = posix.write
    leave = posix._exit
    process_id = posix.getpid
    report = sys.excepthook
    add_path = sys.path.append
    me = process_id()
    try:
        program = compile(job["source"], job["file"], "exec", dont_inherit=True)
        write(link, b".")
        exec(program, namespace)
        names.clear()
        names.update(original_builtins)
        if tests:
            write(link, b".")
            namespace = without_shadows(namespace, tests, original_builtins)
            # A copy, which the code cannot patch while the tests call it.
            namespace["__builtins__"] = dict(original_builtins)
            for folder in job["packages"]:  # of numpy, which the tests of HumanEval+ import
                add_path(folder)
            exec(tests, namespace)
            names.update(original_builtins)
        if process_id() != me:  # a copy that tries an answer
            leave(1)
        write(link, job["key"] + read_exactly(link, 32) + b"\n")
        leave(0)  # at once: no atexit handlers, no waiting for threads
    except BaseException as error:  # SystemExit too: the end was not reached
        names.update(original_builtins)
        report(type(error), error, error.__traceback__.tb_next)  # without this function's frame
        text = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        write(link, text.encode("utf-8", "replace") + b"\n")
        leave(1)


def main():
    """Take the job from the socket, isolate this process, and run the job in a child."""
    link = posix.dup(0)
    job = marshal.loads(read_exactly(link, int(read_exactly(link, 10))))
    posix.dup2(posix.open("/dev/null", posix.O_RDONLY), 0)
    posix.environ.clear()
    sys.path[0] = ""  # the working directory in place of this file's
    layers = ["session", "environment", "directory"]
    call = find_libc()
    if job["launcher"]:
        layers += ["pids", "network"]
    if job["launcher"] == "bwrap":
        layers.append("files")
    elif job["launcher"]:
        limit_process_ids()
        try:
            enter_private_root(call, posix.getcwd(), job)
            layers.append("files")
        except OSError:
            pass  # run without this layer
    call("prctl", 4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: the child may not open our memory
    child = posix.fork()
    if child:
        supervise(child, link)
    call("prctl", 4, 1, 0, 0, 0)
    layers += drop_privileges(call, job["filter"])
    paths = [path for path, _ in job["bound"]]
    if "files" not in layers and restrict_files(call, paths, job["packages"][-1]):
        layers.append("files")
    is_python = not job["commands"][0]
    if set_limits(job["run_limits"] if is_python else job["check_limits"]):
        layers.append("limits")
    posix.write(link, (",".join(layers) + "\n").encode())
    if is_python:
        install_filter(call, job["no_fork"])
        run_python(job, link)
    else:
        run_commands(job, link, call)


if __name__ == "__main__":
    main()
