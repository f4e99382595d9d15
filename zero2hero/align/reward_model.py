"""A reward model: a decoder that reads a whole text and says how good it is, as one number.

    lm = load("runs/sft")
    model = with_score_head(lm.model)                               # a language model whose head is new: one score
    scores(model, lm.tokenizer, ["2 + 2 ="], [" 4"])                # tensor([0.03])

The head is a matrix [1, D] that is read at a text's last token, which alone has seen all of it (Stiennon et al. 2020,
arXiv 2009.01325, section 3.4). The model is an ordinary one of its family with one label, so files are those of
transformers' `...ForSequenceClassification`: what TRL's RewardTrainer wrote opens here, and what is saved here opens
there, with equal scores. With more labels it is any other classifier (models/decoder.py).

Padding is known by its place. transformers knows it by `pad_token_id` and so reads the last token that is another; a
text of which the last tokens are that very token is read before them here too.

N texts, T tokens, D width.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zero2hero.data.conversations import Turns
from zero2hero.data.pairs import padded
from zero2hero.errors import UserError
from zero2hero.generate.reader import evaluating
from zero2hero.language_model import load_parts
from zero2hero.models.decoder import Decoder, scoring
from zero2hero.models.heads import last_states
from zero2hero.tokenizer import Tokenizer
from zero2hero.tokenizer.chat import is_conversation

TOKENS = 8192  # of texts that are read together, padding included


def with_score_head(model: Decoder, tokenizer: Tokenizer | None = None, seed: int = 0) -> Decoder:
    """Turn a language model into one that scores texts, in place: its head is new, everything else is kept.

    Args:
        tokenizer: its padding token stands in config.json, for transformers to know padding by. One that also ends
            texts cannot: transformers would not read it where it is the last token of a text.
    """
    config: Any = model.config
    pad = tokenizer.pad_token_id if tokenizer else config.pad_token_id
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ends = [*ends, tokenizer.eos_token_id] if tokenizer else ends
    return scoring(model, None if pad in ends else pad, seed)


def load_reward_model(
    path_or_id: str | Path, device: str | torch.device = "auto", dtype: torch.dtype | str | None = None
) -> tuple[Decoder, Tokenizer]:
    """A reward model and its tokenizer, from a run, a Hugging Face directory or a hub id.

    Raises:
        UserError: nothing there, or a model that does not score texts with one number.
    """
    parts = load_parts(path_or_id, device, dtype)
    model = parts.model
    if not isinstance(model, Decoder) or len(model.config.id2label) != 1:
        labels = len(getattr(model.config, "id2label", ()))
        labelled = f" with {labels} labels" if labels else ""
        raise UserError(
            f"{path_or_id} is no reward model: it holds a {type(model).__name__}{labelled}, and a reward model is a "
            "decoder with one score (ForSequenceClassification, num_labels 1). `zero2hero reward` trains one."
        )
    return model.eval(), parts.tokenizer


def reward_function(path_or_id: str | Path, device: str | torch.device = "auto") -> Callable[..., list[float]]:
    """A reward model as a reward `f(prompts, completions)` (see rewards.py), loaded at once."""
    model, tokenizer = load_reward_model(path_or_id, device)

    def reward_model(prompts: Sequence[Any], completions: Sequence[Any]) -> list[float]:
        return scores(model, tokenizer, prompts, completions).tolist()

    return reward_model


def scores(model: Decoder, tokenizer: Tokenizer, prompts: Sequence[Any], completions: Sequence[Any]) -> Tensor:
    """How good each completion is as an answer to its prompt: [N], fp32, on the CPU.

    A text gets the same score alone and among others. One longer than the model's context loses its beginning, and a
    warning says how many did.

    Args:
        prompts, completions: N each: texts, lists of messages, or token ids, which are taken as they are.
    """
    texts = [whole_text(p, c, tokenizer) for p, c in zip(prompts, completions, strict=True)]
    return scores_of_ids(model, texts)


def whole_text(
    prompt: Turns | Sequence[int],
    completion: Turns | Sequence[int],
    tokenizer: Tokenizer,
    tools: list[Any] | None = None,
) -> list[int]:
    """A prompt and its completion as the tokens that the model reads: in its chat template, where there are messages.

    A text ends with the end-of-text token, as in training (data/examples.py).
    """
    if any(is_conversation(part) for part in (prompt, completion)):
        turns = [[{"role": role, "content": part}] if isinstance(part, str) else list(part)
                 for role, part in (("user", prompt), ("assistant", completion))]  # fmt: skip
        more: dict[str, Any] = {} if tools is None else {"tools": tools}
        return tokenizer.apply_chat_template([*turns[0], *turns[1]], **more)
    if not isinstance(prompt, str) or not isinstance(completion, str):
        first, second = (p if not isinstance(p, str) else tokenizer.encode(p) for p in (prompt, completion))
        return [int(i) for i in (*first, *second)]
    text, end = prompt + completion, tokenizer.eos_token_id
    begins = tokenizer.special_token("bos_token")
    ids = tokenizer.encode(text, add_special_tokens=begins is None or not text.startswith(begins))
    return [*ids, end] if end is not None and ids[-1:] != [end] else ids


def scores_of_ids(model: Decoder, texts: Sequence[Sequence[int] | np.ndarray]) -> Tensor:
    """The same of whole texts in tokens; see `scores`."""
    longest = model.config.max_position_embeddings
    if too_long := sum(len(text) > longest for text in texts):
        warnings.warn(f"{too_long} of {len(texts)} texts are longer than the reward model's context of {longest} "
                      "tokens: their beginning is left out", stacklevel=2)  # fmt: skip
    read = [read_part(model, text)[-longest:] for text in texts]
    if not all(len(text) for text in read):
        raise UserError("a text without a token cannot be scored: this tokenizer adds neither a begin nor an end")
    order = sorted(range(len(read)), key=lambda i: len(read[i]))
    result = torch.empty(len(read))
    device = next(model.parameters()).device
    with torch.inference_mode(), evaluating(model):
        while order:
            width = len(read[order[-1]])
            some = [order.pop() for _ in range(min(len(order), max(1, TOKENS // width)))]
            ids_BT, mask_BT = (torch.as_tensor(x, device=device) for x in padded([read[i] for i in some], 0))
            result[some] = scores_of_batch(model, ids_BT, mask_BT).cpu()
    return result


def read_part(model: Decoder, text: Sequence[int] | np.ndarray) -> np.ndarray:
    """A text up to the token at which its score is read: its last, but for padding tokens behind it."""
    ids, pad = np.asarray(text, dtype=np.int64), model.config.pad_token_id
    if pad is None or not len(ids):
        return ids
    return ids[: int(np.flatnonzero(ids != pad).max(initial=0)) + 1]


def scores_of_batch(model: Any, ids_BT: Tensor, attention_mask_BT: Tensor) -> Tensor:
    """The scores [B] in fp32 of texts padded on the right, with gradients: what training calls."""
    return model.logits(last_states(model(ids_BT), attention_mask_BT))[:, 0].float()
