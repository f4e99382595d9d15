"""Labels for texts: text-classification, and zero-shot-classification with labels named at the moment.

Zero-shot classification (Yin et al. 2019, arXiv 1909.00161) asks a model that was trained on entailment whether the
text entails "This example is {label}.". A language model can be asked too: how likely is that sentence behind the text?
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from zero2hero.errors import UserError, did_you_mean
from zero2hero.language_model import LanguageModel
from zero2hero.pipelines.base import TextPipeline

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
    "none": lambda logits: logits,
}
_NOT_GIVEN: Any = object()


def label_scores(config: Any, logits_BC: Tensor, function: str | None) -> list[list[dict[str, Any]]]:
    """Each row of logits as [{"label", "score"}, ...], best first.

    `function` (softmax, sigmoid or none) makes scores of logits; by default the one that suits the model's problem.
    """
    kind = config.extra.get("problem_type")
    if function is None:
        several = kind != "multi_label_classification" and len(config.id2label) > 1
        function = "none" if kind == "regression" else "softmax" if several else "sigmoid"
    if function not in _FUNCTIONS:
        near = did_you_mean(str(function), _FUNCTIONS)
        raise UserError(f"function_to_apply is one of {', '.join(_FUNCTIONS)}, not {function!r}.{near}")
    rows = _FUNCTIONS[function](logits_BC).tolist()
    labelled = [[{"label": config.id2label[i], "score": score} for i, score in enumerate(row)] for row in rows]
    return [sorted(row, key=lambda label: label["score"], reverse=True) for row in labelled]


class TextClassification(TextPipeline):
    """{"label", "score"}: the best label; with top_k, a list of them, best first."""

    takes = 'a text or a pair {"text": ..., "text_pair": ...}'

    def is_one(self, inputs: Any) -> bool:
        if not isinstance(inputs, dict):
            return isinstance(inputs, str)
        return inputs.keys() in ({"text"}, {"text", "text_pair"}) and all(isinstance(t, str) for t in inputs.values())

    def run(
        self, inputs: list[str | dict[str, str]], *, top_k: int | None = _NOT_GIVEN,
        function_to_apply: str | None = None, truncation: bool = False,
    ) -> list[Any]:  # fmt: skip
        """`top_k`: how many labels; None gives all. `truncation`: shorten texts that are too long."""
        texts = [_text_or_pair(one) for one in inputs]
        batch = self.encode(texts, "longest_first" if truncation else None)
        results = label_scores(self.model.config, self.logits(batch), function_to_apply)
        return [row[0] if top_k is _NOT_GIVEN else row[:top_k] for row in results]

    def alone(self, one: Any, result: Any, given: dict[str, Any]) -> Any:
        return [result] if isinstance(one, str) and "top_k" not in given else result


def _text_or_pair(one: str | dict[str, str]) -> str | tuple[str, str]:
    if isinstance(one, str):
        return one
    return (one["text"], one["text_pair"]) if "text_pair" in one else one["text"]


def checked_labels(task: str, labels: str | Sequence[str], template: str) -> tuple[list[str], list[str]]:
    """The labels to choose from, given as a list or as one text with commas, and the sentence that each stands for.

    Raises:
        UserError: no label, something else than a text, or a template with no place for one.
    """
    found = [label.strip() for label in labels.split(",") if label.strip()] if isinstance(labels, str) else list(labels)
    if not found or not all(isinstance(label, str) for label in found):
        raise UserError(f"{task} needs candidate_labels, a list of texts to choose from")
    if "{}" not in template:
        raise UserError(f"hypothesis_template {template!r} has no place {{}} for the label")
    return found, [template.replace("{}", label) for label in found]


class ZeroShotClassification(TextPipeline):
    """{"sequence", "labels", "scores"} with the labels best first."""

    def __call__(self, inputs: Any, candidate_labels: str | Sequence[str] = (), **settings: Any) -> Any:
        """See `Pipeline`; `candidate_labels` are the labels to choose from, a list or one text with commas."""
        if candidate_labels:
            settings["candidate_labels"] = candidate_labels
        return super().__call__(inputs, **settings)

    def run(
        self, inputs: list[str], *, candidate_labels: str | Sequence[str] = (),
        hypothesis_template: str = "This example is {}.", multi_label: bool = False,
    ) -> list[dict[str, Any]]:  # fmt: skip
        """`multi_label`: each label is judged alone (entailed or contradicted), so scores need not add up to 1."""
        labels, hypotheses = checked_labels(self.task, candidate_labels, hypothesis_template)
        score = self._by_entailment if self.model.config.task == "sequence_classification" else self._by_likelihood
        results = []
        for text in inputs:
            scores = score(text, hypotheses, multi_label)
            best = sorted(range(len(labels)), key=lambda i: scores[i], reverse=True)
            results.append({"sequence": text, "labels": [labels[i] for i in best], "scores": [scores[i] for i in best]})
        return results

    def _by_entailment(self, text: str, hypotheses: list[str], multi_label: bool) -> list[float]:
        names = self.model.config.id2label
        entails = next((i for i, name in names.items() if name.lower().startswith("entail")), None)
        if entails is None:
            raise UserError(
                f"{self.task} needs a model of entailment; this one's labels are {', '.join(names.values())}"
            )
        logits = self.logits(self.encode([(text, hypothesis) for hypothesis in hypotheses], "only_first"))
        if multi_label or len(hypotheses) == 1:
            contradicts = len(names) - 1 if entails == 0 else 0
            return logits[:, [contradicts, entails]].softmax(-1)[:, 1].tolist()
        return logits[:, entails].softmax(-1).tolist()

    def _by_likelihood(self, text: str, hypotheses: list[str], multi_label: bool) -> list[float]:
        if multi_label:
            raise UserError("a language model compares the labels, it cannot judge each alone: leave multi_label out")
        lm = LanguageModel(self.model, self.tokenizer)
        scores = [lm.loglikelihood(text, f" {hypothesis}") for hypothesis in hypotheses]
        return torch.tensor(scores).softmax(-1).tolist()
