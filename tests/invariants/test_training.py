"""Invariants 1, 10 and 14: micro-batches do not change a step, a stopped run goes on bit for bit, seeds decide all."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from zero2hero.config import DecoderConfig, PretrainConfig, TokenizerConfig, TrainConfig
from zero2hero.data.cache import Corpus
from zero2hero.data.worlds import world
from zero2hero.errors import UserError
from zero2hero.machine import Machine
from zero2hero.models import Decoder, init_weights
from zero2hero.tokenizer import Tokenizer
from zero2hero.train import checkpoint
from zero2hero.train.checkpoint import LATEST, folder_of, newest_checkpoint, remove_old, verify
from zero2hero.train.loop import Stopped, Trainer
from zero2hero.train.objectives import Loss, causal_lm
from zero2hero.train.precision import MasterWeights
from zero2hero.train.pretrain import causal_data, evaluation, pretrain

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
SHAPE = DecoderConfig(
    vocab_size=29, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, dropout=0.1
)
LEARN: dict[str, Any] = {"learning_rate": 0.02, "logging_steps": 1, "max_length": 16, "per_device_train_batch_size": 4}


def ragged_corpus(documents: int = 60) -> Corpus:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 30, documents)
    ends = np.cumsum(lengths)
    return Corpus(rng.integers(0, 29, ends[-1]).astype(np.uint16), np.stack([ends - lengths, ends], 1))


def randomized(model: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(1.0 if p.dim() == 1 else 0.0, 0.3, generator=generator)
    return model


class Record:
    """Stands where a tracker does and keeps what it is told."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict]] = []

    def log(self, step: int, metrics) -> None:
        self.rows.append((step, dict(metrics)))

    def rewind(self, step: int) -> None:
        self.rows = [row for row in self.rows if row[0] <= step]

    def state_dict(self) -> dict:
        return {}

    @property
    def losses(self) -> dict[int, float]:
        return {step: row["loss"] for step, row in self.rows if "loss" in row}


def make(output_dir: Path | None = None, *, steps: int = 12, model_seed: int = 0, dtype=torch.float32, data=None,
         evaluate=None, sample=None, objective=causal_lm, **settings) -> Any:  # fmt: skip
    config = TrainConfig(**LEARN | {"max_steps": steps} | settings)
    model = Decoder(SHAPE)
    init_weights(model, model_seed)
    total, batches = causal_data(ragged_corpus(), config, CPU)
    return Trainer(
        model, objective, data or batches, config, total, output_dir, dtype=dtype, evaluate=evaluate, sample=sample,
        tracker=Record(),  # type: ignore[arg-type]
    )  # fmt: skip


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.masters.parameters.items()}


def kept(output_dir: Path) -> list[str]:
    return sorted(path.name for path in (output_dir / "checkpoints").iterdir() if path.name != LATEST)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def moments(trainer: Trainer) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    checkpoint._take_out(
        [list(optimizer.state_dict()["state"].values()) for optimizer in trainer.optimizers], "", tensors
    )
    return tensors


# --- 1: micro-batches ---------------------------------------------------------------------------------------


def gradients(batch_size: int, accumulation: int, dtype=torch.float32, max_grad_norm: float = 0.0):
    settings: dict[str, Any] = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    trainer = make(dtype=dtype, max_grad_norm=max_grad_norm, **settings)
    randomized(trainer.model).eval()
    trainer.model.train = lambda mode=True: trainer.model  # no dropout: its pattern depends on the batch's shape
    trainer.optimizers = []
    counts = [int((batch.targets_BT >= 0).sum()) for batch in trainer.data(0)]
    trainer.step()
    trainer._log()
    found = {name: p.grad.clone() for name, p in trainer.masters.parameters.items()}
    return found, counts, trainer.metrics["loss"], trainer.metrics["grad_norm"]


def test_the_data_are_ragged_enough_to_tell():
    _, counts, *_ = gradients(1, 8)
    assert len(set(counts)) > 2  # a mean of means would be another number
    assert len({batch.document_ids_BT is None for batch in make().data(0)}) == 1


@pytest.mark.parametrize(("batch_size", "accumulation"), [(4, 2), (2, 4), (1, 8)])
@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_micro_batches_do_not_change_the_step(batch_size, accumulation, clip):
    whole, counts, loss, norm = gradients(8, 1, max_grad_norm=clip)
    parts, each, loss_of_parts, norm_of_parts = gradients(batch_size, accumulation, max_grad_norm=clip)
    assert sum(each) == sum(counts)
    assert loss_of_parts == pytest.approx(loss, rel=1e-6)
    assert norm_of_parts == pytest.approx(norm, rel=1e-5)
    for name, gradient in whole.items():
        assert (gradient - parts[name]).abs().max() < 1e-6, name


def test_the_gradient_is_that_of_the_mean_over_all_targets():
    found, counts, loss, _ = gradients(4, 2)
    trainer = make(per_device_train_batch_size=8)
    model = randomized(trainer.model).eval()
    batch = trainer.data(0)[0]
    logits = model.logits(model(batch.ids_BT, positions=batch.positions_BT, document_ids=batch.document_ids_BT))
    mean = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets_BT.flatten())
    mean.backward()
    assert loss == pytest.approx(float(mean.detach()), rel=1e-5)
    for name, p in model.named_parameters():
        assert (p.grad - found[name]).abs().max() < 1e-6, name


def test_a_step_with_nothing_to_learn_says_so():
    trainer = make()
    (batch,) = trainer.data(0)
    batch.targets_BT.fill_(-100)
    trainer.data = lambda step: [batch]
    with pytest.raises(UserError, match="no token of the batch has a target"):
        trainer.step()


# --- 14: seeds ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optim", ["muon", "adamw"])
def test_the_same_seed_gives_the_same_bits(optim):
    runs = []
    for seed in (3, 3, 4):
        torch.rand(17)  # what else happened in the process does not matter: dropout has the run's seed too
        trainer = make(optim=optim, seed=seed)
        trainer.train()
        runs.append((weights(trainer), trainer.tracker.losses))
    assert same(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]
    assert not same(runs[0][0], runs[2][0])


def test_looking_on_does_not_change_the_run():
    """Evaluation and samples may draw random numbers."""
    silent = make()
    silent.train()
    watched = make(
        evaluate=lambda: {"eval_loss": float(torch.rand(()))}, sample=lambda step: torch.rand(3), eval_steps=3
    )
    watched.train()
    assert same(weights(silent), weights(watched))


# --- 10: stop and resume ------------------------------------------------------------------------------------


def interrupted(output_dir: Path, at: int, number=signal.SIGINT, **settings) -> Any:
    """A run that gets a signal while it gathers step `at`."""
    trainer = make(output_dir, **settings)
    data = trainer.data

    def with_signal(step):
        if step == at:
            os.kill(os.getpid(), number)
        return data(step)

    trainer.data = with_signal
    with pytest.raises(Stopped) as stopped:
        trainer.train()
    assert stopped.value.signal_number == number
    assert trainer.state.step == at + 1  # the step was finished
    return trainer


@pytest.mark.parametrize("optim", ["muon", "adamw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, optim, dtype, request):
    if dtype == torch.bfloat16:
        request.getfixturevalue("bf16")
    evaluations: dict[str, Any] = {
        "evaluate": lambda: {"eval_loss": float(torch.rand(()))},
        "eval_steps": 5,
        "save_steps": 100,
    }
    settings = {"optim": optim, "dtype": dtype, "gradient_accumulation_steps": 2, **evaluations}
    straight = make(tmp_path / "straight", **settings)
    straight.train()

    handler = signal.getsignal(signal.SIGINT)
    first = interrupted(tmp_path / "stopped", 4, **settings)
    assert signal.getsignal(signal.SIGINT) is handler
    interrupted_again = make(tmp_path / "stopped", model_seed=5, **settings)  # its first weights must not matter
    torch.rand(100)
    assert interrupted_again.resume() == 5
    interrupted_again.train()

    assert same(weights(straight), weights(interrupted_again))
    assert same(moments(straight), moments(interrupted_again))
    assert straight.state == interrupted_again.state
    assert first.tracker.losses | interrupted_again.tracker.losses == straight.tracker.losses
    names = FILES[:-1]
    folders = [folder_of(tmp_path / run, 12) for run in ("straight", "stopped")]
    assert all((folders[0] / name).read_bytes() == (folders[1] / name).read_bytes() for name in names)


def test_sigterm_saves_as_well(tmp_path):
    interrupted(tmp_path, 2, signal.SIGTERM)
    assert verify(folder_of(tmp_path, 3)) is None


def test_asked_twice_it_stops_at_once(tmp_path):
    trainer = make(tmp_path)
    trainer._stop(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        trainer._stop(signal.SIGINT, None)


def test_nothing_to_resume_begins_at_zero(tmp_path):
    assert make(tmp_path).resume() == 0


FILES = ["model.safetensors", "optimizer.safetensors", "optimizer.json", "state.safetensors", "state.json",
         "MANIFEST.json"]  # fmt: skip


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_checkpoint_is_passed_over_aloud(tmp_path, capsys, file, damage):
    trainer = make(tmp_path, save_steps=4)
    trainer.train()
    expected = weights(trainer)
    path = folder_of(tmp_path, 12) / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x40
    {"flip": lambda: path.write_bytes(content), "cut": lambda: path.write_bytes(content[:-1]), "remove": path.unlink}[
        damage
    ]()
    again = make(tmp_path, save_steps=4, model_seed=9)
    assert again.resume() == 8
    warning = capsys.readouterr().err
    assert "step-000012 is damaged" in warning
    assert "falling back" in warning
    again.train()
    assert same(weights(again), expected)
    assert newest_checkpoint(tmp_path) == folder_of(tmp_path, 12)


def test_what_a_killed_process_leaves_is_not_taken(tmp_path):
    """A save that was cut off has left a folder with a temporary name."""
    trainer = make(tmp_path, save_steps=4)
    trainer.train()
    whole = folder_of(tmp_path, 12)
    shutil.copytree(whole, whole.parent / ".step-000016.abcdef")
    (whole.parent / ".step-000016.abcdef" / "MANIFEST.json").unlink()
    assert newest_checkpoint(tmp_path) == whole


@pytest.mark.parametrize("keep_last", [1, 2])
def test_a_damaged_checkpoint_does_not_push_out_whole_ones(tmp_path, keep_last):
    make(tmp_path, save_steps=6, keep_last=2).train()
    for file in FILES:
        (folder_of(tmp_path, 12) / file).write_bytes(b"")
    again = make(tmp_path, save_steps=3, keep_last=keep_last)
    assert again.resume() == 6
    while again.state.step < 9:
        again.step()
    again.save()
    assert newest_checkpoint(tmp_path) == folder_of(tmp_path, 9)


def test_old_checkpoints_go_and_the_newest_stay(tmp_path):
    make(tmp_path, save_steps=2, keep_last=3).train()
    assert kept(tmp_path) == ["step-000008", "step-000010", "step-000012"]
    assert (tmp_path / "checkpoints" / LATEST).read_text() == "step-000012\n"
    for step in (999_999, 1_000_000):
        shutil.copytree(folder_of(tmp_path, 12), folder_of(tmp_path, step))
    assert newest_checkpoint(tmp_path) == folder_of(tmp_path, 1_000_000)
    remove_old(tmp_path, 1_000_000, 1)
    assert kept(tmp_path) == ["step-1000000"]


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    trainer = make(tmp_path)
    trainer.step()
    trainer.save()
    original = checkpoint.save_file

    def full(tensors, path, **options):
        if Path(path).name == "optimizer.safetensors":
            raise OSError(28, "No space left on device")
        original(tensors, path, **options)

    monkeypatch.setattr(checkpoint, "save_file", full)
    trainer.step()
    with pytest.raises(UserError, match="No space left"):
        trainer.save()
    assert kept(tmp_path) == ["step-000001"]
    assert verify(folder_of(tmp_path, 1)) is None


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    make(tmp_path, steps=1).train()
    other = Decoder(DecoderConfig(vocab_size=29, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(UserError, match="holds another model"):
        Trainer(other, causal_lm, lambda step: [], TrainConfig(**LEARN | {"max_steps": 1}), 3, tmp_path).resume()


# --- evaluation, early stopping, accidents ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_early_stopping_restores_the_best_weights(tmp_path, dtype, request):
    if dtype == torch.bfloat16:
        request.getfixturevalue("bf16")
    losses = [3.0, 2.0, 2.5, 1.5, 1.6, 1.5, 1.7, 0.1]
    seen: list[dict[str, Tensor]] = []

    def evaluate():
        assert not trainer.model.training
        assert not torch.is_grad_enabled()
        seen.append(weights(trainer))
        return {"eval_loss": losses[len(seen) - 1]}

    settings: dict[str, Any] = {"eval_steps": 1, "early_stopping_patience": 3, "dtype": dtype}
    trainer = make(tmp_path, evaluate=evaluate, **settings)
    metrics = trainer.train()
    assert trainer.state.step == len(seen) == 7  # 1.6, 1.5 again, 1.7: three without a gain
    assert (trainer.state.best_step, metrics["eval_loss"]) == (4, 1.5)
    assert same(weights(trainer), seen[3])
    for name, p in trainer.model.named_parameters():
        assert torch.equal(p.detach(), seen[3][name].to(dtype))

    def never():
        raise AssertionError("a run that has ended is not trained further")

    again = make(tmp_path, evaluate=never, model_seed=5, **settings)
    assert again.resume() == 7
    again.train()
    assert same(weights(again), seen[3])


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_stops_before_it_does_harm(tmp_path, value, where):
    def objective(model, batch) -> Loss:
        loss = causal_lm(model, batch)
        if trainer.state.step == 5:
            if where == "loss":
                loss.sum = loss.sum * value
            else:
                loss.sum.register_hook(lambda grad: grad * value)
        return loss

    trainer = make(tmp_path, objective=objective, save_steps=2)
    with pytest.raises(UserError, match=r"step 6: .*nothing was updated.*step-000004 is intact.*learning_rate"):
        trainer.train()
    assert all(torch.isfinite(p).all() for p in trainer.masters.parameters.values())
    assert newest_checkpoint(tmp_path) == folder_of(tmp_path, 4)
    assert make(tmp_path).resume() == 4


# --- precision ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("bf16")
def test_bf16_training_has_fp32_masters_and_learns():
    trainer = make(dtype=torch.bfloat16, steps=60, gradient_accumulation_steps=2)
    batches = trainer.data(0)
    trainer.data = lambda step: batches  # again and again, to learn them by heart
    assert {p.dtype for p in trainer.model.parameters()} == {torch.bfloat16}
    trainer.train()
    losses = trainer.tracker.losses
    assert losses[60] < 0.6 * losses[1]
    for name, p in trainer.model.named_parameters():
        master = trainer.masters.parameters[name]
        assert master.dtype == torch.float32
        assert torch.equal(p.detach(), master.bfloat16())
        assert not torch.equal(master, master.bfloat16().float())  # it holds more than bf16 could
    assert all(t.dtype == torch.float32 for t in moments(trainer).values())
    assert trainer.model.lm_head.weight is trainer.model.embed_tokens.weight


@pytest.mark.usefixtures("bf16")
def test_small_updates_add_up_in_the_masters():
    """At 1/10,000 of the weight, ten updates are below what bf16 can hold; a hundred are not."""
    parameter = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(parameter.weight)
    masters = MasterWeights(parameter, torch.bfloat16)
    optimizer = torch.optim.SGD(masters.parameters.values(), lr=1e-4)
    for step in range(100):
        masters.zero_grad()
        parameter(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
        optimizer.step()
        masters.publish()
        if step == 9:
            assert float(parameter.weight.detach()) == 1.0
    assert float(masters.parameters["weight"]) == pytest.approx(0.99, abs=1e-5)
    assert float(parameter.weight.detach()) == pytest.approx(0.99, abs=0.004)


@pytest.mark.usefixtures("bf16")
def test_bf16_gradients_are_near_those_of_fp32():
    exact, _, loss, _ = gradients(4, 2)
    near, _, near_loss, _ = gradients(4, 2, dtype=torch.bfloat16)
    assert near_loss == pytest.approx(loss, rel=0.02)
    for name, gradient in exact.items():
        assert near[name].dtype == torch.float32
        assert (near[name] - gradient).norm() < 0.2 * gradient.norm(), name


# --- what it is all for -------------------------------------------------------------------------------------


def test_a_markov_chain_is_learned_down_to_its_entropy():
    """No model can be below the floor, and this one should be at it: too high, or too low, and something is wrong."""
    chain: Any = world("markov")
    documents = list(chain.documents("train", 2000))
    held_out = list(chain.documents("validation", 500))
    tokenizer = Tokenizer.train(documents[:50], kind="char", vocab_size=64)

    def corpus(texts: list[str]) -> Corpus:
        rows = [
            [tokenizer.bos_token_id, *ids] for ids in tokenizer.encode_batch(texts, add_special_tokens=False)
        ]  # fmt: skip
        ends = np.cumsum([len(row) for row in rows])
        spans = np.stack([ends - [len(row) for row in rows], ends], 1)
        return Corpus(np.fromiter(itertools.chain(*rows), dtype=np.uint16), spans)

    config = TrainConfig(max_steps=300, per_device_train_batch_size=16, max_length=64, learning_rate=0.01)
    model = Decoder(
        DecoderConfig(vocab_size=tokenizer.vocab_size, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    )
    init_weights(model)
    total, data = causal_data(corpus(documents), config, CPU)
    evaluate = evaluation(model, corpus(held_out), config, CPU, tokenizer)
    loss = Trainer(model, causal_lm, data, config, total, evaluate=evaluate).train()["eval_loss"]
    assert abs(loss - chain.floor()) < 0.02
    exact = -sum(chain.logprob(text) for text in held_out) / len(held_out) / 64  # of these very documents
    assert 0 < loss - exact < 0.015


def run_config(folder: Path, name: str, **changes) -> PretrainConfig:
    """A tiny pretraining run on a text file; `train` in `changes` adds to the settings of the loop."""
    loop: dict[str, Any] = {"max_steps": 8, "max_length": 32, "per_device_train_batch_size": 2, "sample_steps": 100}
    loop |= changes.pop("train", {})
    settings: dict[str, Any] = {
        "data": str(folder / "text.txt"), "output_dir": str(folder / name), "precision": "fp32", "device": "cpu",
        "report_to": [], "tokenizer": TokenizerConfig(kind="char"), "train": TrainConfig(**loop),
        "model": DecoderConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, dropout=0.1),
    }  # fmt: skip
    return PretrainConfig(**settings | changes)


@pytest.fixture
def text(tmp_path, monkeypatch) -> Path:
    (tmp_path / "text.txt").write_text("\n\n".join(world("markov").documents(count=120)))
    # fp32 needs no measurement
    monkeypatch.setattr("zero2hero.machine.prepare", lambda: Machine("a processor", 1, 1e9, 0.0, "as is"))
    return tmp_path


WITH_EVERYTHING = {
    "optim": "adamw_8bit", "ema_decay": 0.8, "label_smoothing_factor": 0.1, "l1_penalty": 1e-3,
    "gradient_accumulation_steps": 2, "lr_scheduler_type": "inverse_sqrt",
}  # fmt: skip


@pytest.mark.parametrize(
    "more", [{}, {"length_schedule": [0.5]}, WITH_EVERYTHING], ids=["plain", "lengths", "everything"]
)
def test_pretrain_stopped_and_resumed_gives_the_same_file(text, monkeypatch, more):
    """The whole road, from text to model.safetensors, once straight and once with Ctrl-C on the way."""
    train = {"eval_steps": 3, "save_steps": 100} | more
    pretrain(run_config(text, "straight", train=train))
    step = Trainer.step

    def interrupt(trainer) -> None:
        step(trainer)
        if trainer.state.step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Trainer, "step", interrupt)
    with pytest.raises(Stopped):
        pretrain(run_config(text, "stopped", train=train))
    monkeypatch.setattr(Trainer, "step", step)
    with pytest.raises(UserError, match=r"validation_fraction: 0\.05 -> 0\.2"):
        pretrain(run_config(text, "stopped", train=train, resume=True, validation_fraction=0.2))
    pretrain(run_config(text, "stopped", train=train, resume=True))
    straight, stopped = (load_file(text / run / "model.safetensors") for run in ("straight", "stopped"))
    assert same(straight, stopped)
    states = [json.loads((folder_of(text / run, 8) / "state.json").read_text()) for run in ("straight", "stopped")]
    assert states[0] == states[1]
    with pytest.raises(UserError, match="already holds a run"):
        pretrain(run_config(text, "stopped", train=train))


def test_resuming_a_run_that_has_ended_spoils_nothing(text, monkeypatch):
    """Its best weights were not its last; they are the result again."""

    def farther_is_worse(model, *rest):
        first = model.embed_tokens.weight.detach().clone()
        return lambda: {"eval_loss": float((model.embed_tokens.weight - first).norm()), "eval_bits_per_byte": 0.0}

    monkeypatch.setattr("zero2hero.train.pretrain.evaluation", farther_is_worse)
    train = {"eval_steps": 1, "early_stopping_patience": 2}
    pretrain(run_config(text, "run", train=train))
    result = load_file(text / "run" / "model.safetensors")
    last = newest_checkpoint(text / "run")
    assert last == folder_of(text / "run", 3)
    embedding = load_file(last / "model.safetensors")["embed_tokens.weight"]
    assert not torch.equal(embedding, result["model.embed_tokens.weight"])
    pretrain(run_config(text, "run", train=train, resume=True))
    assert same(load_file(text / "run" / "model.safetensors"), result)
