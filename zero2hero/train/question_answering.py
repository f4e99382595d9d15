"""Find the answer to a question in a text: what `zero2hero train question-answering` runs.

The encoder reads question and text together and scores every token as the answer's first and as its last (Devlin et al.
2018, arXiv 1810.04805, section 4.2; records as in SQuAD, Rajpurkar et al. 2016, arXiv 1606.05250). A question without
an answer has the first token, [CLS], as both.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from zero2hero.data.tables import Table, open_tables
from zero2hero.errors import UserError
from zero2hero.models.encoder import Encoder
from zero2hero.task_configs import QuestionAnsweringConfig
from zero2hero.tokenizer import Tokenizer
from zero2hero.train import objectives
from zero2hero.train.run import Place, Task, training
from zero2hero.train.text_tasks import encode, encoder, labelled_task, labelled_texts
from zero2hero.train.tracking import Units


def _begin(config: QuestionAnsweringConfig, place: Place) -> Task:
    tables = open_tables(
        config.data, config.validation_data, validation_fraction=config.validation_fraction, seed=config.train.seed,
        on_bad_record=config.on_bad_record,
    )  # fmt: skip
    with place.ranks.first_on_each_machine():
        texts = [text for pair in _pairs(tables[0], config) for text in pair]
        model, tokenizer = encoder(config, texts, "question_answering", ["LABEL_0", "LABEL_1"])
        if place.ranks.is_main:  # for --resume
            tokenizer.save_pretrained(config.output_dir, model_max_length=model.config.longest)
    sides = [_encoded(table, config, model, tokenizer) for table in tables]
    return labelled_task(config, place, model, tokenizer, sides[0], sides[1], objectives.answer_span,
                         made_with={"data": tables[0].fingerprint}, units=Units("question"))  # fmt: skip


train = training(_begin)


def _pairs(table: Table, config: QuestionAnsweringConfig) -> list[tuple[str, str]]:
    context = table.find("text_column", config.text_column, ("context", "text"))
    return list(zip(table.column(table.find("question", None, ("question",)), str), table.column(context, str)))


def _encoded(table: Table, config: QuestionAnsweringConfig, model: Encoder, tokenizer: Tokenizer) -> Any:
    """Questions with their texts and the places of the answers; those whose answer was cut off are left out."""
    pairs = _pairs(table, config)
    answers = table.column(table.find("answers", None, ("answers",)), dict)
    records = encode(tokenizer, pairs, config.train.max_length, truncation="only_second")
    kept, places = [], []
    for record, (_, context), answer, where in zip(records, pairs, answers, table.where):
        place = _place(record, context, answer, where)
        if place is not None:
            kept.append(record)
            places.append(place)
    if not kept:
        raise UserError(f"{table.name}: no answer stands within the first {config.train.max_length} tokens; raise "
                        "train.max_length")  # fmt: skip
    return labelled_texts(kept, places, model, tokenizer)


def _place(record: Any, context: str, answer: dict[str, Any], where: str) -> np.ndarray | None:
    """First and last token of the first answer; [0, 0] without one, None where it was cut off."""
    try:
        found = list(zip(answer["text"], answer["answer_start"]))
        text, start = found[0] if found else ("", 0)
        if context[start : start + len(text)] != text:
            raise UserError(f"{where}: the answer {text!r} does not stand at {start} of the context")
    except (KeyError, TypeError):
        raise UserError(
            f"{where}: answers should be {{'text': [...], 'answer_start': [...]}}, not {answer!r:.60}"
        ) from None
    if not text:
        return np.array([0, 0])
    ends = record.char_to_token(start, 1), record.char_to_token(start + len(text) - 1, 1)
    return None if None in ends else np.array(ends)
