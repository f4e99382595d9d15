"""A label, or a number, for a text: what `zero2hero train text-classification` runs.

An encoder reads the text, or two texts that are judged together, and a small head says the label from the state of the
first token (Devlin et al. 2018, arXiv 1810.04805, section 4.1). From scratch, or from a base model whose body is kept
and whose head is new: that is what fine-tuning is.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from zero2hero.data.tables import Table, open_tables
from zero2hero.errors import UserError
from zero2hero.task_configs import TextClassificationConfig
from zero2hero.train import objectives
from zero2hero.train.run import Place, Task, training
from zero2hero.train.text_tasks import encode, encoder, labelled_task, labelled_texts
from zero2hero.train.tracking import Units

LABEL_COLUMNS = ("label", "labels", "class", "category", "sentiment", "score")
TEXT_COLUMNS = ("text", "sentence", "sentence1", "content", "premise", "question", "review")


def _begin(config: TextClassificationConfig, place: Place) -> Task:
    training, held_out = open_tables(
        config.data, config.validation_data, validation_fraction=config.validation_fraction, seed=config.train.seed,
        header=not (config.text_column or "").isdecimal(), on_bad_record=config.on_bad_record,
    )  # fmt: skip
    label_column = training.find("label_column", config.label_column, LABEL_COLUMNS)
    names = label_names(training, label_column, config)
    texts, held_texts = texts_of(training, config), texts_of(held_out, config)
    kind = "regression" if names is None else "single_label_classification"
    plain = [part for text in texts for part in ([text] if isinstance(text, str) else text)]
    with place.ranks.first_on_each_machine():
        shown = None if names is None else config.label_names or list(names)
        model, tokenizer = encoder(config, plain, "sequence_classification", shown or ["LABEL_0"], problem_type=kind)
        if place.ranks.is_main:  # for --resume
            tokenizer.save_pretrained(config.output_dir, model_max_length=model.config.longest)
    sides = [
        labelled_texts(encode(tokenizer, some, config.train.max_length), labels_of(table, label_column, names), model,
                       tokenizer)
        for table, some in ((training, texts), (held_out, held_texts))
    ]  # fmt: skip
    objective: objectives.Objective = objectives.regression
    if names is not None:
        objective = functools.partial(objectives.classification, label_smoothing=config.train.label_smoothing_factor)
    return labelled_task(
        config, place, model, tokenizer, sides[0], sides[1], objective,
        evaluate_by=objectives.regression if names is None else objectives.classification,
        scores=correlations if names is None else None, token_dropout=config.token_dropout,
        announce="" if names is None else f"; labels {', '.join(model.config.id2label.values())}",
        made_with={"data": training.fingerprint}, units=Units("text", "squared error" if names is None else "nats"),
    )  # fmt: skip


train = training(_begin)


def texts_of(table: Table, config: TextClassificationConfig) -> list[Any]:
    """Each record's text, or its pair of texts."""
    texts = table.column(table.find("text_column", config.text_column, TEXT_COLUMNS), str)
    if config.text_pair_column is None:
        return texts
    return list(zip(texts, table.column(table.find("text_pair_column", config.text_pair_column, ()), str)))


def label_names(table: Table, column: str, config: TextClassificationConfig) -> dict[str, int] | None:
    """The labels and their numbers, in sorted order; None where a number is to be predicted.

    Raises:
        UserError: one label only, or not as many as the settings say.
    """
    values = table.column(column, (str, int, float))
    found = {str(value) for value in values}
    numbers = all(_is_number(value) for value in found)
    if config.num_labels == 1 or (config.num_labels == 0 and numbers and any(float(v) % 1 for v in found)):
        return None
    if len(found) < 2:
        raise UserError(f"{table.name}: every label is {found.pop()!r}, so there is nothing to tell apart. Is "
                        f"'{column}' the labels' column? Name it with --label_column.")  # fmt: skip
    if config.num_labels not in (0, len(found)) or len(config.label_names) not in (0, len(found)):
        raise UserError(f"{table.name} has {len(found)} labels, num_labels and label_names speak of "
                        f"{config.num_labels or len(config.label_names)}")  # fmt: skip
    if len(found) > max(100, len(values) // 2):
        raise UserError(f"{table.name}: column '{column}' holds {len(found)} different values in {len(values)} "
                        "records: is it the labels'? Name theirs with --label_column.")  # fmt: skip
    return {name: i for i, name in enumerate(sorted(found, key=(lambda v: float(v)) if numbers else str))}


def labels_of(table: Table, column: str, names: dict[str, int] | None) -> list[Any]:
    """The number of each record's label, or the number that it is."""
    labels: list[Any] = []
    for value, where in zip(table.column(column, (str, int, float)), table.where):
        if names is None and _is_number(str(value)):
            labels.append(np.float32(value))
        elif names is not None and str(value) in names:
            labels.append(np.int64(names[str(value)]))
        else:
            known = "a number" if names is None else f"one of {', '.join(list(names)[:10])}"
            raise UserError(f"{where}: the label {value!r} is not {known}")
    return labels


def _is_number(text: str) -> bool:
    try:
        return bool(np.isfinite(float(text)))
    except ValueError:
        return False


def correlations(predicted: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """Pearson's correlation, and Spearman's: the same of ranks, where equal values share their mean rank."""
    return {"eval_pearson": _pearson(predicted, true), "eval_spearman": _pearson(_ranks(predicted), _ranks(true))}


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.corrcoef(x, y)[0, 1]) if x.std() and y.std() else 0.0


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2)[place]
