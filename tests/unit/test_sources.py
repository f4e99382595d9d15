"""What the user names becomes documents, and what cannot be read is said with its place."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zero2hero.data.sources import open_source
from zero2hero.errors import UserError

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("ZERO2HERO_CACHE", str(tmp_path_factory.mktemp("cache")))


def documents(path, **options) -> list[str]:
    return list(open_source(str(path), **options))


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_importing_is_light():
    modules = "zero2hero.data.sources, zero2hero.data.batches"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules or 'datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0


# --- plain text ---------------------------------------------------------------------------------------------


def test_text_without_the_marker_is_one_document_kept_to_the_letter(tmp_path):
    text = "\n First line.\n\n\nSecond paragraph, é 𝄞.\n\n"
    assert documents(write(tmp_path / "a.txt", text)) == [text]


def test_marker_separates_documents_and_blank_ones_are_dropped(tmp_path):
    path = write(tmp_path / "a.txt", "\none\n<|endoftext|>\ntwo\n\nlines<|endoftext|> \n <|endoftext|>three")
    assert documents(path) == ["one", "two\n\nlines", "three"]


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(-40, 40), st.integers(1, 3))
def test_marker_and_long_characters_may_straddle_read_chunks(tmp_path, shift, chunks):
    first = "𝄞" + "x" * (chunks * 2**20 + shift) + "é"
    path = write(tmp_path / "a.txt", first + "<|endoftext|>" + "second<|endoftext|>")
    assert documents(path) == [first, "second"]


def test_byte_order_mark_and_windows_line_ends(tmp_path):
    path = write(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert documents(path) == ["one\ntwo\n"]
    rows = b'\xef\xbb\xbf{"text": "one"}\r\n{"text": "two\\r\\n"}\r\n'
    assert documents(write(tmp_path / "a.jsonl", rows)) == ["one", "two\r\n"]
    assert documents(write(tmp_path / "a.csv", b"\xef\xbb\xbftext,n\r\nhello,1\r\n")) == ["hello"]


@pytest.mark.parametrize(("content", "offset"), [(b"good\nbad \xff\xfe here", 9), (b"good\n\0", 5)])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.unknown"])
def test_binary_data_is_refused_with_its_byte(tmp_path, content, offset, name):
    if name == "a.jsonl":
        content = content.replace(b"good", b'"go"')
    with pytest.raises(UserError, match=rf"not plain text: at byte {offset},"):
        documents(write(tmp_path / name, content))


def test_utf16_is_named(tmp_path):
    with pytest.raises(UserError, match="UTF-16"):
        documents(write(tmp_path / "a.txt", "hello".encode("utf-16")))


# --- records ------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(
            lambda text: text.strip() and "\0" not in text
        ),
        min_size=1,
    )
)
def test_jsonl_json_and_csv_give_back_any_text(tmp_path, texts):
    import csv

    lines = "\n".join(json.dumps({"id": 1, "text": text}, ensure_ascii=True) for text in texts)
    assert documents(write(tmp_path / "a.jsonl", lines)) == texts
    assert documents(write(tmp_path / "lines.json", lines)) == texts
    assert documents(write(tmp_path / "a.json", json.dumps({"version": 1, "data": texts}))) == texts
    plain = [text.replace("\r", " ") for text in texts]
    plain = [text for text in plain if text.strip()]
    if plain:
        with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(["id", "text"])
            writer.writerows([7, text] for text in plain)
        assert documents(tmp_path / "a.csv") == plain


@pytest.mark.parametrize(("suffix", "pack"), [("gz", gzip), ("bz2", bz2), ("xz", lzma)])
def test_compressed_files(tmp_path, suffix, pack):
    whole = pack.compress(b'{"text": "one"}\n{"text": "two"}\n' * 500)
    assert documents(write(tmp_path / f"a.jsonl.{suffix}", whole)) == ["one", "two"] * 500
    with pytest.raises(UserError, match="damaged"):
        documents(write(tmp_path / f"b.jsonl.{suffix}", whole[: len(whole) // 2]))


def test_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"n": [1, 2], "story": ["once", "upon"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert documents(tmp_path / "a.parquet") == ["once", "upon"]
    with pytest.raises(UserError, match=r"no column 'storry'. Did you mean 'story'\? Columns: 'n', 'story'"):
        documents(tmp_path / "a.parquet", text_column="storry")
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        documents(write(tmp_path / "b.parquet", b"PAR1 not really"))


def test_words_that_table_readers_take_for_missing_values_stay(tmp_path):
    path = write(tmp_path / "a.csv", "text,n\nNA,1\nnull,2\n007,3\n")
    assert documents(path) == ["NA", "null", "007"]


def test_a_cell_longer_than_the_csv_default(tmp_path):
    assert documents(write(tmp_path / "a.csv", "text,n\n" + "x" * 200_000 + ",1\n")) == ["x" * 200_000]


def test_tsv_has_no_quotes_and_may_lack_a_header(tmp_path):
    path = write(tmp_path / "a.tsv", 'a "quoted start\t1\n"b\t0\n')
    assert documents(path, text_column="1") == ['a "quoted start', '"b']
    with pytest.raises(UserError, match=r"line 1: not a line of column names.*--text_column 1"):
        documents(path)


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"title": "t", "text": "x"}, "text"),
        ({"text": None, "label": "x"}, "text"),
        ({"label": 1, "review": "x"}, "review"),
        ({"id": "12", "review": "x"}, "review"),
    ],
)
def test_the_text_column_is_found(tmp_path, row, column):
    good = {**row, column: "here"}
    lines = json.dumps(row) + "\n" + json.dumps(good)
    path = write(tmp_path / "a.jsonl", lines)
    with pytest.warns(UserWarning, match="left out 1") if row[column] is None else nullcontext():
        assert documents(path, on_bad_record="skip")[-1] == "here"


@pytest.mark.parametrize("row", [{"a": "x", "b": "y"}, {"n": 1}, {}, {"title": "t", "messages": [{"c": "x"}]}])
def test_an_unclear_text_column_is_asked_for(tmp_path, row):
    with pytest.raises(UserError, match="which column holds the text") as error:
        documents(write(tmp_path / "a.jsonl", json.dumps(row)))
    assert all(f"'{name}'" in str(error.value) for name in row)


BROKEN = {
    "a.jsonl": ('{"text": "a"}\n\n{"text": "b"\n{"text": "c"}\n', r"a.jsonl, line 3: not valid JSON"),
    "b.jsonl": (
        '{"text": "a"}\n{"other": "b"}\n{"text": "c"}\n',
        r"line 2: no column 'text' \(there are: other",
    ),
    "c.jsonl": ('{"text": "a"}\n{"text": 5}\n{"text": "c"}\n', r"line 2: column 'text' holds 5, not text"),
    "d.jsonl": ('{"text": "a"}\n[1, 2]\n{"text": "c"}\n', r"line 2: expected an object or a string"),
    "e.jsonl": ('{"text": "a"}\n' + "[" * 200_000 + '\n{"text": "c"}\n', r"line 2: "),
    "f.csv": ("text,n\na,1\nb\nc,3\n", r"f.csv, line 3: 1 cells where the first line has 2"),
    "g.csv": ('text,n\na,1\n"b"x,2\nc,3\n', r"g.csv, line 3: not a valid row"),
    "i.jsonl": ('{"text": "a"}\n{"text": "b\\ud800"}\n{"text": "c"}\n', r"line 2: U\+D800 at index 1"),
    "h.json": ('[{"text": "a"}, 3, {"text": "c"}]', r"h.json, record 2: expected an object"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_record_is_located_and_can_be_skipped(tmp_path, name):
    content, message = BROKEN[name]
    path = write(tmp_path / name, content)
    with pytest.raises(UserError, match=message) as error:
        documents(path)
    assert "--on_bad_record skip" in str(error.value)
    with pytest.warns(UserWarning, match="left out 1 bad records"):
        assert documents(path, on_bad_record="skip") == ["a", "c"]


def test_broken_json_and_json_that_is_no_list(tmp_path):
    with pytest.raises(UserError, match=r"line 2, column 1: not valid JSON"):
        documents(write(tmp_path / "a.json", '[{"text": "a"},\n}'))
    with pytest.raises(UserError, match="expected a list of records, found 3"):
        documents(write(tmp_path / "b.json", "3"))


# --- names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "content"), [("a.txt", ""), ("a.txt", " \n \n"), ("a.jsonl", '{"text": ""}')])
def test_no_text(tmp_path, name, content):
    with pytest.raises(UserError, match=r"is empty|holds no text"):
        documents(write(tmp_path / name, content))


def test_missing_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "shakespeare.txt", "x")
    (tmp_path / "texts").mkdir()
    for spec, hint in [
        ("shakespear.txt", "Did you mean 'shakespeare.txt'"),
        ("text/a.txt", "Did you mean 'texts'"),
        ("texts/nothing", "no such file or folder"),
        ("./nothing", "no such file or folder"),
        ("a/b/c", "no such file or folder"),
        ("storis", "Did you mean 'stories'"),
        ("stories:many", "write stories or stories:2000"),
        ("stories:0", "write stories or stories:2000"),
        ("", "names nothing"),
    ]:
        with pytest.raises(UserError, match=hint):
            open_source(spec)
    with pytest.raises(UserError, match="names nothing"):
        open_source([])
    with pytest.raises(UserError, match="on_bad_record"):
        open_source("stories", on_bad_record="ignore")
    with pytest.raises(UserError, match="no text in the folder"):
        open_source("texts")
    with pytest.raises(UserError, match="unpack it first"):
        open_source(str(write(tmp_path / "a.txt.zst", "x")))


def test_a_folder_is_all_its_files_in_order_without_hidden_ones(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / ".git").mkdir()
    write(tmp_path / "b.txt", "second")
    write(tmp_path / "a.jsonl", '{"text": "first"}')
    write(tmp_path / "deep" / "c.txt.gz", gzip.compress(b"third"))
    write(tmp_path / "picture.png", b"\0\1")
    write(tmp_path / ".git" / "x.txt", "hidden")
    assert documents(tmp_path) == ["first", "second", "third"]


def test_mix_keeps_the_order_and_can_be_read_again(tmp_path):
    write(tmp_path / "b.txt", "bee")
    write(tmp_path / "a.txt", "ay")
    source = open_source([tmp_path / "b.txt", str(tmp_path / "a.txt")])
    assert list(source) == list(source) == ["bee", "ay"]
    assert [part.fingerprint for part in source.parts] == [
        open_source(tmp_path / name).fingerprint for name in ("b.txt", "a.txt")
    ]


def test_fingerprint_follows_content_and_settings_not_place(tmp_path):
    rows = '{"text": "a", "b": "x"}'
    original = open_source(write(tmp_path / "a.jsonl", rows)).fingerprint
    assert open_source(write(tmp_path / "copy.jsonl", rows)).fingerprint == original
    others = {
        open_source(write(tmp_path / "other.jsonl", rows.replace("a", "c"))).fingerprint,
        open_source(write(tmp_path / "a.txt", rows)).fingerprint,
        open_source(tmp_path / "a.jsonl", text_column="b").fingerprint,
        open_source(tmp_path / "a.jsonl", on_bad_record="skip").fingerprint,
    }
    assert len(others) == 4
    assert original not in others


def test_a_local_path_wins_over_everything(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    write(tmp_path / "owner" / "name", "local")
    write(tmp_path / "stories", "mine")
    assert documents("owner/name") == ["local"]
    assert documents("stories") == ["mine"]


# --- built-in text ------------------------------------------------------------------------------------------


class _World:
    def __init__(self, seed: int, edition: str = ""):
        self.seed, self.edition = seed, edition

    def document(self, index: int, split: str = "train") -> str:
        return f"{split} {self.seed} {index}{self.edition}"


def test_worlds(monkeypatch):
    from zero2hero.data import sources

    monkeypatch.setattr(sources, "world", lambda name, seed: _World(seed))
    source = open_source("stories:30", seed=5)
    assert list(source) == [f"train 5 {i}" for i in range(30)]
    assert source.validation is not None
    assert list(source.validation) == [f"validation 5 {i}" for i in range(3)]
    assert list(open_source("stories:2", split="validation", seed=5)) == ["validation 5 0", "validation 5 1"]
    prints = {
        source.fingerprint,
        open_source("stories:30").fingerprint,
        open_source("stories:31", seed=5).fingerprint,
    }
    assert open_source("stories:30", seed=5).fingerprint == source.fingerprint
    monkeypatch.setattr(sources, "world", lambda name, seed: _World(seed, "new"))
    assert len(prints | {open_source("stories:30", seed=5).fingerprint}) == 4


@pytest.mark.parametrize("name", ["stories", "sums", "markov", "induction", "palindromes"])
def test_real_worlds(name):
    source = open_source(f"{name}:20")
    train, held_out = list(source), list(source.validation)
    assert (len(train), len(held_out)) == (20, 2)
    assert all(text.strip() for text in train + held_out)
    if name in ("stories", "sums"):
        assert not set(train) & set(held_out)


def test_pydoc():
    source = open_source("pydoc")
    assert sum(map(len, source)) > 400_000
    with pytest.raises(UserError, match="write pydoc"):
        open_source("pydoc:20")


# --- the hub ------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Stands in for the network: data set names are folders below `tmp_path`."""
    import datasets

    from zero2hero.data import hub

    folder = tmp_path / "someone" / "tales"
    folder.mkdir(parents=True)
    write(folder / "train.jsonl", '{"text": "one"}\n{"text": "two"}\n')
    write(folder / "validation.jsonl", '{"text": "three"}\n')
    real = datasets.load_dataset_builder
    monkeypatch.setattr(hub, "_check_access", lambda name: None)
    monkeypatch.setattr(
        datasets,
        "load_dataset_builder",
        lambda name, *rest, **options: real(str(tmp_path / name), *rest, **options),
    )
    return folder


def test_hub_data_set(hub):
    source = open_source("someone/tales")
    assert list(source) == list(source) == ["one", "two"]
    assert list(source.validation) == ["three"]
    assert list(open_source("someone/tales:validation")) == ["three"]
    with pytest.raises(UserError, match=r"no split 'validatoin'. Did you mean 'validation'"):
        open_source("someone/tales:validatoin")
    with pytest.raises(UserError, match="cannot open the hub data set 'someone/tales'"):
        open_source("someone/tales:wrong_config:train")
    with pytest.raises(UserError, match=r"someone/tales:train, row 1: there is no column 'story'"):
        list(open_source("someone/tales", text_column="story"))


def test_hub_data_set_that_changes_is_another(hub):
    before = open_source("someone/tales").fingerprint
    write(hub / "train.jsonl", '{"text": "changed, and longer"}\n')
    assert open_source("someone/tales").fingerprint != before


def test_no_network_is_said(monkeypatch):
    import huggingface_hub

    def fail(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", fail)
    with pytest.raises(UserError, match=r"no file or folder 'someone/nothing', and the hub cannot be reached"):
        open_source("someone/nothing")


# --- real data ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real data sets are not there")
@pytest.mark.parametrize(
    ("name", "column", "count", "start"),
    [
        ("tinyshakespeare/input.txt", None, 1, "First Citizen:\nBefore we proceed"),
        ("tinystories/tinystories_sample.txt", None, 5, "Once upon a time there was a little boy named Ben."),
        ("gsm8k/train.jsonl", "question", 3000, "Natalia sold clips to 48 of her friends in April"),
        ("sst2/train.tsv", "1", 6920, "a stirring , funny and finally transporting"),
        ("stsb/stsb-en-dev.csv", "1", 1500, "A man with a hard hat is dancing."),
        ("humaneval/HumanEval.jsonl.gz", "prompt", 164, "from typing import List"),
        ("gutenberg", None, 4, "Project Gutenberg’s Alice"),
    ],
)
def test_real_files(name, column, count, start):
    texts = documents(SHARED / name, text_column=column)
    assert len(texts) == count
    assert texts[0].lstrip().startswith(start)
    assert not any("\r\n" in text for text in texts)
