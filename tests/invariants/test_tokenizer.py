"""What must hold for every text and every sequence of ids, whatever the tokenizer."""

from __future__ import annotations

import json
import pickle
import string

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from zero2hero.errors import UserError
from zero2hero.tokenizer import SPECIAL_TOKENS, StreamDecoder, Tokenizer

TEXT = (
    "Once upon a time, there was a café by the sea. It's 1,234 steps away! “Don't go,” said Zoë.\n\n"
    "Τι κάνεις; Привет, мир! 世界 مرحبا 👩‍👩‍👧 naïve\tyes\r\n"
) * 5
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
WITH_SPECIALS = st.lists(ANY_TEXT | st.sampled_from([*SPECIAL_TOKENS, "<|", "|>", " "])).map("".join)


def sentencepiece_style() -> Tokenizer:
    """Like Llama 2: a mark for spaces, a space put in front, rare characters as runs of byte tokens."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *string.ascii_letters]
    merges = [("h", "e"), ("▁", "a"), ("▁", "he"), ("l", "l"), ("▁", "▁")]
    vocab = {piece: i for i, piece in enumerate([*pieces, *("".join(merge) for merge in merges)])}
    raw = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    raw.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in pieces[:3]])
    return Tokenizer(raw, {"bos_token": "<s>", "eos_token": {"content": "</s>"}})


def metaspace() -> Tokenizer:
    vocab = {piece: i for i, piece in enumerate(["<pad>", "▁", "▁a", "▁▁", "b", "▁he", "llo", "."])}
    raw = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    raw.decoder = decoders.Metaspace()
    raw.add_special_tokens(["<pad>"])
    return Tokenizer(raw)


def wordpiece() -> Tokenizer:
    vocab = {piece: i for i, piece in enumerate(["[UNK]", "[CLS]", "he", "##llo", "un", "##able", ".", "n't", "do"])}
    raw = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.decoder = decoders.WordPiece()
    raw.add_special_tokens(["[CLS]"])
    return Tokenizer(raw)


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return Tokenizer.train([TEXT], 600)


ALL = {
    "bpe": lambda: Tokenizer.train([TEXT], 600),
    "gpt2 pattern": lambda: Tokenizer.train([TEXT], 300, pattern="gpt2", special_tokens=["<|日|>", "<|end|>"]),
    "char": lambda: Tokenizer.train([TEXT], kind="char"),
    "sentencepiece": sentencepiece_style,
    "metaspace": metaspace,
    "wordpiece": wordpiece,
}


@settings(max_examples=300, deadline=None)
@given(text=ANY_TEXT)
def test_decode_inverts_encode(bpe: Tokenizer, text: str) -> None:
    ids = bpe.encode(text, split_special_tokens=True)
    assert ids[0] == bpe.bos_token_id
    assert ids.count(bpe.bos_token_id) == 1  # exactly one
    assert bpe.decode(ids) == text


@pytest.mark.parametrize(
    "text",
    ["", "\x00\x00", "a\r\n\tb\u2028c ", "🏳️‍🌈👍🏽", "שלום\u202eabc", "\ufeffx\ufffd\uffff", "e\u0301é", "\U0010ffff"],
)
def test_awkward_texts_come_back(bpe: Tokenizer, text: str) -> None:
    assert bpe.decode(bpe.encode(text)) == text
    assert bpe.decode(bpe.encode(text * 3000)) == text * 3000


def test_a_long_text_without_spaces_comes_back(bpe: Tokenizer) -> None:
    text = "日a" * 50_000
    assert bpe.decode(bpe.encode(text)) == text


@settings(max_examples=100, deadline=None)
@given(text=WITH_SPECIALS)
def test_special_strings_in_documents_stay_text(bpe: Tokenizer, text: str) -> None:
    (ids,) = bpe.encode_batch([text], add_special_tokens=False, split_special_tokens=True)
    assert not bpe.all_special_ids & set(ids)
    assert bpe.decode(ids) == text
    with_specials = bpe.encode(text, add_special_tokens=False)
    assert bpe.decode(with_specials, skip_special_tokens=False) == text
    assert sum(i in bpe.all_special_ids for i in with_specials) == sum(text.count(t) for t in SPECIAL_TOKENS)


def test_a_batch_equals_its_texts_one_by_one(bpe: Tokenizer) -> None:
    texts = ["", "a<|im_end|>", TEXT]
    for options in ({}, {"add_special_tokens": False}, {"split_special_tokens": True}):
        assert bpe.encode_batch(texts, **options) == [bpe.encode(text, **options) for text in texts]


@pytest.mark.parametrize("name", ALL)
def test_streaming_equals_decoding(name: str) -> None:
    tokenizer = ALL[name]()
    if name == "gpt2 pattern":  # added tokens that are not bytes: one with a space, one that is not special
        tokenizer.raw.add_tokens([AddedToken("b c", special=False), AddedToken("日本", special=False)])
    top = tokenizer.raw.get_vocab_size() - 1
    ids_of = st.lists(st.integers(0, min(top, 270)) | st.integers(0, top + 3), max_size=24)

    @settings(max_examples=250, deadline=None)
    @given(ids=ids_of, skip=st.booleans())
    def check(ids: list[int], skip: bool) -> None:
        stream = StreamDecoder(tokenizer, skip_special_tokens=skip)
        assert "".join([stream.push(i) for i in ids] + [stream.finish()]) == tokenizer.decode(ids, skip)

    check()


STREAMED = {name: ALL[name]() for name in ("bpe", "sentencepiece")}


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.sampled_from("aZé日👩\u200d👧🏽 ب\n"), max_size=30))
@pytest.mark.parametrize("name", STREAMED)
def test_a_stream_never_shows_half_a_character(name: str, text: str) -> None:
    tokenizer = STREAMED[name]
    stream = StreamDecoder(tokenizer)
    parts = [stream.push(i) for i in tokenizer.encode(text)]
    assert not any("\ufffd" in part for part in parts)
    assert "".join([*parts, stream.finish()]) == text


def test_a_stream_keeps_nothing_but_a_small_window() -> None:
    for make in (ALL["bpe"], sentencepiece_style):
        tokenizer = make()
        stream = StreamDecoder(tokenizer)
        for i in tokenizer.encode("hello a " * 500):
            stream.push(i)
        assert len(stream._context) + len(stream._pending) <= 2
        assert stream._utf8.getstate()[0] == b""


@pytest.mark.parametrize("name", ["bpe", "char", "sentencepiece"])
def test_saving_and_loading_changes_nothing(name: str, tmp_path) -> None:
    tokenizer = ALL[name]()
    tokenizer.chat_template = "{{ messages }}\n"
    tokenizer.save_pretrained(tmp_path, model_max_length=512)
    again = Tokenizer.from_pretrained(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint
    assert again.chat_template == tokenizer.chat_template
    assert again.encode("he said\n a") == tokenizer.encode("he said\n a")
    for role in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(again, role) == getattr(tokenizer, role)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["model_max_length"] == 512
    again.save_pretrained(tmp_path / "twice")
    assert (tmp_path / "twice" / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
    assert json.loads((tmp_path / "twice" / "tokenizer_config.json").read_text()) == config


def test_a_pickled_tokenizer_still_splits_special_tokens(bpe: Tokenizer) -> None:
    options = {"add_special_tokens": False, "split_special_tokens": True}
    expected = bpe.encode("a<|im_end|>", **options)
    assert pickle.loads(pickle.dumps(bpe)).encode("a<|im_end|>", **options) == expected


def test_training_is_deterministic_and_the_fingerprint_tells_tokenizers_apart() -> None:
    one, two = (Tokenizer.train(iter([TEXT, TEXT[:99]]), 500) for _ in range(2))
    assert one.fingerprint == two.fingerprint
    assert one.fingerprint != Tokenizer.train([TEXT], 300).fingerprint
    assert one.fingerprint != Tokenizer.train([TEXT], 500, pattern="qwen2").fingerprint


def test_the_layout_of_ids() -> None:
    tokenizer = Tokenizer.train([TEXT], 300)
    assert [tokenizer.id_to_token(i) for i in range(5)] == list(SPECIAL_TOKENS)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)
    assert (tokenizer.token_to_id("!"), tokenizer.token_to_id("Ġ"), tokenizer.vocab_size) == (5, 225, 300)
    assert tokenizer.id_to_token(300) is None
    assert tokenizer.token_to_id("no such token") is None


def test_truncation_and_padding_in_a_published_file_do_not_cut_text(tmp_path, bpe: Tokenizer) -> None:
    raw = tokenizers.Tokenizer.from_str(bpe.raw.to_str())
    raw.enable_truncation(3)
    raw.enable_padding(length=50)
    raw.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.from_pretrained(tmp_path).encode(TEXT) == bpe.encode(TEXT)


def test_roles_that_have_no_token() -> None:
    tokenizer = Tokenizer.train([TEXT], 300, special_tokens=["<|endoftext|>"], eos_token="<|endoftext|>")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (None, 0, None)
    assert tokenizer.encode("a") == tokenizer.encode("a", add_special_tokens=False)


def test_older_folders_name_roles_elsewhere(tmp_path, bpe: Tokenizer) -> None:
    (tmp_path / "tokenizer.json").write_text(bpe.raw.to_str())
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|im_end|>"}, "pad_token": "[PAD]"}')
    templates = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.eos_token_id == 4
    assert (tokenizer.pad_token_id, tokenizer.vocab_size) == (
        bpe.vocab_size,
        bpe.vocab_size + 1,
    )  # named by the file only: added
    assert tokenizer.chat_template == "D"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: t.encode("\ud800"), r"U\+D800 at index 0"),
        (lambda t: t.encode_batch(["ok", "x\udfff"]), r"text 1 .*U\+DFFF"),
        (lambda t: t.encode(None), "NoneType"),
        (lambda t: t.encode_batch("abc"), "list of texts"),
        (lambda t: t.decode([5, -100]), "-100"),
        (lambda t: Tokenizer.train(["a"], 260), r"at least 261 \(256 bytes \+ 5 special"),
        (lambda t: Tokenizer.train(["a"], 256, special_tokens=[]), "at least 257"),
        (lambda t: Tokenizer.train([""]), "no text"),
        (lambda t: Tokenizer.train([], kind="char"), "no text"),
        (
            lambda t: Tokenizer.train(["a", 7]),  # type: ignore[list-item]
            "document 1 is of type int",
        ),
        (lambda t: Tokenizer.train(["a", "\udc00"]), "document 1 .*surrogate"),
        (lambda t: Tokenizer.train(["a"], kind="chars"), "Did you mean 'char'"),
        (lambda t: Tokenizer.train(["a"], pattern="gpt-2"), "Did you mean 'gpt2'"),
        (lambda t: Tokenizer.train(["abc"], 7, kind="char"), "3 different characters"),
        (lambda t: Tokenizer.train(["a"], bos_token="<s>"), "<s>"),
        (lambda t: Tokenizer.train(["ab\n"], kind="char").encode("a日"), r"'日' \(U\+65E5\) at index 1"),
    ],
)
def test_bad_input_is_named(bpe: Tokenizer, call, message) -> None:
    with pytest.raises(UserError, match=message):
        call(bpe)


def test_broken_folders_are_named(tmp_path, bpe: Tokenizer, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "my_model"
    folder.mkdir()
    (folder / "vocab.txt").write_text("[PAD]\n")
    with pytest.raises(UserError, match=r"vocab.txt has no \[UNK\]"):
        Tokenizer.from_pretrained(folder)
    with pytest.raises(UserError, match=r"no folder .*Did you mean 'my_model'"):
        Tokenizer.from_pretrained("./my_modl")
    with pytest.raises(UserError, match="is a file; give the folder"):
        Tokenizer.from_pretrained(folder / "vocab.txt")
    (folder / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(UserError, match=r"tokenizer.json is not a valid tokenizer"):
        Tokenizer.from_pretrained(folder)
    bpe.save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text('{\n"bos_token": ')
    with pytest.raises(UserError, match=r"tokenizer_config.json, line 2: not valid JSON"):
        Tokenizer.from_pretrained(folder)
    (folder / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"0": "<s>"}}')
    with pytest.raises(UserError, match=r"tokenizer_config.json: cannot understand its special tokens"):
        Tokenizer.from_pretrained(folder)
    (folder / "tokenizer_config.json").write_text("[]")
    with pytest.raises(UserError, match="expected a JSON object, found list"):
        Tokenizer.from_pretrained(folder)


def test_hub_models_come_through_the_hub_client_and_its_failures_are_named(
    tmp_path, bpe: Tokenizer, monkeypatch
) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    bpe.save_pretrained(tmp_path / "cache")
    monkeypatch.chdir(tmp_path)

    def download(repo: str, revision: str | None = None, allow_patterns: list[str] = []) -> str:  # noqa: B006
        if repo == "no-name/here":
            raise LocalEntryNotFoundError("offline")
        assert (repo, revision) == ("org/model", "v1")
        assert "tokenizer.json" in allow_patterns
        return str(tmp_path / "cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert Tokenizer.from_pretrained("org/model", "v1").fingerprint == bpe.fingerprint
    with pytest.raises(UserError, match="cannot be reached"):
        Tokenizer.from_pretrained("no-name/here")
