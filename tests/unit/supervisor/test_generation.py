"""From settings to what the workers will need: what cannot work is found before anything is opened or changed."""

import os
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import NoReturn

import children
import loopback
import pytest

from tproxy_relay.errors import CapabilityMissingError, ConfigError, SystemRefusedError
from tproxy_relay.net import listeners
from tproxy_relay.net.endpoint import Endpoint
from tproxy_relay.net.listeners import Listener
from tproxy_relay.relay.policy import Policy
from tproxy_relay.settings import HostPort, PortRange, Settings
from tproxy_relay.supervisor import generation
from tproxy_relay.supervisor.generation import prepare
from tproxy_relay.system import cpu

pytestmark = pytest.mark.usefixtures("nothing_left_behind")


def test_a_target_that_does_not_resolve() -> None:
    with pytest.raises(ConfigError, match="target: cannot resolve 'no.such.host.invalid'") as caught:
        generation.resolve_target(Settings(target=HostPort("no.such.host.invalid", 80)))
    assert caught.value.exit_code == 78


def test_name_servers_that_do_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "LOOKUP_TIMEOUT", 0.1)
    answered = threading.Event()

    def look_up(*_args: object, **_more: object) -> None:
        answered.wait()
        raise OSError

    monkeypatch.setattr("socket.getaddrinfo", look_up)
    try:
        with pytest.raises(ConfigError, match="target: cannot resolve 'far.example': no answer .* within 0.1 s"):
            generation.resolve_target(Settings(target=HostPort("far.example", 80)))
    finally:
        answered.set()


def test_a_target_is_looked_up_once() -> None:
    assert generation.resolve_target(Settings()) is None
    assert generation.resolve_target(Settings(target=HostPort("127.0.0.1", 80))) == Endpoint("127.0.0.1", 80)
    assert generation.resolve_target(Settings(target=HostPort("::1", 80))) == Endpoint("::1", 80)


RIGHTS = """
import sys
from tproxy_relay.errors import RelayError
from tproxy_relay.settings import Settings
from tproxy_relay.supervisor import generation
print(*(hex(generation.usable_mark(Settings(mark_mask=mask))) for mask in (0x07000000, 0xE0000000, 0x7)))
for word in ("no", "address", "full"):
    for user in (None, "nobody"):
        try:
            print(*generation.worker_capabilities(Settings(preserve_source=word, user=user)) or ["none"])
        except RelayError as error:
            print(error.exit_code)
"""


def test_with_the_capability(require_or_skip: Callable[[str], NoReturn]) -> None:
    """Workers keep it to mark their sockets, unless they are known by their account, and to borrow addresses."""
    ran = children.run_python(RIGHTS, prefix=children.need(children.NETWORK, require_or_skip))
    kept = "net_raw\nnone\nnet_raw\nnet_raw\nnet_raw\nnet_raw\n"
    assert (ran.stdout, ran.stderr) == (f"0x4000000 0x80000000 0x4\n{kept}", "")


def test_without_the_capability(require_or_skip: Callable[[str], NoReturn]) -> None:
    prefix = children.need(children.no_capabilities() or ("env",), require_or_skip)
    ran = children.run_python(RIGHTS, prefix=prefix)
    assert (ran.stdout, ran.stderr) == ("0x0 0x0 0x0\nnone\nnone\n77\n77\n77\n77\n", "")
    assert CapabilityMissingError.exit_code == 77


HTTP = (PortRange(80, 80),)
OURS = frozenset({15002, 15006})


def test_without_ports_to_intercept_there_is_no_ruleset() -> None:
    assert generation.wanted_plan(Settings(), mark=0, own_ports=frozenset()) is None


@pytest.mark.parametrize(
    ("settings", "own_ports", "error", "why"),
    [
        (
            Settings(intercept_inbound=HTTP),
            {15002},
            ConfigError,
            "none of the inherited sockets listens on port 15006, where interception leads",
        ),
        (
            Settings(intercept_outbound=HTTP, user="no-such-account"),
            OURS,
            ConfigError,
            "there is no account 'no-such-account'",
        ),
        (
            Settings(intercept_outbound=HTTP),
            OURS,
            CapabilityMissingError,
            "outbound interception would catch the relay itself: CAP_NET_RAW is missing; .* name that one with --user",
        ),
    ],
)
def test_interception_that_cannot_work_is_refused_before_anything_is_done(
    settings: Settings, own_ports: set[int], error: type[Exception], why: str
) -> None:
    with pytest.raises(error, match=why):
        generation.wanted_plan(settings, mark=0, own_ports=frozenset(own_ports))


def test_an_account_of_their_own_exempts_workers_that_cannot_mark_their_sockets() -> None:
    wanted = generation.wanted_plan(Settings(intercept_outbound=HTTP, user="12345"), mark=0, own_ports=OURS)
    assert wanted is not None and wanted.exempt_uid == 12345
    assert generation.wanted_plan(Settings(intercept_outbound=HTTP), mark=4, own_ports=OURS) is not None


# --- all of it


def plain(**more: object) -> Settings:
    """Settings that need no capability, on a port of the kernel's choice."""
    return Settings(**{"mode": "redirect", "bind": ("127.0.0.1",), "ports": (0,), **more})  # type: ignore[arg-type]


def test_what_the_workers_will_need() -> None:
    settings = plain(target=HostPort("127.0.0.1", 80), workers=3, max_connections=50, keepalive=7, user_timeout=2.0)
    prepared = prepare(settings, [], number=7, inherited=False)
    made = list(prepared.listeners)
    try:
        (listener,) = made
        assert prepared.number == 7
        assert prepared.spec.settings is prepared.settings is settings
        own_ports = frozenset({listener.endpoint.port})
        target = Endpoint("127.0.0.1", 80)
        assert prepared.spec.policy == Policy.of_settings(settings, own_ports, target)
        assert (prepared.tuning.keepalive, prepared.tuning.user_timeout) == (7, 2.0)
        assert replace(prepared.worker_tuning, mark=prepared.tuning.mark) == prepared.tuning
        assert prepared.spec.tuning == prepared.worker_tuning
        assert prepared.worker_tuning.mark == (prepared.tuning.mark if prepared.pool.can_mark else 0)
        assert prepared.spec.limits.most == prepared.limits.most == 50
        assert (prepared.pool.size, prepared.plan) == (3, None)
        assert "--no-new-privs" in prepared.pool.command and prepared.pool.command[-1] == "--"
    finally:
        listeners.close_all(made)


def test_as_many_workers_as_processors() -> None:
    prepared = prepare(plain(), [], number=1, inherited=False)
    assert prepared.pool.size == cpu.worth()
    assert prepared.pool.cpus == cpu.cpus("auto", prepared.pool.size)
    listeners.close_all(list(prepared.listeners))


def test_inherited_listeners_are_used_whatever_the_settings_say() -> None:
    with loopback.listen() as raw:
        inherited = Listener(raw)
        prepared = prepare(plain(bind=("127.0.0.1", "127.0.0.2")), [inherited], number=1, inherited=True)
        assert prepared.listeners == (inherited,)


def test_listeners_that_are_there_are_kept_and_others_opened() -> None:
    (kept,) = prepare(plain(), [], number=1, inherited=False).listeners
    prepared = prepare(plain(bind=("127.0.0.2", "127.0.0.1")), [kept], number=1, inherited=False)
    assert prepared.listeners[1] is kept
    assert prepared.listeners[0].endpoint.host == "127.0.0.2"
    listeners.close_all(list(prepared.listeners))


@pytest.mark.parametrize(
    ("more", "error"),
    [
        ({"bind": ("127.0.0.1", "127.0.0.2", "192.0.2.1")}, SystemRefusedError),
        ({"bind": ("127.0.0.1", "127.0.0.2"), "intercept_inbound": HTTP}, ConfigError),
        ({"user": "no-such-account"}, ConfigError),
        ({"target": HostPort("no.such.host.invalid", 80)}, ConfigError),
    ],
)
def test_what_fails_has_opened_nothing_and_closed_nothing(more: dict[str, object], error: type[Exception]) -> None:
    (kept,) = prepare(plain(), [], number=1, inherited=False).listeners
    open_before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(error):
        prepare(plain(**more), [kept], number=1, inherited=False)
    assert len(os.listdir("/proc/self/fd")) == open_before
    loopback.dial(kept.endpoint[:2]).close()
    kept.close()


ANOTHER_ACCOUNT = """
from tproxy_relay.errors import RelayError
from tproxy_relay.supervisor.generation import prepare
from tproxy_relay.settings import Settings
try:
    prepare(Settings(mode="redirect", bind=("127.0.0.1",), ports=(0,), user="12345"), [], number=1, inherited=False)
except RelayError as error:
    print(error.exit_code, error)
"""


def test_an_account_that_it_may_not_become(require_or_skip: Callable[[str], NoReturn]) -> None:
    prefix = children.need(children.no_capabilities() or ("env",), require_or_skip)
    ran = children.run_python(ANOTHER_ACCOUNT, prefix=prefix)
    assert ran.stdout.startswith(
        "77 user: workers of account number 12345 take CAP_SETUID, CAP_SETGID and CAP_KILL"
    ), ran.stderr


OF_ROOT = """
import logging, sys
logging.basicConfig(format="%(message)s", stream=sys.stdout)
from tproxy_relay.net import listeners
from tproxy_relay.supervisor.generation import prepare
from tproxy_relay.settings import Settings
user = None if sys.argv[1] == "none" else sys.argv[1]
prepared = prepare(Settings(mode="redirect", bind=("127.0.0.1",), ports=(0,), user=user), [], number=1, inherited=False)
listeners.close_all(list(prepared.listeners))
"""


@pytest.mark.parametrize("user, warned", [("none", True), ("0", True), ("54321", False)])
def test_workers_of_a_root_that_cannot_take_its_rights_from_them(
    user: str, warned: bool, require_or_skip: Callable[[str], NoReturn]
) -> None:
    if os.geteuid():
        require_or_skip("it takes root")
    ran = children.run_python(OF_ROOT, user, prefix=("setpriv", "--bounding-set=-setpcap"))
    assert ran.returncode == 0, ran.stderr
    assert ("it takes --user" in ran.stdout) == warned
    assert "it takes --user" not in children.run_python(OF_ROOT, user).stdout


def test_what_no_reload_can_change() -> None:
    assert set(generation.fixed(Settings())) == {
        "mode",
        "interface",
        "backend",
        "mark-mask",
        "route-table",
        "route-priority",
    }
    assert generation.fixed(Settings(route_table=7)) != generation.fixed(Settings())
