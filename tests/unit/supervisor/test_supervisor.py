"""The relay as a real process on loopback: workers that die, stall or cannot boot, reloads, and its own sudden end."""

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import loopback
import pytest
from deadlines import PATIENCE, wait_until
from loopback import FIN, RST
from relays import BOOT, Relay, ThisHost, is_alive

from tproxy_relay.errors import ConfigError
from tproxy_relay.lab import LabError, RelayProcess
from tproxy_relay.settings import PortRange, Settings
from tproxy_relay.supervisor import supervisor
from tproxy_relay.supervisor.generation import FIXED

# --- workers that die


def test_a_dead_worker_is_replaced_at_once(tmp_path: Path) -> None:
    with Relay(tmp_path) as relay:
        client, server = relay.connect()
        (first,) = relay.process.workers
        os.kill(first, signal.SIGKILL)
        began = time.monotonic()
        waiting = loopback.dial(("127.0.0.1", relay.port))  # the listener is the supervisor's, too
        assert loopback.read_to_end(client) == loopback.read_to_end(server) == (b"", RST)
        served, _ = relay.server.accept()
        assert time.monotonic() - began < 2
        (ended,) = relay.said("worker ended")
        assert (ended["pid"], ended["how"], ended["live"]) == (first, "signal 9", 1)
        assert [line["generation"] for line in relay.said("worker started", 2)] == [1, 1]
        assert relay.process.worker != first
        for sock in (served, waiting):
            sock.close()
        relay.process.stop()
        (stopped,) = relay.said("stopped")
        assert (stopped["accepted"], stopped["live"]) == (2, 0)
        assert isinstance(stopped["closed"], dict) and sum(stopped["closed"].values()) == 2
        assert stopped["closed"]["aborted"] >= 1


def test_five_deaths_end_the_relay(tmp_path: Path) -> None:
    """Each is made good later than the one before; the connections of other workers are finished at the end."""
    with Relay(tmp_path, workers=2, drain_timeout=20) as relay:
        client, server = relay.connect()
        survivor = relay.holder(0)
        pauses = []
        for death in range(1, 6):
            (victim,) = (pid for pid in relay.process.workers if pid != survivor)
            os.kill(victim, signal.SIGKILL)
            relay.said("worker ended", death)
            began = time.monotonic()
            if death < 5:
                relay.said("worker started", 2 + death)
                pauses.append(time.monotonic() - began)
        assert all(pause > least - 0.05 for pause, least in zip(pauses, (0, 0.1, 0.2, 0.4))), pauses
        assert pauses[0] < 0.1 or pauses[0] < pauses[3], pauses
        (line,) = relay.said("workers die again and again, stopping")
        assert (line["levelname"], line["deaths"], line["seconds"]) == ("CRITICAL", 5, 60.0)
        relay.said("draining")
        wait_until(lambda: not accepts(relay.port), "nobody is let in any more")
        client.sendall(b"still")
        assert loopback.read_exactly(server, 5) == b"still"
        client.close()
        server.close()
        assert relay.process.wait() == 1
        assert relay.process.lines()[-1]["message"] == "stopped"
        assert len(relay.said("worker started")) == 6


def accepts(port: int) -> bool:
    """The connection ends at once on both sides: half closed, it would outlive a drain."""
    try:
        loopback.reset(loopback.dial(("127.0.0.1", port)))
    except ConnectionRefusedError:
        return False
    return True


# --- workers that cannot boot

BROKEN = """
import os, sys
if "tproxy_relay.worker" in sys.orig_argv and os.path.exists(os.path.join(os.path.dirname(__file__), "broken")):
    print("no use", file=sys.stderr, flush=True)
    os._exit(3)
"""


def breakable(folder: Path) -> tuple[str, ...]:
    """A command that becomes a relay whose workers cannot start once the file `broken` is in that folder."""
    (folder / "sitecustomize.py").write_text(BROKEN, encoding="utf-8")  # site: loaded by each Python that finds it
    path = os.pathsep.join((str(folder), str(Path(supervisor.__file__).parents[2])))
    return ("env", f"PYTHONPATH={path}")


def test_a_worker_that_cannot_boot_is_the_end_of_the_start(tmp_path: Path) -> None:
    (tmp_path / "broken").touch()
    relay = Relay(tmp_path, wrapper=breakable(tmp_path), workers=2)
    with pytest.raises(LabError, match="exited with 71 before it was ready"), relay:
        pass
    assert relay.process.log.splitlines()[-1] == "tproxy-relay: a worker could not start (exit 3): no use"
    assert "Traceback" not in relay.process.log
    assert not accepts(relay.port)
    assert not any(is_alive(line["pid"]) for line in relay.process.lines() if line["message"] == "worker started")


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


def test_a_replacement_that_cannot_boot_is_one_more_death(tmp_path: Path) -> None:
    with Relay(tmp_path, wrapper=breakable(tmp_path)) as relay:
        (tmp_path / "broken").touch()
        os.kill(relay.process.worker, signal.SIGKILL)
        relay.said("workers die again and again, stopping")
        assert [line["how"] for line in relay.said("worker ended", 5)] == ["signal 9", *["exit 3"] * 4]
        assert relay.process.wait() == 1


# --- reload


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


def test_stopped_during_a_reload(tmp_path: Path) -> None:
    with Relay(tmp_path, workers=2) as relay:
        client, server = relay.connect()
        relay.reload()
        relay.said("worker started", 3)
        relay.process.terminate()
        client.close()
        server.close()
        assert relay.process.wait() == 0
        assert not any(is_alive(line["pid"]) for line in relay.said("worker started"))


# --- workers that stand still, and everything that stands still


@pytest.mark.slow
def test_a_stalled_worker_is_replaced(tmp_path: Path) -> None:
    with Relay(tmp_path, stall_timeout=1) as relay:
        client, server = relay.connect()
        worker = relay.process.worker
        os.kill(worker, signal.SIGSTOP)
        waiting = loopback.dial(("127.0.0.1", relay.port))
        (line,) = relay.said("worker stalled")
        assert line["pid"] == worker
        assert 1 <= float(str(line["seconds"])) < 4
        assert relay.said("worker ended")[0]["how"] == "signal 9"
        assert loopback.read_to_end(client) == loopback.read_to_end(server) == (b"", RST)
        served, _ = relay.server.accept()
        for sock in (waiting, served):
            sock.close()


@pytest.mark.slow
@pytest.mark.parametrize(("seconds", "times"), [(1.6, 2), (2.6, 1)])
def test_when_everything_stood_still_nobody_is_killed(tmp_path: Path, seconds: float, times: int) -> None:
    """Longer than the stall timeout: a suspended machine, a paused container (cgroup freezer), Ctrl-Z."""
    with Relay(tmp_path, stall_timeout=1, workers=2) as relay:
        client, server = relay.connect()
        workers = relay.process.workers
        pids = [relay.process.pid, *workers]
        for _ in range(times):
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            time.sleep(seconds)  # the length of the standstill
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
            time.sleep(2.2)  # the supervisor looks twice
            assert relay.process.workers == workers
        assert "worker stalled" not in relay.process.log
        client.sendall(b"still")
        assert loopback.read_exactly(server, 5) == b"still"


# --- its own end


def test_without_the_supervisor_there_are_no_workers(tmp_path: Path) -> None:
    with Relay(tmp_path, workers=3) as relay:
        peers = [relay.connect() for _ in range(3)]
        workers = relay.process.workers
        os.kill(relay.process.pid, signal.SIGKILL)
        wait_until(lambda: not any(map(is_alive, workers)), "they die with it", 1)
        for client, server in peers:
            assert loopback.read_to_end(client) == loopback.read_to_end(server) == (b"", RST)
        wait_until(lambda: not accepts(relay.port), "nobody listens")
        again = RelayProcess(ThisHost(), relay.process.options)  # type: ignore[arg-type]
        with again:
            relay.connect()  # it binds at once, on the same port


def test_a_stopped_worker_dies_with_the_supervisor_too(tmp_path: Path) -> None:
    with Relay(tmp_path, workers=2) as relay:
        workers = relay.process.workers
        os.kill(workers[0], signal.SIGSTOP)
        os.kill(relay.process.pid, signal.SIGKILL)
        wait_until(lambda: not any(map(is_alive, workers)), "they die with it", 1)


@pytest.mark.slow
def test_a_worker_that_does_not_stop_is_killed(tmp_path: Path) -> None:
    with Relay(tmp_path, workers=2) as relay:
        workers = relay.process.workers
        os.kill(workers[0], signal.SIGSTOP)
        began = time.monotonic()
        relay.process.signal(signal.SIGINT)
        assert relay.process.wait() == 0
        assert time.monotonic() - began < supervisor.END_TIMEOUT + 2
        hows = {line["pid"]: line["how"] for line in relay.said("worker ended", 2)}
        assert hows == {workers[0]: "signal 9", workers[1]: "exit 0"}


def test_stopped_before_it_was_ready(tmp_path: Path) -> None:
    relay, wrapper = Relay(tmp_path), breakable(tmp_path)
    slow = BROKEN.replace("os._exit(3)", "import time; time.sleep(60)")
    (tmp_path / "sitecustomize.py").write_text(slow, encoding="utf-8")
    (tmp_path / "broken").touch()
    command = [*wrapper, sys.executable, "-m", "tproxy_relay", "run", "--config", str(relay.file)]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert child.stderr is not None
        started = next(line for line in child.stderr if "worker started" in line)
        child.send_signal(signal.SIGTERM)
        assert child.wait(PATIENCE) == 0
        assert "stopped before it was ready" in child.stderr.read()
        assert started
    finally:
        child.kill()
        child.wait()
        assert child.stderr is not None
        child.stderr.close()
        relay.server.close()


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
        supervisor.refuse_unchangeable(before, after)
    assert caught.value.exit_code == 78
    supervisor.refuse_unchangeable(after, after)
    assert supervisor.changed(before, after) == [name.replace("_", "-")]


def test_all_of_them_are_named() -> None:
    with pytest.raises(ConfigError, match="^mode, interface, backend, mark-mask, route-table, route-priority: live"):
        supervisor.refuse_unchangeable(Settings(), replace(Settings(), **OTHER))


def test_everything_else_can_change() -> None:
    before = Settings()
    after = replace(before, ports=(1,), bind=("::1",), workers=3, user="nobody", preserve_source="full")
    after = replace(after, intercept_inbound=(PortRange(1, 2),), on_failure="closed", log_level="info")
    supervisor.refuse_unchangeable(before, after)
    names = ["ports", "bind", "intercept-inbound", "on-failure", "user", "workers", "preserve-source", "log-level"]
    assert supervisor.changed(before, after) == names
    assert supervisor.changed(before, before) == []


@pytest.mark.parametrize("name", [field.name for field in fields(Settings)])
def test_no_change_goes_unseen(name: str) -> None:
    another: dict[str, Any] = {name: "another"}
    assert supervisor.changed(Settings(), replace(Settings(), **another)) == [name.replace("_", "-")]
