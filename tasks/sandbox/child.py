"""Run one job inside the sandbox. tasks.sandbox starts this program once per run.

It imports built-in modules only, because start-up is nearly all of a run's time. Standard input is
a socket to the parent. The protocol, in order:

  parent      10 digits, the length of the job; the job, a marshalled dict (`run` makes it);
              key B, 32 bytes, which stay unread in the socket until the last test has passed
  child       the layers of isolation that hold, and a newline: "pids,network,limits"
              "refused: without ...", and the end, if a required layer is missing
              "." when the code compiles
              "." when the tests come next: in Python the code has run, elsewhere it has compiled
              one line, the verdict. In Python key A + key B, or the error. In other languages
              "done" or the exit status; the proof is in the program's output
  supervisor  "exit status ... before the end", if the child died without a verdict

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
        chunk = posix.read(link, min(count - len(data), 1 << 20))
        if not chunk:
            posix._exit(3)  # isolation.NO_JOB
        data += chunk
    return data


def find_libc():
    """Return call(name, *arguments): whether that C function returned 0. Return None without libc.

    The numbers that we pass to C functions below are Linux's.
    """
    if sys.platform != "linux":
        return None
    try:
        import _ctypes  # importing ctypes would take longer

        library = _ctypes.dlopen(None, 0)
    except (ImportError, OSError):
        return None

    def call(name, *arguments):
        return _ctypes.call_cdeclfunction(_ctypes.dlsym(library, name), arguments) == 0

    return call


def limit_process_ids():
    """Allow the namespace 400 processes: RLIMIT_NPROC does not bind root.

    Before Linux 6.14 pid_max is the whole machine's, and root can set it even from here.
    """
    try:
        major, minor = posix.uname().release.split(".")[:2]
        if (int(major), int(minor)) >= (6, 14):
            setting = posix.open("/proc/sys/kernel/pid_max", posix.O_WRONLY)
            posix.write(setting, b"400")
            posix.close(setting)
    except (OSError, ValueError):
        pass


def enter_private_root(call, root, job):
    """Fill `root` with what the job may see, and make it "/". Raise OSError where that fails."""

    def mount(source, target, kind, flags, options=None):
        if not call("mount", source, target.encode(), kind, flags, options):
            raise OSError(f"cannot mount {target}")

    no_setuid, no_devices = 2, 4
    size = b"mode=755,nr_inodes=8192,size=%d" % job["disk"]
    mount(b"tmpfs", root, b"tmpfs", no_setuid | no_devices, size)
    for path in job["directories"]:
        posix.mkdir(root + path, 0o755)
    for path in job["bound"]:
        target = root + path
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
    if not (call("pivot_root", b".", b".") and call("umount2", b".", 2)):
        raise OSError("cannot leave the old root")
    posix.chdir("/tmp")


def supervise(child, link):
    """Wait for the child, then exit: the kernel kills all that is left in the namespace."""
    try:
        pid = None
        while pid != child:
            pid, status = posix.wait()
        exit_status = posix.waitstatus_to_exitcode(status)
        # If the child has sent a verdict, the parent reads no second one.
        posix.write(link, b"exit status %d before the end\n" % exit_status)
    finally:
        posix._exit(0)


def drop_privileges(call, program):
    """Give up what the kernel lets us give up, install the seccomp program; return the layers.

    The supervisor keeps its capabilities, so that the child may not trace it.
    """
    layers = []
    capability_header = (0x20080522).to_bytes(4, sys.byteorder) + bytes(4)
    if call("capset", capability_header, bytes(24)):
        layers.append("no capabilities")
    if call("prctl", 38, 1, 0, 0, 0):  # PR_SET_NO_NEW_PRIVS
        layers.append("no new privileges")
    # struct sock_fprog: the count of instructions and their address in this bytes object
    address = id(program) + bytes.__basicsize__ - 1
    count = len(program) // 8
    fprog = count.to_bytes(2, sys.byteorder) + bytes(6) + address.to_bytes(8, sys.byteorder)
    if program and call("prctl", 22, 2, fprog):  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
        layers.append("seccomp")
    return layers


def set_limits(limits):
    """Set the resource limits and return whether all of them hold."""
    complete = True
    for name, value in limits.items():
        try:
            resource.setrlimit(getattr(resource, name), (value, value))
        except (AttributeError, OSError, ValueError):
            complete = False  # this system does not know it, or it is lower already
    return complete


def run_commands(job, link):
    """Write the program to a file, then check and run it with the commands of its language."""
    source = job["source"]
    file = posix.open(job["file"], posix.O_WRONLY | posix.O_CREAT, 0o644)
    while source:
        source = source[posix.write(file, source):]
    posix.close(file)
    home = posix.getcwd()
    environment = {"HOME": home, "TMPDIR": home, "PATH": job["path"], "LANG": "C.UTF-8"}
    check, run = job["commands"]
    for command in (check, run):
        pid = posix.posix_spawn(command[0], command, environment)
        status = posix.waitstatus_to_exitcode(posix.waitpid(pid, 0)[1])
        if status:
            posix.write(link, b"exit status %d\n" % status)
            posix._exit(1)
        if command is check:
            for output in (1, 2):  # "syntax OK" is not the program's output
                posix.ftruncate(output, 0)
                posix.lseek(output, 0, 0)
            posix.write(link, b".." if job["has_tests"] else b".")
            set_limits(job["run_limits"])
    posix.write(link, b"done\n")
    posix._exit(0)


def comparison_guard(module):
    """Return the function that stands around every operand of the tests' comparisons.

    It refuses to compare a plain value with an object whose __eq__ the code may have written.
    """
    plain = {int, float, complex, bool, str, bytes, type(None)}
    contents = {list: list.__iter__, tuple: tuple.__iter__, set: set.__iter__,
                frozenset: frozenset.__iter__, dict: dict.items}
    heap_type = 1 << 9
    modules = sys.modules
    frame = sys._getframe
    last_operands = {}  # by frame and comparison: was the last operand foreign?

    def is_foreign(value):
        kind = type(value)
        if kind in plain:
            return False
        if kind.__flags__ & heap_type:  # Python code made this class
            home = modules.get(kind.__module__)
            if home is module or getattr(home, kind.__name__, None) is not kind:
                return True  # and no library module holds it, unlike Counter or Fraction
        for base, items in contents.items():
            if issubclass(kind, base) and any(map(is_foreign, items(value))):
                return True
        return False

    def guard(value, comparison, is_first):
        foreign = is_foreign(value)
        here = (id(frame(1)), comparison)
        if not is_first and foreign != last_operands[here]:
            raise TypeError("a plain value compared with an object of the code's own class")
        last_operands[here] = foreign
        return value

    return guard


def run_python(job, link):
    """Run the code, then its tests; send both keys only if the last test has passed."""
    tests = marshal.loads(job["compiled_tests"]) if job["has_tests"] else None
    # `if __name__ == "__main__"` is meant for a program, not for functions under test.
    module = type(sys)("candidate" if tests else "__main__")
    sys.modules[module.__name__] = module  # dataclasses, pickle and typing look it up
    sys.modules["__main__"] = module  # or code could replace the functions of this file
    guard = comparison_guard(module)
    names = vars(builtins)
    original_builtins = dict(names)
    # The code may replace these functions in their modules, but not our local names.
    write = posix.write
    leave = posix._exit
    report = sys.excepthook
    try:
        program = compile(job["source"], job["file"], "exec", dont_inherit=True)
        write(link, b".")
        exec(program, vars(module))
        if tests:
            write(link, b".")
            names.clear()
            names.update(original_builtins)
            vars(module).update(__builtins__=builtins, __guard__=guard)
            sys.path.append(job["packages"])
            exec(tests, vars(module))
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
    layers = job["layers"]
    call = find_libc()
    if call and job["private_root"]:
        limit_process_ids()
        try:
            enter_private_root(call, posix.getcwd(), job)
            layers.append("files")
        except OSError:
            pass  # run without this layer
    child = posix.fork()
    if child:
        supervise(child, link)
    if call:
        layers += drop_privileges(call, job["filter"])
    is_python = not job["commands"][0]
    if set_limits(job["run_limits"] if is_python else job["check_limits"]):
        layers.append("limits")
    missing = [name for name in job["required"] if name not in layers]
    posix.write(link, (",".join(layers) + "\n").encode())
    if missing:
        posix.write(link, f"refused: without {', '.join(missing)}\n".encode())
        posix._exit(1)
    if is_python:
        run_python(job, link)
    else:
        run_commands(job, link)


if __name__ == "__main__":
    main()
