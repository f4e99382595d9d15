"""Which optimizer updates which weights, and each of them against an independent referee."""

from __future__ import annotations

import pytest
import torch

from zero2hero.config import OPTIMIZERS, DecoderConfig, TrainConfig
from zero2hero.errors import UserError
from zero2hero.models import Decoder, init_weights
from zero2hero.train.checkpoint import read_checkpoint, save_checkpoint
from zero2hero.train.lion import Lion
from zero2hero.train.optim import make_optimizers

pytestmark = pytest.mark.usefixtures("one_thread")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- groups -------------------------------------------------------------------------------------------------

MODEL = DecoderConfig(
    vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, position="learned", norm="layernorm",
    feedforward="gelu_new", attention_bias=True, output_bias=True, mlp_bias=True, tie_word_embeddings=False,
)  # fmt: skip


def groups_by_name(optim: str, **settings):
    """name -> (kind of optimizer, its group), each parameter exactly once."""
    model = Decoder(MODEL)
    init_weights(model)
    named: dict[str, torch.Tensor] = dict(model.named_parameters())
    names = {p: name for name, p in named.items()}
    optimizers = make_optimizers(named, TrainConfig(optim=optim, **settings))
    found = [
        (names[p], (type(o).__name__, {k: v for k, v in g.items() if k != "params"}))
        for o in optimizers
        for g in o.param_groups
        for p in g["params"]
    ]
    assert sorted(name for name, _ in found) == sorted(named)
    return named, dict(found)


CLASSES = {
    "muon": ("Muon", "AdamW"), "adamw": ("AdamW", "AdamW"), "adamw_8bit": ("AdamW8bit", "AdamW"),
    "adam": ("Adam", "Adam"), "sgd": ("SGD", "SGD"), "lion": ("Lion", "Lion"), "adafactor": ("Adafactor", "Adafactor"),
}  # fmt: skip


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_only_matrices_of_the_layers_decay(optim):
    named, groups = groups_by_name(optim, weight_decay=0.25)
    for name, (kind, group) in groups.items():
        matrix = named[name].dim() == 2 and "embed" not in name and "lm_head" not in name
        assert group["weight_decay"] == (0.25 if matrix else 0.0), name
        special = matrix or (optim == "adamw_8bit" and "lm_head" in name)
        assert kind == CLASSES[optim][0 if special else 1], name


def test_learning_rates_and_settings_reach_the_optimizers():
    _, groups = groups_by_name(
        "muon", learning_rate=0.01, embedding_lr_scale=0.5, head_lr_scale=0.2,
        adam_beta1=0.8, adam_beta2=0.7, adam_epsilon=1e-5,
    )  # fmt: skip
    rates = {"embed_tokens.weight": 0.005, "embed_positions.weight": 0.005, "lm_head.weight": 0.002}
    for name, (kind, group) in groups.items():
        assert group["lr"] == group["initial_lr"] == pytest.approx(rates.get(name, 0.01))
        if kind == "AdamW":
            assert (tuple(group["betas"]), group["eps"]) == ((0.8, 0.7), 1e-5)


@pytest.mark.parametrize("optim", ["muon", "adamw", "adamw_8bit", "lion"])
def test_an_adapters_factors_are_not_muons_and_b_learns_faster(optim):
    names = [f"layers.0.self_attn.q_proj.adapters.default.{kind}" for kind in ("A", "B", "magnitude")]
    parameters = {name: random(4, 4) if name[-1] in "AB" else random(4) for name in names}
    parameters["norm.adapters.default.weight"] = random(4)
    optimizers = make_optimizers(parameters, TrainConfig(optim=optim, learning_rate=0.01, loraplus_lr_ratio=16))
    rates = {}
    for optimizer in optimizers:
        assert type(optimizer).__name__ != "Muon"
        for group in optimizer.param_groups:
            rates |= {id(p): group["initial_lr"] for p in group["params"]}
    assert [rates[id(p)] for p in parameters.values()] == pytest.approx([0.01, 0.16, 0.01, 0.01])


def test_a_tied_matrix_is_updated_once():
    model = Decoder(DecoderConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    optimizers = make_optimizers(dict(model.named_parameters()), TrainConfig())
    parameters = [p for o in optimizers for g in o.param_groups for p in g["params"]]
    assert sum(p is model.embed_tokens.weight for p in parameters) == 1
    assert len(parameters) == len(set(parameters))


# --- one step after another, against a referee --------------------------------------------------------------


def run_optimizer(optim: str, steps: int = 6, **settings) -> tuple[list[torch.Tensor], list[torch.optim.Optimizer]]:
    """The matrix [6, 10] and the vector [10] after some steps of given gradients."""
    matrix, vector = random(6, 10).requires_grad_(), random(10, seed=1).requires_grad_()
    parameters = {"layers.0.mlp.up_proj.weight": matrix, "norm.bias": vector}
    optimizers = make_optimizers(parameters, TrainConfig(optim=optim, **settings))
    for step in range(steps):
        matrix.grad, vector.grad = gradients(step)
        for optimizer in optimizers:
            optimizer.step()
    return [matrix.detach(), vector.detach()], optimizers


def gradients(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    return random(6, 10, seed=10 + step), random(10, seed=50 + step)


def by_hand(rule, steps: int = 6, decay: float = 0.0) -> list[torch.Tensor]:
    """The same in float64: rule(weight, gradient, memory, step, decay) -> weight; only the matrix decays."""
    weights = [random(6, 10).double(), random(10, seed=1).double()]
    memories: list[dict] = [{}, {}]
    for step in range(steps):
        for i, gradient in enumerate(gradients(step)):
            weights[i] = rule(weights[i], gradient.double(), memories[i], step + 1, 0.0 if i else decay)
    return weights


def assert_same(got, want, tolerance: float = 2e-6) -> None:
    for a, b in zip(got, want):
        assert (a.double() - b).abs().max() < tolerance


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd(nesterov):
    def rule(w, g, memory, step, decay):
        g = g + decay * w  # coupled
        memory["m"] = m = g if step == 1 else 0.8 * memory["m"] + g
        return w - 0.05 * (g + 0.8 * m if nesterov else m)

    got, _ = run_optimizer("sgd", learning_rate=0.05, momentum=0.8, nesterov=nesterov, weight_decay=0.3)
    assert_same(got, by_hand(rule, decay=0.3))


@pytest.mark.parametrize("optim", ["adam", "adamw"])
def test_adam_couples_the_decay_and_adamw_does_not(optim):
    def rule(w, g, memory, step, decay):
        if optim == "adam":
            g = g + decay * w
        else:
            w = w * (1 - 0.02 * decay)
        memory["m"] = m = 0.7 * memory.get("m", 0) + 0.3 * g
        memory["v"] = v = 0.8 * memory.get("v", 0) + 0.2 * g * g
        return w - 0.02 * (m / (1 - 0.7**step)) / ((v / (1 - 0.8**step)).sqrt() + 1e-6)

    got, _ = run_optimizer(
        optim, learning_rate=0.02, adam_beta1=0.7, adam_beta2=0.8, adam_epsilon=1e-6, weight_decay=0.5
    )
    assert_same(got, by_hand(rule, decay=0.5))


def test_lion():
    def rule(w, g, memory, step, decay):
        m = memory.get("m", torch.zeros_like(g))
        memory["m"] = 0.8 * m + 0.2 * g
        return w - 0.01 * ((0.7 * m + 0.3 * g).sign() + decay * w)

    got, _ = run_optimizer("lion", learning_rate=0.01, adam_beta1=0.7, adam_beta2=0.8, weight_decay=0.5)
    assert_same(got, by_hand(rule, decay=0.5))


def test_lion_passes_over_what_has_no_gradient():
    still = random(3, 3).requires_grad_()
    before = still.detach().clone()
    optimizer = Lion([still], lr=0.1, weight_decay=0.5)
    optimizer.step()
    assert torch.equal(still.detach(), before)
    assert not optimizer.state[still]


def test_adafactor():
    """The paper's algorithm 4 and 5: factored second moments, clipped and relative updates."""

    def rule(w, g, memory, step, decay):
        memory_share = 1 - step**-0.8
        square = g * g + 1e-30
        if g.dim() == 2:
            memory["r"] = r = memory_share * memory.get("r", 0) + (1 - memory_share) * square.sum(1)
            memory["c"] = c = memory_share * memory.get("c", 0) + (1 - memory_share) * square.sum(0)
            v = torch.outer(r, c) / r.sum()
        else:
            memory["v"] = v = memory_share * memory.get("v", 0) + (1 - memory_share) * square
        u = g / v.sqrt()
        u = u / max(1.0, float(u.square().mean().sqrt()))
        size = max(1e-3, float(w.square().mean().sqrt())) * min(0.01, step**-0.5)
        return w * (1 - 0.01 * decay) - size * u

    got, optimizers = run_optimizer("adafactor", learning_rate=0.01, weight_decay=0.5)
    moments = [t for state in optimizers[0].state.values() for t in state.values()]
    assert sum(t.numel() for t in moments) == 1 + 6 + 10 + 1 + 10  # step, rows, columns; step, vector
    # torch measures the weight before it decays it, as the paper does not decay at all
    assert_same(got, by_hand(rule, decay=0.5))


def test_adafactor_with_gradients_as_small_as_a_large_models():
    """With torch's own epsilon the update of gradients below 1e-4 is another one."""
    weight = torch.ones(8, 8, requires_grad=True)
    optimizer = make_optimizers(
        {"layers.0.w": weight}, TrainConfig(optim="adafactor", learning_rate=0.01, weight_decay=0)
    )
    direction = torch.cat([torch.full((4, 8), 1.0), torch.full((4, 8), -0.5)]) * 1e-6
    for _ in range(2):
        weight.grad = direction.clone()
        optimizer[0].step()
    assert (weight.detach() - 1 + 0.02 * direction.sign()).abs().max() < 1e-4
    weight.grad = torch.zeros_like(direction)
    optimizer[0].step()
    assert weight.isfinite().all()


def test_l1_adds_the_signs_to_the_gradient_of_matrices_only():
    def rule(w, g, memory, step, decay):
        return w - 0.1 * (g + (0.3 * w.sign() if w.dim() == 2 else 0))

    got, _ = run_optimizer("sgd", learning_rate=0.1, momentum=0.0, weight_decay=0.0, l1_penalty=0.3)
    assert_same(got, by_hand(rule))


@pytest.mark.parametrize("optim", ["muon", "adamw", "lion"])
def test_l1_makes_weights_vanish_that_nothing_needs(optim):
    weight = torch.full((4, 4), 0.3, requires_grad=True)
    optimizers = make_optimizers(
        {"layers.0.w": weight}, TrainConfig(optim=optim, learning_rate=0.01, weight_decay=0.0, l1_penalty=0.1)
    )
    for _ in range(300):
        weight.grad = torch.zeros(4, 4)
        for optimizer in optimizers:
            optimizer.step()
    assert weight.detach().abs().max() < 0.05


# --- every one of them --------------------------------------------------------------------------------------


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_states_survive_a_checkpoint(optim, tmp_path):
    """Saved after three steps and taken up by fresh optimizers: the next three steps are the same bits."""
    straight, _ = run_optimizer(optim, steps=6)
    halves, optimizers = run_optimizer(optim, steps=3)
    folder = tmp_path / "step-000003"
    parameters = {"layers.0.mlp.up_proj.weight": halves[0], "norm.bias": halves[1]}
    save_checkpoint(folder, parameters, optimizers, {}, step=3, eval_loss=None, made_with={})
    parameters = {name: torch.zeros_like(p).requires_grad_() for name, p in parameters.items()}
    fresh = make_optimizers(parameters, TrainConfig(optim=optim))
    read_checkpoint(folder, {}, parameters, fresh).restore(parameters, fresh)
    for step in range(3, 6):
        for p, gradient in zip(parameters.values(), gradients(step)):
            p.grad = gradient
        for optimizer in fresh:
            optimizer.step()
    assert all(torch.equal(p.detach(), want) for p, want in zip(parameters.values(), straight))


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_each_learns(optim):
    """A little regression falls to a tenth of its loss."""
    inputs, target = random(64, 8), random(8, 8, seed=1)
    weight = torch.zeros(8, 8, requires_grad=True)
    rate = {"sgd": 0.02, "lion": 0.02, "adafactor": 0.5}.get(optim, 0.1)
    optimizers = make_optimizers({"layers.0.w": weight}, TrainConfig(optim=optim, learning_rate=rate, weight_decay=0.0))
    losses = []
    for _ in range(300):
        loss = (inputs @ (weight - target)).square().mean()
        weight.grad = torch.autograd.grad(loss, weight)[0]
        losses.append(float(loss.detach()))
        for optimizer in optimizers:
            optimizer.step()
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"optim": "adam8bit"}, "adamw_8bit"),
        ({"momentum": 1.0}, "momentum"),
        ({"l1_penalty": -0.1}, "l1_penalty"),
        ({"label_smoothing_factor": 1.0}, "label_smoothing_factor"),
        ({"ema_decay": 1.5}, "ema_decay"),
        ({"power": float("nan")}, "power"),
    ],
)
def test_bad_settings_are_refused(settings, word):
    with pytest.raises(UserError, match=word):
        TrainConfig(**settings)
