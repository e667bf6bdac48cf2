"""The relay as a real process on loopback: a start that fails, everything that stands still, and its own sudden end."""

import os
import signal
import threading
import time
from pathlib import Path

import loopback
import pytest
from breakable import accepts, breakable
from deadlines import wait_until
from loopback import RST
from relays import Relay, ThisHost, is_alive

from tproxy_relay.lab import LabError, RelayProcess


def test_a_worker_that_cannot_boot_is_the_end_of_the_start(tmp_path: Path) -> None:
    (tmp_path / "broken").touch()
    relay = Relay(tmp_path, wrapper=breakable(tmp_path), workers=2)
    with pytest.raises(LabError, match="exited with 71 before it was ready"), relay:
        pass
    assert relay.process.log.splitlines()[-1] == "tproxy-relay: a worker could not start (exit 3): no use"
    assert "Traceback" not in relay.process.log
    assert not accepts(relay.port)
    assert not any(is_alive(line["pid"]) for line in relay.process.lines() if line["message"] == "worker started")


def waits_for_an_order(worker: int) -> bool:
    """It has said that it is ready (proc(5), wchan: the function of the kernel in which it sleeps)."""
    return "skb" in Path(f"/proc/{worker}/wchan").read_text(encoding="ascii")


def test_told_to_stop_in_the_moment_in_which_it_gets_ready(tmp_path: Path) -> None:
    (tmp_path / "held").touch()
    relay = Relay(tmp_path, wrapper=breakable(tmp_path))
    failed: list[str] = []

    def start() -> None:
        try:
            relay.process.__enter__()
        except LabError as error:
            failed.append(str(error))

    starting = threading.Thread(target=start)
    starting.start()
    (started,) = relay.said("worker started")
    os.kill(relay.process.pid, signal.SIGSTOP)
    (tmp_path / "held").unlink()
    wait_until(lambda: waits_for_an_order(started["pid"]), "its worker is ready")
    os.kill(relay.process.pid, signal.SIGTERM)
    os.kill(relay.process.pid, signal.SIGCONT)
    starting.join()
    relay.__exit__(None, None, None)
    messages = [line["message"] for line in relay.process.lines()]
    assert failed and failed[0].startswith("the relay exited with 0 before it was ready"), messages
    assert "draining" in messages and "listening" not in messages and messages[-1] == "stopped"


def test_workers_that_still_boot_are_not_asked_what_is_live(tmp_path: Path) -> None:
    with Relay(tmp_path, wrapper=breakable(tmp_path)) as relay:
        client, server = relay.connect()
        (tmp_path / "held").touch()
        relay.reload()
        relay.said("worker started", 2)
        relay.process.signal(signal.SIGUSR1)
        assert relay.said("connections")[0]["live"] == 1
        (tmp_path / "held").unlink()
        assert relay.said("reloaded")[0]["generation"] == 2
        assert [line["client"] for line in relay.said("connection live")] == ["{}:{}".format(*client.getsockname())]
        relay.connect()  # served by the worker that was started, not by one that had to be started for it
        assert len(relay.said("worker started")) == 2 and "worker ended" not in relay.process.log
        client.sendall(b"still")
        assert loopback.read_exactly(server, 5) == b"still"


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
