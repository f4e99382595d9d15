"""Every recipe is a run that the command line takes, and the two that say what they repeat do so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from zero2hero import quickstart
from zero2hero.cli import VERBS
from zero2hero.command_line import parse
from zero2hero.config import PretrainConfig, differences, to_dict
from zero2hero.options import QuickstartConfig

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


def read(path: Path, *more: str) -> PretrainConfig:
    verb = re.search(r"zero2hero (.+?) --config", path.read_text())[1]
    return parse(verb, VERBS[verb], ["--config", str(path), *more])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_a_run(path):
    assert read(path).train.max_steps > 0
    assert read(path, "--train.max_steps", "7").train.max_steps == 7


def test_the_stories_are_those_of_the_quickstart():
    recipe = next(path for path in RECIPES if path.stem == "tiny_stories_cpu")
    found = differences(to_dict(quickstart.settings(QuickstartConfig())), to_dict(read(recipe)))
    assert [line.split(":")[0] for line in found] == ["output_dir"]


def test_shakespeare_is_the_benchmark(monkeypatch):
    bench = Path(__file__).parents[2] / "bench"
    monkeypatch.syspath_prepend(str(bench))
    import shakespeare

    recipe = read(next(path for path in RECIPES if path.stem == "shakespeare_characters_cpu"))
    assert (
        recipe.model == shakespeare.SHAPES[180]
        or differences(to_dict(shakespeare.SHAPES[180]), to_dict(recipe.model)) == []
    )
    found = differences(to_dict(shakespeare.TRAIN), to_dict(recipe.train))
    assert {line.split(":")[0] for line in found} <= {"max_steps", "logging_steps"}
