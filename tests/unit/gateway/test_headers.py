"""Which headers cross the gateway, and the ids it hands out."""

from __future__ import annotations

from octavo_gateway import headers


def test_only_listed_headers_reach_a_replica_and_own_ones_win() -> None:
    given = [
        (b"accept", b"*/*"),
        (b"authorization", b"Bearer x"),
        (b"x-octavo-tenant", b"evil"),
        (b"content-length", b"999"),
        (b"transfer-encoding", b"chunked"),
        (b"host", b"evil"),
    ]
    head = headers.request_head("POST", b"/v1/x?a=1", "h:1", given, 5, [(b"x-octavo-tenant", b"good")])

    assert head == (
        b"POST /v1/x?a=1 HTTP/1.1\r\nhost: h:1\r\naccept: */*\r\nx-octavo-tenant: good\r\ncontent-length: 5\r\n\r\n"
    )


def test_headers_named_by_connection_are_hop_by_hop_too() -> None:
    upstream = [(b"connection", b"close, X-Hop"), (b"x-hop", b"1"), (b"x-stay", b"2"), (b"x-octavo-inner", b"3")]

    assert headers.response_headers(upstream, [(b"own", b"4")]) == [(b"x-stay", b"2"), (b"own", b"4")]


def test_a_harmless_request_id_is_kept_and_any_other_replaced() -> None:
    assert headers.request_id(b"abc-123") == "abc-123"
    for bad in (None, b"", b"a b", b"x" * 129, b"new\nline", "ü".encode()):
        made = headers.request_id(bad)
        assert len(made) == 32
        assert made != headers.request_id(bad)


def test_a_valid_trace_is_continued_and_an_invalid_one_replaced() -> None:
    trace = headers.trace_of(b"00-" + b"a" * 32 + b"-" + b"b" * 16 + b"-01")
    assert (trace.trace_id, trace.parent_span_id) == ("a" * 32, "b" * 16)
    assert trace.span_id != "b" * 16
    assert trace.header == f"00-{trace.trace_id}-{trace.span_id}-01".encode()

    for bad in (None, b"garbage", b"00-" + b"0" * 32 + b"-" + b"b" * 16 + b"-01"):
        started = headers.trace_of(bad)
        assert started.trace_id not in ("a" * 32, "0" * 32)
        assert started.parent_span_id == ""
