"""The inside of the sandbox (sandbox.py): gives up what is not needed to compute, then runs a program and its tests.

Run as `python -I -S sandbox_child.py FD` with the task in JSON as input; says on the descriptor FD how it ended.
Imports the standard library alone.

seccomp (https://docs.kernel.org/userspace-api/seccomp_filter.html): from now on the kernel answers "not permitted" to
every system call that is not on the list. Landlock (https://docs.kernel.org/userspace-api/landlock.html): no file is
read but below the folders given.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import platform
import resource
import struct
import sys
import sysconfig

# name: number on x86_64, on aarch64. What reads, computes, waits and ends; nothing that makes, sends or removes.
ALLOWED = {
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "fstat": (5, 80), "newfstatat": (262, 79), "statx": (332, 291),
    "lseek": (8, 62), "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "mremap": (25, 216),
    "madvise": (28, 233), "brk": (12, 214), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139), "sigaltstack": (131, 132), "ioctl": (16, 29), "pread64": (17, 67), "readv": (19, 65),
    "writev": (20, 66), "readlink": (89, None), "readlinkat": (267, 78), "getdents64": (217, 61),
    "getrandom": (318, 278), "futex": (202, 98), "exit": (60, 93), "exit_group": (231, 94), "gettid": (186, 178),
    "getpid": (39, 172), "getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177),
    "clock_gettime": (228, 113), "clock_getres": (229, 114), "clock_nanosleep": (230, 115), "nanosleep": (35, 101),
    "gettimeofday": (96, 169), "sched_yield": (24, 124), "sched_getaffinity": (204, 123), "getcwd": (79, 17),
    "set_robust_list": (273, 99), "rseq": (334, 293), "access": (21, None), "faccessat": (269, 48), "stat": (4, None),
    "lstat": (6, None), "fcntl": (72, 25), "dup": (32, 23), "pipe2": (293, 59), "poll": (7, None), "ppoll": (271, 73),
    "select": (23, None), "pselect6": (270, 72), "epoll_create1": (291, 20), "epoll_ctl": (233, 21),
    "epoll_pwait": (281, 22), "epoll_wait": (232, None), "eventfd2": (290, 19), "uname": (63, 160),
    "getrusage": (98, 165), "times": (100, 153), "membarrier": (324, 283), "restart_syscall": (219, 128),
}  # fmt: skip
OPENAT, CLONE = (257, 56), (56, 220)  # open to read alone; a thread alone
CLONE_THREAD, WRITING = 0x10000, os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# Python's own names for what the kernel refuses, where it cannot
FORBIDDEN = (
    "socket.", "subprocess.", "os.fork", "os.exec", "os.spawn", "os.posix_spawn", "os.system", "os.kill", "os.remove",
    "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown", "os.putenv",
    "shutil.", "ctypes.",
)  # fmt: skip


def limit(memory: int, seconds: int) -> None:
    """No core dumps, no growing files, few open ones, no new processes, and so much memory and processor time."""
    for name, value in (("CORE", 0), ("FSIZE", 0), ("NOFILE", 64), ("NPROC", 0), ("AS", memory), ("CPU", seconds)):
        kind = getattr(resource, f"RLIMIT_{name}", None)
        if kind is None:
            continue
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:
            resource.setrlimit(kind, (value, value + (name == "CPU")))  # SIGXCPU, and a second later SIGKILL
        except (ValueError, OSError):  # macOS knows some of them by name only
            continue


def filter_program(machine: str) -> bytes:
    """The filter in the kernel's own small language: load a field, jump if ..., return a verdict."""
    column = ("x86_64", "aarch64").index(machine)
    load, jump_equal, jump_above, jump_bits, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, refuse, absent = 0x7FFF0000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS
    code: list[tuple[int, int, int, int]] = [  # (operation, jump if true, jump if false, value)
        (load, 0, 0, 4), (jump_equal, 1, 0, AUDIT_ARCH[machine]), (give, 0, 0, refuse),
        (load, 0, 0, 0), (jump_above, 0, 1, 0x40000000), (give, 0, 0, refuse),  # x86's other set of numbers
        (jump_equal, 0, 1, 435), (give, 0, 0, absent),  # clone3, whose flags cannot be seen: libc then uses clone
        (jump_equal, 0, 4, OPENAT[column]), (load, 0, 0, 32), (jump_bits, 0, 1, WRITING), (give, 0, 0, refuse),
        (give, 0, 0, allow),
        (jump_equal, 0, 4, CLONE[column]), (load, 0, 0, 16), (jump_bits, 1, 0, CLONE_THREAD), (give, 0, 0, refuse),
        (give, 0, 0, allow),
    ]  # fmt: skip
    for numbers in ALLOWED.values():
        if (number := numbers[column]) is not None:
            code += [(jump_equal, 0, 1, number), (give, 0, 0, allow)]
    code.append((give, 0, 0, refuse))
    return b"".join(struct.pack("HBBI", *line) for line in code)


def confine_calls(libc: ctypes.CDLL) -> bool:
    """Refuse every system call that is not allowed; False where the kernel does not know how."""
    if sys.platform != "linux" or platform.machine() not in AUDIT_ARCH or struct.calcsize("P") != 8:
        return False
    program = filter_program(platform.machine())
    kept = ctypes.create_string_buffer(program, len(program))
    line = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(kept))
    header = ctypes.create_string_buffer(line, len(line))
    set_seccomp, filter_mode = 22, 2
    return bool(libc.prctl(set_seccomp, filter_mode, ctypes.c_void_p(ctypes.addressof(header)), 0, 0) == 0)


def confine_reading(libc: ctypes.CDLL, folders: set[str]) -> bool:
    """Open no file but below `folders`; False where the kernel does not know how."""
    if sys.platform != "linux":
        return False
    create, add, restrict, beneath = 444, 445, 446, 1
    execute, read_file, read_folder = 1, 4, 8
    handled = struct.pack("Q", (1 << 13) - 1)  # all that the first version of Landlock knows
    ruleset = libc.syscall(create, handled, ctypes.c_size_t(len(handled)), 0)
    if ruleset < 0:
        return False
    for folder in folders:
        if os.path.isdir(folder):
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            rule = struct.pack("=Qi", execute | read_file | read_folder, fd)
            libc.syscall(add, ruleset, beneath, rule, 0)
            os.close(fd)
    confined = bool(libc.syscall(restrict, ruleset, 0) == 0)
    os.close(ruleset)
    return confined


def confine(memory: int, seconds: int) -> list[str]:
    """All of it; what of it holds."""
    library = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib")}
    folders = {os.path.realpath(path) for path in library} | {"/usr/lib", "/lib", "/lib64", "/usr/share/zoneinfo"}
    libc = ctypes.CDLL(None, use_errno=True)
    if sys.platform == "linux":
        no_new_privileges = 38
        libc.prctl(no_new_privileges, 1, 0, 0, 0)
    reading = confine_reading(libc, folders)
    limit(memory, seconds)
    calls = confine_calls(libc)
    return ["limits", *["system calls"] * calls, *["reading"] * reading]


def refuse(event: str, arguments: object) -> None:
    """Python's own account of what a program does (PEP 578): an accident is stopped, and named."""
    if event.startswith(FORBIDDEN):
        raise PermissionError(f"the sandbox does not allow {event}")


def main() -> None:
    task = json.loads(sys.stdin.buffer.read())
    says = int(sys.argv[1])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv[:] = [""]
    names = {"__name__": "__main__", "protections": confine(task["memory"], task["seconds"])}
    sys.addaudithook(refuse)
    try:
        exec(compile(task["program"], "<program>", "exec"), names)
        exec(compile(task["tests"], "<tests>", "exec"), names)
        word = task["word"]
    except MemoryError:
        word = "memory\n"
    except SystemExit as error:
        word = f"ended early\n{error.code!r:.80}"
    except BaseException as error:
        try:
            said = str(error).strip().splitlines()[:1]
        except BaseException:  # an exception of the program's own, whose text is code as well
            said = []
        word = f"failed\n{type(error).__name__}" + "".join(f": {line:.200}" for line in said)
    try:
        sys.stdout.flush()
    finally:
        os.write(says, word.encode(errors="replace"))
        os._exit(0)


if __name__ == "__main__":
    main()
