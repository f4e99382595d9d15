"""PPO from prompts and a reward to a policy: what is learned, kept, recorded, resumed and refused."""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import zero2hero as z2h
from zero2hero.align.online import PromptOrder
from zero2hero.align.ppo import Experience, clipped_value_loss, ppo, ppo_loss
from zero2hero.align.reference import Reference
from zero2hero.align.rewards import Scores
from zero2hero.align.rollout import Sampler, training_batch
from zero2hero.align.value_head import ActorCritic, load_value_head
from zero2hero.alignment_configs import PpoConfig
from zero2hero.cli import main
from zero2hero.config import DecoderConfig, TrainConfig
from zero2hero.errors import Stopped, UserError
from zero2hero.models import Decoder, init_weights
from zero2hero.tokenizer import Tokenizer
from zero2hero.train.loop import Trainer
from zero2hero.train.pretrain import fit_shape
from zero2hero.train.tracking import read_metrics
from zero2hero.tune.config import LoraConfig

pytestmark = pytest.mark.usefixtures("one_thread")
TRAIN = TrainConfig(
    max_steps=8, per_device_train_batch_size=8, gradient_accumulation_steps=2, learning_rate=0.01, optim="adamw",
    weight_decay=0.0, lr_scheduler_type="constant", warmup_steps=0, eval_steps=4, save_steps=2, logging_steps=1,
)  # fmt: skip
REWARDS = """
calls = []
def many_a(completions):
    calls.append(len(completions))
    return [text.count("a") / max(1, len(text)) for text in completions]
def short(completions):
    return [-len(text) for text in completions]
def later_raises(completions):
    calls.append(len(completions))
    if len(calls) > 3: raise ZeroDivisionError("no more")
    return many_a(completions)
def nan(completions): return [float("nan")] * len(completions)
def too_few(completions): return [1.0]
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ppo") / "base"
    tokenizer = Tokenizer.train(["abcabcab"], vocab_size=270, kind="char")
    shape = DecoderConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=32)
    model = Decoder(fit_shape(shape, tokenizer))
    init_weights(model, 0)
    z2h.save(z2h.LanguageModel(model, tokenizer), folder)
    return folder


@pytest.fixture(scope="module")
def rewards(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rewards") / "rewards.py"
    path.write_text(REWARDS)
    return path


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": "abc"[: 1 + n % 3] * (1 + n % 2)}) + "\n" for n in range(40)))
    return path


@pytest.fixture
def config(base, prompts, rewards, tmp_path) -> PpoConfig:
    return PpoConfig(
        model=str(base), data=str(prompts), output_dir=str(tmp_path / "run"), precision="fp32", report_to=[],
        method="full", reward_funcs=[f"{rewards}:many_a"], max_completion_length=6, train=TRAIN, num_eval_prompts=8,
        validation_fraction=0.2, num_mini_batches=2, num_ppo_epochs=2,
    )  # fmt: skip


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_policy_earns_more_and_the_record_says_how(config, rewards, method):
    config = dataclasses.replace(
        config, method=method, reward_funcs=[f"{rewards}:many_a", f"{rewards}:short"], reward_weights=[1.0, 0.0],
        train=dataclasses.replace(TRAIN, max_steps=40, eval_steps=20), lora=LoraConfig(r=8, lora_alpha=16),
    )  # fmt: skip
    lm = ppo(config)
    assert isinstance(lm, z2h.LanguageModel)
    rows = read_metrics(config.output_dir)
    earned = [row["eval_reward"] for row in rows if "eval_reward" in row]
    assert earned[-1] > earned[0] + 0.25
    first, last = (next(row for row in order if "objective/kl" in row) for order in (rows, rows[::-1]))
    assert abs(first["objective/kl"]) < 1e-5  # nothing has changed yet
    assert last["objective/kl"] > 0.1
    assert abs(first["val/ratio"] - 1) < 1e-5
    assert first["policy/clipfrac_avg"] == 0
    assert last["loss/value_avg"] < first["loss/value_avg"] * 5
    for name in ("objective/scores", "objective/rlhf_reward", "objective/non_score_reward", "loss/policy_avg",
                 "policy/entropy_avg", "policy/approxkl_avg", "val/clipfrac_avg", "rewards/many_a/mean",
                 "rewards/short/mean", "completions/mean_length", "val/num_eos_tokens"):  # fmt: skip
        assert name in last, name
    head = load_file(Path(config.output_dir) / "value_head.safetensors")
    assert head["weight"].shape == (1, 32)
    assert head["weight"].any()
    assert load_value_head(ActorCritic(Decoder(lm.model.config)).value_head, config.output_dir)
    assert (Path(config.output_dir) / "report.html").exists()


def test_a_run_that_is_stopped_goes_on_bit_for_bit(config, monkeypatch, tmp_path):
    """Also in the middle of a rollout, with a KL coefficient that adapts."""
    train = dataclasses.replace(TRAIN, max_steps=10)
    config = dataclasses.replace(config, target_kl=0.5, horizon=50, train=train)
    ppo(config)
    wanted = load_file(Path(config.output_dir) / "model.safetensors")
    again = dataclasses.replace(config, output_dir=str(tmp_path / "again"))
    step = Trainer.step

    def stopping(self):
        step(self)
        if self.state.step == 6:  # the second rollout serves steps 4 to 7
            self._stop(signal.SIGINT, None)

    monkeypatch.setattr(Trainer, "step", stopping)
    with pytest.raises(Stopped):
        ppo(again)
    monkeypatch.undo()
    ppo(dataclasses.replace(again, resume=True))
    found = load_file(Path(again.output_dir) / "model.safetensors")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    costs = [[r[n] for r in read_metrics(c.output_dir) if (n := "objective/kl_coef") in r][-1] for c in (config, again)]
    assert costs[0] == costs[1] != config.kl_coef


def tiny_policy(dropout: float = 0.0) -> tuple[ActorCritic, Tokenizer]:
    tokenizer = Tokenizer.train(["abcabcab"], vocab_size=270, kind="char")
    shape = DecoderConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=32, dropout=dropout
    )
    model = ActorCritic(Decoder(fit_shape(shape, tokenizer)))
    init_weights(model.policy, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model, tokenizer


@pytest.fixture
def collected(config):
    """A policy, a rollout of it with ragged answers, and what is known of its tokens."""
    model, tokenizer = tiny_policy(dropout=0.3)
    model.train()
    lm = z2h.LanguageModel(model.policy, tokenizer)
    from zero2hero.align.online import Prompt

    prompts = [Prompt(lm.prompt_ids("abc"[: 1 + n % 3]), "", {}) for n in range(32)]
    sampler = Sampler(model.policy, tokenizer, {int(lm.tokenizer.encode("c")[-1])}, max_completion_length=9)
    generator = torch.Generator().manual_seed(2)
    judge = lambda prompts, rollout: Scores(s := torch.randn(len(rollout), generator=generator), s[:, None])  # noqa: E731
    config = dataclasses.replace(config, missing_eos_penalty=1.0)
    experience = Experience(config, model, sampler, PromptOrder(prompts, 0), judge, Reference.of(model.policy))
    rollout, columns = experience.collect(0)
    assert len(set(rollout.lengths)) > 3
    return config, model, rollout, columns, experience


def gradients(model, config, rollout, columns, micro_batches):
    model.zero_grad()
    losses = [ppo_loss(model, training_batch(rollout, part, **columns), config) for part in micro_batches]
    weight = sum(float(loss.weight) for loss in losses)
    for loss in losses:
        (loss.sum / weight).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_step_is_the_same_in_any_micro_batches(collected):
    config, model, rollout, columns, _ = collected
    with torch.no_grad():  # a policy that has moved: some ratios and values are clipped
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5))
    whole = gradients(model, config, rollout, columns, [range(32)])
    loss = ppo_loss(model, training_batch(rollout, range(32), **columns), config)
    assert 0 < loss.metrics["policy/clipfrac_avg"] < loss.weight
    assert 0 < loss.metrics["val/clipfrac_avg"] < loss.weight
    assert set(whole) == {name for name, _ in model.named_parameters()}
    for count in (2, 8, 32):
        size = 32 // count
        parts = gradients(model, config, rollout, columns, [range(i, i + size) for i in range(0, 32, size)])
        for name in whole:
            torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=1e-6)


def test_ratio_is_one_and_nothing_is_clipped_at_the_first_update(collected):
    """Even with dropout, which would make another policy of the one that wrote."""
    config, model, rollout, columns, experience = collected
    assert model.training
    loss = ppo_loss(model, training_batch(rollout, range(32), **columns), config)
    assert abs(float(loss.metrics["val/ratio"] / loss.weight) - 1) < 1e-5
    assert float(loss.metrics["policy/approxkl_avg"]) < 1e-8
    assert float(loss.metrics["policy/clipfrac_avg"]) == 0
    assert abs(experience.metrics()["objective/kl"]) < 1e-5


def test_rewards_of_a_rollout_are_score_penalty_and_kl(collected):
    config, model, rollout, columns, experience = collected
    config = dataclasses.replace(config, whiten_advantages=False, lam=1.0, gamma=1.0, kl_coef=0.5)
    with torch.no_grad():
        for parameter in model.policy.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(6))
    scores = torch.arange(32.0)
    again = Experience(
        config, model, experience.sampler, experience.order, lambda p, r: Scores(scores, scores[:, None]),
        experience.reference,
    )  # fmt: skip
    rollout, columns = again.collect(1)
    found = again.metrics()
    assert found["objective/kl"] > 0.01
    assert found["objective/non_score_reward"] == pytest.approx(-0.5 * found["objective/kl"], rel=1e-4)
    cut = torch.tensor([reason != "stop" for reason in rollout.finish_reasons])
    assert cut.any()
    assert not cut.all()
    assert found["objective/scores"] == pytest.approx(float((scores - cut.float()).mean()))
    # with lam = gamma = 1 the first token's return is the whole reward of the completion
    total = columns["returns"][:, 0].mean()
    assert float(total) == pytest.approx(found["objective/rlhf_reward"], rel=1e-4)


def test_value_clipping():
    """The value may move `cliprange_value` from what it was; further towards the return it has no gradient."""
    values = torch.tensor([0.1, 0.5, -0.5, 0.5], requires_grad=True)
    old, returns = torch.zeros(4), torch.tensor([1.0, 1.0, 1.0, 0.0])
    loss, stopped = clipped_value_loss(values, old, returns, 0.2)
    assert loss.tolist() == pytest.approx([0.9**2 / 2, 0.8**2 / 2, 1.5**2 / 2, 0.5**2 / 2])
    assert stopped.tolist() == [False, True, False, False]
    loss.sum().backward()
    assert values.grad.tolist() == pytest.approx([-0.9, 0.0, -1.5, 0.5])


# --- what cannot be ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kl_estimator": "k2"}, "kl_estimator is one of k1, k3"),
        ({"gamma": 1.5}, "gamma is at most 1"),
        ({"num_ppo_epochs": 0}, "num_ppo_epochs must be at least 1"),
        ({"reward_funcs": []}, "say what rewards an answer"),
        ({"data": ""}, "say which prompts to answer"),
        ({"kl_coef": 0.0, "target_kl": 6.0}, "kl_coef"),
        ({"temperature": 0.0}, "temperature is above 0"),
        ({"reward_weights": [1.0, 2.0]}, "weights"),
    ],
)
def test_settings_that_make_no_sense_are_refused(config, change, words):
    with pytest.raises(UserError, match=words):
        ppo(dataclasses.replace(config, **change))


@pytest.mark.parametrize(
    ("reward", "words"), [("nan", "reward nan returned nan"), ("too_few", "returned 1 rewards for")]
)
def test_rewards_that_are_no_rewards_are_named(config, rewards, reward, words):
    with pytest.raises(UserError, match=words):
        ppo(dataclasses.replace(config, reward_funcs=[f"{rewards}:{reward}"]))


def test_a_reward_that_fails_later_loses_nothing(config, rewards):
    broken = dataclasses.replace(config, reward_funcs=[f"{rewards}:later_raises"], train=dataclasses.replace(
        TRAIN, eval_steps=1000, save_steps=1000))  # fmt: skip
    with pytest.raises(UserError, match=r"later_raises raised ZeroDivisionError: no more"):
        ppo(broken)
    assert (Path(config.output_dir) / "checkpoints" / "step-000004").is_dir()  # after the first rollout


def test_the_command_line(config, base, prompts, rewards, tmp_path, capsys):
    words = [
        "ppo", "--model", str(base), "--data", str(prompts), "--reward_funcs", f"[{rewards}:many_a]", "--output_dir",
        str(tmp_path / "cli"), "--max_completion_length", "4", "--train.max_steps", "2",
        "--train.per_device_train_batch_size", "4", "--precision", "fp32", "--report_to", "[]",
    ]  # fmt: skip
    assert main(words) == 0
    assert (tmp_path / "cli" / "value_head.safetensors").exists()
    assert main([*words, "--kl_coef", "-1", "--output_dir", str(tmp_path / "other")]) == 2
    assert "kl_coef must be at least 0" in capsys.readouterr().err
