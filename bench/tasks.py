"""How good a model becomes that is trained here from scratch, on real data, in minutes on two CPU cores.

Each task is a recipe, run as a person would run it: the seconds are those of the whole command, from reading the data
to the finished model with its evaluations on the way. Then the model is opened by its pipeline and judged on data that
took no part in training.

    python bench/tasks.py [sst2 multi30k ...] [--data ../shared/data]
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import ROOT, record, table

import zero2hero as z2h
from zero2hero.cli import VERBS
from zero2hero.command_line import named, parse
from zero2hero.data.files import read_lines
from zero2hero.data.pictures import open_pictures
from zero2hero.data.worlds.raster import png


def train(verb: str, recipe: str, *options: str) -> float:
    """Run `zero2hero VERB --config recipes/RECIPE.yaml OPTIONS`; returns the seconds it took."""
    words = ["--config", str(ROOT / "recipes" / f"{recipe}.yaml"), *options]
    start = time.perf_counter()
    named(VERBS[verb].run)(parse(verb, VERBS[verb], words))
    return time.perf_counter() - start


def sst2(data: Path, runs: Path) -> dict[str, Any]:
    """Is a sentence of a film review positive? Accuracy on the 872 sentences of the development set, three seeds.

    The seconds are those of the slowest run.
    """
    folder = data / "sst2"
    lines = [line.split("\t") for line in read_lines(folder / "dev.tsv")]
    accuracies, seconds = [], []
    for seed in range(3):
        run = runs / f"sst2_{seed}"
        seconds.append(train("train text-classification", "sst2_cpu", "--data", str(folder / "train.tsv"),
                             "--validation_data", str(folder / "dev.tsv"), "--output_dir", str(run),
                             "--train.seed", str(seed)))  # fmt: skip
        found = z2h.pipeline("text-classification", model=run)([text for text, _ in lines], batch_size=64)
        right = sum((one["label"] == "positive") == (label == "1") for one, (_, label) in zip(found, lines))
        accuracies.append(right / len(lines))
    return {"accuracy": statistics.median(accuracies), "accuracies": accuracies, "seconds": max(seconds), "budget": 300}


def multi30k(data: Path, runs: Path) -> dict[str, Any]:
    """Captions from English to German: BLEU (sacrebleu, cased, 13a) on test_2016_flickr, beam search with 4 beams."""
    from sacrebleu.metrics import BLEU

    folder = data / "multi30k"
    pair = {name: f"[{folder / name}.en.gz, {folder / name}.de.gz]" for name in ("train", "val")}
    seconds = train("train text2text-generation", "multi30k_cpu", "--data", pair["train"], "--validation_data",
                    pair["val"], "--output_dir", str(runs / "multi30k"))  # fmt: skip
    test = {side: list(read_lines(folder / f"test_2016_flickr.{side}.gz")) for side in ("en", "de")}
    translate, start = z2h.pipeline("text2text-generation", model=runs / "multi30k"), time.perf_counter()
    written = [one["generated_text"] for one in translate(test["en"], batch_size=50, num_beams=4, max_new_tokens=64)]
    metric = BLEU()
    score = metric.corpus_score(written, [test["de"]])
    return {
        "bleu": score.score, "signature": str(metric.get_signature()), "seconds": seconds,
        "seconds_of_translation": time.perf_counter() - start, "budget": 900, "first": written[:3],
    }  # fmt: skip


def mnist(recipe: str, data: Path, runs: Path) -> dict[str, Any]:
    """Which digit? Accuracy on a fifth of the 10,000 images of MNIST's test set, after training on the others."""
    seconds = train("train image-classification", recipe, "--data", str(data / "mnist"), "--validation_fraction", "0.2",
                    "--output_dir", str(runs / recipe))  # fmt: skip
    _, held_out = open_pictures(str(data / "mnist"), validation_fraction=0.2)
    look = z2h.pipeline("image-classification", model=runs / recipe)
    found = look([png(row["image"]) for row in held_out.rows], batch_size=64, top_k=1)
    right = sum(one[0]["label"] == row["label"] for one, row in zip(found, held_out.rows))
    return {"accuracy": right / len(held_out), "seconds": seconds, "budget": 300}


def easy_vqa(data: Path, runs: Path) -> dict[str, Any]:
    """What colour, what shape, is there ...? Accuracy on the first 2,000 of the 9,673 test questions of easy-VQA.

    The answer is what the model writes, as its pipeline returns it. The test images take part in nothing but the
    evaluations on the way.
    """
    archive = str(data / "easy_vqa" / "easy_vqa_data.zip")
    seconds = train("train image-text-to-text", "easy_vqa_cpu", "--data", archive, "--output_dir", str(runs / "vqa"))
    rows = open_pictures(archive)[1].rows[:2000]
    answer = z2h.pipeline("visual-question-answering", model=runs / "vqa")
    asked = [{"image": row["image"], "question": row["question"]} for row in rows]
    found = answer(asked, batch_size=64, max_new_tokens=8)
    right = sum(one[0]["answer"] == row["answer"] for one, row in zip(found, rows))
    return {"accuracy": right / len(rows), "seconds": seconds, "budget": 600}


TASKS: dict[str, Callable[[Path, Path], dict[str, Any]]] = {
    "sst2": sst2,
    "multi30k": multi30k,
    "mnist_mlp": functools.partial(mnist, "digits_mlp_cpu"),
    "mnist_vit": functools.partial(mnist, "digits_vit_cpu"),
    "easy_vqa": easy_vqa,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="*", default=list(TASKS), help=", ".join(TASKS))
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    arguments = parser.parse_args()
    for name in arguments.tasks:
        with tempfile.TemporaryDirectory() as runs:
            found = TASKS[name](arguments.data, Path(runs))
        found["within_budget"] = found["seconds"] <= found["budget"]
        print(table([{"task": name, **{k: str(v) for k, v in found.items() if k != "first"}}]))
        print(record(f"task_{name}", found))


if __name__ == "__main__":
    main()
