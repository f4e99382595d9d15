"""Tokenizers in the formats from before `tokenizer.json`, as the `tokenizers` library's pipeline.

Many published models carry only the files of their first day: `vocab.txt` (BERT's WordPiece), `vocab.json` and
`merges.txt` (GPT-2's byte-level BPE, and CLIP's), `spiece.model` or `tokenizer.model` (SentencePiece). The vocabulary
does not say how text is prepared and which special tokens surround it; that is what the class named in
`tokenizer_config.json` stood for. So each class that is known has its few lines here, and an unknown one is an error,
never a guess. WordPiece: Schuster & Nakajima 2012, "Japanese and Korean voice search"; Wu et al. 2016, arXiv
1609.08144.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from zero2hero.errors import UserError, did_you_mean
from zero2hero.tokenizer import sentencepiece
from zero2hero.tokenizer.build import byte_level, surround, word_piece

Config = dict[str, Any]
OLDER_FILES = ("vocab.txt", "vocab.json", "merges.txt", "spiece.model", "tokenizer.model")


def read_older_files(folder: Path, config: Config, model_type: str) -> tuple[tokenizers.Tokenizer, Config] | None:
    """The tokenizer of a folder without `tokenizer.json`, and its configuration with the special tokens' roles.

    `model_type` (of config.json) tells the class where `tokenizer_class` does not. None when the folder holds no
    vocabulary that is known.

    Raises:
        UserError: a damaged file, or one whose class (`tokenizer_class`) is not known.
    """
    present = [name for name in OLDER_FILES if (folder / name).is_file()]
    if not present:
        return None
    named = str(config.get("tokenizer_class") or "").removesuffix("Fast")
    if not named:
        named = _OF_MODELS.get(model_type) or next((kind for name, kind in _USUAL.items() if name in present), "")
    if named not in _CLASSES:
        raise UserError(
            f"{folder} has {', '.join(present)} but no tokenizer.json, and tokenizer_config.json names the class "
            f"{named or 'of none'}: how it prepares text is not known here. Known: {', '.join(_CLASSES)}."
            f"{did_you_mean(named, _CLASSES)} Or convert it once with transformers' save_pretrained."
        )
    make, roles = _CLASSES[named]
    config = {role: token for role, token in roles.items() if token is not None} | config
    try:
        return make(folder, config), config
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"the tokenizer files of {folder} cannot be read: {error}") from None


def _bert(folder: Path, config: Config) -> tokenizers.Tokenizer:
    lines = (folder / "vocab.txt").read_text(encoding="utf-8").rstrip("\n").split("\n")
    vocab = {token.rstrip("\r"): i for i, token in enumerate(lines)}
    for role in ("unk_token", "cls_token", "sep_token"):
        if _role(config, role) not in vocab:
            raise UserError(f"{folder / 'vocab.txt'} has no {_role(config, role)}: is it BERT's kind of vocabulary?")
    raw = word_piece(
        models.WordPiece(vocab, unk_token=_role(config, "unk_token"), max_input_chars_per_word=100),
        lowercase=config.get("do_lower_case", True),
        strip_accents=config.get("strip_accents"),
        chinese_characters=config.get("tokenize_chinese_chars", True),
    )
    return _with_special_tokens(raw, config, "{cls_token} $A {sep_token}", "$B:1 {sep_token}:1")


def _merges(folder: Path) -> models.BPE:
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    wrong = next((line for line in pairs if len(line) != 2), None)
    if wrong:
        raise UserError(f"{folder / 'merges.txt'}: {' '.join(wrong)!r} is not a pair of tokens")
    return models.BPE(vocab, [(left, right) for left, right in pairs])


def _gpt2(folder: Path, config: Config) -> tokenizers.Tokenizer:
    raw = byte_level(_merges(folder), "gpt2")
    if config.get("add_prefix_space", False):  # the first word as if a space stood before it; the split is GPT-2's
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return _with_special_tokens(raw, config)


def _roberta(folder: Path, config: Config) -> tokenizers.Tokenizer:
    raw = _gpt2(folder, config)
    return _with_special_tokens(raw, config, "{cls_token} $A {sep_token}", "{sep_token} $B {sep_token}")


def _qwen2(folder: Path, config: Config) -> tokenizers.Tokenizer:
    raw = byte_level(_merges(folder), "qwen2")
    raw.normalizer = normalizers.NFC()
    return _with_special_tokens(raw, config)


def _clip(folder: Path, config: Config) -> tokenizers.Tokenizer:
    model = _merges(folder)
    model.unk_token, model.end_of_word_suffix = _role(config, "unk_token"), "</w>"
    raw = tokenizers.Tokenizer(model)
    raw.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    raw.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("</w>", " "), decoders.Strip(" ", 0, 1)])
    return _with_special_tokens(raw, config, "{bos_token} $A {eos_token}", "{eos_token} $B {eos_token}")


def _sentencepiece(folder: Path, name: str) -> tokenizers.Tokenizer:
    path = next(p for p in (folder / name, folder / "spiece.model", folder / "tokenizer.model") if p.is_file())
    return sentencepiece.build(sentencepiece.parse(path.read_bytes(), str(path)), str(path))


def _t5(folder: Path, config: Config) -> tokenizers.Tokenizer:
    raw = _sentencepiece(folder, "spiece.model")
    extra = int(config.get("extra_ids", 100))  # sentinels of span corruption, the last id is the first sentinel
    names = [f"<extra_id_{i}>" for i in reversed(range(extra))]
    raw.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])
    return _with_special_tokens(raw, config, "$A {eos_token}", "$B {eos_token}")


def _llama(folder: Path, config: Config) -> tokenizers.Tokenizer:
    raw = _sentencepiece(folder, "tokenizer.model")
    begin = "{bos_token} " if config.get("add_bos_token", True) else ""
    end = " {eos_token}" if config.get("add_eos_token", False) else ""
    return _with_special_tokens(raw, config, f"{begin}$A{end}", f"{begin}$B{end}")


def _plain_sentencepiece(folder: Path, config: Config) -> tokenizers.Tokenizer:
    return _sentencepiece(folder, "tokenizer.model")


def _with_special_tokens(
    raw: tokenizers.Tokenizer, config: Config, single: str = "", second: str = ""
) -> tokenizers.Tokenizer:
    """Register every role's token as special; surround texts as `single` and `second` say (see `surround`)."""
    named = [role for role, token in config.items() if role.endswith("_token") and isinstance(token, (str, dict))]
    roles = {role: _role(config, role) for role in named if _role(config, role)}
    raw.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in roles.values()])
    if single:
        surround(raw, [w.format(**roles) for w in single.split()], [w.format(**roles) for w in second.split()])
    return raw


def _role(config: Config, role: str) -> str:
    token = config.get(role)
    return (token.get("content") if isinstance(token, dict) else token) or ""


Make = Callable[[Path, Config], tokenizers.Tokenizer]
_END = "<|endoftext|>"
# class -> how it is made, and the special tokens that it has unless the configuration says otherwise
_CLASSES: dict[str, tuple[Make, dict[str, str | None]]] = {
    "BertTokenizer": (_bert, {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]",
                              "mask_token": "[MASK]"}),
    "GPT2Tokenizer": (_gpt2, {"unk_token": _END, "bos_token": _END, "eos_token": _END}),
    "RobertaTokenizer": (_roberta, {"bos_token": "<s>", "eos_token": "</s>", "sep_token": "</s>", "cls_token": "<s>",
                                    "unk_token": "<unk>", "pad_token": "<pad>", "mask_token": "<mask>"}),
    "Qwen2Tokenizer": (_qwen2, {"eos_token": _END, "pad_token": _END}),
    "CLIPTokenizer": (_clip, {"unk_token": _END, "bos_token": "<|startoftext|>", "eos_token": _END,
                              "pad_token": _END}),
    "T5Tokenizer": (_t5, {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}),
    "LlamaTokenizer": (_llama, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
    "GemmaTokenizer": (_llama, {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>",
                                "pad_token": "<pad>"}),
    "SentencePiece": (_plain_sentencepiece, {}),
}  # fmt: skip
_CLASSES["DistilBertTokenizer"] = _CLASSES["ElectraTokenizer"] = _CLASSES["BertTokenizer"]
_OF_MODELS = {
    "bert": "BertTokenizer", "gpt2": "GPT2Tokenizer", "roberta": "RobertaTokenizer", "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer", "clip": "CLIPTokenizer", "t5": "T5Tokenizer", "llama": "LlamaTokenizer",
    "mistral": "LlamaTokenizer", "mixtral": "LlamaTokenizer", "gemma": "GemmaTokenizer", "gemma2": "GemmaTokenizer",
    "gemma3_text": "GemmaTokenizer",
}  # fmt: skip
# what a folder that names neither holds, where its file leaves no doubt
_USUAL = {"vocab.txt": "BertTokenizer", "spiece.model": "T5Tokenizer", "tokenizer.model": "SentencePiece"}
