"""Many attempts at each problem: pass@k, maj@k and their lengths, before and after a training.

    accuracy   the share of problems that the likeliest text (greedy) solves
    pass@k     the share of problems that at least one of k samples solves, estimated without bias from n >= k samples
               of which c are right, as 1 - C(n-c, k) / C(n, k) (Chen et al. 2021, arXiv 2107.03374, equation 1)
    maj@k      the share that the answer most frequent among k samples solves: self-consistency (Wang et al. 2022,
               arXiv 2203.11171). Of answers equally frequent one is drawn, so where two tie each counts half.

Reinforcement learning raises pass@1. Where pass@k of a large k stays as it was, the model knew how and now does it
more often: training sharpened what was there (Yue et al. 2025, arXiv 2504.13837). Where that rises too, it taught.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from zero2hero.align.rewards import Rewards
from zero2hero.align.verifiers import answer_part, choice_in, number_in
from zero2hero.data.conversations import Turns
from zero2hero.generate.engine import Engine, Request, SamplingParams
from zero2hero.language_model import LanguageModel
from zero2hero.progress import track

EXTRACT: dict[str, Callable[[str], Hashable]] = {"number": number_in, "choice": choice_in}  # what votes, by verifier
SURE = 2.0  # standard errors


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that one of k samples is right, from n samples of which c are.

    Raises:
        ValueError: fewer samples than k.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {k} samples, and of {n} samples {c} cannot be right")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def maj_at_k(answers: Sequence[Hashable | None], right: Sequence[bool], k: int) -> float:
    """How often the vote of k samples is right, over as many groups of k as there are. None does not vote."""
    groups = [range(i, i + k) for i in range(0, len(answers) - k + 1, k)]
    return fmean(_vote([answers[i] for i in group], [right[i] for i in group]) for group in groups)


def _vote(answers: Sequence[Hashable | None], right: Sequence[bool]) -> float:
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    verdicts = dict(zip(answers, right, strict=True))
    return fmean(verdicts[answer] for answer, count in votes.items() if count == most)


@dataclass(frozen=True)
class Attempts:
    """What many attempts at each of `problems` came to. Shares are of problems; errors are standard errors.

    Attributes:
        accuracy: greedy.
        pass_at, maj_at: k -> share.
        errors: of accuracy ("accuracy") and pass@k ("pass@4").
        length: tokens of a sample on average; `unfinished`, the share of samples that were cut off.
        form: the share of samples that other rewards (a format, say) give points to, by name.
    """

    problems: int
    samples: int
    accuracy: float
    pass_at: dict[int, float]
    maj_at: dict[int, float]
    errors: dict[str, float]
    length: float
    unfinished: float
    form: dict[str, float]


def attempt(
    lm: LanguageModel,
    problems: Sequence[tuple[Turns, Mapping[str, Any]]],
    rewards: Rewards,
    *,
    samples: int = 16,
    temperature: float = 1.0,
    max_new_tokens: int = 256,
    seed: int = 0,
    description: str = "solving",
) -> Attempts:
    """Let a model try each problem greedily and `samples` times; the first of `rewards` says what is right.

    Args:
        problems: (prompt, columns) as `question_of` gives them.
    """
    prompts = [lm.prompt_ids(prompt) for prompt, _ in problems]
    engine = Engine(lm, max_batch_size=128, max_waiting=1 << 20)
    greedy = SamplingParams(max_new_tokens=max_new_tokens, temperature=0.0)
    sampled = SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    first, *others = rewards.functions
    right, answers, lengths, cut, form = [], [], [], [], []
    together = max(1, 512 // (samples + 1))
    for start in track(range(0, len(prompts), together), description):
        some = range(start, min(start + together, len(prompts)))
        requests = [Request(prompts[i], sampled if s else greedy, sample=s) for i in some for s in range(samples + 1)]
        texts = engine.run(requests)
        asked = [problems[i] for i in some for _ in range(samples + 1)]
        written = [_as_completion(prompt, text.text) for (prompt, _), text in zip(asked, texts, strict=True)]
        columns = {
            name: [known.get(name) for _, known in asked] for name in {n: 0 for _, known in asked for n in known}
        }
        given = rewards([prompt for prompt, _ in asked], written, [t.output_ids for t in texts], columns)
        right += (given.by_function_NF[:, 0] > 0.5).tolist()
        form += (given.by_function_NF[:, 1:] > 0).tolist()
        answers += [EXTRACT.get(first, str.strip)(answer_part(text.text)) for text in texts]
        lengths += [len(text.output_ids) for text in texts]
        cut += [text.finish_reason == "length" for text in texts]

    def of_samples(values: Sequence[Any]) -> list[Sequence[Any]]:
        return [values[i + 1 : i + 1 + samples] for i in range(0, len(values), samples + 1)]

    ks = [1 << i for i in range(samples.bit_length()) if 1 << i <= samples]
    verdicts, votes = of_samples(right), of_samples(answers)
    solved = {k: [pass_at_k(samples, sum(v), k) for v in verdicts] for k in ks}
    errors = {"accuracy": _error([float(r) for r in right[:: samples + 1]])}
    forms = [each for row in of_samples(form) for each in row]
    return Attempts(
        len(problems), samples, fmean(right[:: samples + 1]),
        pass_at={k: fmean(values) for k, values in solved.items()},
        maj_at={k: fmean(maj_at_k(a, v, k) for a, v in zip(votes, verdicts, strict=True)) for k in ks},
        errors=errors | {f"pass@{k}": _error(values) for k, values in solved.items()},
        length=fmean(each for row in of_samples(lengths) for each in row),
        unfinished=fmean(each for row in of_samples(cut) for each in row),
        form={name: fmean(row[j] for row in forms) for j, name in enumerate(others)},
    )  # fmt: skip


def _as_completion(prompt: Turns, text: str) -> Turns:
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def _error(values: Sequence[float]) -> float:
    """The standard error of a mean over problems."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def table(before: Attempts, after: Attempts) -> list[tuple[str, str, str]]:
    """Rows (what, before, after) for people."""
    columns = [_column(before), _column(after)]
    return [(name, columns[0][name], columns[1][name]) for name in columns[0]]


def _column(a: Attempts) -> dict[str, str]:
    column = {"greedy accuracy": f"{a.accuracy:.1%} ± {SURE * a.errors['accuracy']:.1%}"}
    column |= {f"pass@{k}": f"{share:.1%} ± {SURE * a.errors[f'pass@{k}']:.1%}" for k, share in a.pass_at.items()}
    column |= {f"maj@{k}": f"{share:.1%}" for k, share in a.maj_at.items() if k > 2}
    column |= {"tokens of a sample": f"{a.length:.1f}", "samples cut off": f"{a.unfinished:.1%}"}
    return column | {name: f"{share:.1%}" for name, share in a.form.items()}


def verdict(before: Attempts, after: Attempts) -> str:
    """Did training teach or sharpen? One sentence, no surer than the numbers are."""
    k = max(before.pass_at)

    def change(of: Callable[[Attempts], float], error: str) -> tuple[float, bool]:
        difference = of(after) - of(before)
        return difference, abs(difference) > SURE * math.hypot(before.errors[error], after.errors[error])

    (once, clear), (many, differs) = (
        change(lambda a: a.pass_at[1], "pass@1"),
        change(lambda a: a.pass_at[k], f"pass@{k}"),
    )
    moved = f"pass@1 went from {before.pass_at[1]:.0%} to {after.pass_at[1]:.0%} and pass@{k} from "
    moved += f"{before.pass_at[k]:.0%} to {after.pass_at[k]:.0%}"
    if not clear:
        return f"Training changed nothing that {before.problems} problems could show: {moved}."
    if once < 0:
        return f"Training made it worse: {moved}."
    if differs and many < 0:
        return (
            f"Training sharpened at a price: {moved}, so some problems that it solved now and then it solves no more."
        )
    if differs:
        return f"Training taught: {moved}, so it solves problems that it did not solve in {k} attempts before."
    if before.pass_at[k] > 0.95:
        return (
            f"Training sharpened: {moved}; nearly all were solved once in {k} attempts before, so teaching had no room."
        )
    return f"Training sharpened: {moved}, so what it now solves at once it could solve in {k} attempts before."
