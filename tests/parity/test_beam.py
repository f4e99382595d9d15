"""Beam search finds the texts and scores that transformers finds, and never less than greedy decoding would."""

from __future__ import annotations

import itertools

import pytest
import torch

from zero2hero.config import DecoderConfig
from zero2hero.errors import UserError
from zero2hero.generate.beam import beam_search
from zero2hero.models import Decoder, EncoderDecoder, EncoderDecoderConfig, from_pretrained

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("one_thread")

VOCAB, EOS, LENGTH = 16, 1, 9
PENALTIES, STOPPING = (0.6, 1.0, 2.0), (False, True, "never")


def reference(kind: str, seed: int):
    """A tiny model of transformers that likes to end its texts, now and then."""
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=VOCAB, n_positions=32, n_embd=16, n_layer=1, n_head=2,
                                         bos_token_id=None, eos_token_id=EOS, pad_token_id=0)  # fmt: skip
        model = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.T5Config(vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2,
                                       decoder_start_token_id=0)  # fmt: skip
        model = transformers.T5ForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.6, generator=generator)
    return model.eval()


def prompt_for(seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(1000 + seed)
    length = int(torch.randint(1, 8, (), generator=generator))
    return torch.randint(2, VOCAB, (length,), generator=generator).tolist()


def theirs(model, prompt: list[int], num_beams: int, **settings) -> list[tuple[list[int], float]]:
    ids = torch.tensor([prompt])
    said = model.generate(
        ids, attention_mask=torch.ones_like(ids), num_beams=num_beams, max_new_tokens=LENGTH, do_sample=False,
        num_return_sequences=num_beams, return_dict_in_generate=True, output_scores=True, **settings,
    )  # fmt: skip
    written = said.sequences[:, 1 if model.config.is_encoder_decoder else len(prompt) :]
    texts = [_until_end(row.tolist()) for row in written]
    if num_beams > 1:
        return list(zip(texts, said.sequences_scores.tolist()))
    logprobs = model.compute_transition_scores(said.sequences, said.scores, normalize_logits=True)
    return [(texts[0], float(logprobs[0].sum()) / len(texts[0]) ** settings["length_penalty"])]


def _until_end(ids: list[int]) -> list[int]:
    return ids[: ids.index(EOS) + 1] if EOS in ids else ids


@pytest.fixture(scope="module", params=[(kind, seed) for seed in range(25) for kind in ("gpt2", "t5")], ids=str)
def pair(request, tmp_path_factory):
    """(their model, our model, a prompt)."""
    kind, seed = request.param
    folder = tmp_path_factory.mktemp("beam")
    model = reference(kind, seed)
    model.save_pretrained(folder)
    return model, from_pretrained(folder), prompt_for(seed)


def test_texts_and_scores_equal_those_of_transformers(pair):
    model, ours, prompt = pair
    for num_beams, penalty, stopping in itertools.product((1, 2, 4), PENALTIES, STOPPING):
        if num_beams == 1 and stopping is not False:
            continue  # one beam is greedy decoding: there is nothing to stop early
        settings = {"length_penalty": penalty} | ({"early_stopping": stopping} if num_beams > 1 else {})
        want = theirs(model, prompt, num_beams, **settings)
        (got,) = beam_search(ours, [prompt], num_beams=num_beams, max_new_tokens=LENGTH, length_penalty=penalty,
                             early_stopping=stopping, num_return_sequences=num_beams, eos_ids=[EOS])  # fmt: skip
        assert [text.ids for text in got] == [ids for ids, _ in want], (num_beams, penalty, stopping)
        assert [text.score for text in got] == pytest.approx([score for _, score in want], abs=2e-5)


def decoder() -> Decoder:
    model = Decoder(DecoderConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                  max_position_embeddings=20)).eval()  # fmt: skip
    return _random(model)


def encoder_decoder() -> EncoderDecoder:
    return _random(EncoderDecoder(EncoderDecoderConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1,
                                                       num_attention_heads=2)).eval())  # fmt: skip


def _random(model):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.5, generator=generator)
    return model


@pytest.mark.parametrize("make", [decoder, encoder_decoder])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_prompt_among_others_equals_the_prompt_alone(make, num_beams):
    model = make()
    prompts = [prompt_for(seed) for seed in range(12)]
    assert len({len(prompt) for prompt in prompts}) > 3
    settings = {"num_beams": num_beams, "num_return_sequences": num_beams, "eos_ids": [EOS, 2], "max_new_tokens": 12}
    together = beam_search(model, prompts, **settings)
    assert len({len(texts[0].ids) for texts in together}) > 1
    for prompt, texts in zip(prompts, together):
        (alone,) = beam_search(model, [prompt], **settings)
        assert [t.ids for t in texts] == [t.ids for t in alone]
        assert [t.score for t in texts] == pytest.approx([t.score for t in alone], abs=1e-5)


@pytest.mark.parametrize("make", [decoder, encoder_decoder])
def test_scores_are_the_likelihood_of_the_texts(make):
    """By one full forward over each text."""
    model = make()
    for seed in range(5):
        prompt = prompt_for(seed)
        (texts,) = beam_search(model, [prompt], num_beams=4, num_return_sequences=4, eos_ids=[EOS],
                               max_new_tokens=8, length_penalty=0.6)  # fmt: skip
        assert [t.score for t in texts] == sorted((t.score for t in texts), reverse=True)
        for text in texts:
            ids = torch.tensor([text.ids])
            with torch.no_grad():
                if isinstance(model, Decoder):
                    logits = model.logits(model(torch.tensor([prompt + text.ids]))[:, len(prompt) - 1 : -1])
                else:
                    logits = model.logits(model(torch.tensor([prompt]), torch.tensor([[0, *text.ids[:-1]]])))
            total = logits.log_softmax(-1).gather(-1, ids[..., None]).sum()
            assert text.score == pytest.approx(float(total) / len(text.ids) ** 0.6, abs=1e-5)


def test_all_beams_find_the_best_text_there_is():
    """With as many beams as there are texts, the search is exhaustive."""
    model = encoder_decoder()
    with torch.no_grad():
        keep = torch.tensor([0.0] * 5 + [-50.0] * (VOCAB - 5))  # five tokens that are ever likely
    plain = model.logits
    model.logits = lambda hidden: plain(hidden) + keep  # type: ignore[method-assign]
    (texts,) = beam_search(model, [[3, 4]], num_beams=7, max_new_tokens=2, length_penalty=0.0, eos_ids=[EOS])
    best = -float("inf")
    with torch.no_grad():
        first = model.logits(model(torch.tensor([[3, 4]]), torch.tensor([[0]])))[0, 0].log_softmax(-1)
        for a in range(5):
            if a == EOS:
                best = max(best, float(first[a]))
                continue
            second = model.logits(model(torch.tensor([[3, 4]]), torch.tensor([[0, a]])))[0, 1].log_softmax(-1)
            best = max(best, *(float(first[a] + second[b]) for b in range(5)))
    assert texts[0].score == pytest.approx(best, abs=1e-5)


def test_training_mode_is_left_as_it_was_and_dropout_is_off():
    model = EncoderDecoder(EncoderDecoderConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1,
                                                num_attention_heads=2, dropout=0.5))  # fmt: skip
    _random(model).train()
    before = beam_search(model, [[3, 4]], eos_ids=[EOS], max_new_tokens=6)
    assert model.training
    assert before == beam_search(model.eval(), [[3, 4]], eos_ids=[EOS], max_new_tokens=6)


def test_a_text_ends_with_the_context():
    (texts,) = beam_search(decoder(), [[3] * 18], num_beams=2, max_new_tokens=50)
    assert len(texts[0].ids) == 3  # the last token is never read
    assert beam_search(decoder(), []) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 0}, "num_beams and max_new_tokens"),
        ({"max_new_tokens": 0}, "num_beams and max_new_tokens"),
        ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences"),
        ({"early_stopping": "always"}, "early_stopping"),
        ({"num_beams": 9}, "needs a vocabulary of at least 18"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(UserError, match=message):
        beam_search(decoder(), [[3]], **settings)


@pytest.mark.parametrize("prompt", [[], [VOCAB], [-1]])
def test_a_source_that_cannot_be_read(prompt):
    with pytest.raises(UserError, match="source 0"):
        beam_search(encoder_decoder(), [prompt])
