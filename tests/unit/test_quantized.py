"""Quantized modules: what they compute, what learns beside them, and what is refused."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from zero2hero.config import TrainConfig
from zero2hero.errors import UserError
from zero2hero.models import Decoder, DecoderConfig, from_pretrained, save_pretrained
from zero2hero.nn import nf4
from zero2hero.nn.quantized import Linear4bit, Linear8bit, QuantizedLinear, quantize_rows
from zero2hero.tune.quantize import dequantize, quantize_int8, quantize_nf4

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE = DecoderConfig(
    vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
    attention_bias=True, output_bias=True,
)  # fmt: skip


def model(shape: DecoderConfig = SHAPE) -> Decoder:
    made = Decoder(shape)
    generator = torch.Generator().manual_seed(0)
    for p in made.parameters():
        nn.init.normal_(p, 0, 0.2, generator=generator)
    return made


def ids() -> torch.Tensor:
    return torch.arange(24).view(2, 12) % 50


@pytest.mark.parametrize("module", [Linear4bit, Linear8bit])
@pytest.mark.parametrize("size", [(48, 32), (7, 9)])
def test_a_module_is_a_linear_map_with_its_dequantized_weight(module, size):
    weight = torch.randn(size, generator=torch.Generator().manual_seed(0))
    bias = nn.Parameter(torch.arange(float(size[0])))
    quantized = module(nf4.quantize(weight) if module is Linear4bit else quantize_rows(weight), bias)
    x = torch.randn(3, 5, size[1], generator=torch.Generator().manual_seed(1), requires_grad=True)
    again = quantized.dequantize()
    assert (again - weight).abs().max() < (0.3 if module is Linear4bit else 0.02) * weight.abs().max()
    y, expected = quantized(x), nn.functional.linear(x, again, bias)
    torch.testing.assert_close(y, expected)
    grads = [torch.autograd.grad(out.square().sum(), (x, bias)) for out in (y, expected)]
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_modules_in_several_threads_do_not_share_their_scratch():
    weights = [torch.randn(96, 64, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    modules = [Linear4bit(nf4.quantize(weight)) for weight in weights]
    x = torch.eye(64)

    def wrong(module: Linear4bit) -> int:
        expected = module.dequantize().t()
        return sum(not torch.equal(module(x), expected) for _ in range(200))

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(wrong, modules)) == [0, 0, 0, 0]


@pytest.mark.parametrize("quantize", [quantize_nf4, quantize_int8])
def test_a_quantized_model_computes_with_its_dequantized_weights(quantize):
    quantized = quantize(model())
    assert sum(isinstance(m, QuantizedLinear) for m in quantized.modules()) == 14
    y = quantized(ids())
    torch.testing.assert_close(dequantize(quantized)(ids()), y, rtol=1e-4, atol=1e-4)
    assert not any(isinstance(m, QuantizedLinear) for m in quantized.modules())
    assert (y - model()(ids())).norm() < 0.3 * y.norm()


def test_four_bits_and_an_eighth():
    quantized = quantize_nf4(
        model(DecoderConfig(vocab_size=8, hidden_size=256, num_attention_heads=4, num_hidden_layers=1))
    )
    stored = sum(b.nbytes for m in quantized.modules() if isinstance(m, QuantizedLinear) for b in m.buffers())
    weights = sum(m.in_features * m.out_features for m in quantized.modules() if isinstance(m, QuantizedLinear))
    assert stored / weights == pytest.approx(4.127 / 8, abs=0.001)


def test_scales_keep_their_precision_when_the_model_changes_its_own():
    quantized = quantize_nf4(model())
    before = {name: buffer.clone() for name, buffer in quantized.named_buffers()}
    quantized.to(torch.bfloat16).half().to("cpu")
    for name, module in quantized.named_modules():
        if isinstance(module, QuantizedLinear):
            assert all(torch.equal(b, before[f"{name}.{n}"]) for n, b in module.named_buffers())
            assert module.bias is None or module.bias.dtype == torch.float16


def test_skipped_modules_and_routers_stay():
    from zero2hero.config import MoEConfig

    shape = DecoderConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                          moe=MoEConfig(num_experts=4))  # fmt: skip
    quantized = quantize_nf4(model(shape), skip_modules=["layers.1", "o_proj"])
    kinds = {name: type(module) for name, module in quantized.named_modules()}
    assert kinds["layers.0.mlp.gate"] is kinds["layers.0.self_attn.o_proj"] is kinds["lm_head"] is nn.Linear
    assert kinds["layers.1.self_attn.q_proj"] is kinds["layers.1.mlp.experts.0.up_proj"] is nn.Linear
    assert kinds["layers.0.mlp.experts.3.down_proj"] is Linear4bit


def test_checkpointed_blocks_give_the_same_gradients():
    from zero2hero.train.activation_checkpointing import checkpoint_blocks

    grads = []
    for wrap in (lambda m: m, checkpoint_blocks):
        made = wrap(quantize_nf4(model()))
        made(ids()).square().sum().backward()
        grads.append(made.embed_tokens.weight.grad)
    assert torch.equal(*grads)


def test_a_compiled_model_calls_one_operator():
    module = Linear4bit(nf4.quantize(torch.randn(16, 8, generator=torch.Generator().manual_seed(0))))
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    x = torch.ones(2, 8, requires_grad=True)
    grads = [torch.autograd.grad(f(x).square().sum(), x)[0] for f in (module, compiled)]
    assert torch.equal(*grads)


@pytest.mark.usefixtures("bf16")
def test_the_loop_trains_what_is_beside_a_quantized_base(tmp_path):
    """Codes stay as they are, and a checkpoint holds no more than what learns."""
    from zero2hero.data.batches import Batch
    from zero2hero.train.loop import Trainer
    from zero2hero.train.objectives import causal_lm

    quantized = quantize_nf4(model())
    for name, p in quantized.named_parameters():
        p.requires_grad_(name.endswith("norm.weight"))
    codes = quantized.layers[0].mlp.up_proj.codes.clone()
    batch = Batch(ids(), ids().roll(-1, 1), torch.arange(12).expand(2, 12), torch.zeros(2, 12, dtype=torch.long))
    config = TrainConfig(max_steps=2, optim="adamw", learning_rate=1e-2)
    trainer = Trainer(quantized, causal_lm, lambda step: [batch], config, 2, tmp_path, dtype=torch.bfloat16)
    trainer.train()
    assert torch.equal(quantized.layers[0].mlp.up_proj.codes, codes)
    saved = load_file(tmp_path / "checkpoints" / "step-000002" / "model.safetensors")
    assert saved.keys() == {"norm.weight", *(f"layers.{i}.{n}.weight" for i in range(2)
                                             for n in ("input_layernorm", "post_attention_layernorm"))}  # fmt: skip
    assert not torch.equal(saved["norm.weight"], model().norm.weight)


@pytest.mark.parametrize("shape", ["plain", "tied"])
def test_there_and_back(tmp_path, shape):
    made = model(DecoderConfig(vocab_size=50, hidden_size=32, num_attention_heads=4, num_hidden_layers=2,
                               tie_word_embeddings=shape == "tied"))  # fmt: skip
    quantized = quantize_nf4(made)
    save_pretrained(quantized, tmp_path)
    again = from_pretrained(tmp_path)
    assert "quantization_config" not in again.config.extra
    for (name, a), (_, b) in zip(quantized.state_dict().items(), again.state_dict().items()):
        assert torch.equal(a, b), name
    save_pretrained(dequantize(again), tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    torch.testing.assert_close(from_pretrained(tmp_path)(ids()), dequantize(quantized)(ids()))


# --- what is refused ------------------------------------------------------------------------------------------


def test_nothing_to_quantize():
    with pytest.raises(UserError, match="nothing in this Linear can be quantized"):
        quantize_nf4(nn.Linear(4, 4))
    with pytest.raises(UserError, match="quantized already"):
        quantize_int8(quantize_nf4(model()))


@pytest.mark.parametrize("quantize", [quantize_nf4, quantize_int8])
def test_weights_that_are_not_finite(quantize):
    broken = model()
    with torch.no_grad():
        broken.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj: weights that are not finite"):
        quantize(broken)


def test_a_family_that_stacks_matrices_cannot_be_saved_quantized(tmp_path):
    gpt2 = DecoderConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, position="learned", norm="layernorm",
        feedforward="gelu_new", attention_bias=True, output_bias=True, mlp_bias=True,
    )  # fmt: skip
    quantized = quantize_nf4(model(gpt2))
    assert torch.isfinite(quantized(ids())).all()
    with pytest.raises(UserError, match=r"gpt2 files cannot hold .* quantized"):
        save_pretrained(quantized, tmp_path)


def test_two_kinds_in_one_file(tmp_path):
    mixed = quantize_nf4(model(), skip_modules=["layers.1"])
    mixed.layers[1].mlp.up_proj = Linear8bit(quantize_rows(mixed.layers[1].mlp.up_proj.weight))
    with pytest.raises(UserError, match="weights of one kind"):
        save_pretrained(mixed, tmp_path)


NAME = "model.layers.0.self_attn.q_proj.weight"
STATE = f"{NAME}.quant_state.bitsandbytes__nf4"


def _text(**changes) -> torch.Tensor:
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [32, 32], "nested_blocksize": 256,
             "nested_dtype": "float32", "nested_offset": 0.1} | changes  # fmt: skip
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{NAME}.absmax": None}, "absmax is missing"),
        ({f"{NAME}.quant_map": None}, "quant_map is missing"),
        ({f"{NAME}.absmax": torch.zeros(3, dtype=torch.uint8)}, r"absmax holds torch.uint8 \[3\]; it should be"),
        ({f"{NAME}.quant_map": torch.zeros(16)}, "a code of its own"),
        ({NAME: torch.zeros(100, 1, dtype=torch.uint8)}, "holds 100 bytes; 1024 weights in NF4 are 512"),
        ({STATE: _text(shape=[32, 64])}, "config.json and this program want"),
        ({STATE: _text(blocksize=128)}, "config.json and this program want"),
        ({STATE: _text(nested_offset="much")}, "no description of NF4"),
        ({STATE: torch.tensor([1, 2], dtype=torch.uint8)}, "no description of NF4"),
        ({STATE: None}, "nothing beside it says what they stand for"),
        ({"model.embed_tokens.weight.absmax": torch.zeros(1)}, "no place"),
        (
            {"model.embed_tokens.weight": torch.zeros(800, 1, dtype=torch.uint8),
             "model.embed_tokens.weight.quant_state.bitsandbytes__nf4": _text()},
            r"embed_tokens.weight is quantized; only a layer's linear module",
        ),
        ({NAME: None}, "missing"),
    ],
)  # fmt: skip
def test_damaged_files(tmp_path, changes, message):
    save_pretrained(quantize_nf4(model()), tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
    with pytest.raises(UserError, match=message):
        from_pretrained(tmp_path)


def test_other_quantizations_are_named(tmp_path):
    save_pretrained(model(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for settings, name in (({"quant_method": "gptq", "bits": 4}, "gptq"), ("awq", "awq")):
        (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
        with pytest.raises(UserError, match=f"quantized by '{name}'"):
            from_pretrained(tmp_path)
    with pytest.raises(UserError, match="exclude each other"):
        from_pretrained(tmp_path, load_in_4bit=True, load_in_8bit=True)
