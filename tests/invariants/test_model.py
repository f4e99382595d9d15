"""Invariants 3, 4 and 6: cached = full, padded = packed = alone, and packed documents do not see each other.

Every shape has all its weights random, also those that a fresh model starts at zero: a block that does nothing
would pass any of these tests.
"""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from zero2hero.config import DecoderConfig, MoEConfig
from zero2hero.errors import UserError
from zero2hero.models import Decoder, init_weights
from zero2hero.models.gemma import Gemma, GemmaConfig
from zero2hero.nn import attention
from zero2hero.nn.attention import attend, explicit_attention
from zero2hero.nn.feedforward import ACTIVATIONS, FeedForward, _SiluProduct
from zero2hero.nn.linear import joint_linear
from zero2hero.nn.masks import Mask, causal_mask, make_mask
from zero2hero.nn.moe import MixtureOfExperts, load_balancing_loss, router_logits
from zero2hero.nn.norms import RMSNorm, make_norm
from zero2hero.nn.positions import Rotary, rotate, sinusoidal_table
from zero2hero.train.objectives import causal_lm, with_balanced_experts

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY, CONTEXT = 37, 64
LLAMA = DecoderConfig(
    vocab_size=VOCABULARY, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=CONTEXT
)
GPT2 = dataclasses.replace(
    LLAMA, position="learned", norm="layernorm", feedforward="gelu_new",
    attention_bias=True, output_bias=True, mlp_bias=True,
)  # fmt: skip
GEMMA = GemmaConfig(
    vocab_size=VOCABULARY, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1,
    max_position_embeddings=CONTEXT, norm="rmsnorm_offset", feedforward="geglu", head_dim=8, query_pre_attn_scalar=20,
)  # fmt: skip
SHAPES = {
    "llama": LLAMA,
    "grouped": dataclasses.replace(LLAMA, num_key_value_heads=2, tie_word_embeddings=False),
    "one key head": dataclasses.replace(LLAMA, num_key_value_heads=1, head_dim=8),
    "qwen3": dataclasses.replace(LLAMA, qk_norm=True, num_key_value_heads=2, head_dim=10),
    "window": dataclasses.replace(LLAMA, sliding_window=4, num_key_value_heads=2),
    "gpt2": GPT2,
    "sinusoidal": dataclasses.replace(GPT2, position="sinusoidal", feedforward="relu2"),
    "no positions": dataclasses.replace(LLAMA, position="none", mlp_bias=True),
    "no positions, window": dataclasses.replace(LLAMA, position="none", sliding_window=3),
    "window of some layers": dataclasses.replace(
        LLAMA, num_hidden_layers=3, sliding_window=3,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "experts": dataclasses.replace(LLAMA, num_hidden_layers=3, moe=MoEConfig(5, 2, dense_layers=[1])),
    "yarn": dataclasses.replace(
        LLAMA, rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    ),
    "gemma": GEMMA,
    "gemma2": dataclasses.replace(
        GEMMA, post_norms=True, num_key_value_heads=2, sliding_window=4, attn_logit_softcapping=1.5,
        final_logit_softcapping=2.5, layer_types=["sliding_attention", "full_attention"],
    ),
    "gemma3": dataclasses.replace(
        GEMMA, post_norms=True, qk_norm=True, sliding_window=4, rope_local_base_freq=100.0,
        layer_types=["sliding_attention", "full_attention"],
    ),
}  # fmt: skip


def randomized(config: DecoderConfig, seed: int = 0) -> Decoder:
    model = (Gemma if isinstance(config, GemmaConfig) else Decoder)(config).eval()
    mean = 0.0 if config.norm == "rmsnorm_offset" else 1.0
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(mean if p.dim() == 1 else 0.0, 0.4, generator=generator)
    return model


@pytest.fixture(params=SHAPES, scope="module")
def model(request) -> Decoder:
    return randomized(SHAPES[request.param])


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 2e-5) -> None:
    assert a.shape == b.shape
    assert (a - b).abs().max() < tolerance


# --- causality ----------------------------------------------------------------------------------------------


def test_a_token_sees_what_came_before_and_nothing_after(model):
    """The gradient of position 6 with respect to each input is zero after it, and not zero within its window."""
    inputs = F.one_hot(tokens(1, 12), VOCABULARY).float().requires_grad_()
    seen = torch.autograd.grad(embedded(model, inputs)[0, 6].square().sum(), inputs)[0].abs().sum(-1)[0]
    first = max(0, 6 - sum((window or CONTEXT) - 1 for window in model.config.windows))
    assert (seen[7:] == 0).all()
    assert (seen[:first] == 0).all()
    assert (seen[first:7] > 0).all()


def embedded(model: Decoder, one_hot: torch.Tensor, **options) -> torch.Tensor:
    """The model on inputs that a gradient can reach: one-hot rows times the embedding."""
    ids = torch.zeros(one_hot.shape[:2], dtype=torch.long)
    rows, original = one_hot @ model.embed_tokens.weight, F.embedding

    def lookup(x, table, *rest):
        return rows if table is model.embed_tokens.weight else original(x, table, *rest)

    with mock.patch.object(F, "embedding", lookup):
        return model(ids, **options)


# --- cached = full ------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(0, 9))
@settings(deadline=None, max_examples=20)
def test_cached_in_chunks_equals_full(model, chunks, spare):
    ids = tokens(2, sum(chunks), seed=spare)
    cache = model.make_cache(2, sum(chunks) + spare)
    with torch.no_grad():
        parts = [model(part, cache=cache) for part in ids.split(chunks, dim=1)]
        close(torch.cat(parts, 1), model(ids))
    assert cache.end == sum(chunks)


def test_truncated_cache_goes_on_from_there(model):
    """Rejected speculation: forget the last tokens, write others."""
    ids, wrong = tokens(2, 14), tokens(2, 5, seed=9)
    cache = model.make_cache(2, 20)
    with torch.no_grad():
        model(torch.cat([ids[:, :8], wrong], 1), cache=cache)
        cache.truncate(8)
        close(model(ids[:, 8:], cache=cache), model(ids)[:, 8:])


def test_selected_rows_go_on_alone(model):
    ids = tokens(3, 10)
    cache = model.make_cache(3, 12)
    rows = torch.tensor([2, 0, 0, 2])
    with torch.no_grad():
        model(ids[:, :7], cache=cache)
        cache.select(rows)
        close(model(ids[rows, 7:], cache=cache), model(ids[rows])[:, 7:])


def test_a_full_cache_says_so(model):
    cache = model.make_cache(1, 8)
    with torch.no_grad():
        model(tokens(1, 6), cache=cache)
        with pytest.raises(UserError, match="holds 8 tokens and 9 are needed"):
            model(tokens(1, 3), cache=cache)


# --- padded = alone -----------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 12), min_size=2, max_size=5), st.lists(st.integers(1, 3), max_size=5), st.integers(0, 5))
@settings(deadline=None, max_examples=15)
def test_ragged_rows_equal_each_row_alone(model, lengths, steps, seed):
    """Prompts of unequal length, padded on the right with any tokens; then each row goes on at its own position."""
    longest, more = max(lengths), sum(steps)
    texts = [tokens(1, length + more, seed=seed + i) for i, length in enumerate(lengths)]
    prompt = tokens(len(lengths), longest, seed=99)  # the padding is not zero: it must not matter
    for row, (text, length) in enumerate(zip(texts, lengths)):
        prompt[row, :length] = text[0, :length]
    cache = model.make_cache(len(lengths), longest + more)
    with torch.no_grad():
        alone = [model(text)[0] for text in texts]
        hidden = model(prompt, cache=cache)
        for row, length in enumerate(lengths):
            close(hidden[row, :length], alone[row][:length])
        position = torch.tensor(lengths)
        for step in steps:
            at = position[:, None] + torch.arange(step)
            ids = torch.stack([text[0, where] for text, where in zip(texts, at)])
            hidden = model(ids, positions=at, cache=cache)
            for row in range(len(lengths)):
                close(hidden[row], alone[row][at[row]])
            position = position + step


# --- packed = alone, and apart ------------------------------------------------------------------------------


def pack(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    return positions, torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 5))
@settings(deadline=None, max_examples=20)
def test_packed_equals_alone(model, lengths, seed):
    ids = tokens(1, sum(lengths), seed=seed)
    positions, documents = pack(lengths)
    with torch.no_grad():
        packed = model(ids, positions=positions, document_ids=documents)
        alone = [model(part) for part in ids.split(lengths, dim=1)]
    close(packed, torch.cat(alone, 1))


def test_rows_of_a_batch_may_be_packed_differently(model):
    ids = tokens(2, 10)
    (positions_a, documents_a), (positions_b, documents_b) = pack([4, 6]), pack([7, 1, 2])
    with torch.no_grad():
        together = model(
            ids,
            positions=torch.cat([positions_a, positions_b]),
            document_ids=torch.cat([documents_a, documents_b]),
        )
        close(together[:1], model(ids[:1], positions=positions_a, document_ids=documents_a))
        close(together[1:], model(ids[1:], positions=positions_b, document_ids=documents_b))


def test_packed_documents_do_not_see_each_other(model):
    ids = tokens(1, 15)
    positions, documents = pack([5, 6, 4])
    changed = ids.clone()
    changed[0, 5:11] = (changed[0, 5:11] + 1 + torch.arange(6)) % VOCABULARY
    with torch.no_grad():
        before = model(ids, positions=positions, document_ids=documents)
        after = model(changed, positions=positions, document_ids=documents)
    # to the last bit; but an expert's product has other sizes when another document sends it other tokens
    tolerance = 1e-5 if model.config.moe.num_experts else 0.0
    assert (before[:, :5] - after[:, :5]).abs().max() <= tolerance
    assert (before[:, 11:] - after[:, 11:]).abs().max() <= tolerance
    assert not torch.equal(before[:, 5:11], after[:, 5:11])


def test_gradients_stay_within_their_document(model):
    inputs = F.one_hot(tokens(1, 15), VOCABULARY).float().requires_grad_()
    positions, documents = pack([5, 6, 4])
    hidden = embedded(model, inputs, positions=positions, document_ids=documents)
    reached = torch.autograd.grad(hidden[0, 5:11].square().sum(), inputs)[0].abs().sum(-1)[0] > 0
    assert reached.tolist() == [False] * 5 + [True] * 6 + [False] * 4


def test_a_cache_and_packing_exclude_each_other(model):
    with pytest.raises(ValueError, match="one document per row"):
        model(tokens(1, 4), document_ids=torch.zeros(1, 4, dtype=torch.long), cache=model.make_cache(1, 4))


# --- positions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", ["learned", "sinusoidal"])
def test_a_table_ends(position):
    model = randomized(dataclasses.replace(LLAMA, position=position))
    with torch.no_grad():
        model(tokens(1, CONTEXT))
        with pytest.raises(UserError, match=f"position {CONTEXT} is past this model's last, {CONTEXT - 1}"):
            model(tokens(1, CONTEXT + 1))
        cache = model.make_cache(1, CONTEXT + 8)
        model(tokens(1, CONTEXT), cache=cache)
        with pytest.raises(UserError, match="past this model's last"):
            model(tokens(1, 1), cache=cache)


def test_rotary_goes_on_past_its_table():
    model = randomized(LLAMA)
    longer = Decoder(dataclasses.replace(LLAMA, max_position_embeddings=4 * CONTEXT)).eval()
    longer.load_state_dict(model.state_dict())
    ids = tokens(1, 3 * CONTEXT)
    with torch.no_grad():
        close(model(ids), longer(ids))


def test_rotary_depends_on_the_distance_alone():
    model = randomized(dataclasses.replace(LLAMA, max_position_embeddings=512))
    ids = tokens(1, 10)
    with torch.no_grad():
        close(model(ids), model(ids, positions=torch.arange(300, 310)[None]), 1e-3)


def test_rotate_is_a_multiplication_by_complex_units():
    rotary = Rotary(8, 10_000.0, 32)
    positions = torch.tensor([[0, 3, 31], [5, 5, 1]])
    x = torch.randn(2, 3, 4, 8, generator=torch.Generator().manual_seed(0))
    angle = positions[..., None, None] * 10_000.0 ** (-torch.arange(4) / 4)
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angle), angle)
    close(rotate(x, *rotary(positions, x.dtype)), torch.cat([turned.real, turned.imag], -1), 1e-5)


def test_gradient_of_rotate():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 2, 6, dtype=torch.double, generator=generator, requires_grad=True)
    angle = torch.randn(2, 3, 1, 3, dtype=torch.double, generator=generator)
    assert torch.autograd.gradcheck(lambda x: rotate(x, angle.cos(), angle.sin()), (x,))


def test_angles_stay_exact_in_a_model_cast_to_bf16():
    rotary = Rotary(8, 10_000.0, 600).to(torch.bfloat16)
    cos, sin = rotary(torch.tensor([[257]]), torch.float32)
    assert float(cos[0, 0, 0, 0]) == pytest.approx(math.cos(257), abs=1e-5)
    assert float(sin[0, 0, 0, 0]) == pytest.approx(math.sin(257), abs=1e-5)


def test_sinusoidal_table():
    """Vaswani et al., section 3.5, entry by entry."""
    table = sinusoidal_table(50, 10)
    for position in (0, 1, 49):
        for i in range(5):
            angle = position / 10_000 ** (2 * i / 10)
            assert float(table[position, 2 * i]) == pytest.approx(math.sin(angle), abs=1e-5)
            assert float(table[position, 2 * i + 1]) == pytest.approx(math.cos(angle), abs=1e-5)


# --- attention ----------------------------------------------------------------------------------------------


def masks(length: int) -> dict[str, Mask]:
    order = torch.arange(length)[None]
    documents = (order >= 4).long()
    return {
        "causal": causal_mask(length, torch.device("cpu")),
        "window": make_mask(order, order, window=3),
        "packed": make_mask(order, order, query_documents_BT=documents, key_documents_BS=documents),
        "everything": Mask(None),
        "both ways, window": make_mask(order, order, causal=False, window=2),
        "a row each": make_mask(torch.cat([order + 3, order]), torch.arange(length + 3)[None]),
    }


def naive_attention(q, k, v, mask: Mask, scale: float) -> torch.Tensor:
    """Head by head, query by query, as the formula reads."""
    B, H, T, _ = q.shape
    out = torch.empty_like(q)
    for b in range(B):
        for h in range(H):
            g = h * k.shape[1] // H
            for t in range(T):
                scores = k[b, g] @ q[b, h, t] * scale
                if mask.allowed is not None:
                    allowed = mask.allowed[b if len(mask.allowed) > 1 else 0, t]
                    scores = torch.where(allowed, scores, -torch.inf)
                out[b, h, t] = scores.softmax(-1) @ v[b, g]
    return out


@pytest.mark.parametrize("kind", masks(9))
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_both_forms_of_attention_equal_the_formula(kind, key_heads, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    mask = masks(9)[kind]
    keys = mask.allowed.shape[-1] if mask.allowed is not None else 9
    q = torch.randn(2, 4, 9, 6, generator=generator, requires_grad=True)
    k, v = (torch.randn(2, key_heads, keys, 6, generator=generator, requires_grad=True) for _ in range(2))
    weigh = torch.randn(2, 4, 9, 6, generator=generator)
    results = []
    for form in (True, False):
        monkeypatch.setattr(attention, "use_explicit", lambda q, form=form: form)
        out = attend(q, k, v, mask, 0.37)
        results.append([out, *torch.autograd.grad((out * weigh).sum(), (q, k, v))])
    out = naive_attention(q, k, v, mask, 0.37)
    expected = [out, *torch.autograd.grad((out * weigh).sum(), (q, k, v))]
    for got in results:
        for a, b in zip(got, expected):
            close(a, b, 1e-5)


@pytest.mark.usefixtures("bf16")
@pytest.mark.parametrize("kind", masks(9))
def test_explicit_attention_in_bf16_is_near(kind):
    generator = torch.Generator().manual_seed(0)
    mask = masks(9)[kind]
    keys = mask.allowed.shape[-1] if mask.allowed is not None else 9
    q = torch.randn(2, 4, 9, 16, generator=generator)
    k, v = (torch.randn(2, 4, keys, 16, generator=generator) for _ in range(2))
    exact = explicit_attention(q, k, v, mask, 0.25)
    rounded = explicit_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), mask, 0.25)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("name", ["llama", "window", "gpt2", "qwen3"])
def test_a_model_with_either_form_is_the_same(name, monkeypatch):
    model, ids = randomized(SHAPES[name]), tokens(2, 20)
    hidden = []
    for form in (True, False):
        monkeypatch.setattr(attention, "use_explicit", lambda q, form=form: form)
        with torch.no_grad():
            hidden.append(model(ids))
    close(hidden[0], hidden[1], 1e-5)


def test_dropout_is_for_training_only():
    model = randomized(dataclasses.replace(LLAMA, dropout=0.5))
    ids = tokens(1, 8)
    assert torch.equal(model(ids), model(ids))
    model.train()
    torch.manual_seed(0)
    first = model(ids)
    assert not torch.equal(first, model(ids))
    torch.manual_seed(0)
    assert torch.equal(first, model(ids))


# --- the other parts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("biases", [(True, True, True), (False, False, False), (True, False, True)])
def test_joint_linear_equals_one_after_another(biases):
    torch.manual_seed(0)
    parts = [nn.Linear(6, width, bias=bias) for width, bias in zip((4, 2, 7), biases)]
    x = torch.randn(3, 5, 6, requires_grad=True)
    leaves = [x, *(p for part in parts for p in part.parameters())]
    joint, separate = joint_linear(x, *parts), [part(x) for part in parts]
    for a, b in zip(joint, separate):
        close(a, b, 1e-6)
    weigh = [torch.randn_like(y) for y in separate]
    gradients = [torch.autograd.grad(sum((y * w).sum() for y, w in zip(ys, weigh)), leaves) for ys in (joint, separate)]
    for a, b in zip(*gradients):
        close(a, b, 1e-5)


def test_joint_linear_leaves_changed_projections_alone():
    """An adapter or a hook on one of them takes part."""

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    torch.manual_seed(0)
    plain, doubled, hooked = nn.Linear(4, 3), Doubled(4, 3), nn.Linear(4, 3)
    x = torch.randn(2, 4)
    a, b = joint_linear(x, plain, doubled)
    close(a, plain(x), 1e-6)
    close(b, 2 * F.linear(x, doubled.weight, doubled.bias), 1e-6)
    hooked.register_forward_hook(lambda module, args, out: out + 1)
    close(joint_linear(x, plain, hooked)[1], F.linear(x, hooked.weight, hooked.bias) + 1, 1e-6)


def naive_mixture(module: MixtureOfExperts, x: torch.Tensor) -> torch.Tensor:
    """Token by token, as the formula reads."""
    out = torch.zeros_like(x)
    for n, row in enumerate(x):
        p = module.gate(row).softmax(-1)
        best = sorted(range(len(p)), key=lambda e: -float(p[e].detach()))[: module.top_k]
        total = sum(p[e] for e in best) if module.normalize else 1.0
        for e in best:
            out[n] = out[n] + p[e] / total * module.experts[e](row[None])[0]
    return out


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_mixture_of_experts_equals_the_formula(normalize, top_k):
    torch.manual_seed(0)
    module = MixtureOfExperts(6, 10, "swiglu", 5, top_k, normalize)
    x = torch.randn(7, 6, requires_grad=True)
    leaves = [x, *module.parameters()]
    out, expected = module(x), naive_mixture(module, x)
    close(out, expected, 1e-6)
    weigh = torch.randn_like(out)
    got, want = (torch.autograd.grad((y * weigh).sum(), leaves, allow_unused=True) for y in (out, expected))
    for a, b in zip(got, want):
        assert a is not None  # of an idle expert too: zero
        close(a, torch.zeros_like(a) if b is None else b, 1e-5)


def test_the_balancing_loss_spreads_tokens_over_experts():
    torch.manual_seed(0)
    module = MixtureOfExperts(8, 4, "swiglu", 4, 1)
    x = torch.randn(256, 8) + 3.0  # all tokens alike: at first the router sends most of them to one expert
    optimizer = torch.optim.Adam(module.gate.parameters(), lr=0.03)

    def shares() -> torch.Tensor:
        return module.route(x)[1].flatten().bincount(minlength=4) / len(x)

    assert shares().max() > 0.7
    for _ in range(200):
        with router_logits(module) as logits:
            module(x)
        loss = load_balancing_loss(logits, 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert shares().max() < 0.5
    assert float(loss) == pytest.approx(1.0, abs=0.2)
    assert not module.gate._forward_hooks


def test_an_objective_adds_the_balance_of_the_experts():
    model = randomized(SHAPES["experts"])
    ids, targets = tokens(2, 8), tokens(2, 8, seed=1)
    batch = SimpleNamespace(ids_BT=ids, targets_BT=targets, positions_BT=None, document_ids_BT=None)
    plain, loss = causal_lm(model, batch), with_balanced_experts(causal_lm, 2, 0.1)(model, batch)
    balance = float(loss.metrics["expert_balance"] / loss.weight)
    assert 1.8 < balance < 5.0  # about k when balanced, E at worst
    assert float(loss.sum / loss.weight) == pytest.approx(float(plain.sum / plain.weight) + 0.1 * balance, abs=1e-4)


def test_gradient_of_the_gated_product():
    generator = torch.Generator().manual_seed(0)
    gate, up = (torch.randn(3, 5, dtype=torch.double, generator=generator, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(_SiluProduct.apply, (gate, up))
    assert torch.equal(_SiluProduct.apply(gate, up), F.silu(gate) * up)


@pytest.mark.parametrize("kind", ["swiglu", "geglu", *ACTIVATIONS])
def test_feed_forward_does_not_change_its_input(kind):
    """Its kernels reuse memory; what they were given must stay."""
    torch.manual_seed(0)
    module = FeedForward(6, 10, kind, bias=True)
    x = torch.randn(4, 6, requires_grad=True)
    kept = x.detach().clone()
    y = module(x)
    (first,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    (second,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(x, kept)
    assert torch.equal(first, second)


@pytest.mark.parametrize("width", [1, 7, 64])
def test_rms_norm_equals_torchs(width):
    torch.manual_seed(0)
    ours, theirs = RMSNorm(width, 1e-3), nn.RMSNorm(width, 1e-3)
    with torch.no_grad():
        ours.weight.normal_()
        theirs.weight.copy_(ours.weight)
    x = torch.randn(4, 3, width, requires_grad=True)
    close(ours(x), theirs(x), 1e-5)
    weigh = torch.randn(4, 3, width)
    for a, b in zip(*(torch.autograd.grad((m(x) * weigh).sum(), [x, m.weight]) for m in (ours, theirs))):
        close(a, b, 1e-4)


def test_rms_norm_counts_in_fp32():
    """1,000 numbers near 300 in fp16: their squares do not fit into it, their norm does."""
    x = torch.full((1, 1000), 300.0, dtype=torch.float16)
    out = RMSNorm(1000).half()(x)
    assert out.dtype == torch.float16
    assert torch.allclose(out.float(), torch.ones(1, 1000), atol=1e-3)


def test_make_norm():
    assert isinstance(make_norm("layernorm", 4, 1e-3), nn.LayerNorm)
    assert make_norm("layernorm", 4, 1e-3).eps == make_norm("rmsnorm", 4, 1e-3).eps == 1e-3


# --- first weights ------------------------------------------------------------------------------------------


def test_initial_weights_come_from_the_seed_alone():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    models = [Decoder(GPT2) for _ in range(3)]
    torch.set_rng_state(state)
    for model, seed in zip(models, (5, 5, 6)):
        init_weights(model, seed)
    assert torch.equal(torch.get_rng_state(), state)
    first, same, other = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["embed_tokens.weight"], other["embed_tokens.weight"])
    model = models[0]
    assert model.lm_head.weight is model.embed_tokens.weight
    with torch.no_grad():  # each block starts as the identity
        hidden = model.embed_tokens(tokens(1, 6)) + model.embed_positions.weight[:6]
        close(model(tokens(1, 6)), F.layer_norm(hidden, (24,), eps=GPT2.norm_eps), 1e-5)
        assert model.logits(model(tokens(2, 9))).log_softmax(-1).mean() == pytest.approx(-math.log(37), abs=0.1)
