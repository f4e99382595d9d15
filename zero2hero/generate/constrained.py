"""Text of a given form: JSON of a schema, what a regular expression matches, what a grammar derives.

Before each token, every token of the vocabulary that would leave the form is forbidden (Willard and Louf 2023, arXiv
2307.09702). Which these are, `llguidance` computes: a parser for the grammar walks the vocabulary as a tree of bytes,
so a token may hold the end of one part of the form and the beginning of the next. The end-of-text token is allowed
where the text is complete; a text that max_new_tokens cuts off is not.

    form = Constraint.json_schema(lm, {"type": "object", "properties": {"age": {"type": "integer"}}})
    engine.submit(Request(ids, SamplingParams(constraint=form)))
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from zero2hero.errors import UserError
from zero2hero.tokenizer import Tokenizer

if TYPE_CHECKING:
    from zero2hero.language_model import LanguageModel

_TOKENIZERS: WeakKeyDictionary[Tokenizer, tuple[list[int], Any]] = WeakKeyDictionary()
# as json.dumps writes: a model that may put white space anywhere can do so for ever
_JSON = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Constraint:
    """A form, ready for any number of texts of one model. Made by the class methods.

    Raises:
        UserError: what is given is no valid schema, expression or grammar, or too large; llguidance is not installed;
            or it does not know this kind of tokenizer.
    """

    def __init__(self, lm: LanguageModel, grammar: str) -> None:
        llguidance = _llguidance()
        self._tokenizer, self._grammar = _tokenizer(lm), grammar
        self._vocab_size = lm.model.config.vocab_size
        if error := llguidance.LLMatcher.validate_grammar(grammar, self._tokenizer):
            raise UserError(f"text cannot be constrained so: {' '.join(error.split())[:500]}")

    @classmethod
    def json_schema(cls, lm: LanguageModel, schema: Mapping[str, Any]) -> Constraint:
        """JSON that follows a schema, written with one space after commas and colons."""
        try:
            text = json.dumps(schema, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise UserError(f"a JSON schema is made of what JSON knows: {error}") from None
        if not isinstance(schema, Mapping):
            raise UserError(f"a JSON schema is an object, not {text[:40]}")
        return cls(lm, _llguidance().LLMatcher.grammar_from_json_schema(text, overrides=_JSON))

    @classmethod
    def json_object(cls, lm: LanguageModel) -> Constraint:
        """Any JSON object."""
        return cls.json_schema(lm, {"type": "object"})

    @classmethod
    def regex(cls, lm: LanguageModel, pattern: str) -> Constraint:
        """What a regular expression matches as a whole. (Rust's `regex`: no look-around, no back-references.)"""
        return cls(lm, _llguidance().LLMatcher.grammar_from_regex(pattern))

    @classmethod
    def grammar(cls, lm: LanguageModel, grammar: str) -> Constraint:
        """What a context-free grammar derives from `start`, in the notation of Lark as llguidance reads it."""
        return cls(lm, _llguidance().LLMatcher.grammar_from_lark(grammar))

    def start(self) -> Matcher:
        """The state of a new text."""
        return Matcher(_llguidance().LLMatcher(self._tokenizer, self._grammar, log_level=0), self._vocab_size)


class Matcher:
    """How far one text has come in its form."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size

    def allowed(self) -> Tensor:
        """[V] bool: the tokens that may come next; all of them when the form cannot go on (`advance` then says so)."""
        mask = torch.zeros(self._vocab_size, dtype=torch.bool)
        known = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)
        mask[: len(known)] = known[: self._vocab_size] > 0
        return mask if bool(mask.any()) else ~mask

    def advance(self, token_id: int) -> str | None:
        """One more token. Returns "stop" when the text is complete and nothing can follow, "length" when the form has
        become too large to go on with."""
        if not self._matcher.consume_token(token_id) or self._matcher.is_error():
            return "length"
        return "stop" if self._matcher.is_stopped() else None


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise UserError("constrained text needs llguidance: pip install 'zero2hero[serve]'") from None
    return llguidance


def _tokenizer(lm: LanguageModel) -> Any:
    """The vocabulary as llguidance keeps it, made once: it costs up to a second."""
    ends = sorted(lm.eos_ids)
    known, tokenizer = _TOKENIZERS.get(lm.tokenizer, (None, None))
    if known != ends:
        try:
            tokenizer = _llguidance().LLTokenizer(lm.tokenizer.raw.to_str(), eos_token=ends or None)
        except ValueError as error:
            raise UserError(f"text of this tokenizer cannot be constrained: {error}") from None
        _TOKENIZERS[lm.tokenizer] = ends, tokenizer
    return tokenizer
