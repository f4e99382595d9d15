"""Pipelines as a person uses them: every mistake one clear error, iterators read as they come, the verb."""

from __future__ import annotations

import json

import pytest

import zero2hero as z2h
from zero2hero.cli import main
from zero2hero.errors import UserError
from zero2hero.language_model import LanguageModel
from zero2hero.model_configs import EncoderConfig, EncoderDecoderConfig
from zero2hero.models import Decoder, DecoderConfig, Encoder, EncoderDecoder, init_weights, save_pretrained
from zero2hero.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = ["The fox lives in Paris.", "A film about a dog."]
SHAPE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """What a model is for -> the folder of such a model."""
    word_piece = Tokenizer.train(TEXTS, 90, kind="wordpiece")

    def make(kind: str):
        folder = tmp_path_factory.mktemp(kind)
        if kind == "decoder":
            tokenizer = Tokenizer.train(TEXTS, vocab_size=270)
            model = Decoder(DecoderConfig(vocab_size=270, max_position_embeddings=30, **SHAPE))
            init_weights(model)
            z2h.save(LanguageModel(model, tokenizer), folder)
            return folder
        tokenizer = word_piece
        if kind == "encoder-decoder":
            tokenizer = Tokenizer.train(TEXTS, 140, kind="unigram")
            model = EncoderDecoder(EncoderDecoderConfig(vocab_size=tokenizer.vocab_size, **SHAPE))
        else:
            config = EncoderConfig(vocab_size=90, max_position_embeddings=30, task=kind, pad_token_id=0, **SHAPE)
            model = Encoder(config)
        init_weights(model)
        save_pretrained(model, folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize(
    ("kind", "first", "cannot"),
    [
        ("decoder", "text-generation", "fill-mask"),
        ("encoder-decoder", "text2text-generation", "text-generation"),
        ("masked_lm", "fill-mask", "ner"),
        ("sequence_classification", "text-classification", "question-answering"),
        ("token_classification", "token-classification", "sentiment-analysis"),
        ("question_answering", "question-answering", "translation_en_to_de"),
        ("features", "feature-extraction", "image-classification"),
    ],
)
def test_what_a_model_can_do(folder_of, kind, first, cannot):
    folder = folder_of(kind)
    assert z2h.pipeline(model=folder).task == first
    with pytest.raises(UserError, match=f"{kind}.*cannot do.*it can do {first}"):
        z2h.pipeline(cannot, folder)


def test_mistakes_in_what_is_asked_for(folder_of):
    with pytest.raises(UserError, match=r"no task 'fil-mask'\. Did you mean 'fill-mask'.* text-generation, "):
        z2h.pipeline("fil-mask", "anywhere")
    with pytest.raises(UserError, match="no task 'translation_german'"):
        z2h.pipeline("translation_german", "anywhere")
    with pytest.raises(UserError, match="model="):
        z2h.pipeline("fill-mask")
    with pytest.raises(UserError, match="there is no folder"):
        z2h.pipeline("fill-mask", "./nowhere")
    with pytest.raises(UserError, match="unknown dtype"):
        z2h.pipeline("fill-mask", folder_of("masked_lm"), dtype="float23")
    with pytest.raises(UserError, match=r"no setting 'aggregation_stategy'\. Did you mean 'aggregation_strategy'"):
        z2h.pipeline("ner", folder_of("token_classification"), aggregation_stategy="simple")


@pytest.fixture(scope="module")
def classify(folder_of):
    return z2h.pipeline("text-classification", folder_of("sequence_classification"))


@pytest.mark.parametrize(
    "inputs",
    [3, None, b"text", [1], ["a", None], [["a", "b"]], {"texts": "a"}, {"text": 1}, [{"text": "a", "text_pair": None}]],
)
def test_inputs_of_the_wrong_kind(classify, inputs):
    with pytest.raises(UserError, match="an input of text-classification is a text or a pair"):
        classify(inputs)


def test_mistakes_in_inputs_and_settings(classify, folder_of):
    assert classify([]) == []
    assert classify(()) == []
    with pytest.raises(UserError, match=r"has no setting 'topk'\. Did you mean 'top_k'"):
        classify("a", topk=1)
    with pytest.raises(UserError, match="batch_size"):
        classify("a", batch_size=0)
    with pytest.raises(UserError, match=r"function_to_apply is one of.* Did you mean 'softmax'"):
        classify("a", function_to_apply="sofmax")
    with pytest.raises(UserError, match="tokens, the model reads 30 at most"):
        classify(["a", "dog " * 40])
    assert classify("dog " * 40, truncation=True)[0]["score"] > 0

    fill = z2h.pipeline("fill-mask", folder_of("masked_lm"))
    with pytest.raises(UserError, match=r"no \[MASK\] in 'The fox"):
        fill(TEXTS)
    with pytest.raises(UserError, match="targets is empty"):
        fill("[MASK]", targets=[])
    find = z2h.pipeline("ner", folder_of("token_classification"))
    with pytest.raises(UserError, match="Did you mean 'average'"):
        find("a", aggregation_strategy="avarage")
    choose = z2h.pipeline("zero-shot-classification", folder_of("decoder"))
    with pytest.raises(UserError, match="needs candidate_labels"):
        choose("a")
    with pytest.raises(UserError, match=r"no place \{\}"):
        choose("a", ["b"], hypothesis_template="It is")
    with pytest.raises(UserError, match="multi_label"):
        choose("a", ["b"], multi_label=True)
    with pytest.raises(UserError, match="a model of entailment"):
        z2h.pipeline("zero-shot-classification", folder_of("sequence_classification"))("a", ["b"])
    answer = z2h.pipeline("question-answering", folder_of("question_answering"))
    for wrong in ({"question": "a"}, {"question": "a", "context": " "}, "a", None, [{}]):
        with pytest.raises(UserError, match="an input of question-answering is"):
            answer(wrong)
    with pytest.raises(UserError, match="2 questions for 3 contexts"):
        answer(question=["a", "b"], context=["c"] * 3)
    with pytest.raises(UserError, match="no room for the context"):
        answer(question="dog " * 40, context="b")
    with pytest.raises(UserError, match="at least 1"):
        answer(question="a", context="b", top_k=0)
    write = z2h.pipeline("text-generation", folder_of("decoder"))
    with pytest.raises(UserError, match="no chat template"):
        write([{"role": "user", "content": "Hi"}])
    with pytest.raises(UserError, match="Did you mean 'temperature'"):
        write("Hi", temprature=1)
    with pytest.raises(UserError, match="tokens; the model's context is 30"):
        write("Hi " * 40)
    with pytest.raises(UserError, match="pooling is 'mean'"):
        z2h.pipeline("feature-extraction", folder_of("features"))("a", pooling="max")
    with pytest.raises(UserError, match="num_return_sequences is from 1 to num_beams"):
        z2h.pipeline("summarization", folder_of("encoder-decoder"))("a", num_return_sequences=9)


def test_an_iterator_is_read_as_results_are_asked_for(classify):
    read = []

    def source():
        for i in range(10**9):  # an endless one would do
            read.append(i)
            yield f"dog {i % 3}"

    results = classify(source(), batch_size=2)
    assert read == []
    first = [next(results) for _ in range(3)]
    assert read == [0, 1, 2, 3]
    assert first == classify(["dog 0", "dog 1", "dog 2"], batch_size=2)
    with pytest.raises(UserError, match="not int"):
        list(classify(iter([1])))


def test_results_do_not_depend_on_the_batch(classify):
    texts = [*TEXTS, "dog", "The fox lives in Paris with a dog"]
    alone = [classify(text)[0] for text in texts]
    for batch_size in (1, 3, 8):
        for one, other in zip(alone, classify(texts, batch_size=batch_size)):
            assert one["label"] == other["label"]
            assert abs(one["score"] - other["score"]) < 1e-5


def test_bf16(folder_of, bf16):
    results = z2h.pipeline("fill-mask", folder_of("masked_lm"), dtype="bf16")("The [MASK].", top_k=2)
    assert [type(r["score"]) for r in results] == [float, float]


# --- the verb -------------------------------------------------------------------------------------------------


def run(capsys, *words):
    assert main(["run-pipeline", *map(str, words)]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_the_verb(folder_of, tmp_path, capsys):
    folder = folder_of("sequence_classification")
    classify = z2h.pipeline(model=folder)
    assert run(capsys, "sentiment-analysis", TEXTS[0], "--model", folder) == [classify(TEXTS[0])]
    pair = {"text": "A dog", "text_pair": "A fox"}
    assert run(capsys, "text-classification", json.dumps(pair), "--model", folder) == [classify(pair)]
    (tmp_path / "lines.txt").write_text("\n".join(TEXTS) + "\n")
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, [TEXTS[0], pair])) + "\n")
    many = ["text-classification", "--model", folder, "--settings", "{top_k: 1}", "--file"]
    assert run(capsys, *many, tmp_path / "lines.txt") == classify(TEXTS, top_k=1)
    assert run(capsys, *many, tmp_path / "lines.jsonl") == classify([TEXTS[0], pair], top_k=1)

    qa = folder_of("question_answering")
    one = {"question": "Where?", "context": TEXTS[0]}
    got = run(capsys, "question-answering", json.dumps(one), "--model", qa, "--settings", "{top_k: 2}")
    assert got == [z2h.pipeline(model=qa)(one, top_k=2)]


def test_mistakes_on_the_command_line(folder_of, tmp_path, capsys):
    folder = folder_of("sequence_classification")
    (tmp_path / "broken.jsonl").write_text('"a"\n{"text": \n')
    (tmp_path / "latin.txt").write_bytes(b"\xe4\n")
    for words, says in [
        (["clasify", "a", "--model", folder], "no task 'clasify'"),
        (["fill-mask", "[MASK]", "--model", folder], "it can do text-classification"),
        (["text-classification", "--model", folder], "give a text, or --file"),
        (["text-classification", "a", "--model", folder, "--file", "b"], "give a text, or --file"),
        (["text-classification", "a"], "model"),
        (["text-classification", "a", "--model", folder, "--settings", "{topk: 1}"], "Did you mean 'top_k'"),
        (["text-classification", "--model", folder, "--file", tmp_path / "no.txt"], "cannot read"),
        (["text-classification", "--model", folder, "--file", tmp_path / "latin.txt"], "cannot read"),
        (["text-classification", "--model", folder, "--file", tmp_path / "broken.jsonl"], "line 2: not JSON"),
    ]:
        assert main(["run-pipeline", *map(str, words)]) == 2, words
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1, lines
        assert says in lines[0]
