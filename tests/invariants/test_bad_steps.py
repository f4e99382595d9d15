"""Losses that are not finite: the run stops, skips the step or rolls back, and the batch is on record."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from test_checkpoints import Streams, stepped
from test_training import FILES, kept, make, moments, run_config, same, text, weights  # noqa: F401

from zero2hero.errors import UserError
from zero2hero.train import bad_steps
from zero2hero.train.loop import Trainer
from zero2hero.train.objectives import Loss, causal_lm
from zero2hero.train.pretrain import pretrain
from zero2hero.train.tracking import read_metrics

pytestmark = pytest.mark.usefixtures("one_thread")


def poisoned(trainer: Any, bad: set[int]) -> None:
    """The batches that the data give at the steps `bad` have an infinite loss."""
    data, trainer.fetched, trainer.current = trainer.data, [], None

    def fetch(step: int) -> list[Any]:
        trainer.fetched.append(step)
        trainer.current = step
        return data(step)

    def objective(model, batch) -> Loss:
        loss = causal_lm(model, batch)
        if trainer.current in bad:
            loss.sum = loss.sum * math.inf
        return loss

    trainer.data, trainer.objective = fetch, objective


def test_a_bad_step_that_is_skipped_leaves_no_trace_but_its_record(tmp_path):
    trainer = make(tmp_path, on_bad_loss="skip", logging_steps=2)
    poisoned(trainer, {3})
    trainer.train()
    by_hand = make()
    torch.manual_seed(0)
    for step in range(12):
        if step == 3:
            for batch in by_hand.data(3):
                causal_lm(by_hand.model, batch)  # draws its dropout
            by_hand.state.step += 1
        else:
            by_hand.step()
    assert same(weights(trainer), weights(by_hand))
    assert (trainer.state.bad_steps, trainer.state.step) == (1, 12)
    assert all(math.isfinite(loss) for loss in trainer.tracker.losses.values())
    content = json.loads((tmp_path / "bad_step-000004.json").read_text())
    assert (content["step"], content["loss"], len(content["micro_batches"])) == (4, "inf", 1)


def test_skipping_has_an_end(tmp_path):
    trainer = make(tmp_path, on_bad_loss="skip", save_steps=1, logging_steps=1)
    poisoned(trainer, set(range(2, 12)))
    with pytest.raises(UserError, match=f"step 8: .*That is {bad_steps.MAX_BAD_STEPS + 1} times"):
        trainer.train()
    assert trainer.state.step == 2 + bad_steps.MAX_BAD_STEPS
    assert math.isnan(trainer.tracker.losses[4])
    again = make(tmp_path, on_bad_loss="skip", save_steps=1)
    assert again.resume() == 7
    assert again.state.bad_steps == bad_steps.MAX_BAD_STEPS  # a resume does not begin to count anew


def test_rolling_back_goes_on_behind_the_bad_data(tmp_path):
    settings: dict[str, Any] = {"save_steps": 4, "logging_steps": 1}
    trainer = make(tmp_path, on_bad_loss="rollback", **settings)
    poisoned(trainer, {6})
    trainer.train()
    assert trainer.fetched == [*range(7), *range(7, 15)]  # steps 4 to 11 on the data of 7 to 14
    assert trainer.state.bad_steps == 1
    assert sorted(step for step, _ in trainer.tracker.rows) == list(range(1, 13))  # no double points

    by_hand = stepped(tmp_path / "by hand", 0)
    torch.manual_seed(0)
    for _ in range(4):
        by_hand.step()
    by_hand.state.data_offset = 3
    for _ in range(8):
        by_hand.step()
    assert same(weights(trainer), weights(by_hand))
    resumed = make(tmp_path, on_bad_loss="rollback", **settings)
    resumed.resume()
    assert resumed.state == trainer.state


def test_rolling_back_leaves_data_with_a_position_of_their_own_where_they_are(tmp_path):
    trainer = make(tmp_path, on_bad_loss="rollback", save_steps=4)
    trainer.data = data = Streams(trainer.data)
    poisoned(trainer, {6})
    trainer.data.state_dict, trainer.data.load_state_dict = data.state_dict, data.load_state_dict
    trainer.train()
    assert data.position == 15  # each was read once: 7 until the bad one, 8 after it
    assert trainer.fetched == list(range(15))


def test_rolling_back_again_and_again_has_an_end_and_needs_a_checkpoint(tmp_path):
    trainer = make(tmp_path, on_bad_loss="rollback", save_steps=2)
    poisoned(trainer, set(range(3, 100)))
    with pytest.raises(UserError, match=rf"That is {bad_steps.MAX_BAD_STEPS + 1} times.*step-000002 is intact"):
        trainer.train()
    early = make(tmp_path / "early", on_bad_loss="rollback")
    poisoned(early, {0})
    with pytest.raises(UserError, match="step 1: the loss is inf"):
        early.train()


@pytest.mark.parametrize("choice", ["stop", "rollback"])
def test_the_record_of_a_bad_step_says_which_documents_it_held(text, monkeypatch, choice):  # noqa: F811
    documents = (text / "text.txt").read_text().split("\n\n")
    backward = Trainer._backward

    def bad(trainer, batches):
        total, weight = backward(trainer, batches)
        return (math.nan if trainer.state.step + trainer.state.data_offset == 5 else total), weight

    monkeypatch.setattr(Trainer, "_backward", bad)
    train: dict[str, Any] = {"save_steps": 4, "eval_steps": 4, "logging_steps": 1}
    config = run_config(text, "run", train={**train, "on_bad_loss": choice})
    if choice == "stop":
        with pytest.raises(
            UserError, match=r"step 6: the loss is nan.*bad_step-000006\.json.*step-000004 is intact\. --resume"
        ):
            pretrain(config)
        pretrain(run_config(text, "run", train={**train, "on_bad_loss": "skip"}, resume=True))  # as the message says
    else:
        pretrain(config)
        steps = [row["step"] for row in read_metrics(text / "run") if "grad_norm" in row]
        assert steps == list(range(1, 9))
    content = json.loads((text / "run" / "bad_step-000006.json").read_text())
    (part,) = content["micro_batches"]
    assert math.isfinite(float(part["loss"]))
    assert len(part["rows"]) == 2
    for row in part["rows"]:
        assert len(row["documents"]) == len(set(row["documents"])) >= 1
        assert any(piece in document for document in documents for piece in [row["text"][:8]])
