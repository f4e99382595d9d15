"""What each small verb of the command line can be told. Runs that train have theirs in config.py or beside them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from zero2hero.config import PRECISIONS, TOKENIZER_KINDS, PretrainConfig, at_least, below, one_of
from zero2hero.errors import UserError


@dataclass(frozen=True)
class PlanLearningRateConfig(PretrainConfig):
    """`zero2hero plan lr`: the options of the run that is planned, and how to try learning rates."""

    min_learning_rate: float = 1e-5  # where the trial begins
    max_learning_rate: float = 1.0  # where it ends, unless the loss explodes before
    steps: int = 100  # of the trial
    plot: str = "learning_rate.png"  # where the curve is drawn

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 10, "steps")
        if not 0 < self.min_learning_rate < self.max_learning_rate < math.inf:
            raise UserError("min_learning_rate must be above 0 and below max_learning_rate")
        if self.train.learning_rate == 0:
            raise UserError("train.learning_rate 0 trains nothing, so there is nothing to plan")


@dataclass(frozen=True)
class QuickstartConfig:
    """`zero2hero quickstart`: the whole road in minutes, on built-in text."""

    output_dir: str = "runs/quickstart"
    stories: int = 60_000  # built-in stories to learn from
    steps: int = 1120  # optimizer steps of pretraining
    chat_steps: int = 900  # of instruction tuning
    align: bool = False  # then learn what raters like (DPO), and practise sums (GRPO)
    taste_steps: int = 100  # of preference optimization
    practice_steps: int = 40  # of reinforcement learning
    seed: int = 0
    precision: str = "auto"
    device: str = "auto"
    force: bool = False  # train anew although output_dir already holds a finished run

    def __post_init__(self) -> None:
        at_least(self, 1, "steps", "chat_steps", "taste_steps", "practice_steps")
        at_least(self, 100, "stories")
        one_of(self, "precision", PRECISIONS)


@dataclass(frozen=True)
class GenerateConfig:
    """`zero2hero generate MODEL PROMPT`."""

    model: str  # a run, a Hugging Face directory, or a hub id
    prompt: str = ""  # the text to continue; empty begins a new one
    max_new_tokens: int = 200
    temperature: float = 0.8  # 0 always takes the likeliest token
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: list[str] = field(default_factory=list)  # end when one of these is written
    num_return_sequences: int = 1
    seed: int = 0
    device: str = "auto"
    dtype: str | None = None  # fp32 or bf16; as stored by default
    load_in_8bit: bool = False  # the layers' matrices in int8, which a CPU reads fastest; the rest in dtype
    load_in_4bit: bool = False  # or in NF4, which needs least memory


@dataclass(frozen=True)
class ChatConfig:
    """`zero2hero chat MODEL`."""

    model: str  # a run, a Hugging Face directory, or a hub id, with a chat template
    system: str = ""  # the system's message
    adapter: str | None = None  # the folder of an adapter that the model wears
    max_new_tokens: int = 512
    temperature: float = 0.8  # 0 always takes the likeliest token
    top_k: int = 0  # 0: off
    top_p: float = 0.95
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None  # the same seed gives the same answers; by default new ones each time
    device: str = "auto"
    dtype: str | None = None  # fp32 or bf16; as stored by default
    load_in_8bit: bool = False  # the layers' matrices in int8, which a CPU reads fastest; the rest in dtype
    load_in_4bit: bool = False  # or in NF4, which needs least memory


@dataclass(frozen=True)
class ConvertConfig:
    """`zero2hero convert IN OUT`."""

    source: str  # a folder with pytorch_model.bin, or a llama2.c file
    output_dir: str  # the folder to write


@dataclass(frozen=True)
class MergeConfig:
    """`zero2hero merge ADAPTER`."""

    adapter: str  # a folder or hub id with adapter_config.json, as PEFT writes it
    output_dir: str  # the folder to write the merged model into
    base_model: str | None = None  # what to merge into; by default the base that the adapter names
    dtype: str | None = None  # fp32 or bf16; as the base is stored by default


@dataclass(frozen=True)
class RunPipelineConfig:
    """`zero2hero run-pipeline TASK TEXT`."""

    task: str  # fill-mask, ner, text-generation, ...: an unknown one lists them
    model: str  # a run, a Hugging Face directory, or a hub id
    text: str = ""  # the input; where a task takes an object, JSON such as '{"question": "...", "context": "..."}'
    file: str | None = None  # inputs instead, one a line, in a .jsonl file as JSON; the results are JSON lines
    settings: dict[str, Any] = field(default_factory=dict)  # of the task, such as '{top_k: 3}'
    batch_size: int = 8
    device: str = "auto"
    dtype: str | None = None  # fp32 or bf16; as stored by default

    def __post_init__(self) -> None:
        if bool(self.text) == bool(self.file):
            raise UserError("give a text, or --file with a text on each line")


@dataclass(frozen=True)
class ServeConfig:
    """`zero2hero serve MODEL`."""

    model: str  # a run, a Hugging Face directory, or a hub id
    host: str = "127.0.0.1"  # any other address, such as 0.0.0.0, demands a key
    port: int = 8000
    api_key: str | None = None  # made and printed where one is needed; better given as ZERO2HERO_API_KEY
    served_model_name: str | None = None  # what clients call it; the folder's name by default
    adapters: dict[str, str] = field(default_factory=dict)
    """Adapters of the model, each with the name by which clients ask for it: '{chat: runs/quickstart_chat}'."""
    max_batch_size: int = 16  # texts written at a time
    max_waiting: int = 64  # texts that wait; further ones are told to come back
    metrics: bool = False  # counts in Prometheus' format at /metrics
    device: str = "auto"
    dtype: str | None = None  # fp32 or bf16; as stored by default
    load_in_8bit: bool = False  # the layers' matrices in int8, which a CPU reads fastest; the rest in dtype
    load_in_4bit: bool = False  # or in NF4, which needs least memory

    def __post_init__(self) -> None:
        at_least(self, 0, "port")
        below(self, 65536, "port")
        at_least(self, 1, "max_batch_size", "max_waiting")


@dataclass(frozen=True)
class DataInspectConfig:
    """`zero2hero data inspect FILE`."""

    data: str | list[str]  # files, folders or hub data sets
    model: str | None = None  # whose tokenizer and chat template to use; without it, a tokenizer trained on the data
    chat_template: str | None = None  # a built-in one by name, or a .jinja file; the model's own by default
    max_length: int = 1024  # of the training that is planned, in tokens
    samples: int = 3  # records to show
    split: str = "train"  # of a hub data set

    def __post_init__(self) -> None:
        at_least(self, 2, "max_length")
        at_least(self, 0, "samples")


@dataclass(frozen=True)
class TokenizerTrainConfig:
    """`zero2hero tokenizer train`."""

    data: str | list[str] = "stories"
    output_dir: str = "runs/tokenizer"
    vocab_size: int = 4096
    kind: str = "bpe"  # bpe, char, wordpiece (BERT's), unigram (T5's)
    pattern: str = "llama3"  # llama3, gpt2, qwen2
    text_column: str | None = None
    on_bad_record: str = "raise"

    def __post_init__(self) -> None:
        one_of(self, "kind", TOKENIZER_KINDS)


@dataclass(frozen=True)
class TokenizerEncodeConfig:
    """`zero2hero tokenizer encode TOKENIZER TEXT`."""

    tokenizer: str  # a directory or a hub id
    text: str
