"""The shapes of the models that are not decoders. Like config.py, without torch: a command line can show them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from zero2hero.config import NO_OPTION, DecoderConfig, at_least, below, one_of
from zero2hero.errors import UserError

if TYPE_CHECKING:
    from typing import Self

TASKS = ("features", "masked_lm", "sequence_classification", "token_classification", "question_answering")
PLAIN_ACTIVATIONS = ("gelu", "gelu_new", "quick_gelu", "relu", "relu2", "silu")


@dataclass(frozen=True)
class EncoderConfig:
    """The shape of an encoder and the task of its head. Names are those of Hugging Face configurations."""

    vocab_size: int = 0  # 0: the tokenizer's
    hidden_size: int = 192  # width of the residual stream
    num_hidden_layers: int = 4
    num_attention_heads: int = 6
    intermediate_size: int = 0  # width of the feed-forward; 0: four times hidden_size
    max_position_embeddings: int = 512  # rows of the table of positions
    position_offset: int = 0  # the row of the first token (RoBERTa: 2)
    type_vocab_size: int = 2  # kinds of segments
    norm_eps: float = 1e-12
    feedforward: str = "gelu"  # gelu, gelu_new, relu, relu2, silu
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None  # none: as hidden_dropout_prob
    initializer_range: float = 0.02  # standard deviation of the first weights
    task: str = "masked_lm"
    """What the head is for: features, masked_lm, sequence_classification, token_classification, question_answering"""
    id2label: dict[int, str] = field(default_factory=lambda: {0: "LABEL_0", 1: "LABEL_1"}, metadata=NO_OPTION)
    bos_token_id: int | None = field(default=None, metadata=NO_OPTION)
    eos_token_id: int | None = field(default=None, metadata=NO_OPTION)
    pad_token_id: int | None = field(default=None, metadata=NO_OPTION)
    model_type: str | None = field(default=None, metadata=NO_OPTION)  # the family that it was read from
    extra: dict[str, Any] = field(default_factory=dict, metadata=NO_OPTION)  # fields that change no mathematics

    def __post_init__(self) -> None:
        at_least(self, 1, "hidden_size", "num_hidden_layers", "num_attention_heads", "type_vocab_size")
        at_least(self, 0, "vocab_size", "intermediate_size", "norm_eps", "hidden_dropout_prob", "initializer_range",
                  "attention_probs_dropout_prob", "position_offset")  # fmt: skip
        at_least(self, self.position_offset + 1, "max_position_embeddings")
        below(self, 1, "hidden_dropout_prob", "attention_probs_dropout_prob")
        one_of(self, "feedforward", PLAIN_ACTIVATIONS)
        one_of(self, "task", TASKS)
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads {self.num_attention_heads}"
            )
        _check_labels(self.id2label)

    def derived(self) -> EncoderConfig:
        """The same configuration with nothing left at 0: what a model is built from."""
        return dataclasses.replace(self, intermediate_size=self.intermediate_size or 4 * self.hidden_size)

    @property
    def longest(self) -> int:
        """Tokens that a text may have."""
        return self.max_position_embeddings - self.position_offset


@dataclass(frozen=True)
class EncoderDecoderConfig:
    """The shape of an encoder-decoder. The defaults are T5's version 1.1; 0 derives, as in `DecoderConfig`."""

    vocab_size: int = 0  # 0: the tokenizer's
    source_vocab_size: int = 0  # of an encoder with an embedding of its own; 0: both share one
    hidden_size: int = 192  # width of the residual stream
    num_hidden_layers: int = 4  # of the encoder
    num_decoder_layers: int = 0  # 0: as many
    num_attention_heads: int = 6
    head_dim: int = 0  # 0: hidden_size / heads
    intermediate_size: int = 0  # width of the feed-forward; 0: 4 D plain, 8/3 D gated
    position: str = "relative"  # relative (T5), sinusoidal
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128  # farther away is as far
    max_position_embeddings: int = 512  # of sinusoidal positions; relative ones have no end
    norm: str = "rmsnorm"  # rmsnorm, layernorm
    norm_eps: float = 1e-6
    feedforward: str = "geglu"  # gated: swiglu, geglu; or plain: gelu, gelu_new, relu, relu2, silu
    scale_attention: bool = False  # divide scores by the root of head_dim (T5 does not)
    bias: bool = False  # on every projection but the head
    dropout: float = 0.0
    tie_word_embeddings: bool = False  # one matrix for embedding and head
    scale_decoder_outputs: bool = False  # divide hidden states by the root of hidden_size before the head (T5 1.0)
    initializer_range: float = 0.02  # standard deviation of the first weights
    decoder_start_token_id: int = field(default=0, metadata=NO_OPTION)
    eos_token_id: int | list[int] | None = field(default=1, metadata=NO_OPTION)
    pad_token_id: int | None = field(default=0, metadata=NO_OPTION)
    model_type: str | None = field(default=None, metadata=NO_OPTION)  # the family that it was read from
    extra: dict[str, Any] = field(default_factory=dict, metadata=NO_OPTION)  # fields that change no mathematics

    def __post_init__(self) -> None:
        at_least(self, 1, "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
        at_least(self, 4, "relative_attention_num_buckets")
        at_least(self, self.relative_attention_num_buckets // 2 + 1, "relative_attention_max_distance")
        at_least(self, 0, "vocab_size", "source_vocab_size", "num_decoder_layers", "head_dim", "intermediate_size",
                  "norm_eps", "dropout", "initializer_range")  # fmt: skip
        below(self, 1, "dropout")
        one_of(self, "position", ("relative", "sinusoidal"))
        one_of(self, "norm", ("rmsnorm", "layernorm"))
        one_of(self, "feedforward", ("swiglu", "geglu", *PLAIN_ACTIVATIONS))
        if not self.head_dim and self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads {self.num_attention_heads}: "
                "set head_dim"
            )

    def derived(self) -> EncoderDecoderConfig:
        """The same configuration with nothing left at 0: what a model is built from."""
        gated = self.feedforward in ("swiglu", "geglu")
        inner = -(-8 * self.hidden_size // 96) * 32 if gated else 4 * self.hidden_size
        return dataclasses.replace(
            self,
            num_decoder_layers=self.num_decoder_layers or self.num_hidden_layers,
            head_dim=self.head_dim or self.hidden_size // self.num_attention_heads,
            intermediate_size=self.intermediate_size or inner,
        )


@dataclass(frozen=True)
class VisionConfig:
    """The shape of a Transformer that reads images (models/vision.py)."""

    hidden_size: int = 128  # width of the residual stream
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    intermediate_size: int = 0  # width of the feed-forward; 0: four times hidden_size
    image_size: int = 28  # height and width, in pixels
    patch_size: int = 4  # the image is cut into squares of so many pixels; what is left at its edge is not seen
    num_channels: int = 3
    class_token: bool = True  # one more token, which gathers what the whole image shows
    patch_bias: bool = True
    attention_bias: bool = True  # on q, k, v
    first_norm: bool = False  # normalize what enters the first layer (CLIP)
    norm_eps: float = 1e-12
    feedforward: str = "gelu"  # gelu, gelu_new, quick_gelu, relu, relu2, silu
    dropout: float = 0.0
    initializer_range: float = 0.02  # standard deviation of the first weights
    task: str = "image_classification"
    """What the head is for: image_classification; features (one vector through a tanh layer, as BERT's); attention
    (one vector, which attention gathers: SigLIP); none"""
    id2label: dict[int, str] = field(default_factory=lambda: {0: "LABEL_0", 1: "LABEL_1"}, metadata=NO_OPTION)
    model_type: str | None = field(default=None, metadata=NO_OPTION)  # the family that it was read from
    extra: dict[str, Any] = field(default_factory=dict, metadata=NO_OPTION)  # fields that change no mathematics

    def __post_init__(self) -> None:
        at_least(self, 1, "image_size", "patch_size", "num_channels")
        one_of(self, "task", ("image_classification", "features", "attention", "none"))
        if self.image_size < self.patch_size:
            raise UserError(f"image_size {self.image_size} is smaller than patch_size {self.patch_size}")
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads {self.num_attention_heads}"
            )
        _check_labels(self.id2label)
        self.blocks()  # checks the rest

    def derived(self) -> VisionConfig:
        """The same configuration with nothing left at 0: what a model is built from."""
        return dataclasses.replace(self, intermediate_size=self.intermediate_size or 4 * self.hidden_size)

    def blocks(self) -> DecoderConfig:
        """The shape of the layers, which are a decoder's."""
        return DecoderConfig(
            hidden_size=self.hidden_size, num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads, intermediate_size=self.intermediate_size, position="none",
            norm="layernorm", norm_eps=self.norm_eps, feedforward=self.feedforward, dropout=self.dropout,
            attention_bias=self.attention_bias, output_bias=True, mlp_bias=True,
            initializer_range=self.initializer_range,
        ).derived()  # fmt: skip

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class MLPConfig:
    """The shape of a multi-layer perceptron that classifies images (models/mlp.py)."""

    hidden_sizes: list[int] = field(default_factory=lambda: [512, 256])  # width of each hidden layer
    image_size: int = 28  # height and width, in pixels
    num_channels: int = 1  # 1: grey; 3: colours
    activation: str = "relu"  # relu, gelu, silu, tanh, sigmoid
    dropout: float = 0.0
    id2label: dict[int, str] = field(default_factory=lambda: {0: "LABEL_0", 1: "LABEL_1"}, metadata=NO_OPTION)
    model_type: str | None = field(default=None, metadata=NO_OPTION)
    extra: dict[str, Any] = field(default_factory=dict, metadata=NO_OPTION)

    task = "image_classification"

    def __post_init__(self) -> None:
        at_least(self, 1, "image_size")
        at_least(self, 0, "dropout")
        below(self, 1, "dropout")
        one_of(self, "activation", ("relu", "gelu", "silu", "tanh", "sigmoid"))
        if self.num_channels not in (1, 3):
            raise UserError(f"num_channels is 1 (grey) or 3 (colours), not {self.num_channels}")
        if not self.hidden_sizes or min(self.hidden_sizes) < 1:
            raise UserError(
                f"hidden_sizes lists the width of each hidden layer, as in '[512, 256]', not {self.hidden_sizes}"
            )
        _check_labels(self.id2label)

    def derived(self) -> MLPConfig:
        return self


# What makes a `VisionConfig` the image model of CLIP, and of SigLIP.
CLIP_TOWER: dict[str, Any] = {"task": "none", "first_norm": True, "patch_bias": False}
SIGLIP_TOWER: dict[str, Any] = {"task": "attention", "class_token": False}


def text_tower(**settings: Any) -> DecoderConfig:
    """The shape of an `VisionTextConfig`'s text model: that of GPT-2."""
    kind: dict[str, Any] = {"position": "learned", "norm": "layernorm", "feedforward": "gelu_new"}
    biases = {"attention_bias": True, "output_bias": True, "mlp_bias": True}
    return DecoderConfig(**kind | biases | settings)


@dataclass(frozen=True)
class VisionTextConfig:
    """A text model and an image model whose vectors are compared (models/vision_text.py)."""

    text_config: DecoderConfig = field(default_factory=text_tower)
    vision_config: VisionConfig = field(default_factory=lambda: VisionConfig(**CLIP_TOWER))
    loss: str = "softmax"  # softmax: which of these texts (CLIP); sigmoid: yes or no for each (SigLIP)
    projection_dim: int = 128  # width of the vectors that are compared
    model_type: str | None = field(default=None, metadata=NO_OPTION)
    extra: dict[str, Any] = field(default_factory=dict, metadata=NO_OPTION)

    def __post_init__(self) -> None:
        at_least(self, 1, "projection_dim")
        one_of(self, "loss", ("softmax", "sigmoid"))
        if self.loss == "sigmoid" and self.projection_dim != self.vision_config.hidden_size:
            raise UserError(
                f"projection_dim {self.projection_dim} should be the image model's hidden_size, "
                f"{self.vision_config.hidden_size}: with the sigmoid loss its vectors are compared as they are"
            )

    def derived(self) -> VisionTextConfig:
        """The same configuration with nothing left at 0: what a model is built from."""
        return dataclasses.replace(
            self, text_config=self.text_config.derived(), vision_config=self.vision_config.derived()
        )

    @property
    def initializer_range(self) -> float:
        return self.text_config.initializer_range


@dataclass(frozen=True)
class SeeingConfig:
    """A language model, an image model, and the token that stands for a piece of an image."""

    text_config: DecoderConfig
    vision_config: VisionConfig
    image_token_index: int = 32000
    model_type: str | None = field(default=None, metadata=NO_OPTION)
    extra: dict[str, Any] = field(default_factory=dict, metadata=NO_OPTION)

    def __post_init__(self) -> None:
        if not 0 <= self.image_token_index < self.text_config.vocab_size:
            raise UserError(
                f"image_token_index {self.image_token_index} is not one of the language model's "
                f"{self.text_config.vocab_size} tokens"
            )

    def derived(self) -> Self:
        """The same configuration with nothing left at 0: what a model is built from."""
        return dataclasses.replace(
            self, text_config=self.text_config.derived(), vision_config=self.vision_config.derived()
        )

    @property
    def initializer_range(self) -> float:
        return self.text_config.initializer_range


@dataclass(frozen=True)
class VisionLanguageConfig(SeeingConfig):
    """A language model that reads what an image model saw (models/vision_language.py)."""

    projector_hidden_act: str = "gelu"
    multimodal_projector_bias: bool = True
    vision_feature_layer: int | list[int] = -2  # whose states are read: 0 enters the first layer, -1 leaves the last
    vision_feature_select_strategy: str = "default"  # default: without the class token; full: with all tokens

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "projector_hidden_act", PLAIN_ACTIVATIONS)
        one_of(self, "vision_feature_select_strategy", ("default", "full"))
        layers = self.vision_config.num_hidden_layers
        if not self.feature_layers or not all(-layers - 1 <= i <= layers for i in self.feature_layers):
            raise UserError(
                f"vision_feature_layer {self.vision_feature_layer} is not one of the image model's {layers} layers"
            )

    @property
    def feature_layers(self) -> list[int]:
        return [self.vision_feature_layer] if isinstance(self.vision_feature_layer, int) else self.vision_feature_layer

    @property
    def num_image_tokens(self) -> int:
        """Image tokens for each image."""
        dropped = self.vision_feature_select_strategy == "default"
        return self.vision_config.num_patches + self.vision_config.class_token - dropped


@dataclass(frozen=True)
class Idefics3Config(SeeingConfig):
    """A language model that reads an image tile by tile (models/idefics3.py)."""

    scale_factor: int = 2  # so many patches, across and down, become one vector

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "scale_factor")
        side = self.vision_config.image_size // self.vision_config.patch_size
        if side % self.scale_factor:
            raise UserError(f"{side} patches across an image are not a multiple of scale_factor {self.scale_factor}")

    @property
    def num_image_tokens(self) -> int:
        """Image tokens for each tile."""
        return self.vision_config.num_patches // self.scale_factor**2


def _check_labels(id2label: dict[int, str]) -> None:
    if sorted(id2label) != list(range(len(id2label))):
        raise UserError(f"id2label names the labels 0, 1, 2, ..., not {sorted(id2label)}")


@dataclass(frozen=True)
class AugmentConfig:
    """How training images are changed, each time anew, in ways that do not change what they show."""

    shift: float = 0.0  # by up to this share of width and height
    rotation: float = 0.0  # by up to so many degrees
    scale: float = 0.0  # larger or smaller by up to this share
    flip: bool = False  # half of them mirrored, left to right
    erasing: float = 0.0  # share of the images of which a rectangle is blotted out

    def __post_init__(self) -> None:
        at_least(self, 0, "shift", "rotation", "scale", "erasing")
        below(self, 1, "shift", "scale")
        if self.erasing > 1:
            raise UserError(f"erasing is a share of the images in [0, 1], not {self.erasing}")
