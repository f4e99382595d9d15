"""The quickstart's stages of alignment: what they are told, and that one which taught nothing ends it."""

import json

import pytest

from zero2hero import quickstart
from zero2hero.errors import FellShort
from zero2hero.options import QuickstartConfig


def record(folder, *values):
    folder.mkdir()
    rows = [{"step": i, "time": float(i), "eval_win_rate": value} for i, value in enumerate(values)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_stage_must_raise_what_it_is_for(tmp_path, capsys):
    quickstart.must_rise(record(tmp_path / "up", 0.5, 0.4, 0.7), "eval_win_rate", "Stories liked better")
    assert capsys.readouterr().out.strip() == "Stories liked better: 50% before, 70% after."
    for name, values in {"down": (0.5, 0.7, 0.3), "chance": (0.5, 0.53), "same": (0.5, 0.5)}.items():
        with pytest.raises(FellShort, match=rf"50% before, {values[-1]:.0%} after, which is no more than chance"):
            quickstart.must_rise(record(tmp_path / name, *values), "eval_win_rate", "Stories liked better")


def test_the_stages_follow_each_other():
    config = QuickstartConfig(output_dir="runs/q/")
    taste, sums = quickstart.taste_settings(config), quickstart.practice_settings(config)
    assert (taste.model, taste.output_dir) == ("runs/q/", "runs/q_taste")
    assert (sums.model, sums.output_dir, sums.method) == ("runs/q_chat", "runs/q_sums", "full")
    assert taste.data.startswith("preferences")  # whose taste is known, so the win rate is in the record
    assert sums.reward_funcs == ["number"]
