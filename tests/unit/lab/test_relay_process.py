"""The relay as a process under test: started and ready, its log read as it comes, gone afterwards."""

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from relays import Relay, ThisHost, is_alive

from tproxy_relay.lab import LabError, RelayProcess


@pytest.fixture
def relay(tmp_path: Path) -> Iterator[Relay]:
    with Relay(tmp_path) as started:
        yield started


def test_it_is_ready_and_has_its_workers(relay: Relay) -> None:
    process = relay.process
    assert process.returncode is None and [process.worker] == process.workers
    assert is_alive(process.pid) and is_alive(process.worker)
    relay.connect()  # at once: ready means that it listens


def test_lines_are_there_as_they_come(relay: Relay) -> None:
    process = relay.process
    client, server = relay.connect()
    opened = process.wait_for_line(lambda line: line["message"] == "connection open")
    assert opened in process.lines() and process.records() == [] and "connection open" in process.log
    client.shutdown(socket.SHUT_WR)
    server.close()
    record = process.record_of(client)
    assert process.records() == [record] and record["id"] == opened["id"]
    process.terminate()
    assert list(process.follow()) == process.lines(), "until the log ends"
    assert process.wait() == 0 == process.returncode


def test_a_line_that_does_not_come_is_an_error(relay: Relay) -> None:
    process = relay.process
    with pytest.raises(LabError, match="not within 0.05 s"):
        process.wait_for_line(lambda line: False, 0.05)
    process.stop()
    with pytest.raises(LabError, match="the relay ended; last: .*stopped"):
        process.wait_for_record(lambda line: True)


def test_another_exit_code_is_an_error(relay: Relay) -> None:
    with pytest.raises(LabError, match="exited with 0, not 1"):
        relay.process.stop(code=1)


def test_a_kill_takes_the_workers_along(relay: Relay) -> None:
    process = relay.process
    pids = [process.pid, process.worker]
    process.kill()
    assert not any(map(is_alive, pids)) and process.returncode == -signal.SIGKILL
    process.kill()  # again does no harm


def test_why_it_did_not_start(tmp_path: Path) -> None:
    (tmp_path / "relay.conf").write_text("mode = sideways\n")
    refused = RelayProcess(ThisHost(), ("--config", str(tmp_path / "relay.conf")))  # type: ignore[arg-type]
    with pytest.raises(LabError, match="exited with 78 before it was ready: .*sideways"):
        refused.__enter__()
    never = RelayProcess(ThisHost(), ("--config", os.devnull))  # type: ignore[arg-type]
    with pytest.raises(LabError, match="was not started"):
        never.wait()
