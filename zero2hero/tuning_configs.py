"""What fine-tuning and alignment can be told. Like config.py, without torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from zero2hero.config import PRECISIONS, RunConfig, TrainConfig, at_least, one_of
from zero2hero.errors import UserError
from zero2hero.tune.config import LoraConfig

METHODS = ("lora", "qlora", "full")


def tuning_defaults() -> TrainConfig:
    """Settings of the loop that suit a model which knows something already."""
    return TrainConfig(
        optim="adamw", learning_rate=2e-4, weight_decay=0.0, adam_beta2=0.999, lr_scheduler_type="linear",
        warmup_steps=0.03, num_train_epochs=3.0, per_device_train_batch_size=8, max_length=1024,
    )  # fmt: skip


@dataclass(frozen=True)
class TuneConfig(RunConfig):
    """What all runs have that train a language model further, by demonstrations, preferences or rewards."""

    model: str = ""  # the model to tune: a run, a Hugging Face directory, or a hub id
    data: str | list[str] = ""  # records in any common form (`zero2hero data inspect` shows what is recognized)
    eval_data: str | list[str] = ""  # what to measure by; by default a part of data
    validation_fraction: float = 0.05  # of the records of data, kept out of training when there is no eval_data
    method: str = "lora"
    """lora: train an adapter; qlora: the same on a base in 4 bits, for large models; full: train every weight (a large
    model then wants a tenth of the learning rate)."""
    chat_template: str | None = None
    """chatml, llama3, gemma, ... or a .jinja file; by default the model's own, and ChatML for a model without one."""
    freeze: list[str] = field(default_factory=list)
    """Of method full, what stays as it is: beginnings of names, such as '[embed_tokens, layers.0]'."""
    on_bad_record: str = "raise"  # a record that cannot be used is an error (raise), or is left out (skip)
    lora: LoraConfig = field(default_factory=lambda: LoraConfig(r=16, lora_alpha=32, task_type="CAUSAL_LM"))

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "method", METHODS)
        one_of(self, "on_bad_record", ("raise", "skip"))
        if not self.model:
            raise UserError("say which model to tune: --model runs/quickstart, a Hugging Face directory, or a hub id")
        if not 0 < self.validation_fraction < 1:
            raise UserError(f"validation_fraction is a share of the records in (0, 1), not {self.validation_fraction}")
        if self.freeze and self.method != "full":
            raise UserError(f"freeze is for --method full: {self.method} trains the adapter alone")


@dataclass(frozen=True)
class SftConfig(TuneConfig):
    """`zero2hero sft`: a model and demonstrations in, a model that does the same out."""

    data: str | list[str] = "dialogues"
    """What to learn: conversations, prompts with completions, or texts, in any common form (`zero2hero data inspect`
    shows what is recognized); a file, a folder, a hub data set, or the built-in dialogues."""
    output_dir: str = "runs/sft"
    packing: bool = True  # several examples in a row, which do not see each other; false: one example a row
    assistant_only_loss: bool = True  # of conversations, learn the assistant's turns alone
    completion_only_loss: bool = True  # of completions, learn these and not their prompts
    retain_data: str = ""
    """Text such as the model was pretrained on: its loss, before and after, shows what is forgotten."""
    exact_match: int = 0  # so many held-out records are answered at each evaluation and compared with the data
    train: TrainConfig = field(default_factory=tuning_defaults)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.exact_match < 0:
            raise UserError(f"exact_match must be at least 0, not {self.exact_match}")


@dataclass(frozen=True)
class PlanFinetuneConfig:
    """`zero2hero plan finetune MODEL`."""

    model: str  # a folder with a config.json, or a hub id; no weights are needed
    data: str = "DATA.jsonl"  # for the command that is shown
    lora_r: int = 16  # rank of an adapter
    tokens_per_example: int = 0  # on average, for the time; 0: as many as fill a row
    precision: str = "auto"
    device: str = "auto"
    train: TrainConfig = field(default_factory=tuning_defaults)

    def __post_init__(self) -> None:
        at_least(self, 1, "lora_r")
        at_least(self, 0, "tokens_per_example")
        one_of(self, "precision", PRECISIONS)
