"""The reasoning recipe: a model learns to think before it answers, then practises on questions whose answers are known.

    questions with worked answers  ->  cold start: SFT on `<think>steps</think> The answer is N.`
                                   ->  GRPO: it thinks for itself, and a verifier says whether the number is right

What `zero2hero reason` runs, after DeepSeek-R1 (arXiv 2501.12948, section 2.3) in the small. The cold start shows the
form and some of the way; of the questions that are practised only the answers are known. Data have GSM8K's form (Cobbe
et al. 2021, arXiv 2110.14168): a question, and an answer that ends in "#### N". Each stage is a verb, which can be run
by itself on the files that are left in the output directory:

    cold_start.jsonl  questions.jsonl  held_out.jsonl     what is learned from, practised on, measured by
    base/  cold_start/  reasoner/                         the models; base where none was given
    reasoner/report.html                                  how practising went, and what it changed
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from zero2hero.align.grpo import grpo
from zero2hero.align.rewards import load_rewards
from zero2hero.align.verifiers import number_in
from zero2hero.alignment_configs import GrpoConfig, ReasonConfig
from zero2hero.data.conversations import Record, question_of, read_records
from zero2hero.errors import UserError
from zero2hero.evaluate.pass_at_k import Attempts, attempt, table, verdict
from zero2hero.io import atomic_write
from zero2hero.language_model import LanguageModel, load, save
from zero2hero.models.decoder import Decoder, init_weights
from zero2hero.options import MergeConfig
from zero2hero.tokenizer import Tokenizer
from zero2hero.train.pretrain import fit_shape
from zero2hero.train.report import write_report
from zero2hero.train.sft import sft, split_records
from zero2hero.tune.command import merge_adapter
from zero2hero.tuning_configs import SftConfig

NEW = "new"  # in the place of a model: a small one that has learned nothing
_CALCULATOR = re.compile(r"<<[^<>]{0,200}>>")  # GSM8K's annotations


def reason(config: ReasonConfig) -> None:
    """Cold start, practice, and what many attempts at each held-out question come to before and after.

    Raises:
        UserError: anything in the data or settings that a person can mend.
        Stopped: asked to stop by a signal; `resume` continues.
    """
    folder = Path(config.output_dir)
    if not config.resume or not (folder / "held_out.jsonl").exists():
        write_data(config, folder)
    cold, reasoner = folder / "cold_start", folder / "reasoner"
    if not (config.resume and _finished(cold)):
        if config.model == NEW and not (config.resume and (cold / "run.yaml").exists()):
            new_model(config, folder)
        print("\nCold start: it sees how questions are thought about.\n")
        sft(cold_start_settings(config))
    before = measure(config, cold, "before")
    print(f"\nBefore practice it answers {before.accuracy:.1%} of {before.problems} held-out questions.\n")
    if not (config.resume and _finished(reasoner)):
        if config.method != "full":  # an adapter is practised on a model that has the first one in its weights
            merge_adapter(MergeConfig(str(cold), str(folder / "merged")))
        grpo(practice_settings(config))
    after = measure(config, reasoner, "after")
    rows, words = table(before, after), verdict(before, after)
    found = {"verdict": words, "table": rows, "before": asdict(before), "after": asdict(after)}
    atomic_write(reasoner / "attempts.json", json.dumps(found, indent=2) + "\n")
    report = write_report(reasoner)
    width = max(len(name) for name, *_ in rows)
    print("\n".join(f"{name:<{width}}  {old:>16}  {new:>16}" for name, old, new in [("", "before", "after"), *rows]))
    print(f"\n{words}\n\nThe model is in {reasoner}; how it went, in {report}.")


def cold_start_settings(config: ReasonConfig) -> SftConfig:
    """The fine-tuning that shows the form."""
    folder, shared = Path(config.output_dir), _shared(config, "cold_start")
    model = str(folder / "base") if config.model == NEW else config.model
    return SftConfig(model=model, data=str(folder / "cold_start.jsonl"), train=config.cold_start, **shared)


def practice_settings(config: ReasonConfig) -> GrpoConfig:
    """The reinforcement learning that follows. It begins with what the cold start left."""
    folder, shared = Path(config.output_dir), _shared(config, "reasoner")
    begin = folder / ("cold_start" if config.method == "full" else "merged")
    return GrpoConfig(
        model=str(begin), data=str(folder / "questions.jsonl"),
        eval_data=str(folder / "held_out.jsonl"), reward_funcs=config.reward_funcs,
        reward_weights=config.reward_weights, num_generations=config.num_generations, beta=config.beta,
        max_completion_length=config.max_completion_length, num_eval_prompts=config.eval_questions,
        train=config.train, **shared,
    )  # fmt: skip


def _shared(config: ReasonConfig, stage: str) -> dict[str, Any]:
    """What both stages are told alike. A stage is resumed where it has begun."""
    directory = Path(config.output_dir) / stage
    names = ("precision", "device", "report_to", "method", "lora", "chat_template")
    shared = {name: getattr(config, name) for name in names}
    return shared | {"output_dir": str(directory), "resume": config.resume and (directory / "run.yaml").exists()}


def _finished(directory: Path) -> bool:
    return any((directory / name).exists() for name in ("model.safetensors", "adapter_model.safetensors"))


def measure(config: ReasonConfig, directory: Path, when: str) -> Attempts:
    """What many attempts at the held-out questions come to."""
    lm = load(directory, config.device)
    problems = [question_of(record) for record in read_records(Path(config.output_dir) / "held_out.jsonl")]
    return attempt(
        lm, problems, load_rewards(config.reward_funcs), samples=config.eval_samples, seed=config.train.seed,
        max_new_tokens=config.max_completion_length, description=f"solving, {when}",
    )  # fmt: skip


# --- data and a model to begin with -----------------------------------------------------------------------------


def write_data(config: ReasonConfig, folder: Path) -> None:
    """The three files of the recipe.

    Raises:
        UserError: a record that is not of GSM8K's form, or none with worked steps.
    """
    learn, held_out = split_records(config)
    known = [worked(record) for record in learn]
    measured = [worked(record) for record in held_out[: config.eval_questions]]
    shown = [each for each in known if each[1]][: config.cold_start_examples]
    if not shown:
        raise UserError("no answer in the data has worked steps before its '#### N': a cold start needs some")
    talks = ({"messages": [*q, {"role": "assistant", "content": thought(steps, n)}]} for q, steps, n in shown)
    _write_lines(folder / "cold_start.jsonl", talks)
    for name, some in (("questions", known), ("held_out", measured)):
        _write_lines(folder / f"{name}.jsonl", ({"prompt": q, "answer": n} for q, _, n in some))


def worked(record: Record) -> tuple[Any, str, str]:
    """(question as messages, worked steps, the answer) of a record in GSM8K's form.

    Raises:
        UserError: a record without a question, or whose answer does not end in "#### N".
    """
    question, columns = question_of(record)
    steps, mark, answer = str(columns.get("answer", "")).rpartition("####")
    if not mark or number_in(answer) is None:
        found = columns.get("answer")
        raise UserError(f"{record.where}: an answer ends in '#### N', as GSM8K's do, and not as {found!r:.80}")
    question = [{"role": "user", "content": question}] if isinstance(question, str) else question
    return question, _CALCULATOR.sub("", steps).strip(), answer.strip()


def thought(steps: str, answer: str) -> str:
    """What the cold start shows: the steps as a thought, then the answer."""
    return f"<think>\n{steps}\n</think>\nThe answer is {answer}."


def new_model(config: ReasonConfig, folder: Path) -> None:
    """A small model that has learned nothing, with a tokenizer for what the cold start shows."""
    c = config.tokenizer
    records = read_records(folder / "cold_start.jsonl")
    texts = ["\n".join(str(message["content"]) for message in record.messages) for record in records]
    tokenizer = Tokenizer.train(texts, vocab_size=c.vocab_size, pattern=c.pattern, kind=c.kind)
    model = Decoder(fit_shape(config.shape, tokenizer))
    init_weights(model, config.train.seed)
    save(LanguageModel(model, tokenizer), folder / "base")


def _write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
