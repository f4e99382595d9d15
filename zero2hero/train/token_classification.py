"""A label for each word of a text: what `zero2hero train token-classification` runs.

Names of persons and places are found so: B-PER begins one, I-PER goes on, O is none (Ramshaw & Marcus 1995). A word
that the tokenizer cuts into pieces is labelled at its first piece; the others have no target.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from zero2hero.data.batches import IGNORE
from zero2hero.data.tables import Table, open_tables
from zero2hero.errors import UserError
from zero2hero.task_configs import TokenClassificationConfig
from zero2hero.train import objectives
from zero2hero.train.run import Place, Task, training
from zero2hero.train.text_tasks import encode, encoder, labelled_task, labelled_texts

WORD_COLUMNS = ("tokens", "words", "text")
LABEL_COLUMNS = ("ner_tags", "labels", "tags", "label", "pos_tags")


def _begin(config: TokenClassificationConfig, place: Place) -> Task:
    training, held_out = open_tables(
        config.data, config.validation_data, validation_fraction=config.validation_fraction, seed=config.train.seed,
        on_bad_record=config.on_bad_record,
    )  # fmt: skip
    sides = [_words_and_labels(table, config) for table in (training, held_out)]
    names = sorted({label for labels in sides[0][1] for label in labels}, key=lambda name: (name != "O", name))
    if len(names) < 2:
        raise UserError(f"{training.name}: every label is {names[0]!r}, so there is nothing to tell apart")
    with place.ranks.first_on_each_machine():
        model, tokenizer = encoder(config, (" ".join(words) for words in sides[0][0]), "token_classification", names)
        if place.ranks.is_main:  # for --resume
            tokenizer.save_pretrained(config.output_dir, model_max_length=model.config.longest)
    numbers = {name: i for i, name in enumerate(names)}
    texts = []
    for table, (words, labels) in zip((training, held_out), sides):
        records = encode(tokenizer, words, config.train.max_length, is_pretokenized=True)
        wanted = [_of_pieces(record, row, numbers, where) for record, row, where in zip(records, labels, table.where)]
        texts.append(labelled_texts(records, wanted, model, tokenizer, per_token=True))
    smoothing = config.train.label_smoothing_factor
    return labelled_task(
        config, place, model, tokenizer, texts[0], texts[1],
        functools.partial(objectives.classification, label_smoothing=smoothing), evaluate_by=objectives.classification,
        announce=f"; labels {', '.join(names)}", made_with={"data": training.fingerprint},
    )  # fmt: skip


train = training(_begin)


def _words_and_labels(table: Table, config: TokenClassificationConfig) -> tuple[list[list[str]], list[list[str]]]:
    words = table.column(table.find("text_column", config.text_column, WORD_COLUMNS), list)
    labels = table.column(table.find("label_column", config.label_column, LABEL_COLUMNS), list)
    for one, other, where in zip(words, labels, table.where):
        if len(one) != len(other) or not one or not all(isinstance(word, str) for word in one):
            raise UserError(f"{where}: {len(one)} words and {len(other)} labels; there should be a label for each word")
    return words, [[str(label) for label in row] for row in labels]


def _of_pieces(record: Any, labels: list[str], numbers: dict[str, int], where: str) -> np.ndarray:
    """The label's number at the first piece of each word, -100 elsewhere."""
    unknown = next((label for label in labels if label not in numbers), None)
    if unknown is not None:
        raise UserError(f"{where}: the label {unknown!r} is not one of {', '.join(numbers)}")
    found, before = np.full(len(record.ids), IGNORE), None
    for place, word in enumerate(record.word_ids):
        if word is not None and word != before:
            found[place] = numbers[labels[word]]
        before = word
    return found
