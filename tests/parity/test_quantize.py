"""NF4 and int8 are bitsandbytes': the same bytes, the same files in both directions, the same logits and gradients."""

from __future__ import annotations

import functools
import json
import logging
import random

import pytest
import torch
from safetensors.torch import load_file

from zero2hero.models import Decoder, DecoderConfig, from_pretrained, init_weights, save_pretrained
from zero2hero.nn import native, nf4
from zero2hero.nn.quantized import Linear4bit, Linear8bit, QuantizedLinear, quantize_rows
from zero2hero.tune import load_adapter, merge, quantize_int8, quantize_nf4

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it asks for a package that is not needed
pytest.importorskip("bitsandbytes")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread", "bf16")
SHAPE = {"vocab_size": 128, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def definition(operator: str, *arguments):
    """bitsandbytes' definition for all devices. Its library for CPUs rounds scales in a coarse table, and makes wrong
    weights where a row does not hold whole blocks."""
    found = getattr(torch.ops.bitsandbytes, operator).default
    with torch.compiler.set_stance("force_eager"):
        return found._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *arguments)


def some_weights(i: int) -> torch.Tensor:
    """Of a random shape, size and precision; every third with blocks of zeros, every fourth with outliers."""
    rng, generator = random.Random(i), torch.Generator().manual_seed(i)
    shape = (rng.randint(1, 150), rng.randint(1, 150))
    weight = torch.randn(shape, generator=generator) * 10 ** rng.uniform(-4, 1)
    if i % 3 == 0:
        weight.view(-1)[: weight.numel() // 128 * 64] = 0
    if i % 4 == 0:
        weight.view(-1)[torch.randint(weight.numel(), (3,), generator=generator)] *= 100
    return weight.to(DTYPES[i % 3])


@pytest.mark.parametrize("kernels", [True, False])
def test_bytes_of_a_hundred_weights(kernels, monkeypatch):
    from bitsandbytes import functional

    if not kernels:
        monkeypatch.setattr(native, "usable", lambda *tensors: False)
    quantize_blockwise = functools.partial(definition, "quantize_blockwise")
    code, values = functional.create_dynamic_map(), functional.get_4bit_type("nf4", device="cpu")
    assert torch.equal(nf4.nf4_code(), values)
    for i in range(100):
        weight = some_weights(i)
        codes, absmax = torch.ops.bitsandbytes.quantize_4bit.default(weight, 64, "nf4", torch.uint8)
        nested, nested_absmax = quantize_blockwise(absmax - absmax.mean(), code, 256)
        single, double = nf4.quantize(weight, double_quant=False), nf4.quantize(weight)
        for ours, theirs in ((single.codes, codes.flatten()), (single.absmax, absmax), (double.codes, codes.flatten()),
                             (double.absmax, nested), (double.nested_absmax, nested_absmax),
                             (double.offset, absmax.mean())):  # fmt: skip
            assert torch.equal(ours, theirs), (i, weight.shape)
        scales = definition("dequantize_blockwise", nested, nested_absmax, code, 256, torch.float32) + absmax.mean()
        for dtype in DTYPES:
            theirs = definition("dequantize_4bit", codes, scales, 64, "nf4", weight.shape, dtype)
            assert torch.equal(nf4.dequantize(double, dtype), theirs), (i, weight.shape, dtype)


def test_bytes_of_int8():
    from bitsandbytes import functional

    for i in range(30):
        weight = some_weights(i).clamp(-6e4, 6e4)
        if (weight.half() == 0).all(1).any():
            continue  # 0 / 0 there
        codes, absmax, _ = functional.int8_vectorwise_quant(weight.half())
        ours = quantize_rows(weight)
        assert torch.equal(ours.codes, codes)
        assert torch.equal(ours.absmax, absmax)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model, and what transformers makes of it: {kind: folder}."""
    folder = tmp_path_factory.mktemp("quantized")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPE, tie_word_embeddings=False)
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(folder / "plain")
    nf4_settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    kinds = {"nf4": nf4_settings, "double": nf4_settings | {"bnb_4bit_use_double_quant": True},
             "stored as bf16": nf4_settings | {"bnb_4bit_quant_storage": torch.bfloat16},
             "fp4": {"load_in_4bit": True}, "int8": {"load_in_8bit": True}}  # fmt: skip
    for kind, settings in kinds.items():
        theirs(folder / "plain", transformers.BitsAndBytesConfig(**settings)).save_pretrained(folder / kind)
    return folder


def theirs(folder, settings=None):
    more = {} if settings is None else {"quantization_config": settings}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype=torch.bfloat16, **more)


def ids() -> torch.Tensor:
    return torch.arange(48).view(2, 24) * 7 % 128


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


@pytest.mark.parametrize("kind", ["nf4", "double", "stored as bf16", "int8"])
def test_their_files_load(folders, kind):
    ours = from_pretrained(folders / kind)
    module = Linear8bit if kind == "int8" else Linear4bit
    assert sum(type(m) is module for m in ours.modules()) == 14
    assert type(ours.lm_head) is torch.nn.Linear
    with torch.no_grad():
        expected = theirs(folders / kind)(ids()).logits
        # int8: they round activations too
        assert relative(ours.logits(ours(ids())), expected) < (0.02 if kind == "int8" else 0.01)


@pytest.mark.parametrize("kind", ["nf4", "double", "int8"])
def test_our_files_are_theirs(folders, kind, tmp_path):
    """Written from what was loaded, and from what is quantized here: the same tensors, and transformers opens them."""
    save_pretrained(from_pretrained(folders / kind), tmp_path / "again")
    expected = load_file(folders / kind / "model.safetensors")
    plain = from_pretrained(folders / "plain")
    model = quantize_int8(plain) if kind == "int8" else quantize_nf4(plain, double_quant=kind == "double")
    save_pretrained(model, tmp_path / "fresh")
    for folder in (tmp_path / "again", tmp_path / "fresh"):
        found = load_file(folder / "model.safetensors")
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            if "quant_state" in name:
                state, reference = (json.loads(bytes(t.tolist())) for t in (found[name], value))
                assert state.keys() == reference.keys()
                assert state == {
                    **reference,
                    **{k: pytest.approx(v) for k, v in reference.items() if k == "nested_offset"},
                }
            elif "absmax" in name and value.dtype == torch.uint8:  # their CPU's coarse table
                assert (found[name].int() - value.int()).abs().max() <= 1
            else:
                assert torch.equal(found[name], value), name
        with torch.no_grad():
            assert relative(theirs(folder)(ids()).logits, theirs(folders / kind)(ids()).logits) < 0.01


def test_transformers_loads_a_model_that_was_quantized_here(tmp_path):
    model = Decoder(DecoderConfig(**SHAPE, tie_word_embeddings=True))
    init_weights(model)
    model.bfloat16()
    save_pretrained(quantize_nf4(model), tmp_path)
    with torch.no_grad():
        assert relative(theirs(tmp_path)(ids()).logits, model.logits(model(ids()))) < 0.01


def test_loading_in_four_bits_is_quantizing_what_was_loaded(folders):
    loaded, made = (
        from_pretrained(folders / "plain", load_in_4bit=True),
        quantize_nf4(from_pretrained(folders / "plain")),
    )
    for (name, a), (_, b) in zip(loaded.state_dict().items(), made.state_dict().items()):
        assert torch.equal(a, b), name
    assert isinstance(from_pretrained(folders / "plain", load_in_8bit=True).layers[0].mlp.up_proj, Linear8bit)


def test_gradients_are_those_of_bitsandbytes():
    """Forward, and the gradient of the input, of one module in both precisions."""
    import bitsandbytes

    generator = torch.Generator().manual_seed(0)
    weight, x0 = torch.randn(192, 128, generator=generator), torch.randn(5, 7, 128, generator=generator)
    for dtype in (torch.float32, torch.bfloat16):
        theirs = bitsandbytes.nn.Linear4bit(128, 192, bias=False, compute_dtype=dtype, quant_type="nf4")
        theirs.load_state_dict({"weight": weight})
        theirs.to("cpu")
        ours = Linear4bit(nf4.quantize(weight))
        results = []
        for module in (ours, theirs):
            x = x0.to(dtype, copy=True).requires_grad_()
            y = module(x)
            y.square().sum().backward()
            results.append((y.detach(), x.grad))
        for a, b in zip(*results):
            assert relative(a, b) < (1e-3 if dtype == torch.float32 else 1e-2)


def test_qlora_is_that_of_bitsandbytes_and_peft(folders, tmp_path):
    """The same base and the same adapter on it: logits, and the gradient of every matrix of the adapter."""
    peft = pytest.importorskip("peft")
    settings = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                                               bnb_4bit_use_double_quant=True)  # fmt: skip
    base = transformers.AutoModelForCausalLM.from_pretrained(
        folders / "plain", device_map="cpu", dtype=torch.float32, quantization_config=settings
    )
    base.save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    reference = peft.get_peft_model(base, config)
    reference.save_pretrained(tmp_path / "adapter")
    reference.train().enable_input_require_grads()  # or it takes a kernel for inference, which rounds to bf16
    model = load_adapter(from_pretrained(tmp_path / "base"), tmp_path / "adapter", is_trainable=True)
    expected = reference(ids()).logits
    logits = model.logits(model(ids()))
    assert relative(logits, expected) < 1e-3
    for some in (logits, expected):
        some.log_softmax(-1)[..., 3].sum().backward()
    theirs_by_end = {name.removeprefix("base_model.model.model."): p for name, p in reference.named_parameters()}
    compared = 0
    for name, p in model.named_parameters():
        if p.requires_grad:
            end = name.replace(".adapters.default.A", ".lora_A.default.weight")
            end = end.replace(".adapters.default.B", ".lora_B.default.weight")
            assert relative(p.grad, theirs_by_end[end].grad) < 1e-3, name
            compared += 1
    assert compared == 2 * 14
    merged = load_adapter(from_pretrained(tmp_path / "base").bfloat16(), tmp_path / "adapter")
    with pytest.warns(UserWarning, match="dequantized weights of 14"):
        merge(merged)
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert relative(merged.logits(merged(ids())), expected) < 0.03


def test_what_is_not_read_is_named(folders):
    from zero2hero.errors import UserError

    with pytest.raises(UserError, match=r"q_proj\.weight is in FP4|\.weight is in FP4"):
        from_pretrained(folders / "fp4")
    assert not any(isinstance(m, QuantizedLinear) for m in from_pretrained(folders / "plain").modules())
