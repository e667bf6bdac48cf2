"""Reloads of a relay as a real process on loopback: what they change, what refuses them, and what they cannot."""

import socket
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import loopback
import pytest
from breakable import accepts, breakable
from deadlines import PATIENCE, wait_until
from loopback import FIN
from relays import BOOT, Relay, is_alive

from tproxy_relay.errors import ConfigError
from tproxy_relay.settings import PortRange, Settings
from tproxy_relay.supervisor import rollout
from tproxy_relay.supervisor.generation import FIXED


def test_a_reload(tmp_path: Path) -> None:
    with Relay(tmp_path) as relay:
        client, server = relay.connect()
        old = relay.process.worker
        with loopback.listen() as other:
            relay.configure(target=f"127.0.0.1:{other.getsockname()[1]}", workers=2, log_level="info")
            relay.reload()
            (line,) = relay.said("reloaded")
            assert line | {"generation": 2, "workers": 2, "changed": "workers, target, log-level"} == line
            wait_until(lambda: served_by(relay, other), "new clients get the new settings")
        client.sendall(b"still")
        assert loopback.read_exactly(server, 5) == b"still"
        assert len(relay.process.workers) == 3
        server.close()
        assert loopback.read_to_end(client) == (b"", FIN)
        client.close()
        wait_until(lambda: not is_alive(old), "the old one ends with its last connection")


def served_by(relay: Relay, server: socket.socket) -> bool:
    """Whether a new client gets there; it may have met the old generation."""
    with loopback.dial(("127.0.0.1", relay.port)):
        for one in (server, relay.server):
            one.settimeout(0.2)
            try:
                one.accept()[0].close()
                return one is server
            except TimeoutError:
                continue
            finally:
                one.settimeout(PATIENCE)
    return False


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("idle-timeout = never", "idle-timeout"),
        ("no-such-option = 1", "no-such-option"),
        ("mode = tproxy", "mode: live connections depend on it, so a reload cannot change it; restart"),
        ("target = no.such.host.invalid:80", "target: cannot resolve 'no.such.host.invalid'"),
        ("user = no-such-account", "user: there is no account 'no-such-account' on this host"),
        ("bind = 192.0.2.1", "cannot listen on 192.0.2.1:"),
    ],
)
def test_a_reload_that_is_refused_changes_nothing(tmp_path: Path, line: str, why: str) -> None:
    with Relay(tmp_path) as relay:
        worker = relay.process.worker
        good = relay.file.read_text(encoding="utf-8")
        name = line.partition(" = ")[0]
        others = [one for one in good.splitlines() if not one.startswith(f"{name} ")]
        relay.file.write_text("\n".join([*others, line, "max-per-source = 1", ""]), encoding="utf-8")
        relay.reload()
        (refused,) = relay.said("reload refused")
        assert why in str(refused["why"])
        assert refused["levelname"] == "ERROR"
        assert relay.process.worker == worker
        for _ in range(2):
            relay.connect()
        relay.file.write_text(good, encoding="utf-8")
        relay.reload()
        assert relay.said("reloaded")[0]["changed"] == ""


def test_at_a_reload_it_only_refuses_that(tmp_path: Path) -> None:
    with Relay(tmp_path, wrapper=breakable(tmp_path), workers=2) as relay:
        client, server = relay.connect()
        before = relay.process.workers
        (tmp_path / "broken").touch()
        with loopback.listen() as free:
            more = free.getsockname()[1]
        relay.configure(ports=f"{relay.port},{more}", idle_timeout=60)
        relay.reload()
        (line,) = relay.said("reload refused")
        assert line["why"] == "a worker could not start (exit 3): no use"
        assert line["levelname"] == "ERROR"
        wait_until(lambda: relay.process.workers == before, "the others are the same")
        wait_until(lambda: not accepts(more), "what it has opened is closed again")
        client.sendall(b"still")
        assert loopback.read_exactly(server, 5) == b"still"
        (tmp_path / "broken").unlink()
        relay.reload()
        assert relay.said("reloaded")[0]["changed"] == "ports, idle-timeout"
        wait_until(lambda: accepts(more), "it listens there now")
        relay.connect()


@pytest.mark.slow
def test_many_reloads_become_a_few_and_the_last_one_counts(tmp_path: Path) -> None:
    with Relay(tmp_path) as relay:
        for seconds in range(1, 201):
            relay.configure(idle_timeout=seconds)
            relay.reload()
        wait_until(lambda: relay.said("reloaded") and is_quiet(relay), "all are done", BOOT)
        reloaded = relay.said("reloaded")
        assert len(reloaded) < 60
        assert not [line for line in relay.process.lines() if line.get("message") == "reload refused"]
        relay.configure(idle_timeout=200)
        relay.reload()
        assert relay.said("reloaded", len(reloaded) + 1)[-1]["changed"] == "", "200 is in force"
        relay.connect()


def is_quiet(relay: Relay) -> bool:
    """The newest generation is the one that is in force, and it is alone."""
    lines = [line for line in relay.process.lines() if line.get("message") in ("worker started", "reloaded")]
    return lines[-1]["message"] == "reloaded" and len(relay.process.workers) == 1


# --- what changes and what cannot


OTHER: dict[str, Any] = {
    "mode": "redirect",
    "interface": "eth9",
    "backend": "nft",
    "mark_mask": 0x70,
    "route_table": 9,
    "route_priority": 9,
}


def test_what_a_reload_cannot_change_is_complete() -> None:
    assert set(OTHER) == set(FIXED)


@pytest.mark.parametrize("name", FIXED)
def test_what_live_connections_depend_on_cannot_change(name: str) -> None:
    before = Settings()
    after = replace(before, **{name: OTHER[name]})
    why = f"^{name.replace('_', '-')}: live connections depend on it, so a reload cannot change it; restart$"
    with pytest.raises(ConfigError, match=why) as caught:
        rollout.refuse_unchangeable(before, after)
    assert caught.value.exit_code == 78
    rollout.refuse_unchangeable(after, after)
    assert rollout.changed(before, after) == [name.replace("_", "-")]


def test_all_of_them_are_named() -> None:
    with pytest.raises(ConfigError, match="^mode, interface, backend, mark-mask, route-table, route-priority: live"):
        rollout.refuse_unchangeable(Settings(), replace(Settings(), **OTHER))


def test_everything_else_can_change() -> None:
    before = Settings()
    after = replace(before, ports=(1,), bind=("::1",), workers=3, user="nobody", preserve_source="full")
    after = replace(after, intercept_inbound=(PortRange(1, 2),), on_failure="closed", log_level="info")
    rollout.refuse_unchangeable(before, after)
    names = ["ports", "bind", "intercept-inbound", "on-failure", "user", "workers", "preserve-source", "log-level"]
    assert rollout.changed(before, after) == names
    assert rollout.changed(before, before) == []


@pytest.mark.parametrize("name", [field.name for field in fields(Settings)])
def test_no_change_goes_unseen(name: str) -> None:
    another: dict[str, Any] = {name: "another"}
    assert rollout.changed(Settings(), replace(Settings(), **another)) == [name.replace("_", "-")]
