"""A sandbox: Python that a model wrote, run where it can do little but compute.

    outcome = run_python("def double(x): return 2 * x", "assert double(4) == 8")
    outcome.passed, outcome.reason     # True, "passed"

The program runs in a process of its own (sandbox_child.py): isolated Python without site-packages, an empty
environment and an empty folder, a limit on the wall clock, processor time, memory, open files and what it may print.
Then the kernel is told what it may still ask for (Linux: seccomp, a list of system calls that computing needs;
Landlock, the folders of Python's own library, to read). So on Linux it has no network, starts no process, signals none,
writes, renames and deletes no file, and reads none of yours. `protections()` says which of these hold on this machine;
`run_python` refuses to run where the kernel does not refuse calls.

What this does not protect from: a fault in the kernel, or what can be learned from timing; elsewhere than on Linux, a
program that wants out (there are only limits and Python's audit hooks, which stop accidents and not attacks). And
within its process the program is as mighty as its tests: it can hand them an object that equals everything, or dig the
word that says "passed" out of the interpreter's frames. That it ends early or prints something does not pass the tests.
"""

from __future__ import annotations

import functools
import json
import math
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from zero2hero.errors import UserError

CHILD = Path(__file__).with_name("sandbox_child.py")


@dataclass(frozen=True)
class Limits:
    """What a program may take.

    Attributes:
        seconds: of processor time, and of the wall clock after the start.
        memory_mb: of address space (the system's Python alone takes some 20).
        output: bytes that it may print.
    """

    seconds: float = 5.0
    memory_mb: int = 512
    output: int = 1 << 16


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        reason: "passed", "failed" (it or a test raised), "ended early", "timeout", "memory", "output" (printed too
            much), "crashed".
        detail: the first line of what was raised, or the signal.
        output: the beginning of what it printed.
    """

    reason: str
    detail: str = ""
    output: str = ""

    @property
    def passed(self) -> bool:
        return self.reason == "passed"


def run_python(program: str, tests: str = "", limits: Limits = Limits(), *, trusting: bool = False) -> Outcome:
    """Run a program, then tests in the same names; both must come to their end.

    Args:
        trusting: run it even where the system cannot hold it.

    Raises:
        UserError: this system cannot hold it.
    """
    if not trusting and "system calls" not in protections():
        raise UserError(
            f"code that a model wrote is not run here: this system ({sys.platform}) cannot confine it. Use Linux, or a "
            "container or virtual machine of its own"
        )
    return _run(program, tests, limits)


def run_all(programs: Sequence[tuple[str, str]], limits: Limits = Limits(), workers: int = 0) -> list[Outcome]:
    """`run_python` of several (program, tests), as many at a time as there are cores."""
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        return list(pool.map(lambda each: run_python(each[0], each[1], limits), programs))


@functools.cache
def protections() -> tuple[str, ...]:
    """What confines a program on this machine: of "limits", "system calls" (seccomp) and "reading" (Landlock)."""
    if sys.platform == "win32":
        return ()
    outcome = _run("import json\nprint(json.dumps(protections))", "", Limits(seconds=20))
    return tuple(json.loads(outcome.output)) if outcome.passed else ()


def _run(program: str, tests: str, limits: Limits) -> Outcome:
    word = secrets.token_hex(16)  # what the child says when all is done
    task = {
        "program": program, "tests": tests, "word": word, "memory": limits.memory_mb << 20,
        "seconds": math.ceil(limits.seconds) + 1,
    }  # fmt: skip
    with tempfile.TemporaryFile() as file, tempfile.TemporaryDirectory() as folder:
        file.write(json.dumps(task).encode())
        file.seek(0)
        said, says = os.pipe()
        try:
            child = subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", str(CHILD), str(says)], stdin=file, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, env={}, cwd=folder, pass_fds=[says], start_new_session=True,
            )  # fmt: skip
        finally:
            os.close(says)
        assert child.stdout is not None
        try:
            printed, report, stopped = _watch(child.stdout.fileno(), said, limits)
            if not stopped:
                with suppress(subprocess.TimeoutExpired):
                    child.wait(1)  # both pipes are closed: it ends
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
            child.stdout.close()
            os.close(said)
            child.wait()
    return _judged(word, report, printed.decode(errors="replace"), stopped, child.returncode)


def _watch(output: int, said: int, limits: Limits) -> tuple[bytes, str, str]:
    """(what it printed, its report, why it must be stopped, if so), until it closes both or must be stopped."""
    read = {output: b"", said: b""}
    deadline = time.monotonic() + limits.seconds + 1  # a second to start
    with selectors.DefaultSelector() as waiting:
        for fd in read:
            waiting.register(fd, selectors.EVENT_READ)
        while waiting.get_map():
            left = deadline - time.monotonic()
            if left <= 0:
                return read[output], "", "timeout"
            for key, _ in waiting.select(left):
                if piece := os.read(key.fd, 1 << 16):
                    read[key.fd] += piece
                else:
                    waiting.unregister(key.fd)
                if len(read[key.fd]) > limits.output:
                    return read[output][: limits.output], "", "output"
    return read[output], read[said].decode(errors="replace"), ""


def _judged(word: str, report: str, printed: str, stopped: str, code: int) -> Outcome:
    kind, _, detail = report.partition("\n")
    if stopped:
        return Outcome(stopped, "", printed)
    if code == 0 and kind == word:
        return Outcome("passed", "", printed)
    if kind in ("failed", "memory", "ended early"):
        return Outcome(kind, detail, printed)
    if code == -signal.SIGXCPU:
        return Outcome("timeout", "processor time", printed)
    if code < 0:
        return Outcome("crashed", signal.Signals(-code).name, printed)
    return Outcome("ended early", f"exit code {code}", printed)
