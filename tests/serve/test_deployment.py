"""docs/serving.md and deploy/ say what is true: their commands parse, their files are whole, their paths exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from zero2hero.cli import VERBS
from zero2hero.command_line import parse
from zero2hero.options import ServeConfig

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "serving.md").read_text()


def serve(words: list[str]) -> ServeConfig:
    return parse("serve", VERBS["serve"], words)


def test_the_commands_are_commands():
    lines = [shlex.split(line) for line in DOCS.splitlines() if "zero2hero serve " in line and "`" not in line]
    assert len(lines) >= 2
    for words in lines:
        assert serve(words[words.index("serve") + 1 :]).model == "runs/quickstart"


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(\.\./([^)]+)\)", DOCS))))
def test_what_is_linked_is_there(link):
    assert (ROOT / link).exists()


def test_the_endpoints_of_the_page_are_those_of_the_server(served):
    routes = {re.sub(r"/\{.*", "", route.path) for route in served.app.routes} - {"/openapi.json"}
    table = DOCS[DOCS.index("| endpoint") : DOCS.index("Beside the API")]
    assert set(re.findall(r"`(/[a-z0-9_/]+)`", table)) == routes


def test_compose():
    server = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())["services"]["server"]
    config = serve(server["command"])
    assert (config.host, config.metrics) == ("0.0.0.0", True)
    assert "ZERO2HERO_API_KEY" in server["environment"]
    assert "/health" in server["healthcheck"]["test"][-1]
    assert (ROOT / "deploy" / server["build"]["dockerfile"].removeprefix("deploy/")).exists()
    scrape = yaml.safe_load((ROOT / "deploy" / "prometheus.yaml").read_text())["scrape_configs"][0]
    assert scrape["static_configs"][0]["targets"] == [f"server:{config.port}"]


def test_kubernetes():
    deployment, service = yaml.safe_load_all((ROOT / "deploy" / "serve.kubernetes.yaml").read_text())
    pod = deployment["spec"]["template"]
    [container] = pod["spec"]["containers"]
    config = serve(container["args"])
    assert config.host == "0.0.0.0"
    assert config.port == container["ports"][0]["containerPort"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": container["ports"][0]["name"]}
    assert service["spec"]["selector"] == pod["metadata"]["labels"] == deployment["spec"]["selector"]["matchLabels"]
    volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    from zero2hero.serve.command import GRACE_SECONDS

    assert pod["spec"]["terminationGracePeriodSeconds"] > GRACE_SECONDS + 5
