"""Real English that is already on every machine: the texts that come with Python itself.

`pydoc_documents()` are the sections of the language reference (the text behind `help("for")`, in the module
`pydoc_data.topics`) and the docstrings of the standard library. They are read, never imported or run: the
docstrings are taken from the syntax trees of the source files. Which texts there are depends on the version of
Python; their order does not depend on anything else.
"""

from __future__ import annotations

import ast
import functools
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

MIN_CHARS = 200  # anything shorter says too little

# Modules of the standard library that are written in Python and say much in their docstrings.
MODULES = """
    _collections_abc _pydecimal _pyio argparse ast asyncio/base_events asyncio/events asyncio/locks asyncio/queues
    asyncio/streams asyncio/tasks base64 bdb bisect calendar cmd code codecs collections/__init__ colorsys compileall
    concurrent/futures/_base configparser contextlib copy csv ctypes/util curses/textpad dataclasses datetime difflib
    dis distutils/util doctest email/charset email/header email/message email/policy email/utils enum filecmp
    fileinput fnmatch fractions ftplib functools getopt getpass gettext glob graphlib gzip heapq hmac html/parser
    http/client http/cookiejar http/cookies http/server imaplib importlib/_bootstrap importlib/abc inspect ipaddress
    json/__init__ json/decoder json/encoder keyword linecache locale logging/__init__ logging/config logging/handlers
    lzma mailbox mimetypes modulefinder multiprocessing/managers multiprocessing/pool netrc ntpath numbers opcode
    operator optparse os pathlib pdb pickle pickletools pkgutil platform plistlib poplib posixpath pprint profile
    pstats pyclbr pydoc queue quopri random reprlib rlcompleter runpy sched secrets selectors shelve shlex shutil
    smtplib socket socketserver sqlite3/dump ssl stat statistics string struct subprocess symtable tarfile tempfile
    textwrap threading timeit token tokenize trace traceback tracemalloc turtle types typing unittest/case
    unittest/loader unittest/mock unittest/suite urllib/parse urllib/request uuid warnings wave weakref webbrowser
    wsgiref/handlers wsgiref/util xml/dom/minidom xml/etree/ElementTree xml/sax/handler xmlrpc/client zipfile zipimport
    """
_UNDERLINE = re.compile(r"^([*=\-~^\"#])\1{2,}\s*$")
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
_ROLE = re.compile(r":[a-z:]+:`~?([^`]*)`")


@functools.cache
def _documents() -> tuple[str, ...]:
    first: dict[str, str] = {}
    for text in (*_reference(), *_docstrings()):
        if len(text) >= MIN_CHARS:
            first.setdefault(text.partition("\n\n")[2], text)  # the same words under another heading are not new
    return tuple(first.values())


def pydoc_documents() -> list[str]:
    """The language reference by section, then the standard library's docstrings by module: each text once."""
    return list(_documents())


def _reference() -> Iterator[str]:
    """The sections of the reference. The topics overlap ("compound" contains "for"); the sections do not."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some systems package it separately
        return
    for name in sorted(topics):
        yield from _sections(topics[name])


def _sections(text: str) -> Iterator[str]:
    """The parts of a reST text that begin with an underlined heading; the underline is left out."""
    part: list[str] = []
    lines = text.splitlines()
    for line, below in zip(lines, [*lines[1:], ""]):
        if _UNDERLINE.match(below) and line.strip() and not line.startswith(" "):
            yield _clean("\n".join(part))
            part = []
        if not _UNDERLINE.match(line):
            part.append(line)
    yield _clean("\n".join(part))


def _docstrings() -> Iterator[str]:
    library = Path(sysconfig.get_path("stdlib"))
    for name in MODULES.split():
        path = library / f"{name}.py"
        if path.is_file():  # modules come and go between the versions of Python
            module = name.removesuffix("/__init__").replace("/", ".")
            yield from _docstrings_of(ast.parse(path.read_text(encoding="utf-8")), module)


def _docstrings_of(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str
) -> Iterator[str]:
    """The docstring of a module, class or function under its full name, then those of what it contains."""
    docstring = ast.get_docstring(node)
    if docstring:
        yield _clean(f"{name}\n\n{docstring}")
    if isinstance(node, (ast.Module, ast.ClassDef)):
        for child in node.body:
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                yield from _docstrings_of(child, f"{name}.{child.name}")


def _clean(text: str) -> str:
    """Without reST marks, rules and the frames of tables; at most one blank line in a row."""
    text = _ROLE.sub(r"\1", text).replace("``", "")
    lines = [
        line.rstrip() for line in text.splitlines() if not _UNDERLINE.match(line) and not line.startswith(("+-", "|"))
    ]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()
