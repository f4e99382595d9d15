"""Rollouts: what a policy writes when it is asked, and how likely it found each token that it wrote.

    sampler = Sampler(model, tokenizer, eos_ids, max_completion_length=64, temperature=1.0, seed=0)
    rollout = sampler([[1, 2, 3], ...], num_generations=8, step=0)      # of the weights as they are now
    batch = training_batch(rollout, range(16), advantages=advantages_N)    # torch tensors on the CPU
    logprobs_K = policy_logprobs(model, batch, temperature=1.0)          # ratio = exp(logprobs_K - old_logprobs_K)

The texts come from the engine that also serves (generate/engine.py): the samples of a prompt share what was read of it,
a text that ends makes room, and nothing is padded. Tokens go in and tokens come out. What is trained on are the very
ids that were sampled, never their text tokenized once more, which would be other tokens with other probabilities.

The behaviour log-probabilities are those of the distribution that was drawn from. With a temperature alone the training
forward computes the same distribution, so at the first update the ratio of new to old policy is 1: in fp32 to some
1e-6; in bf16 only to some hundredths, because the two add in another order. With top_k, top_p or min_p the sampler
draws from a distribution without a tail, which the training forward does not know: `Rollout.exact` is False then, and
old log-probabilities must be computed by `policy_logprobs`.

N samples (those of one prompt side by side), C tokens of the longest completion, B rows of a batch, T tokens of a row,
K tokens of a batch that the policy chose, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zero2hero.data.batches import IGNORE, Batch
from zero2hero.data.examples import Example
from zero2hero.data.packed import batch_of_examples, pack
from zero2hero.errors import UserError
from zero2hero.generate.decode import Writer
from zero2hero.generate.engine import Engine, Request, SamplingParams
from zero2hero.generate.engine import Sequence as Text
from zero2hero.generate.pages import PAGE
from zero2hero.generate.reader import evaluating
from zero2hero.models.decoder import Decoder
from zero2hero.nn.logprobs import token_logprobs
from zero2hero.tokenizer import Tokenizer

PREFILL = 2048  # tokens of prompts that are read together
AT_A_TIME = 256  # texts that are written together

# (number of the sample, its text so far) -> tokens that are put behind it before it goes on; None: it is done
AfterTurn = Callable[[int, Text], "Sequence[int] | None"]


@dataclass(frozen=True)
class Rollout:
    """N samples; all lists have one entry for each.

    Attributes:
        prompt_ids, completion_ids: tokens; a completion that was not cut off ends with its end token.
        logprobs: of each token of the completion, its log-probability (nats) when it was drawn; 0 where `own` is False.
        own: which of these tokens the policy chose; the others came from a tool (environment.py).
        finish_reasons: "stop" (it ended by itself) or "length" (max_completion_length, or the context, cut it off).
        texts: the completions, without special tokens.
        exact: the log-probabilities are those of the whole distribution at the sampler's temperature.
    """

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    logprobs: list[list[float]]
    own: list[list[bool]]
    finish_reasons: list[str]
    texts: list[str]
    exact: bool = True

    def __len__(self) -> int:
        return len(self.prompt_ids)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each completion."""
        return [len(ids) for ids in self.completion_ids]

    @property
    def mask_NC(self) -> Tensor:
        """True where the policy chose a token."""
        return self.padded(self.own, False)

    @property
    def logprobs_NC(self) -> Tensor:
        return self.padded(self.logprobs, 0.0)

    def padded(self, values: Sequence[Sequence[Any]], filling: Any) -> Tensor:
        """[N, C] of values for each token of each completion, filled up on the right."""
        longest = max(self.lengths)
        return torch.tensor([[*row, *[filling] * (longest - len(row))] for row in values])

    def state_dict(self) -> dict[str, Any]:
        """JSON values, from which `Rollout(**...)` makes it anew."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class PolicyBatch(Batch):
    """Samples as packed rows; its targets are the K tokens that the policy chose, row by row.

    Attributes:
        sample_K: the number of each one's sample in the rollout.
        token_K: which token of its completion it is.
        columns: more numbers for each, [K], by name (see `training_batch`).
        num_samples: how many samples are in the batch.
        fresh: the policy is still the one that sampled.
        tokens_per_sample: that the policy chose and that count, on average in the whole rollout.
    """

    sample_K: Any = None
    token_K: Any = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    num_samples: int = 0
    fresh: bool = False
    tokens_per_sample: float | None = None

    def to(self, device: Any) -> PolicyBatch:
        moved = super().to(device)
        columns = {name: column.to(device) for name, column in self.columns.items()}
        K = {"sample_K": self.sample_K.to(device), "token_K": self.token_K.to(device), "columns": columns}
        return dataclasses.replace(moved, **K)  # type: ignore[return-value]

    def padded(self, values_K: Tensor, into_NC: Tensor) -> None:
        """Put the value of each token where it belongs in `into_NC`."""
        into_NC[self.sample_K, self.token_K] = values_K


class Sampler:
    """Samples from a model whose weights change between calls; with an adapter, from both together.

    Args:
        model: a decoder; the adapter that it wears takes part.
        tokenizer: makes texts of the tokens.
        eos_ids: tokens that end a completion.
        max_completion_length: tokens of a completion, at most.
        temperature: above 0. Logits are divided by it, in sampling and in `policy_logprobs`.
        top_k, top_p, min_p: see `SamplingParams`; with any of them `Rollout.exact` is False.
        stop: texts that end a completion (or, with `after_turn`, a turn). The tokens up to there stay.
        seed: with the step, of the random numbers. The same weights, prompts, seed and step give the same rollout.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        eos_ids: Collection[int],
        *,
        max_completion_length: int = 256,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        stop: tuple[str, ...] = (),
        seed: int = 0,
    ) -> None:
        self.params = SamplingParams(
            max_new_tokens=max_completion_length, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
            stop=stop,
        )  # fmt: skip
        if self.params.greedy or max_completion_length < 1:
            raise UserError(
                f"a policy explores by sampling: temperature is above 0, not {temperature}, and max_completion_length "
                f"at least 1, not {max_completion_length}"
            )
        self.exact = (top_k, top_p, min_p) == (0, 1.0, 0.0)
        self.model, self.tokenizer, self.seed = model, tokenizer, seed
        self._writer = Writer(model, frozenset(eos_ids), tokenizer if stop else None)
        self._engine: Engine | None = None

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        num_generations: int = 1,
        step: int = 0,
        after_turn: AfterTurn | None = None,
    ) -> Rollout:
        """`num_generations` samples for each prompt (token ids), by the model as it is now.

        Args:
            step: together with the seed decides the random numbers.
            after_turn: called when a sample ends; it may go on with more tokens behind it.

        Raises:
            UserError: a prompt that leaves no room for a completion, or the model's logits are not numbers.
        """
        rows = [list(prompt) for prompt in prompts for _ in range(num_generations)]
        room = self._check(prompts)
        engine = self._ready(max(map(len, rows)), len(rows))
        seed = int(np.random.SeedSequence([self.seed % 2**64, step]).generate_state(1, np.uint64)[0])
        samples = [_Sample(row, min(self.params.max_new_tokens, room - len(row))) for row in rows]
        running = {}
        for i, sample in enumerate(samples):
            running[self._submit(engine, sample, i, seed)] = i
        while running:
            for event in engine.step():
                if event.finish_reason is None:
                    continue
                i = running.pop(event.sequence)
                sample, text = samples[i], event.sequence
                sample.take(text)
                more = after_turn(i, text) if after_turn and text.finish_reason == "stop" else None
                if more is not None and sample.go_on(more):
                    running[self._submit(engine, sample, i, seed)] = i
        return Rollout(
            [s.prompt for s in samples], [s.completion for s in samples], [s.logprobs for s in samples],
            [s.own for s in samples], [s.finish_reason for s in samples],
            [self.tokenizer.decode(s.completion) for s in samples], self.exact,
        )  # fmt: skip

    def _check(self, prompts: Sequence[Sequence[int]]) -> int:
        """Tokens that prompt and completion may have together."""
        room = self.model.config.max_position_embeddings + 1  # the last one is never read
        for number, prompt in enumerate(prompts):
            if not 1 <= len(prompt) < room:
                raise UserError(
                    f"prompt {number} has {len(prompt)} tokens; the model's context is {room - 1}, and a prompt has at "
                    "least one token"
                )
        return room

    def _ready(self, longest: int, rows: int) -> Engine:
        """The engine, with memory for these prompts, and without memory of the weights as they were."""
        pages = -(-(longest + self.params.max_new_tokens) // PAGE)
        needed = pages * min(rows, AT_A_TIME)
        if self._engine is None or self._engine.pages.count < needed:
            self._engine = Engine(
                self._writer, max_batch_size=AT_A_TIME, max_cached_tokens=needed * PAGE, prefill_chunk=PREFILL,
                max_waiting=1 << 30,
            )  # fmt: skip
        self._engine.forget()
        return self._engine

    def _submit(self, engine: Engine, sample: _Sample, number: int, seed: int) -> Text:
        params = dataclasses.replace(self.params, max_new_tokens=sample.left, seed=seed)
        return engine.submit(Request(sample.prompt + sample.completion, params, sample=number))


class _Sample:
    """One sample in the making; `left` counts the tokens that it may still get."""

    def __init__(self, prompt: list[int], left: int) -> None:
        self.prompt, self.left = prompt, left
        self.completion: list[int] = []
        self.logprobs: list[float] = []
        self.own: list[bool] = []
        self.finish_reason = "length"

    def take(self, text: Text) -> None:
        """What the policy wrote in a turn."""
        self._append(text.output_ids, text.behaviour_logprobs, True)
        assert text.finish_reason is not None
        self.finish_reason = text.finish_reason

    def go_on(self, ids: Sequence[int]) -> bool:
        """Put an observation behind it; False where nothing could be said after that."""
        if len(ids) >= self.left:
            self.finish_reason = "length"
            return False
        self._append(ids, [0.0] * len(ids), False)
        return True

    def _append(self, ids: Sequence[int], logprobs: Sequence[float], own: bool) -> None:
        self.completion += ids
        self.logprobs += logprobs
        self.own += [own] * len(ids)
        self.left -= len(ids)


# --- for training -----------------------------------------------------------------------------------------------


def training_batch(rollout: Rollout, samples: Sequence[int], **columns: Tensor) -> PolicyBatch:
    """These samples of a rollout as rows without padding to speak of, each sample a document of its own.

    Args:
        samples: their numbers.
        columns: name -> numbers for each token of all completions [N, C], or for each sample [N].
    """
    examples = [_example(rollout, i) for i in samples]
    lengths = np.array([len(example) - 1 for example in examples])
    rows = pack(lengths, int(lengths.max()), np.arange(len(examples)))
    packed = batch_of_examples([[examples[i] for i in row] for row in rows], int(lengths.max()))
    chosen = packed.targets_BT != IGNORE
    sample_K = packed.records[chosen]
    starts = np.array([len(prompt) for prompt in rollout.prompt_ids])
    token_K = torch.as_tensor(packed.positions_BT[chosen] + 1 - starts[sample_K])
    sample_K = torch.as_tensor(sample_K)
    numbers = {n: c[sample_K] if c.dim() == 1 else c[sample_K, token_K] for n, c in columns.items()}
    parts = vars(packed) | ({} if packed.crosses_documents else {"document_ids_BT": None})
    return PolicyBatch(
        **parts, sample_K=sample_K, token_K=token_K, columns=numbers, num_samples=len(samples)
    ).to("cpu")  # fmt: skip


def _example(rollout: Rollout, i: int) -> Example:
    """A sample as something to learn from."""
    own = np.array(rollout.own[i], dtype=np.float32)
    last = int(np.flatnonzero(own)[-1]) + 1  # what came after the policy's last word explains nothing
    ids = np.array(rollout.prompt_ids[i] + rollout.completion_ids[i][:last])
    return Example(ids, np.concatenate([np.zeros(len(rollout.prompt_ids[i]), np.float32), own[:last]]), i)


def chosen_states(model: nn.Module, batch: PolicyBatch) -> tuple[Tensor, Tensor]:
    """The hidden states [K, D] from which the policy chose, and what it chose [K]."""
    positions = batch.positions_BT if batch.document_ids_BT is not None else None
    hidden_BTD = model(batch.ids_BT, positions=positions, document_ids=batch.document_ids_BT)
    chosen_BT = batch.targets_BT != IGNORE
    return hidden_BTD[chosen_BT], batch.targets_BT[chosen_BT]


def policy_logprobs(model: nn.Module, batch: PolicyBatch, temperature: float = 1.0) -> Tensor:
    """log p [K] in nats of the tokens that the policy chose, at the temperature of the sampler; fp32.

    Dropout is off: with it the policy that learns would not be the one that wrote.
    """
    with evaluating(model):
        hidden_KD, targets_K = chosen_states(model, batch)
        return token_logprobs(hidden_KD, model.head_weight, targets_K, temperature=temperature)  # type: ignore[arg-type]


@torch.no_grad()
def rollout_logprobs(
    model: nn.Module, rollout: Rollout, temperature: float = 1.0, samples_at_a_time: int = 16
) -> Tensor:
    """log p [N, C] in nats of a whole rollout under `model`, 0 where the policy did not choose. On the CPU."""
    logprobs_NC = torch.zeros(len(rollout), max(rollout.lengths))
    device = next(model.parameters()).device
    for start in range(0, len(rollout), samples_at_a_time):
        batch = training_batch(rollout, range(start, min(start + samples_at_a_time, len(rollout))))
        logprobs_K = policy_logprobs(model, batch.to(device), temperature)
        batch.padded(logprobs_K.cpu(), logprobs_NC)
    return logprobs_NC


class RolloutData:
    """The data of a run that learns from its own samples: step -> the step's micro-batches.

    When a step needs a new rollout, `collect` makes it from the weights of that moment; it then serves
    `micro_batches_per_rollout / micro_batches_per_step` steps, and all of that `num_iterations` times over, in another
    order each time. What is under way is in `state_dict`, so a run that is killed goes on with the same samples.

    Args:
        collect: number of the rollout -> (rollout, columns for `training_batch`: tensors [N] or [N, C]).
        samples_per_micro_batch, micro_batches_per_step, micro_batches_per_rollout, num_iterations: see above; a
            rollout has micro_batches_per_rollout * samples_per_micro_batch samples.
        seed: of the order.
        device: where the batches go.
    """

    unharmed_by_errors = True  # where `collect` fails, what is kept is what it was

    def __init__(
        self,
        collect: Callable[[int], tuple[Rollout, dict[str, Tensor]]],
        *,
        samples_per_micro_batch: int,
        micro_batches_per_step: int = 1,
        micro_batches_per_rollout: int = 0,
        num_iterations: int = 1,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        together = micro_batches_per_rollout or micro_batches_per_step
        if together % micro_batches_per_step:
            raise UserError(
                f"a rollout of {together} micro-batches (steps_per_generation) is not a whole number of steps of "
                f"{micro_batches_per_step} (gradient_accumulation_steps)"
            )
        self.collect, self.device, self.seed = collect, device, seed
        self.size, self.per_step = samples_per_micro_batch, micro_batches_per_step
        self.parts = together // micro_batches_per_step
        self.steps_per_rollout = self.parts * num_iterations
        self.number = -1
        self.rollout: Rollout | None = None
        self.columns: dict[str, Tensor] = {}

    def __call__(self, step: int) -> list[PolicyBatch]:
        number, within = divmod(step, self.steps_per_rollout)
        if number != self.number:
            self.rollout, self.columns = self.collect(number)
            self.number = number
        assert self.rollout is not None
        iteration, part = divmod(within, self.parts)
        order = np.random.default_rng([self.seed % 2**64, number, iteration]).permutation(len(self.rollout))
        of_step = sorted(np.array_split(order, self.parts)[part].tolist())
        chosen_NC = self.rollout.mask_NC * self.columns.get("kept", torch.ones(len(self.rollout)))[:, None]
        about = {"fresh": within == 0, "tokens_per_sample": float(chosen_NC.sum()) / len(self.rollout)}
        parts = [of_step[i : i + self.size] for i in range(0, len(of_step), self.size)]
        batches = [training_batch(self.rollout, part, **self.columns).to(self.device) for part in parts]
        return [dataclasses.replace(batch, **about) for batch in batches]  # type: ignore[arg-type]

    def state_dict(self) -> dict[str, Any]:
        """JSON values and tensors."""
        rollout = self.rollout.state_dict() if self.rollout else None
        return {"number": self.number, "rollout": rollout, "columns": self.columns}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.number, self.columns = state["number"], dict(state["columns"])
        self.rollout = Rollout(**state["rollout"]) if state["rollout"] else None
