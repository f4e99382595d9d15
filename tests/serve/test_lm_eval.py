"""lm-eval through `local-completions` against the server, and in this process: the same scores, to the last bit."""

from __future__ import annotations

import pytest
from datasets import Dataset

from zero2hero.generate.engine import Engine, Request, SamplingParams

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.model import TemplateLM  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

PLACES = [
    {"text": "Where do people drink coffee?", "choices": ["im Café", "in Zürich, über Köln", "in the sea"], "gold": 0},
    {"text": "Wo ist der Fuchs?", "choices": ["日本", "là-bas, là où il était", "🦊🦊"], "gold": 1},
    {"text": "Ada found a", "choices": ["red ball", "réd bâll", "ball"], "gold": 0},
]
SUMS = [
    {"text": f"{a} + {b} =", "choices": [str(a + b), str(a + b + 1), str(a * b)], "gold": 0}
    for a, b in ((1, 2), (12, 30), (4, 4), (7, 0))
]
WORDS = [{"text": "Ada found a red ball. It was lost", "last": "again"}, {"text": "Ben asked: where is", "last": "it?"}]
PAGES = [
    {"text": "Ada found a red ball. It was lost again. " * 3},
    {"text": "The café is closed, naïvely. 🦊\n\nBen asked."},
]


def choices(name, docs):
    return task(name, docs) | {
        "output_type": "multiple_choice", "doc_to_text": "{{text}}", "doc_to_choice": "choices",
        "doc_to_target": "gold", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }  # fmt: skip


def task(name, docs):
    return {"task": name, "custom_dataset": lambda **_: {"test": Dataset.from_list(docs)}, "test_split": "test"}


TASKS = [
    choices("places", PLACES),
    choices("sums", SUMS),
    task("last_word", WORDS) | {
        "output_type": "loglikelihood", "doc_to_text": "{{text}}", "doc_to_target": " {{last}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    task("pages", PAGES) | {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
]  # fmt: skip


class InProcess(TemplateLM):
    """The engine without a server."""

    def __init__(self, lm):
        super().__init__()
        self.lm, self.engine = lm, Engine(lm)

    @property
    def eot_token_id(self):
        return self.lm.tokenizer.eos_token_id

    @property
    def prefix_token_id(self):
        return self.lm.tokenizer.bos_token_id

    def tok_encode(self, string, add_special_tokens=None, **_):
        return self.lm.tokenizer.encode(string, add_special_tokens=False, split_special_tokens=True)

    def _loglikelihood_tokens(self, requests, **_):
        scores = []
        for _, context, continuation in requests:
            params = SamplingParams(max_new_tokens=0, prompt_logprobs=1)
            [sequence] = self.engine.run([Request(context + continuation, params)])
            found = sequence.prompt_logprobs[len(context) :]
            scores.append(
                (sum(token.logprob for token in found), all(token.logprob == token.top[0][1] for token in found))
            )
        return scores

    def loglikelihood_rolling(self, requests, **_):
        rows = [("", [self.prefix_token_id], self.tok_encode(request.args[0])) for request in requests]
        return [score for score, _ in self._loglikelihood_tokens(rows)]

    def generate_until(self, requests, **_):
        raise NotImplementedError


def evaluate(model, **more):
    done = lm_eval.simple_evaluate(
        model, tasks=TASKS, bootstrap_iters=0, cache_requests=False, verbosity="ERROR", **more
    )
    resps = {name: [sample["resps"] for sample in samples] for name, samples in done["samples"].items()}
    return done["results"], resps


def test_the_same_scores(served):
    arguments = f"model=tiny,base_url={served.url}/v1/completions,num_concurrent=1,max_length=1024"
    arguments += f",tokenizer_backend=auto,custom_prefix_token_id={served.lm.tokenizer.bos_token_id}"
    results, resps = evaluate("local-completions", model_args=arguments, batch_size=3)
    expected_results, expected_resps = evaluate(InProcess(served.lm))
    assert set(results) == {"places", "sums", "last_word", "pages"}

    def numbers(value):
        return [
            [[tuple(map(str, r)) if isinstance(r, tuple) else str(r) for r in resp] for resp in sample]
            for sample in value
        ]

    for name in results:
        assert numbers(resps[name]) == numbers(expected_resps[name]), name
        for metric, value in expected_results[name].items():
            assert results[name][metric] == value, (name, metric)
    assert results["pages"]["bits_per_byte,none"] > 0
