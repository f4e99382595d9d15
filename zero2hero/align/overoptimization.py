"""What happens when a proxy is optimized for too long: it goes on rising while what was meant falls (Goodhart's law).

    python -m zero2hero.align.overoptimization runs/overoptimization        # about two minutes on two cores

Gao et al. 2022, "Scaling laws for reward model overoptimization", arXiv 2210.10760, measured it with a large reward
model in the place of people. Here the truth is a function, so nothing is left to doubt:

    a language   sixteen letters, by a Markov chain; a small decoder learns it: the reference
    a taste      some letters are liked, *in measure*: a few more than usual are best, many more are worse than none
    raters       compare two texts of the reference, and err as Bradley and Terry (1952) have it
    a proxy      a reward model of a few hundred of their votes. The reference rarely has too many of the liked letters,
                 so the proxy never learned that there is a too many
    a policy     earns the proxy's reward by PPO with next to no price on KL; and best-of-n samples, for comparison

All stages are the verbs that users have. The rewards of both, over the square root of KL (as in the paper's figures),
are in overoptimization.json and in the report of the run. Rewards are in standard deviations of the reference's own.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zero2hero.align.ppo import ppo
from zero2hero.align.reward import reward
from zero2hero.align.rewards import RewardFunction, load_rewards
from zero2hero.align.rollout import Sampler
from zero2hero.alignment_configs import PpoConfig, RewardConfig, online_defaults
from zero2hero.config import DecoderConfig, PretrainConfig, TokenizerConfig, TrainConfig
from zero2hero.data.worlds.symbolic import MarkovChain
from zero2hero.io import atomic_write
from zero2hero.language_model import LanguageModel, load
from zero2hero.train.pretrain import pretrain
from zero2hero.train.report import write_report
from zero2hero.train.tracking import read_metrics

LETTERS, LENGTH = 8, 16  # of the language; of a text
LIKED = {"a": 4.0, "d": 5.0}  # so many of each are best; the reference writes about 2 and 3
WIDTH = 2.5  # so far from that, a letter is worth nothing any more
STRENGTH = 1.0  # how far a difference in taste decides a vote
FILE = "overoptimization.json"


def taste(completions: Sequence[str]) -> list[float]:
    """What raters value: for each liked letter 1 - ((count - best) / WIDTH)^2. A reward function like any other."""
    return [sum(1 - ((text.count(c) - best) / WIDTH) ** 2 for c, best in LIKED.items()) for text in completions]


@dataclass(frozen=True)
class Size:
    """How much of everything there is. The default shows it well; `SMALL` shows it in half a minute."""

    language_steps: int = 120
    votes: int = 400
    reward_epochs: float = 3.0
    rollouts: int = 25
    samples: int = 128  # a rollout
    best_of: int = 64


SMALL = Size(rollouts=22, samples=64, best_of=16)


def demonstrate(output_dir: str | Path, size: Size = Size(), seed: int = 0) -> dict[str, Any]:
    """Run all of it below `output_dir`; returns what overoptimization.json holds.

    "rl" and "best_of_n" are lists of {"kl", "proxy", "gold"}, KL in nats per completion; "peak" is the point of "rl" at
    which the truth was best.
    """
    out = Path(output_dir)
    language = _language(out / "language", size, seed)
    lm = load(language, device="cpu")
    texts = _samples(lm, size.best_of, seed)
    proxy_model = _proxy(out / "proxy", language, _votes(out / "votes.jsonl", lm, size, seed), size, seed)
    proxy = load_rewards([str(proxy_model)])
    scales = {"proxy": _scale(proxy, texts), "gold": _scale(load_rewards([taste]), texts)}
    rl = _policy(out / "policy", language, proxy_model, size, seed)
    points = [
        {"kl": kl, **{name: (value[name] - mean) / std for name, (mean, std) in scales.items()}} for kl, value in rl
    ]
    found = {
        "units": "standard deviations of the reference's samples, over nats of KL per completion",
        "votes": size.votes, "rl": points, "best_of_n": best_of_n(texts, proxy, scales),
        "peak": max(points, key=lambda point: point["gold"]),
    }  # fmt: skip
    atomic_write(out / "policy" / FILE, json.dumps(found, indent=1) + "\n")
    write_report(out / "policy")
    return found


# --- the stages ---------------------------------------------------------------------------------------------------


def _language(folder: Path, size: Size, seed: int) -> Path:
    """The reference: a decoder that has learned what texts look like."""
    world = MarkovChain(seed, length=LENGTH, alphabet=LETTERS, concentration=0.8)
    data = folder.parent / "texts.jsonl"
    atomic_write(data, "".join(json.dumps({"text": text}) + "\n" for text in world.documents(count=6000)))
    pretrain(
        PretrainConfig(
            data=str(data), output_dir=str(folder), precision="fp32", report_to=[],
            tokenizer=TokenizerConfig(kind="char"),
            model=DecoderConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=32),
            train=TrainConfig(max_steps=size.language_steps, max_length=32, per_device_train_batch_size=64, seed=seed),
        )
    )  # fmt: skip
    return folder


def _samples(lm: LanguageModel, count: int, seed: int) -> list[list[str]]:
    """For each letter as a prompt, `count` texts of the reference."""
    sampler = Sampler(lm.model, lm.tokenizer, lm.eos_ids, max_completion_length=LENGTH - 1, seed=seed)
    letters = MarkovChain(seed, length=LENGTH, alphabet=LETTERS).symbols
    texts = sampler([lm.prompt_ids(letter) for letter in letters], count).texts
    return [texts[i : i + count] for i in range(0, len(texts), count)]


def _votes(path: Path, lm: LanguageModel, size: Size, seed: int) -> Path:
    """Comparisons by raters of that taste, and prompts beside them."""
    letters = MarkovChain(seed, length=LENGTH, alphabet=LETTERS).symbols
    rng = np.random.default_rng([seed, 0x766F7465])
    rows = []
    for letter, texts in zip(letters, _samples(lm, 2 * -(-size.votes // LETTERS), seed + 1), strict=True):
        for one, other in zip(texts[::2], texts[1::2], strict=True):
            first, second = taste([one, other])
            right = rng.random() < 1 / (1 + math.exp(STRENGTH * (second - first)))
            chosen, rejected = (one, other) if right else (other, one)
            if one and other and one != other:
                rows.append({"prompt": letter, "chosen": chosen, "rejected": rejected, "rater": "simulated"})
    atomic_write(path, "".join(json.dumps(row) + "\n" for row in rows))
    atomic_write(path.with_name("prompts.jsonl"), "".join(json.dumps({"prompt": c}) + "\n" for c in letters))
    return path


def _proxy(folder: Path, language: Path, votes: Path, size: Size, seed: int) -> Path:
    """The reward model that learned from the votes."""
    train = dataclasses.replace(
        online_defaults(), learning_rate=3e-3, lr_scheduler_type="linear", num_train_epochs=size.reward_epochs,
        max_length=32, seed=seed,
    )  # fmt: skip
    reward(
        RewardConfig(
            model=str(language), data=str(votes), output_dir=str(folder), method="full", precision="fp32", report_to=[],
            validation_fraction=0.1, train=train,
        )
    )  # fmt: skip
    return folder


def _policy(folder: Path, language: Path, proxy: Path, size: Size, seed: int) -> list[tuple[float, dict[str, float]]]:
    """PPO for the proxy's reward, with the truth looked at alone; (KL, both rewards) of each rollout."""
    train = dataclasses.replace(
        online_defaults(), learning_rate=1e-4, per_device_train_batch_size=size.samples, max_steps=2 * size.rollouts,
        seed=seed,
    )  # fmt: skip
    prompts = proxy.with_name("prompts.jsonl")
    ppo(
        PpoConfig(
            model=str(language), data=str(prompts), eval_data=str(prompts), output_dir=str(folder), method="full",
            precision="fp32", report_to=[], reward_funcs=[str(proxy), "zero2hero.align.overoptimization:taste"],
            reward_weights=[1.0, 0.0], max_completion_length=LENGTH - 1, kl_coef=0.0, num_ppo_epochs=2, train=train,
        )
    )  # fmt: skip
    rows = [row for row in read_metrics(folder) if "objective/kl" in row and row["step"] % 2]
    names = {"proxy": f"rewards/{proxy.name}/mean", "gold": "rewards/taste/mean"}
    return [(row["objective/kl"], {name: row[column] for name, column in names.items()}) for row in rows]


# --- measures -----------------------------------------------------------------------------------------------------


def _scale(rewards: Any, texts: list[list[str]]) -> tuple[float, float]:
    """(mean, standard deviation) of a reward over the reference's samples."""
    found = np.array(_scores(rewards, texts))
    return float(found.mean()), float(found.std())


def _scores(rewards: Any, texts: list[list[str]]) -> list[float]:
    letters = MarkovChain(length=LENGTH, alphabet=LETTERS).symbols
    prompts = [letter for letter, some in zip(letters, texts, strict=True) for _ in some]
    return list(rewards(prompts, [text for some in texts for text in some]).total_N.tolist())


def best_of_n(texts: list[list[str]], proxy: Any, scales: dict[str, tuple[float, float]]) -> list[dict[str, float]]:
    """Of n samples the one that the proxy likes best: both rewards, and KL = ln n - (n - 1) / n (Stiennon et al. 2020).

    From m samples a prompt, without bias: the k-th worst is the best of n with probability C(k-1, n-1) / C(m, n).
    """
    m = len(texts[0])
    scores_PM = {"proxy": np.array(_scores(proxy, texts)).reshape(-1, m)}
    scores_PM["gold"] = np.array(_scores(load_rewards([taste]), texts)).reshape(-1, m)
    order_PM = scores_PM["proxy"].argsort(1, kind="stable")
    points, n = [], 1
    while n <= m:
        chance_M = np.array([math.comb(k, n - 1) / math.comb(m, n) for k in range(m)])
        point: dict[str, float] = {"n": n, "kl": math.log(n) - (n - 1) / n}
        for name, (mean, std) in scales.items():
            ranked = np.take_along_axis(scores_PM[name], order_PM, 1)
            point[name] = float(((ranked @ chance_M).mean() - mean) / std)
        points.append(point)
        n *= 2
    return points


__all__ = ["SMALL", "RewardFunction", "Size", "best_of_n", "demonstrate", "taste"]

if __name__ == "__main__":
    found = demonstrate(sys.argv[1] if len(sys.argv) > 1 else "runs/overoptimization")
    print(f"the truth was best at {found['peak']['kl']:.1f} nats; see policy/report.html")
