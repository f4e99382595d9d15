"""schemathesis reads the server's description of itself, and asks what it allows and much that it does not."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode

pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLES = 12
FEW = {"max_tokens": 3, "max_completion_tokens": 3, "max_output_tokens": 3}


def asked(served, operation, mode):
    """The statuses of the answers to requests of one kind."""
    statuses = set()

    @settings(
        max_examples=EXAMPLES, database=None, derandomize=True, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case):
        if isinstance(case.body, dict):  # so that they get as far as the model
            case.body |= {"model": "tiny"} | {name: few for name, few in FEW.items() if name not in case.body}
        answer = case.call(base_url=served.url)
        assert answer.status_code < 500, answer.text
        if answer.status_code >= 400:
            assert set(answer.json()) == {"error"}
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        statuses.add(answer.status_code)

    ask()
    return statuses


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["valid", "invalid"])
def test_no_request_breaks_the_server(served, mode):
    schema = schemathesis.openapi.from_dict(served.app.openapi())
    statuses: dict[str, set[int]] = {}
    for found in schema.get_all_operations():
        operation = found.ok()
        if mode is GenerationMode.POSITIVE or operation.body:  # without a body nothing can be invalid
            statuses[operation.label] = asked(served, operation, mode)
    if mode is GenerationMode.POSITIVE:
        assert all(200 in seen for label, seen in statuses.items() if "{model}" not in label), statuses
    else:
        assert all(seen & {400, 404, 405, 415} for seen in statuses.values()), statuses
    assert served.idle()
