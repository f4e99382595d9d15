"""One text, one list of ids: the readable BPE, the library, transformers, tiktoken, CS336's reference."""

from __future__ import annotations

import json
import random
import re
import unicodedata
from pathlib import Path

import pytest
from tokenizers import Regex, pre_tokenizers

from zero2hero.tokenizer import BPE, Tokenizer
from zero2hero.tokenizer.patterns import PATTERNS, bytes_to_token

DATA = Path(__file__).parents[3] / "shared" / "data"


def data(name: str) -> Path:
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return path


# Characters below U+1DF00 that Python's table knows: `regex` and the library follow different editions of
# Unicode, and most of what the later ones added lies above.
KNOWN = [c for c in map(chr, range(0x1DF00)) if unicodedata.category(c) not in ("Cn", "Cs")]


def random_texts(count: int, seed: int) -> list[str]:
    """Texts of every script, space and symbol, with the traps of the split patterns strewn in."""
    rng = random.Random(seed)
    traps = ["'ll", "'S", "'ſ", " ", "  ", "\n", "\r\n", "\t ", "1234567", "½", "...", " !?", "\u00a0", "\u2003",
             "\x85", "\x1c", "<|im_end|>", "é", "👩‍👧", "the", " and", "\x00"]  # fmt: skip
    blocks = [
        range(0x20, 0x7F),
        range(0xA0, 0x250),
        range(0x370, 0x700),
        range(0x4E00, 0x4F00),
        range(0x1F300, 0x1F650),
    ]

    def piece() -> str:
        kind = rng.random()
        if kind < 0.3:
            return rng.choice(traps)
        if kind < 0.8:
            block = rng.choice(blocks)
            return "".join(c for c in map(chr, rng.choices(block, k=3)) if unicodedata.category(c) != "Cn")
        return rng.choice(KNOWN)

    return ["".join(piece() for _ in range(rng.randint(0, 16))) for _ in range(count)]


TEXTS = random_texts(1000, seed=0)
CORPUS = [*random_texts(1500, seed=1), "the cat and the dog and the story of the sea " * 4]
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module", params=list(PATTERNS))
def both(request) -> tuple[BPE, Tokenizer]:
    """The readable and the fast tokenizer, trained on the same text."""
    own = BPE.train(CORPUS, 1500, request.param, SPECIAL)
    return own, Tokenizer.train(CORPUS, 1500, request.param)


def merges_and_vocab(tokenizer: Tokenizer) -> tuple[list[tuple[str, ...]], dict[str, int]]:
    model = json.loads(tokenizer.raw.to_str())["model"]
    return [tuple(merge) for merge in model["merges"]], model["vocab"]


def spelled(bpe: BPE) -> tuple[list[tuple[str, ...]], dict[str, int]]:
    merges: list[tuple[str, ...]] = [(bytes_to_token(left), bytes_to_token(right)) for left, right in bpe.merges]
    return merges, bpe.special_tokens | {bytes_to_token(token): i for token, i in bpe.vocab.items()}


def test_both_learn_the_same_merges_and_number_them_alike(both) -> None:
    own, fast = both
    assert len(own.merges) == 1500 - 256 - 5
    assert spelled(own) == merges_and_vocab(fast)


def test_1000_random_texts_have_the_same_ids_everywhere(both, tmp_path) -> None:
    from transformers import AutoTokenizer

    own, fast = both
    fast.save_pretrained(tmp_path, model_max_length=512)
    auto = AutoTokenizer.from_pretrained(tmp_path)
    assert len(auto) == fast.vocab_size
    assert (auto.bos_token_id, auto.eos_token_id, auto.pad_token_id) == (0, 1, 2)
    assert auto.model_max_length == 512
    expected = auto(TEXTS)["input_ids"]
    assert fast.encode_batch(TEXTS) == expected
    assert [[0, *own.encode(text)] for text in TEXTS] == expected
    assert Tokenizer.from_bpe(own, bos_token=SPECIAL[0]).encode_batch(TEXTS) == expected
    assert auto.batch_decode(expected, skip_special_tokens=True) == [fast.decode(ids) for ids in expected]
    assert auto.batch_decode(expected) == [own.decode(ids) for ids in expected]

    plain = auto(TEXTS, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert fast.encode_batch(TEXTS, add_special_tokens=False, split_special_tokens=True) == plain
    assert [own.encode(text, split_special_tokens=True) for text in TEXTS] == plain


def test_a_character_tokenizer_opens_in_transformers(tmp_path) -> None:
    from transformers import AutoTokenizer

    text = "First Citizen:\nSpeak, é 👍🏽  !\n\n"
    tokenizer = Tokenizer.train([text], kind="char")
    tokenizer.save_pretrained(tmp_path)
    auto = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer.encode(text * 3 + "<|im_end|>")
    assert ids == auto(text * 3 + "<|im_end|>")["input_ids"]
    assert len(ids) == 1 + 3 * len(text) + 1
    assert auto.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids) == text * 3


@pytest.mark.parametrize("cls", [r"\p{L}", r"\p{N}", r"\s"])
def test_the_two_regex_engines_draw_the_same_character_classes(cls: str) -> None:
    import regex

    removed = pre_tokenizers.Split(Regex(cls), behavior="removed").pre_tokenize_str("".join(KNOWN))
    kept = {character for piece, _ in removed for character in piece}
    assert kept == {character for character in KNOWN if not regex.match(cls, character)}


# ---------------------------------------------------------------- CS336: merges from a known corpus


def reference_merges() -> list[tuple[str, ...]]:
    lines = data("bpe_reference/train-bpe-reference-merges.txt").read_text().splitlines()
    return [tuple(line.split(" ")) for line in lines]


def test_the_reference_merges_of_cs336_are_reproduced(tmp_path) -> None:
    corpus = data("bpe_reference/corpus.en").read_text()
    vocab = json.loads(data("bpe_reference/train-bpe-reference-vocab.json").read_text())
    own = BPE.train([corpus], 500, "gpt2", ["<|endoftext|>"], tie_break="bytes")
    assert spelled(own) == (reference_merges(), vocab)

    fast = Tokenizer.from_bpe(own)  # the library with these merges
    assert merges_and_vocab(fast) == (reference_merges(), vocab)
    assert fast.encode(corpus) == own.encode(corpus)
    assert fast.encode_batch(TEXTS) == [own.encode(text) for text in TEXTS]


def test_the_library_trained_on_that_corpus_differs_from_it_by_ties_alone() -> None:
    """The library breaks ties by id and cannot be told otherwise; so does the readable one by default."""
    corpus = data("bpe_reference/corpus.en").read_text()
    fast = Tokenizer.train([corpus], 500, "gpt2", special_tokens=["<|endoftext|>"])
    own = BPE.train([corpus], 500, "gpt2", ["<|endoftext|>"], tie_break="ids")
    assert spelled(own) == merges_and_vocab(fast)
    shared = set(reference_merges()) & set(merges_and_vocab(fast)[0])
    assert len(shared) == 239  # of 243: the last places, where equally frequent pairs compete, go to others


# ---------------------------------------------------------------- tiktoken: published ranks, expected ids


def tiktoken_samples(encoding: str) -> list[tuple[str, list[int]]]:
    text = data("tok_tiktoken/TestPlans.txt").read_text(encoding="utf-8")
    plan = re.compile(r"EncodingName: (\S+)\nSample: (.*?)\nEncoded: \[(.*?)\]", re.DOTALL)
    return [
        (sample, [int(i) for i in ids.split(",") if i.strip()])
        for name, sample, ids in plan.findall(text)
        if name == encoding
    ]


@pytest.mark.parametrize(("encoding", "pattern", "size"), [("r50k", "gpt2", 50256), ("cl100k", "llama3", 100256)])
def test_tiktoken_ids_are_reproduced_by_both(encoding: str, pattern: str, size: int) -> None:
    own = BPE.from_tiktoken(data(f"tok_tiktoken/{encoding}_base.tiktoken"), pattern)
    assert own.vocab_size == size
    assert len(own.merges) == size - 256  # every token gave its merge back
    fast = Tokenizer.from_bpe(own)
    samples = tiktoken_samples(f"{encoding}_base")
    assert len(samples) == 64
    for sample, expected in samples:
        assert own.encode(sample) == expected
        assert fast.encode(sample) == expected
    assert fast.encode_batch(TEXTS) == [own.encode(text) for text in TEXTS]


def test_the_merges_recovered_from_gpt2_ranks_are_the_published_ones() -> None:
    own = BPE.from_tiktoken(data("tok_tiktoken/r50k_base.tiktoken"), "gpt2")
    lines = data("tok_gpt2/vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
    assert spelled(own)[0] == [tuple(line.split(" ")) for line in lines]


# ---------------------------------------------------------------- tokenizers published by others


def test_gpt2_as_published_equals_the_readable_one(tmp_path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(data("tok_gpt2/gpt2_tokenizer.json").read_bytes())
    published = Tokenizer.from_pretrained(tmp_path)
    own = BPE.from_tiktoken(data("tok_tiktoken/r50k_base.tiktoken"), "gpt2", {"<|endoftext|>": 50256})
    assert published.encode_batch(TEXTS) == [own.encode(text) for text in TEXTS]


def test_a_published_llama_style_tokenizer() -> None:
    """Its file, as transformers reads it without a model-specific class, on every text; and with one
    (`LlamaTokenizer`, which transformers 5 builds anew from the vocabulary) on ordinary prose,
    where no space is doubled and no character is unknown."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = data("tinystories656k")
    tokenizer = Tokenizer.from_pretrained(folder)
    as_filed = PreTrainedTokenizerFast.from_pretrained(folder)
    ids = tokenizer.encode_batch(TEXTS)
    assert ids == as_filed(TEXTS)["input_ids"]
    assert [tokenizer.decode(i, skip_special_tokens=False) for i in ids] == as_filed.batch_decode(ids)

    auto = AutoTokenizer.from_pretrained(folder)
    stories = data("tinystories/tinystories_sample.txt").read_text().split("<|endoftext|>")
    stories = [re.sub(r"\s+", " ", re.sub(r"[^ -~]", "", story)).strip() for story in stories]
    for story in stories:
        assert tokenizer.encode(story) == auto(story)["input_ids"]
        assert tokenizer.encode(story).count(1) == 1
        assert tokenizer.decode(tokenizer.encode(story)) == auto.decode(
            auto(story)["input_ids"], skip_special_tokens=True
        )
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    assert tokenizer.vocab_size == len(auto)


def test_special_tokens_that_only_the_configuration_names_are_added_alike(tmp_path) -> None:
    from transformers import AutoTokenizer

    Tokenizer.train(["some text"], 300).save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    roles = {
        "pad_token": "[PAD]",
        "mask_token": {"__type": "AddedToken", "content": "[MASK]", "special": True},
        "additional_special_tokens": ["<|tool|>"],
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | roles))
    auto, own = AutoTokenizer.from_pretrained(tmp_path), Tokenizer.from_pretrained(tmp_path)
    text = "some[PAD] <|tool|>[MASK]text"
    assert own.encode(text) == auto(text)["input_ids"]
    assert own.decode(own.encode(text)) == auto.decode(auto(text)["input_ids"], skip_special_tokens=True)
    assert (own.vocab_size, own.pad_token_id) == (len(auto), auto.pad_token_id)


@pytest.mark.parametrize("options", [{"add_eos_token": True}, {"add_bos_token": False}, {}])
def test_add_bos_token_in_the_configuration_means_what_transformers_means(tmp_path, options) -> None:
    from transformers import AutoTokenizer

    Tokenizer.train(["some text"], 300).save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | options))
    expected = AutoTokenizer.from_pretrained(tmp_path)("some text")["input_ids"]
    assert Tokenizer.from_pretrained(tmp_path).encode("some text") == expected
