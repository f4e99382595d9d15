"""report.html and plots: what is on the page, that nothing on it can run, and what happens when files lack."""

from __future__ import annotations

import base64
import hashlib
import math
import re
import sys
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest

from zero2hero.errors import UserError
from zero2hero.train import plots, report
from zero2hero.train.plots import smoothed
from zero2hero.train.report import Section, duration, parameter_count, write_report
from zero2hero.train.tracking import Tracker

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp;\x00\x1b[31m\ud800 ünï"


def make_run(path, points=20):
    path.mkdir(exist_ok=True)
    (path / "run.yaml").write_text(
        "seed: 1\ndata:\n  path: '<b>bold</b>'\ntrain:\n  betas: [0.9, 0.95]\n  schedule:\n    warmup_steps: 5\n"
    )
    (path / "config.json").write_text('{"vocab_size": 512}')
    with Tracker(path, tensorboard=False) as tracker:
        tracker._began -= 302
        tracker.record(0, machine={"processor": "Abacus <3>"})
        tracker.log(0, {"ngram_nll": 3.25, "ngram_order": 3})
        for step in range(1, points + 1):
            tracker.log(
                step,
                {
                    "loss": 6.2 / step**0.3,
                    "learning_rate": 1e-3,
                    "tokens_per_second": 41_300.0,
                    "peak_share": 0.625,
                    "num_tokens": step * 8192,
                },
            )
            if step % 5 == 0:
                tracker.log(step, {"eval_loss": 2.0, "eval_bits_per_byte": 0.75})
                tracker.samples(
                    step,
                    [{"prompt": "Once <upon>", "text": f"{EVIL} {step}"}, {"prompt": "Lily", "text": f"b{step}"}],
                )
    return path


class Page(HTMLParser):
    """The page as a browser takes it apart."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text, self._skip = [], "", False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._skip = tag == "style"

    def handle_endtag(self, tag):
        self._skip = False

    def handle_data(self, data):
        if not self._skip:
            self.text += data

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def test_page_says_how_the_run_went(tmp_path):
    pytest.importorskip("matplotlib")
    path = write_report(make_run(tmp_path / "tiny & mine"))
    assert path == tmp_path / "tiny & mine" / "report.html"
    page = Page(path)
    for fact in ("tiny & mine", "Held-out loss 2.000", "perplexity 7.389", "0.750 bits per byte", "3-gram", "3.250"):
        assert fact in page.text
    for fact in ("164k", "5 min 2 s", "41.3k", "62%", "warmup_steps", "[0.9, 0.95]", "<b>bold</b>", "Abacus <3>"):
        assert fact in page.text
    # early, middle and late side by side for every prompt
    assert re.findall(r"step (\d+)…(?:b)", page.text) == ["5", "10", "15", "20"]
    assert page.text.count("alert(1)") == 4
    assert path.stat().st_size < 400_000
    assert (path.parent / "plots" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_page_is_self_contained_and_nothing_in_it_runs(tmp_path):
    pytest.importorskip("matplotlib")
    page_path = write_report(make_run(tmp_path / "run"))
    page, source = Page(page_path), page_path.read_text(encoding="utf-8")
    assert not {"script", "link", "iframe", "b", "upon"} & {tag for tag, _ in page.tags}
    for tag, attrs in page.tags:
        assert not any(name.startswith("on") or name == "style" for name in attrs), tag
        for name in ("src", "srcset", "href"):
            assert attrs.get(name, "data:").startswith("data:image/png;base64,"[:5])
    assert "http://" not in source
    assert "https://" not in source
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", source)
    # the policy admits exactly the style sheet that is there
    (policy,) = [m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    style = re.search("<style>(.*)</style>", source, re.S).group(1)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy == f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'"
    dark = page.all("source")[0]["srcset"]
    assert base64.b64decode(dark.split(",")[1]) != base64.b64decode(page.all("img")[0]["src"].split(",")[1])


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = Page(write_report(make_run(tmp_path / "run")))
    assert "Curves need matplotlib: pip install 'zero2hero[train]'" in page.text
    assert "Held-out loss 2.000" in page.text
    assert not page.all("img")


def test_runs_that_lack_things(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(UserError, match=r"is .* the folder of a run"):
        write_report(tmp_path)
    with Tracker(tmp_path, tensorboard=False) as tracker:
        assert "No loss has been recorded yet" in Page(write_report(tmp_path)).text
        tracker.log(1, {"loss": 3.0})
        assert "Training loss 3.000" in Page(write_report(tmp_path)).text
        tracker.log(2, {"loss": math.nan})
        assert "The run diverged: its last training loss is nan" in Page(write_report(tmp_path)).text
        tracker.log(3, {"eval_loss": 1.0})
        tracker.log(4, {"eval_loss": 1.5})
        assert "the best on the way was 1.000" in Page(write_report(tmp_path)).text
    for name, broken in (("run.yaml", "a: [1"), ("config.json", "{"), ("run.yaml", "- a list")):
        (tmp_path / name).write_text(broken)
        with pytest.raises(UserError, match=name):
            write_report(tmp_path)
        (tmp_path / name).unlink()


def test_a_stage_adds_a_section_and_a_figure(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    run = make_run(tmp_path / "run")
    extra = lambda run: Section("Rewards <r>", f"<p>{len(run.values('loss'))} rows</p>")  # noqa: E731
    monkeypatch.setattr(report, "SECTIONS", [*report.SECTIONS, extra])
    monkeypatch.setitem(plots.FIGURES, "again", plots.loss_figure)
    page = Page(write_report(run))
    assert "Rewards <r>" in page.text
    assert "20 rows" in page.text
    assert len(page.all("img")) == 3  # the loss twice, and training against held out
    assert (run / "plots" / "again.png").exists()


def test_diagnosis_is_on_the_page(tmp_path):
    pytest.importorskip("matplotlib")
    run = make_run(tmp_path / "run", points=40)
    page = Page(write_report(run))
    assert "Nothing looks wrong. Checked: the course of the training loss, loss spikes, over-fitting" in page.text
    assert len(page.all("img")) == 2  # the loss, and training against held out
    with Tracker(run, tensorboard=False, resume_step=40) as tracker:
        for step in range(41, 60):
            tracker.log(step, {"loss": 2.0, "dead_units/<b>layer</b>": 0.5})
    page = Page(write_report(run))
    assert "Worst in <b>layer</b>: 50% of its units" in page.text
    assert "finding" in [attrs.get("class") for attrs in page.all("div")]
    with Tracker(run, tensorboard=False, resume_step=40) as tracker:
        for step in range(41, 60):
            ill = {"loss": 5.0 + step / 40, "learning_rate": 0.1, "grad_norm_max": 3.0, "update_ratio/head": 0.1}
            tracker.log(step, ill)
    page = Page(write_report(run))
    assert "Learning rate too high" in page.text
    assert "Try: --train.learning_rate 0.01, a longer warm-up (--train.warmup_steps 0.1)" in page.text
    assert "finding serious" in [attrs.get("class") for attrs in page.all("div")]
    assert len(page.all("img")) == 4
    assert "Nothing looks wrong" not in page.text
    assert {p.stem for p in (run / "plots").iterdir()} == {"loss", *plots.HEALTH}


def small_lines(figure):
    return [line.get_ydata() for line in figure.axes[0].lines], [t.get_text() for t in figure.axes[0].texts]


def test_small_figures_draw_the_numbers():
    pytest.importorskip("matplotlib")
    rows = [{"step": s, "update_ratio/head": 0.1 / s, "update_ratio/attention": 0.2 / s} for s in range(1, 9)]
    lines, labels = small_lines(plots.update_figure(rows, {}, plots.LIGHT))
    np.testing.assert_allclose(lines[0], [0.2 / s for s in range(1, 9)])
    np.testing.assert_allclose(lines[1], [0.1 / s for s in range(1, 9)])
    assert lines[2][0] == 1e-3
    assert sorted(labels) == ["attention", "head"]
    rows = [{"step": 1, "grad_norm_max": math.inf}, {"step": 2, "grad_norm_max": 0.0}, {"step": 3, "loss": -1.0}]
    assert plots.gradient_figure(rows, {}, plots.LIGHT) is None
    assert plots.gap_figure(rows, {}, plots.LIGHT) is None
    assert set(plots.draw([{"step": 2, "grad_norm_max": 2.0}], {}, figures=plots.HEALTH)) == {"gradient_norm"}


def loss_axes(rows, vocab_size=512):
    figure = plots.loss_figure(rows, {"vocab_size": vocab_size}, plots.LIGHT)
    return figure.axes[0], [text.get_text() for text in figure.axes[0].texts]


def test_figure_draws_the_numbers():
    pytest.importorskip("matplotlib")
    rows = [{"step": s, "loss": 6.0 - s / 10, "num_tokens": s * 100, "learning_rate": s / 1e4} for s in range(1, 41)]
    rows += [{"step": 0, "ngram_nll": 3.25, "ngram_order": 3}, {"step": 40, "eval_loss": 2.5}]
    axes, labels = loss_axes(rows)
    assert labels == ["training  2.050", "held out  2.500", "3-gram, same text  3.250", "uniform guess  ln 512 = 6.24"]
    heights = [line.get_ydata()[0] for line in axes.lines[:2]]
    assert heights == [pytest.approx(math.log(512)), 3.25]
    raw = axes.lines[2]
    np.testing.assert_allclose(raw.get_xdata(), np.arange(1, 41) * 100)
    np.testing.assert_allclose(raw.get_ydata(), 6.0 - np.arange(1, 41) / 10)
    low, high = axes.get_ylim()
    assert low < 2.0
    assert high > math.log(512)


@pytest.mark.parametrize(
    "losses", [[5.0], [0.0, 0.0], [-1.0, 0.5, 2.0], [math.nan, 3.0, math.inf], [7.0, 1e30], [1.31, 1.30, 1.29]]
)
def test_odd_losses_still_make_a_figure(losses, recwarn):
    pytest.importorskip("matplotlib")
    rows = [{"step": step, "loss": loss} for step, loss in enumerate(losses)]
    assert plots.draw(rows, {"vocab_size": 512})["loss"].startswith(b"\x89PNG")
    assert not [w for w in recwarn if issubclass(w.category, (RuntimeWarning, UserWarning))]


def test_fine_tuning_is_not_squeezed_by_the_line_of_uniform_guessing():
    pytest.importorskip("matplotlib")
    _, labels = loss_axes([{"step": s, "loss": 1.3 - s / 1000} for s in range(20)])
    assert labels == ["training  1.281"]
    assert plots.draw([{"step": 1, "samples": []}], {}) == {}


def test_labels_do_not_overlap():
    pytest.importorskip("matplotlib")
    rows = [{"step": s, "loss": 2.0 + 4 / s, "eval_loss": 2.01 + 4 / s, "ngram_nll": 2.005} for s in range(1, 101)]
    axes, _ = loss_axes(rows)
    axes.figure.canvas.draw()
    boxes = sorted((text.get_window_extent().y0, text.get_window_extent().y1) for text in axes.texts)
    assert len(boxes) == 4
    assert all(below[1] <= above[0] for below, above in pairwise(boxes))


def test_smoothing_keeps_means_and_does_not_lag():
    line = np.linspace(8, 2, 500)
    np.testing.assert_allclose(smoothed(line)[:480], line[:480])  # symmetric windows leave a line alone
    noise = np.random.default_rng(0).normal(size=5000)
    assert smoothed(noise).std() < 0.15
    np.testing.assert_array_equal(smoothed(np.array([3.0])), [3.0])


def test_parameter_count(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    tensors = {"a": torch.zeros(3, 5), "b": torch.zeros(7, dtype=torch.bfloat16), "c": torch.zeros(())}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert parameter_count(tmp_path / "model.safetensors") == 15 + 7 + 1
    assert parameter_count(tmp_path / "none.safetensors") is None


def test_duration():
    assert [duration(s) for s in (4.4, 302, 12_000)] == ["4 s", "5 min 2 s", "3 h 20 min"]


def test_units_are_those_of_the_task(tmp_path):
    with Tracker(tmp_path, tensorboard=False) as tracker:
        tracker.record(0, units={"item": "pair", "loss": "squared <error>"})
        for step in range(1, 6):
            tracker.log(step, {"loss": 0.7 / step, "num_pairs": 8 * step, "pairs_per_second": 31.5})
        tracker.log(5, {"eval_loss": 0.2})
    text = Page(write_report(tmp_path)).text
    assert "Held-out loss 0.200 squared <error> per pair." in text
    assert "pairs seen40" in text
    assert "token" not in text
    assert "perplexity" not in text
