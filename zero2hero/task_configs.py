"""What the verbs `zero2hero train TASK` can be told: one dataclass for each task. Without torch, as config.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from zero2hero.config import DecoderConfig, RunConfig, TokenizerConfig, TrainConfig, at_least, one_of
from zero2hero.errors import UserError
from zero2hero.model_configs import (
    CLIP_TOWER,
    AugmentConfig,
    EncoderConfig,
    EncoderDecoderConfig,
    MLPConfig,
    VisionConfig,
    VisionTextConfig,
    text_tower,
)
from zero2hero.tune.config import LoraConfig


@dataclass(frozen=True)
class TaskConfig(RunConfig):
    """What all runs have that train a model for a task."""

    task: ClassVar[str]  # the pipeline's, which the result serves
    method: str = "full"
    """Of a model that begins from others: full trains every weight; lora trains an adapter and the new head, and merges
    the adapter into what is saved."""
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "method", ("full", "lora"))
        bases = ("base_model", "language_model", "vision_model")
        if self.method == "lora" and not any(getattr(self, name, None) for name in bases):
            raise UserError("method lora adapts a model that is there: name it with --base_model")


@dataclass(frozen=True)
class TextTaskConfig(TaskConfig):
    """What all runs have that train a model of texts for a task."""

    data: str | list[str] = "stories"
    validation_data: str | list[str] | None = None  # held-out records, named like data; by default a part of data
    validation_fraction: float = 0.1  # of the records, held out where there is no validation_data
    text_column: str | None = None
    """Found by itself when there is one candidate. In a .csv or .tsv without a header line, its number from 1 (and so
    for the other columns)."""
    on_bad_record: str = "raise"  # a record that cannot be read is an error (raise), or is left out (skip)
    base_model: str | None = None
    """A run, a Hugging Face directory or a hub id to begin from, with its tokenizer; model and tokenizer then say
    nothing. By default the model begins from scratch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "on_bad_record", ("raise", "skip"))
        if not 0 < self.validation_fraction < 1:
            raise UserError(f"validation_fraction is a share of the records in (0, 1), not {self.validation_fraction}")


@dataclass(frozen=True)
class EncoderTaskConfig(TextTaskConfig):
    """What all runs have that train an encoder."""

    tokenizer: TokenizerConfig = field(default_factory=lambda: TokenizerConfig(kind="wordpiece"))
    model: EncoderConfig = field(default_factory=EncoderConfig)


@dataclass(frozen=True)
class FillMaskConfig(EncoderTaskConfig):
    """`zero2hero train fill-mask`: text in, an encoder that guesses masked words out."""

    task = "fill-mask"
    output_dir: str = "runs/fill_mask"
    mlm_probability: float = 0.15  # share of the tokens to be guessed
    whole_words: bool = False  # mask all pieces of a word together

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.mlm_probability < 1:
            raise UserError(f"mlm_probability is a share of the tokens in (0, 1), not {self.mlm_probability}")


@dataclass(frozen=True)
class TextClassificationConfig(EncoderTaskConfig):
    """`zero2hero train text-classification`: texts (or pairs of texts) and their labels, or numbers, in."""

    task = "text-classification"
    data: str | list[str] = "sentiment"
    """Records with a text and a label: a .jsonl, .csv, .tsv or .parquet file (also .gz), a hub data set, or the
    built-in sentiment; a list adds them up."""
    output_dir: str = "runs/text_classification"
    text_pair_column: str | None = None  # of the second text, where two are judged together
    label_column: str | None = None  # label, by itself
    label_names: list[str] = field(default_factory=list)  # better names for the labels, in their sorted order
    num_labels: int = 0
    """1 predicts a number (regression); 0 does so where labels are numbers with decimal places, else counts labels."""
    token_dropout: float = 0.0  # share of a training text's tokens that are masked, so that no word is relied on

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "num_labels", "token_dropout")
        if self.token_dropout >= 1:
            raise UserError(f"token_dropout is a share of the tokens in [0, 1), not {self.token_dropout}")


@dataclass(frozen=True)
class TokenClassificationConfig(EncoderTaskConfig):
    """`zero2hero train token-classification`: words and a label for each in (names: B-PER, I-PER, O)."""

    task = "token-classification"
    data: str | list[str] = "names"
    """Records with a list of words and one of labels (`tokens`, `ner_tags`): a .jsonl or .parquet file, a hub data
    set, or the built-in names."""
    output_dir: str = "runs/token_classification"
    label_column: str | None = None  # ner_tags, labels or tags, by itself


@dataclass(frozen=True)
class QuestionAnsweringConfig(EncoderTaskConfig):
    """`zero2hero train question-answering`: questions and texts in whose midst the answers stand."""

    task = "question-answering"
    data: str | list[str] = "questions"
    """Records `question`, `context`, `answers` as in SQuAD: a .jsonl, .json or .parquet file, a hub data set, or the
    built-in questions about stories."""
    output_dir: str = "runs/question_answering"


@dataclass(frozen=True)
class Text2TextConfig(TextTaskConfig):
    """`zero2hero train text2text-generation`: pairs of a text to read and a text to write in."""

    task = "text2text-generation"
    data: str | list[str] = "translation"
    """Pairs: a table with two columns, two text files whose lines belong together '[train.en, train.de]' (also .gz),
    a hub data set, or the built-in translation and reversal. With span_corruption, text as for pretrain."""
    output_dir: str = "runs/text2text"
    source_column: str | None = None  # of the text to read; source, input, ..., by itself
    target_column: str | None = None  # of the text to write; target, output, ..., by itself
    span_corruption: bool = False  # pretrain on plain text: write the spans that were cut out of it
    metric: str = "exact_match"  # beside the loss, of texts written at each evaluation: exact_match, bleu
    eval_samples: int = 200  # held-out records that are written out for the metric
    tokenizer: TokenizerConfig = field(default_factory=lambda: TokenizerConfig(kind="unigram"))
    model: EncoderDecoderConfig = field(default_factory=EncoderDecoderConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "metric", ("exact_match", "bleu"))
        at_least(self, 0, "eval_samples")


# --- tasks about images -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageTaskConfig(TaskConfig):
    """What all runs have that train a model of images for a task."""

    data: str = ""
    validation_data: str | None = None  # held-out records, named like data; by default a part of data
    validation_fraction: float = 0.2  # of the images, held out where there is no validation_data
    image_column: str | None = None  # of a table: paths of images, or images; image, file_name, ..., by itself
    on_bad_record: str = "raise"  # a record or image that cannot be read is an error (raise), or is left out (skip)

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "on_bad_record", ("raise", "skip"))
        if not 0 < self.validation_fraction < 1:
            raise UserError(f"validation_fraction is a share of the images in (0, 1), not {self.validation_fraction}")


@dataclass(frozen=True)
class ImageClassificationConfig(ImageTaskConfig):
    """`zero2hero train image-classification`: images and a label for each in."""

    task = "image-classification"
    data: str = "digits"
    """A folder with a folder of images for each label; MNIST's files; a table (.jsonl, .csv, .parquet) with images and
    labels; a .zip of these; or the built-in digits and shapes (digits:20000 makes so many)."""
    output_dir: str = "runs/image_classification"
    label_column: str | None = None  # label, class, ..., by itself
    base_model: str | None = None
    """A run, a Hugging Face directory or a hub id to begin from; a new head where its labels are others."""
    architecture: str = "vit"  # vit (--model), or mlp (--mlp): the multi-layer perceptron
    model: VisionConfig = field(default_factory=VisionConfig)
    mlp: MLPConfig = field(default_factory=MLPConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "architecture", ("vit", "mlp"))


@dataclass(frozen=True)
class ZeroShotImageConfig(ImageTaskConfig):
    """`zero2hero train zero-shot-image-classification`: images and a caption for each in."""

    task = "zero-shot-image-classification"
    data: str = "shapes"
    """A table (.jsonl, .csv, .parquet) with images and captions, a folder or .zip with one, or the built-in shapes and
    scenes (shapes:20000 makes so many)."""
    output_dir: str = "runs/zero_shot_image_classification"
    caption_column: str | None = None  # caption, text, ..., by itself
    base_model: str | None = None  # a run, a Hugging Face directory or a hub id to begin from, with its tokenizer
    tokenizer: TokenizerConfig = field(default_factory=lambda: TokenizerConfig(kind="wordpiece", vocab_size=2000))
    model: VisionTextConfig = field(
        default_factory=lambda: VisionTextConfig(
            text_tower(hidden_size=128, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=32),
            VisionConfig(image_size=32, **CLIP_TOWER),
        )
    )
    train: TrainConfig = field(default_factory=lambda: TrainConfig(per_device_train_batch_size=128, max_length=32))


@dataclass(frozen=True)
class ImageTextConfig(ImageTaskConfig):
    """`zero2hero train image-text-to-text`: images, questions and answers in, a LLaVA out."""

    task = "image-text-to-text"
    data: str = "scenes"
    """A table (.jsonl, .json, .csv, .parquet) with images, questions and answers (or captions alone), a folder or .zip
    with one, or the built-in scenes (scenes:20000 makes so many)."""
    output_dir: str = "runs/image_text_to_text"
    question_column: str | None = None  # question, prompt, ..., by itself; where there is none, captions are learned
    answer_column: str | None = None  # answer, caption, ..., by itself
    base_model: str | None = None  # a LLaVA to go on from: a run, a Hugging Face directory or a hub id
    vision_model: str | None = None  # a model of images and texts (CLIP, SigLIP) whose image model to take
    language_model: str | None = None  # a language model to take, with its tokenizer
    trained: str = "all"
    """What learns: projector (the first stage of LLaVA), projector_and_language_model (the second), all."""
    questions_per_row: int = 1
    """Where images have several questions, so many share a row, in which the image is read once; they do not see each
    other. per_device_train_batch_size counts rows."""
    tokenizer: TokenizerConfig = field(default_factory=lambda: TokenizerConfig(vocab_size=1024))
    vision: VisionConfig = field(default_factory=lambda: VisionConfig(image_size=32, **CLIP_TOWER))
    model: DecoderConfig = field(default_factory=lambda: DecoderConfig(hidden_size=128, num_attention_heads=4))

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "questions_per_row")
        one_of(self, "trained", ("projector", "projector_and_language_model", "all"))
        if self.base_model and (self.vision_model or self.language_model):
            raise UserError("base_model is a whole model: leave out vision_model and language_model")
