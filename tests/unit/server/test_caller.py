"""Who asks: cache salts keep tenants apart."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from octavo_server.caller import Caller

texts = st.text(max_size=8)


def test_without_tenant_and_salt_the_cache_is_shared() -> None:
    assert Caller().cache_salt(None) == ""


@given(texts, texts, texts, texts)
def test_no_choice_of_salt_reaches_another_tenants_cache(a: str, b: str, salt_a: str, salt_b: str) -> None:
    if (a, salt_a) != (b, salt_b):
        assert Caller(tenant=a).cache_salt(salt_a) != Caller(tenant=b).cache_salt(salt_b)
    else:
        assert Caller(tenant=a).cache_salt(salt_a) == Caller(tenant=b).cache_salt(salt_b)
