"""GRPO from prompts to a better policy: what it learns, records, resumes, refuses and survives."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import zero2hero as z2h
from zero2hero.align.grpo import Practice, grpo
from zero2hero.align.rewards import load_rewards
from zero2hero.align.rollout import Rollout, rollout_logprobs, training_batch
from zero2hero.alignment_configs import GrpoConfig
from zero2hero.cli import main
from zero2hero.config import DecoderConfig, TrainConfig
from zero2hero.errors import UserError
from zero2hero.models import Decoder, init_weights
from zero2hero.tokenizer import Tokenizer
from zero2hero.train.activation_checkpointing import checkpoint_blocks
from zero2hero.train.pretrain import fit_shape
from zero2hero.train.tracking import read_metrics
from zero2hero.tune import LoraConfig

pytestmark = pytest.mark.usefixtures("one_thread")
TRAIN = TrainConfig(
    max_steps=8, per_device_train_batch_size=16, learning_rate=0.01, optim="adamw", weight_decay=0.0, logging_steps=1,
    eval_steps=4, save_steps=4, sample_steps=4, lr_scheduler_type="constant", warmup_steps=0,
)  # fmt: skip
EVERYWHERE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"]
REWARDS = """
def vowels(completions, **_):
    return [float(sum(text.count(v) for v in "aeiou")) for text in completions]

def same(prompts, completions):
    return [1.0] * len(completions)

def level(prompts, completions, level):
    return [float(x) for x in level]

def broken(completions, **_):
    raise KeyError("oh")

def wrong_number(completions, **_):
    return [1.0]

def not_a_number(completions, **_):
    return [float("nan")] * len(completions)

calls = []

def later_broken(completions, **_):
    calls.append(1)
    if len(calls) > 6:
        raise ValueError("the judge went home")
    return [float(len(text)) for text in completions]
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("grpo") / "base"
    tokenizer = Tokenizer.train(["What is 2 + 3? The answer is 5. <calc>2 + 3</calc>"], vocab_size=300)
    shape = DecoderConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=256)
    model = Decoder(fit_shape(shape, tokenizer))
    init_weights(model, 0)
    z2h.save(z2h.LanguageModel(model, tokenizer), folder)
    return folder


@pytest.fixture
def config(base, tmp_path) -> GrpoConfig:
    data, rewards = tmp_path / "prompts.jsonl", tmp_path / "rewards.py"
    data.write_text("".join(json.dumps({"prompt": f"What is {n} + 3?", "level": n}) + "\n" for n in range(20)))
    rewards.write_text(REWARDS)
    return GrpoConfig(
        model=str(base), data=str(data), output_dir=str(tmp_path / "run"), precision="fp32", report_to=[], train=TRAIN,
        reward_funcs=[f"{rewards}:vowels"], num_generations=4, max_completion_length=12, method="full",
        num_eval_prompts=4, validation_fraction=0.2, lora=LoraConfig(r=8, lora_alpha=32, target_modules=EVERYWHERE),
    )  # fmt: skip


def rewards_of(config: GrpoConfig, *names: str) -> list[str]:
    return [f"{Path(config.data).parent / 'rewards.py'}:{name}" for name in names]  # type: ignore[arg-type]


def rows_of(config: GrpoConfig, name: str) -> list:
    return [row[name] for row in read_metrics(config.output_dir) if name in row]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": "lora", "beta": 0.01},
        {"advantage_estimator": "rloo", "loss_type": "grpo", "importance_sampling_level": "trajectory", "beta": 0.01},
        {"advantage_estimator": "reinforce_plus_plus", "beta": 0.01},
        {"loss_type": "cispo", "scale_rewards": "batch", "num_iterations": 2, "top_k": 200},
    ],
    ids=["grpo", "lora", "rloo", "reinforce++", "cispo"],
)
def test_what_is_rewarded_becomes_likelier(config, changes):
    train = dataclasses.replace(TRAIN, max_steps=30, learning_rate=0.05 if "method" in changes else 0.01)
    config = dataclasses.replace(config, train=train, **changes)
    grpo(config)
    found = rows_of(config, "eval_reward")
    assert found[-1] > found[0] + 1
    names = {"reward", "reward_std", "rewards/vowels/mean", "frac_reward_zero_std", "entropy",
             "completions/mean_length", "completions/clipped_ratio", "completions_per_second",
             "sampling/sampling_logp_difference/mean"}  # fmt: skip
    row = next(row for row in read_metrics(config.output_dir) if "loss" in row)
    assert names <= row.keys()
    assert ("kl" in row) == bool(config.beta)
    if "top_k" not in changes:
        assert max(rows_of(config, "sampling/sampling_logp_difference/mean")) < 1e-4
    shown = rows_of(config, "completions")[-1]
    assert [s["reward"] for s in shown] == sorted((s["reward"] for s in shown), reverse=True)
    report = (Path(config.output_dir) / "report.html").read_text()
    assert "Completions and their rewards" in report
    assert shown[0]["prompt"] in report
    assert (Path(config.output_dir) / "plots" / "reward.png").exists()


def test_several_rewards_count_by_their_weights_and_equal_groups_are_counted(config):
    config = dataclasses.replace(
        config, reward_funcs=rewards_of(config, "same", "level"), reward_weights=[2.0, 0.5],
        train=dataclasses.replace(TRAIN, max_steps=2),
    )  # fmt: skip
    before = z2h.load(config.model).model.state_dict()
    after = grpo(config).model.state_dict()
    assert rows_of(config, "frac_reward_zero_std") == [1.0, 1.0]
    assert rows_of(config, "rewards/same/mean") == [1.0, 1.0]
    levels, totals = rows_of(config, "rewards/level/mean"), rows_of(config, "reward")
    assert totals == pytest.approx([2 + level / 2 for level in levels])
    assert all(torch.equal(before[name], after[name]) for name in before)  # nothing to learn


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_run_resumed_within_a_rollout_ends_with_the_same_bits(config, method):
    train = dataclasses.replace(TRAIN, per_device_train_batch_size=8, save_steps=3, keep_last=10)
    config = dataclasses.replace(
        config, method=method, train=train, steps_per_generation=2, num_iterations=2, beta=0.05, num_generations=2
    )
    grpo(config)
    run = Path(config.output_dir)
    file = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    straight, lines = load_file(run / file), rows_of(config, "reward")
    for step in (6, 8):
        shutil.rmtree(run / "checkpoints" / f"step-{step:06d}")
    (run / "checkpoints" / "LATEST").write_text("step-000003\n")
    grpo(dataclasses.replace(config, resume=True))
    again = load_file(run / file)
    assert all(torch.equal(again[name], straight[name]) for name in straight)
    assert rows_of(config, "reward") == lines


@pytest.mark.parametrize(
    ("name", "words"),
    [("broken", "reward broken raised KeyError"), ("wrong_number", "returned 1 rewards for"),
     ("not_a_number", "returned nan")],
)  # fmt: skip
def test_a_reward_that_fails_is_named(config, name, words):
    with pytest.raises(UserError, match=words):
        grpo(dataclasses.replace(config, reward_funcs=rewards_of(config, name)))


def test_a_reward_that_fails_later_loses_nothing(config):
    config = dataclasses.replace(config, reward_funcs=rewards_of(config, "later_broken"))
    with pytest.raises(UserError, match=r"the judge went home(.|\n)*saved as it was after step \d"):
        grpo(config)
    (Path(config.data).parent / "rewards.py").write_text(REWARDS.replace("> 6", "> 600"))  # mended
    grpo(dataclasses.replace(config, resume=True))
    steps = [row["step"] for row in read_metrics(config.output_dir) if "loss" in row]
    assert steps == list(range(1, 9))


def test_truncated_completions_can_be_left_out(config):
    config = dataclasses.replace(config, mask_truncated_completions=True, train=dataclasses.replace(TRAIN, max_steps=2))
    grpo(config)
    assert all(ratio > 0.5 for ratio in rows_of(config, "completions/clipped_ratio"))
    assert all(abs(loss) < 5 for loss in rows_of(config, "loss"))


def test_with_a_tool(config, tmp_path):
    """An environment of one's own answers; its tokens are in the context, and in no loss."""
    (tmp_path / "echo.py").write_text(
        "class Echo:\n    stop = ('e',)\n    def reset(self, record):\n        self.left = record['level'] % 3\n"
        "    def step(self, text):\n        self.left -= 1\n        return None if self.left < 0 else ' 5.'\n"
    )
    config = dataclasses.replace(
        config, environment=f"{tmp_path / 'echo.py'}:Echo", max_completion_length=40,
        train=dataclasses.replace(TRAIN, max_steps=3, per_device_train_batch_size=32),
    )  # fmt: skip
    grpo(config)
    assert max(rows_of(config, "sampling/sampling_logp_difference/mean")) < 1e-4
    assert max(rows_of(config, "tools/call_frequency")) > 0


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


def test_all_logits_are_never_made_with_a_vocabulary_of_128k():
    """Neither for the loss and its gradient, nor for entropies, the reference or recomputed log-probabilities."""
    vocabulary, tokens, samples = 128 * 1024, 192, 8
    shape = DecoderConfig(
        vocab_size=vocabulary, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, max_position_embeddings=256
    )
    model = Decoder(shape)
    init_weights(model, 0)
    ids = [torch.randint(vocabulary, (tokens,)).tolist() for _ in range(samples)]
    rollout = Rollout(
        [[1, 2]] * samples, ids, [[-11.0] * tokens] * samples, [[True] * tokens] * samples, ["stop"] * samples,
        [""] * samples,
    )  # fmt: skip
    config = GrpoConfig(model="none", beta=0.1, loss_type="grpo", train=TRAIN)
    practice = Practice(config, [], SimpleNamespace(exact=True), load_rewards("number"))  # type: ignore[arg-type]
    columns = {"behaviour": rollout.logprobs_NC, "ref": rollout.logprobs_NC, "advantages": torch.ones(samples)}
    with Largest() as largest:
        rollout_logprobs(model, rollout, samples_at_a_time=samples)
        practice.objective(model, training_batch(rollout, range(samples), **columns)).sum.backward()
    whole = samples * tokens * vocabulary
    assert largest.numel <= 512 * vocabulary == whole / 3  # a chunk of the head's products


def test_activations_that_are_computed_once_more_are_without_dropout_too():
    shape = DecoderConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        dropout=0.5,
    )
    rollout = Rollout(
        [[1, 2]] * 2, [[3, 4, 5], [6, 7]], [[-3.0] * 3, [-3.0] * 2], [[True] * 3, [True] * 2], ["stop"] * 2, [""] * 2
    )
    batch = training_batch(rollout, range(2), behaviour=rollout.logprobs_NC, advantages=torch.tensor([1.0, -1.0]))
    config = GrpoConfig(model="none", loss_type="grpo", epsilon=100.0, train=TRAIN)
    practice = Practice(config, [], SimpleNamespace(exact=True), load_rewards("number"))  # type: ignore[arg-type]
    gradients = []
    for again in (False, True):
        model = Decoder(shape)
        torch.manual_seed(0)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        (checkpoint_blocks(model) if again else model).train()  # as the loop does before each step
        practice.objective(model, batch).sum.backward()
        gradients.append(model.embed_tokens.weight.grad)
    assert torch.equal(*gradients)
    assert gradients[0].abs().max() > 0


def test_from_the_command_line(config, capsys):
    run = Path(config.output_dir)
    words = [
        "grpo", "--model", config.model, "--output_dir", str(run), "--precision", "fp32", "--report_to", "[]",
        "--data", "sums:40", "--train.max_steps", "2", "--train.per_device_train_batch_size", "8",
        "--num_generations", "4", "--max_completion_length", "8", "--num_eval_prompts", "2",
    ]  # fmt: skip
    assert main([str(word) for word in words]) == 0
    assert (run / "adapter_model.safetensors").exists()
    assert "rewards and completions" in capsys.readouterr().out
    assert z2h.load(run).generate("What is 2 + 3?", max_new_tokens=3)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--num_generations", "3"], "does not divide into groups"),
        (["--num_generations", "1"], "num_generations is at least 2"),
        (["--reward_funcs", "[numbr]"], "Did you mean 'number'"),
        (["--environment", "calculater"], "Did you mean 'calculator'"),
        (["--steps_per_generation", "3", "--train.gradient_accumulation_steps", "2"], "not a multiple"),
        (["--advantage_estimator", "gae"], "advantage_estimator is one of"),
    ],
)
def test_bad_settings_are_one_clear_line(config, capsys, words, says):
    settings = ["--model", str(config.model), "--output_dir", str(config.output_dir), "--data", "sums:40"]
    assert main(["grpo", *settings, *words]) == 2
    assert says in capsys.readouterr().err


def test_a_prompt_longer_than_the_context_is_named(config):
    with open(config.data, "a") as stream:  # type: ignore[arg-type]
        stream.write(json.dumps({"prompt": "What is this? " * 60, "level": 1}) + "\n")
    with pytest.raises(UserError, match=r"line 21(.|\n)*the model's context is 256"):
        grpo(config)
    grpo(dataclasses.replace(config, on_bad_record="skip", train=dataclasses.replace(TRAIN, max_steps=1)))
