"""question-answering: the span of a text that answers a question (Rajpurkar et al. 2016, arXiv 1606.05250).

The model scores every token as the beginning and as the end of the answer; the best pairs that are in order and not too
far apart are widened to whole words. A text that is too long is read in windows that overlap.
"""

from __future__ import annotations

from typing import Any

import tokenizers
import torch

from zero2hero.errors import UserError
from zero2hero.pipelines.base import TextPipeline

_WINDOW = 384  # tokens of question and text that are read at once


class QuestionAnswering(TextPipeline):
    """{"score", "start", "end", "answer"} for {"question": ..., "context": ...}; with top_k, a list of them."""

    takes = '{"question": ..., "context": ...}, neither of them empty'

    def __call__(self, inputs: Any = None, *, question: str | list[str] | None = None,
                 context: str | list[str] | None = None, **settings: Any) -> Any:  # fmt: skip
        """See `Pipeline`; question and context may also be given by name, each a text or a list of texts."""
        if inputs is None:
            questions = question if isinstance(question, list) else [question or ""]
            contexts = context if isinstance(context, list) else [context or ""]
            if len(contexts) == 1:
                contexts = contexts * len(questions)
            if len(contexts) != len(questions):
                raise UserError(f"{self.task}: {len(questions)} questions for {len(contexts)} contexts")
            inputs = [{"question": q, "context": c} for q, c in zip(questions, contexts)]
        if isinstance(inputs, list) and len(inputs) == 1:
            inputs = inputs[0]
        return super().__call__(inputs, **settings)

    def is_one(self, inputs: Any) -> bool:
        texts = [inputs.get(key) for key in ("question", "context")] if isinstance(inputs, dict) else [None]
        return all(isinstance(text, str) and text.strip() for text in texts)

    def run(
        self, inputs: list[dict[str, str]], *, top_k: int = 1, doc_stride: int | None = None,
        max_answer_len: int = 15, handle_impossible_answer: bool = False,
    ) -> list[Any]:  # fmt: skip
        """`top_k`: answers at most. `doc_stride`: tokens that windows share. `max_answer_len`: tokens of an answer.

        `handle_impossible_answer`: "" may be the answer.
        """
        if top_k < 1 or max_answer_len < 1:
            raise UserError(f"top_k and max_answer_len are at least 1, not {top_k} and {max_answer_len}")
        results = []
        for one in inputs:
            answers: dict[str, dict[str, Any]] = {}
            none = 1.0
            for window in self._windows(one["question"], one["context"], doc_stride):
                none = min(none, self._collect(window, one["context"], answers, 2 * top_k + 10, max_answer_len))
            found = list(answers.values())
            if handle_impossible_answer:
                found.append({"score": none, "start": 0, "end": 0, "answer": ""})
            found = sorted(found, key=lambda answer: answer["score"], reverse=True)[:top_k]
            results.append(found[0] if len(found) == 1 else found)
        return results

    def _windows(self, question: str, context: str, doc_stride: int | None) -> list[tokenizers.Encoding]:
        raw, longest = self.tokenizer.raw, min(_WINDOW, self.longest)
        asked = len(raw.encode(question, add_special_tokens=False).ids) + raw.num_special_tokens_to_add(True)
        room, shared = longest - asked, min(128, longest // 2) if doc_stride is None else doc_stride
        if room < 1 or shared < 0:
            raise UserError(f"{self.task}: the question has {asked} tokens, the model reads {longest} at a time, and "
                            f"windows share {shared}; there is no room for the context")  # fmt: skip
        return self.cut((question, context), longest, "only_second", shared if shared < room else room // 2)

    def _collect(
        self, window: tokenizers.Encoding, context: str, answers: dict[str, dict[str, Any]], at_most: int, longest: int
    ) -> float:
        """Add a window's best answers, spellings alike put together; how sure the model is that it has none."""
        logits = self.logits(self.pad([window]))[0].cpu()
        in_context = torch.tensor([i == 1 for i in window.sequence_ids])
        readable = in_context.clone()
        readable[0] = True  # the first token stands for "no answer"
        begin, end = logits.masked_fill(~readable[:, None], -10_000.0).softmax(0).unbind(-1)
        none = float(begin[0] * end[0])
        spans = (begin * in_context)[:, None] * (end * in_context)[None, :]
        best = spans.triu().tril(longest - 1).flatten().topk(min(at_most, spans.numel()))
        for score, place in zip(best.values.tolist(), best.indices.tolist()):
            first, last = divmod(place, len(window.ids))
            if in_context[first] and in_context[last]:
                start, stop = _whole_word(window, first)[0], _whole_word(window, last)[1]
                answer = {"score": 0.0, "start": start, "end": stop, "answer": context[start:stop]}
                answers.setdefault(context[start:stop].lower(), answer)["score"] += score
        return none


def _whole_word(window: tokenizers.Encoding, token: int) -> tuple[int, int]:
    """Where the word of a token begins and ends in the context."""
    word = window.token_to_word(token)
    found = None if word is None else window.word_to_chars(word, 1)
    return found or window.offsets[token]
