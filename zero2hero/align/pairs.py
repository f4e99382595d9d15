"""Answers to prompts as batches: several to one prompt, which is computed once.

A pair of answers begins with the same prompt. Side by side it is computed twice; instead the prompt stands in the row
once, and the answers follow as branches that see the prompt and themselves, not each other:

    row          p p p p | p' c c c | p' r r r r           the last token of the prompt, p', predicts two different
    position     0 1 2 3 | 4  5 6 7 | 4  5 6 7 8           first tokens, so it stands in each branch
    branch       0 0 0 0 | 1  1 1 1 | 2  2 2 2 2

This is exact: each token sees what it would see alone. Of prompts as long as the answers it saves a quarter of the
tokens: a step of a 12M model on two cores was 15 % faster with prompts half as long as the answers, 24 % in fp32
(bench/dpo.py). Where prompts are short, separate rows need less attention, and no mask: `SHARE_FROM` decides.
Short trees share a row with others, so that little is padding.

B rows, T time, N answers in the batch: of tree i those numbered 2 i and 2 i + 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zero2hero.data.batches import IGNORE, best_fit
from zero2hero.data.conversations import Record
from zero2hero.data.examples import encode_answer, encode_pair
from zero2hero.data.pairs import moved
from zero2hero.errors import UserError
from zero2hero.nn.logprobs import token_logprobs
from zero2hero.tokenizer import Tokenizer

SHARE_FROM = 0.25  # the prompt is shared where it is at least this share of the longer answer
_MULTIPLE = 8  # a batch is as wide as its fullest row, rounded up


@dataclass(frozen=True)
class Tree:
    """A prompt [P] and answers to it, int64. `liked`: of a single answer, what the rater said of it."""

    prompt: np.ndarray
    answers: tuple[np.ndarray, ...]
    number: int = 0
    liked: bool = True

    def __len__(self) -> int:
        """Inputs, with the prompt once."""
        return len(self.prompt) - 1 + sum(map(len, self.answers))


@dataclass
class Encoded:
    """The trees of many records, and what was cut or left out, by the names of the records."""

    trees: list[Tree] = field(default_factory=list)
    cut: int = 0
    too_long: list[str] = field(default_factory=list)
    same: list[str] = field(default_factory=list)

    def report(self, max_length: int) -> str:
        """What was cut or left out, as a sentence; empty when nothing was."""
        parts = [f"{self.cut} records are longer than max_length {max_length} and were cut"] if self.cut else []
        no_room = f"the prompt leaves no room for an answer in max_length {max_length}"
        for names, why in ((self.same, "chosen and rejected are the same"), (self.too_long, no_room)):
            if names:
                parts.append(f"{len(names)} left out for {why} (the first: {names[0]})")
        return "; ".join(parts)


def encode(records: Iterable[Record], tokenizer: Tokenizer, max_length: int, unpaired: bool = False) -> Encoded:
    """The trees of preference records; or, unpaired, a tree for each answer that was liked or not.

    Unpaired, each tree has a second answer, that to the prompt before: what KTO estimates the KL with.

    Raises:
        UserError: a record of another kind, or none that can be used.
    """
    found = Encoded()
    for record in records:
        if record.kind == "preference":
            pair = encode_pair(record, tokenizer)
            prompt, answers, liked = pair.prompt, [pair.chosen, pair.rejected], [True, False]
            if np.array_equal(answers[0], answers[1]):
                found.same.append(record.where)
                continue
        elif record.kind == "unpaired" and unpaired:
            (prompt, answer), liked = encode_answer(record, tokenizer), [bool(record.label)]
            answers = [answer]
        else:
            wants = "prompt, chosen and rejected" + (", or prompt, completion and label" if unpaired else "")
            hint = "; --loss_type kto learns from single answers" if record.kind == "unpaired" else ""
            raise UserError(f"{record.where}: this record ({record.shape}) holds no preference: it needs {wants}{hint}")
        room = max_length - len(prompt)
        if room < 1:
            found.too_long.append(record.where)
            continue
        found.cut += any(len(answer) > room for answer in answers)
        answers = [answer[:room] for answer in answers]
        if len(answers) == 2 and np.array_equal(answers[0], answers[1]):  # what differed was cut off
            found.same.append(record.where)
        elif unpaired:
            found.trees += [Tree(prompt, (a,), record.number, like) for a, like in zip(answers, liked)]
        else:
            found.trees.append(Tree(prompt, tuple(answers), record.number))
    if not found.trees:
        raise UserError(f"no preference to learn from: {found.report(max_length) or 'the data holds no record'}")
    return with_mismatched(found, max_length) if unpaired else found


def with_mismatched(found: Encoded, max_length: int) -> Encoded:
    """Every answer with one beside it that was given to another prompt, the one before in the data."""
    trees = found.trees
    before = [i - 1 if trees[i - 1].number != trees[i].number else i - 2 for i in range(len(trees))]
    others = [trees[i % len(trees)].answers[0] for i in before]
    made = [Tree(t.prompt, (t.answers[0], other[: max_length - len(t.prompt)]), t.number, t.liked)
            for t, other in zip(trees, others)]  # fmt: skip
    return Encoded(made, found.cut, found.too_long, found.same)


# --- batches ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AnswerBatch:
    """Rows of answers to prompts; arrays are numpy or (after `to`) torch.

    Attributes:
        ids_BT, targets_BT: targets are -100 where nothing is predicted.
        positions_BT, document_ids_BT, branch_ids_BT: see `Decoder.forward`; None where each row is one plain text.
        owner_BT: which answer a target is part of; N + i for the prompt of tree i, where that is to be imitated.
        share_BT: how much each target counts in its answer's sum (LD-DPO); None: all count once.
        tokens_N: how many tokens each answer has.
        reference_N: their log-probabilities under the reference, where it is known.
        liked: [N / 2], what was said of answers without a partner.
        nll_share: pairs over tokens to be imitated, of the whole step.
        numbers: the trees' places in the data.
    """

    ids_BT: Any
    targets_BT: Any
    owner_BT: Any
    tokens_N: Any
    positions_BT: Any = None
    document_ids_BT: Any = None
    branch_ids_BT: Any = None
    share_BT: Any = None
    reference_N: Any = None
    liked: Any = None
    nll_share: Any = None
    numbers: Any = None

    @property
    def num_tokens(self) -> int:
        """Inputs, padding included."""
        return self.ids_BT.shape[0] * self.ids_BT.shape[1]

    def to(self, device: Any) -> AnswerBatch:
        """The same batch as torch tensors on `device`."""
        return moved(self, device)


def answer_batch(
    trees: Sequence[Tree],
    *,
    share: bool | None = None,
    prompts: bool = False,
    ld_alpha: float | None = None,
    **more: Any,
) -> AnswerBatch:
    """Trees of two answers each, laid into rows as wide as the longest.

    Args:
        share: the prompt stands there once, or once for each answer; None: whichever is faster.
        prompts: prompts are predicted too (ORPO).
        ld_alpha: how much tokens count that are beyond the length of the shorter answer (LD-DPO, arXiv 2409.06411).
        more: further fields of the batch.
    """
    texts: list[tuple[int, list[int]]] = []  # (tree, its answers that stand together)
    for i, tree in enumerate(trees):
        longest = max(map(len, tree.answers))
        together = len(tree.prompt) > 1 + SHARE_FROM * longest if share is None else share
        texts += [(i, [0, 1])] if together else [(i, [0]), (i, [1])]
    lengths = np.array([len(trees[i].prompt) - 1 + sum(len(trees[i].answers[a]) for a in some) for i, some in texts])
    width = -(-int(lengths.max()) // _MULTIPLE) * _MULTIPLE
    order = np.argsort(-lengths, kind="stable")
    row, column = best_fit(lengths[order], width)
    shape = int(row.max()) + 1, width
    count = 2 * len(trees)
    ids, targets = np.zeros(shape, np.int64), np.full(shape, IGNORE, np.int64)
    owner = np.full(shape, count + len(trees), np.int64)  # of what nobody owns
    positions, documents, branches = (np.zeros(shape, np.int64) for _ in range(3))
    weights = np.ones(shape, np.float32)
    documents -= 1  # padding is a document by itself
    for text, r, begin in zip(order, row, column):
        i, some = texts[text]
        tree, trunk = trees[i], len(trees[i].prompt) - 1
        at = slice(begin, begin + trunk)
        ids[r, at], positions[r, at], documents[r, at] = tree.prompt[:-1], np.arange(trunk), text
        if prompts and 0 in some:
            targets[r, at], owner[r, at] = tree.prompt[1:], count + i
        for a in some:
            answer = tree.answers[a]
            at = slice(at.stop, at.stop + len(answer))
            ids[r, at] = [tree.prompt[-1], *answer[:-1]]
            targets[r, at], owner[r, at], documents[r, at] = answer, 2 * i + a, text
            positions[r, at] = trunk + np.arange(len(answer))
            branches[r, at] = a + 1 if len(some) > 1 else 0
            if ld_alpha is not None:
                weights[r, at.start + min(map(len, tree.answers)) : at.stop] = ld_alpha
    plain = len(texts) == shape[0] and not branches.any()  # what is left of a row stands behind all, unseen
    return AnswerBatch(
        ids, targets, owner, np.array([len(a) for tree in trees for a in tree.answers], np.float32),
        *((None, None, None) if plain else (positions, documents, branches if branches.any() else None)),
        **(more if ld_alpha is None else more | {"share_BT": weights}),
    )  # fmt: skip


def answer_logprobs(model: nn.Module, batch: AnswerBatch) -> tuple[Tensor, Tensor]:
    """The log-probability of each answer [N], counted as `share_BT` says; and plainly, with the trees' prompts behind.

    The second is [N + N / 2], its prompts 0 unless the batch asks for them. No tensor is larger than the hidden states
    (nn/logprobs.py).
    """
    more = {} if batch.branch_ids_BT is None else {"branch_ids": batch.branch_ids_BT}
    hidden = model(batch.ids_BT, positions=batch.positions_BT, document_ids=batch.document_ids_BT, **more)
    logprobs = token_logprobs(hidden, model.head_weight, batch.targets_BT)  # type: ignore[arg-type]
    count = len(batch.tokens_N)

    def sums(of_BT: Tensor) -> Tensor:
        zeros = of_BT.new_zeros(count + count // 2 + 1)
        return zeros.index_add(0, batch.owner_BT.flatten(), of_BT.flatten())[:-1]

    plain = sums(logprobs)
    return (plain if batch.share_BT is None else sums(logprobs * batch.share_BT))[:count], plain


@torch.no_grad()
def reference_logprobs(reference: Any, policy: nn.Module, batch: AnswerBatch) -> Tensor:
    """The same of the answers under the reference (align/reference.py)."""
    with reference(policy) as model:
        return answer_logprobs(model, batch)[0]
