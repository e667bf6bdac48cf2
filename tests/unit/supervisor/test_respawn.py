"""How soon a worker that has died is replaced, and when no more."""

import os
import signal
import time
from pathlib import Path

import loopback
import pytest
from breakable import accepts, breakable
from deadlines import wait_until
from hypothesis import given
from hypothesis import strategies as st
from loopback import RST
from relays import Relay

from tproxy_relay.supervisor.respawn import DEATHS_PERIOD, MAX_DEATHS, Deaths


def test_pauses() -> None:
    deaths = Deaths()
    assert [deaths.pause(float(now)) for now in range(5)] == [0.0, 0.1, 0.2, 0.4, None]


def test_deaths_that_are_long_ago_do_not_count() -> None:
    deaths = Deaths()
    assert [deaths.pause(now * 20.0) for now in range(100)] == [0.0, 0.1, 0.2] + [0.4] * 97
    assert deaths.pause(100 * 20.0 + DEATHS_PERIOD) == 0.0


@given(st.lists(st.floats(0, 40), max_size=30))
def test_five_within_a_minute_are_too_many(waits: list[float]) -> None:
    deaths, now, times = Deaths(), 0.0, list[float]()
    for wait in waits:
        now += wait
        times.append(now)
        recent = sum(now - death <= DEATHS_PERIOD for death in times)
        pause = deaths.pause(now)
        assert (pause is None) == (recent >= MAX_DEATHS)
        assert pause is None or 0 <= pause < 1


# --- the relay as a real process


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


@pytest.mark.slow
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


def test_a_replacement_that_cannot_boot_is_one_more_death(tmp_path: Path) -> None:
    with Relay(tmp_path, wrapper=breakable(tmp_path)) as relay:
        (tmp_path / "broken").touch()
        os.kill(relay.process.worker, signal.SIGKILL)
        relay.said("workers die again and again, stopping")
        assert [line["how"] for line in relay.said("worker ended", 5)] == ["signal 9", *["exit 3"] * 4]
        assert relay.process.wait() == 1
