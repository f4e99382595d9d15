"""Questions about stories whose answers stand in the story, in the shape of SQuAD's records.

record(0)   # {"question": "Who helped Toby?", "context": "...", "answers": {"text": [...], "answer_start": [...]}}
"""

from __future__ import annotations

from typing import Any

from zero2hero.data.worlds.base import BaseWorld, document_rng
from zero2hero.data.worlds.stories import story


class Questions(BaseWorld):
    """One question about each story of `stories`, whose plots of validation are not those of training."""

    name = "questions"

    def record(self, index: int, split: str = "train") -> dict[str, Any]:
        """Question number `index` of a split: a pure function of seed, split and index."""
        told, rng = story(index, split, self.seed), document_rng("questions", self.seed, split, index)
        low = told.text.lower()
        asked = [
            q for q in told.questions() if q.kind not in ("yesno", "order")
        ]  # the first one, the hero, is always there
        question = rng.choice(asked)
        start = low.index(question.answer.lower())
        answers = {"text": [told.text[start : start + len(question.answer)]], "answer_start": [start]}
        return {"question": question.question, "context": told.text, "answers": answers}

    def document(self, index: int, split: str = "train") -> str:
        record = self.record(index, split)
        return "\n".join([record["context"], record["question"], record["answers"]["text"][0]])
