"""Names, aliases, adapters and conflicts of the model registry."""

from __future__ import annotations

from octavo_gateway.registry import Endpoint, EndpointState, ModelEntry, Registry, Snapshot, build_snapshot


def test_a_model_is_found_by_name_alias_and_adapter() -> None:
    snapshot = build_snapshot([ModelEntry("base", aliases=("nick",), adapters=("sql",))])

    assert snapshot.resolve("base") == snapshot.resolve("nick")
    assert (found := snapshot.resolve("sql")) is not None
    assert (found.entry.name, found.adapter) == ("base", "sql")
    assert snapshot.resolve("other") is None


def test_an_alias_cannot_hijack_a_models_own_name() -> None:
    snapshot = build_snapshot([ModelEntry("thief", aliases=("victim",)), ModelEntry("victim")])

    assert (found := snapshot.resolve("victim")) is not None
    assert found.entry.name == "victim"
    assert snapshot.conflicts == ("alias 'victim' of model 'thief' is taken by model 'victim'",)


def test_the_first_of_two_models_with_one_name_wins_and_the_other_is_told() -> None:
    snapshot = build_snapshot([ModelEntry("m", namespace="one"), ModelEntry("m", namespace="two")])

    assert snapshot.models["m"].namespace == "one"
    assert "namespace two" in snapshot.conflicts[0]


def test_only_ready_endpoints_take_requests() -> None:
    endpoints = tuple(Endpoint(state.value, "http://h:1", state) for state in EndpointState)

    assert [e.id for e in ModelEntry("m", endpoints).ready] == ["ready"]


def test_an_address_knows_its_default_ports() -> None:
    assert Endpoint("a", "https://host").address == ("host", 443, True)
    assert Endpoint("b", "http://[::1]:8000").address == ("::1", 8000, False)


def test_listeners_hear_each_new_snapshot_and_readers_keep_the_old_one() -> None:
    registry = Registry()
    heard: list[Snapshot] = []
    registry.subscribe(heard.append)
    before = registry.snapshot
    registry.publish([ModelEntry("m")])

    assert not before.models
    assert heard == [registry.snapshot]
    assert registry.synced
    assert registry.snapshot.version == 1
