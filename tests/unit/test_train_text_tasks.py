"""`zero2hero train TASK` for texts: every verb ends with a directory that pipelines and transformers open."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers
from scipy import stats

import zero2hero as z2h
from zero2hero.cli import main
from zero2hero.data.labelled import LabelledTexts, RowsByLength, drop_tokens
from zero2hero.data.tables import open_tables
from zero2hero.errors import UserError
from zero2hero.models.decoder import init_weights
from zero2hero.models.encoder import Encoder, EncoderConfig
from zero2hero.train import objectives
from zero2hero.train.text2text_generation import bleu, exact_match
from zero2hero.train.text_classification import correlations

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ["--precision", "fp32", "--report_to", "[]", "--model.hidden_size", "32", "--model.num_attention_heads", "2",
         "--model.num_hidden_layers", "1", "--tokenizer.vocab_size", "300"]  # fmt: skip
STEPS = ["--train.max_steps", "4", "--train.per_device_train_batch_size", "4", "--train.max_length", "48"]


def train(task, folder, *words):
    assert main(["train", task, "--output_dir", str(folder), *STEPS, *map(str, words)]) == 0
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def fails(capsys, task, *words):
    """Run, expect exit code 2 and one line on the error stream; return it."""
    assert main(["train", task, *STEPS, *map(str, words)]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("zero2hero: ")]
    assert len(error) == 1
    return error[0]


def last(rows, name):
    return [row[name] for row in rows if name in row][-1]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert") / "run"
    rows = train("fill-mask", folder, *SMALL, "--data", "sentiment:200", "--whole_words")
    assert last(rows, "eval_loss") > 0
    return folder


# --- the verbs ------------------------------------------------------------------------------------------------


def test_fill_mask_makes_an_encoder_that_others_open(bert):
    found = z2h.pipeline("fill-mask", model=bert)("The soup was [MASK].")
    theirs = transformers.pipeline("fill-mask", model=str(bert), device="cpu")("The soup was [MASK].")
    assert [one["token"] for one in found] == [one["token"] for one in theirs]
    assert np.allclose([one["score"] for one in found], [one["score"] for one in theirs], atol=1e-5)
    card = (bert / "README.md").read_text()
    assert "pipeline_tag: fill-mask" in card


def test_a_base_models_body_is_kept_and_its_head_is_new(bert, tmp_path):
    rows = train("text-classification", tmp_path / "run", "--data", "sentiment:60", "--base_model", bert,
                 "--precision", "fp32", "--report_to", "[]", "--train.learning_rate", "0")  # fmt: skip
    assert 0 <= last(rows, "eval_accuracy") <= 1
    before, after = (z2h.pipeline(model=folder).model.state_dict() for folder in (bert, tmp_path / "run"))
    assert all(torch.equal(before[name], after[name]) for name in before if not name.startswith("head."))
    assert set(after) - set(before)
    assert z2h.pipeline(model=tmp_path / "run").task == "text-classification"


def test_a_classifier_has_its_labels_and_opens_in_transformers(tmp_path):
    train("text-classification", tmp_path / "run", *SMALL, "--data", "sentiment:60", "--token_dropout", "0.2")
    texts = ["The soup was cold.", "The waiter was friendly."]
    found = z2h.pipeline("text-classification", model=tmp_path / "run")(texts, top_k=None)
    theirs = transformers.pipeline("text-classification", model=str(tmp_path / "run"), device="cpu")(texts, top_k=None)
    assert [[one["label"] for one in row] for row in found] == [[one["label"] for one in row] for row in theirs]
    assert {one["label"] for one in found[0]} == {"negative", "positive"}
    assert np.allclose(found[0][0]["score"], theirs[0][0]["score"], atol=1e-5)


def test_pairs_of_texts_are_rated_with_a_number(tmp_path):
    lines = [f"a {i}, b {i % 3}, {i % 3 + 0.5}" for i in range(40)]
    (tmp_path / "sts.csv").write_text("\n".join(line.replace(", ", ",") for line in lines))
    rows = train("text-classification", tmp_path / "run", *SMALL, "--data", tmp_path / "sts.csv", "--text_column", "1",
                 "--text_pair_column", "2", "--label_column", "3")  # fmt: skip
    assert -1 <= last(rows, "eval_spearman") <= 1
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["problem_type"] == "regression"
    assert len(config["id2label"]) == 1
    found = z2h.pipeline("text-classification", model=tmp_path / "run")({"text": "a 1", "text_pair": "b 1"})
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run")
    theirs = model(**tokenizer("a 1", "b 1", return_tensors="pt")).logits
    assert found["score"] == pytest.approx(theirs.item(), abs=1e-5)


def test_words_are_labelled(tmp_path):
    train("token-classification", tmp_path / "run", *SMALL, "--data", "names:80")
    labels = json.loads((tmp_path / "run" / "config.json").read_text())["id2label"]
    assert labels["0"] == "O"
    assert set(labels.values()) == {"O", *(f"{b}-{kind}" for b in "BI" for kind in ("PER", "LOC", "ORG"))}
    theirs = transformers.pipeline("token-classification", model=str(tmp_path / "run"), device="cpu", ignore_labels=[])
    ours = z2h.pipeline("token-classification", model=tmp_path / "run", ignore_labels=[])
    text = "Ada Novak lives in Milan ."
    assert [one["entity"] for one in ours(text)] == [one["entity"] for one in theirs(text)]


def test_questions_are_answered_from_the_text(tmp_path):
    train("question-answering", tmp_path / "run", *SMALL, "--data", "questions:60", "--train.max_length", "200")
    found = z2h.pipeline("question-answering", model=tmp_path / "run")(question="Who?", context="Tom fell.")
    assert found["answer"] in "Tom fell."


@pytest.mark.parametrize("more", [[], ["--span_corruption", "--data", "sentiment:300"]])
def test_an_encoder_decoder_opens_in_transformers(more, tmp_path):
    more = more or ["--data", "translation:60", "--eval_samples", "5"]
    rows = train("text2text-generation", tmp_path / "run", *SMALL, "--train.max_length", "20", *more)
    assert last(rows, "eval_loss") > 0
    text = "the fox saw a boat"
    found = z2h.pipeline("text2text-generation", model=tmp_path / "run")(text, num_beams=1, max_new_tokens=8)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "run")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run")
    ids = model.generate(tokenizer(text, return_tensors="pt").input_ids, num_beams=1, max_new_tokens=8)
    assert found[0]["generated_text"] == tokenizer.decode(ids[0], skip_special_tokens=True)


def test_a_run_resumes_to_the_same_weights(tmp_path):
    words = [*SMALL, "--data", "sentiment:60", "--train.save_steps", "2"]
    train("text-classification", tmp_path / "whole", *words)
    whole = z2h.pipeline(model=tmp_path / "whole").model.state_dict()
    for name in ("checkpoints/step-000004", "model.safetensors"):
        path = tmp_path / "whole" / name
        for file in [path] if path.is_file() else path.iterdir():
            file.unlink()
    train("text-classification", tmp_path / "whole", *words, "--resume")
    resumed = z2h.pipeline(model=tmp_path / "whole").model.state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


# --- mistakes -------------------------------------------------------------------------------------------------


def test_mistakes_in_data_are_one_clear_line(tmp_path, capsys):
    def file(name, text):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    out = ["--output_dir", tmp_path / "out"]
    plain = file("plain.csv", "text,stars\nfine day,1\nbad day,2\n")
    error = fails(capsys, "text-classification", "--data", plain, *out)
    assert "--label_column" in error
    assert "'stars'" in error
    error = fails(capsys, "text-classification", "--data", plain, "--label_column", "star", *out)
    assert "Did you mean 'stars'?" in error
    same = file("same.csv", "text,label\na day,good\na night,good\nb,good\n")
    assert "every label is 'good'" in fails(capsys, "text-classification", "--data", same, *out)
    empty = file("empty.csv", "text,label\n")
    assert "no record" in fails(capsys, "text-classification", "--data", empty, *out)
    assert "no such file" in fails(capsys, "text-classification", "--data", tmp_path / "none.csv", *out)
    held = file("held.csv", "text,label\na,better\nb,good\n")
    two = file("two.csv", "text,label\na,good\nb,bad\nc,bad\n")
    error = fails(capsys, "text-classification", "--data", two, "--validation_data", held, *out, *SMALL)
    assert "line 2: the label 'better' is not one of bad, good" in error
    one, other = file("train.en", "a\nb\nc\n"), file("train.de", "a\nb\n")
    error = fails(capsys, "text2text-generation", "--data", f"[{one}, {other}]", *out)
    assert "3 lines" in error
    assert "has 2" in error
    tags = file("tags.jsonl", '{"tokens": ["a", "b"], "ner_tags": ["O"]}\n{"tokens": ["a"], "ner_tags": ["X"]}\n')
    assert "2 words and 1 labels" in fails(capsys, "token-classification", "--data", tags, *out)
    answers = {"text": ["c"], "answer_start": [0]}
    wrong = file("qa.jsonl", json.dumps({"question": "q", "context": "a b", "answers": answers}) + "\n" + "{}\n")
    assert "no column" in fails(capsys, "question-answering", "--data", wrong, *out)


def test_a_base_model_of_another_kind_or_shape_is_refused(bert, tmp_path, capsys):
    out = ["--output_dir", tmp_path / "out"]
    error = fails(capsys, "text2text-generation", "--base_model", bert, "--data", "reversal:40", *out)
    assert "is a Encoder" in error
    error = fails(capsys, "text-classification", "--base_model", bert, "--model.hidden_size", "96", *out)
    assert "leave out the --model options" in error
    error = fails(capsys, "fill-mask", "--tokenizer.kind", "bpe", "--data", "sentiment:40", *out)
    assert "--tokenizer.kind wordpiece" in error


# --- the parts ------------------------------------------------------------------------------------------------


def test_rows_of_a_step_do_not_depend_on_how_it_is_cut():
    lengths = np.random.default_rng(0).integers(1, 50, 100)
    whole = RowsByLength(lengths, 8, 1, seed=3)
    for size, together in ((1, 8), (2, 4)):
        parts = RowsByLength(lengths, size, together, seed=3)
        for step in (0, 5, 13, 40):
            rows = np.concatenate([parts[step * together + i] for i in range(together)])
            assert rows.tolist() == whole[step].tolist()


def test_an_epoch_takes_each_row_once_and_like_lengths_together():
    lengths = np.random.default_rng(0).integers(1, 50, 96)
    rows = RowsByLength(lengths, 8, 1, seed=3)
    epochs = [[rows[i] for i in range(12 * e, 12 * e + 12)] for e in range(2)]
    assert all(sorted(np.concatenate(epoch).tolist()) == list(range(96)) for epoch in epochs)
    assert np.concatenate(epochs[0]).tolist() != np.concatenate(epochs[1]).tolist()
    assert np.mean([np.ptp(lengths[batch]) for batch in epochs[0]]) < 10
    few = RowsByLength([1, 2, 3], 8, 1, seed=0)  # fewer rows than a step has: some come twice
    assert sorted(set(few[0].tolist())) == [0, 1, 2]
    assert len(few[0]) == 8


def test_masking_tokens_spares_special_ones():
    texts = LabelledTexts([np.arange(2, 40)], [np.zeros(38, dtype=np.int64)], [0], pad_id=0)
    dropped = drop_tokens(texts.batch([0]), 0.5, 1, [2, 3], 0, 7)
    changed = (dropped.ids_BT != texts.batch([0]).ids_BT)[0]
    assert 8 < changed.sum() < 30
    assert set(dropped.ids_BT[0, changed]) == {1}
    assert dropped.ids_BT[0, :2].tolist() == [2, 3]


@pytest.mark.parametrize("task", ["sequence_classification", "token_classification", "question_answering", "number"])
def test_objectives_are_sums_over_texts_however_they_are_padded(task):
    kind = "sequence_classification" if task == "number" else task
    labels = {0: "a"} if task == "number" else {0: "a", 1: "b", 2: "c"}
    model = Encoder(EncoderConfig(vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, task=kind,
                                  id2label=labels)).eval()  # fmt: skip
    init_weights(model)
    generator = np.random.default_rng(0)
    ids = [generator.integers(5, 60, n) for n in (4, 9, 6)]
    wanted = {"sequence_classification": [0, 2, 1], "number": [0.5, 2.0, -1.0],
              "question_answering": [np.array([1, 2]), np.array([3, 8]), np.array([0, 5])],
              "token_classification": [np.where(np.arange(len(x)) % 2, 1, -100) for x in ids]}[task]  # fmt: skip
    texts = LabelledTexts(ids, [0 * x for x in ids], wanted, 0, per_token=task == "token_classification")
    objective = {"number": objectives.regression, "question_answering": objectives.answer_span}.get(
        task, objectives.classification
    )
    together = objective(model, texts.batch([0, 1, 2]).to("cpu"))
    alone = [objective(model, texts.batch([i]).to("cpu")) for i in range(3)]
    assert float(together.sum) == pytest.approx(sum(float(one.sum) for one in alone), rel=1e-5)
    assert float(together.weight) == sum(float(one.weight) for one in alone)


def test_measures_are_those_of_the_literature():
    generator = np.random.default_rng(0)
    true = generator.integers(0, 6, 50).astype(float)
    predicted = true + generator.normal(size=50)
    found = correlations(predicted, true)
    assert found["eval_pearson"] == pytest.approx(stats.pearsonr(predicted, true)[0])
    assert found["eval_spearman"] == pytest.approx(stats.spearmanr(predicted, true)[0])
    assert correlations(np.ones(3), true[:3])["eval_pearson"] == 0.0
    assert exact_match(["a b", "c"], ["a b ", "d"]) == 0.5
    assert bleu(["the cat sat on the mat today"], ["the cat sat on the mat today"]) == pytest.approx(100)


def test_tables_hold_out_a_part_and_read_parallel_files(tmp_path):
    (tmp_path / "a.en").write_text("one\ntwo\nthree\nfour\n")
    (tmp_path / "a.de").write_text("eins\nzwei\ndrei\nvier\n")
    training, held_out = open_tables([str(tmp_path / "a.en"), str(tmp_path / "a.de")], validation_fraction=0.25)
    assert len(training) == 3
    assert len(held_out) == 1
    pairs = {(row["source"], row["target"]) for table in (training, held_out) for row in table.rows}
    assert pairs == {("one", "eins"), ("two", "zwei"), ("three", "drei"), ("four", "vier")}
    with pytest.raises(UserError, match="Did you mean 'sentiment'"):
        open_tables("sentimant")


# --- adapters -------------------------------------------------------------------------------------------------


def test_an_adapter_learns_and_is_merged(bert, tmp_path):
    rows = train(
        "text-classification", tmp_path / "run", "--base_model", bert, "--data", "sentiment:200", "--method", "lora",
        "--lora.r", "2", "--train.learning_rate", "0.05", "--precision", "fp32", "--report_to", "[]",
    )  # fmt: skip
    before, after = z2h.models.from_pretrained(bert), z2h.models.from_pretrained(tmp_path / "run")
    assert after.state_dict().keys() >= {name for name in before.state_dict() if not name.startswith("head.")}
    changed = {name for name, value in before.state_dict().items()
               if not name.startswith("head.") and not torch.equal(value, after.state_dict()[name])}  # fmt: skip
    assert changed
    assert all(before.get_parameter(name).ndim == 2 and name.startswith("layers.") for name in changed)
    update = after.get_parameter(min(changed)) - before.get_parameter(min(changed))
    assert torch.linalg.matrix_rank(update, tol=1e-4) <= 2
    found = z2h.pipeline("text-classification", model=tmp_path / "run")("The soup was cold.")
    theirs = transformers.pipeline("text-classification", model=str(tmp_path / "run"), device="cpu")(
        "The soup was cold."
    )
    assert found[0]["score"] == pytest.approx(theirs[0]["score"], abs=1e-4)
    assert last(rows, "eval_accuracy") >= 0


def test_an_adapter_needs_a_base(capsys, tmp_path):
    assert "--base_model" in fails(capsys, "text-classification", "--method", "lora", "--output_dir", tmp_path / "x")
