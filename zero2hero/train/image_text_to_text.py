"""Answers about images: what `zero2hero train image-text-to-text` runs.

LLaVA (Liu et al. 2023; models/vision_language.py): an image model, a projector, a language model. They are trained in
stages: the projector alone, between two models that are frozen; then projector and language model; here also all, from
scratch. An example is a short text, and only its answer is learned:

    <image>
    what colour is the ring?
    blue<|end_of_text|>

An answer counts as right when at each of its tokens the likeliest is the true one: then, and only then, the model
would write exactly this answer. So one pass over the texts tells what writing them all would.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zero2hero.data.images import ImageProcessor
from zero2hero.data.labelled import RowsByLength
from zero2hero.data.pairs import moved, padded
from zero2hero.data.pictures import ANSWER_COLUMNS, QUESTION_COLUMNS, fingerprint
from zero2hero.data.tables import Table
from zero2hero.errors import UserError
from zero2hero.io import atomic_write
from zero2hero.language_model import load_parts
from zero2hero.model_configs import VisionLanguageConfig
from zero2hero.models.decoder import Decoder, init_weights
from zero2hero.models.vision_language import VisionLanguage
from zero2hero.models.vision_text import VisionText
from zero2hero.nn.logprobs import IGNORE
from zero2hero.progress import human_count
from zero2hero.task_configs import ImageTextConfig
from zero2hero.tokenizer import Tokenizer
from zero2hero.tokenizer.tokenizer import SPECIAL_TOKENS
from zero2hero.train import predictions
from zero2hero.train.image_tasks import Pixels, chunks, flops_per_token, open_sides, processor_for, save_model
from zero2hero.train.objectives import vision_language_lm
from zero2hero.train.run import Place, Task, micro_batches, steps_of, training

IMAGE = "<image>"
TEMPLATE = """{% for message in messages %}\
{% if message['content'] is string %}{{ message['content'] }}\
{% else %}{% for part in message['content'] %}\
{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}\
{% endfor %}{% endif %}\
{{ '\n' if message['role'] == 'user' else eos_token }}\
{% endfor %}"""


@dataclass(frozen=True)
class SeeingBatch:
    """As `Batch`, and the images of all rows in their order.

    Several questions that share a row are branches behind its image (see `Decoder`); else the last three are None.
    """

    ids_BT: Any
    targets_BT: Any
    pixels_ICHW: Any
    positions_BT: Any = None
    document_ids_BT: Any = None
    branch_ids_BT: Any = None

    @property
    def num_tokens(self) -> int:
        """Padding and image tokens included."""
        return self.ids_BT.shape[0] * self.ids_BT.shape[1]

    def to(self, device: Any) -> SeeingBatch:
        return moved(self, device)


def _begin(config: ImageTextConfig, place: Place) -> Task:
    parts = Parts.of(config)
    sides = open_sides(config, parts.processor)
    (training, pictures), (held_out, held_pictures) = sides
    pairs, held_pairs = (questions_and_answers(table, config) for table, _ in sides)
    with place.ranks.first_on_each_machine():
        tokenizer = parts.tokenizer or _tokenizer(config, pairs)
        if place.ranks.is_main:  # for --resume
            tokenizer.save_pretrained(config.output_dir)
    model = parts.assembled(config, tokenizer)
    model.vision_tower.requires_grad_(config.trained == "all")
    model.language_model.requires_grad_(config.trained != "projector")
    end = tokenizer.eos_token_id
    if end is None:
        raise UserError("the tokenizer has no eos_token: nothing would say where an answer ends")
    examples, held_examples = (encode(tokenizer, some, model, end) for some in (pairs, held_pairs))
    pixels, held_pixels = Pixels(pictures, parts.processor), Pixels(held_pictures, parts.processor)
    size = config.train.per_device_train_batch_size
    together = config.train.gradient_accumulation_steps * place.ranks.data_size
    rows = Rows(pictures.of_record, examples, config, together)
    pad, mark = tokenizer.pad_token_id or 0, model.config.image_token_index

    def batch(index: int) -> SeeingBatch:
        chosen = rows[index]
        return _batch([[examples[i] for i in row] for row in chosen], pixels([row[0] for row in chosen]), pad, mark)

    def held_batch(chosen: np.ndarray) -> SeeingBatch:
        return _batch([[held_examples[i]] for i in chosen], held_pixels(chosen), pad, mark)

    order = np.argsort([len(ids) for ids, _ in held_examples], kind="stable")
    held_rows = [order[chosen] for chosen in chunks(len(order), 2 * size)]

    def evaluate() -> dict[str, float]:
        sums = {"loss": 0.0, "weight": 0.0, "right": 0.0, "count": 0.0}
        for chosen in held_rows[place.part[0] :: place.part[1]]:
            found = held_batch(chosen).to(place.device)
            loss = vision_language_lm(model, found)
            right, _ = answers(model, found)
            parts = (float(loss.sum), float(loss.weight), float(right.sum()), float(len(right)))
            sums = {name: sums[name] + part for name, part in zip(sums, parts)}
        sums = place.ranks.sum(sums)
        return {"eval_loss": sums["loss"] / sums["weight"], "eval_accuracy": sums["right"] / sums["count"]}

    def save(finished: Any) -> None:
        save_model(finished, config, parts.processor, tokenizer)
        _write_more(Path(config.output_dir), finished, tokenizer, end)
        right, guesses = [False] * len(order), [""] * len(order)
        for chosen in held_rows:
            good, likeliest = answers(finished, held_batch(chosen).to(place.device))
            for i, one, ids in zip(chosen, good.tolist(), likeliest):
                right[i], guesses[i] = one, tokenizer.decode(ids)
        shown = [
            predictions.picture(held_pictures.pixels[held_pictures.of_record[i]], held_pairs[i][1], guesses[i],
                                held_pairs[i][0])
            for i in predictions.choose(right)
        ]  # fmt: skip
        predictions.write(config.output_dir, pictures=shown)

    return Task(
        model, vision_language_lm, steps_of(config, len(examples), place.ranks.data_size),
        micro_batches(config, place, batch), save=save,
        announce=f"{human_count(len(examples))} answers to learn from, {human_count(len(held_examples))} held out; "
        f"vocabulary {tokenizer.vocab_size}; {human_count(sum(p.numel() for p in model.parameters()))} weights, "
        f"of which {human_count(sum(p.numel() for p in model.parameters() if p.requires_grad))} learn",
        evaluate=evaluate,
        made_with={"data": fingerprint(training, pictures), "tokenizer": tokenizer.fingerprint},
        facts={"vocab_size": tokenizer.vocab_size},
        flops_per_token=flops_per_token(model, vision_language_lm, batch(0).to("cpu")),
    )  # fmt: skip


train = training(_begin)


# --- the model's parts ------------------------------------------------------------------------------------------


@dataclass
class Parts:
    """What a run begins with; None is made from scratch."""

    whole: VisionLanguage | None
    tower: nn.Module | None
    language_model: Decoder | None
    tokenizer: Tokenizer | None
    processor: ImageProcessor

    @classmethod
    def of(cls, config: ImageTextConfig) -> Parts:
        if config.base_model is not None:
            found = load_parts(config.base_model, "cpu", "fp32")
            if not isinstance(found.model, VisionLanguage):
                raise UserError(f"{config.base_model} is a {type(found.model).__name__}; this task needs a LLaVA")
            return cls(found.model, None, None, found.tokenizer, found.image_processor)
        tower, processor = None, processor_for(config.vision.image_size, config.vision.num_channels, "CLIP", resample=3)
        if config.vision_model is not None:
            seeing = load_parts(config.vision_model, "cpu", "fp32")
            if not isinstance(seeing.model, VisionText):
                raise UserError(f"{config.vision_model} is a {type(seeing.model).__name__}; vision_model is a model of "
                                "images and texts (CLIP, SigLIP)")  # fmt: skip
            tower, processor = seeing.model.vision_model, seeing.image_processor
        writer, tokenizer = None, None
        if config.language_model is not None:
            writing = load_parts(config.language_model, "cpu", "fp32")
            if not isinstance(writing.model, Decoder):
                raise UserError(
                    f"{config.language_model} is a {type(writing.model).__name__}; language_model is a decoder"
                )
            writer, tokenizer = writing.model, writing.tokenizer
            if tokenizer.token_to_id(IMAGE) is None:
                tokenizer.raw.add_special_tokens([IMAGE])
        return cls(None, tower, writer, tokenizer, processor)

    def assembled(self, config: ImageTextConfig, tokenizer: Tokenizer) -> VisionLanguage:
        if self.whole is not None:
            return self.whole
        text = self.language_model.config if self.language_model else config.model
        mark = tokenizer.token_to_id(IMAGE)
        assert mark is not None
        rows = max(tokenizer.vocab_size, text.vocab_size)
        ids = {role: getattr(tokenizer, role) for role in ("bos_token_id", "eos_token_id", "pad_token_id")}
        shape = VisionLanguageConfig(
            dataclasses.replace(text, vocab_size=rows, **ids),
            self.tower.config if self.tower else config.vision,  # type: ignore[arg-type]
            image_token_index=mark, vision_feature_layer=-2 if self.tower else -1,
            vision_feature_select_strategy="default" if config.vision.class_token else "full",
        )  # fmt: skip
        model = VisionLanguage(shape)
        init_weights(model, config.train.seed)
        for part, given in ((model.vision_tower, self.tower), (model.language_model, self.language_model)):
            if given is not None:
                _take(part, given)
        return model


@torch.no_grad()
def _take(part: nn.Module, given: nn.Module) -> None:
    """Copy weights; an embedding that has more rows than before keeps its new ones."""
    ours = dict(part.named_parameters())
    for name, value in given.named_parameters():
        if name in ours:
            ours[name][: len(value)] = value


def _tokenizer(config: ImageTextConfig, pairs: list[tuple[str, str]]) -> Tokenizer:
    saved = Path(config.output_dir) / "tokenizer.json"
    if config.resume and saved.exists():
        return Tokenizer.from_pretrained(config.output_dir)
    c = config.tokenizer
    texts = [f"{question}\n{answer}" for question, answer in pairs]
    tokenizer = Tokenizer.train(texts, c.vocab_size, c.pattern, c.kind, [*SPECIAL_TOKENS, IMAGE])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


# --- examples ---------------------------------------------------------------------------------------------------


def questions_and_answers(table: Table, config: ImageTextConfig) -> list[tuple[str, str]]:
    """Each record's question ("" where the table has none) and answer."""
    asked = config.question_column or next((name for name in QUESTION_COLUMNS if name in table.rows[0]), None)
    questions = table.column(table.find("question_column", asked, ()), str) if asked else [""] * len(table)
    answers = table.column(table.find("answer_column", config.answer_column, ANSWER_COLUMNS), (str, int, float))
    return list(zip(questions, map(str, answers)))


Encoded = tuple[np.ndarray, np.ndarray]  # ids and targets, [T] each


def encode(tokenizer: Tokenizer, pairs: list[tuple[str, str]], model: VisionLanguage, end: int) -> list[Encoded]:
    """Each pair as token ids, image tokens expanded, and what is to be said at each: the answer and the end."""
    prompts = tokenizer.encode_batch([f"{IMAGE}\n{question}\n" if question else f"{IMAGE}\n" for question, _ in pairs])
    written = tokenizer.encode_batch(
        [answer for _, answer in pairs], add_special_tokens=False, split_special_tokens=True
    )
    longest = model.config.text_config.max_position_embeddings
    examples = []
    for prompt, answer, pair in zip(prompts, written, pairs):
        before = model.expand(prompt)
        ids = np.array([*before, *answer, end], dtype=np.int64)
        if len(ids) > longest:
            raise UserError(f"an image, its question and answer have {len(ids)} tokens; the model reads {longest}: "
                            f"{' '.join(pair)!r:.60}. Raise --model.max_position_embeddings.")  # fmt: skip
        targets = np.full(len(ids) - 1, IGNORE, dtype=np.int64)
        targets[len(before) - 1 :] = ids[len(before) :]
        examples.append((ids[:-1], targets))
    return examples


class Rows:
    """`rows[i]`: the numbers of the records in each row of micro-batch i of the run, a function of seed and i.

    One record a row, or several that are about the same image: in each epoch its records are shuffled and dealt out.

    Args:
        image_of: each record's image.
        together: micro-batches of a step.
    """

    def __init__(self, image_of: np.ndarray, examples: list[Encoded], config: ImageTextConfig, together: int) -> None:
        self.image_of, self.each, self.seed = image_of, config.questions_per_row, config.train.seed
        lengths = [len(ids) for ids, _ in examples]
        count = len(self._dealt(0))
        self._rows = RowsByLength(lengths if self.each == 1 else [1] * count, config.train.per_device_train_batch_size,
                                  together, self.seed)  # fmt: skip
        self._dealt = lru_cache(maxsize=2)(self._dealt)  # type: ignore[method-assign]

    def __getitem__(self, index: int) -> list[list[int]]:
        dealt = self._dealt(index // (self._rows.steps_per_epoch * self._rows.together))
        return [dealt[row] for row in self._rows[index]]

    def _dealt(self, epoch: int) -> list[list[int]]:
        order = np.arange(len(self.image_of))
        if self.each > 1:
            order = np.random.default_rng([self.seed % 2**64, epoch, self.each]).permutation(order)
            order = order[np.argsort(self.image_of[order], kind="stable")]
        rows: list[list[int]] = []
        for i in order.tolist():
            alike = rows and self.image_of[rows[-1][0]] == self.image_of[i]
            if alike and self.each > 1 and len(rows[-1]) < self.each:
                rows[-1].append(i)
            else:
                rows.append([i])
        return rows


def _batch(rows: list[list[Encoded]], pixels: Tensor, pad: int, mark: int) -> SeeingBatch:
    """Rows of examples about one image each: its tokens (`mark`) and what stands before them, then the rest of each."""
    if all(len(row) == 1 for row in rows):
        ids, _ = padded([row[0][0] for row in rows], pad)
        targets, _ = padded([row[0][1] for row in rows], IGNORE)
        return SeeingBatch(ids, targets, pixels)
    columns: list[list[np.ndarray]] = [[], [], [], []]  # ids, targets, positions, branches: one array a row
    for row in rows:
        front = int(np.flatnonzero(row[0][0] == mark)[-1]) + 1
        parts = [(row[0][0][:front], row[0][1][:front], np.arange(front), np.zeros(front, int))]
        for branch, (ids, targets) in enumerate(row, start=1):
            length = len(ids) - front
            parts.append((ids[front:], targets[front:], np.arange(front, len(ids)), np.full(length, branch)))
        for column, arrays in zip(columns, zip(*parts)):
            column.append(np.concatenate(arrays))
    fills = pad, IGNORE, 0, max(map(len, rows)) + 1  # padding is a branch of its own
    ids, targets, positions, branches = (padded(column, fill)[0] for column, fill in zip(columns, fills))
    return SeeingBatch(ids, targets, pixels, positions, np.zeros_like(ids), branches)


@torch.no_grad()
def answers(model: Any, batch: SeeingBatch) -> tuple[Tensor, list[list[int]]]:
    """Which of the answers the model would write [B], and its likeliest token at each place of each answer."""
    weight = next(model.parameters())
    hidden = model(batch.ids_BT, batch.pixels_ICHW.to(weight.dtype))
    asked = batch.targets_BT != IGNORE
    likeliest = torch.full_like(batch.targets_BT, IGNORE)
    likeliest[asked] = model.logits(hidden[asked]).argmax(-1)
    return (likeliest == batch.targets_BT).all(-1), [row[mask].tolist() for row, mask in zip(likeliest, asked)]


def _write_more(directory: Path, model: VisionLanguage, tokenizer: Tokenizer, end: int) -> None:
    """What transformers wants to know beside: how its processor expands an image token, and where answers end."""
    c = model.config
    processor = {
        "processor_class": "LlavaProcessor", "patch_size": c.vision_config.patch_size, "image_token": IMAGE,
        "vision_feature_select_strategy": c.vision_feature_select_strategy,
        "num_additional_image_tokens": int(c.vision_config.class_token),
    }  # fmt: skip
    atomic_write(directory / "processor_config.json", json.dumps(processor, indent=2) + "\n")
    settings = {"do_sample": False, "eos_token_id": end, "pad_token_id": tokenizer.pad_token_id}
    atomic_write(directory / "generation_config.json", json.dumps(settings, indent=2) + "\n")
