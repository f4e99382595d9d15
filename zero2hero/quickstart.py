"""The quickstart: from raw text to a model that writes and answers, in minutes, with nothing to download.

Pretraining. Built-in stories, questions about them, sums and Python's own language reference become tokens, the tokens
a small Qwen3, and what the model writes is shown again and again while it learns: an ordinary run with settings chosen
for two CPU cores (a small vocabulary, so the head does not eat the budget; Muon; many small steps; a learning rate that
falls to zero).

Instruction tuning. An adapter (LoRA) teaches the model to talk: it reads a story or a sum in a chat and answers. How
many held-out questions it answers right, before and after, stands in the report, and what it forgot beside that.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

from zero2hero.config import DecoderConfig, PretrainConfig, TokenizerConfig, TrainConfig
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


def settings(config: QuickstartConfig) -> PretrainConfig:
    """The pretraining run that the quickstart is."""
    return PretrainConfig(
        data=[f"dialogues:{config.stories}", f"stories:{config.stories // 5}", f"sums:{config.stories // 5}", "pydoc"],
        output_dir=config.output_dir,
        precision=config.precision,
        device=config.device,
        tokenizer=TokenizerConfig(vocab_size=3072),
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


def chat_directory(config: QuickstartConfig) -> str:
    """Where the adapter goes: beside the model."""
    return f"{config.output_dir.rstrip('/')}_chat"


def chat_settings(config: QuickstartConfig) -> SftConfig:
    """The instruction tuning that follows. A chat's own tokens were never seen before: embedding and head learn too."""
    train = dataclasses.replace(
        tuning_defaults(), max_steps=config.chat_steps, learning_rate=4e-3, max_length=320,
        eval_steps=max(1, config.chat_steps // 2), seed=config.seed,
    )  # fmt: skip
    return SftConfig(
        model=config.output_dir,
        data=f"dialogues:{20 * config.chat_steps}",
        output_dir=chat_directory(config),
        precision=config.precision,
        device=config.device,
        exact_match=QUESTIONS_ASKED,
        retain_data="stories:2000",
        train=train,
        lora=LoraConfig(r=32, lora_alpha=64, target_modules=[*LAYER_MATRICES, "embed_tokens", "lm_head"]),
    )


def run(config: QuickstartConfig) -> None:
    """Train, unless finished models are there already; end with what to type next."""
    directory, chat = Path(config.output_dir), Path(chat_directory(config))
    if config.force:
        for folder in (directory, chat):
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
    print(NEXT.format(directory=directory, chat=chat))
