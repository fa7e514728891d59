"""What a key file may say, whose a key is, and how a rate is used up."""

import hashlib
from typing import Any

import pytest

from splitserve.core.errors import ConfigError
from splitserve.router.keys import ANYBODY, Bucket, KeyRing, Limits, Scope, Tenant

KEY = "key-of-acme-0123456789"
OTHER = "another-key-0123456789"
HASHED = "sha256:" + hashlib.sha256(KEY.encode()).hexdigest()


def ring(*entries: dict[str, Any]) -> KeyRing:
    return KeyRing.of({"keys": list(entries)}, "keys.yaml")


@pytest.mark.parametrize("key", [KEY, HASHED, [OTHER, KEY], [OTHER, HASHED]])
def test_a_key_in_the_clear_its_digest_or_one_of_several_names_its_tenant(key: object) -> None:
    tenant = ring({"name": "acme", "key": key}).find(KEY)
    assert tenant is not None
    assert tenant.name == "acme"
    assert tenant.scopes == {Scope.INFERENCE}
    assert tenant.limits == Limits()


@pytest.mark.parametrize("shown", ["", OTHER, KEY[:-1], KEY + "x", HASHED, "é"])
def test_any_other_key_is_nobodys(shown: str) -> None:
    assert ring({"name": "acme", "key": HASHED}).find(shown) is None


def test_scopes_and_limits_are_what_the_entry_says() -> None:
    limits = {"requests_per_minute": 60, "tokens_per_minute": 1e6, "concurrent_requests": 8}
    tenant = ring({"name": "ops", "key": KEY, "scopes": ["admin", "worker"], **limits}).find(KEY)
    assert tenant is not None
    assert tenant.scopes == {Scope.ADMIN, Scope.WORKER}
    assert tenant.limits == Limits(60, 1e6, 8)


@pytest.mark.parametrize(
    ("said", "path", "says"),
    [
        ({}, "keys", "required"),
        ({"keys": []}, "keys", "at least 1"),
        ({"keys": [{"name": "a"}]}, "keys.0.key", "required"),
        ({"keys": [{"name": "", "key": KEY}]}, "keys.0.name", "must not be empty"),
        ({"keys": [{"name": "a", "key": "short"}]}, "keys.0.key", "at least 16"),
        ({"keys": [{"name": "a", "key": "with a space in it all"}]}, "keys.0.key", "space"),
        ({"keys": [{"name": "a", "key": 1234567890123456}]}, "keys.0.key", "between quotes"),
        ({"keys": [{"name": "a", "key": []}]}, "keys.0.key", "at least one"),
        ({"keys": [{"name": "a", "key": "sha256:12"}]}, "keys.0.key", "64 hexadecimal"),
        ({"keys": [{"name": "a", "key": HASHED.upper().replace("SHA", "sha")}]}, "keys.0.key", "lower case"),
        ({"keys": [{"name": "a", "key": KEY, "scopes": []}]}, "keys.0.scopes", "at least 1"),
        ({"keys": [{"name": "a", "key": KEY, "scopes": ["root"]}]}, "keys.0.scopes", "'inference', 'admin'"),
        ({"keys": [{"name": "a", "key": KEY, "rate": 3}]}, "keys.0.rate", "unknown key"),
        ({"keys": [{"name": "a", "key": KEY, "requests_per_minute": 0}]}, "keys.0.requests_per_minute", "greater"),
        ({"keys": [{"name": "a", "key": KEY}, {"name": "a", "key": OTHER}]}, "keys.1.name", "twice"),
        ({"keys": [{"name": "a", "key": KEY}, {"name": "b", "key": HASHED}]}, "keys.1.key", "a key of 'a', too"),
    ],
)
def test_what_is_wrong_with_a_key_file_is_named_and_no_key_quoted(said: object, path: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as raised:
        KeyRing.of(said, "keys.yaml")
    assert raised.value.path.startswith(f"keys.yaml: {path}")
    for key in (KEY, HASHED, OTHER, "short", "with a space"):
        assert key not in str(raised.value)


def test_a_minutes_worth_may_come_at_once_and_comes_back_evenly() -> None:
    bucket = Bucket()
    for _ in range(6):
        assert bucket.wait_s(1, 6, 100.0) == 0
        bucket.add(1, 6, 100.0)
    assert bucket.wait_s(1, 6, 100.0) == pytest.approx(10)
    assert bucket.wait_s(1, 6, 104.0) == pytest.approx(6)
    assert bucket.wait_s(1, 6, 110.0) == 0
    assert bucket.wait_s(6, 6, 110.0) == pytest.approx(50)


def test_the_wait_that_is_told_is_exact() -> None:
    bucket = Bucket()
    bucket.add(1000, 60, 0.0)
    wait_s = bucket.wait_s(1, 60, 0.0)
    assert bucket.wait_s(1, 60, wait_s - 0.001) > 0
    assert bucket.wait_s(1, 60, wait_s) == pytest.approx(0, abs=1e-9)


def test_a_rate_below_one_a_minute_lets_one_through_now_and_then() -> None:
    bucket = Bucket()
    assert bucket.wait_s(1, 0.5, 0.0) == 0
    bucket.add(1, 0.5, 0.0)
    assert bucket.wait_s(1, 0.5, 0.0) == pytest.approx(120)


def test_an_unused_bucket_does_not_save_up_for_more_than_a_minute() -> None:
    bucket = Bucket()
    bucket.add(60, 60, 3600.0)
    assert bucket.wait_s(1, 60, 3600.0) == pytest.approx(1)


def test_limits_are_shared_out_among_routers_and_none_is_left_without() -> None:
    assert Limits(60, 900, 8).share(4) == Limits(15, 225, 2)
    assert Limits(60, 900, 8).share(1) == Limits(60, 900, 8)
    assert Limits(concurrent_requests=2).share(4) == Limits(concurrent_requests=1)
    assert Limits().share(4) == Limits()


def test_tenants_never_share_a_salt_whatever_their_requests_say() -> None:
    tenants = [Tenant(name, frozenset(), Limits(), salt) for name, salt in (("a", "s"), ("b", "s1"), ("c", "1:s"))]
    own = ["", "1", "s", "1:s", "2:s1"]
    salts = {tenant.salted(said) for tenant in tenants for said in own}
    assert len(salts) == len(tenants) * len(own)


def test_the_salt_is_made_of_the_name_unless_said_and_survives_a_new_key() -> None:
    before, after = (ring({"name": "acme", "key": key}).find(key) for key in (KEY, OTHER))
    other = ring({"name": "umbrella", "key": KEY}).find(KEY)
    shared = ring({"name": "acme", "key": KEY, "cache_salt": "s"}).find(KEY)
    assert before is not None
    assert after is not None
    assert other is not None
    assert shared is not None
    assert before.cache_salt == after.cache_salt != other.cache_salt
    assert shared.cache_salt == "s"


def test_without_keys_a_request_keeps_its_own_salt() -> None:
    assert ANYBODY.salted("mine") == "mine"
    assert ANYBODY.scopes == set(Scope)
