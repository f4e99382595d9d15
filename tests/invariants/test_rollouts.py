"""Invariant 11: what the sampler says of its own tokens is what the training forward says, so the first ratio is 1."""

from __future__ import annotations

import dataclasses
import signal

import pytest
import torch

from zero2hero.align.rollout import Rollout, RolloutData, Sampler, policy_logprobs, rollout_logprobs, training_batch
from zero2hero.config import DecoderConfig, TrainConfig
from zero2hero.errors import Stopped, UserError
from zero2hero.models import Decoder, init_weights
from zero2hero.tokenizer import Tokenizer
from zero2hero.train.loop import Trainer
from zero2hero.train.objectives import Loss
from zero2hero.tune import LoraConfig, add_lora

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPTS = [[5, 6, 7], list(range(30, 70)), [9] * 17, [5, 6, 7]]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["What is 2 + 3? The answer is 5. The cat sat on the mat."] * 3, vocab_size=300)


def make_model(tokenizer: Tokenizer, dropout: float = 0.0, kind: str = "full", **shape) -> Decoder:
    config = DecoderConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=96, dropout=dropout, **shape,
    )  # fmt: skip
    model = Decoder(config)
    init_weights(model, 1)
    stir(model, 0.15)
    if kind == "lora":
        add_lora(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=dropout))
        stir(model, 0.1)
    return model


def stir(model: Decoder, strength: float, seed: int = 3) -> None:
    """Move the weights, so that no part of the model is at rest."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += strength * torch.randn(parameter.shape, generator=generator)


def make_sampler(model: Decoder, tokenizer: Tokenizer, ends=(2,), **settings) -> Sampler:
    settings = {"max_completion_length": 24, "temperature": 0.8, "seed": 4} | settings
    return Sampler(model, tokenizer, ends, **settings)


@pytest.mark.parametrize("shape", [{}, {"position": "learned", "norm": "layernorm", "feedforward": "gelu"}])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_ratio_is_one_at_the_first_update_of_every_rollout(tokenizer, kind, shape):
    model = make_model(tokenizer, dropout=0.2, kind=kind, **shape)
    sampler = make_sampler(model, tokenizer)
    for step in range(3):
        model.train()
        rollout = sampler(PROMPTS, num_generations=4, step=step)
        batch = training_batch(rollout, range(16), old=rollout.logprobs_NC)
        ratio_K = (policy_logprobs(model, batch, 0.8) - batch.columns["old"]).exp()
        assert len(ratio_K) == sum(rollout.lengths)
        assert (ratio_K - 1).abs().max() < 1e-4
        assert model.training
        stir(model, 0.05, seed=step)  # an update: the next rollout must be the new policy's
        assert (policy_logprobs(model, batch, 0.8) - batch.columns["old"]).abs().max() > 0.05


def test_in_bf16_the_ratio_is_near_one(tokenizer, bf16):
    model = make_model(tokenizer).to(torch.bfloat16)
    rollout = make_sampler(model, tokenizer)(PROMPTS, 4)
    difference = (rollout_logprobs(model, rollout, 0.8) - rollout.logprobs_NC).abs()
    assert 0 < difference.mean() < 0.02
    assert difference.max() < 0.2


def test_rollouts_are_a_function_of_weights_prompts_seed_and_step(tokenizer):
    model = make_model(tokenizer)
    rollout = make_sampler(model, tokenizer)(PROMPTS, 4, step=7)
    assert make_sampler(model, tokenizer)(PROMPTS, 4, step=7) == rollout
    assert make_sampler(model, tokenizer)(PROMPTS, 4, step=8).completion_ids != rollout.completion_ids
    assert make_sampler(model, tokenizer, seed=5)(PROMPTS, 4, step=7).completion_ids != rollout.completion_ids
    ids = rollout.completion_ids
    assert len({tuple(completion) for completion in ids}) == len(ids)  # a prompt that comes twice, too


def test_completions_end_at_their_end_token_or_are_cut_off(tokenizer):
    model = make_model(tokenizer)
    rollout = make_sampler(model, tokenizer, temperature=3.0)([[5]] * 16, 8)
    assert set(rollout.finish_reasons) == {"stop", "length"}
    for ids, reason, text in zip(rollout.completion_ids, rollout.finish_reasons, rollout.texts):
        assert (2 in ids) == (reason == "stop") == (ids[-1] == 2)
        assert len(ids) == 24 if reason == "length" else len(ids) <= 24
        assert text == tokenizer.decode(ids)
    near_the_end = make_sampler(model, tokenizer)([[5] * 90], 4)
    assert max(near_the_end.lengths) == 7  # the context holds 96, and the last token is not read


def test_what_samples_of_a_prompt_have_in_common_is_read_once(tokenizer):
    sampler = make_sampler(make_model(tokenizer), tokenizer, max_completion_length=1)
    sampler([list(range(10, 91))], 8)
    assert sampler._engine.counters["read_tokens"] == 80 + 8  # whole pages of 16 once, and the last token by each


def test_rows_hold_the_sampled_ids_and_train_the_policy_s_own(tokenizer):
    model = make_model(tokenizer)
    rollout = make_sampler(model, tokenizer)([[5, 6], [7]], 3)
    batch = training_batch(rollout, [4, 1, 0], per_sample=torch.arange(6.0))
    for sample in (4, 1, 0):
        of_sample = batch.sample_K == sample
        targets = batch.targets_BT
        assert targets[targets != -100][of_sample].tolist() == rollout.completion_ids[sample]
        assert batch.token_K[of_sample].tolist() == list(range(rollout.lengths[sample]))
        assert set(batch.columns["per_sample"][of_sample].tolist()) == {float(sample)}
    assert batch.num_samples == 3
    one_by_one = torch.zeros(rollout.mask_NC.shape)
    for i in range(6):
        alone = training_batch(rollout, [i])
        alone.padded(policy_logprobs(model, alone).detach(), one_by_one)
    assert torch.allclose(rollout_logprobs(model, rollout), one_by_one, atol=1e-5)


def test_observations_are_read_and_not_trained(tokenizer):
    """Whoever answers adds tokens; the policy goes on behind them, with the same ids."""
    model = make_model(tokenizer)

    def answer(number, text):
        return [7, 8, 9] if len(text.ids) < 20 else None

    sampler = make_sampler(model, tokenizer, range(100, 150), temperature=3.0, max_completion_length=40)
    rollout = sampler([[5]] * 4, 4, 0, answer)
    turns = [own.count(False) // 3 for own in rollout.own]
    assert max(turns) >= 2
    assert len(set(turns)) > 1
    for ids, own, logprobs in zip(rollout.completion_ids, rollout.own, rollout.logprobs):
        foreign = [token for token, mine in zip(ids, own) if not mine]
        assert foreign == [7, 8, 9] * (len(foreign) // 3)
        assert all((logprob == 0) == (not mine) for logprob, mine in zip(logprobs, own))
        assert len(ids) <= 40
    again = rollout_logprobs(model, rollout, 3.0)
    assert (again - rollout.logprobs_NC).abs().max() < 1e-4


def test_settings_that_cut_the_tail_say_that_they_are_not_exact(tokenizer):
    model = make_model(tokenizer)
    assert make_sampler(model, tokenizer)([[5]]).exact
    cut = make_sampler(model, tokenizer, top_k=5)([[5]] * 8)
    assert not cut.exact
    assert (rollout_logprobs(model, cut, 0.8) <= cut.logprobs_NC + 1e-5).all()


def test_bad_input_is_named(tokenizer):
    model = make_model(tokenizer)
    with pytest.raises(UserError, match="prompt 1 has 97 tokens; the model's context is 96"):
        make_sampler(model, tokenizer)([[5], [5] * 97])
    with pytest.raises(UserError, match="explores by sampling"):
        make_sampler(model, tokenizer, temperature=0.0)
    with pytest.raises(UserError, match="steps_per_generation"):
        RolloutData(lambda _: None, samples_per_micro_batch=1, micro_batches_per_step=2, micro_batches_per_rollout=3)  # type: ignore[arg-type, return-value]


# --- in the loop ------------------------------------------------------------------------------------------------


def policy_gradient(model, batch) -> Loss:
    logprobs_K = policy_logprobs(model, batch)
    ratio_K = (logprobs_K - batch.columns["old"]).exp()
    return Loss(-(ratio_K * batch.columns["advantage"]).sum(), torch.tensor(float(len(ratio_K))))


def make_trainer(tokenizer, folder, steps: int = 8, stop_at: int = 0) -> Trainer:
    model = make_model(tokenizer)
    sampler = make_sampler(model, tokenizer, temperature=1.0)

    def collect(number: int) -> tuple[Rollout, dict[str, torch.Tensor]]:
        rollout = sampler(PROMPTS, 4, step=number)
        advantage = torch.tensor([ids.count(7) - 1.0 for ids in rollout.completion_ids])
        return rollout, {"old": rollout.logprobs_NC, "advantage": advantage}

    data = RolloutData(
        collect, samples_per_micro_batch=4, micro_batches_per_step=2, micro_batches_per_rollout=4, num_iterations=2
    )
    config = TrainConfig(max_steps=steps, optim="adamw", learning_rate=0.01, save_steps=1, logging_steps=1)
    trainer = Trainer(model, policy_gradient, data, config, steps, folder)
    if stop_at:
        step = trainer.step

        def step_and_stop() -> None:
            step()
            if trainer.state.step == stop_at:
                trainer._stop(signal.SIGTERM, None)

        trainer.step = step_and_stop  # type: ignore[method-assign]
    return trainer


@pytest.mark.parametrize("stop_at", [1, 3, 4, 6])
def test_a_run_that_is_stopped_within_a_rollout_goes_on_bit_for_bit(tokenizer, tmp_path, stop_at):
    straight = make_trainer(tokenizer, tmp_path / "straight")
    straight.train()
    with pytest.raises(Stopped):
        make_trainer(tokenizer, tmp_path / "stopped", stop_at=stop_at).train()
    resumed = make_trainer(tokenizer, tmp_path / "stopped")
    assert resumed.resume() == stop_at
    resumed.train()
    assert resumed.data.number == 1
    for (name, a), b in zip(straight.model.named_parameters(), resumed.model.parameters()):
        assert torch.equal(a, b), name


def test_a_rollout_serves_all_its_samples_in_each_iteration(tokenizer, tmp_path):
    data = make_trainer(tokenizer, tmp_path).data
    seen = [[sorted(set(b.sample_K.tolist())) for b in data(step)] for step in range(8)]
    assert all([len(part) for part in parts] == [4, 4] for parts in seen)
    for first in (0, 2, 4, 6):
        parts = [part for step in seen[first : first + 2] for part in step]
        assert sorted(sample for part in parts for sample in part) == list(range(16))
    assert seen[0] != seen[2]
    assert data.number == 1
    assert dataclasses.asdict(data.rollout) == data.state_dict()["rollout"]
