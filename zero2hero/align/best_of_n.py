"""Best of n: write several answers, keep the best. What `zero2hero best-of-n` runs.

    prompts -> n answers each (one prefill a prompt) -> a score each -> the best, or all that are good enough -> JSONL

No gradient, and yet the strongest simple way to use a reward model (Stiennon et al. 2020, arXiv 2009.01325). What is
kept is data for `zero2hero sft`: learning it is rejection sampling fine-tuning (Touvron et al. 2023, arXiv 2307.09288,
section 3.2.3), which moves into the model what here is paid for at every answer. The best of n lies at most
ln n - (n - 1) / n nats from the model that wrote (Beirami et al. 2024, arXiv 2401.01879).

Each record that is written says where it comes from: model, rewards, n, seed and score.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zero2hero.align.online import Prompt, judged, prompts_of
from zero2hero.align.rewards import load_rewards
from zero2hero.align.rollout import Sampler
from zero2hero.alignment_configs import BestOfNConfig
from zero2hero.data.conversations import read_records
from zero2hero.errors import UserError
from zero2hero.io import atomic_write
from zero2hero.language_model import load
from zero2hero.progress import track

PROMPTS = 32  # that are answered together


def best_of_n(config: BestOfNConfig) -> None:
    """Write the answers that were kept to `config.output`, and print what choosing among n is worth.

    Raises:
        UserError: anything in the data, rewards or settings that a person can mend; nothing is written then.
    """
    if Path(config.output).exists() and not config.overwrite:
        raise UserError(f"{config.output} exists: choose another --output, or add --overwrite")
    lm = load(config.model, config.device, config.dtype)
    rewards = load_rewards(config.reward_funcs, config.reward_weights, allow_code_execution=config.allow_code_execution)
    prompts = prompts_of(list(read_records(config.data, on_bad_record=config.on_bad_record)), lm, config.on_bad_record)  # type: ignore[arg-type]
    prompts = prompts[: config.max_prompts or None]
    sampler = Sampler(
        lm.model, lm.tokenizer, lm.eos_ids, max_completion_length=config.max_completion_length,
        temperature=config.temperature, top_k=config.top_k, top_p=config.top_p, min_p=config.min_p, seed=config.seed,
    )  # fmt: skip
    kept: list[dict[str, Any]] = []
    totals: list[np.ndarray] = []
    for start in track(range(0, len(prompts), PROMPTS), "answering"):
        some = prompts[start : start + PROMPTS]
        rollout = sampler([prompt.ids for prompt in some], config.n, step=start)
        scores = judged(some, rollout, rewards, config.n)
        total_PN = scores.total_N.view(len(some), config.n).numpy()
        texts = np.array(rollout.texts, dtype=object).reshape(total_PN.shape)
        totals.append(total_PN)
        for prompt, answers, values in zip(some, texts, total_PN):
            kept += [_record(prompt, answers[i], float(values[i]), config) for i in chosen(answers, values, config)]
    table = reward_by_n(np.concatenate(totals))
    if not kept:
        best = max(float(t.max()) for t in totals)
        raise UserError(f"no answer was kept: the best scores {best:.4g}. Lower --threshold, or raise --n")
    atomic_write(config.output, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept))
    report = {"prompts": len(prompts), "kept": len(kept), "reward_by_n": table}
    atomic_write(f"{config.output}.report.json", json.dumps(report, indent=2) + "\n")
    print("   n   mean reward   KL at most (nats)")
    for row in table:
        print(f"{row['n']:4}   {row['reward']:11.4f}   {row['kl_bound']:.3f}")
    print(f"{len(kept)} answers to {len(prompts)} prompts are in {config.output}; learn them with: "
          f"zero2hero sft --model {config.model} --data {config.output}")  # fmt: skip


def chosen(texts: Sequence[str], scores: np.ndarray, config: BestOfNConfig) -> list[int]:
    """Which answers are kept: the best one, or each different one that reaches the threshold; none that is empty."""
    order = [int(i) for i in np.argsort(-scores, kind="stable") if texts[int(i)].strip()]
    if config.threshold is None:
        return order[:1]
    first = {texts[i]: i for i in reversed(order) if scores[i] >= config.threshold}
    return [i for i in order if first.get(texts[i]) == i]


def _record(prompt: Prompt, text: str, score: float, config: BestOfNConfig) -> dict[str, Any]:
    completion: Any = text if isinstance(prompt.turns, str) else [{"role": "assistant", "content": text}]
    return {
        "prompt": prompt.turns, "completion": completion, "score": score, "n": config.n, "seed": config.seed,
        "temperature": config.temperature, "model": config.model, "reward_funcs": config.reward_funcs,
    }  # fmt: skip


def reward_by_n(scores_PN: np.ndarray) -> list[dict[str, float]]:
    """For k = 1, 2, 4, ... and n: the mean reward of the best of k answers, and how far it can be from the model.

    Of the k-subsets of a prompt's n answers, sorted, C(i, k - 1) have number i as their best; so all n count for each
    k, and the estimate has no bias.
    """
    n = scores_PN.shape[1]
    ordered, table = np.sort(scores_PN, axis=1).astype(float), []
    for k in sorted({2**i for i in range(n.bit_length()) if 2**i <= n} | {n}):
        share = np.array([math.comb(i, k - 1) / math.comb(n, k) for i in range(n)])
        reward = float((ordered @ share).mean())
        table.append({"n": k, "reward": reward, "kl_bound": math.log(k) - (k - 1) / k})
    return table
