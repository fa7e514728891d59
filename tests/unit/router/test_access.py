"""Who is let in, for what, how much at once; and keys that change meanwhile."""

import os
from pathlib import Path

import pytest
import yaml

from splitserve.core.errors import ConfigError, Limit, Overloaded, PermissionDenied, Unauthenticated
from splitserve.router.access import SCOPES, AccessControl, KeyFile
from splitserve.router.keys import ANYBODY, KeyRing, Scope, Tenant
from splitserve.rpc.gen import admin_pb2, inference_pb2, worker_pb2

KEY = "key-of-acme-0123456789"
ADMIN = "key-of-ops-0123456789"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def control(clock: Clock | None = None, **limits: float) -> AccessControl:
    said = [{"name": "acme", "key": KEY, **limits}, {"name": "ops", "key": ADMIN, "scopes": ["admin", "worker"]}]
    return AccessControl(KeyRing.of({"keys": said}, "keys.yaml"), clock or Clock())


def acme(access: AccessControl) -> Tenant:
    return access.identify(KEY, Scope.INFERENCE)


def waits_s(access: AccessControl) -> float:
    """How long a request of acme's is told to wait; 0: it is admitted, and ends at once."""
    try:
        with access.admitted(acme(access)):
            return 0.0
    except Overloaded as error:
        return error.retry_after_s


def test_without_keys_everybody_may_do_everything() -> None:
    access = AccessControl()
    assert not access.asks_for_keys
    for scope in Scope:
        assert access.identify(None, scope) is ANYBODY
    with access.admitted(ANYBODY):
        access.charge(ANYBODY, 10**9)


@pytest.mark.parametrize("shown", [None, "", "an-unknown-key-0123456789"])
def test_no_key_or_an_unknown_one_is_nobody(shown: str | None) -> None:
    with pytest.raises(Unauthenticated):
        control().identify(shown, Scope.INFERENCE)


@pytest.mark.parametrize(
    ("key", "opens"), [(KEY, {Scope.INFERENCE}), (ADMIN, {Scope.ADMIN, Scope.WORKER})], ids=["acme", "ops"]
)
def test_a_key_opens_its_scopes_alone(key: str, opens: set[Scope]) -> None:
    access = control()
    for scope in Scope:
        if scope in opens:
            access.identify(key, scope)
        else:
            with pytest.raises(PermissionDenied, match=f"no scope {scope}"):
                access.identify(key, scope)


def test_every_service_of_ours_has_a_scope() -> None:
    files = (inference_pb2, admin_pb2, worker_pb2)
    ours = {service.full_name for file in files for service in file.DESCRIPTOR.services_by_name.values()}
    assert ours <= set(SCOPES)


def test_a_service_that_nobody_listed_is_open_to_no_key() -> None:
    for key in (KEY, ADMIN, None):
        with pytest.raises(PermissionDenied, match="no API key opens"):
            control().check("splitserve.v2.Secrets", key)


def test_a_key_over_its_request_rate_is_told_when_to_come_back() -> None:
    clock = Clock()
    access = control(clock, requests_per_minute=2)
    assert [waits_s(access), waits_s(access)] == [0, 0]
    assert waits_s(access) == pytest.approx(30)
    clock.now += 29
    assert waits_s(access) == pytest.approx(1)
    clock.now += 1
    assert waits_s(access) == 0


def test_a_refused_request_is_not_charged() -> None:
    clock = Clock()
    access = control(clock, requests_per_minute=1)
    waits_s(access)
    told = [waits_s(access) for _ in range(5)]
    assert told == [pytest.approx(60)] * 5


def test_tokens_are_charged_as_they_are_known_and_what_is_too_much_is_paid_back() -> None:
    clock = Clock()
    access = control(clock, tokens_per_minute=600)
    with access.admitted(acme(access)):
        access.charge(acme(access), 500)
        assert waits_s(access) == 0
        access.charge(acme(access), 700)
    assert waits_s(access) == pytest.approx((1200 + 1 - 600) / 10)
    clock.now += 60.1
    assert waits_s(access) == 0


@pytest.mark.parametrize("ending", [None, RuntimeError])
def test_concurrent_requests_are_given_back_however_they_end(ending: type[Exception] | None) -> None:
    access = control(concurrent_requests=1)
    for _ in range(3):
        try:
            with access.admitted(acme(access)):
                assert waits_s(access) > 0
                if ending is not None:
                    raise ending
        except RuntimeError:
            pass
    assert waits_s(access) == 0


def test_routers_share_the_limits() -> None:
    clock = Clock()
    access = control(clock, requests_per_minute=8, concurrent_requests=8)
    access.routers = 4
    tenant = acme(access)
    with (
        access.admitted(tenant),
        access.admitted(tenant),
        pytest.raises(Overloaded, match="run already") as refused,
        access.admitted(tenant),
    ):
        pass
    assert refused.value.limit is Limit.KEY_CONCURRENT_REQUESTS
    assert waits_s(access) == pytest.approx(30)


def test_a_removed_key_ends_its_right_at_once_and_what_runs_goes_on() -> None:
    access = control(concurrent_requests=1)
    with access.admitted(acme(access)):
        access.replace(KeyRing.of({"keys": [{"name": "ops", "key": ADMIN}]}, "keys.yaml"))
        with pytest.raises(Unauthenticated):
            acme(access)


def test_what_a_tenant_has_used_stays_when_its_key_or_limits_change() -> None:
    access = control(requests_per_minute=1)
    assert waits_s(access) == 0
    other = {"name": "acme", "key": "a-new-key-0123456789", "requests_per_minute": 2}
    access.replace(KeyRing.of({"keys": [other]}, "keys.yaml"))
    tenant = access.identify("a-new-key-0123456789", Scope.INFERENCE)
    with access.admitted(tenant):
        pass
    with pytest.raises(Overloaded) as refused, access.admitted(tenant):
        pass
    assert refused.value.limit is Limit.KEY_REQUESTS_PER_MINUTE


# The file ------------------------------------------------------------------------------------------------------------
def written(file: Path, *names: str) -> None:
    """As Kubernetes does it: a new file in the old one's place."""
    new = file.with_suffix(".new")
    new.write_text(yaml.safe_dump({"keys": [{"name": name, "key": f"key-of-{name}-0123456789"} for name in names]}))
    new.replace(file)


def test_a_changed_file_is_in_force_at_the_next_look(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    written(file, "acme")
    keys = KeyFile(str(file))
    access = AccessControl(keys.first)
    written(file, "umbrella")
    assert access.identify(KEY, Scope.INFERENCE).name == "acme"
    keys.look(access)
    assert access.identify("key-of-umbrella-0123456789", Scope.INFERENCE).name == "umbrella"
    with pytest.raises(Unauthenticated):
        access.identify(KEY, Scope.INFERENCE)


def test_a_symlink_that_is_swapped_is_a_change(tmp_path: Path) -> None:
    for name in ("acme", "bandm"):  # equally long, and as old
        written(tmp_path / name, name)
        os.utime(tmp_path / name, (1, 1))
    link = tmp_path / "keys.yaml"
    link.symlink_to(tmp_path / "acme")
    keys = KeyFile(str(link))
    access = AccessControl(keys.first)
    (tmp_path / "new").symlink_to(tmp_path / "bandm")
    (tmp_path / "new").replace(link)
    keys.look(access)
    access.identify("key-of-bandm-0123456789", Scope.INFERENCE)


@pytest.mark.parametrize(
    "broken", ["keys: [", "keys: []", f"keys: [{{name: a, key: {KEY}}}, {{name: a, key: x}}]", None]
)
def test_a_broken_new_file_is_logged_without_its_keys_and_the_old_ones_stay(
    tmp_path: Path, broken: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "keys.yaml"
    written(file, "acme")
    keys = KeyFile(str(file))
    access = AccessControl(keys.first)
    file.unlink() if broken is None else file.write_text(broken)
    keys.look(access)
    keys.look(access)
    acme(access)
    assert caplog.text.count("API keys not usable") == 1
    assert KEY not in caplog.text
    written(file, "umbrella")
    keys.look(access)
    access.identify("key-of-umbrella-0123456789", Scope.INFERENCE)


def test_a_file_with_wrong_yaml_is_named_with_its_line_and_quotes_no_key(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(f"keys:\n  - name: acme\n    key: {KEY}: {KEY}\n")
    with pytest.raises(ConfigError, match="not valid YAML; look at line 3") as raised:
        KeyFile(str(file))
    assert KEY not in str(raised.value)
    assert raised.value.path == str(file)
