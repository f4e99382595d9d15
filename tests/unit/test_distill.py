"""A student comes nearer to its teacher, on the teacher's texts and on its own; strange teachers are refused."""

from __future__ import annotations

import pytest

from zero2hero.align.distill import distill
from zero2hero.alignment_configs import DistillConfig
from zero2hero.config import DecoderConfig, from_dict
from zero2hero.errors import UserError
from zero2hero.language_model import LanguageModel, save
from zero2hero.models import Decoder, init_weights
from zero2hero.tokenizer import Tokenizer
from zero2hero.train.tracking import read_metrics

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = ["What is 1 + 2? It is 3.", "Who is it? A fox."]


def saved(folder, width: int, seed: int, texts=TEXTS):
    tokenizer = Tokenizer.train(texts, vocab_size=280)
    model = Decoder(DecoderConfig(vocab_size=tokenizer.vocab_size, hidden_size=width, num_hidden_layers=1,
                                  num_attention_heads=2, max_position_embeddings=64, initializer_range=0.3,
                                  eos_token_id=tokenizer.eos_token_id))  # fmt: skip
    init_weights(model, seed)
    save(LanguageModel(model, tokenizer), folder)
    return str(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    data = folder / "data.jsonl"
    data.write_text("\n".join(f'{{"prompt": "What is {i}?", "completion": " It is {i}."}}' for i in range(40)))
    return saved(folder / "small", 16, 1), saved(folder / "large", 32, 2), str(data)


@pytest.mark.parametrize(
    ("method", "beta", "lmbda", "factor"),
    [("full", 0.0, 0.0, 0.8), ("full", 1.0, 0.5, 0.8), ("lora", 0.5, 1.0, 0.999)],
)
def test_a_student_comes_nearer(models, tmp_path, method, beta, lmbda, factor):
    student, teacher, data = models
    lm = distill(from_dict(DistillConfig, {
        "model": student, "teacher": teacher, "data": data, "output_dir": str(tmp_path / "run"), "method": method,
        "beta": beta, "lmbda": lmbda, "max_completion_length": 8, "precision": "fp32", "report_to": [],
        "validation_fraction": 0.2, "lora": {"r": 8, "lora_alpha": 16},
        "train": {"max_steps": 30, "learning_rate": 1e-2, "per_device_train_batch_size": 4, "max_length": 64,
                  "eval_steps": 30, "warmup_steps": 0},
    }))  # fmt: skip
    losses = [row["eval_loss"] for row in read_metrics(tmp_path / "run") if "eval_loss" in row]
    assert losses[-1] < factor * losses[0]
    assert lm.generate("What is 3?", max_new_tokens=4)


def test_another_tokenizer_is_refused(models, tmp_path):
    student, _, data = models
    other = saved(tmp_path / "other", 16, 0, ["entirely different words, and many of them: zebra, quagga"])
    config = DistillConfig(model=student, teacher=other, data=data, output_dir=str(tmp_path / "run"))
    with pytest.raises(UserError, match=r"must share their tokenizer, and '.*' is token \d+ of the student"):
        distill(config)


@pytest.mark.parametrize("wrong", [{"beta": 2.0}, {"lmbda": -0.1}, {"temperature": 0.0}, {"teacher": ""}])
def test_bad_settings(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        DistillConfig(**{"model": "x", "teacher": "y"} | wrong)
