"""Results about the tokens of a text: fill-mask, token-classification and feature-extraction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tokenizers
import torch
from torch import Tensor

from zero2hero.errors import UserError, did_you_mean
from zero2hero.models.heads import mean_pool
from zero2hero.pipelines.base import TextPipeline


class FillMask(TextPipeline):
    """[{"score", "token", "token_str", "sequence"}], best first; a list of these for each mask of several."""

    def run(self, inputs: list[str], *, top_k: int = 5, targets: str | Sequence[str] | None = None) -> list[Any]:
        """`targets`: choose among these words only; of a word in several pieces, its first stands for it."""
        mask = self.tokenizer.special_token("mask_token")
        if mask is None:
            raise UserError(f"{self.task}: the tokenizer has no mask_token")
        mask_id, batch = self.tokenizer.token_to_id(mask), self.encode(inputs)
        allowed = None if targets is None else self._ids([targets] if isinstance(targets, str) else targets)
        hidden, results = self.hidden(batch), []
        for text, part, states in zip(inputs, batch.parts, hidden):
            places = [i for i, token in enumerate(part.ids) if token == mask_id]
            if not places:
                raise UserError(f"{self.task}: no {mask} in {text[:60]!r}; write it where a word is to be filled in")
            probabilities = self.model.logits(states[places]).float().softmax(-1)
            rows = [self._best(row, part.ids, place, top_k, allowed, len(places) == 1)
                    for place, row in zip(places, probabilities)]  # fmt: skip
            results.append(rows[0] if len(rows) == 1 else rows)
        return results

    def together(self, results: list[Any]) -> Any:
        return results[0] if len(results) == 1 else results

    def _best(
        self, row: Tensor, ids: list[int], place: int, top_k: int, allowed: list[int] | None, alone: bool
    ) -> list[dict[str, Any]]:
        choices = torch.arange(len(row)) if allowed is None else torch.tensor(allowed)
        scores, best = row[choices.to(row.device)].topk(min(top_k, len(choices)))
        found = []
        for score, token in zip(scores.tolist(), choices[best.cpu()].tolist()):
            filled = [i for i in (*ids[:place], token, *ids[place + 1 :]) if i != self.tokenizer.pad_token_id]
            sequence = self.tokenizer.decode(filled, skip_special_tokens=alone)
            word = self.tokenizer.decode([token], skip_special_tokens=False)
            found.append({"score": score, "token": token, "token_str": word, "sequence": sequence})
        return found

    def _ids(self, words: Sequence[str]) -> list[int]:
        ids = set()
        for word in words:
            token = self.tokenizer.token_to_id(word)
            ids.update(self.tokenizer.encode(word, add_special_tokens=False)[:1] if token is None else [token])
        if not ids:
            raise UserError(f"{self.task}: targets is empty; name the words to choose from")
        return sorted(ids)


class FeatureExtraction(TextPipeline):
    """Hidden states as nested lists [1, T, D]; with pooling="mean", one vector of length 1 for the text."""

    def run(self, inputs: list[str], *, pooling: str | None = None, truncation: bool = False) -> list[Any]:
        if pooling not in (None, "mean"):
            raise UserError(f"pooling is 'mean' or None, not {pooling!r}")
        batch = self.encode(inputs, "longest_first" if truncation else None)
        hidden = self.hidden(batch).float()
        if pooling:
            return torch.nn.functional.normalize(mean_pool(hidden, batch.attention_mask_BT), dim=-1).tolist()
        return [[states[: len(part.ids)].tolist()] for states, part in zip(hidden, batch.parts)]


# --- labels of tokens -----------------------------------------------------------------------------------------

STRATEGIES = ("none", "simple", "first", "average", "max")


class TokenClassification(TextPipeline):
    """[{"entity", "score", "index", "word", "start", "end"}], or grouped {"entity_group", "score", "word", ...}.

    How tokens become entities: `none` gives each token's label. `simple` joins neighbours of one label (a B- begins a
    new entity). The others first give all pieces of a word one label: its first piece's, that of the best averaged
    scores, or that of the surest piece.
    """

    def run(
        self, inputs: list[str], *, aggregation_strategy: str = "none", ignore_labels: Sequence[str] = ("O",),
        truncation: bool = False, stride: int | None = None,
    ) -> list[list[dict[str, Any]]]:  # fmt: skip
        """`truncation`: leave out the end of a text that is too long. `stride`: read it in windows that share so many
        tokens, and of entities that overlap there keep the longest."""
        if aggregation_strategy not in STRATEGIES:
            near = did_you_mean(aggregation_strategy, STRATEGIES)
            raise UserError(
                f"aggregation_strategy is one of {', '.join(STRATEGIES)}, not {aggregation_strategy!r}.{near}"
            )
        if stride is None:
            windows = [[part] for part in self.encode(inputs, "longest_first" if truncation else None).parts]
        else:
            windows = [self._windows(text, stride, aggregation_strategy) for text in inputs]
        logits = iter(self.logits(self.pad([part for parts in windows for part in parts])))
        results = []
        for text, parts in zip(inputs, windows):
            found: list[dict[str, Any]] = []
            for part in parts:
                entities = self._entities(self._pieces(text, part, next(logits).softmax(-1)), aggregation_strategy)
                found += [e for e in entities if e.get("entity", e.get("entity_group")) not in ignore_labels]
            results.append(_without_overlaps(found) if len(parts) > 1 else found)
        return results

    def _windows(self, text: str, stride: int, aggregation_strategy: str) -> list[tokenizers.Encoding]:
        room = self.longest - self.tokenizer.raw.num_special_tokens_to_add(False)
        if not 0 <= stride < room:
            raise UserError(
                f"stride is from 0 to {room - 1}, so that a window has more tokens than it shares: {stride}"
            )
        if aggregation_strategy == "none":
            raise UserError("stride needs another aggregation_strategy than none: windows are joined by their entities")
        return self.cut(text, self.longest, stride=stride)

    def _entities(self, pieces: list[dict[str, Any]], strategy: str) -> list[dict[str, Any]]:
        """The entities of one window, or (strategy none) its tokens."""
        if strategy in ("none", "simple"):
            pieces = [p | self._label(p["scores"]) for p in pieces]
        else:
            pieces = [self._word(word, strategy) for word in _words(pieces)]
        if strategy == "none":
            order = ("entity", "score", "index", "word", "start", "end")
            return [{key: piece[key] for key in order} for piece in pieces]
        return [self._entity(group) for group in _groups(pieces)]

    def _pieces(self, text: str, part: tokenizers.Encoding, scores: Tensor) -> list[dict[str, Any]]:
        prefix = getattr(self.tokenizer.raw.model, "continuing_subword_prefix", None)
        pieces = []
        for i, (token, (start, end)) in enumerate(zip(part.tokens, part.offsets)):
            if part.special_tokens_mask[i]:
                continue
            if prefix:
                inside = len(token) != end - start
            else:  # no mark on the pieces of words: a piece is inside one unless a space touches its beginning
                inside = start > 0 and " " not in text[start - 1 : start + 1]
            if part.ids[i] == self.tokenizer.special_token_id("unk_token"):
                token, inside = text[start:end], False
            pieces.append({"word": token, "scores": scores[i], "start": start, "end": end, "index": i,
                           "inside": inside})  # fmt: skip
        return pieces

    def _label(self, scores: Tensor) -> dict[str, Any]:
        best = int(scores.argmax())
        return {"entity": self.model.config.id2label[best], "score": float(scores[best])}

    def _word(self, pieces: list[dict[str, Any]], strategy: str) -> dict[str, Any]:
        if strategy == "first":
            scores = pieces[0]["scores"]
        elif strategy == "max":
            scores = max(pieces, key=lambda piece: float(piece["scores"].max()))["scores"]
        else:
            scores = torch.stack([piece["scores"] for piece in pieces]).mean(0)
        word = self._join([piece["word"] for piece in pieces])
        return self._label(scores) | {"word": word, "start": pieces[0]["start"], "end": pieces[-1]["end"]}

    def _entity(self, group: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "entity_group": group[0]["entity"].split("-", 1)[-1],
            "score": sum(piece["score"] for piece in group) / len(group),
            "word": self._join([piece["word"] for piece in group]),
            "start": group[0]["start"],
            "end": group[-1]["end"],
        }

    def _join(self, tokens: list[str]) -> str:
        return self.tokenizer.raw.decoder.decode(tokens) if self.tokenizer.raw.decoder else " ".join(tokens)


def _words(pieces: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    words: list[list[dict[str, Any]]] = []
    for piece in pieces:
        if piece["inside"] and words:
            words[-1].append(piece)
        else:
            words.append([piece])
    return words


def _groups(pieces: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Neighbours whose labels name one entity; a label B-... begins a new one."""

    def tag(piece: dict[str, Any]) -> str:
        name = piece["entity"]
        return name[2:] if name[:2] in ("B-", "I-") else name

    groups: list[list[dict[str, Any]]] = []
    for piece in pieces:
        if groups and tag(groups[-1][-1]) == tag(piece) and not piece["entity"].startswith("B-"):
            groups[-1].append(piece)
        else:
            groups.append([piece])
    return groups


def _without_overlaps(entities: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of entities that overlap, as they do where two windows meet, the longest one, or the surest of the longest."""

    def weight(entity: dict[str, Any]) -> tuple[int, float]:
        return entity["end"] - entity["start"], entity["score"]

    kept: list[dict[str, Any]] = []
    for entity in sorted(entities, key=lambda entity: entity["start"]):
        if kept and entity["start"] < kept[-1]["end"]:
            kept[-1] = max(kept[-1], entity, key=weight)
        else:
            kept.append(entity)
    return kept
