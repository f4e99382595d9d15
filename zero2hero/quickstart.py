"""The quickstart: from raw text to a model that writes and answers, in minutes, with nothing to download.

Pretraining. Built-in stories, questions about them, sums and Python's own language reference become tokens, the tokens
a small Qwen3, and what the model writes is shown again and again while it learns: an ordinary run with settings chosen
for two CPU cores (a small vocabulary, so the head does not eat the budget; Muon; many small steps; a learning rate that
falls to zero).

Instruction tuning. An adapter (LoRA) teaches the model to talk: it reads a story or a sum in a chat and answers. How
many held-out questions it answers right, before and after, stands in the report, and what it forgot beside that.

With --align two stages more:

Preferences. Simulated raters like stories in which people talk (data/worlds/preferences.py). By their votes DPO makes a
model whose stories they like better; the report says how often, and how far it went from what it was (KL).

Practice. The chat model is asked sums, and told nothing but whether its number was right (GRPO). These two stages must
raise what they are for on held-out data; else the quickstart ends there, with exit code 1.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path

from zero2hero.alignment_configs import DpoConfig, GrpoConfig
from zero2hero.config import DecoderConfig, PretrainConfig, TokenizerConfig, TrainConfig
from zero2hero.errors import FellShort
from zero2hero.io import locked
from zero2hero.options import QuickstartConfig
from zero2hero.tune.config import LoraConfig
from zero2hero.tuning_configs import SftConfig, tuning_defaults

LAYER_MATRICES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
QUESTIONS_ASKED = 200  # held out, before and after the tuning

NEXT = """
Your model is in {directory}: an ordinary Hugging Face directory, which transformers opens too.
An adapter in {chat} makes it answer questions; PEFT opens that.

  look at both   {directory}/report.html and {chat}/report.html in a browser
  let it write   zero2hero generate {directory} "One day, a little fox"
  talk with it   zero2hero chat {chat}      (tell it a story and ask about it, or ask a sum)
  the same, in Python
                 import zero2hero as z2h
                 print(z2h.load("{directory}").generate("One day, a little fox"))
  your own text  zero2hero pretrain --data YOUR.txt --output_dir runs/mine
"""


ALIGNED = """
  aligned        {taste}: its stories are what the raters like (an adapter)
                 {sums}: it practised sums (a model of its own; zero2hero chat {sums})
                 in report.html of each: what that changed
"""


def settings(config: QuickstartConfig) -> PretrainConfig:
    """The pretraining run that the quickstart is."""
    return PretrainConfig(
        data=[f"dialogues:{config.stories}", f"stories:{config.stories // 5}", f"sums:{config.stories // 5}", "pydoc"],
        output_dir=config.output_dir,
        precision=config.precision,
        device=config.device,
        tokenizer=TokenizerConfig(vocab_size=3072, pattern="qwen2"),
        model=DecoderConfig(
            hidden_size=192, num_hidden_layers=4, num_attention_heads=6, qk_norm=True, max_position_embeddings=512
        ),
        train=TrainConfig(
            max_steps=config.steps,
            per_device_train_batch_size=8,
            max_length=256,
            learning_rate=0.01,
            eval_steps=max(1, config.steps // 4),
            sample_steps=max(1, config.steps // 8),
            seed=config.seed,
        ),
    )


def beside(config: QuickstartConfig, stage: str) -> str:
    """Where a later stage leaves what it made: beside the model."""
    return f"{config.output_dir.rstrip('/')}_{stage}"


def chat_directory(config: QuickstartConfig) -> str:
    return beside(config, "chat")


def chat_settings(config: QuickstartConfig) -> SftConfig:
    """The instruction tuning that follows. A chat's own tokens were never seen before: embedding and head learn too."""
    train = dataclasses.replace(
        tuning_defaults(), max_steps=config.chat_steps, learning_rate=3e-3, max_length=320,
        eval_steps=max(1, config.chat_steps // 2), seed=config.seed,
    )  # fmt: skip
    return SftConfig(
        model=config.output_dir,
        data=[f"dialogues:{20 * config.chat_steps}", f"stories:{2 * config.chat_steps}"],  # stories: not to forget them
        output_dir=chat_directory(config),
        precision=config.precision,
        device=config.device,
        exact_match=QUESTIONS_ASKED,
        retain_data="stories:2000",
        train=train,
        lora=LoraConfig(r=32, lora_alpha=64, target_modules=[*LAYER_MATRICES, "embed_tokens", "lm_head"]),
    )


def taste_settings(config: QuickstartConfig) -> DpoConfig:
    """Preferences of raters with a known taste, learned by an adapter beside the model that writes."""
    train = dataclasses.replace(
        DpoConfig(model="-").train, max_steps=config.taste_steps, learning_rate=1e-3, per_device_train_batch_size=8,
        max_length=384, eval_steps=max(1, config.taste_steps // 2), seed=config.seed,
    )  # fmt: skip
    return DpoConfig(
        model=config.output_dir,
        data=f"preferences:{max(10 * QUESTIONS_ASKED, 8 * config.taste_steps)}",  # a tenth is held out
        output_dir=beside(config, "taste"),
        precision=config.precision,
        device=config.device,
        num_samples=QUESTIONS_ASKED,
        train=train,
        lora=LoraConfig(r=16, lora_alpha=32, target_modules=LAYER_MATRICES),
    )


def practice_settings(config: QuickstartConfig) -> GrpoConfig:
    """Sums with exact answers, practised by the model that chats."""
    train = dataclasses.replace(
        GrpoConfig(model="-").train, max_steps=config.practice_steps, learning_rate=2e-4,
        per_device_train_batch_size=128, eval_steps=config.practice_steps, seed=config.seed,
    )  # fmt: skip
    return GrpoConfig(
        model=chat_directory(config),
        data="two_digit_sums:20000",
        output_dir=beside(config, "sums"),
        precision=config.precision,
        device=config.device,
        method="full",
        reward_funcs=["number"],
        num_generations=8,
        max_completion_length=96,
        num_eval_prompts=QUESTIONS_ASKED,
        train=train,
    )


def learn_taste(config: QuickstartConfig, directory: Path) -> None:
    """DPO, unless it is done."""
    from zero2hero.align.dpo import dpo

    if not (directory / "adapter_model.safetensors").exists():
        print("\nRaters have read what it could write. Now it learns what they like: stories in which people talk.\n")
        dpo(taste_settings(config))
    must_rise(directory, "eval_win_rate", "Stories that the raters like better than what it wrote before")


def practise_sums(config: QuickstartConfig, directory: Path) -> None:
    """GRPO, unless it is done."""
    from zero2hero.align.grpo import grpo

    if not (directory / "model.safetensors").exists():
        print("\nIt practises sums: of each answer it is told whether the number was right, and nothing else.\n")
        grpo(practice_settings(config))
    must_rise(directory, "eval_rewards/number/mean", "Held-out sums that it answers right, at the first attempt")


def must_rise(directory: Path, metric: str, what: str) -> None:
    """Say how much a held-out share rose in a stage; a share that did not is an end.

    A rise must be more than chance makes of so few questions: a standard error of the difference.

    Raises:
        FellShort: it did not.
    """
    from zero2hero.train.tracking import read_metrics

    values = [row[metric] for row in read_metrics(directory) if metric in row]
    before, after = values[0], values[-1]
    chance = math.sqrt((before * (1 - before) + after * (1 - after)) / QUESTIONS_ASKED)
    if not after - before > chance:
        raise FellShort(
            f"{what}: {before:.0%} before, {after:.0%} after, which is no more than chance. {directory}/report.html "
            "shows what happened; try more steps or another --seed"
        )
    print(f"\n{what}: {before:.0%} before, {after:.0%} after.\n")


def run(config: QuickstartConfig) -> None:
    """Train, unless finished models are there already; end with what to type next."""
    directory, chat = Path(config.output_dir), Path(chat_directory(config))
    taste, sums = Path(beside(config, "taste")), Path(beside(config, "sums"))
    if config.force:
        for folder in (directory, chat, taste, sums):
            with locked(folder):
                shutil.rmtree(folder, ignore_errors=True)
    if (directory / "model.safetensors").exists():
        from zero2hero.language_model import load

        print(f"{directory} already holds a trained model (--force trains a new one). It writes:\n")
        load(directory).generate("One day,", max_new_tokens=150, temperature=0.7, seed=config.seed, stream=True)
    else:
        from zero2hero.train.pretrain import pretrain

        pretrain(settings(config))
    if not (chat / "adapter_model.safetensors").exists():
        from zero2hero.train.sft import sft

        print("\nThe model can write. Now it learns to answer.\n")
        sft(chat_settings(config))
    if config.align:
        learn_taste(config, taste)
        practise_sums(config, sums)
    print(NEXT.format(directory=directory, chat=chat))
    if config.align:
        print(ALIGNED.format(taste=taste, sums=sums))
