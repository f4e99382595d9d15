"""Every loss of TRL's preference trainers, value and gradient: their own methods compute them, on the same tensors."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("trl")

from zero2hero.align.dpo import objective
from zero2hero.align.pairs import Tree, answer_batch
from zero2hero.align.preference import LOSSES, Answers, preference_loss
from zero2hero.alignment_configs import LOSS_TYPES, PreferenceSettings

LENGTHS = torch.tensor([[3, 5], [7, 2], [1, 4], [6, 6], [2, 9]])  # tokens of chosen and rejected
PROMPTS = torch.tensor([2, 4, 1, 3, 2])
B, T = len(LENGTHS), 14


def token_logprobs(seed):
    """[2 B, T - 1] of prompt and answer, in TRL's layout: the chosen ones first; and their mask [2 B, T]."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.arange(T)
    begins, ends = PROMPTS.repeat(2)[:, None], (PROMPTS.repeat(2) + LENGTHS.t().flatten())[:, None]
    mask = ((place >= begins) & (place < ends)).long()
    values = -0.7 * torch.rand(2 * B, T - 1, generator=generator) - 0.05
    return values * mask[:, 1:], mask


def accelerator():
    return SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x,
                           unwrap_model=lambda m: m)  # fmt: skip


class Outputs(SimpleNamespace):
    """What a model of TRL's gives with `fused_lm_head=True`."""

    def __init__(self, logprobs):
        zeros = torch.zeros_like(logprobs)
        super().__init__(log_probs=logprobs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())


def trl_dpo(c, policy, reference, mask):
    """DPOTrainer._compute_loss with a model that answers with these log-probabilities."""
    from trl import DPOTrainer

    trainer = object.__new__(DPOTrainer)
    vars(trainer).update(
        model=torch.nn.Identity().train(), accelerator=accelerator(), aux_loss_enabled=False, ld_alpha=c.ld_alpha,
        precompute_ref_logps=False, ref_model=lambda **_: Outputs(reference), loss_types=c.loss_types,
        loss_weights=c.loss_weights or [1.0] * len(c.loss_types), beta=c.beta, label_smoothing=c.label_smoothing,
        f_divergence_type=c.f_divergence_type, f_alpha_divergence_coef=c.f_alpha_divergence_coef,
        args=SimpleNamespace(discopop_tau=c.discopop_tau, gradient_checkpointing_kwargs=None), use_weighting=False,
        _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    module = pytest.MonkeyPatch()
    with module.context() as patch:
        patch.setattr("trl.trainer.dpo_trainer.disable_gradient_checkpointing", lambda *_: contextlib.nullcontext())
        inputs = {
            "input_ids": torch.ones(2 * B, T).long(),
            "attention_mask": torch.ones(2 * B, T),
            "completion_mask": mask,
        }
        loss = trainer._compute_loss(lambda **_: Outputs(policy), inputs, return_outputs=False)
    return loss, trainer._metrics["train"]


def ours(c, policy, reference, mask):
    """The same tensors as `Answers`."""
    share = torch.ones_like(policy)
    counts, place = mask.sum(1), mask[:, 1:].cumsum(1)
    if c.ld_alpha is not None:
        shorter = torch.minimum(*counts.chunk(2)).repeat(2)[:, None]
        share = torch.where(place > shorter, c.ld_alpha, 1.0)
    (chosen, rejected), (old, other) = ((x * share).sum(1).chunk(2) for x in (policy, reference))
    n_chosen, n_rejected = counts.float().chunk(2)
    nll = -policy.sum(1).chunk(2)[0]
    return preference_loss(
        Answers(chosen, rejected, old, other, n_chosen, n_rejected, nll, B / n_chosen.sum()), c
    ).mean()  # fmt: skip


def check(c, theirs, policy):
    expected = theirs.detach().item()
    (gradient,) = torch.autograd.grad(theirs, policy)
    reference, mask = token_logprobs(2)
    loss = ours(c, policy, reference, mask)
    assert loss.item() == pytest.approx(expected, abs=1e-5, rel=1e-5)
    inside = mask[:, 1:]  # elsewhere a model's log-probabilities are the constant 0
    torch.testing.assert_close(torch.autograd.grad(loss, policy)[0] * inside, gradient * inside, atol=1e-5, rtol=1e-5)
    return gradient


DPO = [
    *({"loss_type": kind} for kind in ("sigmoid", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "aot", "sft",
                                       "aot_unpaired", "apo_zero", "apo_down", "discopop", "sigmoid_norm")),
    {"loss_type": "robust", "label_smoothing": 0.2},
    {"loss_type": "exo_pair", "label_smoothing": 1e-3},
    {"loss_type": "aot", "label_smoothing": 0.1},
    {"loss_type": "aot_unpaired", "label_smoothing": 0.1},
    {"loss_type": "discopop", "discopop_tau": 0.3},
    {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},  # MPO
    {"loss_type": ["ipo", "sft"]},
    *({"loss_type": kind, "ld_alpha": 0.3} for kind in ("sigmoid", "ipo", "sft", "aot")),
    *({"loss_type": kind, "f_divergence_type": f} for kind in ("sigmoid", "hinge", "ipo", "discopop", "sigmoid_norm")
      for f in ("forward_kl", "js_divergence", "alpha_divergence")),
    {"loss_type": "sigmoid", "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0},
]  # fmt: skip


@pytest.mark.parametrize("options", DPO, ids=str)
@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_losses_of_dpo_trainer(options, beta):
    c = PreferenceSettings(beta=beta, **options)
    policy, mask = token_logprobs(1)
    policy.requires_grad_()
    loss, metrics = trl_dpo(c, policy, token_logprobs(2)[0], mask)
    assert check(c, loss, policy).abs().sum() > 0
    assert metrics["rewards/accuracies"]


def test_label_smoothing_of_sigmoid_is_cdpo():
    """TRL's DPO loss has none, but with one pair there is nothing for its aot to sort, and that has."""
    c = PreferenceSettings(label_smoothing=0.2)
    one = [torch.tensor([x], requires_grad=True) for x in (-3.0, -4.0)]
    rest = [torch.tensor([x]) for x in (-3.5, -2.0, 3.0, 5.0, 3.0, 1.0)]
    losses = [preference_loss(Answers(*one, *rest), dataclasses.replace(c, loss_type=k)) for k in ("sigmoid", "aot")]
    assert losses[0].item() == pytest.approx(losses[1].item())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("alpha", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["sigmoid", "hinge", "ipo", "simpo"])
def test_losses_of_cpo_trainer(kind, alpha, smoothing):
    """With AlphaPO's alpha, which is an f-divergence by another name; its imitation is what `sft` holds above."""
    from trl.experimental.cpo import CPOTrainer

    ours_called = {"sigmoid": "cpo", "hinge": "cpo_hinge", "ipo": "cpo_ipo", "simpo": "simpo"}[kind]
    policy, mask = token_logprobs(1)
    policy.requires_grad_()
    trainer = object.__new__(CPOTrainer)
    vars(trainer).update(alpha=alpha, beta=0.7, simpo_gamma=0.5, label_smoothing=smoothing, loss_type=kind,
                         accelerator=accelerator())  # fmt: skip
    sums, counts = policy.sum(1), mask.sum(1)
    logps = sums / counts if kind in ("ipo", "simpo") else sums
    theirs, chosen_rewards, _ = trainer.cpo_loss(*logps.chunk(2))
    weight = 0.0 if kind == "simpo" else 0.4
    nll = -sums[:B].sum() / counts[:B].sum()
    options = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1 - alpha} if alpha else {}
    c = PreferenceSettings(loss_type=ours_called, beta=0.7, label_smoothing=smoothing, cpo_alpha=weight, **options)
    check(c, theirs.mean() + weight * nll, policy)


def test_loss_of_orpo_trainer():
    from trl.experimental.orpo import ORPOTrainer

    policy, mask = token_logprobs(1)
    policy.requires_grad_()
    trainer = object.__new__(ORPOTrainer)
    vars(trainer).update(beta=0.3, accelerator=accelerator())
    sums, counts = policy.sum(1), mask.sum(1)
    losses, *_ = trainer.odds_ratio_loss(*(sums / counts).chunk(2))
    check(PreferenceSettings(loss_type="orpo", beta=0.3), -sums[:B].sum() / counts[:B].sum() - losses.mean(), policy)


@pytest.mark.parametrize("kind", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("liked", [[True, False, True, True, False], [True] * 5, [False] * 5])
@pytest.mark.parametrize("away", [0.0, 4.0])  # a KL that is clamped, and one that is not
def test_losses_of_kto_trainer(kind, liked, away):
    from trl import KTOTrainer

    reference, mask = token_logprobs(2)
    reference, mask = reference[:B], mask[:B]
    policy = token_logprobs(1)[0][:B].requires_grad_()
    mismatched = torch.linspace(-5, -3, B), torch.linspace(-4, -4, B) - away
    c = PreferenceSettings(loss_type=kind, beta=0.4, desirable_weight=1.3, undesirable_weight=0.6)
    trainer = object.__new__(KTOTrainer)
    vars(trainer).update(
        model=torch.nn.Identity().train(), accelerator=accelerator(), aux_loss_enabled=False, loss_type=kind,
        precompute_ref_logps=True, calculate_KL=kind == "kto", beta=c.beta, desirable_weight=c.desirable_weight,
        undesirable_weight=c.undesirable_weight, _metrics={"train": defaultdict(list)}, _total_train_tokens=0,
        _tp_size=1, _compute_kl_logps=lambda model, batch: mismatched[0],
    )  # fmt: skip
    batch = {"input_ids": torch.ones(B, T).long(), "attention_mask": torch.ones(B, T), "completion_mask": mask,
             "label": torch.tensor(liked), "ref_logps": reference.sum(1), "ref_KL_logps": mismatched[1]}  # fmt: skip
    loss = trainer._compute_loss(lambda **_: Outputs(policy), batch, return_outputs=False)
    (gradient,) = torch.autograd.grad(loss, policy)
    from zero2hero.align.preference import mismatched_kl

    kl = mismatched_kl(mismatched[0] - mismatched[1])
    mine = LOSSES[kind].loss((policy - reference).sum(1), torch.tensor(liked), kl, c).mean()
    assert mine.item() == pytest.approx(loss.item(), abs=1e-5)
    torch.testing.assert_close(torch.autograd.grad(mine, policy)[0], gradient, atol=1e-5, rtol=1e-5)
    if kind == "kto":
        assert trainer._metrics["train"]["kl"] == [pytest.approx(kl.item())]


def test_every_loss_is_compared():
    compared = {k for o in DPO for k in np.atleast_1d(o["loss_type"])} | {
        "cpo",
        "cpo_hinge",
        "cpo_ipo",
        "simpo",
        "orpo",
    }
    assert compared | {"kto", "apo_zero_unpaired"} == set(LOSSES) == set(LOSS_TYPES)


@pytest.mark.parametrize("kind", ["sigmoid", "ipo", "apo_down"])
def test_whole_way_from_tokens_to_the_gradient_of_weights(kind, tmp_path):
    """A real DPOTrainer with a tiny Llama: its collator, its forward, its loss; ours on the same pairs and weights."""
    from datasets import Dataset
    from tokenizers import Tokenizer as Raw
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    from zero2hero.models import from_pretrained

    torch.manual_seed(0)
    shape = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False)  # fmt: skip
    theirs, old = LlamaForCausalLM(shape), LlamaForCausalLM(shape)
    for name, model in (("policy", theirs), ("reference", old)):
        model.save_pretrained(tmp_path / name)
    generator = np.random.default_rng(0)
    lengths = [{"prompt_ids": p, "chosen_ids": a, "rejected_ids": b}
               for p, (a, b) in zip(PROMPTS.tolist(), LENGTHS.tolist())]  # fmt: skip
    rows = [{name: generator.integers(2, 64, n).tolist() for name, n in row.items()} for row in lengths]
    texts = [{"prompt": "w2", "chosen": "w3", "rejected": "w4"}]  # for its constructor
    words = Raw(WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w0", unk_token="w0")
    args = DPOConfig(output_dir=str(tmp_path), loss_type=[kind], beta=0.5, report_to=[], use_cpu=True, bf16=False,
                     gradient_checkpointing=False, per_device_train_batch_size=B)  # fmt: skip
    trainer = DPOTrainer(theirs, old, args, train_dataset=Dataset.from_list(texts), processing_class=tokenizer)
    inputs = trainer.data_collator(rows)
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()

    policy, reference = (from_pretrained(tmp_path / name) for name in ("policy", "reference"))
    ids = [[np.array(r[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")] for r in rows]
    trees = [Tree(prompt, (chosen, rejected)) for prompt, chosen, rejected in ids]
    from zero2hero.align.pairs import answer_logprobs

    for share in (True, False):
        batch = answer_batch(trees, share=share, nll_share=1.0).to("cpu")
        with torch.no_grad():
            batch = dataclasses.replace(batch, reference_N=answer_logprobs(reference, batch)[0])
        policy.zero_grad()
        mine = objective(policy, batch, PreferenceSettings(loss_type=kind, beta=0.5))
        (mine.sum / mine.weight).backward()
        assert float(mine.sum / mine.weight) == pytest.approx(loss.item(), abs=1e-5)
        expected = theirs.model.layers[0].self_attn.v_proj.weight.grad
        torch.testing.assert_close(policy.layers[0].self_attn.v_proj.weight.grad, expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(policy.lm_head.weight.grad, theirs.lm_head.weight.grad, atol=1e-5, rtol=1e-4)
        metrics = trainer._metrics["train"]
        for name in ("rewards/chosen", "rewards/margins", "rewards/accuracies", "logps/rejected"):
            assert float(mine.metrics[name]) / B == pytest.approx(metrics[name][0], abs=1e-4), name
