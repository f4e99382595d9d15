"""The average of the weights: its formula, that training does not feel it, and that it resumes."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from zero2hero.config import DecoderConfig, TrainConfig
from zero2hero.data.batches import Batch
from zero2hero.models import Decoder, init_weights
from zero2hero.progress import TrainingProgress
from zero2hero.train.ema import WeightAverage
from zero2hero.train.loop import Trainer
from zero2hero.train.objectives import causal_lm

pytestmark = pytest.mark.usefixtures("one_thread")

MODEL = DecoderConfig(vocab_size=13, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
CONFIG = TrainConfig(max_steps=8, max_length=6, learning_rate=0.01)


def batch(step: int) -> list[Batch]:
    ids = torch.randint(13, (2, 7), generator=torch.Generator().manual_seed(step))
    return [Batch(ids[:, :-1], ids[:, 1:], torch.arange(6).expand(2, -1), None)]


def make_trainer(watchers=(), dtype=torch.float32, output_dir=None, **settings) -> Trainer:
    model = Decoder(MODEL)
    init_weights(model)
    config = dataclasses.replace(CONFIG, **settings)
    return Trainer(model, causal_lm, batch, config, config.max_steps, output_dir, dtype=dtype, watchers=watchers)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.masters.parameters.items()}


def test_the_average_by_hand():
    average = WeightAverage(0.5)
    trainer = make_trainer([average])
    expected: dict[str, torch.Tensor] = {}
    for step in range(1, 9):
        trainer.step()
        decay = min(0.5, (1 + step) / (10 + step))  # reaches 0.5 at the eighth step
        now = {name: p.double() for name, p in weights(trainer).items()}
        expected = {n: decay * expected[n] + (1 - decay) * now[n] for n in now} if expected else now
    for name, value in expected.items():
        assert (average.average[name].double() - value).abs().max() < 1e-6
    assert any(not torch.equal(average.average[n], w) for n, w in weights(trainer).items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_work_is_done_by_the_average_and_training_goes_on_unchanged(dtype, bf16):
    average = WeightAverage(0.9)
    trainer, plain = make_trainer([average], dtype), make_trainer(dtype=dtype)
    for _ in range(3):
        trainer.step()
        plain.step()
    own = weights(trainer)
    seen = average.around(trainer, lambda: {n: p.detach().clone() for n, p in trainer.model.named_parameters()})()
    for name, value in seen.items():
        assert torch.equal(value, average.average[name].to(dtype))
    assert all(torch.equal(value, own[name]) for name, value in weights(trainer).items())
    trainer.step()
    plain.step()
    assert all(torch.equal(value, weights(plain)[name]) for name, value in weights(trainer).items())


def test_weights_come_back_when_the_work_fails():
    average = WeightAverage(0.9)
    trainer = make_trainer([average])
    trainer.step()
    trainer.step()
    before = weights(trainer)
    with pytest.raises(ZeroDivisionError):
        average.around(trainer, lambda: 1 / 0)()
    assert all(torch.equal(value, before[name]) for name, value in weights(trainer).items())


def test_before_the_first_step_the_average_is_the_weights():
    average = WeightAverage(0.9)
    trainer = make_trainer([average])
    assert average.around(trainer, lambda: 7)() == 7


def test_the_average_resumes_bit_for_bit(tmp_path):
    straight = WeightAverage(0.9)
    make_trainer([straight], output_dir=tmp_path / "straight").train()
    first = make_trainer([WeightAverage(0.9)], output_dir=tmp_path / "halves", save_steps=4)
    while first.state.step < 4:
        first.step()
    first.save()
    second = WeightAverage(0.9)
    trainer = make_trainer([second], output_dir=tmp_path / "halves", save_steps=4)
    assert trainer.resume() == 4
    trainer.train()
    assert straight.average.keys() == second.average.keys()
    assert all(torch.equal(value, second.average[name]) for name, value in straight.average.items())


def test_early_stopping_keeps_the_average_of_the_best_step_and_says_so(tmp_path, capsys):
    """The held-out loss is lowest at the second evaluation: the average of that step is what is left."""
    average, losses = WeightAverage(0.5), iter([3.0, 2.0, 2.5, 2.6])
    trainer = make_trainer([average], output_dir=tmp_path, max_steps=12, eval_steps=2, early_stopping_patience=2)
    trainer.progress = TrainingProgress(12)
    seen = []

    def evaluate() -> dict[str, float]:
        seen.append({name: value.clone() for name, value in average.average.items()})
        return {"eval_loss": next(losses)}

    trainer.evaluate = evaluate
    trainer.train()
    assert trainer.state.step == 8
    assert "stopped early: no held-out loss since step 4 was better" in capsys.readouterr().out
    assert all(torch.equal(value, seen[1][name]) for name, value in average.average.items())


def test_a_run_evaluates_and_leaves_the_average(tmp_path):
    """The result of pretraining is the average of the last step, not the weights that the checkpoint goes on with."""
    from zero2hero.config import PretrainConfig, TokenizerConfig
    from zero2hero.train.checkpoint import folder_of, read_tree, read_weights
    from zero2hero.train.pretrain import pretrain

    (tmp_path / "text.txt").write_text("\n\n".join(f"{i} and {i + 1} make {2 * i + 1}." for i in range(200)))
    train = TrainConfig(max_steps=6, max_length=32, per_device_train_batch_size=4, ema_decay=0.9, eval_steps=6)
    lm = pretrain(PretrainConfig(
        data=str(tmp_path / "text.txt"), output_dir=str(tmp_path / "run"), precision="fp32", device="cpu", report_to=[],
        tokenizer=TokenizerConfig(kind="char"), model=dataclasses.replace(MODEL, vocab_size=0), train=train,
    ))  # fmt: skip
    folder = folder_of(tmp_path / "run", 6)
    average, own = read_tree(folder, "state")["state"]["watchers"]["weight_average"], read_weights(folder, {})
    for name, value in lm.model.named_parameters():
        assert torch.equal(value.detach(), average[name])
    assert not torch.equal(average["embed_tokens.weight"], own["embed_tokens.weight"])
