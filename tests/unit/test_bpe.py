"""The readable byte-pair encoding, against worked examples and against rules that need no referee."""

from __future__ import annotations

import base64
import itertools
import random
import time
from collections import Counter

import pytest

from zero2hero.errors import UserError
from zero2hero.tokenizer.bpe import BPE, learn_merges
from zero2hero.tokenizer.patterns import BYTE_TO_CHAR, bytes_to_token, split_pattern, token_to_bytes


def merges_of(words: dict[str, int], count: int, tie_break: str = "ids") -> list[str]:
    from zero2hero.tokenizer.bpe import _TIE_BREAKS

    learned = learn_merges(Counter({w.encode(): n for w, n in words.items()}), count, _TIE_BREAKS[tie_break])
    return [f"{left.decode()}+{right.decode()}" for left, right in learned]


def naive_merges(words: dict[bytes, int], count: int) -> list[tuple[bytes, bytes]]:
    """The definition: count every pair anew, take the most frequent, ties to the greater bytes."""
    spelled = {word: [word[i : i + 1] for i in range(len(word))] for word in words}
    merges = []
    for _ in range(count):
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for word, parts in spelled.items():
            for pair in itertools.pairwise(parts):
                pairs[pair] += words[word]
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for parts in spelled.values():
            i = 0
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == best:
                    parts[i : i + 2] = [best[0] + best[1]]
                i += 1
    return merges


def test_the_textbook_example() -> None:
    # Sennrich et al. 2016, figure 1, with the counts of CS336's worked example; ties to the greater pair
    words = {"low": 5, "lower": 2, "widest": 3, "newest": 6}
    assert merges_of(words, 6, "bytes") == ["s+t", "e+st", "o+w", "l+ow", "w+est", "n+e"]


def test_ties_go_to_lower_ids_by_default() -> None:
    assert merges_of({"xy": 3, "ab": 3}, 2, "ids") == ["a+b", "x+y"]
    assert merges_of({"xy": 3, "ab": 3}, 2, "bytes") == ["x+y", "a+b"]


@pytest.mark.parametrize("seed", range(30))
def test_incremental_counts_equal_counting_anew(seed: int) -> None:
    from zero2hero.tokenizer.bpe import _TIE_BREAKS

    rng = random.Random(seed)
    alphabet = b"ab" if seed % 2 else b"abcd "  # two letters: many overlaps such as aaaa and many ties
    words = {bytes(rng.choices(alphabet, k=rng.randint(1, 14))): rng.randint(1, 6) for _ in range(25)}
    assert learn_merges(Counter(words), 60, _TIE_BREAKS["bytes"]) == naive_merges(words, 60)


def test_a_word_is_merged_lowest_rank_first_then_leftmost() -> None:
    bpe = BPE([(b"a", b"a"), (b"aa", b"a"), (b"b", b"aa")])
    spelled = {i: token for token, i in bpe.vocab.items()}
    assert [spelled[i] for i in bpe.encode("aaaaa")] == [b"aa", b"aaa"]
    assert [spelled[i] for i in bpe.encode("baaa")] == [b"b", b"aaa"]  # aa first, then aa+a outranks b+aa


def test_a_small_corpus_yields_a_smaller_vocabulary() -> None:
    bpe = BPE.train(["ab ab"], vocab_size=4096)
    assert bpe.vocab_size == 256 + len(bpe.merges) == 258  # a+b, Ġ+ab


def test_no_merge_crosses_a_special_token_and_none_contains_it() -> None:
    bpe = BPE.train(["x<|end|>y"] * 50, 300, special_tokens=["<|end|>"])
    assert not bpe.merges
    assert bpe.encode("x<|end|>y").count(bpe.special_tokens["<|end|>"]) == 1
    ordinary = bpe.encode("x<|end|>y", split_special_tokens=True)
    assert bpe.special_tokens["<|end|>"] not in ordinary
    assert bpe.decode(ordinary) == "x<|end|>y"


def test_the_longest_special_token_wins() -> None:
    bpe = BPE([], special_tokens=["<|a|>", "<|a|><|b|>"])
    assert bpe.encode("<|a|><|b|><|a|>") == [1, 0]


def test_byte_characters_are_distinct_printable_and_reversible() -> None:
    assert len(set(BYTE_TO_CHAR)) == 256
    assert all(character.isprintable() and not character.isspace() for character in BYTE_TO_CHAR)
    assert token_to_bytes(bytes_to_token(bytes(range(256)))) == bytes(range(256))
    assert bytes_to_token(b" the\n") == "ĠtheĊ"


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("gpt2", ["I", "'ll", " pay", " 12345", "!", "\n", "\n", "x", " ", " y"]),
        ("llama3", ["I", "'ll", " pay", " ", "123", "45", "!\n\n", "x", " ", " y"]),
        ("qwen2", ["I", "'ll", " pay", " ", "1", "2", "3", "4", "5", "!\n\n", "x", " ", " y"]),
    ],
)
def test_split_patterns(pattern: str, words: list[str]) -> None:
    import regex

    text = "I'll pay 12345!\n\nx  y"
    assert regex.findall(split_pattern(pattern), text) == words


def test_one_very_long_word_takes_no_longer_than_its_length() -> None:
    bpe = BPE.train(["-" * 4096 + " ab"], 300)
    started = time.perf_counter()
    ids = bpe.encode("-" * 100_000)
    assert time.perf_counter() - started < 5  # quadratic merging would take minutes
    assert bpe.decode(ids) == "-" * 100_000


def test_reading_a_tiktoken_file(tmp_path) -> None:
    tokens = [bytes([b]) for b in range(256)] + [b"ab", b"abc", b"cd"]
    path = tmp_path / "small.tiktoken"
    path.write_bytes(b"\n".join(base64.b64encode(token) + b" %d" % i for i, token in enumerate(tokens)) + b"\n")
    bpe = BPE.from_tiktoken(path, special_tokens={"<|end|>": 300})
    assert bpe.merges == [(b"a", b"b"), (b"ab", b"c"), (b"c", b"d")]
    assert bpe.encode("abcd<|end|>") == [257, ord("d"), 300]
    assert bpe.decode([257, 300]) == "abc<|end|>"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: BPE.train(["a"], 256), "at least 257"),
        (
            lambda: BPE.train(["a"], 258, special_tokens=["<a>", "<b>", "<c>"]),
            r"at least 259 \(256 bytes \+ 3",
        ),
        (lambda: BPE.train([], 300), "no text"),
        (lambda: BPE.train(["", ""], 300), "no text"),
        (
            lambda: BPE.train(["fine", b"bytes"], 300),  # type: ignore[list-item]
            "document 1 is of type bytes",
        ),
        (lambda: BPE.train(["ok", "bad \ud83d"], 300), r"document 1 .*U\+D83D at index 4"),
        (lambda: BPE.train(["a"], 300, pattern="lama3"), "Did you mean 'llama3'"),
        (lambda: BPE.train(["a"], 300, tie_break="byte"), "Did you mean 'bytes'"),
        (lambda: BPE.train(["a"], 300, special_tokens=["<a>", "<a>"]), "listed twice"),
        (lambda: BPE.train(["a"], 300, special_tokens=["x"]), "too short"),
        (lambda: BPE.train(["a"], 300, special_tokens=["Ġthe"]), "b' the'"),
        (lambda: BPE([(b"a", b"bc")]), "b'bc'"),
        (lambda: BPE([], special_tokens={"<a>": 5}), "already"),
        (lambda: BPE([]).decode([1, 999]), "999"),
        (lambda: BPE([]).encode("\udc80"), r"U\+DC80"),
    ],
)
def test_bad_input_is_named(call, message) -> None:
    with pytest.raises(UserError, match=message):
        call()


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"YQ== 0\nnot base64 at all\n", "line 2"), (b"YQ== 0\n", "lacks 255"), (None, "cannot read")],
)
def test_broken_tiktoken_files(tmp_path, content, message) -> None:
    path = tmp_path / "x.tiktoken"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        BPE.from_tiktoken(path)
