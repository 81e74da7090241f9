"""Alert rules and dashboards of the chart: PromQL that parses, over series and labels that running servers export."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import promql_parser
import pytest
import pytest_asyncio
import yaml
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from fakes.fake_engine import FakeEngine
from fakes.gateway_door import HELLO, entry, open_door
from fakes.openai_replica import OpenAIReplica
from fakes.running_server import running_server
from octavo_gateway.usage import Ledger
from octavo_operator.adapters import AdapterState, AdapterView
from octavo_operator.canary import Phase, Trial
from octavo_operator.controller.kinds import INFERENCE_SERVICE
from octavo_operator.controller.metrics import OperatorCollector
from octavo_operator.controller.service_state import ServiceState
from octavo_operator.controller.store import Store

FILES = Path(__file__).parents[3] / "charts" / "octavo" / "files"
ADDED_BY_PROMETHEUS = {"namespace", "pod", "instance", "job"}
GRAFANA = {"$__rate_interval": "5m", "$__interval": "1m"}


def expressions() -> Iterator[tuple[str, str]]:
    """(where, PromQL) of every alert, panel and template variable."""
    for group in yaml.safe_load((FILES / "alerts.yaml").read_text())["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]
    for path in sorted((FILES / "dashboards").glob("*.json")):
        dashboard = json.loads(path.read_text())
        for panel in dashboard["panels"]:
            for target in panel["targets"]:
                yield f"{path.stem}: {panel['title']}", target["expr"]
        for variable in dashboard["templating"]["list"]:
            if variable["type"] == "query":
                yield f"{path.stem}: ${variable['name']}", variable["query"].split("(", 1)[1].rsplit(",", 1)[0]


def nodes(node: Any) -> Iterator[Any]:
    """A node of a parsed expression and all below it."""
    yield node
    for name in ("lhs", "rhs", "expr", "param", "vs", "vector_selector"):
        child = getattr(node, name, None)
        if isinstance(child, promql_parser.Expr):
            yield from nodes(child)
    for child in getattr(node, "args", ()):
        yield from nodes(child)


def asked(expression: str) -> tuple[set[str], set[str]]:
    """Names of the series an expression reads, and the labels it selects or groups by."""
    for variable, value in GRAFANA.items():
        expression = expression.replace(variable, value)
    names: set[str] = set()
    labels: set[str] = set()
    for node in nodes(promql_parser.parse(expression)):
        if isinstance(node, promql_parser.VectorSelector):
            names.add(node.name)
            labels |= {matcher.name for matcher in node.matchers.matchers}
        if isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
            labels |= set(node.modifier.labels)
    return names, labels


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Every series of a replica, a gateway and an operator after some work, with its labels."""
    pages: list[str] = []
    async with running_server(FakeEngine()) as server:
        await server.post("/v1/completions", {"prompt": "Hi"})
        async with server.http.get(server.url + "/metrics") as response:
            pages.append(await response.text())
    ledger = Ledger(tmp_path_factory.mktemp("ledger"))
    try:
        async with OpenAIReplica().serve() as replica:
            broken = OpenAIReplica("broken", drop_before_head=True)
            async with broken.serve(), open_door(entry(replica, broken), ledger=ledger) as door:
                page = ""
                for number in range(500):  # three failures eject the broken one; prompts differ, so that it is tried
                    if "octavo_gateway_ejections_total{" in page:
                        break
                    await door.read(HELLO | {"messages": [{"role": "user", "content": f"{number} hello"}]})
                    page = door.server.app.metrics.page().decode()
                pages.append(page)
    finally:
        ledger.close()
    pages.append(operator_page())
    return {
        sample.name: set(sample.labels) | ({"le"} if sample.name.endswith("_bucket") else set())
        for page in pages
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }


def operator_page() -> str:
    """The page of an operator that leads and keeps one service, which has every trouble there is a metric of."""
    decision: Any = SimpleNamespace(replicas=2, ready=1, held=3, frozen=False, kv_utilization=0.5)
    refused = AdapterView("sql", AdapterState.FAILED)
    state = ServiceState(decision=decision, adapters=(refused,), trial=Trial("7f9c", Phase.RUNNING, 0, 0.0))
    store = Store()
    degraded = {"type": "Degraded", "status": "True", "reason": "CanaryRolledBack"}
    metadata = {"namespace": "team", "name": "m"}
    store.put(INFERENCE_SERVICE, {"metadata": metadata, "status": {"conditions": [degraded]}})
    room: Any = SimpleNamespace(
        silence_s=lambda: 1.0,
        client=SimpleNamespace(calls=9, writes=7),
        services=SimpleNamespace(handled=5, failed=1, length=2),
        scaling=SimpleNamespace(last_round_s=0.1),
        reconciler=SimpleNamespace(states={("team", "m"): state}),
        store=store,
    )
    registry = CollectorRegistry()
    registry.register(OperatorCollector(room))
    return generate_latest(registry).decode()


@pytest.mark.parametrize(("where", "expression"), list(expressions()), ids=lambda text: text[:60])
def test_what_an_expression_reads_is_exported(exported: dict[str, set[str]], where: str, expression: str) -> None:
    names, labels = asked(expression)

    assert names, where
    assert names <= exported.keys(), f"{where}: no such series: {names - exported.keys()}"
    known = set.union(*(exported[name] for name in names)) | ADDED_BY_PROMETHEUS
    assert labels <= known, f"{where}: no such label: {labels - known}"


def test_a_misspelt_expression_would_be_noticed() -> None:
    with pytest.raises(ValueError, match=r".+"):
        promql_parser.parse("sum by (model (rate(octavo_gateway_requests_total[5m]))")
    assert asked("sum by (kind) (rate(a_total{model='m'}[5m])) / b") == ({"a_total", "b"}, {"kind", "model"})
