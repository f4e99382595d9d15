"""A run is a value: frozen dataclasses, made from YAML and the command line, saved as run.yaml beside the weights.

Field names are those that users of transformers, PEFT and TRL already know. What can be derived is derived; what
remains has a default that works on a laptop. This module imports no torch, so that `--help` is instant.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from typing import Any

from zero2hero.errors import UserError, did_you_mean

NO_OPTION = {"option": False}  # metadata of a field that the command line does not set
LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class MoEConfig:
    """A mixture of experts in place of each feed-forward (see nn/moe.py)."""

    num_experts: int = 0  # feed-forwards per layer; 0: one for all tokens
    num_experts_per_tok: int = 2  # of these, how many each token takes
    intermediate_size: int = 0  # width of an expert; 0: as of a feed-forward
    norm_topk_prob: bool = True  # the chosen experts' probabilities sum to one
    router_aux_loss_coef: float = 0.001  # share of the loss that spreads tokens over the experts, in training
    dense_layers: list[int] = field(default_factory=list)  # layers that keep a single feed-forward

    def __post_init__(self) -> None:
        at_least(self, 0, "num_experts", "intermediate_size", "router_aux_loss_coef")
        at_least(self, 1, "num_experts_per_tok")
        if self.num_experts and self.num_experts_per_tok > self.num_experts:
            raise UserError(
                f"num_experts_per_tok {self.num_experts_per_tok} is more than num_experts {self.num_experts}"
            )


@dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder. Names are those of Hugging Face configurations.

    0 derives: as many key/value heads as heads, head_dim = hidden_size / heads, and a feed-forward of 4 D (plain) or
    8/3 D rounded up to a multiple of 32 (gated; the same number of weights). `derived()` fills these in.
    """

    vocab_size: int = 0  # 0: the tokenizer's
    hidden_size: int = 192  # width of the residual stream
    num_hidden_layers: int = 4
    num_attention_heads: int = 6
    num_key_value_heads: int = 0  # fewer than heads: grouped-query attention
    head_dim: int = 0
    intermediate_size: int = 0  # width of the feed-forward
    max_position_embeddings: int = 256  # context, in tokens
    position: str = "rotary"  # rotary, learned, sinusoidal, none
    norm: str = "rmsnorm"  # rmsnorm, layernorm, rmsnorm_offset (Gemma's: scaled by 1 + weight)
    norm_eps: float = 1e-5
    feedforward: str = "swiglu"
    """Gated: swiglu, geglu; or the plain form's activation: relu2, gelu, gelu_new, quick_gelu, relu, silu."""
    qk_norm: bool = False  # normalize queries and keys (Qwen3)
    attention_bias: bool = False  # on q, k, v
    output_bias: bool = False  # on the attention's output projection
    mlp_bias: bool = False
    rope_theta: float = 10_000.0  # base of the rotary frequencies
    sliding_window: int | None = None  # tokens that a query looks back
    tie_word_embeddings: bool = True  # one matrix for embedding and head
    dropout: float = 0.0
    initializer_range: float = 0.02  # standard deviation of the first weights
    moe: MoEConfig = field(default_factory=MoEConfig)
    # Known only with a tokenizer or a file at hand; no options of a run.
    bos_token_id: int | None = field(default=None, metadata=NO_OPTION)
    eos_token_id: int | list[int] | None = field(default=None, metadata=NO_OPTION)
    pad_token_id: int | None = field(default=None, metadata=NO_OPTION)
    rope_scaling: dict[str, Any] | None = field(default=None, metadata=NO_OPTION)  # see nn/rope_scaling.py
    layer_types: list[str] | None = field(default=None, metadata=NO_OPTION)  # of each layer, where they differ
    task: str = field(default="causal_lm", metadata=NO_OPTION)  # or sequence_classification: a score for each label
    id2label: dict[int, str] = field(default_factory=dict, metadata=NO_OPTION)  # of sequence_classification
    model_type: str | None = field(default=None, metadata=NO_OPTION)  # the family that it was read from
    extra: dict[str, Any] = field(default_factory=dict, metadata=NO_OPTION)  # fields that change no mathematics

    def __post_init__(self) -> None:
        at_least(self, 1, "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
        at_least(self, 0, "vocab_size", "num_key_value_heads", "head_dim", "intermediate_size", "dropout", "norm_eps",
                  "rope_theta", "initializer_range")  # fmt: skip
        below(self, 1, "dropout")
        if self.sliding_window is not None:
            at_least(self, 1, "sliding_window")
        one_of(self, "position", ("rotary", "learned", "sinusoidal", "none"))
        one_of(self, "norm", ("rmsnorm", "layernorm", "rmsnorm_offset"))
        one_of(self, "task", ("causal_lm", "sequence_classification"))
        if (self.task == "sequence_classification") != (sorted(self.id2label) == list(range(len(self.id2label))) != []):
            raise UserError(f"a decoder that classifies, and no other, has labels numbered from 0, not {self.id2label}")
        one_of(self, "feedforward", ("swiglu", "geglu", "relu2", "gelu", "gelu_new", "quick_gelu", "relu", "silu"))
        if not self.head_dim and self.hidden_size % self.num_attention_heads:
            divisors = [n for n in range(1, self.hidden_size + 1) if self.hidden_size % n == 0]
            nearest = min(divisors, key=lambda n: abs(n - self.num_attention_heads))
            raise UserError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads "
                f"{self.num_attention_heads}: try num_attention_heads {nearest}, or set head_dim"
            )
        if self.num_key_value_heads and self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        kinds = self.layer_types
        if kinds is not None and (len(kinds) != self.num_hidden_layers or set(kinds) - set(LAYER_TYPES)):
            raise UserError(f"layer_types should hold {' or '.join(LAYER_TYPES)} for each of the layers, not {kinds}")
        head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        if self.position == "rotary" and head_dim % 2:
            raise UserError(f"rotary positions turn pairs of features: head_dim {head_dim} must be even")

    def derived(self) -> DecoderConfig:
        """The same configuration with nothing left at 0: what a model is built from."""
        inner = -(-8 * self.hidden_size // 96) * 32 if self.gated else 4 * self.hidden_size
        inner, moe = self.intermediate_size or inner, self.moe
        return dataclasses.replace(
            self,
            num_key_value_heads=self.num_key_value_heads or self.num_attention_heads,
            head_dim=self.head_dim or self.hidden_size // self.num_attention_heads,
            intermediate_size=inner,
            moe=dataclasses.replace(moe, intermediate_size=moe.intermediate_size or inner) if moe.num_experts else moe,
        )

    @property
    def gated(self) -> bool:
        """Whether the feed-forward has a gate: three matrices instead of two."""
        return self.feedforward in ("swiglu", "geglu")

    @property
    def windows(self) -> list[int | None]:
        """How many tokens back each layer's queries look; None: all the way."""
        kinds = self.layer_types or ["sliding_attention"] * self.num_hidden_layers
        return [self.sliding_window if kind == "sliding_attention" else None for kind in kinds]

    @property
    def num_matrix_parameters(self) -> int:
        """Weights that multiply each token, the head included: what a forward pass costs 2 FLOPs each for.

        Of a mixture of experts, those of the experts that a token takes.
        """
        attention = self.hidden_size * self.head_dim * 2 * (self.num_attention_heads + self.num_key_value_heads)
        per_unit = (3 if self.gated else 2) * self.hidden_size  # weights for each unit of a feed-forward's width
        moe, layers = self.moe, self.num_hidden_layers
        mixed = layers - len(moe.dense_layers) if moe.num_experts else 0
        experts = per_unit * moe.num_experts_per_tok * moe.intermediate_size + self.hidden_size * moe.num_experts
        feedforward = (layers - mixed) * per_unit * self.intermediate_size + mixed * experts
        return layers * attention + feedforward + (len(self.id2label) or self.vocab_size) * self.hidden_size

    def training_flops_per_token(self, length: int) -> float:
        """Forward and backward: 6 per matrix weight, and causal attention (Chowdhery et al. 2022, app. B).

        A causal query sees length / 2 keys on average; products and their two gradients cost 6 times
        2 * H * K * length / 2 a layer.
        """
        attention = 6 * self.num_hidden_layers * self.num_attention_heads * self.head_dim * length
        return 6.0 * self.num_matrix_parameters + attention


TOKENIZER_KINDS = ("bpe", "char", "wordpiece", "unigram")


@dataclass(frozen=True)
class TokenizerConfig:
    """How text becomes tokens."""

    kind: str = "bpe"  # bpe, char, wordpiece, unigram, or a directory or hub id whose tokenizer to use
    vocab_size: int = 4096  # at most, of a tokenizer trained on the run's own text
    pattern: str = "llama3"  # how text is split before merging: llama3, gpt2, qwen2


@dataclass(frozen=True)
class TrainConfig:
    """The training loop."""

    max_steps: int = 0  # optimizer steps; 0: as many as num_train_epochs needs
    num_train_epochs: float = 1.0
    per_device_train_batch_size: int = 16  # rows of max_length tokens
    gradient_accumulation_steps: int = 1
    """Micro-batches added up in a step. With 2 or more, gradient_noise_scale is logged, in tokens: while a step has far
    fewer, a batch twice as large needs nearly half the steps; when it has far more, nearly as many."""
    max_length: int = 256  # tokens per row
    length_schedule: list[float] = field(default_factory=list)
    """Start with short rows: [0.25, 0.25] trains the first 25 % of the steps at max_length / 4, the next 25 % at
    max_length / 2, with as many tokens per step."""
    optim: str = "muon"
    """muon (the matrices; AdamW for the rest), adamw, adamw_8bit (moments in 8 bits, but for embeddings;
    paged_adamw_8bit is another name of it: moments this small have no need to wait elsewhere), adam, sgd, lion (wants a
    third to a tenth of AdamW's learning_rate), adafactor (learning_rate is a share of weights' size)."""
    learning_rate: float = 6e-3
    embedding_lr_scale: float = 1.0  # embeddings (and a tied head) learn at learning_rate times this
    head_lr_scale: float = 0.5  # so does an untied head
    loraplus_lr_ratio: float = 1.0  # so does an adapter's B (LoRA+; 16 is a good try, with a lower learning_rate)
    weight_decay: float = 0.1
    """Of matrices, each step by learning_rate times this; for sgd and adam, an L2 penalty in the gradient instead."""
    l1_penalty: float = 0.0  # adds this times each matrix's signs to its gradient: many weights go to zero
    label_smoothing_factor: float = 0.0  # share of each target spread over the vocabulary; evaluation has none
    momentum: float = 0.95  # of muon and sgd
    nesterov: bool = True  # momentum of muon and sgd looks one step ahead
    adam_beta1: float = 0.9  # of adam, adamw and lion
    adam_beta2: float = 0.95
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0  # 0: no clipping
    lr_scheduler_type: str = "warmup_stable_decay"
    """constant, linear, cosine, polynomial, inverse_sqrt, warmup_stable_decay."""
    warmup_steps: float = 0.02  # steps, or a share of all steps when below 1
    decay_steps: float = 0.5  # of warmup_stable_decay: steps, or a share of all steps, of linear decay to zero
    power: float = 1.0  # of polynomial
    ema_decay: float = 0.0
    """Evaluate and keep the moving average of the weights over about 1 / (1 - ema_decay) steps; 0: the weights."""
    eval_steps: int = 0  # 0: ten times a run
    save_steps: int = 0  # 0: at each evaluation
    logging_steps: int = 10
    sample_steps: int = 0  # 0: at each evaluation
    early_stopping_patience: int = 0  # evaluations without a better loss before stopping; 0: never
    keep_last: int = 2  # newest checkpoints kept
    keep_best: int = 0  # beside those, checkpoints of lowest held-out loss kept; one is saved at each evaluation then
    on_bad_loss: str = "stop"
    """When the loss or its gradient is not finite: stop; skip the step's update; or rollback to the last checkpoint
    and go on behind the data that led there. Either is done a few times at most, and the batch is kept on record."""
    document_mask: bool = True  # packed documents do not see each other
    gradient_checkpointing: bool = False
    """Keep each block's input only and compute the block again on the way back: far less memory, a third slower."""
    activation_offload: bool = False  # those inputs wait in the CPU's memory; needs gradient_checkpointing and a GPU
    fsdp: bool = False  # of several ranks each keeps a part of every weight, gradient and moment
    tp_size: int = 1  # ranks that divide the heads and the feed-forward of each layer among them
    torch_compile: bool = False  # compile each block; a minute at first, for what a GPU then gains
    ddp_timeout: int = 1800  # seconds that a rank waits for the others before it gives up
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(
            self,
            1,
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "max_length",
            "logging_steps",
            "keep_last",
            "tp_size",
            "ddp_timeout",
        )
        at_least(self, 0, "max_steps", "eval_steps", "save_steps", "sample_steps", "early_stopping_patience",
                  "keep_best", "weight_decay", "max_grad_norm", "warmup_steps", "decay_steps", "learning_rate",
                  "num_train_epochs", "adam_beta1", "adam_beta2", "adam_epsilon", "embedding_lr_scale",
                  "head_lr_scale", "l1_penalty", "label_smoothing_factor", "momentum", "power",
                  "ema_decay", "loraplus_lr_ratio")  # fmt: skip
        below(self, 1, "adam_beta1", "adam_beta2", "label_smoothing_factor", "momentum", "ema_decay")
        if self.activation_offload and not self.gradient_checkpointing:
            raise UserError("train.activation_offload moves what train.gradient_checkpointing keeps: set both")
        if self.optim in ("paged_adamw_8bit", "adamw_bnb_8bit"):
            object.__setattr__(self, "optim", "adamw_8bit")
        one_of(self, "optim", OPTIMIZERS)
        one_of(self, "lr_scheduler_type", SCHEDULES)
        one_of(self, "on_bad_loss", ("stop", "skip", "rollback"))
        if self.max_steps == 0 and self.num_train_epochs <= 0:
            raise UserError("set train.max_steps, or train.num_train_epochs above 0")
        if any(not 0 < share < 1 for share in self.length_schedule) or sum(self.length_schedule) >= 1:
            raise UserError("train.length_schedule lists shares of the run, each in (0, 1), less than 1 in all")
        if self.max_length % 2 ** len(self.length_schedule):
            raise UserError(
                f"train.max_length {self.max_length} cannot be halved {len(self.length_schedule)} times, "
                "as train.length_schedule asks"
            )


OPTIMIZERS = ("muon", "adamw", "adamw_8bit", "adam", "sgd", "lion", "adafactor")
SCHEDULES = ("constant", "linear", "cosine", "polynomial", "inverse_sqrt", "warmup_stable_decay")
TRACKERS = ("tensorboard", "wandb", "trackio")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")


@dataclass(frozen=True)
class RunConfig:
    """What every run that trains has; see train/run.py."""

    output_dir: str = "runs/run"
    resume: bool = False  # go on from the last checkpoint in output_dir, with the settings that the run began with
    precision: str = "auto"
    """fp32; bf16 and fp16 (both with fp32 master weights, fp16 with a loss scale too); auto: bf16 where this machine is
    faster with it, else fp32."""
    device: str = "auto"  # cpu, cuda, mps
    report_to: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Where numbers go beside metrics.jsonl: tensorboard, wandb, trackio, as in '[tensorboard, wandb]'; [] for none."""
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        one_of(self, "precision", PRECISIONS)
        for name in self.report_to:
            if name not in TRACKERS:
                raise UserError(f"report_to knows {', '.join(TRACKERS)}, not {name!r}.{did_you_mean(name, TRACKERS)}")


@dataclass(frozen=True)
class PretrainConfig(RunConfig):
    """`zero2hero pretrain`: raw text in, a language model out."""

    data: str | list[str] = "stories"
    """Text to learn from: a .txt, .jsonl, .csv or .parquet file (also .gz), a folder, a hub data set, or the
    built-in stories, sums, pydoc; a list mixes several."""
    output_dir: str = "runs/pretrain"
    text_column: str | None = None  # of a table; found by itself when there is one candidate
    on_bad_record: str = "raise"  # a record that cannot be read is an error (raise), or is left out (skip)
    streaming: bool = False
    """Tokenize the text as it is read and store nothing: for text that fits neither the memory nor the disk twice.
    Needs train.max_steps."""
    validation_fraction: float = 0.05  # of the documents, kept out of training
    prompts: list[str] = field(default_factory=list)
    """Samples are written from these as training goes on; by default from held-out documents."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    model: DecoderConfig = field(default_factory=DecoderConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "on_bad_record", ("raise", "skip"))
        if not 0 < self.validation_fraction < 1:
            raise UserError(
                f"validation_fraction is a share of the documents in (0, 1), not {self.validation_fraction}"
            )
        if self.streaming and not self.train.max_steps:
            raise UserError("how long a stream is shows only at its end: with --streaming, set --train.max_steps")
        longest = self.model.max_position_embeddings
        if self.train.max_length > longest:
            object.__setattr__(
                self, "model", dataclasses.replace(self.model, max_position_embeddings=self.train.max_length)
            )


def at_least(config: Any, least: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not value >= least or math.isinf(value):
            raise UserError(f"{name} must be at least {least}, not {value}")


def below(config: Any, limit: float, *names: str) -> None:
    for name in names:
        if not getattr(config, name) < limit:
            raise UserError(f"{name} must be below {limit}, not {getattr(config, name)}")


def one_of(config: Any, name: str, known: tuple[str, ...]) -> None:
    value = getattr(config, name)
    if value not in known:
        raise UserError(f"{name} is one of {', '.join(known)}, not {value!r}.{did_you_mean(str(value), known)}")


def to_yaml(config: Any) -> str:
    """A configuration as YAML, to be read back by `--config`."""
    import yaml

    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def to_dict(config: Any) -> dict[str, Any]:
    """The options of a configuration, nested as its classes are."""
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.metadata != NO_OPTION}
    return {k: to_dict(v) if dataclasses.is_dataclass(v) else v for k, v in values.items()}


def from_dict(kind: Any, values: dict[str, Any]) -> Any:
    """A configuration of class `kind`; what `values` leaves out, at any depth, has the default that `kind` gives it."""
    nested = {f.name: default_of(f) for f in dataclasses.fields(kind) if isinstance(values.get(f.name), dict)}
    return kind(
        **{k: _updated(nested[k], v) if dataclasses.is_dataclass(nested.get(k)) else v for k, v in values.items()}
    )


def _updated(config: Any, values: dict[str, Any]) -> Any:
    changed = {
        k: _updated(getattr(config, k), v) if dataclasses.is_dataclass(getattr(config, k, None)) else v
        for k, v in values.items()
    }
    return dataclasses.replace(config, **changed)


def default_of(field: dataclasses.Field) -> Any:
    """The default of a field; MISSING where it has none."""
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def differences(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> list[str]:
    """`name: before -> after` for every field that differs, nested names joined by dots."""
    lines = []
    for key in sorted(before.keys() | after.keys()):
        a, b = before.get(key), after.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {a!r} -> {b!r}")
    return lines


# What a run may change when it is resumed: it does not change what is learned (and new bad records are new data).
MAY_CHANGE = {"resume", "output_dir", "report_to", "on_bad_record", "prompts", "logging_steps", "save_steps",
              "sample_steps", "keep_last", "keep_best", "on_bad_loss",
              # how a step's rows are divided; how many they are is checked by itself
              "per_device_train_batch_size", "gradient_accumulation_steps", "device", "fsdp", "tp_size",
              "torch_compile", "ddp_timeout"}  # fmt: skip


def fingerprint(config: Any) -> str:
    """SHA-256 of all settings but those: equal for runs that learn the same from the same data."""

    def decisive(values: dict[str, Any]) -> dict[str, Any]:
        kept = {key: value for key, value in values.items() if key not in MAY_CHANGE}
        return {key: decisive(value) if isinstance(value, dict) else value for key, value in kept.items()}

    return hashlib.sha256(json.dumps(decisive(to_dict(config)), sort_keys=True).encode()).hexdigest()
