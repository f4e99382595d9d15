"""The quickstart: from raw text to a model that writes, in minutes, with nothing to download.

Built-in stories and Python's own language reference become tokens, the tokens a small Qwen3, and what the model writes
is shown again and again while it learns. It is an ordinary pretraining run with settings chosen for two CPU cores:
a small vocabulary (so the head does not eat the budget), Muon, many small steps, a learning rate that falls to zero.
"""

from __future__ import annotations

from pathlib import Path

from zero2hero.config import DecoderConfig, PretrainConfig, TokenizerConfig, TrainConfig
from zero2hero.io import locked
from zero2hero.options import QuickstartConfig

NEXT = """
Your model is in {directory}: an ordinary Hugging Face directory, which transformers opens too.

  look at it     {directory}/report.html in a browser
  let it write   zero2hero generate {directory} "One day, a little fox"
  the same, in Python
                 import zero2hero as z2h
                 print(z2h.load("{directory}").generate("One day, a little fox"))
  your own text  zero2hero pretrain --data YOUR.txt --output_dir runs/mine
"""


def settings(config: QuickstartConfig) -> PretrainConfig:
    """The pretraining run that the quickstart is."""
    return PretrainConfig(
        data=[f"stories:{config.stories}", "pydoc"],
        output_dir=config.output_dir,
        precision=config.precision,
        device=config.device,
        tokenizer=TokenizerConfig(vocab_size=3072),
        model=DecoderConfig(hidden_size=192, num_hidden_layers=4, num_attention_heads=6, qk_norm=True),
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


def run(config: QuickstartConfig) -> None:
    """Train, unless a finished model is there already; end with what to type next."""
    directory = Path(config.output_dir)
    if (directory / "model.safetensors").exists() and not config.force:
        from zero2hero.language_model import load

        print(f"{directory} already holds a trained model (--force trains a new one). It writes:\n")
        load(directory).generate("One day,", max_new_tokens=150, temperature=0.7, seed=config.seed, stream=True)
    else:
        import shutil

        from zero2hero.train.pretrain import pretrain

        if config.force:
            with locked(directory):
                shutil.rmtree(directory, ignore_errors=True)
        pretrain(settings(config))
    print(NEXT.format(directory=directory))
