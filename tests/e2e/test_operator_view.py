"""What a running relay says of itself: real connections, intercepted, and an operator on its host."""

import contextlib
import json
import os
import signal
import socket
import time
from datetime import datetime
from pathlib import Path

import pytest
from admin_views import ADMIN, PORT, client_name, connect, fetch, program, sessions, status
from deadlines import wait_until
from exchanges import read_exactly
from prometheus_client.parser import text_string_to_metric_families
from relay_fixtures import intercepting_relay

from tproxy_relay.lab import Lab, RelayProcess

relay = intercepting_relay((PORT,), "--admin", f"127.0.0.1:{ADMIN}", "--idle-timeout", "300", "--workers", "2")


def test_connections_come_move_and_go(lab: Lab, relay: RelayProcess, server: socket.socket) -> None:
    """Each fact of a session and of the numbers, while it changes."""
    assert status(lab)["connections"]["accepted"] == 0 == len(sessions(lab))
    with contextlib.ExitStack() as stack:
        client, served = (stack.enter_context(end) for end in connect(lab, server))
        client.sendall(b"x" * 1000)
        served.sendall(b"y" * 5000)
        wait_until(lambda: sessions(lab)[0]["bytes_down"] == 5000, "it is relayed")
        (one,) = sessions(lab)
        assert (one["client"], one["orig_dst"]) == (client_name((client, served)), f"{lab.server.ipv4}:{PORT}")
        assert (one["state"], one["bytes_up"], one["ending"], one["direction"]) == ("open", 1000, "idle", "inbound")
        assert 290 < one["ending_in_seconds"] <= 300 and one["upstream_local"].startswith(lab.relay_address())
        assert one["client_rtt_ms"] > 0 and one["upstream_retransmits"] == 0
        wait_until(lambda: status(lab)["bytes"] == {"up": 1000, "down": 5000}, "it is counted while it lives")
        assert (len(read_exactly(served, 1000)), len(read_exactly(client, 5000))) == (1000, 5000)
        client.shutdown(socket.SHUT_WR)
        wait_until(lambda: sessions(lab)[0]["state"] == "half-closed", "its state is seen")
    wait_until(lambda: not sessions(lab), "it goes")
    found = status(lab)
    assert found["connections"] | {"accepted": 1, "active": 0, "closed": {"completed": 1}} == found["connections"]
    assert found["connect_seconds"]["count"] == found["duration_seconds"]["count"] == 1
    assert found["health"] == "ok" and found["state"] == "running" and len(found["workers"]) == 2
    parts = found["workers"]
    assert sum(one["accepted"] for one in parts) == 1 == sum(one["closed"].get("completed", 0) for one in parts)
    assert sum(one["bytes"]["down"] for one in parts) == 5000
    assert found["pid"] == relay.pid and {one["pid"] for one in found["workers"]} == set(relay.workers)


@pytest.mark.slow
def test_the_rate_of_a_stream(lab: Lab, relay: RelayProcess, server: socket.socket) -> None:
    client, served = connect(lab, server)
    with client, served:
        client.settimeout(10)
        deadline = time.monotonic() + 20
        while not (found := sessions(lab, "min-rate=100000")):
            assert time.monotonic() < deadline
            served.sendall(b"y" * 400_000)
            got = 0
            while got < 400_000:
                got += len(client.recv(1 << 20))
        assert found[0]["rate_down"] > 100_000 > found[0]["rate_up"] == 0
        wait_until(lambda: status(lab)["rates"]["bytes_down"] > 0, "the whole relay's follows")


@pytest.mark.slow
def test_filters_and_order(lab: Lab, relay: RelayProcess, server: socket.socket) -> None:
    lab.client.run(["ip", "address", "replace", "10.81.1.7/24", "dev", "cr"])
    with contextlib.ExitStack() as stack:
        ends = [connect(lab, server) for _ in range(5)]
        for number, both in enumerate(ends):
            for end in both:
                stack.enter_context(end)
            both[1].sendall(b"y" * 1000 * number)
        names = [client_name(both) for both in ends]

        def shown(show: str) -> list[str]:
            return [one["client"] for one in sessions(lab, show)]

        wait_until(lambda: shown("sort=bytes")[:3] == names[:1:-1], "all is relayed")
        assert shown("") == names, "oldest first"
        assert shown("sort=bytes,limit=2") == names[:2:-1]
        assert shown("sort=bytes,reverse=yes,limit=1") == names[:1]
        assert sorted(shown(f"client={lab.client.ipv4},destination={lab.server.ipv4},port={PORT}")) == sorted(names)
        for nothing in ("client=192.0.2.0/24", "destination=192.0.2.1", "port=1", "state=half-closed", "min-age=1000"):
            assert shown(nothing) == []
        assert len(shown("ending=idle")) == 5 and not shown("ending=drained") and not shown("min-idle=1000")
        (one,) = sessions(lab, "limit=1")
        assert [one["id"]] == [found["id"] for found in sessions(lab, f"id={one['id']}")]


@pytest.mark.slow
def test_one_is_aborted(lab: Lab, relay: RelayProcess, server: socket.socket) -> None:
    (client, served), (other, other_served) = connect(lab, server), connect(lab, server)
    with client, served, other, other_served:
        (number,) = [one["id"] for one in sessions(lab) if one["client"] == client_name((client, served))]
        assert fetch(lab, f"/sessions/{number}", "-X", "DELETE")[0] == 403, "not over TCP"
        assert "both its ends see a reset" in program(lab, "sessions", "--abort", number)
        for end in (client, served):
            with pytest.raises(ConnectionResetError):
                end.recv(1)
        assert relay.record_of(client)["outcome"] == "aborted"
        other.sendall(b"still")
        assert other_served.recv(5) == b"still"
        assert f"there is no connection {number} any more" in program(lab, "sessions", "--abort", number, code=71)
        assert [line["account"] for line in relay.lines() if line["message"] == "aborted by an operator"] == [
            os.getuid()
        ]


def test_why_something_was_refused(lab: Lab, relay: RelayProcess) -> None:
    with contextlib.suppress(ConnectionResetError), lab.client.connect(lab.server.ipv4, PORT) as client:
        client.recv(1)
    relay.wait_for_record(lambda line: line["outcome"] == "connect-refused")
    (refused,) = status(lab)["last_refused"]
    assert (refused["outcome"], refused["error"]) == ("connect-refused", "Connection refused")
    assert f"{refused['client']} to {lab.server.ipv4}:{PORT}: connect-refused: " in program(lab, "status")


@pytest.mark.slow
def test_numbers_outlive_workers_and_reloads(lab: Lab, relay: RelayProcess, server: socket.socket) -> None:
    def check() -> None:
        counts = status(lab, code=degraded)["connections"]
        assert counts["accepted"] == counts["active"] + sum(counts["closed"].values())

    degraded = 0
    for _ in range(3):
        client, served = connect(lab, server)
        with client, served:
            client.sendall(b"x" * 10)
            assert len(read_exactly(served, 10)) == 10
            check()
    relay.signal(signal.SIGHUP)
    relay.wait_for_line(lambda line: line["message"] == "reloaded")
    check()
    client, served = connect(lab, server)
    with client, served:
        pid = int(sessions(lab)[0]["id"].partition("-")[0], 16)
        os.kill(pid, signal.SIGKILL)
        relay.wait_for_line(lambda line: line["message"] == "worker ended" and line["pid"] == pid)
    degraded = 1
    found = status(lab, code=1)
    assert (found["reloads"], found["worker_deaths"], found["bytes"]["up"]) == (1, 1, 30)
    assert found["connections"]["closed"] | {"aborted": 1} == found["connections"]["closed"]
    assert any("have died" in one for one in found["complaints"])
    assert any(one["message"] == "worker ended" for one in found["last_problems"])
    check()


def test_its_own_ruleset(lab: Lab) -> None:
    with lab.relay_process("--intercept-inbound", str(PORT)) as relay:
        found = status(lab)
        assert (found["ruleset"]["state"], found["health"]) == ("active", "ok")
        lab.relay.run(["ip", "rule", "del", "priority", "7007"])
        relay.wait_for_line(lambda line: line["message"] == "ruleset restored")
        assert any(one["message"] == "ruleset restored" for one in status(lab)["last_problems"])
        assert "ruleset       active (nft)" in program(lab, "status")


def test_draining_is_seen(lab: Lab, relay: RelayProcess, server: socket.socket) -> None:
    assert fetch(lab, "/readyz") == (200, "ready")
    client, served = connect(lab, server)
    with client, served:
        relay.signal(signal.SIGTERM)
        relay.wait_for_line(lambda line: line["message"] == "draining")
        assert fetch(lab, "/healthz") == (200, "ok")
        assert fetch(lab, "/readyz") == (503, "the relay is draining")
        found = status(lab, code=1)
        assert (found["state"], found["complaints"]) == ("draining", ["the relay is draining"])
        assert len(sessions(lab)) == 1
    relay.wait()


def test_a_reload_moves_the_admin_interface(lab: Lab, tmp_path: Path) -> None:
    config, path = tmp_path / "relay.conf", tmp_path / "admin.sock"
    common = "workers = 1\nlog-format = json\n"
    config.write_text(f"{common}admin = 127.0.0.1:{ADMIN}\n")
    with lab.relay_process("--config", str(config)) as relay:
        assert fetch(lab, "/healthz")[0] == 200
        config.write_text(f"{common}admin = {path}\n")
        relay.signal(signal.SIGHUP)
        relay.wait_for_line(lambda line: line["message"] == "reloaded")
        assert fetch(lab, "/healthz")[0] == 0
        assert fetch(lab, "/healthz", "--unix-socket", str(path)) == (200, "ok")
        relay.stop()
    assert not path.exists()


@pytest.mark.slow
def test_prometheus_reads_the_same(lab: Lab, relay: RelayProcess, server: socket.socket) -> None:
    client, served = connect(lab, server)
    with client, served:
        served.sendall(b"y" * 5000)
        wait_until(lambda: status(lab)["bytes"]["down"] == 5000, "it is counted")
        code, text = fetch(lab, "/metrics")
    assert code == 200
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text + "\n")
        for sample in family.samples
    }
    assert found["tproxy_relay_connections_accepted_total",] == found["tproxy_relay_connections_active",] == 1
    assert found["tproxy_relay_relayed_bytes_total", "down"] == 5000
    assert found["tproxy_relay_connect_duration_seconds_count",] == found["tproxy_relay_healthy",] == 1


@pytest.mark.parametrize("kind", ["port", "path"])
@pytest.mark.slow
def test_the_next_relay_takes_it_over(lab: Lab, tmp_path: Path, kind: str) -> None:
    where = str(tmp_path / "admin.sock") if kind == "path" else f"127.0.0.1:{ADMIN}"
    options = ["--unix-socket", where] if kind == "path" else []
    with lab.relay_process("--admin", where) as before:
        with lab.relay_process("--admin", where, "--take-over") as after:
            before.wait()
            wait_until(lambda: fetch(lab, "/status", *options)[0] == 200, "it answers there")
            assert json.loads(fetch(lab, "/status", *options)[1])["pid"] == after.pid == status(lab)["pid"]
            after.stop()


@pytest.mark.slow
def test_the_history_is_one_sample_a_second(lab: Lab, relay: RelayProcess, server: socket.socket) -> None:
    client, served = connect(lab, server)
    client.close()
    served.close()
    wait_until(lambda: json.loads(fetch(lab, "/history")[1])["accepted"][-1] == 1, "it is in a sample")
    (ready,) = (line for line in relay.lines() if line["message"] == "listening")  # with a sample out of turn
    since = datetime.fromisoformat(ready["timestamp"]).timestamp()
    wait_until(lambda: sum(at > since for at in json.loads(fetch(lab, "/history")[1])["at"]) > 2, "some have come")
    history = json.loads(fetch(lab, "/history")[1])
    assert {len(column) for column in history.values()} == {len(history["at"])}
    later = [at for at in history["at"] if at > since]
    steps = [after - before for before, after in zip(later, later[1:])]
    assert all(0.5 < step < 5 for step in steps), steps


def test_nobody_is_there(lab: Lab) -> None:
    assert "no relay with ports 15002, 15006 runs in this network namespace" in program(lab, "status", code=3)


@pytest.mark.slow
def test_two_relays_are_told_apart_by_their_ports(lab: Lab, relay: RelayProcess) -> None:
    with lab.relay_process("--ports", "7001") as other:
        assert status(lab)["pid"] == relay.pid
        assert json.loads(program(lab, "status", "--json", "--ports", "7001"))["pid"] == other.pid
