"""What separates a run from the machine: its view of the files, namespaces, a seccomp filter.

All of it is used wherever the system has it. Namespaces and private files cost 2 to 4 of the 13 to
19 ms of a Python run (bench/RESULTS.md), which is little beside generating the program.
"""
import contextlib
import errno
import functools
import glob
import importlib.util
import os
import py_compile
import shutil
import struct
import subprocess
import sys
import tempfile

from tasks.sandbox.languages import LANGUAGES, find_commands

DISK = 64 << 20  # bytes of all files of a run together, where it has a private root
NO_JOB = 3  # the exit status of a child whose socket is empty; child.py has it too
# A virtual environment's own interpreter would not be found in the private root.
# -s -S: no site-packages, which halves the start-up time. -B: write no bytecode.
# -u: what was printed survives a kill.
PYTHON = [getattr(sys, "_base_executable", None) or sys.executable, "-s", "-S", "-B", "-u"]

# The tests of HumanEval+ and MBPP+ import numpy, so its folders are visible. The code under test
# cannot import it: only for the tests is their parent on sys.path. A private root has them in a
# place of their own, or a checkout below /tmp would appear in the working directory.
PACKAGES = os.path.dirname(os.path.dirname(importlib.util.find_spec("numpy").origin))
PACKAGES_IN_VIEW = "/packages"
NUMPY = ("numpy", "numpy.libs")


@functools.lru_cache(None)
def visible_files() -> dict:
    """Return what a run sees: the system's programs and libraries, this Python, the toolchains and
    some devices. These are entries of child.py's job:

    directories: empty directories; parents come before their children
    bound: trees and files, read-only: (path here, path in the view)
    path: the PATH that finds the toolchains
    packages: where numpy may be
    disk: bytes of all files together
    """
    commands = [words for language in LANGUAGES for words in find_commands(language) or []]
    tools = sorted({words[0] for words in commands if words and words[0] != "./main"})
    wanted = ["/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/alternatives",
              "/etc/ld.so.cache", sys.base_prefix] + glob.glob("/etc/java*")
    # A toolchain is the folder around its bin/, which also holds lib/ and share/. If that folder
    # would show the files of a user, only bin/ is visible.
    private = ("/", os.path.expanduser("~"), os.path.expanduser("~/.local"))
    for tool in tools:
        for folder in (os.path.dirname(tool), os.path.dirname(os.path.realpath(tool))):
            parent = os.path.dirname(folder)
            wanted.append(folder if parent in private else parent)
    wanted.sort(key=len)  # parents first
    wanted += ["/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"]
    directories = ["/tmp", "/proc", "/dev", "/dev/shm", PACKAGES_IN_VIEW]
    bound = []
    for path in filter(os.path.exists, wanted):
        parents = [path[:i] for i in range(1, len(path)) if path[i] == "/"]
        visible = path in directories or not {path, *parents}.isdisjoint(bound)
        if not visible:
            directories += [parent for parent in parents if parent not in directories]
            bound.append(path)
    folders = [os.path.dirname(tool) for tool in tools] + ["/usr/local/bin", "/usr/bin", "/bin"]
    pairs = [(path, path) for path in bound]
    for name in NUMPY:
        if os.path.exists(f"{PACKAGES}/{name}"):
            pairs.append((f"{PACKAGES}/{name}", f"{PACKAGES_IN_VIEW}/{name}"))
    return {"directories": directories, "bound": pairs, "path": ":".join(dict.fromkeys(folders)),
            "packages": [PACKAGES_IN_VIEW, PACKAGES], "disk": DISK}


@functools.lru_cache(None)
def child_command(launcher: str) -> list[str]:
    """Return the command that starts child.py: its bytecode, so that no run has to compile it.

    launcher: "unshare" or "bwrap", which start it in namespaces, or "". There the child has no
    network, and process ids of its own: when the first process dies, the kernel kills all others,
    even those that setsid() took out of our kill's reach.
    """
    child = os.path.join(os.path.dirname(os.path.abspath(__file__)), "child.py")
    with contextlib.suppress(OSError):  # where nothing can be written
        child = py_compile.compile(child, doraise=True)
    options = []
    if launcher == "unshare":
        options = """--user --map-root-user --net --pid --ipc --uts --mount --fork
            --kill-child""".split()
    elif launcher == "bwrap":  # it makes the private root as well
        child_in_view = "/" + os.path.basename(child)
        options = f"""--unshare-all --die-with-parent --cap-drop ALL --proc /proc --dev /dev
            --size {DISK} --tmpfs /dev/shm --size {DISK} --tmpfs /tmp --chdir /tmp""".split()
        for path, path_in_view in [*visible_files()["bound"], (child, child_in_view)]:
            if not path.startswith("/dev/"):
                options += ["--ro-bind", path, path_in_view]
        options += ["--remount-ro", "/dev", "--remount-ro", "/"]
        child = child_in_view
    start = [shutil.which(launcher) or launcher] if launcher else []  # the child has no PATH
    return [*start, *options, *PYTHON, child]


@functools.lru_cache(None)
def find_launcher() -> str:
    """Return the first program that starts the child in namespaces, which then finds no job; "" if
    the system lacks or forbids them. Ubuntu's AppArmor allows bubblewrap what it forbids unshare.
    """
    for launcher in ("unshare", "bwrap"):
        with contextlib.suppress(OSError):  # not installed, or in a folder that we may not read
            command = child_command(launcher)
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True)
            if done.returncode == NO_JOB:
                return launcher
    return ""


# Tracing of other processes, memory that no limit counts, sockets (socketpair stays), and
# interfaces of the kernel that tests of algorithms never need.
DENIED = """ptrace process_vm_readv process_vm_writev pidfd_getfd kcmp mount umount2 pivot_root
    move_mount mount_setattr open_tree fsopen fsmount unshare setns bpf perf_event_open userfaultfd
    io_uring_setup keyctl add_key request_key kexec_load init_module finit_module
    shmget msgget semget mq_open socket"""
# Without process ids of its own, a run must not leave our kill's reach, nor reach other processes.
DENIED_WITHOUT_PIDS = """setsid setpgid kill tkill rt_sigqueueinfo pidfd_send_signal setpriority
    ioprio_set sched_setaffinity sched_setattr sched_setparam sched_setscheduler"""
# Conditions on a call's first argument, as libseccomp's struct scmp_arg_cmp: the argument's index,
# the operator (1: not equal, 7: equal under a mask), its operands.
NEW_USER_NAMESPACE = struct.pack("IiQQ", 0, 7, 0x10000000, 0x10000000)
NO_THREAD = struct.pack("IiQQ", 0, 7, 0x10000, 0)
OTHER_PROCESS = struct.pack("IiQQ", 0, 1, 0, 0)


@functools.lru_cache(None)
def seccomp_filter(own_pids: bool) -> bytes:
    """Return a BPF program that denies some system calls; b"" without libseccomp."""
    rules = dict.fromkeys(DENIED.split(), b"")
    rules |= {"clone": NEW_USER_NAMESPACE, "clone3": b""}
    if not own_pids:
        rules |= dict.fromkeys(DENIED_WITHOUT_PIDS.split(), b"")
        rules["prlimit64"] = OTHER_PROCESS
    return compile_filter(rules)


@functools.lru_cache(None)
def fork_filter() -> bytes:
    """Return a BPF program that denies new processes, but not threads; b"" without libseccomp.

    A program that forks could let each copy try an answer, and then give the one that passed.
    """
    return compile_filter({"fork": b"", "vfork": b"", "clone": NO_THREAD})


def compile_filter(rules: dict[str, bytes]) -> bytes:
    """Return a BPF program that denies each system call under its condition; b"": always."""
    try:
        import ctypes  # not every Python has it, and importing it takes 3 ms

        library = ctypes.CDLL("libseccomp.so.2")
    except (ImportError, OSError):
        return b""
    allow = 0x7FFF0000
    library.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(library.seccomp_init(allow))
    for name, condition in rules.items():
        number = library.seccomp_syscall_resolve_name(name.encode())
        if number < 0:  # this processor or this library does not know it
            continue
        # The flags of clone3 are in memory, where no filter sees them. "Not implemented" makes the
        # C library use clone.
        deny = 0x50000 | (errno.ENOSYS if name == "clone3" else errno.EPERM)
        count = 1 if condition else 0
        if library.seccomp_rule_add_array(context, deny, number, count, condition):
            return b""
    with tempfile.TemporaryFile() as file:
        if library.seccomp_export_bpf(context, file.fileno()):
            return b""
        file.seek(0)
        return file.read()


@functools.lru_cache(None)
def hide_memory() -> None:
    """Let no other process of this user read this process's memory and environment in /proc.

    Debuggers of this user cannot attach either, so we do it only where runs could see /proc.
    """
    with contextlib.suppress(ImportError, OSError, AttributeError):
        import ctypes

        ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE; systems but Linux lack prctl


def count_threads() -> int:
    """Return the number of threads of this machine, with those of all users: one cheap read, and
    the limit made of it is never too low."""
    try:
        with open("/proc/loadavg", encoding="ascii") as file:  # "0.20 0.18 0.12 1/80 11206"
            return int(file.read().split()[3].partition("/")[2])
    except OSError:
        return 1 << 16  # not Linux: no limit
