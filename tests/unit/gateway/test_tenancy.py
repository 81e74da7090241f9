"""Keys, permissions and limits of tenants."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo_gateway.errors import BudgetExceededError, ConfigError, RateLimitError
from octavo_gateway.tenancy import KeyRecord, Limiter, Limits, Reservation, Tenant, TenantDirectory, hash_key, new_key
from octavo_gateway.tenancy.budget import Period
from octavo_gateway.tenancy.keys import format_hash, parse_hash
from octavo_gateway.tenancy.limiter import TokenBucket
from octavo_gateway.tenancy.source import load_tenants

TODAY = "2026-11-21"


def tenant(**limits: float) -> Tenant:
    return Tenant("t", limits=Limits(**limits))  # type: ignore[arg-type]


def test_a_key_opens_its_own_tenant_and_no_other() -> None:
    keys = [new_key() for _ in range(50)]
    directory = TenantDirectory(Tenant(f"t{i}", (KeyRecord("k", hash_key(key)),)) for i, key in enumerate(keys))

    for number, key in enumerate(keys):
        assert (found := directory.authenticate(key)) is not None
        assert found.tenant.name == f"t{number}"
    for wrong in ("", "oct-", keys[0][:-1], keys[0] + "x", keys[0].upper(), new_key(), "x" * 100_000):
        assert directory.authenticate(wrong) is None


def test_a_key_has_256_bits_and_its_hash_survives_being_written_down() -> None:
    key = new_key()

    assert len(key) == 47
    assert parse_hash(format_hash(hash_key(key))) == hash_key(key)
    assert key not in repr(KeyRecord("k", hash_key(key)))


def test_a_bare_key_in_place_of_a_hash_is_refused_without_repeating_it() -> None:
    key = new_key()
    with pytest.raises(ValueError, match="never the key itself") as caught:
        parse_hash(key)

    assert key not in str(caught.value)


@pytest.mark.parametrize(
    ("patterns", "allowed", "refused"),
    [
        (("*",), ["any", "a/b"], []),
        (("llama-*", "embed"), ["llama-8b", "embed"], ["llama", "Embed", "x-llama-8b"]),
        ((), [], ["a"]),
    ],
)
def test_allowed_models_are_names_and_patterns(
    patterns: tuple[str, ...], allowed: list[str], refused: list[str]
) -> None:
    someone = Tenant("t", allowed_models=patterns)

    assert all(someone.may_use(model) for model in allowed)
    assert not any(someone.may_use(model) for model in refused)


def test_a_request_may_ask_for_less_urgency_but_not_for_more_than_its_tenant_has() -> None:
    someone = Tenant("t", priority=5, max_priority=10)

    assert someone.queue_priority(None) == -5
    assert someone.queue_priority(3) == 3
    assert someone.queue_priority(-8) == -8
    assert someone.queue_priority(-1_000) == -10
    assert Tenant("t", priority=5).queue_priority(-1_000) == -5


def test_requests_per_minute_refill_evenly_and_say_when() -> None:
    limiter, someone = Limiter(), tenant(requests_per_minute=60)
    for _ in range(60):
        limiter.reserve(someone, 1, 1, 0.0, TODAY)
    with pytest.raises(RateLimitError, match="60 requests per minute") as caught:
        limiter.reserve(someone, 1, 1, 0.0, TODAY)

    assert caught.value.retry_after_s == 1
    limiter.reserve(someone, 1, 1, 1.0, TODAY)


def test_a_refusal_takes_nothing() -> None:
    limiter, someone = Limiter(), tenant(requests_per_minute=10, tokens_per_minute=100)
    limiter.reserve(someone, 90, 5, 0.0, TODAY)
    for _ in range(5):
        with pytest.raises(RateLimitError, match="tokens per minute"):
            limiter.reserve(someone, 50, 0, 0.0, TODAY)

    assert limiter.remaining(someone, 0.0)["requests"][1] == 9
    assert limiter.running().get("t", 0) == 1


def test_what_was_reserved_too_much_is_given_back_and_cached_tokens_are_no_input() -> None:
    limiter, someone = (
        Limiter(),
        tenant(tokens_per_minute=1_000, input_tokens_per_minute=500, output_tokens_per_minute=800),
    )
    held = limiter.reserve(someone, 100, 700, 0.0, TODAY)
    limiter.settle(held, 120, 100, 30, 0.0, 0.0, TODAY)
    left = limiter.remaining(someone, 0.0)

    assert left["tokens"][1] == 1_000 - 150
    assert left["input"][1] == 500 - 20
    assert left["output"][1] == 800 - 30
    with pytest.raises(RuntimeError, match="twice"):
        limiter.settle(held, 1, 0, 1, 0.0, 0.0, TODAY)


def test_a_request_above_the_whole_limit_runs_when_nothing_else_was_used() -> None:
    limiter, someone = Limiter(), tenant(tokens_per_minute=100)
    held = limiter.reserve(someone, 0, 5_000, 0.0, TODAY)
    with pytest.raises(RateLimitError):
        limiter.reserve(someone, 1, 1, 30.0, TODAY)
    limiter.settle(held, 0, 0, 60, 0.0, 30.0, TODAY)
    limiter.reserve(someone, 1, 1, 30.0, TODAY)


def test_concurrency_is_held_until_settled() -> None:
    limiter, someone = Limiter(), tenant(max_concurrent_requests=2)
    first, _ = limiter.reserve(someone, 1, 1, 0, TODAY), limiter.reserve(someone, 1, 1, 0, TODAY)
    with pytest.raises(RateLimitError, match="2 concurrent"):
        limiter.reserve(someone, 1, 1, 0, TODAY)
    limiter.settle(first, 1, 0, 1, 0, 0, TODAY)
    limiter.reserve(someone, 1, 1, 0, TODAY)


def test_budgets_end_with_their_day_and_month_and_count_what_the_ledger_says() -> None:
    limiter, someone = Limiter(), tenant(tokens_per_month=1_000, cost_per_month=5.0, tokens_per_day=100)
    by_month = tenant(tokens_per_month=1_000)
    limiter.learn_spent("t", Period.MONTH, TODAY, tokens=850, cost=1.0)
    limiter.learn_spent("t", Period.MONTH, TODAY, tokens=800, cost=0.5)  # an older answer takes nothing back
    for today, words in ((TODAY, "daily budget of 100 tokens"), ("2026-11-22", "monthly budget of 1000 tokens")):
        held = limiter.reserve(someone, 10, 10, 0.0, today)
        limiter.settle(held, 60, 0, 40, 0.1, 0.0, today)
        with pytest.raises(BudgetExceededError, match=words):
            limiter.reserve(someone if today == TODAY else by_month, 1, 1, 0.0, today)
    limiter.reserve(someone, 1, 1, 0.0, "2026-12-01")

    limiter.learn_spent("t", Period.MONTH, "2027-01-01", tokens=0, cost=5.0)
    with pytest.raises(BudgetExceededError, match="monthly budget of 5"):
        limiter.reserve(someone, 1, 1, 0.0, "2027-01-01")


def test_workers_together_never_give_out_more_than_the_whole() -> None:
    whole = Limits(requests_per_minute=10, tokens_per_minute=1_000, max_concurrent_requests=3, tokens_per_day=70)
    part = whole.shared_among(4)

    assert (part.requests_per_minute, part.tokens_per_minute, part.max_concurrent_requests) == (2, 250, 1)
    assert part.tokens_per_day == 70


def test_a_changed_limit_keeps_what_was_used() -> None:
    bucket = TokenBucket(100, 0.0)
    bucket.take(80, 0.0)
    bucket.resize(200, 0.0)

    assert bucket.level(0.0) == 120


Step = st.tuples(st.floats(0, 5), st.integers(0, 400), st.integers(0, 400), st.integers(0, 600))


@settings(max_examples=80, deadline=None)
@given(st.lists(Step, max_size=60))
def test_no_minute_serves_more_than_twice_the_limit_plus_one_reserve(steps: list[tuple[float, int, int, int]]) -> None:
    """A bucket allows a burst of one minute's worth on top of the steady rate; settling may add one excess."""
    limit = 1_000
    limiter, someone = Limiter(), tenant(tokens_per_minute=limit)
    now, served, waits = 0.0, [], [1.0]
    for pause, prompt, output, real_output in steps:
        now += pause
        try:
            held = limiter.reserve(someone, prompt, output, now, TODAY)
        except RateLimitError as error:
            waits.append(error.retry_after_s or 0)
            continue
        real = min(real_output, output)  # an engine never exceeds max_tokens
        limiter.settle(held, prompt, 0, real, 0.0, now, TODAY)
        served.append((now, prompt + real))
    for start, _ in served:
        assert sum(tokens for at, tokens in served if start <= at <= start + 60) <= 2 * limit + 800
    assert limiter.running().get("t", 0) == 0
    assert 0 < min(waits) <= max(waits) <= 120


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 3), st.integers(1, 300), st.integers(1, 700)), min_size=1, max_size=80))
def test_tokens_per_minute_are_exceeded_by_at_most_one_reserve(steps: list[tuple[float, int, int]]) -> None:
    """Many requests at once, each settled a while after it was admitted, with any share of what it reserved."""
    limit = 1_000
    limiter, someone = Limiter(), tenant(tokens_per_minute=limit)
    now, served, largest = 0.0, 0.0, 0
    running: list[tuple[float, Reservation, int]] = []
    for pause, real, reserved in steps:
        now += pause
        for due, held, tokens in [entry for entry in running if entry[0] <= now]:
            limiter.settle(held, 0, 0, tokens, 0.0, due, TODAY)
            running.remove((due, held, tokens))
        try:
            held = limiter.reserve(someone, 0, reserved, now, TODAY)
        except RateLimitError:
            continue
        tokens = min(real, reserved)
        served += tokens
        largest = max(largest, reserved)
        running.append((now + real / 100, held, tokens))
        assert served <= limit + limit * now / 60 + largest


TENANTS = """
apiVersion: serving.octavo.dev/v1alpha1
kind: InferenceTenant
metadata: {name: team-a}
spec:
  displayName: Team A
  keySecretRefs: [{name: team-a-keys}]
  allowedModels: [llama-*]
  weight: 3
  priority: 2
  limits: {requestsPerMinute: 10, tokensPerMinute: 1000, costPerMonth: "12.5"}
---
apiVersion: v1
kind: Secret
metadata: {name: team-a-keys}
stringData: {laptop: "HASH"}
"""


def write(folder: Path) -> Callable[[str], Path]:
    def to(text: str) -> Path:
        path = folder / "tenants.yaml"
        path.write_text(text)
        return path

    return to


def test_the_manifests_of_a_cluster_are_the_file_form(tmp_path: Path) -> None:
    key = new_key()
    directory = load_tenants(write(tmp_path)(TENANTS.replace("HASH", format_hash(hash_key(key)))))

    identity = directory.authenticate(key)
    assert identity is not None
    assert identity.key_name == "laptop"
    found = identity.tenant
    assert (found.weight, found.priority, found.allowed_models) == (3.0, 2, ("llama-*",))
    assert (found.limits.requests_per_minute, found.limits.cost_per_month) == (10, 12.5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("HASH", "oct-secret-key"), ["team-a-keys", "laptop", "never the key itself"]),
        (("name: team-a-keys}\nstringData", "name: other}\nstringData"), ["team-a", "no Secret", "team-a-keys"]),
        (("weight: 3", "weight: 0"), ["spec.weight"]),
        (("weight: 3", "wieght: 3"), ["wieght"]),
        (("kind: Secret", "kind: ConfigMap"), ["kind", "ConfigMap"]),
        (("spec:", "spec: ["), ["no valid YAML"]),
    ],
)
def test_a_wrong_tenant_file_is_refused_with_the_field_and_without_any_key(
    tmp_path: Path, change: tuple[str, str], words: list[str]
) -> None:
    text = TENANTS.replace(*change).replace("HASH", format_hash(hash_key("x")))
    with pytest.raises(ConfigError) as caught:
        load_tenants(write(tmp_path)(text))

    for word in [*words, "tenants.yaml"]:
        assert word in str(caught.value)
    assert "oct-secret-key" not in str(caught.value)


def test_one_key_of_two_tenants_is_refused(tmp_path: Path) -> None:
    first = TENANTS.replace("HASH", format_hash(hash_key("x")))
    second = first.replace("name: team-a}", "name: team-b}").split("---")[0]
    with pytest.raises(ConfigError, match="also belongs to"):
        load_tenants(write(tmp_path)(first + "---" + second))
