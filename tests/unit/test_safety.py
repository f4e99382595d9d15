"""Invariant 13 and the house rules, read from the source: nothing that runs code, a docstring each, floors in order."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "zero2hero"
MODULES = {
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}


def tree(name: str) -> ast.Module:
    return ast.parse(MODULES[name].read_text(encoding="utf-8"))


# --- nothing runs code --------------------------------------------------------------------------------------

NEVER_IMPORTED = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "code"}
NEVER_IMPORTED |= {"transformers", "peft", "trl"}  # referees in tests; nothing imports them at run time
NEVER_CALLED = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "torch.jit.load", "torch.hub.load",
    "yaml.load", "yaml.full_load", "yaml.unsafe_load", "yaml.load_all", "pandas.read_pickle", "pd.read_pickle",
    "jinja2.Environment", "jinja2.Template",  # where the sandboxed one is meant
}  # fmt: skip


def dotted(node: ast.expr) -> str:
    """`a.b.c` of an attribute access, or a bare name; elsewhere what can be told."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def faults(module: ast.Module) -> list[str]:
    """What a module does that a library which opens other people's files must not do."""
    found = []
    for node in ast.walk(module):
        line = f"line {getattr(node, 'lineno', '?')}"
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"{line}: import {name}" for name in names if name.split(".")[0] in NEVER_IMPORTED]
            if names == ["jinja2"] and {a.name for a in node.names} & {"Environment", "Template"}:
                found.append(f"{line}: templates outside the sandbox")
        elif isinstance(node, ast.Call):
            name = dotted(node.func)
            keywords = {k.arg: k.value for k in node.keywords}
            restricted = keywords.pop("weights_only", None) if name == "torch.load" else None
            if isinstance(restricted, ast.Constant) and restricted.value is True:
                found.append("torch.load(weights_only=True)")
            elif name in NEVER_CALLED:
                found.append(f"{line}: {name}()")
            pickles = keywords.get("allow_pickle")
            refused = isinstance(pickles, ast.Constant) and pickles.value is False
            if name in ("np.load", "numpy.load") and not refused:
                found.append(f"{line}: {name}() without allow_pickle=False")
            if "trust_remote_code" in keywords or keywords.get("weights_only"):
                found.append(f"{line}: {name}() trusts what it loads")
            shell = keywords.get("shell")
            if isinstance(shell, ast.Constant) and shell.value:
                found.append(f"{line}: a shell")
        elif isinstance(node, ast.Constant) and node.value == "trust_remote_code":
            found.append(f"{line}: trust_remote_code")
    return found


# the one place where old weights are opened, when a person asks for it, by torch's restricted reader; and the process
# that runs what a model wrote, when a person asks for that, once the kernel holds it (align/sandbox.py)
ALLOWED = {
    "zero2hero.models.convert": ["torch.load(weights_only=True)"],
    "zero2hero.align.sandbox_child": ["exec()", "exec()", "compile()", "compile()"],
}


@pytest.mark.parametrize("name", MODULES)
def test_nothing_runs_code_from_a_file(name):
    found = [fault.rpartition(": ")[2] for fault in faults(tree(name))] if name in ALLOWED else faults(tree(name))
    assert found == ALLOWED.get(name, [])


@pytest.mark.parametrize(
    "code",
    [
        "import pickle", "from pickle import loads", "import torch; torch.load('x')",
        "torch.load('x', weights_only=False)", "torch.load('x', weights_only=w)", "torch.load('x', weights_only=True)",
        "eval('1')", "exec(s)",
        "import yaml; yaml.load(s)", "np.load(p)", "np.load(p, allow_pickle=True)", "f(trust_remote_code=True)",
        "subprocess.run(c, shell=True)", "x = {'trust_remote_code': True}", "from transformers import AutoModel",
        "from jinja2 import Template",
    ],
)  # fmt: skip
def test_the_search_finds_what_it_looks_for(code):
    assert faults(ast.parse(code))
    assert not faults(ast.parse("yaml.safe_load(s); np.load(p, allow_pickle=False); model.eval(); re.compile(x)"))


# --- the house ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODULES)
def test_every_file_says_what_it_is(name):
    docstring = ast.get_docstring(tree(name))
    if MODULES[name].read_text().strip():
        assert docstring
        assert len(docstring) > 20


# Lowest first; a module may import from its own floor and from those below. `""`: the files beside the folders.
FLOORS = [
    {"errors", "__init__"},
    {"io", "config", "options", "model_configs", "progress", "fetch", "command_line"},
    {"device", "machine"},
    {"nn"},
    {"tokenizer", "data", "models"},
    {"tune", "task_configs", "tuning_configs", "alignment_configs"},
    {"generate"},
    {"language_model", "seeing", "pipelines"},
    {"train"},
    {"align"},
    {"evaluate", "plan"},
    {"hub"},
    {"serve"},
    {"studio", "learn"},
    {"quickstart", "reason"},
    {"cli", "__main__"},
]
# What a verb runs lives beside what it is about, and is called by the command line alone: it stands just below it.
COMMANDS = {name for name in MODULES if name.endswith((".command", "generate.chat"))}


def floor(name: str) -> int:
    if name in COMMANDS:
        return len(FLOORS) - 2
    part = name.split(".")[1] if "." in name else "__init__"
    return next(i for i, floor in enumerate(FLOORS) if part in floor)


def imported(name: str) -> set[str]:
    """The modules of the package that a module imports, at its top or inside its functions; not for types alone."""
    module = tree(name)
    for node in ast.walk(module):
        if isinstance(node, ast.If) and dotted(node.test).endswith("TYPE_CHECKING"):
            node.body = []
    found = set()
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}, line {node.lineno}: imports are absolute here"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {i if i in MODULES else str(node.module) for i in inner}
    return {i for i in found if i.split(".")[0] == "zero2hero"}


@pytest.mark.parametrize("name", MODULES)
def test_no_floor_imports_from_a_higher_one(name):
    for other in imported(name):
        assert floor(other) <= floor(name), f"{name} imports {other}"


def test_modules_of_a_floor_do_not_import_each_other_in_circles():
    graph = {name: {i for i in imported(name) if i in MODULES} - {name} for name in MODULES}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for other in graph[name]:
                # a package's __init__ gathers its own modules, and they do not need it for that
                if not name.startswith(f"{other}."):
                    visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("zero2hero", ["torch", "numpy", "transformers", "datasets", "tokenizers"]),
        ("zero2hero.config", ["torch", "numpy", "datasets"]),
        ("zero2hero.model_configs", ["torch", "numpy", "datasets"]),
        ("zero2hero.cli", ["torch", "datasets", "matplotlib"]),
        ("zero2hero.data", ["torch", "datasets"]),
        ("zero2hero.tokenizer", ["torch", "transformers"]),
        ("zero2hero.train.pretrain", ["transformers", "datasets", "matplotlib", "tensorboard"]),
        ("zero2hero.language_model", ["transformers", "datasets"]),
    ],
)
def test_light_imports_stay_light(module, absent):
    program = f"import sys, {module}; print(*[m for m in {absent} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert done.stdout.split() == []


def test_the_public_names_are_all_there():
    import zero2hero

    for name in zero2hero.__all__:
        assert getattr(zero2hero, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = zero2hero.lod
