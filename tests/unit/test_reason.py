"""The reasoning recipe: its data, its stages one after the other, and what it says at the end."""

import json
import re
import shutil
from pathlib import Path

import pytest

import zero2hero as z2h
from zero2hero.align.verifiers import number, think
from zero2hero.alignment_configs import ReasonConfig
from zero2hero.cli import main
from zero2hero.data.conversations import read_records, recognize
from zero2hero.errors import UserError
from zero2hero.reason import cold_start_settings, practice_settings, thought, worked
from zero2hero.train.tracking import read_metrics

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = [
    "--shape.hidden_size", "32", "--shape.num_hidden_layers", "1", "--shape.num_attention_heads", "2",
    "--tokenizer.vocab_size", "300", "--cold_start.max_steps", "4", "--cold_start.max_length", "256",
    "--cold_start.per_device_train_batch_size", "2", "--train.max_steps", "2", "--num_generations", "4",
    "--train.per_device_train_batch_size", "8", "--eval_questions", "6", "--eval_samples", "4",
    "--max_completion_length", "16", "--precision", "fp32", "--report_to", "[]", "--cold_start_examples", "30",
]  # fmt: skip


def test_what_is_shown_is_right_and_has_the_form(shared_data):
    """Of built-in sums and of GSM8K: a thought, then the answer that the verifier reads."""
    for data in ("sums:60", str(shared_data / "gsm8k" / "test.jsonl")):
        for record in list(read_records(data))[:300]:
            question, steps, answer = worked(record)
            assert question[0]["role"] == "user"
            assert "<<" not in steps
            shown = thought(steps, answer)
            assert think([shown]) == [1.0]
            assert number([shown], [answer]) == [1.0]


def test_records_of_another_form_are_named():
    with pytest.raises(UserError, match="line 7: an answer ends in '#### N', as GSM8K's do, and not as 'blue'"):
        worked(recognize({"question": "Q", "answer": "blue"}, 7, "line 7"))
    with pytest.raises(UserError, match="line 7: a text is nothing to answer"):
        worked(recognize({"text": "Q"}, 7, "line 7"))


def test_the_whole_recipe(tmp_path, capsys):
    run = tmp_path / "run"
    words = ["reason", "--data", "sums:80", "--output_dir", str(run), *TINY]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert re.search(r"greedy accuracy +\d+\.\d% ± .* \d+\.\d%", said)
    assert re.search(r"pass@4 .*\n(.*\n)*maj@4", said)
    assert "Training " in said
    found = json.loads((run / "reasoner" / "attempts.json").read_text())
    assert found["before"]["problems"] == found["after"]["problems"] == 6
    report = (run / "reasoner" / "report.html").read_text()
    assert "Many attempts, before and after" in report
    assert (run / "reasoner" / "plots" / "attempts.png").exists()
    lines = {name: (run / f"{name}.jsonl").read_text().splitlines() for name in ("cold_start", "questions", "held_out")}
    assert {name: len(rows) for name, rows in lines.items()} == {"cold_start": 30, "questions": 80, "held_out": 6}
    assert set(lines["questions"]).isdisjoint(lines["held_out"])
    assert any("rewards/number/mean" in row for row in read_metrics(run / "reasoner"))
    assert z2h.load(run / "reasoner").chat([{"role": "user", "content": "3 + 4 = ?"}], max_new_tokens=4) is not None

    assert main(words) == 2  # what is there is not overwritten
    assert "already holds a run" in capsys.readouterr().err
    weights = (run / "reasoner" / "model.safetensors").read_bytes()
    assert main([*words, "--resume"]) == 0  # all is done: measured again
    assert (run / "reasoner" / "attempts.json").read_text() == json.dumps(found, indent=2) + "\n"
    shutil.rmtree(run / "reasoner")
    assert main([*words, "--resume"]) == 0  # from the cold start
    assert (run / "reasoner" / "model.safetensors").read_bytes() == weights


def test_stages_are_ordinary_runs(tmp_path):
    config = ReasonConfig(model="runs/mine", output_dir=str(tmp_path), method="lora")
    cold, practice = cold_start_settings(config), practice_settings(config)
    assert (cold.model, cold.method) == ("runs/mine", "lora")
    assert Path(practice.model) == tmp_path / "merged"
    assert practice.reward_funcs == ["number", "think"]
    assert not cold.resume


def test_with_adapters(tmp_path, capsys):
    run = tmp_path / "run"
    words = ["reason", "--data", "sums:80", "--output_dir", str(run), "--method", "lora", *TINY]
    assert main(words) == 0
    adapter = json.loads((run / "reasoner" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(run / "merged")
    assert "Training " in capsys.readouterr().out


def test_gsm8k_runs(tmp_path, shared_data, capsys):
    """On real questions: it runs, and says that a few steps of a tiny model taught nothing."""
    data = tmp_path / "few.jsonl"
    data.write_text("".join((shared_data / "gsm8k" / "train.jsonl").read_text().splitlines(keepends=True)[:20]))
    words = ["reason", "--data", str(data), "--output_dir", str(tmp_path), *TINY, "--validation_fraction", "0.1",
             "--shape.max_position_embeddings", "1024", "--cold_start.max_length", "1024"]  # fmt: skip
    assert main(words) == 0
    assert "Training changed nothing" in capsys.readouterr().out
