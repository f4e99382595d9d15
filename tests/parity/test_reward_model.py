"""Reward models in and out of transformers' files, with equal scores; and scores that do not depend on the batch."""

from __future__ import annotations

import json
import warnings

import pytest
import torch

import zero2hero as z2h
from zero2hero.align.reward_model import load_reward_model, reward_function, scores, scores_of_ids, with_score_head
from zero2hero.errors import UserError
from zero2hero.language_model import load_parts
from zero2hero.models import from_pretrained, save_pretrained
from zero2hero.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = {
    "vocab_size": 61, "max_position_embeddings": 64, "hidden_size": 32, "intermediate_size": 56,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
GPT2 = {"vocab_size": 61, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
FAMILIES = {
    "llama": SHAPE, "mistral": SHAPE | {"sliding_window": 5}, "qwen2": SHAPE | {"tie_word_embeddings": True},
    "qwen3": SHAPE | {"head_dim": 12}, "gpt2": GPT2, "arcee": SHAPE, "mixtral": SHAPE | {"num_local_experts": 4},
    "qwen3_moe": SHAPE | {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 12},
    "gemma": SHAPE | {"head_dim": 12},
    "gemma2": SHAPE | {"head_dim": 12, "final_logit_softcapping": 0.5},
    "gemma3_text": SHAPE | {"head_dim": 12},
}  # fmt: skip
TEXTS = ["Once upon a time there was a fox.", "The fox", "A fox met a very small dog in the old town, and they ran."]


def theirs_of(model_type: str, labels: int = 1):
    config = transformers.AutoConfig.for_model(model_type, num_labels=labels, **FAMILIES[model_type])
    model = transformers.AutoModelForSequenceClassification.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.3, generator=generator)
    return model


def ragged(number: int = 6) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 30, (number,), generator=generator).tolist()
    return [torch.randint(1, 61, (n,), generator=generator).tolist() for n in lengths]


def their_scores(model, texts: list[list[int]]) -> torch.Tensor:
    width = max(map(len, texts))
    ids = torch.tensor([text + [0] * (width - len(text)) for text in texts])
    with torch.no_grad():
        return model(ids, attention_mask=(ids != 0).long()).logits


@pytest.mark.parametrize("model_type", FAMILIES)
def test_scores_in_both_directions(model_type, tmp_path):
    theirs = theirs_of(model_type)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = from_pretrained(tmp_path / "theirs")
    texts = ragged()
    want = their_scores(theirs, texts)[:, 0]
    assert want.std() > 0.1
    assert (scores_of_ids(ours, texts) - want).abs().max() < 1e-5 * want.abs().max().clamp(min=1)
    save_pretrained(ours, tmp_path / "ours")
    again, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values()), report
    assert type(again) is type(theirs)
    assert torch.equal(their_scores(again.eval(), texts)[:, 0], want)


def test_what_is_missing_or_left_over_is_named(tmp_path):
    theirs_of("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(UserError, match=r"lm_head\.weight"):
        from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"id2label": {"0": "bad", "1": "good"}}))
    with pytest.raises(UserError, match=r"score\.weight has shape \[1, 32\]"):
        from_pretrained(tmp_path)


def test_alone_as_in_a_batch_whatever_pads():
    model = with_score_head(from_random())
    torch.nn.init.normal_(model.score.weight)
    texts = ragged(9)
    together = scores_of_ids(model, texts)
    assert torch.allclose(together, torch.cat([scores_of_ids(model, [text]) for text in texts]), atol=1e-5)
    # a token that pads elsewhere is a token like any other within a text
    with_zeros = [[0, 5, 0, 7], [5, 7]]
    alone = torch.cat([scores_of_ids(model, [text]) for text in with_zeros])
    assert torch.allclose(scores_of_ids(model, with_zeros), alone, atol=1e-5)
    assert abs(alone[0] - alone[1]) > 1e-3


def test_padding_behind_a_text_is_read_as_transformers_reads_it(tmp_path):
    """TRL pads with the end-of-text token where there is no other, and then never reads its own."""
    theirs = theirs_of("llama")
    theirs.config.pad_token_id = 2
    theirs.save_pretrained(tmp_path)
    texts = [[5, 9, 2], [7, 2, 2], [2]]
    with torch.no_grad():
        want = torch.cat([theirs(torch.tensor([text])).logits[:, 0] for text in texts])
    assert torch.allclose(scores_of_ids(from_pretrained(tmp_path), texts), want, atol=1e-5)


def from_random(vocab_size: int = 61):
    from zero2hero.config import DecoderConfig
    from zero2hero.models import Decoder, init_weights

    model = Decoder(DecoderConfig(vocab_size=vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                  max_position_embeddings=64))  # fmt: skip
    init_weights(model, 1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                p.normal_(0, 0.2)
    return model.eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A reward model of ours with its tokenizer, which has a padding token of its own, in a folder."""
    folder = tmp_path_factory.mktemp("reward")
    tokenizer = tiny_tokenizer()
    model = with_score_head(from_random(tokenizer.vocab_size), tokenizer)
    torch.nn.init.normal_(model.score.weight)
    save_pretrained(model, folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, vocab_size=300)


def test_pipelines_give_the_score(saved):
    ours = z2h.pipeline("text-classification", model=str(saved))
    theirs = transformers.pipeline("text-classification", model=str(saved), device="cpu")
    for got, want in zip(ours(TEXTS), theirs(TEXTS), strict=True):
        assert got["label"] == want["label"] == "LABEL_0"
        assert got["score"] == pytest.approx(want["score"], abs=1e-5)


def test_a_reward_model_does_not_write(saved):
    with pytest.raises(UserError, match="scores texts"):
        z2h.load(str(saved))
    model, _ = load_reward_model(saved)
    with pytest.raises(UserError, match="ForSequenceClassification"):
        _ = model.head_weight


def test_scores_of_texts_and_of_their_ids_are_equal(saved):
    model, tokenizer = load_reward_model(saved)
    prompts, completions = ["Once upon a time", "The", ""], [" there was", "", " fox"]
    ids = [[*tokenizer.encode(p + c), tokenizer.eos_token_id] for p, c in zip(prompts, completions, strict=True)]
    got = scores(model, tokenizer, prompts, completions)
    assert torch.allclose(got, scores_of_ids(model, ids), atol=1e-6)
    assert torch.allclose(got, scores(model, tokenizer, [i[:1] for i in ids], [i[1:] for i in ids]), atol=1e-6)
    assert reward_function(saved)(prompts=prompts, completions=completions) == pytest.approx(got.tolist(), abs=1e-6)


def test_a_text_longer_than_the_context_keeps_its_end(saved):
    model, _ = load_reward_model(saved)
    long = [5 + i % 50 for i in range(100)]
    with pytest.warns(UserWarning, match="1 of 2 texts are longer than the reward model's context of 64"):
        got = scores_of_ids(model, [long, [3, 4]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert got[0] == pytest.approx(float(scores_of_ids(model, [long[-64:]])), abs=1e-5)


def test_other_models_are_refused(saved, tmp_path):
    tokenizer = tiny_tokenizer()
    save_pretrained(from_random(tokenizer.vocab_size), tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is no reward model: it holds a Decoder"):
        load_reward_model(tmp_path)
    theirs_of("qwen3", labels=3).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="with 3 labels"):
        load_reward_model(tmp_path)


def test_an_adapter_that_scores_opens_with_its_language_model(tmp_path):
    """What RewardTrainer leaves with a peft_config: the base is a language model, the head is in the adapter."""
    peft = pytest.importorskip("peft")
    config = transformers.LlamaConfig(**SHAPE)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    theirs = transformers.LlamaForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(task_type="SEQ_CLS", target_modules="all-linear", r=4)).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name or "score" in name:
                parameter.normal_(0, 0.3)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = load_parts(tmp_path / "adapter", "cpu", None).model
    texts = ragged()
    want = their_scores(theirs, texts)[:, 0]
    assert want.std() > 0.1
    assert (scores_of_ids(ours, texts) - want).abs().max() < 1e-5 * want.abs().max().clamp(min=1)
