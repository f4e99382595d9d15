"""What all pipelines share: one input or many, in batches or as they come, and a check of what was asked for.

A pipeline is a model and one task. It takes one input and gives one result, takes a list and gives a list, or takes an
iterator and gives an iterator that reads only a batch ahead. Names and shapes of results are those of transformers'
pipelines, so that programs can change over.

B batch, T time.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tokenizers
import torch
from torch import Tensor

from zero2hero.errors import UserError, did_you_mean
from zero2hero.language_model import LanguageModel, Parts
from zero2hero.models.decoder import Decoder
from zero2hero.models.heads import last_states


class Pipeline:
    """Base of all tasks. `settings` are defaults for every call."""

    run: Callable[..., list[Any]]
    """A subclass's `run(inputs, *, setting=..., ...)` gives one result for each of a list of inputs."""

    takes = "a text"  # what one input is, for messages
    more_settings: tuple[str, ...] = ()  # those that `run` takes beside the ones it names

    def __init__(self, parts: Parts | LanguageModel, task: str, settings: dict[str, Any]) -> None:
        self.parts, self.task, self.settings = parts, task, settings
        self.model: Any = parts.model.eval()
        self._check_settings(settings)

    def __call__(self, inputs: Any, *, batch_size: int = 8, **settings: Any) -> Any:
        """Results for inputs: one for one, a list for a list, an iterator for an iterator.

        Raises:
            UserError: an input of the wrong kind, a setting that the task does not have, or a text that is too long.
        """
        self._check_settings(settings)
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise UserError(f"batch_size is a whole number of at least 1, not {batch_size!r}")
        if self.is_one(inputs):
            return self.alone(inputs, next(self._results([inputs], 1, settings)), settings)
        if isinstance(inputs, (list, tuple)):
            return self.together(list(self._results(inputs, batch_size, settings)))
        if isinstance(inputs, Iterable) and not isinstance(inputs, (str, bytes, Mapping)):
            return self._results(inputs, batch_size, settings)
        raise self._wrong(inputs)

    def is_one(self, inputs: Any) -> bool:
        """Whether this is a single input rather than a list of them."""
        return isinstance(inputs, str)

    def alone(self, one: Any, result: Any, given: dict[str, Any]) -> Any:
        """How the result of a single input is handed out; `given` are the settings of the call."""
        return result

    def together(self, results: list[Any]) -> Any:
        """How the results of a list are handed out."""
        return results

    def _results(self, inputs: Iterable[Any], batch_size: int, settings: dict[str, Any]) -> Iterator[Any]:
        waiting = iter(inputs)
        while group := list(itertools.islice(waiting, batch_size)):
            for one in group:
                if not self.is_one(one):
                    raise self._wrong(one)
            with torch.inference_mode():
                results = self.run(group, **self.settings | settings)
            yield from results

    def _wrong(self, one: Any) -> UserError:
        return UserError(f"an input of {self.task} is {self.takes}, not {type(one).__name__}")

    def _check_settings(self, settings: dict[str, Any]) -> None:
        named = [p.name for p in inspect.signature(self.run).parameters.values() if p.kind == p.KEYWORD_ONLY]
        known = [*named, *self.more_settings]
        for name in settings:
            if name not in known:
                near = did_you_mean(name, known)
                raise UserError(
                    f"{self.task} has no setting {name!r}.{near} It has {', '.join(['batch_size', *known])}"
                )

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


@dataclass
class Encoded:
    """Texts as an encoder reads them, padded on the right; `parts` holds the tokenizers library's own records."""

    ids_BT: Tensor
    attention_mask_BT: Tensor
    type_ids_BT: Tensor
    parts: list[tokenizers.Encoding]


class TextPipeline(Pipeline):
    """Base of the tasks in which a model reads whole texts."""

    def __init__(self, parts: Parts | LanguageModel, task: str, settings: dict[str, Any]) -> None:
        super().__init__(parts, task, settings)
        self.tokenizer = parts.tokenizer

    def encode(self, texts: Sequence[str | tuple[str, str]], truncation: str | None = None) -> Encoded:
        """Texts, or pairs of texts, as a batch.

        `truncation`: the strategy by which the tokenizers library shortens what is too long, "longest_first" say.

        Raises:
            UserError: a text longer than the model reads, when it may not be shortened, or one without a token.
        """
        raw, longest = self.tokenizer.raw, self.longest
        parts = raw.encode_batch(list(texts))
        for i, part in enumerate(parts):
            if not part.ids:
                raise UserError(f"{self.task}: a text is empty")
            if len(part.ids) > longest and truncation is None:
                raise UserError(f"{self.task}: a text has {len(part.ids)} tokens, the model reads {longest} at most; "
                                "shorten it, or use truncation=True where the task has it")  # fmt: skip
            if len(part.ids) > longest:
                parts[i] = self.cut(texts[i], longest, truncation)[0]
        return self.pad(parts)

    def cut(
        self, text: str | tuple[str, str], longest: int, strategy: str | None = "longest_first", stride: int = 0
    ) -> list[tokenizers.Encoding]:
        """A text, or a pair, in windows of `longest` tokens at most that share `stride` tokens with the one before."""
        raw = self.tokenizer.raw
        raw.enable_truncation(longest, stride=stride, strategy=strategy)
        try:
            whole = raw.encode_batch([text])[0]
        finally:
            raw.no_truncation()
        return [whole, *whole.overflowing]

    @property
    def longest(self) -> int:
        """Tokens that the model reads at most."""
        config = self.model.config
        return config.max_position_embeddings if isinstance(self.model, Decoder) else config.longest

    def pad(self, parts: list[tokenizers.Encoding]) -> Encoded:
        """Encodings of unequal length as one batch."""
        arrays = torch.zeros(3, len(parts), max(len(part.ids) for part in parts), dtype=torch.long)
        arrays[0] = self.tokenizer.pad_token_id or 0
        for i, part in enumerate(parts):
            arrays[:, i, : len(part.ids)] = torch.tensor([part.ids, [1] * len(part.ids), part.type_ids])
        ids, attention_mask, types = arrays.to(self.device)
        if getattr(self.model.config, "type_vocab_size", 1) == 1:  # RoBERTa has one kind of segment
            types = torch.zeros_like(types)
        return Encoded(ids, attention_mask, types, parts)

    def hidden(self, batch: Encoded) -> Tensor:
        """The model's last hidden states [B, T, D]."""
        if isinstance(self.model, Decoder):  # padding follows the text, so no token of the text sees it
            return self.model(batch.ids_BT)
        return self.model(batch.ids_BT, batch.attention_mask_BT, batch.type_ids_BT)

    def logits(self, batch: Encoded) -> Tensor:
        """What the model's head says, in fp32."""
        hidden = self.hidden(batch)
        if isinstance(self.model, Decoder):
            hidden = last_states(hidden, batch.attention_mask_BT)
        return self.model.logits(hidden).float()
