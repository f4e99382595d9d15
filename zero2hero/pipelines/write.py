"""Tasks that write: text-generation with decoders; text2text-generation, summarization, translation with T5 and kin."""

from __future__ import annotations

from typing import Any

from zero2hero.errors import UserError
from zero2hero.generate.beam import beam_search
from zero2hero.language_model import SETTINGS, LanguageModel, Parts
from zero2hero.pipelines.base import Pipeline, TextPipeline
from zero2hero.tokenizer.chat import extended, is_conversation


class TextGeneration(Pipeline):
    """[{"generated_text": ...}] for a text, or for a conversation, which comes back with its answer."""

    takes = 'a text or a conversation, a list of {"role": ..., "content": ...}'
    more_settings = tuple(SETTINGS)

    def __init__(self, parts: Parts | LanguageModel, task: str, settings: dict[str, Any]) -> None:
        super().__init__(parts, task, settings)
        self.lm = LanguageModel(self.model, parts.tokenizer, generation_config=parts.generation_config)

    def is_one(self, inputs: Any) -> bool:
        return isinstance(inputs, str) or is_conversation(inputs)

    def run(self, inputs: list[Any], *, return_full_text: bool = True, **settings: Any) -> list[list[dict[str, Any]]]:
        """Settings as for `LanguageModel.generate`; those not given come from generation_config.json."""
        texts = self.lm.continuations([self.lm.prompt_ids(one) for one in inputs], **settings)
        copies = len(texts) // len(inputs)
        if return_full_text:
            texts = [joined(inputs[row // copies], text) for row, text in enumerate(texts)]
        records = [{"generated_text": text} for text in texts]
        return [records[i : i + copies] for i in range(0, len(records), copies)]


def joined(prompt: Any, text: str) -> Any:
    """The whole text or conversation; an answer that the conversation ends with goes on."""
    if isinstance(prompt, str):
        return prompt + text
    last = prompt[-1]
    if last["role"] == "assistant":
        return [*prompt[:-1], {**last, "content": extended(last["content"], text)}]
    return [*prompt, {"role": "assistant", "content": text}]


class Text2Text(TextPipeline):
    """[{"generated_text": ...}]; summary_text and translation_text for the tasks of these names.

    A model's task_specific_params may name a prefix for the task ("summarize: ", "translate English to German: ") and
    settings of the search; generation_config.json names settings too.
    """

    def run(
        self, inputs: list[str], *, max_new_tokens: int | None = None, num_beams: int | None = None,
        length_penalty: float | None = None, early_stopping: bool | str | None = None, min_length: int | None = None,
        no_repeat_ngram_size: int | None = None, num_return_sequences: int = 1, prefix: str | None = None,
    ) -> list[list[dict[str, str]]]:  # fmt: skip
        """Settings as for `beam_search`; 256 new tokens and 4 beams unless somebody says otherwise.

        `min_length`: tokens that a text has at least, with the start token before it and without the end.
        """
        given = {"max_new_tokens": max_new_tokens, "num_beams": num_beams, "length_penalty": length_penalty,
                 "early_stopping": early_stopping, "min_length": min_length,
                 "no_repeat_ngram_size": no_repeat_ngram_size}  # fmt: skip
        known = self._task_params()
        chosen: dict[str, Any] = {"max_new_tokens": 256, "num_beams": 4}
        for source in (self.parts.generation_config, known, given):
            chosen |= {name: source[name] for name in given if source.get(name) is not None}
        chosen["min_new_tokens"] = max(0, chosen.pop("min_length", 0) - 1)
        prefix = known.get("prefix") or "" if prefix is None else prefix
        eos = self.model.config.eos_token_id
        found = beam_search(
            self.model, [self.tokenizer.encode(prefix + text) for text in inputs],
            num_return_sequences=num_return_sequences, eos_ids=eos if isinstance(eos, list) else [eos], **chosen,
        )  # fmt: skip
        name = {"summarization": "summary", "text2text-generation": "generated"}.get(self.task, "translation")
        return [[{f"{name}_text": self.tokenizer.decode(text.ids)} for text in texts] for texts in found]

    def together(self, results: list[Any]) -> Any:
        return [row[0] for row in results] if all(len(row) == 1 for row in results) else results

    def _task_params(self) -> dict[str, Any]:
        params = self.model.config.extra.get("task_specific_params") or {}
        pairs = [key for key in params if key.startswith("translation_")]
        if self.task == "translation" and len(pairs) > 1:
            raise UserError(f"translation between which languages? Name the task: {', '.join(pairs)}")
        return params.get(pairs[0] if self.task == "translation" and pairs else self.task) or {}
