"""The sandbox: programs that misbehave are stopped and named; the kernel refuses what it should."""

import os
import subprocess
import sys
import time

import pytest

from zero2hero.align import sandbox
from zero2hero.align.sandbox import CHILD, Limits, protections, run_all, run_python
from zero2hero.errors import UserError

linux = pytest.mark.skipif("system calls" not in protections(), reason="this system does not confine system calls")
SHORT = Limits(seconds=1.0)


@linux
@pytest.mark.parametrize(
    ("program", "tests", "reason", "detail"),
    [
        ("def double(x): return 2 * x", "assert double(4) == 8", "passed", ""),
        ("def double(x): return 3 * x", "assert double(4) == 8, 'no'", "failed", "AssertionError: no"),
        ("def", "", "failed", "SyntaxError"),
        ("import sys; sys.exit(0)", "assert False", "ended early", "0"),
        ("import os; os._exit(0)", "assert False", "ended early", "exit code 0"),
        ("raise type('E', (Exception,), {'__str__': lambda self: 1 / 0})", "", "failed", "E"),
        ("x = bytearray(10**10)", "", "memory", ""),
        ("x = []\nwhile True: x.append('a' * 10**6)", "", "memory", ""),
        ("while True: print('x' * 1000)", "", "output", ""),
        ("import os\nwhile True: os.write(3, b'x' * 9999)", "", "", ""),
        ("import os\nwhile True: os.fork()", "", "failed", "does not allow os.fork"),
        ("import subprocess; subprocess.run(['ls'])", "", "failed", "PermissionError"),
        ("import threading\nwhile True: threading.Thread(target=input).start()", "", "failed", ""),
        ("import socket; socket.create_connection(('1.1.1.1', 53), 1)", "", "failed", "Error"),
        ("open('x', 'w').write('mine')", "", "failed", "PermissionError"),
        ("import ctypes; ctypes.string_at(0)", "", "failed", "PermissionError"),
        ("import os; os.abort()", "", "crashed", "SIG"),
        ("print('\\ud800')", "", "failed", "UnicodeEncodeError"),
    ],
)  # fmt: skip
def test_outcomes(program, tests, reason, detail):
    outcome = run_python(program, tests, SHORT)
    assert reason in outcome.reason, outcome
    assert not outcome.passed or reason == "passed"
    assert detail in outcome.detail, outcome


@linux
@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time; time.sleep(100)",
        "import signal; [signal.signal(s, signal.SIG_IGN) for s in (15, 14, 24)]\nwhile True: pass",
        "import os; os.close(1); os.close(2)\nwhile True: pass",
    ],
)
def test_what_hangs_is_stopped(program):
    start = time.monotonic()
    assert run_python(program, limits=SHORT).reason == "timeout"
    assert time.monotonic() - start < 4


# without Python's own hooks, which a program may get around: the kernel itself refuses
CALLS = {
    "fork": "os.fork()",
    "a new program": "os.execv('/bin/true', ['true'])",
    "a socket": "__import__('_socket').socket()",
    "a socket of the machine": "__import__('_socket').socket(1, 1)",
    "a signal": "os.kill(os.getppid(), 0)",
    "a new file": "os.open('new', os.O_CREAT | os.O_WRONLY)",
    "writing": f"os.open({__file__!r}, os.O_WRONLY)",
    "removing": "os.unlink('/nowhere')",
    "a folder": "os.mkdir('new')",
    "renaming": "os.rename('/nowhere', '/nothing')",
    "more memory": "__import__('resource').setrlimit(9, (1 << 40, 1 << 40))",
    "another's memory": "os.open('/proc/1/mem', os.O_RDONLY)",
    "secrets": "open('/etc/passwd')",
    "this test": f"open({__file__!r})",
    "its starter's environment": f"open('/proc/{os.getpid()}/environ')",
    "listing": "os.listdir('/etc')",
}


@linux
@pytest.mark.skipif("reading" not in protections(), reason="this kernel has no Landlock")
def test_the_kernel_refuses():
    attempt = "\ntry:\n    {}\n    print({!r})\nexcept (PermissionError, ValueError): pass"
    program = (
        f"import sys; sys.path.insert(0, {str(CHILD.parent)!r})\nimport os, ctypes, resource, sandbox_child\n"
        "sandbox_child.confine(1 << 30, 10)"
        + "".join(attempt.format(call, name) for name, call in CALLS.items())
        + "\n"
        "libc = ctypes.CDLL(None)\nif os.uname().machine != 'x86_64': sys.exit()\n"
        "for n in (57, 58, 59, 62, 101, 165, 172, 272, 425):\n    if libc.syscall(n, 0, 0, 0, 0, 0) >= 0: print(n)"
    )
    command = [sys.executable, "-I", "-S", "-c", program]
    ran = subprocess.run(command, capture_output=True, text=True, env={}, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == [], f"allowed: {ran.stdout}"


@linux
def test_the_library_works():
    outcome = run_python(
        "import asyncio, bisect, collections, dataclasses, decimal, functools, heapq, itertools, json, queue, re\n"
        "import datetime, hashlib, math, random, statistics, string, threading, typing, zoneinfo\n"
        "found = []\nthread = threading.Thread(target=found.append, args=(1,)); thread.start(); thread.join()\n"
        "print(found, math.pi, random.random() < 1, datetime.datetime.now().year > 2000)\n"
        "print(hashlib.sha256(b'').hexdigest()[:4], round(math.sqrt(decimal.Decimal(2)), 3))"
    )
    assert outcome.passed, outcome
    assert outcome.output == "[1] 3.141592653589793 True True\ne3b0 1.414\n"


@linux
def test_nothing_is_inherited(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    outcome = run_python("import os, sys; print(dict(os.environ), os.listdir('.') if 0 else '', sys.path)")
    assert "secret" not in outcome.output
    assert os.getcwd() not in outcome.output


@linux
def test_many_at_once():
    outcomes = run_all([(f"print({i})", f"assert {i} % 2 == 0") for i in range(8)], SHORT)
    assert [o.passed for o in outcomes] == [True, False] * 4
    assert [o.output for o in outcomes] == [f"{i}\n" for i in range(8)]


def test_a_system_that_cannot_confine(monkeypatch):
    monkeypatch.setattr(sandbox, "protections", lambda: ("limits",))
    with pytest.raises(UserError, match="cannot confine"):
        run_python("print(1)")
    assert run_python("print(1)", trusting=True).passed
