"""Invariants 2, 3 and 8 for BERT and RoBERTa: every head equals transformers', in both directions, padded or packed."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from zero2hero.errors import UserError
from zero2hero.models import Encoder, EncoderConfig, from_pretrained, init_weights, save_pretrained, with_head
from zero2hero.models.heads import embed, mean_pool

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = {
    "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 56,
    "max_position_embeddings": 40,
}  # fmt: skip
HEADS = ["Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"]
CASES = {f"{family}{head}": {} for family in ("Bert", "Roberta") for head in HEADS} | {
    "BertForMaskedLM, relu": {"hidden_act": "relu", "layer_norm_eps": 1e-3},
    "BertForSequenceClassification, three labels": {"id2label": {0: "no", 1: "maybe", 2: "yes"}},
    "RobertaForTokenClassification, five labels": {"num_labels": 5, "type_vocab_size": 1},
    "RobertaForMaskedLM, another padding": {"pad_token_id": 3},
}


def reference(name: str, settings: dict):
    """A model of transformers, every weight of it random: biases and norms too."""
    kind = name.split(",")[0]
    config = getattr(transformers, "BertConfig" if kind.startswith("Bert") else "RobertaConfig")
    model = getattr(transformers, kind)(config(**SHAPE | settings)).eval()
    model.set_attn_implementation("eager")
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if name.endswith("Norm.weight") else 0.0, 0.4, generator=generator)
    return model


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """(their model, our model, folder with their file, folder with ours)."""
    folder = tmp_path_factory.mktemp("encoder")
    theirs = reference(request.param, CASES[request.param])
    theirs.save_pretrained(folder / "theirs")
    ours = from_pretrained(folder / "theirs")
    save_pretrained(ours, folder / "ours")
    return theirs, ours, folder / "theirs", folder / "ours"


def texts(lengths=(24, 24, 24)):
    """ids, attention mask and segment numbers; RoBERTa's files read id 1 (here also 3) as padding wherever it is."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, 61, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    types = (torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None] // 2).long() * mask
    return ids, mask, types


def answers(model, ids, mask, types) -> list[torch.Tensor]:
    """What a model of either side says: hidden states of text and the head's numbers."""
    with torch.no_grad():
        if isinstance(model, Encoder):
            hidden = model(ids, mask, types)
            return [hidden, *_ends(model.logits(hidden), model.config.task)]
        said = model(ids, attention_mask=mask, token_type_ids=types, output_hidden_states=True)
        if "last_hidden_state" in said:
            return [said.last_hidden_state, said.pooler_output]
        return [said.hidden_states[-1], *([said.logits] if "logits" in said else [said.start_logits, said.end_logits])]


def _ends(logits: torch.Tensor, task: str) -> list[torch.Tensor]:
    return list(logits.unbind(-1)) if task == "question_answering" else [logits]


def same_answers(ours, theirs, lengths=(24, 24, 24)) -> None:
    ids, mask, types = texts(lengths)
    types = types.clamp(max=ours.config.type_vocab_size - 1)
    given = ids.masked_fill(mask == 0, theirs.config.pad_token_id)
    for got, want in zip(answers(ours, given, mask, types), answers(theirs, given, mask, types), strict=True):
        assert got.shape == want.shape
        assert want.std() > 0.1, "a test of numbers that hardly differ proves nothing"
        if got.shape[:2] == mask.shape:
            got, want = got[mask == 1], want[mask == 1]
        assert (got - want).abs().max() < 1e-4


def test_answers_in_both_directions(case):
    theirs, ours, _, our_folder = case
    same_answers(ours, theirs)
    same_answers(ours, theirs, (24, 3, 11))
    again, report = type(theirs).from_pretrained(our_folder, output_loading_info=True, attn_implementation="eager")
    assert not any(report.values()), report
    same_answers(ours, again.eval(), (5, 24, 11))


def test_tensors_are_byte_equal(case):
    before, after = (load_file(folder / "model.safetensors") for folder in case[2:])
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert value.dtype == after[key].dtype
        assert torch.equal(value, after[key]), key


def test_config_keeps_what_it_said(case):
    _, _, *folders = case
    before, after = (transformers.AutoConfig.from_pretrained(folder).to_dict() for folder in folders)
    for config in (before, after):
        for key in ("_name_or_path", "label2id"):  # we always write the inverse of id2label
            config.pop(key, None)
    assert before == after
    written = json.loads((folders[1] / "config.json").read_text())
    assert written["architectures"] == json.loads((folders[0] / "config.json").read_text())["architectures"]


def test_a_padded_text_equals_the_text_alone(case):
    """On either side; and whatever ids the padding has."""
    _, ours, *_ = case
    ids, mask, types = texts((24, 3, 11))
    types = types.clamp(max=ours.config.type_vocab_size - 1)
    together = answers(ours, ids, mask, types)
    left = [torch.stack([row.roll(24 - n) for row, n in zip(x, (24, 3, 11))]) for x in (ids, mask, types)]
    for row, length in enumerate((24, 3, 11)):
        alone = answers(ours, ids[row : row + 1, :length], None, types[row : row + 1, :length])
        padded_left = ours(left[0], left[1], left[2])[row, 24 - length :]
        assert (padded_left - alone[0][0]).abs().max() < 1e-5
        for a, b in zip(together, alone, strict=True):
            a = a[row, :length] if a.shape[:2] == mask.shape else a[row]
            assert (a - b[0]).abs().max() < 1e-5


def test_packed_texts_equal_the_texts_alone(case):
    _, ours, *_ = case
    ids, _, _ = texts()
    documents = torch.tensor([0] * 7 + [1] * 12 + [2] * 5)[None]
    positions = torch.cat([torch.arange(n) for n in (7, 12, 5)])[None]
    with torch.no_grad():
        packed = ours(ids[:1], positions=positions, document_ids=documents)
        alone = torch.cat([ours(part) for part in ids[:1].split((7, 12, 5), 1)], 1)
    assert (packed - alone).abs().max() < 1e-5


def test_every_token_sees_every_other_and_no_padding():
    model = Encoder(EncoderConfig(**SHAPE)).eval()
    ids, mask, _ = texts((10, 24))
    x = torch.randn(2, 24, 32, generator=torch.Generator().manual_seed(2)).requires_grad_()
    model.embed_norm.register_forward_hook(lambda module, inputs, output: x)
    model(ids, mask)[0, 4, :7].sum().backward()
    reached = x.grad.abs().sum(-1) > 0
    assert reached[0].tolist() == [True] * 10 + [False] * 14
    assert not reached[1].any()


def test_files_as_on_the_hub(tmp_path):
    """google-bert/bert-base-uncased: gamma and beta, the head's matrix twice, heads that masked LM does not use."""
    theirs = reference("BertForPreTraining", {})
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"architectures": ["BertForMaskedLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors = {k.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): v for k, v in tensors.items()}
    tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
    tensors["bert.embeddings.position_ids"] = torch.arange(40)[None]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ours = from_pretrained(tmp_path)
    assert ours.head.decoder.weight is ours.embed_tokens.weight
    ids, mask, types = texts((24, 5))
    with torch.no_grad():
        want = theirs(ids, attention_mask=mask, token_type_ids=types).prediction_logits
        got = ours.logits(ours(ids, mask, types))
    assert (got - want)[mask == 1].abs().max() < 1e-4
    tensors["cls.predictions.decoder.weight"] += 1
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="differs from"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["BertForMaskLM"]}, "Did you mean 'BertForMaskedLM'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"is_decoder": True}, "is_decoder"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"hidden_act": "mish"}, "hidden_act"),
        ({"num_hidden_layers": 3}, "missing for bert: bert.encoder.layer.2"),
        ({"num_hidden_layers": 1}, "no place in bert: bert.encoder.layer.1"),
        ({"hidden_size": 64}, "shape"),
        ({"num_attention_heads": 5}, "divisible"),
    ],
)
def test_what_does_not_fit_is_named(change, message, tmp_path):
    reference("BertForMaskedLM", {}).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        from_pretrained(tmp_path)


def test_a_misspelt_tensor_is_named_with_its_neighbour(tmp_path):
    reference("RobertaForTokenClassification", {}).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["roberta.encoder.layer.0.attention.self.quary.weight"] = tensors.pop(
        "roberta.encoder.layer.0.attention.self.query.weight"
    )
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"self\.query\.weight.*Did you mean .*self\.quary\.weight"):
        from_pretrained(tmp_path)


def test_a_text_that_is_too_long_is_refused():
    model = Encoder(EncoderConfig(**SHAPE | {"position_offset": 2})).eval()
    assert model(torch.zeros(1, 38, dtype=torch.long)).shape == (1, 38, 32)
    with pytest.raises(UserError, match="position 38 is past this model's last, 37"):
        model(torch.zeros(1, 39, dtype=torch.long))


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_a_pretrained_body_gets_a_new_head_and_opens_there(model_type, tmp_path):
    shape = SHAPE | ({"position_offset": 2, "pad_token_id": 1, "max_position_embeddings": 42}
                     if model_type == "roberta" else {})  # fmt: skip
    pretrained = Encoder(EncoderConfig(**shape)).eval()
    init_weights(pretrained, 3)
    tuned = with_head(pretrained, "sequence_classification", ["bad", "good", "odd"], seed=1)
    assert torch.equal(tuned.embed_tokens.weight, pretrained.embed_tokens.weight)
    assert tuned.embed_tokens.weight is not pretrained.embed_tokens.weight
    again = with_head(pretrained, "sequence_classification", ["bad", "good", "odd"], seed=1)
    assert all(torch.equal(a, b) for a, b in zip(tuned.parameters(), again.parameters(), strict=True))
    back = with_head(tuned, "masked_lm")
    assert torch.equal(back.head.decoder.weight, pretrained.embed_tokens.weight)
    save_pretrained(tuned, tmp_path)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert theirs.config.model_type == model_type
    assert theirs.config.id2label == {0: "bad", 1: "good", 2: "odd"}
    assert from_pretrained(tmp_path).config.id2label == {0: "bad", 1: "good", 2: "odd"}
    ids, mask, _ = texts((24, 9))
    ids = ids.masked_fill(mask == 0, theirs.config.pad_token_id or 0)
    with torch.no_grad():
        want = theirs(ids, attention_mask=mask).logits
        got = tuned.logits(tuned(ids, mask))
    assert (got - want).abs().max() < 1e-4


def test_embeddings_are_means_of_length_one():
    model = Encoder(EncoderConfig(**SHAPE | {"task": "features"})).eval()
    ids, mask, _ = texts((24, 3, 11))
    with torch.no_grad():
        together = embed(model, ids, mask)
        assert torch.allclose(together.norm(dim=-1), torch.ones(3))
        hidden = model(ids[1:2, :3])
        alone = hidden.mean(1) / hidden.mean(1).norm(dim=-1, keepdim=True)
        assert torch.allclose(together[1:2], alone, atol=1e-5)
        assert torch.allclose(together, embed(model, torch.where(mask == 1, ids, 0), mask))
    assert torch.equal(mean_pool(hidden), hidden.mean(1))
