"""The built-in corpora: real English that comes with Python, read and never run."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys

import pytest

from zero2hero.data.corpora import MIN_CHARS, _docstrings_of, _sections, pydoc_documents


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return pydoc_documents()


def test_there_is_plenty_of_clean_text(documents):
    assert sum(map(len, documents)) > 500_000
    assert len(documents) > 800
    assert len(set(documents)) == len(documents)
    bodies = [text.partition("\n\n")[2] for text in documents]
    assert len(set(bodies)) == len(bodies)
    assert min(map(len, documents)) >= MIN_CHARS
    joined = "\n".join(documents)
    assert not re.search(r"^[*=~^-]{3,}$", joined, re.MULTILINE), "underlines of headings are left out"
    assert "``" not in joined
    assert "\n\n\n" not in joined


def test_it_contains_the_reference_and_the_library(documents):
    pytest.importorskip("pydoc_data.topics")
    assert any(text.startswith('The "for" statement') for text in documents)
    assert sum(text.startswith('The "assert" statement') for text in documents) == 1
    assert any(text.startswith("textwrap.dedent\n\nRemove any common leading whitespace") for text in documents)


def test_the_library_is_read_but_not_imported_and_the_order_is_fixed(documents):
    code = (
        "import sys, json, hashlib; from zero2hero.data.corpora import pydoc_documents as d;"
        "print(json.dumps([hashlib.sha256('|'.join(d()).encode()).hexdigest(),"
        " [m for m in ('turtle', 'torch', 'smtplib', 'numpy') if m in sys.modules]]))"
    )
    env = {**os.environ, "PYTHONHASHSEED": "99"}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stdout
    assert json.loads(out) == [hashlib.sha256("|".join(documents).encode()).hexdigest(), []]


def test_the_caller_gets_a_list_of_its_own(documents):
    mine = pydoc_documents()
    mine.clear()
    assert pydoc_documents() == documents


def test_sections_are_cut_at_headings_and_tables_lose_their_frames():
    text = "First\n*****\n\nSome text.\n\nSecond\n======\n\n+---+\n| a |\n+---+\n\nMore :func:`text`.\n"
    assert [part for part in _sections(text) if part] == ["First\n\nSome text.", "Second\n\nMore text."]


def test_docstrings_are_found_in_classes_and_functions():
    import ast

    source = '"""Module."""\nclass A:\n    """Class."""\n    async def f(self):\n        """Method."""\n'
    assert list(_docstrings_of(ast.parse(source), "m")) == ["m\n\nModule.", "m.A\n\nClass.", "m.A.f\n\nMethod."]
