"""Constrained text always has its form, whatever the model would rather write."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import pytest
from test_generation import random_model

from zero2hero.errors import UserError
from zero2hero.generate.constrained import Constraint
from zero2hero.generate.engine import Engine, Request, SamplingParams
from zero2hero.language_model import LanguageModel
from zero2hero.tokenizer import Tokenizer

pytest.importorskip("llguidance")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    text = '{"name": "Ada", "tags": ["x", "y"], "age": 36, "ok": true} the cat sat on the mat. é🙂 '
    tokenizer = Tokenizer.train([text * 20], vocab_size=320)
    model = random_model(vocab_size=330, max_position_embeddings=600, eos_token_id=tokenizer.eos_token_id)
    return LanguageModel(model, tokenizer)


def random_schema(numbers: random.Random, depth: int = 2) -> dict[str, Any]:
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const"] + ["object", "array"] * 2 * (depth > 0)
    kind = numbers.choice(kinds)
    if kind == "enum":
        return {"enum": numbers.sample(["red", "grün", 3, None, True, "🙂", 4.5], numbers.randrange(1, 5))}
    if kind == "const":
        return {"const": numbers.choice(['a "quoted" word', 17, [1, 2], {"a": None}])}
    if kind == "string":
        least = numbers.randrange(4)
        pattern = {"pattern": numbers.choice(["^[a-z]{2,6}$", "^\\d{4}-\\d{2}$"])}
        return {"type": "string"} | numbers.choice([{"minLength": least, "maxLength": least + 8}, pattern])
    if kind in ("integer", "number"):
        return {"type": kind, "minimum": -numbers.randrange(100), "maximum": numbers.randrange(1000)}
    if kind == "array":
        least = numbers.randrange(3)
        return {"type": kind, "items": random_schema(numbers, depth - 1), "minItems": least, "maxItems": least + 2}
    if kind == "object":
        names = numbers.sample(["a", "name", "größe", "x y", "tags", "id"], numbers.randrange(1, 4))
        required = [name for name in names if numbers.random() < 0.7]
        properties = {name: random_schema(numbers, depth - 1) for name in names}
        return {"type": kind, "properties": properties, "required": required, "additionalProperties": False}
    return {"type": kind}


def follows(value: Any, schema: dict[str, Any]) -> bool:
    """The part of JSON schema that `random_schema` uses."""
    if "enum" in schema:
        return any(value == item and type(value) is type(item) for item in schema["enum"])
    if "const" in schema:
        return value == schema["const"]
    kind = schema["type"]
    if kind == "string":
        pattern = schema.get("pattern", "")
        return isinstance(value, str) and (
            bool(re.search(pattern, value)) if pattern else schema["minLength"] <= len(value) <= schema["maxLength"]
        )
    if kind in ("integer", "number"):
        number = isinstance(value, int if kind == "integer" else (int, float)) and not isinstance(value, bool)
        return number and schema["minimum"] <= value <= schema["maximum"]
    if kind == "array":
        fits = isinstance(value, list) and schema["minItems"] <= len(value) <= schema["maxItems"]
        return fits and all(follows(item, schema["items"]) for item in value)
    if kind == "object":
        fits = isinstance(value, dict) and set(schema["required"]) <= set(value) <= set(schema["properties"])
        return fits and all(follows(item, schema["properties"][name]) for name, item in value.items())
    return value is None if kind == "null" else isinstance(value, bool)


def test_200_random_schemas(lm):
    numbers = random.Random(0)
    schemas = [random_schema(numbers) for _ in range(200)]
    requests = [
        Request([5, 6, i % 50], SamplingParams(max_new_tokens=500, seed=i, temperature=1.5 * (i % 3),
                                               constraint=Constraint.json_schema(lm, schema)))
        for i, schema in enumerate(schemas)
    ]  # fmt: skip
    sequences = Engine(lm).run(requests)
    assert {s.finish_reason for s in sequences} == {"stop"}
    for sequence, schema in zip(sequences, schemas):
        assert follows(json.loads(sequence.text), schema), (sequence.text, schema)
    assert len({s.text for s in sequences}) > 120


def write(lm: LanguageModel, constraint: Constraint, **params: Any) -> str:
    settings = SamplingParams(**{"max_new_tokens": 300, "seed": 3, "constraint": constraint, **params})
    return Engine(lm).run([Request([7, 8], settings)])[0].text


def test_regular_expressions_and_grammars(lm):
    dates = Constraint.regex(lm, r"(19|20)\d\d-(0[1-9]|1[0-2])")
    texts = [write(lm, dates, seed=seed) for seed in range(6)]
    assert all(re.fullmatch(r"(19|20)\d\d-(0[1-9]|1[0-2])", text) for text in texts)
    assert len(set(texts)) > 3
    assert re.fullmatch("a*b", write(lm, Constraint.regex(lm, "a*b"), ignore_eos=True))
    sums = Constraint.grammar(lm, 'start: NUMBER ("+" NUMBER){1,3} "."\nNUMBER: /[0-9]{1,3}/')
    assert re.fullmatch(r"\d{1,3}(\+\d{1,3}){1,3}\.", write(lm, sums))
    alike = write(lm, dates, seed=9)
    among = Engine(lm).run(
        Request([7, 8], SamplingParams(max_new_tokens=20, seed=9, constraint=dates if i == 2 else None))
        for i in range(5)
    )
    assert among[2].text == alike


def test_what_cannot_be_a_form(lm):
    for make, given in (
        (Constraint.json_schema, {"type": "sound"}), (Constraint.json_schema, [1]), (Constraint.regex, "("),
        (Constraint.json_schema, {"const": float("nan")}), (Constraint.grammar, "start: nothing"),
        (Constraint.json_schema, {"$ref": "http://127.0.0.1/schema.json"}), (Constraint.grammar, ""),
    ):  # fmt: skip
        with pytest.raises(UserError):
            make(lm, given)
