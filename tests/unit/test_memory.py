"""Memory: the plan counts what autograd keeps, checkpointing changes no gradient, and running out is explained."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from zero2hero.cli import main
from zero2hero.config import DecoderConfig, TrainConfig
from zero2hero.data.batches import Batch
from zero2hero.errors import UserError
from zero2hero.models import Decoder, init_weights
from zero2hero.plan.memory import page
from zero2hero.progress import human_bytes
from zero2hero.train.activation_checkpointing import checkpoint_blocks
from zero2hero.train.loop import Trainer
from zero2hero.train.memory import memory_explained, planned_run, warning
from zero2hero.train.memory_advice import advice, needing_less
from zero2hero.train.memory_plan import Run, loss_bytes, optimizer_bytes, predict, weight_counts
from zero2hero.train.objectives import causal_lm

pytestmark = pytest.mark.usefixtures("one_thread", "bf16")

CPU = torch.device("cpu")
ROWS, LENGTH = 2, 96
SHAPE = DecoderConfig(vocab_size=100, hidden_size=64, num_hidden_layers=3, num_attention_heads=4)
TRAIN = TrainConfig(per_device_train_batch_size=ROWS, max_length=LENGTH, optim="adamw")
GPT2 = {"position": "learned", "norm": "layernorm", "feedforward": "gelu_new", "attention_bias": True,
        "mlp_bias": True, "output_bias": True}  # fmt: skip


def make(dtype: torch.dtype = torch.float32, **shape) -> tuple[Decoder, Batch]:
    model = Decoder(dataclasses.replace(SHAPE, **shape))
    init_weights(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.normal_(0.0, 0.2, generator=generator)
    ids = torch.randint(0, 100, (ROWS, LENGTH + 1), generator=generator)
    column = torch.arange(LENGTH).expand(ROWS, -1)
    targets = ids[:, 1:].masked_fill(column == LENGTH // 2 - 1, -100)
    return model.to(dtype).train(), Batch(ids[:, :-1], targets, column % (LENGTH // 2), column // (LENGTH // 2))


def saved_bytes(model: Decoder, batch: Batch) -> int:
    """Of the distinct storages that autograd keeps after a forward pass, beside the weights' own."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, tuple[int, Tensor]] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        kept[storage.data_ptr()] = (storage.nbytes(), t)  # holding t, so that no address is used twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = causal_lm(model, batch)  # noqa: F841 (its graph is what is measured)
    return sum(size for address, (size, _) in kept.items() if address not in own)


@pytest.mark.parametrize(
    ("precision", "shape"),
    [
        ("fp32", {}),
        ("fp32", {"qk_norm": True, "num_key_value_heads": 2}),
        ("fp32", {"dropout": 0.1}),
        ("fp32", GPT2),
        ("fp32", {"feedforward": "relu", "tie_word_embeddings": False}),
        ("fp32", {"feedforward": "relu2"}),
        ("bf16", {}),
        ("bf16", {"qk_norm": True, "num_key_value_heads": 2}),
        ("bf16", {"dropout": 0.1}),
        ("fp16", {"qk_norm": True}),
    ],
)
def test_planned_activations_are_those_that_autograd_keeps(precision, shape) -> None:
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    model, batch = make(dtype, **shape)
    run = planned_run(model.config, TRAIN, dtype, CPU)
    assert run.precision == precision
    moment = predict(run).moments["loss"]
    planned = moment["activations"] + moment["attention weights"]
    c, N = model.config, ROWS * LENGTH
    head = 4 * c.vocab_size * c.hidden_size + N * c.hidden_size * run.number  # what _NLLSum keeps, counted as loss
    assert planned + head == pytest.approx(saved_bytes(model, batch), rel=0.03)
    assert loss_bytes(run) > head


@pytest.mark.parametrize("shape", [{}, {"qk_norm": True, "tie_word_embeddings": False, "num_key_value_heads": 2}, GPT2])
def test_planned_weights_and_moments_are_exact(shape) -> None:
    model, batch = make(**shape)
    counts = weight_counts(model.config)
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters())
    for optim in ("adamw", "muon", "adamw_8bit", "lion", "sgd", "adafactor"):
        config = dataclasses.replace(TRAIN, optim=optim, max_steps=2)
        trainer = Trainer(model, causal_lm, lambda step: [batch], config, 2)
        trainer.step()
        states = [s for o in trainer.optimizers for p in o.state.values() for s in p.values() if torch.is_tensor(s)]
        kept = sum(s.nbytes for s in states if s.numel() > 1)
        planned = optimizer_bytes(planned_run(model.config, config, torch.float32, CPU))
        assert planned == pytest.approx(kept, rel=0.02 if optim == "adamw_8bit" else 1e-9)


def test_the_plan_knows_what_needs_less() -> None:
    run = Run(dataclasses.replace(SHAPE, num_hidden_layers=24).derived(), TRAIN)
    peak = predict(run).peak
    less = dataclasses.replace(run, train=dataclasses.replace(TRAIN, gradient_checkpointing=True))
    assert predict(less).peak < 0.5 * peak
    found = needing_less(run, 0.6 * peak)
    assert {options.split()[0] for options, _ in found} >= {
        "--train.per_device_train_batch_size", "--train.gradient_checkpointing", "--precision"
    }  # fmt: skip
    assert all(needed < peak for _, needed in found)
    fits = [needed <= 0.6 * peak for _, needed in found]
    assert fits == sorted(fits, reverse=True)
    assert fits[0]
    assert "Predicted to fit: " in advice(run, 0.6 * peak)
    assert "Nothing would fit" in advice(run, 1.0)
    assert "does NOT fit" in page(run, 0.6 * peak)
    assert "It fits" in page(run, 2 * peak)
    assert warning(run, 2 * peak) is None
    assert "gradient_checkpointing" in (warning(run, 0.6 * peak) or "")


def gradients(model: Decoder, batch: Batch) -> dict[str, Tensor]:
    torch.manual_seed(3)
    model.zero_grad()
    causal_lm(model, batch).sum.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        (torch.float32, {"dropout": 0.2}),
        (torch.float32, {"qk_norm": True}),
        (torch.bfloat16, {}),
        (torch.float32, GPT2),
    ],
)
def test_checkpointing_changes_no_bit_of_a_gradient(dtype, shape, offload) -> None:
    model, batch = make(dtype, **shape)
    names = list(model.state_dict())
    plain, kept = gradients(model, batch), saved_bytes(model, batch)
    assert checkpoint_blocks(model, offload) is model
    assert list(model.state_dict()) == names
    again = gradients(model, batch)
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    assert saved_bytes(model, batch) < 0.5 * kept
    model.eval()
    with torch.no_grad():
        assert model(batch.ids_BT).shape == (ROWS, LENGTH, 64)


def test_running_out_of_memory_names_what_would_fit() -> None:
    run = Run(SHAPE.derived(), TRAIN)
    free = 0.9 * predict(run).peak
    with pytest.raises(UserError, match=r"out of memory.*--train\.\w+"), memory_explained(run, free):
        torch.empty(1 << 60, dtype=torch.uint8)  # the real error of the CPU's allocator
    with pytest.raises(UserError, match="out of memory"), memory_explained(run, free):
        raise MemoryError
    with pytest.raises(UserError, match="out of memory"), memory_explained(run, free):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(RuntimeError, match="another"), memory_explained(run, free):
        raise RuntimeError("another")


def test_offload_needs_checkpointing() -> None:
    with pytest.raises(UserError, match="set both"):
        TrainConfig(activation_offload=True)


def test_plan_memory_on_the_command_line(capsys) -> None:
    assert main(["plan", "memory", "--precision", "fp32", "--train.max_length", "128"]) == 0
    shown = capsys.readouterr().out
    assert "attention weights" in shown
    assert "128 tokens" in shown
    assert main(["plan", "memory", "--tokenizer.kind", "char"]) == 2
    assert "--model.vocab_size" in capsys.readouterr().err
    assert main(["plan", "memory", "--train.max_lenght", "128"]) == 2
    with pytest.raises(SystemExit):
        main(["plan", "memory", "--help"])
    assert "gradient_checkpointing" in capsys.readouterr().out


def test_sizes_are_shown_in_units() -> None:
    assert [human_bytes(n) for n in (2048, 1.5 * 2**20, 812 * 2**20, 5.25 * 2**30)] == [
        "2 KiB", "1.5 MiB", "812 MiB", "5.2 GiB"
    ]  # fmt: skip
