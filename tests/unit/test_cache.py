"""The token cache is right, whole or not there; the validation split stays where it is."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zero2hero.data import cache as cache_module
from zero2hero.data.cache import TokenCache, split_documents, tokenize_to_cache
from zero2hero.data.sources import Source, open_source
from zero2hero.errors import UserError

SHARED = Path(__file__).parents[3] / "shared" / "data"


class Characters:
    """A tokenizer whose ids are code points, shifted by the two specials."""

    def __init__(self, bos: int | None = 0, eos: int | None = 1, vocab_size: int = 60_000, fingerprint: str = "c"):
        self.bos_token_id, self.eos_token_id = bos, eos
        self.vocab_size, self.fingerprint = vocab_size, fingerprint
        self.texts = 0

    def encode_batch(self, texts, add_special_tokens=True, split_special_tokens=False):
        assert not add_special_tokens
        assert split_special_tokens
        self.texts += len(texts)
        return [[ord(letter) + 2 for letter in text] for text in texts]


def source_of(texts, name="test", **options) -> Source:
    fingerprint = json.dumps([name, list(texts)])
    return Source(name, fingerprint, lambda: ((text, str(i)) for i, text in enumerate(texts)), **options)


def text_of(tokens) -> str:
    return "".join(chr(token - 2) for token in tokens if token > 1)


# --- the cache ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bos", "eos"), [(0, 1), (None, 1), (0, None), (None, None)])
def test_documents_come_back_framed(tmp_path, bos, eos):
    texts = ["one", "<|endoftext|> is text here", "thrée"]
    cache = tokenize_to_cache(source_of(texts), Characters(bos, eos), tmp_path)
    assert cache.num_documents == 3
    assert cache.dtype == np.uint16
    for index, text in enumerate(texts):
        expected = [ord(letter) + 2 for letter in text]
        expected = [bos] * (bos is not None) + expected + [eos] * (eos is not None)
        assert cache.document(index).tolist() == expected
    assert cache.num_tokens == sum(len(cache.document(i)) for i in range(3)) == len(cache.tokens)


def test_large_vocabularies_take_four_bytes(tmp_path):
    cache = tokenize_to_cache(source_of(["𝄞 clef"]), Characters(vocab_size=2**20), tmp_path)
    assert cache.dtype == np.uint32
    assert text_of(cache.document(0)) == "𝄞 clef"
    with pytest.raises(UserError, match="the tokenizer made id"):
        tokenize_to_cache(source_of(["𝄞"]), Characters(vocab_size=1000), tmp_path)


def test_second_time_nothing_is_tokenized(tmp_path):
    tokenizer = Characters()
    first = tokenize_to_cache(source_of(["a", "b"]), tokenizer, tmp_path)
    count = tokenizer.texts
    second = tokenize_to_cache(source_of(["a", "b"]), tokenizer, tmp_path)
    assert tokenizer.texts == count
    assert second.folder == first.folder


def test_other_text_or_tokenizer_is_another_cache(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("before")
    folders = {tokenize_to_cache(open_source(path), Characters(), tmp_path / "c").folder}
    folders.add(tokenize_to_cache(open_source(path), Characters(fingerprint="other"), tmp_path / "c").folder)
    path.write_text("after!")
    cache = tokenize_to_cache(open_source(path), Characters(), tmp_path / "c")
    assert text_of(cache.document(0)) == "after!"
    assert len(folders | {cache.folder}) == 3


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


@pytest.mark.parametrize("name", ["tokens.bin", "offsets.npy", "hashes.npy", "meta.json"])
@pytest.mark.parametrize("damage", [_truncate, Path.unlink, lambda path: path.write_bytes(b"")])
def test_a_damaged_cache_is_built_again(tmp_path, name, damage):
    texts = ["some text", "more"]
    folder = tokenize_to_cache(source_of(texts), Characters(), tmp_path).folder
    damage(folder / name)
    with pytest.raises(ValueError, match=r"."):
        TokenCache(folder)
    with pytest.warns(UserWarning, match="damaged"):
        cache = tokenize_to_cache(source_of(texts), Characters(), tmp_path)
    assert [text_of(cache.document(i)) for i in range(2)] == texts
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_a_fault_in_the_text_leaves_nothing(tmp_path):
    def records():
        yield "fine", "line 1"
        raise UserError("line 2: broken")

    with pytest.raises(UserError, match=r"^line 2: broken$"):
        tokenize_to_cache(Source("x", "x", records), Characters(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_text_that_the_tokenizer_refuses_is_located(tmp_path):
    class Narrow(Characters):
        def encode_batch(self, texts, **options):
            for number, text in enumerate(texts):
                if "?" in text:
                    raise UserError(f"text {number}: '?' is not in the vocabulary")
            return super().encode_batch(texts, **options)

    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ["yes", "no", "why?"]))
    with pytest.raises(UserError, match=r"a.jsonl, line 3: .*'\?' is not in the vocabulary"):
        tokenize_to_cache(open_source(path), Narrow(), tmp_path / "cache")


def test_killed_half_way_nothing_is_used(tmp_path):
    script = f"""
import sys, time
sys.path[:0] = {[str(Path(__file__).parent), str(Path(cache_module.__file__).parents[2])]!r}
from test_cache import Characters
from zero2hero.data.cache import tokenize_to_cache
from zero2hero.data.sources import Source
def records():
    for i in range(1500):
        yield f"text {{i}}", ""
    print("half", flush=True)
    time.sleep(60)
tokenize_to_cache(Source("x", "x", records), Characters(), {str(tmp_path)!r})
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"half\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = list(tmp_path.iterdir())
    assert all(path.name.startswith(".") for path in left)
    whole = Source("x", "x", lambda: ((f"text {i}", "") for i in range(3000)))
    assert tokenize_to_cache(whole, Characters(), tmp_path).num_documents == 3000


def test_leftovers_of_killed_runs_are_swept_after_a_week(tmp_path):
    folder = tokenize_to_cache(source_of(["a"]), Characters(), tmp_path).folder
    shutil.rmtree(folder)
    old, new = tmp_path / f".{folder.name}.old1", tmp_path / f".{folder.name}.new1"
    for path in (old, new):
        path.mkdir()
    os.utime(old, (time.time() - 8 * 24 * 3600,) * 2)
    tokenize_to_cache(source_of(["a"]), Characters(), tmp_path)
    assert not old.exists()
    assert new.exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write the token cache .*file.*ZERO2HERO_CACHE"):
        tokenize_to_cache(source_of(["a"]), Characters(), tmp_path / "file" / "below")


def test_nothing_to_tokenize(tmp_path):
    with pytest.raises(UserError, match="empty"):
        tokenize_to_cache(source_of([]), Characters(), tmp_path)


def test_texts_are_read_as_they_are_needed(tmp_path):
    """No more than a batch of texts lies in memory: at most that many were read since the last progress."""
    read, reports = [0], []

    def records():
        for index in range(5_500):
            read[0] += 1
            yield f"text {index}", ""

    tokenize_to_cache(
        Source("x", "x", records),
        Characters(),
        tmp_path,
        progress=lambda documents, tokens: reports.append((documents, tokens, read[0])),
    )
    assert all(seen - documents <= 1 for documents, _, seen in reports)
    assert [documents for documents, *_ in reports] == [1000, 2000, 3000, 4000, 5000, 5500]
    assert reports[-1][1] == sum(len(f"text {i}") + 2 for i in range(5_500))


# --- long documents -----------------------------------------------------------------------------------------


class Prefixing(Characters):
    """Puts a token before every text, as SentencePiece puts a space: pieces would show."""

    def encode_batch(self, texts, **options):
        return [[9, *ids] for ids in super().encode_batch(texts, **options)]


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text("ab1 \n.é", max_size=60), min_size=1, max_size=8), long=st.integers(2, 20))
def test_pieces_do_not_show(tmp_path, texts, long):
    texts = [text for text in texts if text] or ["x"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_module, "CHARACTERS_PER_PIECE", long)
        patch.setattr(cache_module, "CHARACTERS_PER_BATCH", 2 * long)
        for tokenizer, extra in ((Characters(), []), (Prefixing(), [9])):
            cache = tokenize_to_cache(source_of(texts), tokenizer, tmp_path / str(time.time_ns()))
            for index, text in enumerate(texts):
                assert cache.document(index).tolist() == [0, *extra, *(ord(c) + 2 for c in text), 1]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real data sets are not there")
@pytest.mark.parametrize("book", ["gutenberg/alice.txt", "sp_corpora/botchan.txt"])
@pytest.mark.parametrize("pattern", ["gpt2", "llama3"])
def test_pieces_do_not_show_with_byte_pairs(tmp_path, monkeypatch, book, pattern):
    """Cut into many pieces, a book has the tokens of the whole, for the split patterns of GPT-2 and Llama 3."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    llama3 = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = pre_tokenizers.Split(Regex(llama3), "isolated")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        if pattern == "llama3"
        else [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    text = open_source(SHARED / book).__iter__().__next__()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([text], trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet))

    class Wrapped(Characters):
        def encode_batch(self, texts, **options):
            self.texts += len(texts)
            return [encoding.ids for encoding in tokenizer.encode_batch(texts)]

    monkeypatch.setattr(cache_module, "CHARACTERS_PER_PIECE", 500)
    wrapped = Wrapped(None, None)
    cache = tokenize_to_cache(source_of([text]), wrapped, tmp_path)
    assert wrapped.texts > 100
    assert cache.document(0).tolist() == tokenizer.encode(text).ids


# --- the split ----------------------------------------------------------------------------------------------


def split_texts(texts, tmp_path, validation=0.1, seed=0, **tokenizer):
    cache = tokenize_to_cache(source_of(texts), Characters(**tokenizer), tmp_path)
    return tuple(
        [text_of(c.document(i)) for i in range(c.num_documents)] for c in split_documents(cache, validation, seed)
    )


def test_split_is_disjoint_whole_and_of_the_right_size(tmp_path):
    texts = [f"document {i}" for i in range(4000)]
    train, held_out = split_texts(texts, tmp_path)
    assert sorted(train + held_out) == sorted(texts)
    assert abs(len(held_out) - 400) < 4 * np.sqrt(4000 * 0.1 * 0.9)
    assert held_out != split_texts(texts, tmp_path, seed=1)[1]
    assert len(split_texts(texts, tmp_path, 7)[1]) == 7
    assert split_texts(texts, tmp_path, 0)[1] == split_texts(texts, tmp_path, 0.0)[1] == []


def test_split_stays_when_documents_are_added_reordered_or_copied(tmp_path):
    texts = [f"document {i}" for i in range(300)]
    held_out = set(split_texts(texts, tmp_path)[1])
    more = [f"new {i}" for i in range(200)]
    shuffled = [texts[i] for i in np.random.default_rng(0).permutation(300)]
    train_after, held_out_after = split_texts(more + shuffled + texts[:50], tmp_path)
    assert held_out <= set(held_out_after)
    assert not set(held_out_after) & set(train_after)
    assert set(held_out_after) - held_out <= set(more)


@given(st.integers(10, 30), st.integers(0, 2**70), st.sampled_from([0.001, 0.1, 0.999]))
@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_neither_side_is_ever_empty(tmp_path, count, seed, fraction):
    train, held_out = split_texts([f"document {i}" for i in range(count)], tmp_path, fraction, seed)
    assert train
    assert held_out


@pytest.mark.parametrize(("bos", "eos"), [(0, 1), (None, 1), (None, None)])
def test_one_document_is_cut_once(tmp_path, bos, eos):
    text = "".join(chr(97 + i % 26) for i in range(1003))
    cache = tokenize_to_cache(source_of([text]), Characters(bos, eos), tmp_path)
    train, held_out = split_documents(cache)
    cut = int(len(text) * 0.9)
    assert [token - 2 for token in held_out.document(0)] == [ord(letter) for letter in text[cut:]]
    assert text_of(train.document(0)) == text[:cut]
    assert train.num_tokens == cut + (bos is not None)


def test_few_documents_are_cut_once_too(tmp_path):
    assert split_texts(["a" * 50, "b" * 40, "c" * 10], tmp_path) == (["a" * 50, "b" * 40], ["c" * 10])
    assert split_texts(["a" * 50, "b" * 45, "c" * 5], tmp_path) == (["a" * 50, "b" * 40], ["b" * 5, "c" * 5])
    assert split_texts(["a" * 50, "b" * 45, "c" * 5], tmp_path, 1)[1] in (["a" * 50], ["b" * 45], ["c" * 5])


def test_wrong_fractions(tmp_path):
    for wrong in (1.0, -0.1, 3, 4, -1):
        with pytest.raises(UserError, match=r"validation is|documents for validation"):
            split_texts(["a", "b", "c"], tmp_path, wrong)


def test_a_mix_keeps_each_sources_own_division(tmp_path):
    made = source_of(["m1", "m2"], "made", validation=source_of(["held"], "made-validation"))
    book = source_of(["x" * 90 + "y" * 10], "book")
    many = source_of([f"document {i}" for i in range(50)], "many")
    mix = Source("mix", "mix", lambda: iter(()), None, (made, book, many))
    train, held_out = split_documents(tokenize_to_cache(mix, Characters(), tmp_path))
    texts = [[text_of(c.document(i)) for i in range(c.num_documents)] for c in (train, held_out)]
    assert texts[0][:3] == ["m1", "m2", "x" * 90]
    assert texts[1][:2] == ["held", "y" * 10]
    assert sorted(texts[0][3:] + texts[1][2:]) == sorted(many)
    alone = split_texts(list(many), tmp_path)
    assert texts[1][2:] == alone[1]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real data sets are not there")
def test_tiny_shakespeare_is_divided_as_everyone_does(tmp_path):
    source = open_source(SHARED / "tinyshakespeare" / "input.txt")
    text = (SHARED / "tinyshakespeare" / "input.txt").read_text()
    train, held_out = split_documents(tokenize_to_cache(source, Characters(), tmp_path))
    n = len(text)
    assert text_of(train.document(0)) == text[: int(n * 0.9)]
    assert text_of(held_out.document(0)) == text[int(n * 0.9) :]
    assert held_out.num_tokens == 111_540
    started = time.perf_counter()
    tokenize_to_cache(source, Characters(), tmp_path)
    assert time.perf_counter() - started < 0.1
