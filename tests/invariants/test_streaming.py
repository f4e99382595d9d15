"""Streamed text: the same rows for any number of ranks, resumed at the token, in bounded memory, faults said aloud."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import signal
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from zero2hero.config import DecoderConfig, PretrainConfig, TokenizerConfig, TrainConfig
from zero2hero.data import streaming
from zero2hero.data.batches import IGNORE
from zero2hero.data.cache import split_documents, tokenize_to_cache
from zero2hero.data.sources import Shard, Source, open_source
from zero2hero.data.streaming import Stream, StreamingBatches, arrange, merge_states
from zero2hero.data.worlds import world
from zero2hero.errors import UserError
from zero2hero.machine import Machine
from zero2hero.train.checkpoint import newest_checkpoint
from zero2hero.train.loop import Stopped, Trainer
from zero2hero.train.pretrain import pretrain
from zero2hero.train.tracking import read_metrics

BOS = 0


class Numbers:
    """A tokenizer of texts that are numbers, so that a token tells where it comes from."""

    bos_token_id, eos_token_id, vocab_size, fingerprint = BOS, None, 10**6, "numbers"

    def encode_batch(self, texts, add_special_tokens=True, split_special_tokens=False):
        assert not add_special_tokens
        assert split_special_tokens
        return [[int(word) for word in text.split()] for text in texts]


def document(shard: int, number: int) -> str:
    """No two documents share a token; their lengths are ragged, 1 to 11 and now and then 40."""
    begin = 10_001 + 10_000 * shard + 50 * number
    length = 40 if number % 13 == 12 else 1 + (7 * number + shard) % 11
    return " ".join(map(str, range(begin, begin + length)))


def write(folder: Path, counts: list[int]) -> Path:
    """A folder of .jsonl shards with that many documents."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard, count in enumerate(counts):
        lines = [json.dumps({"text": document(shard, number)}) + "\n" for number in range(count)]
        (folder / f"{shard:02}.jsonl").write_text("".join(lines))
    return folder


def stream_of(data: Any, *, skip: bool = False, fraction: float = 0.1, seed: int = 0, **options) -> Stream:
    if not isinstance(data, Source):
        data = open_source(data, on_bad_record="skip" if skip else "raise", **options)
    return Stream(data, Numbers(), fraction, seed, skip)


def make(data: Any, *, batch_size=4, accumulation=1, rank=0, world_size=1, length=16, buffer=5, **options) -> Any:
    inner = {name: options.pop(name) for name in ("length_of", "document_mask") if name in options}
    stream = data if isinstance(data, Stream) else stream_of(data, **options)
    return StreamingBatches(
        stream, max_length=length, batch_size=batch_size, accumulation=accumulation, rank=rank, world_size=world_size,
        buffer=buffer, **inner,
    )  # fmt: skip


def flat(batches: list[Any]) -> np.ndarray:
    """Every array of a step's micro-batches: [4, rows, T]."""
    names = ("ids_BT", "targets_BT", "positions_BT", "document_ids_BT")
    return np.stack([np.concatenate([getattr(batch, name) for batch in batches]) for name in names])


SHARDS = {"one": [300], "equal": [40] * 8, "many": [12] * 40, "unequal": [200, 3, 50]}


@pytest.fixture(params=SHARDS.values(), ids=SHARDS.keys())
def folder(request, tmp_path) -> Path:
    return write(tmp_path / "data", request.param)


# --- what is in the rows ------------------------------------------------------------------------------------


def training_documents(folder: Path) -> set[str]:
    """By the token cache's own split, the referee."""
    source = open_source(folder)
    cache = tokenize_to_cache(source, Numbers(), folder.parent / "cache")
    corpus, _ = split_documents(cache, 0.1, 0)
    return {" ".join(map(str, corpus.document(i)[1:])) for i in range(corpus.num_documents)}


def lane_text(batches: StreamingBatches, steps: int) -> list[list[int]]:
    """Each lane's tokens over some steps, end to end."""
    per_lane = batches.rows // batches.num_lanes
    lanes: list[list[int]] = [[] for _ in range(batches.num_lanes)]
    for step in range(steps):
        ids = flat(batches(step))[0]
        for lane, tokens in enumerate(lanes):
            tokens += ids[lane * per_lane : (lane + 1) * per_lane].ravel().tolist()
    return lanes


def documents_in(tokens: list[int]) -> list[str]:
    """Whole documents; the last may be cut and is left out."""
    groups = itertools.groupby(tokens, lambda token: token == BOS)
    return [" ".join(map(str, group)) for is_bos, group in groups if not is_bos][:-1]


def test_an_epoch_reads_every_training_document_once_and_no_other(folder):
    batches = make(folder, batch_size=8)
    seen = []
    for number, lane in batches.lanes.items():
        epochs = {}
        for (epoch, *_), block, _ in lane._fill((0, 0, 0)):
            if epoch == 2:
                break
            texts = [" ".join(map(str, block.document(i)[1:])) for i in range(block.num_documents)]
            epochs.setdefault(epoch, []).extend(texts)
        assert sorted(epochs[0]) == sorted(epochs[1])
        assert epochs[0] != epochs[1] or len(epochs[0]) < 4  # another order
        seen += epochs[0]
        streamed = documents_in(lane_text(make(folder, batch_size=8), 12)[number])
        assert streamed == list(itertools.chain(*epochs.values()))[: len(streamed)]
    assert len(seen) == len(set(seen))
    assert set(seen) == training_documents(folder)


def test_rows_are_cut_side_by_side_and_say_what_packed_rows_say(folder):
    """Each token an input once, its target the next one, except across documents; positions count from their start."""
    batches = make(folder, batch_size=4)
    last: dict[int, list[int]] = {}
    for step in range(30):
        ids, targets, positions, document_ids = flat(batches(step))
        per_lane = len(ids) // batches.num_lanes
        for row in range(len(ids)):
            position, number = 0, 0
            for t in range(ids.shape[1]):
                if ids[row, t] == BOS and t:
                    position, number = 0, number + 1
                assert (positions[row, t], document_ids[row, t]) == (position, number)
                position += 1
            follow = ids[row, 1:]
            assert (targets[row, :-1] == np.where(follow == BOS, IGNORE, follow)).all()
            lane = row // per_lane
            if lane in last:  # the row before in the same lane has foretold this row's first token
                assert last[lane] == [IGNORE if ids[row, 0] == BOS else ids[row, 0]]
            last[lane] = [targets[row, -1]]


def test_each_row_names_its_records(folder):
    """For the report of a step whose loss is not finite: file and line, for every row."""
    batches = make(folder, batch_size=4, accumulation=2)
    for step in range(6):
        for batch in batches(step):
            for tokens, numbers, records in zip(batch.ids_BT, batch.document_ids_BT, batch.records, strict=True):
                lines = []
                for place in records:
                    path, _, line = place.partition(", line ")
                    lines += json.loads(Path(path).read_text().splitlines()[int(line) - 1])["text"].split()
                text = [str(token) for token in tokens.tolist() if token != BOS]
                assert set(text) <= set(lines)
                assert len(records) == numbers.max() + 1


def test_the_document_mask_can_be_left_out(tmp_path):
    plain = make(write(tmp_path, [60]), document_mask=False)(0)[0]
    masked = make(tmp_path)(0)[0]
    assert (plain.targets_BT == masked.targets_BT).all()
    assert masked.document_ids_BT.max() > 0
    assert plain.document_ids_BT.max() == 0
    assert (plain.positions_BT == np.arange(16)).all()


def test_seeds_decide_the_order(folder):
    first = [flat(make(folder, seed=1)(3)) for _ in range(2)]
    assert (first[0] == first[1]).all()
    config = {"max_length": 16, "batch_size": 4, "buffer": 5}
    others = [flat(StreamingBatches(stream_of(folder), seed=seed, **config)(0)) for seed in (0, 1)]
    assert (others[0] != others[1]).any()


def test_held_out_documents_are_the_cache_s_and_are_never_trained_on(tmp_path):
    folder = write(tmp_path / "data", [80, 80])
    training, held_out = stream_of(folder).sample()
    cached = split_documents(tokenize_to_cache(open_source(folder), Numbers(), tmp_path / "cache"), 0.1, 0)
    for ours, theirs in zip((training, held_out), cached):
        assert ours.tokens.tolist() == list(itertools.chain(*(theirs.document(i) for i in range(theirs.num_documents))))
        assert (ours.spans[:, 1] - ours.spans[:, 0] == theirs.spans[:, 1] - theirs.spans[:, 0]).all()


def test_a_source_s_own_validation_is_kept(tmp_path):
    def source(first: int, **options) -> Source:
        return Source(str(first), "x", lambda: ((document(first, i), str(i)) for i in range(20)), **options)

    stream = stream_of(source(0, validation=source(1)))
    training, held_out = stream.sample()
    assert training.num_documents == 20  # all of them
    assert [document(1, i) for i in range(20)] == [
        " ".join(map(str, held_out.document(i)[1:])) for i in range(held_out.num_documents)
    ]


def test_the_sample_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "SAMPLE_TOKENS", 400)

    def endless(shard: int):
        return lambda: ((document(shard, i), "") for i in itertools.count())

    source = Source("endless", "x", endless(0), find_shards=lambda: [Shard("a", endless(0)), Shard("b", endless(1))])
    training, held_out = stream_of(source).sample()
    assert (training.num_tokens, held_out.num_tokens) == (400, 40)


# --- any number of ranks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [4, 12])
def test_the_rows_of_a_step_are_the_same_for_any_number_of_ranks(folder, rows):
    straight = make(folder, batch_size=rows)
    steps = [flat(straight(step)) for step in range(8)]
    for world_size, accumulation in itertools.product((1, 2, 4), (1, rows // 4)):
        size = rows // world_size // accumulation
        if size * accumulation * world_size != rows:
            continue
        shape = {"batch_size": size, "accumulation": accumulation, "world_size": world_size}
        ranks = [make(folder, rank=rank, **shape) for rank in range(world_size)]
        for step, expected in enumerate(steps):
            parts = [rank(step) for rank in ranks]
            assert [len(part) for part in parts] == [accumulation] * world_size
            assert (np.concatenate([flat(part) for part in parts], axis=1) == expected).all()


def test_more_ranks_than_lanes(tmp_path):
    """13 rows have no divisor up to 8 but 1: one lane, which every rank reads and keeps its part of."""
    folder = write(tmp_path, [100])
    expected = flat(make(folder, batch_size=13)(2))
    parts = [flat(make(folder, batch_size=1, rank=rank, world_size=13)(2)) for rank in range(13)]
    assert (np.concatenate(parts, axis=1) == expected).all()


def test_a_rank_opens_only_the_shards_of_its_lanes(tmp_path):
    folder = write(tmp_path, [40] * 8)
    opened: list[tuple[int, str]] = []
    for rank in range(4):
        stream = stream_of(folder)

        def shard(inner: Shard, rank=rank) -> Shard:
            def records():
                opened.append((rank, inner.name))
                return inner.records()

            return Shard(inner.name, records, inner.size)

        stream.shards = [shard(inner) for inner in stream.shards]
        batches = make(stream, batch_size=2, rank=rank, world_size=4)
        for step in range(40):
            batches(step)
    by_rank = [{name for r, name in opened if r == rank} for rank in range(4)]
    assert [len(names) for names in by_rank] == [2, 2, 2, 2]
    assert len(set().union(*by_rank)) == 8


@pytest.mark.parametrize(
    ("sizes", "rows", "lanes", "groups"),
    [
        ([9], 16, 8, [[0]]),
        ([9], 7, 7, [[0]]),
        ([9], 11, 1, [[0]]),
        ([5] * 16, 16, 16, [[i] for i in range(16)]),
        ([5] * 4, 16, 8, [[0], [1], [2], [3]]),  # two lanes for each shard
        ([None] * 3, 6, 6, [[0], [1], [2]]),
        ([90, 10], 4, 4, [[0, 1]]),
        ([60, 30, 30], 4, 4, [[0], [1, 2]]),
        ([1] * 1000, 512, 64, None),
    ],
)
def test_lanes_divide_the_rows_and_own_equal_amounts(sizes, rows, lanes, groups):
    found, shared = arrange(sizes, rows)
    assert found == lanes
    assert sorted(itertools.chain(*shared)) == list(range(len(sizes)))
    if groups is not None:
        assert shared == groups


# --- resuming -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2])
def test_resumed_at_any_step_it_goes_on_at_the_very_token(folder, world_size):
    steps = 70
    ranks = [make(folder, batch_size=4 // world_size, rank=r, world_size=world_size) for r in range(world_size)]
    states, expected = [], []
    for step in range(steps):
        states.append([json.loads(json.dumps(rank.state_dict())) for rank in ranks])
        expected.append([flat(rank(step)) for rank in ranks])
    for cut in range(0, steps, 3):
        for rank in range(world_size):
            again = make(folder, batch_size=4 // world_size, rank=rank, world_size=world_size)
            again.load_state_dict(states[cut][rank])
            for step in range(cut, min(cut + 4, steps)):
                assert (flat(again(step)) == expected[step][rank]).all(), (cut, step)
    places = np.array([place for state in states for part in state for place in part["lanes"].values()])
    assert (places[:, 2] > 0).any() or folder.name == "many"  # within a shard
    assert (places[:, 3] > 0).any()  # within a buffer
    assert (places[:, 4] > 0).any()  # within a document
    assert places[:, 0].max() > 0  # beyond an epoch


def test_a_state_is_small_and_plain(folder):
    batches = make(folder, batch_size=8)
    batches(5)
    state = batches.state_dict()
    assert json.loads(json.dumps(state)) == state
    assert all(len(place) == 5 for place in state["lanes"].values())


@pytest.mark.parametrize(("before", "after"), [(4, 1), (4, 2), (1, 4), (2, 4)])
def test_resumed_on_another_number_of_ranks(folder, before, after):
    straight = make(folder, batch_size=4)
    ranks = [make(folder, batch_size=4 // before, rank=rank, world_size=before) for rank in range(before)]
    for step in range(9):
        straight(step)
        for rank in ranks:
            rank(step)
    state = json.loads(json.dumps(merge_states([rank.state_dict() for rank in ranks])))
    again = [make(folder, batch_size=4 // after, rank=rank, world_size=after) for rank in range(after)]
    for rank in again:
        rank.load_state_dict(state)
    for step in range(9, 14):
        assert (np.concatenate([flat(rank(step)) for rank in again], axis=1) == flat(straight(step))).all()


def test_a_step_is_a_function_of_its_number(tmp_path):
    batches = make(write(tmp_path, [60]))
    steps = [flat(batches(step)) for step in range(6)]
    for step in (2, 5, 5, 0, 1):
        assert (flat(batches(step)) == steps[step]).all()


def test_a_state_that_does_not_fit_is_refused(tmp_path):
    folder = write(tmp_path, [60])
    batches = make(folder, batch_size=2, world_size=2)
    batches(0)
    state = batches.state_dict()
    with pytest.raises(UserError, match=r"steps have 4 rows and this run's 6"):
        make(folder, batch_size=6).load_state_dict(state)
    whole = make(folder, batch_size=4)
    with pytest.warns(UserWarning, match="does not say where lane 2 of the data stands"):
        whole.load_state_dict(state)
    assert (flat(whole(5)) == flat(make(folder, batch_size=4)(5))).all()
    later = make(folder, batch_size=2, rank=1, world_size=2)
    later(3)
    with pytest.raises(ValueError, match=r"different steps: \[1, 4\]"):
        merge_states([state, later.state_dict()])


def test_row_lengths_may_change_on_the_way(folder):
    lengths = {"length_of": lambda step: 4 if step < 3 else 8 if step < 6 else 16}
    straight = make(folder, **lengths)
    steps = [straight(step) for step in range(9)]
    assert [(step[0].ids_BT.shape) for step in steps] == [(16, 4)] * 3 + [(8, 8)] * 3 + [(4, 16)] * 3
    constant = make(folder)
    per_lane = 4 // constant.num_lanes
    for step, varied in enumerate(steps):  # the same tokens, folded otherwise
        same = constant(step)[0].ids_BT.reshape(constant.num_lanes, per_lane * 16)
        assert (varied[0].ids_BT.reshape(constant.num_lanes, per_lane * 16) == same).all()
    ranks = [make(folder, batch_size=2, rank=rank, world_size=2, **lengths) for rank in range(2)]
    for step in range(9):
        assert (np.concatenate([flat(rank(step)) for rank in ranks], axis=1) == flat(steps[step])).all()


# --- bounded memory -----------------------------------------------------------------------------------------


def test_the_number_of_records_held_at_once_is_bounded():
    most = made = 0

    class Counted(str):  # whose life can be watched
        __hash__ = object.__hash__
        __eq__ = object.__eq__

    alive: weakref.WeakSet[Counted] = weakref.WeakSet()

    def endless(shard: int):
        nonlocal most, made
        for number in itertools.count():
            text = Counted(document(shard, number % 100))
            alive.add(text)
            made += 1
            most = max(most, len(alive))
            yield text, f"{shard} {number}"

    shards = [Shard(str(shard), lambda shard=shard: endless(shard)) for shard in range(4)]
    stream = stream_of(Source("endless", "x", lambda: endless(0), find_shards=lambda: shards))
    batches = make(stream, batch_size=4, buffer=10)
    for step in range(150):
        batches(step)
    assert made > 1000
    assert most <= 10 + 2 * 4  # one buffer being filled, and the record at which each of 4 lanes stands
    held = sum(lane._buffer.num_documents for lane in batches.lanes.values())
    assert held <= 4 * 10


def test_a_buffer_of_long_documents_is_bounded_by_its_characters(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "CHARACTERS_PER_BATCH", 120)
    batches = make(write(tmp_path, [200]), buffer=1000)
    batches(2)
    assert all(lane._buffer.num_tokens < 120 for lane in batches.lanes.values())


# --- formats ------------------------------------------------------------------------------------------------


def test_every_format_streams_the_documents_that_the_source_has(tmp_path):
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    texts = [[document(shard, number) for number in range(30)] for shard in range(5)]
    records = ["".join(json.dumps({"text": text}) + "\n" for text in part) for part in texts]
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(texts[0]))
    (tmp_path / "b.jsonl").write_text(records[1])
    (tmp_path / "c.csv").write_text("text\n" + "\n".join(texts[2]) + "\n")
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(records[3].encode()))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts[4]}), tmp_path / "e.parquet")
    source = open_source(tmp_path)
    assert [Path(shard.name).name for shard in source.shards] == [p.name for p in sorted(tmp_path.iterdir())]
    assert [[text for text, _ in shard.records()] for shard in source.shards] == texts
    batches = make(tmp_path, batch_size=2)
    batches(7)
    again = make(tmp_path, batch_size=2)
    again.load_state_dict(batches.state_dict())
    assert (flat(again(8)) == flat(batches(8))).all()


def test_built_in_text_and_mixes_stream(tmp_path):
    folder = write(tmp_path, [3, 4])
    mix = open_source([str(folder), "sums:5"])
    assert len(mix.shards) == 3
    assert [text for shard in mix.shards for text, _ in shard.records()] == list(mix)


def test_the_shards_of_a_hub_data_set(tmp_path, monkeypatch):
    import datasets

    from zero2hero.data import hub

    for shard in range(3):
        (tmp_path / "someone" / "tales").mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps({"text": document(shard, number)}) + "\n" for number in range(20))
        (tmp_path / "someone" / "tales" / f"train-{shard}.jsonl").write_text(lines)
    real = datasets.load_dataset_builder
    monkeypatch.setattr(hub, "_check_access", lambda name: None)
    monkeypatch.setattr(
        datasets, "load_dataset_builder", lambda name, *rest, **options: real(str(tmp_path / name), *rest, **options)
    )
    source = open_source("someone/tales")
    assert [shard.name for shard in source.shards] == [f"someone/tales:train, shard {i} of 3" for i in (1, 2, 3)]
    for shard, inner in enumerate(source.shards):
        found = list(inner.records())
        assert [text for text, _ in found] == [document(shard, number) for number in range(20)]
        assert found[4][1] == f"someone/tales:train, shard {shard + 1} of 3, row 5"
    batches = make(source, batch_size=3)
    batches(4)
    again = make(open_source("someone/tales"), batch_size=3)
    again.load_state_dict(batches.state_dict())
    assert (flat(again(5)) == flat(batches(5))).all()


# --- the whole road -----------------------------------------------------------------------------------------


def run_config(folder: Path, name: str, **changes) -> PretrainConfig:
    settings: dict[str, Any] = {
        "data": str(folder / "text"), "output_dir": str(folder / name), "precision": "fp32", "device": "cpu",
        "streaming": True, "report_to": [], "tokenizer": TokenizerConfig(kind="char"),
        "model": DecoderConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, dropout=0.1),
        "train": TrainConfig(max_steps=8, max_length=32, per_device_train_batch_size=2, eval_steps=4, sample_steps=100,
                             length_schedule=[0.5]),
    }  # fmt: skip
    return PretrainConfig(**settings | changes)


@pytest.fixture
def text(tmp_path, monkeypatch) -> Path:
    (tmp_path / "text").mkdir()
    for shard in range(2):
        documents = world("markov", shard).documents(count=60)
        (tmp_path / "text" / f"{shard}.txt").write_text("<|endoftext|>".join(documents))
    # fp32 needs no measurement
    monkeypatch.setattr("zero2hero.machine.prepare", lambda: Machine("a processor", 1, 1e9, 0.0, "as is"))
    return tmp_path


@pytest.mark.usefixtures("one_thread")
def test_pretrain_from_a_stream_stopped_and_resumed_gives_the_same_file(text, monkeypatch, own_cache):
    before = set((own_cache / "tokens").glob("*"))
    pretrain(run_config(text, "straight"))
    assert set((own_cache / "tokens").glob("*")) == before  # nothing was stored
    step = Trainer.step

    def interrupt(trainer) -> None:
        step(trainer)
        if trainer.state.step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Trainer, "step", interrupt)
    with pytest.raises(Stopped):
        pretrain(run_config(text, "stopped"))
    monkeypatch.setattr(Trainer, "step", step)
    read: list[int] = []
    following = StreamingBatches._next
    monkeypatch.setattr(StreamingBatches, "_next", lambda batches: (read.append(batches.step), following(batches))[1])
    pretrain(run_config(text, "stopped", resume=True, on_bad_record="skip"))  # which may be added
    assert read == [5, 6, 7]  # the checkpoint knew where to go on
    straight, stopped = (load_file(text / run / "model.safetensors") for run in ("straight", "stopped"))
    assert straight.keys() == stopped.keys()
    assert all(torch.equal(straight[name], stopped[name]) for name in straight)
    losses = [row["eval_loss"] for row in read_metrics(text / "stopped") if "eval_loss" in row]
    assert len(losses) == 2


@pytest.mark.usefixtures("one_thread")
def test_a_shard_that_vanishes_while_training_costs_nothing_once_it_is_back(text, monkeypatch):
    for shard in range(2):
        documents = world("markov", shard).documents(count=12)
        (text / "text" / f"{shard}.txt").write_text("<|endoftext|>".join(documents))
    train = TrainConfig(max_steps=60, max_length=32, per_device_train_batch_size=2, save_steps=5, eval_steps=60)
    settings = {"train": train, "validation_fraction": 0.2}
    pretrain(run_config(text, "straight", **settings))
    step, whole, away = Trainer.step, text / "text" / "1.txt", text / "away"

    def vanish(trainer) -> None:
        step(trainer)
        if trainer.state.step == 7:
            whole.rename(away)

    monkeypatch.setattr(Trainer, "step", vanish)
    with pytest.raises(
        UserError, match=r"step \d+: cannot read .*1\.txt: No such file.* The last checkpoint is intact"
    ):
        pretrain(run_config(text, "faulty", **settings))
    monkeypatch.setattr(Trainer, "step", step)
    assert newest_checkpoint(text / "faulty") is not None
    with pytest.raises(UserError, match=r"1\.txt is gone\. The checkpoint is intact: put the data back"):
        pretrain(run_config(text, "faulty", resume=True, **settings))
    away.rename(whole)
    pretrain(run_config(text, "faulty", resume=True, **settings))
    straight, faulty = (load_file(text / run / "model.safetensors") for run in ("straight", "faulty"))
    assert all(torch.equal(straight[name], faulty[name]) for name in straight)


def test_a_stream_needs_a_number_of_steps():
    with pytest.raises(UserError, match=r"with --streaming, set --train\.max_steps"):
        PretrainConfig(streaming=True)


# --- faults -------------------------------------------------------------------------------------------------


def run_to(batches, last: int) -> list[np.ndarray]:
    return [flat(batches(step)) for step in range(batches.step, last)]


def test_a_shard_that_vanishes_is_named_with_the_way_on(tmp_path):
    folder = write(tmp_path, [40, 40])
    batches = make(folder)
    run_to(batches, 2)
    (folder / "01.jsonl").unlink()
    with pytest.raises(
        UserError,
        match=r"step \d+: cannot read .*01\.jsonl: No such file or directory \(shard .*01\.jsonl, after record 0\)\. "
        r"To go on without this shard, add --on_bad_record skip\. The last checkpoint is intact, and --resume goes on",
    ):
        run_to(batches, 200)


@pytest.mark.filterwarnings("ignore:passing over")
def test_a_shard_that_vanishes_can_be_passed_over(tmp_path):
    folder = write(tmp_path, [40, 40])
    batches = make(folder, skip=True)
    batches(1)
    state = batches.state_dict()
    (folder / "01.jsonl").unlink()
    with pytest.warns(UserWarning, match=r"passing over shard .*01\.jsonl, after record 0: .*\(1 of 2 shards so far\)"):
        rows = [flat(batches(step)) for step in range(2, 100)]
    assert (rows[-1][0] < 20_000).all()  # all of the first shard, also where the second was to be read
    with pytest.raises(UserError, match=r"01\.jsonl is gone\. The checkpoint is intact: put the data back"):
        make(folder).load_state_dict(state)
    again = make(folder, skip=True)
    with pytest.warns(UserWarning, match=r"01\.jsonl is gone; going on with what is there"):
        again.load_state_dict(state)
    assert (flat(again(99))[0] < 20_000).all()


def test_data_that_changed_since_the_checkpoint_are_refused(tmp_path):
    folder = write(tmp_path, [40, 40])
    batches = make(folder)
    batches(3)
    state = batches.state_dict()
    write(folder, [40, 40, 9])
    with pytest.raises(UserError, match=r"not those that the run began with: .*02\.jsonl is new"):
        make(folder).load_state_dict(state)
    left_out = make(folder, skip=True)
    with pytest.warns(UserWarning, match=r"02\.jsonl is new"):
        left_out.load_state_dict(state)
    assert (flat(left_out(4)) == flat(batches(4))).all()
    (folder / "02.jsonl").unlink()
    write(folder, [40, 2])
    with pytest.raises(UserError, match=r"01\.jsonl had \d+ bytes and has \d+"):
        make(folder).load_state_dict(state)


def test_a_shard_cut_below_the_record_reached(tmp_path):
    """Where sizes are not known, as on the hub, it shows on reading."""
    count = 200
    source = Source("far", "x", lambda: ((document(0, i), str(i)) for i in range(count)))
    batches = make(source, batch_size=1)
    batches(20)
    state = batches.state_dict()
    record = state["lanes"]["0"][2]
    assert record > 3
    count = 3
    with pytest.raises(UserError, match=rf"far ends after 3 records, but {record} had been read: it was cut"):
        make(source, batch_size=1).load_state_dict(state)


def test_a_truncated_archive(tmp_path):
    whole = gzip.compress("".join(json.dumps({"text": document(0, i)}) + "\n" for i in range(2000)).encode())
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    write(tmp_path, [0, 30])
    with pytest.raises(UserError, match=r"a\.jsonl\.gz is damaged .*fetch it again \(shard .*, after record \d+\)"):
        run_to(make(tmp_path), 200)
    with pytest.warns(UserWarning, match=r"passing over shard .*a\.jsonl\.gz, after record \d{3,}"):
        run_to(make(tmp_path, skip=True), 200)


def test_a_record_that_is_cut_off(tmp_path):
    folder = write(tmp_path, [30, 30])
    (folder / "00.jsonl").write_text((folder / "00.jsonl").read_text()[:-4])
    with pytest.raises(UserError, match=r"00\.jsonl, line 30: not valid JSON .*skip to leave it out \(shard") as raised:
        run_to(make(folder), 100)
    assert str(raised.value).count("--on_bad_record") == 1
    with pytest.warns(UserWarning, match=r"00\.jsonl: left out 1 bad records; the first: .*line 30"):
        run_to(make(folder, skip=True), 100)


def test_an_empty_shard_is_no_fault(tmp_path):
    folder = write(tmp_path / "data", [40, 0])
    (folder / "02.jsonl").write_text('{"text": "  "}\n')
    seen = set(np.concatenate(run_to(make(folder), 60), axis=1)[0].ravel().tolist())
    assert seen == {BOS, *(int(word) for text in training_documents(folder) for word in text.split())}


@pytest.mark.parametrize("skip", [False, True])
def test_a_shard_without_the_text(tmp_path, skip):
    folder = write(tmp_path, [30])
    (folder / "01.jsonl").write_text('{"a": 1, "b": 2}\n')
    if skip:
        with pytest.warns(UserWarning, match=r"passing over shard .*01\.jsonl, after record 0: .*which column"):
            run_to(make(folder, skip=True), 60)
    else:
        with pytest.raises(UserError, match=r"01\.jsonl, line 1: which column holds the text\?"):
            run_to(make(folder), 60)


@pytest.mark.filterwarnings("ignore:passing over")
@pytest.mark.parametrize("skip", [False, True])
def test_no_text_at_all_ends_with_a_word(tmp_path, skip):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text('{"text": " "}\n' if not skip else '{"a": 1}\n')
    with pytest.raises(UserError, match=r"too little text to stream: lane 0 of .* found no document"):
        make(tmp_path, skip=skip)(0)
    with pytest.raises(UserError, match="has no document to learn from"):
        stream_of(tmp_path, skip=skip).sample()


def test_too_few_documents_to_hold_some_out(tmp_path):
    with pytest.raises(UserError, match=r"no document among those held out\. Streaming is for very much text"):
        stream_of(write(tmp_path, [1]), fraction=0.01).sample()
