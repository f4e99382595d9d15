"""The record of a run: valid JSON lines, killed and resumed without double points, bars and lines."""

from __future__ import annotations

import io
import json
import math
import re
import sys
import types

import numpy as np
import pytest
from rich.console import Console

from zero2hero import progress
from zero2hero.errors import UserError
from zero2hero.progress import TrainingProgress, clock, human_count, track
from zero2hero.train.tracking import Tracker, describe_machine, read_metrics


def steps(run_dir, name="loss"):
    return [row["step"] for row in read_metrics(run_dir) if name in row]


def test_rows_are_valid_json_and_come_back(tmp_path):
    torch = pytest.importorskip("torch")
    with Tracker(tmp_path, tensorboard=False) as tracker:
        tracker.log(1, {"loss": float("nan"), "grad_norm": math.inf, "num_tokens": 4096})
        tracker.log(2, {"loss": torch.tensor(1.5), "eval_loss": np.float32(2), "grad_norm": -math.inf})
        tracker.samples(2, [{"prompt": "Once", "text": ' "upon"\n\ta 🦆'}])
        # what is written is there at once, for whoever looks while the run goes on
        assert len((tmp_path / "metrics.jsonl").read_bytes().splitlines()) == 3

    def no_constants(name):
        raise AssertionError(f"{name} is not JSON")

    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=no_constants)
    first, second, third = read_metrics(tmp_path)
    assert math.isnan(first["loss"])
    assert (first["grad_norm"], second["grad_norm"]) == (math.inf, -math.inf)
    assert (first["num_tokens"], second["loss"], second["eval_loss"]) == (4096, 1.5, 2.0)
    assert third["samples"] == [{"prompt": "Once", "text": ' "upon"\n\ta 🦆'}]
    assert 0 <= first["time"] <= second["time"] <= third["time"]


@pytest.mark.parametrize("keep", [-1, -3, -30])
def test_killed_in_the_middle_of_a_line(tmp_path, keep):
    with Tracker(tmp_path, tensorboard=False) as tracker:
        for step in range(1, 6):
            tracker.log(step, {"loss": 1.0})
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:keep])
    assert steps(tmp_path) in ([1, 2, 3, 4], [1, 2, 3, 4, 5])
    with Tracker(tmp_path, tensorboard=False, resume_step=4) as tracker:
        tracker.log(5, {"loss": 2.0})
    assert steps(tmp_path) == [1, 2, 3, 4, 5]
    assert read_metrics(tmp_path)[-1]["loss"] == 2.0


def test_resume_drops_what_is_done_again_and_time_goes_on(tmp_path):
    with Tracker(tmp_path, tensorboard=False) as tracker:
        tracker._began -= 100  # as if a hundred seconds had passed
        for step in range(0, 50, 10):
            tracker.log(step, {"loss": 1.0})
            tracker.samples(step, [])
    with Tracker(tmp_path, tensorboard=False, resume_step=20) as tracker:
        tracker.log(30, {"loss": 2.0})
    assert steps(tmp_path) == [0, 10, 20, 30]
    assert steps(tmp_path, "samples") == [0, 10, 20]
    assert 100 <= read_metrics(tmp_path)[-1]["time"] < 110
    Tracker(tmp_path, tensorboard=False).close()  # a fresh run starts a fresh record
    assert read_metrics(tmp_path) == []


def test_tensorboard_has_no_double_points(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Tracker(tmp_path) as tracker:
        for step in range(6):
            tracker.log(step, {"loss": float(step)})
    with Tracker(tmp_path, resume_step=2) as tracker:
        for step in range(3, 6):
            tracker.log(step, {"loss": 10.0 + step})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [(e.step, e.value) for e in events] == [(0, 0), (1, 1), (2, 2), (3, 13), (4, 14), (5, 15)]


def test_tensorboard_is_optional_unless_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with Tracker(tmp_path) as tracker:
        tracker.log(1, {"loss": 1.0})
    assert steps(tmp_path) == [1]
    for name, install in (("tensorboard", r"zero2hero\[train\]"), ("wandb", "wandb"), ("trackio", "trackio")):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(UserError, match=rf"{name} is not installed; pip install '{install}'"):
            Tracker(tmp_path, report_to=[name])
    with pytest.raises(UserError, match="no tracker named 'mlflow'; there are tensorboard, wandb, trackio"):
        Tracker(tmp_path, report_to=["mlflow"])
    assert steps(tmp_path) == [1]  # a refused start leaves the old record alone


class FakeTracker(types.SimpleNamespace):
    """Append-only, as W&B (0.31) and trackio (0.43) are: what was sent stays. The parameters are theirs."""

    def __init__(self, name):
        super().__init__(name=name, runs={}, current=None, finished=0)

    def init(self, *, project, name, resume, **more):
        assert project == "zero2hero"
        run = more.pop("id") if self.name == "wandb" else name  # what a run is known by
        more.pop("dir", None) if self.name == "wandb" else None
        assert not more
        assert resume in ("never", "allow")
        assert (run in self.runs) == (resume == "allow")
        self.current = self.runs.setdefault(run, [])

    def log(self, data, step=None):
        self.current.append((step, data))

    def finish(self):
        self.finished += 1


@pytest.fixture(params=["wandb", "trackio"])
def fake(request, monkeypatch):
    fake = FakeTracker(request.param)
    monkeypatch.setitem(sys.modules, request.param, fake)
    return fake


def test_other_trackers_get_the_same_numbers(tmp_path, fake):
    with Tracker(tmp_path / "mine", tensorboard=False, report_to=[fake.name]) as tracker:
        tracker.log(7, {"loss": np.float64(1.25)})
        tracker.samples(7, [{"prompt": "a", "text": "b"}])
    assert list(fake.runs.values()) == [[(7, {"loss": 1.25})]]
    assert fake.finished == 1


def test_other_trackers_have_no_double_points(tmp_path, fake):
    """Killed at step 9, resumed from 4, killed at 6, resumed from 4, then from 2: each step is sent once."""

    def part(first, last, resume_step):
        tracker = Tracker(tmp_path, tensorboard=False, resume_step=resume_step, report_to=[fake.name])
        for step in range(first, last + 1):
            tracker.log(step, {"loss": float(step)})
        return tracker  # a killed process closes nothing

    first = part(1, 9, None)
    part(5, 6, 4)
    part(5, 7, 4)
    last = part(3, 12, 2)
    last.close()
    (run,) = fake.runs.values()
    assert [step for step, _ in run] == list(range(1, 13))
    assert steps(tmp_path) == list(range(1, 13))
    assert first.state_dict() == {"runs": last.state_dict()["runs"], "step": 9}
    assert last.state_dict()["step"] == 12
    assert len([row for row in read_metrics(tmp_path) if "tracker" in row]) == 1
    part(1, 2, None)  # a fresh run there too
    assert [step for step, _ in list(fake.runs.values())[1]] == [1, 2]


def test_the_cursor_in_a_checkpoint_serves_when_the_record_is_lost(tmp_path, fake):
    with Tracker(tmp_path, tensorboard=False, report_to=[fake.name]) as tracker:
        for step in range(1, 6):
            tracker.log(step, {"loss": 1.0})
        state = json.loads(json.dumps(tracker.state_dict()))
    (tmp_path / "metrics.jsonl").unlink()
    with Tracker(tmp_path, tensorboard=False, resume_step=4, report_to=[fake.name], state=state) as tracker:
        for step in range(5, 8):
            tracker.log(step, {"loss": 2.0})
    (run,) = fake.runs.values()
    assert [step for step, _ in run] == [1, 2, 3, 4, 5, 6, 7]


def test_rewinding_forgets_what_comes_again(tmp_path, fake):
    with Tracker(tmp_path, tensorboard=False, report_to=[fake.name]) as tracker:
        for step in range(1, 6):
            tracker.log(step, {"loss": 1.0})
        tracker.rewind(2)
        for step in range(3, 8):
            tracker.log(step, {"loss": 2.0})
    assert [row.get("loss") for row in read_metrics(tmp_path) if "loss" in row] == [1, 1, 2, 2, 2, 2, 2]
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6, 7]
    (run,) = fake.runs.values()
    assert [step for step, _ in run] == [1, 2, 3, 4, 5, 6, 7]


def test_a_tracker_joined_on_resume_gets_what_is_done_from_then_on(tmp_path, fake):
    with Tracker(tmp_path, tensorboard=False) as tracker:
        for step in range(1, 10):
            tracker.log(step, {"loss": 1.0})
    with Tracker(tmp_path, tensorboard=False, resume_step=4, report_to=[fake.name]) as tracker:
        for step in range(5, 12):
            tracker.log(step, {"loss": 1.0})
    (run,) = fake.runs.values()
    assert [step for step, _ in run] == [5, 6, 7, 8, 9, 10, 11]


def test_a_tracker_that_fails_does_not_take_the_run_with_it(tmp_path, fake, capsys, monkeypatch):
    def broken(*args, **options):
        raise ConnectionError("the network is down")

    with Tracker(tmp_path, tensorboard=False, report_to=[fake.name]) as tracker:
        tracker.log(1, {"loss": 1.0})
        fake.log = broken
        tracker.log(2, {"loss": 1.0})
        tracker.log(3, {"loss": 1.0})
    assert steps(tmp_path) == [1, 2, 3]
    assert capsys.readouterr().err.count(f"WARNING: {fake.name} gets no more numbers of this run: the network") == 1
    fake.init = broken
    with pytest.raises(UserError, match=f"report_to: {fake.name} does not start: the network is down"):
        Tracker(tmp_path, tensorboard=False, resume_step=3, report_to=[fake.name])
    assert steps(tmp_path) == [1, 2, 3]


def test_broken_records_are_named(tmp_path):
    with pytest.raises(UserError, match=r"does not exist: is .* the folder of a run"):
        read_metrics(tmp_path)
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl, line 2 is not a metrics row"):
        read_metrics(tmp_path)
    path.write_text('{"step": 1}\n[1]\n{"step": 3}\n')
    with pytest.raises(UserError, match="line 2"):
        read_metrics(tmp_path)


def test_describe_machine_is_text_that_json_can_hold():
    machine = describe_machine()
    assert {"processor", "cores", "torch", "python"} <= machine.keys()
    assert all(isinstance(value, str) and value for value in machine.values())


def console(width=80, terminal=False):
    return Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None, legacy_windows=False)


def test_plain_lines_first_now_and_then_and_last(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    out = console()
    with TrainingProgress(100, start_step=40, console=out) as bar:
        for step in range(41, 101):
            now[0] += 1
            bar.update(step, loss=2.5, per_second=41_250, peak_share=0.617)
    lines = out.file.getvalue().splitlines()
    assert lines[0] == "step 41/100  loss 2.5000  41.2k tok/s  62% of peak  0:01 < 0:59"
    assert [int(line.split()[1].split("/")[0]) for line in lines] == [41, 51, 61, 71, 81, 91, 100]
    assert lines[-1].endswith("1:00 < 0:00")


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_bar_fits_the_terminal(width):
    out = console(width, terminal=True)
    with TrainingProgress(500_000, enabled=None, console=out) as bar:
        bar.update(499_999, loss=1.84, per_second=41_300, peak_share=0.62)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.file.getvalue())
    last = [line for line in re.split("[\r\n]", shown) if "loss" in line][-1]
    assert len(last) <= width
    assert "loss 1.8400" in last
    assert ("tok/s" in last, "of peak" in last) == (width > 60, width > 60)


def test_print_shows_text_as_it_is_but_never_obeys_it():
    for terminal in (False, True):
        out = console(terminal=terminal)
        with TrainingProgress(10, console=out) as bar:
            bar.print("[bold]x[/bold] :smile: \x1b]0;title\x07 \x9b31m\ttab\n\n{1: 'a'}")
        text = out.file.getvalue()
        assert "[bold]x[/bold] :smile: " in text
        assert "\x1b]0" not in text
        assert "\x9b" not in text
        assert "\x07" not in text
    out = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="ascii"), width=80)
    with TrainingProgress(10, console=out) as bar:
        bar.print("🦆 quacks")  # a terminal that cannot show it must not end a run
    out = console()
    with TrainingProgress(10, enabled=False, console=out) as bar:
        bar.update(5)
        bar.print("nothing")
    assert out.file.getvalue() == ""


def test_track_yields_everything(capsys):
    assert list(track([1, 2, 3], "counting")) == [1, 2, 3]
    assert list(track((i for i in range(3)), "counting", enabled=False)) == [0, 1, 2]
    assert list(track([], "counting")) == []
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("counting 1/3")
    assert lines[-1].startswith("counting 3/3")


def test_numbers_for_people():
    shown = [human_count(n) for n in (0, 999.4, 999.6, 41_260, 999_499, 999_600, 12_582_912, 7.241e9, 1.5e12)]
    assert shown == ["0", "999", "1k", "41.3k", "999k", "1M", "12.6M", "7.24B", "1.5T"]
    assert [clock(s) for s in (0, 59.6, 151, 3768)] == ["0:00", "1:00", "2:31", "1:02:48"]
