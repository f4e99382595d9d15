"""Packed = padded = alone; every example whole and once an epoch; the order a function of the seed alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from zero2hero.config import DecoderConfig
from zero2hero.data.batches import IGNORE
from zero2hero.data.conversations import read_records, recognize
from zero2hero.data.examples import Example, encode_pair, encode_records
from zero2hero.data.packed import PackedBatches, evaluation_batches
from zero2hero.errors import UserError
from zero2hero.models import Decoder, init_weights
from zero2hero.nn.logprobs import nll_sum, token_logprobs
from zero2hero.tokenizer import Tokenizer
from zero2hero.tokenizer.templates import set_chat_template
from zero2hero.train.objectives import causal_lm

pytestmark = pytest.mark.usefixtures("one_thread")


def ragged(count=40, seed=0, longest=30, fractions=False):
    """Examples of random tokens and lengths, of which some tokens are trained."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(1, count + 1):
        ids = rng.integers(1, 50, size=rng.integers(2, longest + 1))
        weights = (rng.random(len(ids)) < 0.6).astype(np.float32)
        weights[-1] = 1.0
        if fractions:
            weights *= rng.choice([0.25, 1.0, 2.0], size=len(ids)).astype(np.float32)
        made.append(Example(ids, weights, number))
    return made


def contents(batch):
    """Every example in a batch, by its record's number: (ids it reads, targets)."""
    found = []
    for r in range(len(batch.ids_BT)):
        for document in range(batch.document_ids_BT[r].max() + 1):
            place = batch.document_ids_BT[r] == document
            assert batch.positions_BT[r][place].tolist() == list(range(place.sum()))
            number = set(batch.records[r][place].tolist())
            assert len(number) == 1
            found.append((number.pop(), batch.ids_BT[r][place], batch.targets_BT[r][place]))
    return found


@pytest.mark.parametrize("packing", [True, False])
def test_every_example_whole_and_once_an_epoch(packing):
    examples = ragged(300, longest=120)
    batches = PackedBatches(examples, 241, 4, seed=5, packing=packing)
    rows = batches.rows_per_epoch
    numbers: list[int] = []
    for start in range(2):  # two epochs, in batches of one row
        single = PackedBatches(examples, 241, 1, seed=5, packing=packing)
        seen = []
        for index in range(start * rows, (start + 1) * rows):
            for number, ids, targets in contents(single[index]):
                seen.append(number)
                example = examples[number - 1]
                length = len(example) - 1
                assert ids[:length].tolist() == example.ids[:-1].tolist()
                want = np.where(example.weights[1:] > 0, example.ids[1:], IGNORE)
                assert targets[:length].tolist() == want.tolist()
                assert (targets[length:] == IGNORE).all()
                assert (ids[length:] == 0).all()
        assert sorted(seen) == list(range(1, 301))
        assert seen != numbers  # another order in another epoch
        numbers = seen
    assert (rows == 300) is not packing
    used = sum(len(example) - 1 for example in examples)
    if packing:
        assert used / (rows * 240) > 0.97
    else:
        padded = [batches[i].num_tokens for i in range(rows // 4)]
        assert used / sum(padded) > 0.75  # rows of like length stand together


@pytest.mark.parametrize("packing", [True, False])
def test_order_is_a_function_of_seed_and_index(packing):
    examples = ragged(50)
    one = PackedBatches(examples, 31, 4, seed=1, packing=packing)
    again = PackedBatches(examples, 31, 4, seed=1, packing=packing)
    single = PackedBatches(examples, 31, 1, seed=1, packing=packing)
    for index in (9, 3, 0, 40):
        batch = one[index]
        assert (batch.ids_BT == again[index].ids_BT).all()
        for r in range(4):  # the same rows, whatever the batch size
            row = single[4 * index + r].ids_BT[0]
            width = min(len(row), batch.ids_BT.shape[1])
            assert (batch.ids_BT[r, :width] == row[:width]).all()
    other = PackedBatches(examples, 31, 4, seed=2, packing=packing)
    assert [n for n, *_ in contents(one[0])] != [n for n, *_ in contents(other[0])]


def test_evaluation_has_every_example_once():
    examples = ragged(30)
    batches = evaluation_batches(examples, 31, 4)
    assert sorted(n for batch in batches for n, *_ in contents(batch)) == list(range(1, 31))
    assert evaluation_batches([], 31, 4) == []


def gradients(model, batches):
    """Of the summed loss over all batches, divided once."""
    model.zero_grad()
    total = weight = 0.0
    for batch in batches:
        loss = causal_lm(model, batch.to("cpu"))
        loss.sum.backward()
        total, weight = total + loss.sum.item(), weight + loss.weight.item()
    return total / weight, weight, {name: p.grad / weight for name, p in model.named_parameters() if p.grad is not None}


def small_model(vocab_size):
    config = DecoderConfig(vocab_size=vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    model = Decoder(config)
    init_weights(model, seed=0)
    return model


def real_conversations(shared_data):
    records = list(read_records(shared_data / "llamafactory" / "v1_sft_demo.jsonl"))[:24]
    tokenizer = Tokenizer.train((str(record.messages) for record in records), 500)
    set_chat_template(tokenizer)
    for record in records[::3]:
        record.messages[-1]["weight"] = 0.5
    return encode_records(records, tokenizer, max_length=300).examples, tokenizer.vocab_size


@pytest.mark.parametrize("kind", ["random", "weighted", "conversations"])
def test_gradients_are_the_same_packed_padded_and_alone(kind, request):
    if kind == "conversations":
        examples, vocab_size = real_conversations(request.getfixturevalue("shared_data"))
    else:
        examples, vocab_size = ragged(24, fractions=kind == "weighted"), 50
    length = max(map(len, examples))
    model = small_model(vocab_size)
    packed = PackedBatches(examples, length, 3, seed=0)
    padded = PackedBatches(examples, length, 4, seed=0, packing=False)
    ways = {
        "packed": [PackedBatches(examples, length, 1, seed=0)[i] for i in range(packed.rows_per_epoch)],
        "padded": [padded[i] for i in range(len(examples) // 4)],
        "alone": [PackedBatches([example], length, 1, seed=0)[0] for example in examples],
    }
    loss, weight, want = gradients(model, ways.pop("alone"))
    assert weight == pytest.approx(sum(example.weights[1:].sum() for example in examples))
    for way, batches in ways.items():
        got_loss, got_weight, got = gradients(model, batches)
        assert got_loss == pytest.approx(loss, rel=1e-6), way
        assert got_weight == pytest.approx(weight)
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-6, msg=f"{way}: {name}")
    one = PackedBatches(examples, length, packed.rows_per_epoch, seed=0)[0]
    assert gradients(model, [one])[0] == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_counts_of_the_loss_are_those_of_the_sum_of_logprobs(smoothing):
    torch.manual_seed(1)
    hidden, weight = torch.randn(9, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    targets, counts = torch.randint(20, (9,)), torch.tensor([1, 0, 0.5, 2, 1, 1, 0.25, 3, 1])
    targets[4] = IGNORE
    logits = hidden @ weight.t()
    losses = torch.nn.functional.cross_entropy(
        logits, targets, reduction="none", ignore_index=IGNORE, label_smoothing=smoothing
    )
    (losses * counts).sum().backward()
    want = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    total, count = nll_sum(hidden, weight, targets, smoothing, counts)
    total.backward()
    assert count == counts.sum() - 1
    torch.testing.assert_close(total, (losses * counts).sum())
    torch.testing.assert_close((hidden.grad, weight.grad), want)
    with torch.no_grad():
        torch.testing.assert_close(nll_sum(hidden, weight, targets, smoothing, counts)[0], total.detach())
        if not smoothing:
            torch.testing.assert_close(-(token_logprobs(hidden, weight, targets) * counts).sum(), total.detach())


def test_what_is_refused():
    examples = ragged(5)
    with pytest.raises(UserError, match="no example"):
        PackedBatches([], 10, 1, 0)
    with pytest.raises(UserError, match=r"record \d+ has \d+ tokens; there must be 2 to max_length 3"):
        PackedBatches(examples, 3, 1, 0)
    with pytest.raises(UserError, match="max_length is at least 2"):
        PackedBatches(examples, 1, 1, 0)
    with pytest.raises(UserError, match="record 9 has 1 tokens"):
        PackedBatches([Example(np.array([1]), np.ones(1, np.float32), 9)], 10, 1, 0)
    with pytest.raises(IndexError):
        PackedBatches(examples, 40, 1, 0)[-1]


def test_pairs_share_their_prompt():
    tokenizer = Tokenizer.train(["What is it? It is 42."], 280)
    set_chat_template(tokenizer)
    ask = {"role": "user", "content": "Q"}
    answers = [[{"role": "assistant", "content": text}] for text in ("yes", "no!")]
    pair = encode_pair(recognize({"prompt": [ask], "chosen": answers[0], "rejected": answers[1]}), tokenizer)
    prompt = tokenizer.apply_chat_template([ask], add_generation_prompt=True)
    assert pair.prompt.tolist() == prompt
    for ids, answer in zip((pair.chosen, pair.rejected), answers):
        assert [*prompt, *ids] == tokenizer.apply_chat_template([ask, *answer])
    texts = recognize({"prompt": "Q", "chosen": " yes", "rejected": " no"}, 7)
    pair = encode_pair(texts, tokenizer)
    assert pair.prompt.tolist() == tokenizer.encode("Q")
    assert [*pair.prompt, *pair.chosen] == [*tokenizer.encode("Q yes"), tokenizer.eos_token_id]
    assert [*pair.prompt, *pair.rejected] == [*tokenizer.encode("Q no"), tokenizer.eos_token_id]
    assert len(encode_pair(texts, tokenizer, max_length=3).chosen) == 1
    with pytest.raises(UserError, match="record 7: nothing of the chosen answer is left within max_length 2"):
        encode_pair(texts, tokenizer, max_length=2)
    with pytest.raises(UserError, match="has no chosen and rejected"):
        encode_pair(recognize({"text": "x"}), tokenizer)
    merging = Tokenizer.train(["ab ab ab ab"] * 4, 300)
    pair = encode_pair(recognize({"prompt": "c a", "chosen": "b", "rejected": "c"}), merging)  # " ab" is one token
    assert merging.decode([*pair.prompt, *pair.chosen], skip_special_tokens=True) == "c ab"
    assert merging.decode([*pair.prompt, *pair.rejected], skip_special_tokens=True) == "c ac"
