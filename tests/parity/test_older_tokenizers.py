"""Tokenizers from before tokenizer.json, against the programs whose formats they are.

Referees: the sentencepiece library; llama.cpp's recorded ids for BERT's and GPT-2's vocabularies; transformers.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import string
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers

from zero2hero.data.worlds.stories import story
from zero2hero.errors import UserError
from zero2hero.tokenizer import Tokenizer
from zero2hero.tokenizer.build import train_unigram
from zero2hero.tokenizer.sentencepiece import build, parse

RANGES = [(32, 127), (32, 127), (160, 0x250), (0x370, 0x400), (0x3040, 0x30FF), (0x4E00, 0x4F00), (0x1F600, 0x1F640)]


def odd_texts(count: int = 300) -> list[str]:
    random_ = random.Random(0)
    texts = [
        "",
        " ",
        "Hello world",
        "  leading",
        "trailing  ",
        "a  b   c",
        "tabs\tand\nnewlines",
        "naïve ﬁ ½ cafe\u0301",
    ]
    for _ in range(count):
        low, high = random_.choice(RANGES)
        some = [chr(random_.randrange(low, high)) for _ in range(random_.randrange(1, 20))]
        texts.append("".join(c + " " * (random_.random() < 0.2) for c in some) + random_.choice(string.ascii_letters))
    return texts


def llama_cpp_cases(folder: Path, name: str) -> list[tuple[str, list[int]]]:
    texts = (folder / f"ggml-vocab-{name}.gguf.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    lines = (folder / f"ggml-vocab-{name}.gguf.out").read_text(encoding="utf-8").split("\n")
    cases = [(text, [int(i) for i in line.split()]) for text, line in zip(texts, lines)]
    assert len(cases) > 40
    return cases


_REFEREE = """
import json, sentencepiece, sys
model = sentencepiece.SentencePieceProcessor(sys.argv[1])
ids = [model.encode(text) for text in json.load(sys.stdin)]
print(json.dumps({"unknown": model.unk_id(), "ids": ids, "texts": [model.decode(i) for i in ids]}))
"""


@pytest.mark.parametrize("path", ["tok_t5/t5_spiece.model", "tok_sp/test_model.model", "stories260K/tok512.model"])
def test_ids_are_those_of_sentencepiece(shared_data, path):
    texts = odd_texts() + (shared_data / "tinyshakespeare/input.txt").read_text()[:30_000].split("\n\n")
    command = [sys.executable, "-c", _REFEREE, str(shared_data / path)]  # it brings an OpenMP of its own: a process too
    done = subprocess.run(command, input=json.dumps(texts), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    referee = json.loads(done.stdout)
    raw = build(parse((shared_data / path).read_bytes(), path), path)
    for text, ids, decoded in zip(texts, referee["ids"], referee["texts"], strict=True):
        assert raw.encode(text, add_special_tokens=False).ids == ids, repr(text)
        if referee["unknown"] not in ids:  # which sentencepiece shows as a sign of its own
            assert raw.decode(ids) == decoded


def test_t5_has_sentinels_at_the_end_and_closes_with_eos(shared_data, tmp_path):
    shutil.copy(shared_data / "tok_t5/t5_spiece.model", tmp_path / "spiece.model")
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.vocab_size == 32_100
    assert tokenizer.token_to_id("<extra_id_0>") == 32_099
    assert tokenizer.token_to_id("<extra_id_99>") == 32_000
    # the ids of t5-small's documentation: "Studies have been shown that owning a dog is good for you"
    ids = tokenizer.encode("Studies have been shown that owning a dog is good for you")
    assert ids == [6536, 43, 118, 2008, 24, 293, 53, 3, 9, 1782, 19, 207, 21, 25, 1]
    assert tokenizer.encode("<extra_id_0> cute dog")[0] == 32_099
    tokenizer.save_pretrained(tmp_path / "saved")
    assert Tokenizer.from_pretrained(tmp_path / "saved").encode("A cute dog") == tokenizer.encode("A cute dog")


def test_llama_begins_with_bos_and_the_configuration_decides(shared_data, tmp_path):
    shutil.copy(shared_data / "stories260K/tok512.model", tmp_path / "tokenizer.model")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    plain = Tokenizer.from_pretrained(tmp_path)
    assert plain.encode("Once upon a time")[0] == 1
    assert plain.decode(plain.encode("Once upon a time")) == "Once upon a time"
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false, "add_eos_token": true}')
    ids = Tokenizer.from_pretrained(tmp_path).encode("Once upon a time")
    assert ids == [*plain.encode("Once upon a time")[1:], 2]


def test_wordpiece_gives_the_ids_that_llama_cpp_recorded(shared_data, tmp_path):
    shutil.copy(shared_data / "tok_bert/bert-base-uncased-vocab.txt", tmp_path / "vocab.txt")
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    for text, ids in llama_cpp_cases(shared_data / "gguf_vocab", "bert-bge"):
        assert tokenizer.encode(text, add_special_tokens=False) == ids, repr(text)
    assert tokenizer.encode("hello") == [101, 7592, 102]
    assert tokenizer.raw.encode("hello", "world").type_ids == [0, 0, 0, 1, 1]


def test_gpt2_gives_the_ids_that_llama_cpp_recorded(shared_data, tmp_path):
    shutil.copy(shared_data / "tok_gpt2/encoder.json", tmp_path / "vocab.json")
    shutil.copy(shared_data / "tok_gpt2/vocab.bpe", tmp_path / "merges.txt")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    for text, ids in llama_cpp_cases(shared_data / "gguf_vocab", "gpt-2"):
        assert tokenizer.encode(text) == ids, repr(text)


@pytest.mark.parametrize("name", ["RobertaTokenizer", "CLIPTokenizer", "BertTokenizer"])
def test_ids_are_those_of_transformers(shared_data, tmp_path, name):
    import transformers

    if name == "BertTokenizer":
        lines = (shared_data / "tok_bert/bert-base-uncased-vocab.txt").read_text(encoding="utf-8")
        (tmp_path / "vocab.txt").write_text(lines, encoding="utf-8")
        vocab: dict = {"vocab": {token: i for i, token in enumerate(lines.rstrip("\n").split("\n"))}}
    else:
        vocab = write_merges(shared_data, tmp_path, clip=name == "CLIPTokenizer")
    referee = getattr(transformers, name)(**vocab)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    for text in odd_texts():
        assert tokenizer.encode(text) == referee(text)["input_ids"], repr(text)


def write_merges(shared_data: Path, folder: Path, clip: bool) -> dict:
    """vocab.json and merges.txt of CLIP (in the order of OpenAI's code) or of GPT-2 with RoBERTa's special tokens."""
    if clip:
        from tokenizers.pre_tokenizers import ByteLevel

        lines = gzip.decompress((shared_data / "tok_clip/bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode()
        merges = [tuple(line.split()) for line in lines.split("\n")[1 : 49152 - 256 - 2 + 1]]
        letters = sorted(ByteLevel.alphabet())
        tokens = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges)]
        tokens += ["<|startoftext|>", "<|endoftext|>"]
        vocab = {token: i for i, token in enumerate(tokens)}
    else:
        vocab = json.loads((shared_data / "tok_gpt2/encoder.json").read_text(encoding="utf-8"))
        lines = (shared_data / "tok_gpt2/vocab.bpe").read_text(encoding="utf-8").split("\n")
        merges = [tuple(line.split(" ")) for line in lines[1:] if line]
        special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        vocab = {token: i for i, token in enumerate([*special, *sorted(vocab, key=vocab.__getitem__)])}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    text = "".join(f"{left} {right}\n" for left, right in merges)
    (folder / "merges.txt").write_text("#version: 0.2\n" + text, encoding="utf-8")
    return {"vocab": vocab, "merges": merges}


# --- bad input ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content", [b"", b"\x00", b"not a model at all", b"\x0a\xff\xff\xff\xff\x0f", b"\x0a\x03\x0a\x01"]
)
def test_a_damaged_sentencepiece_file_is_one_clear_error(tmp_path, content):
    (tmp_path / "spiece.model").write_bytes(content)
    with pytest.raises(UserError, match=r"spiece\.model"):
        Tokenizer.from_pretrained(tmp_path)


def test_a_truncated_sentencepiece_file_is_an_error(shared_data, tmp_path):
    content = (shared_data / "tok_t5/t5_spiece.model").read_bytes()
    for size in (1000, 100_001, len(content) - 5):
        (tmp_path / "spiece.model").write_bytes(content[:size])
        with pytest.raises(UserError, match="damaged"):
            Tokenizer.from_pretrained(tmp_path)


def test_an_unknown_class_is_not_guessed(tmp_path):
    (tmp_path / "vocab.txt").write_text("[UNK]\na\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BirtTokenizer"}')
    with pytest.raises(UserError, match="BertTokenizer"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "vocab.txt").unlink()
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "merges.txt").write_text("a b c\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    with pytest.raises(UserError, match="a b c"):
        Tokenizer.from_pretrained(tmp_path)


# --- trained here ---------------------------------------------------------------------------------------------

TEXTS = [f"The {a} fox jumped over the {b} dog, and the dog was {a}." for a in ("quick", "slow", "lazy", "brown")
         for b in ("happy", "unhappy", "sleeping", "barking")]  # fmt: skip


@pytest.mark.parametrize("kind", ["wordpiece", "unigram"])
def test_trained_kinds_open_in_transformers_with_the_same_ids(tmp_path, kind):
    from transformers import AutoTokenizer

    tokenizer = Tokenizer.train(TEXTS, vocab_size=120 if kind == "wordpiece" else 220, kind=kind)
    tokenizer.save_pretrained(tmp_path)
    referee = AutoTokenizer.from_pretrained(tmp_path)
    for text in [*TEXTS, "An unheard-of word: zebra!", "", "  spaces  "]:
        ids = tokenizer.encode(text)
        assert ids == referee(text)["input_ids"]
        assert ids == Tokenizer.from_pretrained(tmp_path).encode(text)
    ids = tokenizer.encode(TEXTS[0])
    if kind == "wordpiece":
        assert [tokenizer.id_to_token(i) for i in (ids[0], ids[-1])] == ["[CLS]", "[SEP]"]
        assert tokenizer.decode(ids).startswith("the quick fox jumped over the happy dog")
    else:
        assert tokenizer.id_to_token(ids[-1]) == "</s>"
        assert tokenizer.decode(ids) == TEXTS[0]
        assert tokenizer.token_to_id("<extra_id_0>") == tokenizer.vocab_size - 1


LEARN = """
import sys
from zero2hero.data.worlds.stories import story
from zero2hero.tokenizer import Tokenizer
print(Tokenizer.train([story(i).text for i in range(60)], 500, kind=sys.argv[1]).raw.to_str())
"""


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram"])
def test_equal_texts_give_equal_tokenizers_in_every_process(kind):
    environments = [os.environ | {"PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": seed} for seed in ("1", "2")]
    learned = {
        subprocess.run([sys.executable, "-c", LEARN, kind], env=env, capture_output=True, text=True, check=True).stdout
        for env in environments
    }
    assert len(learned) == 1
    assert len(json.loads(learned.pop())["model"]["vocab"]) > 300


def test_unigram_pieces_are_as_good_as_the_library_s():
    """On held-out text, by the number of pieces and by their likelihood."""
    learn, held_out = ([story(i, split).text for i in range(n)] for n, split in ((200, "train"), (50, "validation")))
    ours = train_unigram(learn, 700, ["<pad>", "</s>", "<unk>"])
    theirs = tokenizers.Tokenizer(tokenizers.models.Unigram())
    theirs.normalizer, theirs.pre_tokenizer = ours.normalizer, ours.pre_tokenizer
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=700, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    theirs.train_from_iterator(learn, trainer)
    pieces, bits = [], []
    for raw in (ours, theirs):
        logprobs = dict(json.loads(raw.to_str())["model"]["vocab"])
        written = [token for encoding in raw.encode_batch(held_out) for token in encoding.tokens]
        pieces.append(len(written))
        bits.append(-sum(logprobs[token] for token in written))
    assert pieces[0] < 1.02 * pieces[1]
    assert bits[0] < 1.01 * bits[1]


def test_kinds_with_their_own_special_tokens_refuse_others():
    with pytest.raises(UserError, match="special tokens of its own"):
        Tokenizer.train(TEXTS, kind="wordpiece", special_tokens=["<a>"])
