from __future__ import annotations

from octavo_operator.api.serving_runtime import MetricMap, MetricSource
from octavo_operator.autoscale.observer import SERVICE_WINDOW_S, TTFT_WINDOW_S, Capacity, Observer

METRICS = MetricMap.model_validate(
    {
        "queueDepth": [{"gauge": "waiting"}],
        "running": [{"gauge": "running"}],
        "kvCacheUtilization": [{"gauge": "kv"}],
        "ttftSeconds": [{"histogram": "ttft"}],
        "requestSeconds": [{"histogram": "request"}],
        "queueSeconds": [{"histogram": "queue"}],
        "generatedTokens": [{"rate": "tokens_total"}],
    }
)


def histogram(name: str, bounds: dict[str, int], total: float) -> str:
    lines = [f'{name}_bucket{{le="{bound}"}} {count}' for bound, count in bounds.items()]
    count = max(bounds.values())
    return "\n".join([*lines, f"{name}_count {count}", f"{name}_sum {total}"]) + "\n"


def page(waiting: int = 0, running: int = 0, kv: float = 0.0, tokens: int = 0, more: str = "") -> str:
    return f"waiting {waiting}\nrunning {running}\nkv {kv}\ntokens_total {tokens}\n{more}"


def test_samples_of_ready_replicas_become_signals() -> None:
    observer = Observer(METRICS, 0.0)
    observer.add_page("a", page(3, 2, 0.5), 10.0)
    observer.add_page("b", page(1, 4, 0.25), 10.0)
    signals = observer.signals(current=3, ready=["a", "b"], pending=1, now=10.0, held=7, arrivals=40.0)
    assert (signals.current, signals.ready, signals.pending, signals.held, signals.arrivals) == (3, 2, 1, 7, 40.0)
    assert {(s.name, s.waiting, s.running, s.kv_utilization) for s in signals.samples} == {
        ("a", 3.0, 2.0, 0.5),
        ("b", 1.0, 4.0, 0.25),
    }


def test_a_replica_that_left_is_forgotten() -> None:
    observer = Observer(METRICS, 0.0)
    observer.add_page("a", page(3), 1.0)
    assert observer.signals(current=1, ready=["b"], pending=0, now=2.0).samples == ()
    assert observer.sample("a") is None


def test_tokens_per_second_need_two_pages_and_survive_a_restarted_engine() -> None:
    observer = Observer(METRICS, 0.0)
    observer.add_page("a", page(tokens=100), 1.0)
    assert observer.tokens_per_s("a") == 0.0
    observer.add_page("a", page(tokens=300), 3.0)
    assert observer.tokens_per_s("a") == 100.0
    observer.add_page("a", page(tokens=5), 4.0)
    assert observer.tokens_per_s("a") == 0.0


def test_service_time_leaves_waiting_out() -> None:
    observer = Observer(METRICS, 0.0)
    before = histogram("request", {"1": 0, "+Inf": 0}, 0.0) + histogram("queue", {"1": 0, "+Inf": 0}, 0.0)
    after = histogram("request", {"1": 0, "+Inf": 4}, 20.0) + histogram("queue", {"1": 0, "+Inf": 4}, 8.0)
    observer.add_page("a", page(more=before), 0.0)
    observer.add_page("a", page(more=after), SERVICE_WINDOW_S / 2)
    assert observer.signals(current=1, ready=["a"], pending=0, now=SERVICE_WINDOW_S / 2).service_s == 3.0


def test_service_time_follows_the_last_minutes_only() -> None:
    observer = Observer(METRICS, 0.0)
    for step in range(12):
        seconds = step * 60.0
        old, new = min(step, 5), max(step - 5, 0)  # one request a minute: 10 s each at first, then 2 s each
        more = histogram("request", {"+Inf": step}, old * 10.0 + new * 2.0)
        observer.add_page("a", page(more=more), seconds)
    assert observer.signals(current=1, ready=["a"], pending=0, now=660.0).service_s == 2.0


def test_time_to_first_token_is_told_for_whole_windows_over_all_replicas() -> None:
    observer = Observer(METRICS, 0.0)
    for name in ("a", "b"):
        observer.add_page(name, page(more=histogram("ttft", {"1": 50, "2": 50, "+Inf": 50}, 25.0)), 1.0)
    assert observer.signals(current=2, ready=["a", "b"], pending=0, now=2.0).ttft is None
    observer.add_page("a", page(more=histogram("ttft", {"1": 50, "2": 110, "+Inf": 110}, 115.0)), TTFT_WINDOW_S)
    observer.add_page("b", page(more=histogram("ttft", {"1": 90, "2": 90, "+Inf": 90}, 45.0)), TTFT_WINDOW_S)
    ttft = observer.signals(current=2, ready=["a", "b"], pending=0, now=TTFT_WINDOW_S).ttft
    assert ttft is not None
    assert (ttft.window_end, ttft.samples) == (TTFT_WINDOW_S, 100)  # what came before the window does not count
    assert 1.0 < ttft.p95_s < 2.0


def test_capacity_is_the_median_cache_and_the_busiest_minute_of_a_replica() -> None:
    metrics = METRICS.model_copy(
        update={
            "kv_capacity_tokens": [MetricSource(gauge="capacity")],
            "max_model_len": [MetricSource(gauge="longest")],
        }
    )
    observer = Observer(metrics, 0.0)
    assert observer.capacity() == Capacity()
    for second in range(0, 181, 5):
        tokens = 10 * min(second, 60) + 2 * max(0, second - 60)  # 10 a second for a minute, then 2
        observer.add_page("a", page(tokens=tokens, more="capacity 4000\nlongest 512\n"), float(second))
    observer.add_page("b", page(more="capacity 6000\n"), 181.0)
    observer.add_page("c", page(more="capacity 9000\n"), 181.0)
    assert observer.capacity() == Capacity(kv_tokens=6_000, max_model_len=512, peak_tokens_per_minute=600)
