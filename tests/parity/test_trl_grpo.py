"""Policy losses equal TRL's, in value and in the gradient of every weight: its own `_compute_loss`, on a tiny model."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from zero2hero.align.policy_loss import Tokens, policy_loss
from zero2hero.align.rollout import PolicyBatch, Rollout, chosen_states, training_batch
from zero2hero.alignment_configs import PolicyLossConfig
from zero2hero.errors import UserError
from zero2hero.models import from_pretrained
from zero2hero.nn.logprobs import logprobs_and_entropies

pytestmark = pytest.mark.usefixtures("one_thread")
LONGEST = 12  # max_completion_length
PAD = 0


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The same weights twice: transformers' model, and ours."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=False,
            bos_token_id=1, eos_token_id=2, pad_token_id=PAD, initializer_range=0.3,
        )
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("llama")
    theirs.save_pretrained(folder)
    return theirs, from_pretrained(folder)


def trainer_of(kind: str, model: Any, folder: Any) -> Any:
    """TRL's trainer around the model."""
    pytest.importorskip("trl")
    import tokenizers
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(50)}, unk_token="w3"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="w2", pad_token="w0", unk_token="w3")
    data = Dataset.from_list([{"prompt": "w5"}] * 8)
    common: dict[str, Any] = {
        "output_dir": str(folder), "report_to": [], "use_cpu": True, "per_device_train_batch_size": 8,
        "num_generations": 4, "max_completion_length": LONGEST, "bf16": False,
    }  # fmt: skip

    def reward(completions: Any, **_: Any) -> list[float]:
        return [0.0] * len(completions)

    if kind == "grpo":
        from trl import GRPOConfig, GRPOTrainer

        arguments: Any = GRPOConfig(**common)
        trainer: Any = GRPOTrainer(model, reward, args=arguments, train_dataset=data, processing_class=tokenizer)
    else:
        from trl import RLOOConfig, RLOOTrainer

        arguments = RLOOConfig(**common, beta=0.0)
        trainer = RLOOTrainer(model, reward, args=arguments, train_dataset=data, processing_class=tokenizer)
    trainer.current_gradient_accumulation_steps = 1
    return trainer


@pytest.fixture(scope="module")
def grpo(models, tmp_path_factory):
    return trainer_of("grpo", models[0], tmp_path_factory.mktemp("grpo"))


@pytest.fixture(scope="module")
def rloo(models, tmp_path_factory):
    return trainer_of("rloo", models[0], tmp_path_factory.mktemp("rloo"))


@dataclasses.dataclass
class Case:
    """Samples of unequal length; old and reference policies at some distance; a tool's words; one sample cut off."""

    rollout: Rollout
    old_NC: torch.Tensor
    ref_NC: torch.Tensor
    correction_NC: torch.Tensor
    advantages_N: torch.Tensor
    kept_N: torch.Tensor

    def inputs(self) -> dict[str, torch.Tensor]:
        """What TRL's loss is given: prompts padded on the left, completions on the right."""
        prompts, completions = self.rollout.prompt_ids, self.rollout.completion_ids
        longest = max(map(len, prompts))
        prompt_ids = torch.tensor([[PAD] * (longest - len(p)) + p for p in prompts])
        there_NC = self.rollout.padded([[1] * len(c) for c in completions], 0)
        kept_N1 = self.kept_N[:, None].long()
        return {
            "prompt_ids": prompt_ids,
            "prompt_mask": torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts]),
            "completion_ids": self.rollout.padded(completions, PAD),
            "completion_mask": there_NC * kept_N1,
            "tool_mask": self.rollout.mask_NC.long() * kept_N1,
            "advantages": self.advantages_N,
            "old_per_token_logps": self.old_NC,
            "ref_per_token_logps": self.ref_NC,
            "importance_sampling_ratio": self.correction_NC,
            "num_items_in_batch": (self.rollout.mask_NC * kept_N1).sum(),
        }


@pytest.fixture(scope="module")
def case(models) -> Case:
    g = torch.Generator().manual_seed(5)
    lengths = [3, 12, 7, 1, 12, 5, 9, 2]
    prompts = [torch.randint(3, 50, (n,), generator=g).tolist() for n in (4, 4, 4, 4, 9, 9, 9, 9)]
    completions = [torch.randint(3, 50, (n,), generator=g).tolist() for n in lengths]
    own = [[not (i % 3 == 1 and 2 <= t < 4 and t < len(c) - 1) for t in range(len(c))]
           for i, c in enumerate(completions)]  # fmt: skip
    rollout = Rollout(prompts, completions, [[0.0] * n for n in lengths], own, ["stop"] * 8, [""] * 8)
    now = logprobs_of(models[1], rollout).detach()

    def near(strength: float) -> torch.Tensor:
        return (now + strength * torch.randn(now.shape, generator=g)) * rollout.mask_NC

    return Case(
        rollout, near(0.4), near(0.6), 1 + 0.5 * torch.rand(now.shape, generator=g) * rollout.mask_NC,
        torch.tensor([1.3, -0.7, -0.6, 0.0, 0.9, -1.4, 0.3, 0.2]), torch.tensor([1.0, 1, 1, 1, 1, 1, 0, 1]),
    )  # fmt: skip


def logprobs_of(model: Any, rollout: Rollout) -> torch.Tensor:
    batch = training_batch(rollout, range(len(rollout)))
    logprobs_NC = torch.zeros(rollout.mask_NC.shape)
    batch.padded(ours_of(model, batch)[0].detach(), logprobs_NC)
    return logprobs_NC


def ours_of(model: Any, batch: PolicyBatch) -> tuple[torch.Tensor, torch.Tensor]:
    hidden_KD, targets_K = chosen_states(model, batch)
    return logprobs_and_entropies(hidden_KD, model.head_weight, targets_K)


def our_loss(model: Any, case: Case, config: PolicyLossConfig, parts: list[list[int]], correct: bool = False) -> float:
    """The loss of a step of several micro-batches; gradients are left in the model."""
    model.zero_grad()
    tokens = float((case.rollout.mask_NC * case.kept_N[:, None]).sum())
    total = weight = 0.0
    for samples in parts:
        batch = training_batch(
            case.rollout, samples, old=case.old_NC, ref=case.ref_NC, advantages=case.advantages_N, kept=case.kept_N,
            correction=case.correction_NC,
        )  # fmt: skip
        logprobs_K, entropies_K = ours_of(model, batch)
        c = batch.columns
        loss = policy_loss(
            Tokens(
                logprobs_K, c["old"], c["advantages"], batch.sample_K, batch.num_samples, c["ref"], entropies_K,
                c["kept"], c["correction"] if correct else None, tokens / len(case.rollout),
            ), config, LONGEST,
        )  # fmt: skip
        loss.sum.backward()
        total, weight = total + float(loss.sum.detach()), weight + float(loss.weight)
    for parameter in model.parameters():
        parameter.grad /= weight
    return total / weight


def check_gradients(theirs: Any, ours: Any) -> None:
    expected = {name.removeprefix("model."): p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        scale = max(1.0, float(expected[name].abs().max()))
        assert (parameter.grad - expected[name]).abs().max() < 1e-5 * scale, name
        assert expected[name].abs().max() > 0


VARIANTS = [
    {},
    {"loss_type": "grpo"},
    {"loss_type": "dr_grpo"},
    {"loss_type": "bnpo"},
    {"loss_type": "cispo", "epsilon_high": 1.2},
    {"loss_type": "sapo"},
    {"loss_type": "vespo"},
    {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-2, "epsilon_high": 4e-2},
    {"loss_type": "dapo", "epsilon_high": 0.28, "delta": 1.4},
    {"loss_type": "grpo", "beta": 0.1},
    {"loss_type": "cispo", "epsilon_high": 1.2, "beta": 0.1, "use_bias_correction_kl": False},
    {"loss_type": "grpo", "importance_sampling_level": "sequence", "beta": 0.1},
    {"loss_type": "dapo", "top_entropy_quantile": 0.4},
]


@pytest.mark.parametrize("parts", [[range(8)], [[5, 0, 3], [1, 2], [7, 4, 6]]], ids=["whole", "micro-batches"])
@pytest.mark.parametrize("correct", [False, True], ids=["", "corrected"])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: " ".join(map(str, v.values())))
def test_losses_equal_those_of_grpo(models, grpo, case, variant, correct, parts):
    theirs, ours = models
    config = PolicyLossConfig(**variant)
    if len(parts) > 1 and config.top_entropy_quantile < 1:
        pytest.skip("the quantile is that of a micro-batch")
    grpo.loss_type, grpo.beta = config.loss_type, config.beta
    grpo.importance_sampling_level = config.importance_sampling_level
    grpo.epsilon_low, grpo.epsilon_high = config.epsilon, config.upper
    grpo.top_entropy_quantile = config.top_entropy_quantile
    grpo.use_vllm = grpo.vllm_importance_sampling_correction = correct
    grpo.args.delta, grpo.args.use_bias_correction_kl = config.delta, config.use_bias_correction_kl
    inputs = case.inputs()
    if not correct:
        del inputs["importance_sampling_ratio"]
    grpo._metrics["train"].clear()
    theirs.zero_grad()
    theirs.train()
    grpo.args.steps_per_generation = 1
    expected = grpo._compute_loss(theirs, inputs)
    expected.backward()
    found = our_loss(ours, case, config, [list(part) for part in parts], correct)
    assert found == pytest.approx(float(expected), abs=1e-5)
    check_gradients(theirs, ours)


def test_metrics_equal_those_of_grpo(models, grpo, case):
    theirs, ours = models
    config = PolicyLossConfig(loss_type="grpo", beta=0.1)
    grpo.loss_type, grpo.beta, grpo.importance_sampling_level, grpo.use_vllm = "grpo", 0.1, "token", False
    grpo.epsilon_low = grpo.epsilon_high = 0.2
    grpo.top_entropy_quantile, grpo.args.delta, grpo.args.use_bias_correction_kl = 1.0, None, True
    grpo._metrics["train"].clear()
    grpo._compute_loss(theirs, case.inputs())
    batch = training_batch(
        case.rollout, range(8), old=case.old_NC, ref=case.ref_NC, advantages=case.advantages_N, kept=case.kept_N
    )
    c = batch.columns
    logprobs_K, entropies_K = ours_of(ours, batch)
    tokens = Tokens(logprobs_K, c["old"], c["advantages"], batch.sample_K, 8, c["ref"], entropies_K, c["kept"])
    loss = policy_loss(tokens, config, LONGEST)
    assert loss.metrics.keys() == {
        "kl", "entropy", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"
    }  # fmt: skip
    for name, value in loss.metrics.items():
        mean = float(value) / float(loss.weights[name])
        assert mean == pytest.approx(grpo._metrics["train"][name][-1], abs=1e-5), name
        assert mean > 0


def test_the_loss_of_rloo(models, rloo, case):
    """One ratio for each completion, the product of its tokens'; the mean over completions."""
    theirs, ours = models
    plain = dataclasses.replace(
        case, kept_N=torch.ones(8), rollout=dataclasses.replace(
            case.rollout, own=[[True] * len(ids) for ids in case.rollout.completion_ids]),
    )  # fmt: skip
    plain.old_NC = (logprobs_of(ours, plain.rollout) + 0.1 * torch.randn(case.old_NC.shape)) * plain.rollout.mask_NC
    inputs = plain.inputs() | {"old_logps": plain.old_NC.sum(-1)}
    theirs.zero_grad()
    rloo._metrics["train"].clear()
    expected = rloo._compute_loss(theirs, inputs)
    expected.backward()
    config = PolicyLossConfig(loss_type="grpo", importance_sampling_level="trajectory")
    for parts in ([list(range(8))], [[1, 4, 6], [0, 2], [3, 5, 7]]):
        assert our_loss(ours, plain, config, parts) == pytest.approx(float(expected), abs=1e-5)
        check_gradients(theirs, ours)


def test_a_micro_batch_without_a_token_that_counts_adds_nothing(models, case):
    _, ours = models
    config = PolicyLossConfig(loss_type="grpo")
    one = our_loss(ours, case, config, [[0, 1, 2, 3, 4, 5, 6, 7]])
    other = our_loss(ours, case, config, [[6], [0, 1, 2, 3, 4, 5, 7]])
    assert one == pytest.approx(other, abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"loss_type": "grop"}, "Did you mean 'grpo'"),
        ({"delta": 1.1}, "above 1 \\+ epsilon_high"),
        ({"loss_type": "luspo"}, "importance_sampling_level sequence"),
        ({"top_entropy_quantile": 0.0}, "top_entropy_quantile"),
    ],
)
def test_settings_that_make_no_sense(settings, words):
    with pytest.raises(UserError, match=words):
        PolicyLossConfig(**settings)


def test_defaults_are_trl_s():
    pytest.importorskip("trl")
    from trl import GRPOConfig

    theirs, ours = {f.name: f.default for f in dataclasses.fields(GRPOConfig)}, PolicyLossConfig()
    assert all(theirs[name] == value for name, value in vars(ours).items() if name != "importance_sampling_level")
    assert SimpleNamespace(**theirs).importance_sampling_level == ours.importance_sampling_level
