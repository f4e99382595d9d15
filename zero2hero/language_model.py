"""A language model that is ready to use: weights, tokenizer and generation settings, in and out of a directory.

    lm = load("runs/quickstart")
    print(lm.generate("Once upon a time", max_new_tokens=64, temperature=0.8))
    save(lm, "out")

The directory is a Hugging Face model directory; a run's directory is one too.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, overload

import torch
from torch import Tensor, nn

from zero2hero.device import pick_device
from zero2hero.errors import UserError, did_you_mean
from zero2hero.fetch import find_folder
from zero2hero.generate.decode import events
from zero2hero.generate.sampling import SamplingConfig
from zero2hero.io import atomic_write, fsync_path, saving
from zero2hero.models.checkpoint import from_pretrained, read_json, remove_other_weights, save_pretrained
from zero2hero.models.decoder import Decoder, DecoderConfig, scoring
from zero2hero.tokenizer import Tokenizer
from zero2hero.tokenizer.chat import Message, is_conversation
from zero2hero.tune import adapted_modules, base_folder, is_adapter, load_adapter
from zero2hero.tune.interchange import CONFIG

if TYPE_CHECKING:
    from zero2hero.data.images import ImageProcessor
    from zero2hero.seeing import Eyes

SETTINGS = [f.name for f in dataclasses.fields(SamplingConfig)]
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_DTYPES = {
    "float32": torch.float32, "fp32": torch.float32, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
    "float16": torch.float16, "fp16": torch.float16,
}  # fmt: skip


@dataclass
class LanguageModel:
    """A model and its tokenizer.

    `config` is the model's. `generation_config` holds the contents of generation_config.json: defaults of the
    settings (names as in `SamplingConfig`) and `eos_token_id`, a number or a list.
    """

    model: Decoder
    tokenizer: Tokenizer
    config: DecoderConfig | None = None
    generation_config: dict[str, Any] = field(default_factory=dict)
    eyes: Eyes | None = None  # of one that sees (seeing.py)

    def __post_init__(self) -> None:
        self.config = self.config or self.model.config

    @property
    def eos_ids(self) -> frozenset[int]:
        """Every token that ends a text: of generation_config.json, or else of the model and the tokenizer."""
        given = self.generation_config.get("eos_token_id", self.model.config.eos_token_id)
        if given is None:
            given = self.tokenizer.eos_token_id
        return frozenset(given if isinstance(given, list) else [] if given is None else [given])

    @overload
    def generate(self, prompt: str, *, stream: bool | Callable[[str], object] = ..., **settings: Any) -> Any: ...
    @overload
    def generate(self, prompt: Sequence[str], **settings: Any) -> list[str]: ...

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        return_full_text: bool = True,
        stream: bool | Callable[[str], object] = False,
        batch_size: int = 32,
        **settings: Any,
    ) -> str | list[str]:
        """Continue a text, or several.

        Args:
            prompt: a text, or a list of texts, which are continued together.
            return_full_text: return the prompt and its continuation, or (False) the continuation alone.
            stream: True prints the text while it is made; a function is called with each new piece of it.
            batch_size: sequences in memory at a time.
            **settings: max_new_tokens, temperature (0: greedy), top_k, top_p, min_p, repetition_penalty, stop,
                seed, do_sample, num_return_sequences; see `SamplingConfig`.

        Returns:
            A text for a text; a list for a list, or with num_return_sequences above 1 (prompt by prompt).

        Raises:
            UserError: an unknown setting or one out of its range, or a prompt longer than the context.
        """
        copies = self.sampling_config(**settings).num_return_sequences
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if stream is True and return_full_text and len(prompts) == copies == 1:
            _print_piece(prompts[0])
        ids = [self.prompt_ids(text) for text in prompts]
        texts = self.continuations(ids, stream=stream, batch_size=batch_size, **settings)
        if return_full_text:
            texts = [prompts[row // copies] + text for row, text in enumerate(texts)]
        return texts[0] if isinstance(prompt, str) and copies == 1 else texts

    def chat(self, messages: Sequence[Message], **settings: Any) -> str:
        """The model's answer to a conversation, a list of {"role": ..., "content": ...}.

        A last message of the assistant's is continued. Settings (and `stream`) as for `generate`.

        Raises:
            UserError: no chat template came with the model, or it refuses the conversation; else as `generate`.
        """
        if settings.get("num_return_sequences") not in (None, 1):
            raise UserError("chat gives one answer: num_return_sequences must be 1")
        return self.continuations([self.prompt_ids(messages)], **settings | {"num_return_sequences": 1})[0]

    def prompt_ids(self, prompt: str | Sequence[Message]) -> list[int]:
        """A text, or a conversation to be answered, as the token ids that the model reads first."""
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt)
            return ids or [i for i in (self.tokenizer.bos_token_id,) if i is not None]
        begun = is_conversation(prompt) and prompt[-1]["role"] == "assistant"
        return self.tokenizer.apply_chat_template(prompt, add_generation_prompt=not begun, continue_final_message=begun)

    def continuations(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        embeddings: Sequence[Tensor] | None = None,
        stream: bool | Callable[[str], object] = False,
        batch_size: int = 32,
        **settings: Any,
    ) -> list[str]:
        """What follows each prompt of token ids, prompt by prompt; everything else is as for `generate`.

        `embeddings`: [T, D] for each prompt, what is read in place of its ids (where they hold images, say).
        """
        config = self.sampling_config(**settings)
        copies = config.num_return_sequences
        if stream and (len(prompts) != 1 or copies != 1):
            raise UserError(f"only one text can be streamed at a time, not {len(prompts) * copies}")
        show = stream if callable(stream) else _print_piece if stream else None
        texts = []
        group = max(1, batch_size // copies)
        for start in range(0, len(prompts), group):
            some = prompts[start : start + group]
            vectors = None if embeddings is None else embeddings[start : start + group]
            pieces: list[list[str]] = [[] for _ in range(len(some) * copies)]
            for row, piece in self._pieces(some, config, vectors):
                pieces[row].append(piece)
                if show and piece:
                    show(piece)
            texts += ["".join(parts) for parts in pieces]
        if stream is True:
            print()
        return texts

    def stream(self, prompt: str, **settings: Any) -> Iterator[str]:
        """The continuation of a text, piece by piece as it is made; settings as for `generate`."""
        config = self.sampling_config(**settings)
        if config.num_return_sequences > 1:
            raise UserError("only one text can be streamed at a time: num_return_sequences must be 1")
        return (piece for _, piece in self._pieces([self.prompt_ids(prompt)], config) if piece)

    def loglikelihood(self, prompt: str, continuation: str) -> float:
        """ln p(continuation | prompt) in nats, summed over the continuation's tokens.

        The two are tokenized together, and what counts begins at the first token that the prompt alone does not
        have: a tokenizer may join the end of the one with the beginning of the other.
        """
        before, whole = self.prompt_ids(prompt), self.prompt_ids(prompt + continuation)
        same = [a == b for a, b in zip(before, whole)]
        shared = same.index(False) if False in same else len(same)
        ids = torch.tensor([whole], device=self.model.embed_tokens.weight.device)
        longest = self.model.config.max_position_embeddings
        if ids.shape[1] > longest:
            raise UserError(f"the text has {ids.shape[1]} tokens; the model's context is {longest}")
        if not shared:
            raise UserError("the prompt is empty and this tokenizer adds no begin-of-text token: give it some text")
        training = self.model.training
        self.model.eval()
        with torch.inference_mode():
            hidden = self.model(ids)[0, shared - 1 : -1]
            logprobs = self.model.logits(hidden).float().log_softmax(-1)
        self.model.train(training)
        return float(logprobs.gather(-1, ids[0, shared:, None]).double().sum())

    def sampling_config(self, **settings: Any) -> SamplingConfig:
        """Settings: those given, else those of generation_config.json, else the defaults."""
        for name in settings:
            if name not in SETTINGS:
                raise UserError(f"unknown generation setting '{name}'.{did_you_mean(name, SETTINGS)}")
        given = {name: value for name, value in settings.items() if value is not None}
        defaults = {n: v for n, v in self.generation_config.items() if n in SETTINGS and v is not None}
        if "temperature" in given:  # asking for a temperature asks for sampling, unless it is 0
            defaults.pop("do_sample", None)
        return SamplingConfig(**(defaults | given))

    def _pieces(
        self, prompts: Sequence[Sequence[int]], config: SamplingConfig, embeddings: Sequence[Tensor] | None = None
    ) -> Iterator[tuple[int, str]]:
        """(row, text) as it is made."""
        return ((row, event.text) for event, row in events(self, prompts, config, embeddings))


def _print_piece(piece: str) -> None:
    print(piece, end="", flush=True)


def load(
    path_or_id: str | Path,
    device: str | torch.device = "auto",
    dtype: torch.dtype | str | None = None,
    *,
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
) -> LanguageModel:
    """Load a run, a Hugging Face directory or a hub id; or an adapter's, with the base that it names.

    Args:
        path_or_id: where it is.
        device: "auto" takes a GPU when there is one.
        dtype: of the weights ("float32", "bfloat16", "float16" or a torch dtype); as stored by default.
        load_in_4bit, load_in_8bit: the layers' matrices in NF4 or int8, and the rest in `dtype`. int8 reads fastest
            on a CPU.

    Raises:
        UserError: nothing there, files that do not fit together, or a device that is not available.
    """
    return language_model(load_parts(path_or_id, device, dtype, load_in_4bit=load_in_4bit, load_in_8bit=load_in_8bit))


def language_model(parts: Parts) -> LanguageModel:
    """The model of a folder as one that continues texts.

    Raises:
        UserError: it is of another kind.
    """
    if not isinstance(parts.model, Decoder) or parts.model.classifies:
        kind = "model that scores texts" if isinstance(parts.model, Decoder) else type(parts.model).__name__
        raise UserError(
            f"{parts.adapter or parts.directory} holds a {kind}, which does not continue texts; z2h.pipeline may have "
            "a use for it"
        )
    return LanguageModel(parts.model, parts.tokenizer, generation_config=parts.generation_config)


@dataclass
class Parts:
    """A model of whatever kind, and what lies beside it in its folder, read when it is first asked for."""

    directory: Path
    model: nn.Module
    adapter: Path | None = None  # the folder of the adapter on the model; what lies beside it there comes first

    @cached_property
    def tokenizer(self) -> Tokenizer:
        own = self._folder_with("tokenizer*")
        tokenizer, config = Tokenizer.from_pretrained(own), cast(Any, self.model.config)
        known: int = getattr(config, "text_config", config).vocab_size
        if tokenizer.vocab_size > known:
            raise UserError(
                f"{own}: the tokenizer has {tokenizer.vocab_size} tokens, the model knows {known}. "
                "They do not belong together."
            )
        return tokenizer

    @cached_property
    def image_processor(self) -> ImageProcessor:
        from zero2hero.data.images import ImageProcessor
        from zero2hero.data.tiles import TilingProcessor
        from zero2hero.models.idefics3 import Idefics3

        kind = TilingProcessor if isinstance(self.model, Idefics3) else ImageProcessor
        return kind.from_pretrained(self.directory)

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        path = self._folder_with("generation_config.json") / "generation_config.json"
        return read_json(path) if path.exists() else {}

    def _folder_with(self, pattern: str) -> Path:
        return self.adapter if self.adapter and any(self.adapter.glob(pattern)) else self.directory


def torch_dtype(name: torch.dtype | str | None) -> torch.dtype | None:
    """A precision by its name.

    Raises:
        UserError: an unknown one.
    """
    if not isinstance(name, str):
        return name
    if name not in _DTYPES:
        raise UserError(f"unknown dtype '{name}'; use {', '.join(_DTYPES)}.{did_you_mean(name, _DTYPES)}")
    return _DTYPES[name]


def load_parts(
    path_or_id: str | Path, device: str | torch.device, dtype: torch.dtype | str | None, **quantized: bool
) -> Parts:
    """Any model that is here or on the hub; see `load`."""
    dtype, chosen = torch_dtype(dtype), pick_device(device)
    directory = find_folder(path_or_id)
    if not is_adapter(directory):
        return Parts(directory, from_pretrained(directory, dtype=dtype, device=chosen, **quantized))
    base = base_folder(directory)
    model = from_pretrained(base, dtype=dtype, device=chosen, **quantized)
    scores = read_json(directory / CONFIG).get("task_type") == "SEQ_CLS"
    if scores and isinstance(model, Decoder) and not model.classifies:  # the adapter brings the head
        model = scoring(model, model.config.pad_token_id).eval()
    return Parts(base, load_adapter(model, directory), directory)


def with_adapters(lm: LanguageModel, folders: Mapping[str, str | Path]) -> dict[str, LanguageModel]:
    """Put adapters on the model, which goes on wearing what it wore; each comes back as the model that it makes of it.

    Args:
        lm: the base model, or one that an adapter is on already.
        folders: name -> folder or hub id of the adapter. The tokenizer there, if any, must be the model's; its chat
            template and generation_config.json are those of the adapter.

    Raises:
        UserError: an adapter of another base, or with another vocabulary.
    """
    worn = {module: module.active for module in adapted_modules(lm.model).values()}
    made = {}
    for name, folder in folders.items():
        parts = Parts(find_folder(folder), load_adapter(lm.model, folder, name), find_folder(folder))
        own = any(parts.directory.glob("tokenizer*"))
        tokenizer = parts.tokenizer if own else lm.tokenizer
        if tokenizer.fingerprint != lm.tokenizer.fingerprint:
            raise UserError(f"{folder}: the adapter's tokenizer is not the model's, so they cannot be served as one")
        made[name] = LanguageModel(lm.model, tokenizer, generation_config=parts.generation_config)
    for module in adapted_modules(lm.model).values():
        module.active = worn.get(module)
    return made


def save(lm: LanguageModel, directory: str | Path) -> None:
    """Write the model, tokenizer, generation settings and (where there is none) a model card.

    The files are made in a folder beside and then moved into place, so that an interrupted save leaves what was
    there. Other files of the directory (checkpoints, metrics) stay.

    Raises:
        UserError: no published architecture fits the model, or the directory cannot be written.
    """
    directory = Path(directory)
    with saving(directory):
        directory.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix=".saving.", dir=directory))
        try:
            save_pretrained(lm.model, staged)
            lm.tokenizer.save_pretrained(staged, model_max_length=lm.model.config.max_position_embeddings)
            atomic_write(staged / "generation_config.json", json.dumps(generation_config(lm), indent=2) + "\n")
            if not (directory / "README.md").exists():
                atomic_write(staged / "README.md", model_card(lm, directory.resolve().name))
            files = sorted(staged.iterdir())
            for file in files:
                os.replace(file, directory / file.name)
            remove_other_weights(directory, {file.name for file in files})
            fsync_path(directory)
        finally:
            shutil.rmtree(staged, ignore_errors=True)


def generation_config(lm: LanguageModel) -> dict[str, Any]:
    """The contents of generation_config.json: what was loaded, and the tokens that begin and end a text."""
    ids = {name: getattr(lm.model.config, name) for name in _TOKEN_IDS}
    ids = {name: i if i is not None else getattr(lm.tokenizer, name) for name, i in ids.items()}
    content = {"do_sample": True} | {name: i for name, i in ids.items() if i is not None} | lm.generation_config
    return dict(sorted(content.items()))


def model_card(lm: LanguageModel, name: str) -> str:
    """A minimal README.md with the front matter that the Hugging Face hub reads."""
    c = lm.model.config
    number = sum(p.numel() for p in lm.model.parameters())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- zero2hero
---

# {name}

A decoder-only language model with {number:,} parameters: {c.num_hidden_layers} layers of width {c.hidden_size},
{c.num_attention_heads} attention heads, a vocabulary of {c.vocab_size:,} tokens and a context of
{c.max_position_embeddings:,} tokens. Made with zero2hero.

```python
import zero2hero as z2h

lm = z2h.load("{name}")
print(lm.generate("Once upon a time", max_new_tokens=64, temperature=0.8))
```

transformers reads it as well: `AutoModelForCausalLM.from_pretrained("{name}")`.
"""
