"""Invariants 2, 3 and 8 for T5, versions 1.0 and 1.1: equal to transformers in both directions, padded, cached."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from zero2hero.data.pairs import seq2seq_batch
from zero2hero.errors import UserError
from zero2hero.models import EncoderDecoder, EncoderDecoderConfig, from_pretrained, init_weights, save_pretrained
from zero2hero.nn.positions import distance_buckets
from zero2hero.train.objectives import seq2seq_lm

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = {
    "vocab_size": 61, "d_model": 32, "d_kv": 6, "d_ff": 56, "num_layers": 2, "num_heads": 4,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20, "decoder_start_token_id": 0,
}  # fmt: skip
V11 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
CASES = {
    "1.0": {},
    "1.0, three layers write": {"num_decoder_layers": 3, "layer_norm_epsilon": 1e-3},
    "1.0, other buckets": {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128},
    "1.1": V11,
    "1.1 as made by version 5, head and embedding one": V11,
    "gated silu": V11 | {"feed_forward_proj": "gated-silu"},
}


def reference(name: str):
    """A model of transformers, every weight of it random."""
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**SHAPE | CASES[name])).eval()
    if not model.config.scale_decoder_outputs and "head and embedding one" not in name:
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.normal_(1.0 if "layer_norm" in key else 0.0, 0.2, generator=generator)
    return model


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """(their model, our model, folder with their file, folder with ours)."""
    folder = tmp_path_factory.mktemp("t5")
    theirs = reference(request.param)
    theirs.save_pretrained(folder / "theirs")
    ours = from_pretrained(folder / "theirs")
    save_pretrained(ours, folder / "ours")
    return theirs, ours, folder / "theirs", folder / "ours"


def pairs(lengths=(30, 30, 30), target_length: int = 25):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(61, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return ids, torch.randint(61, (len(lengths), target_length), generator=generator), mask


def same_logits(ours, theirs, lengths=(30, 30, 30)) -> None:
    ids, decoder_ids, mask = pairs(lengths)
    with torch.no_grad():
        want = theirs(ids, attention_mask=mask, decoder_input_ids=decoder_ids).logits
        got = ours.logits(ours(ids, decoder_ids, mask))
    assert want.std() > 0.1
    assert (got - want).abs().max() < 1e-4


def test_logits_in_both_directions(case):
    theirs, ours, _, our_folder = case
    same_logits(ours, theirs)
    same_logits(ours, theirs, (30, 4, 17))
    again, report = transformers.AutoModelForSeq2SeqLM.from_pretrained(our_folder, output_loading_info=True)
    assert not any(report.values()), report
    assert type(again) is type(theirs)
    same_logits(ours, again.eval(), (30, 4, 17))


def test_tensors_are_byte_equal(case):
    before, after = (load_file(folder / "model.safetensors") for folder in case[2:])
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert value.dtype == after[key].dtype
        assert torch.equal(value, after[key]), key


def test_config_keeps_what_it_said(case):
    before, after = (transformers.AutoConfig.from_pretrained(folder).to_dict() for folder in case[2:])
    for config in (before, after):
        config.pop("_name_or_path", None)
    assert before == after


def test_config_is_spelt_for_version_4(case):
    """There the tied head alone decides whether outputs are scaled."""
    theirs, ours, _, our_folder = case
    written = json.loads((our_folder / "config.json").read_text())
    stored = load_file(our_folder / "model.safetensors")
    assert ours.config.tie_word_embeddings == written["tie_word_embeddings"] == ("lm_head.weight" not in stored)
    if theirs.config.scale_decoder_outputs or "lm_head.weight" in stored:
        assert written["tie_word_embeddings"] == theirs.config.scale_decoder_outputs


def test_a_padded_source_equals_the_source_alone(case):
    _, ours, *_ = case
    ids, decoder_ids, mask = pairs((30, 4, 17))
    with torch.no_grad():
        together = ours(ids, decoder_ids, mask)
        for row, length in enumerate((30, 4, 17)):
            alone = ours(ids[row : row + 1, :length], decoder_ids[row : row + 1])
            assert (together[row] - alone[0]).abs().max() < 1e-5


@pytest.mark.parametrize("pieces", [[1] * 25, [7, 1, 1, 9, 7], [25]])
def test_cached_decoding_equals_the_full_forward(case, pieces):
    _, ours, *_ = case
    ids, decoder_ids, mask = pairs((30, 4, 17))
    with torch.no_grad():
        full = ours(ids, decoder_ids, mask)
        source, cache = ours.encode(ids, mask), ours.make_cache(3, 25)
        parts = [ours.decode(part, source, cache) for part in decoder_ids.split(pieces, 1)]
    assert (torch.cat(parts, 1) - full).abs().max() < 1e-5
    with pytest.raises(UserError, match="the cache holds 25 tokens and 26 are needed"):
        ours.decode(decoder_ids[:, :1], source, cache)


def test_targets_do_not_see_what_comes_later(case):
    _, ours, *_ = case
    ids, decoder_ids, mask = pairs()
    changed = decoder_ids.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % 61
    with torch.no_grad():
        before, after = ours(ids, decoder_ids), ours(ids, changed)
    assert torch.equal(before[:, :12], after[:, :12])
    assert (before[:, 12] - after[:, 12]).abs().max() > 1e-3


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("buckets", "furthest"), [(32, 128), (8, 20), (16, 64)])
def test_buckets(causal, buckets, furthest):
    """Against transformers' and by their description: exact when near, never shrinking with distance, all used."""
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = torch.arange(-300, 301)
    got = distance_buckets(distance, buckets, furthest, causal)
    assert torch.equal(got, T5Attention._relative_position_bucket(-distance, not causal, buckets, furthest))
    half = buckets if causal else buckets // 2
    assert got[300 : 300 + half // 2].tolist() == list(range(half // 2))
    assert (got[300:].diff() >= 0).all()
    assert (got[300 + furthest :] == half - 1).all()
    assert set(got.tolist()) == set(range(buckets)) - (set() if causal else {half})  # there is no distance of -0


def test_loss_and_gradients_equal_cross_entropy():
    """The relative biases learn, and a padded pair counts as it does alone."""
    model = EncoderDecoder(EncoderDecoderConfig(vocab_size=61, hidden_size=24, num_hidden_layers=2,
                                                num_attention_heads=2))  # fmt: skip
    init_weights(model, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)), alpha=0.1)
    sources, targets = [[5, 6, 7, 8, 1], [9, 1]], [[10, 1], [11, 12, 13, 1]]
    batch = seq2seq_batch(sources, targets, start_id=0).to("cpu")
    loss = seq2seq_lm(model, batch)
    logits = model.logits(model(batch.ids_BS, batch.decoder_ids_BT, batch.attention_mask_BS))
    want = F.cross_entropy(logits.flatten(0, 1), batch.targets_BT.flatten(), reduction="sum")
    assert loss.weight == 6
    assert torch.allclose(loss.sum, want, rtol=1e-5)
    alone = [seq2seq_lm(model, seq2seq_batch([s], [t], start_id=0).to("cpu")).sum for s, t in zip(sources, targets)]
    assert torch.allclose(loss.sum, sum(alone), rtol=1e-5)
    got = torch.autograd.grad(loss.sum, list(model.parameters()))
    expected = torch.autograd.grad(want, list(model.parameters()))
    for (name, _), a, b in zip(model.named_parameters(), got, expected):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5), name
        assert a.abs().max() > 1e-6, name


def test_gradients_equal_those_of_transformers(tmp_path):
    """The biases' gradients sum over all layers."""
    theirs = reference("1.0")
    theirs.save_pretrained(tmp_path)
    ours = from_pretrained(tmp_path)
    ids, targets, mask = pairs((30, 4, 17))
    shifted = torch.cat([torch.zeros_like(targets[:, :1]), targets[:, :-1]], 1)
    theirs(ids, attention_mask=mask, labels=targets).loss.backward()
    logits = ours.logits(ours(ids, shifted, mask))
    F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    attention = theirs.encoder.block[0].layer[0].SelfAttention
    assert torch.allclose(ours.encoder.embed_distances.weight.grad, attention.relative_attention_bias.weight.grad,
                          atol=1e-5, rtol=1e-3)  # fmt: skip
    assert torch.allclose(ours.embed_tokens.weight.grad, theirs.shared.weight.grad, atol=1e-5, rtol=1e-3)


def test_a_model_made_here_opens_there(tmp_path):
    ours = EncoderDecoder(EncoderDecoderConfig(vocab_size=61, num_decoder_layers=2)).eval()
    init_weights(ours, 2)
    save_pretrained(ours, tmp_path)
    theirs, report = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    ids, decoder_ids, mask = pairs((30, 4, 17))
    with torch.no_grad():
        want = theirs.eval()(ids, attention_mask=mask, decoder_input_ids=decoder_ids).logits
        assert (ours.logits(ours(ids, decoder_ids, mask)) - want).abs().max() < 1e-4
    assert theirs.config.decoder_start_token_id == 0


def test_files_as_on_the_hub(tmp_path):
    """google-t5/t5-small: the embedding three times, a table of cross-attention that nothing reads, an older name."""
    theirs = reference("1.0")
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"architectures": ["T5WithLMHeadModel"]}
    for key in ("scale_decoder_outputs", "tie_word_embeddings", "num_decoder_layers", "is_gated_act"):
        del config[key]
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "model.safetensors")
    for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors["shared.weight"].clone()
    tensors["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = torch.zeros(8, 4)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    same_logits(from_pretrained(tmp_path), theirs)
    tensors["lm_head.weight"] += 1
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"differs from"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feed_forward_proj": "gated-mish"}, "feed_forward_proj 'gated-mish' is not supported"),
        ({"feed_forward_proj": "gated-gelu"}, r"missing for t5: encoder.block.0.layer.1.DenseReluDense.wi_0"),
        ({"architectures": ["T5EncoderModel"]}, "T5EncoderModel"),
        ({"num_layers": 3}, r"missing for t5: encoder\.block\.2"),
        ({"d_kv": 8}, "shape"),
        ({"relative_attention_num_buckets": 16}, "relative_attention_bias.weight has shape"),
        ({"relative_attention_max_distance": 4}, "relative_attention_max_distance"),
    ],
)
def test_what_does_not_fit_is_named(change, message, tmp_path):
    reference("1.0").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        from_pretrained(tmp_path)


def test_what_no_family_has_is_not_written(tmp_path):
    model = EncoderDecoder(EncoderDecoderConfig(vocab_size=9, position="sinusoidal", norm="layernorm", bias=True))
    with pytest.raises(UserError, match=r"position sinusoidal.*t5"):
        save_pretrained(model, tmp_path)
