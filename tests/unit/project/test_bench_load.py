"""The load generator of the bench, over loopback: it tells the truth about a server that stalls."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest
from generator import HERE, Client, Server, compiled

from tproxy_relay.lab import LabError

pytestmark = pytest.mark.slow

STALL = 0.3
"""Seconds."""


class Here:
    """This machine, in place of a host of the lab."""

    def start(self, argv: Sequence[str], **options: Any) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(argv, **options)


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory, require_or_skip: Callable[[str], NoReturn]) -> Path:
    try:
        return compiled(sorted((HERE / "load").glob("*.c")), tmp_path_factory.mktemp("load") / "load")
    except LabError as error:
        require_or_skip(str(error))


@pytest.fixture
def port() -> int:
    """That nobody listens on."""
    with socket.create_server(("::", 0), family=socket.AF_INET6) as sock:
        return int(sock.getsockname()[1])


@pytest.fixture
def server(load: Path, port: int) -> Iterator[Server]:
    started = Server(Here(), load, [port])  # type: ignore[arg-type]
    yield started
    started.close()


def client(load: Path, mode: str, port: int, *arguments: object, host: str = "127.0.0.1") -> Client:
    return Client(Here(), load, mode, host, port, *arguments)  # type: ignore[arg-type]


def test_the_server_tells_who_came_and_how_much(load: Path, server: Server, port: int) -> None:
    with client(load, "idle", port, 3, 2) as some, client(load, "idle", port, 1, 1, host="::1") as another:
        assert some.result()["answered"] == 3
        assert another.result()["answered"] == 1
        arrived = server.arrivals(port)
        assert arrived.sources == {"127.0.0.1": 3, "::1": 1}
        assert arrived.received == 4 * 128
        again = some.ask(1 << 20)
        assert (again["answered"], again["errors"]) == (3, 0)


@pytest.mark.parametrize(
    "mode, arguments",
    [
        ("requests", ["8", "128", "128"]),
        ("requests", ["8", "128", "300000"]),
        ("requests", ["8", "128", "128", "500"]),
        ("connects", ["8", "server"]),
        ("connects", ["8", "client"]),
        ("connects", ["8", "reset"]),
        ("bulk", ["2", "up"]),
        ("bulk", ["2", "down"]),
        ("bulk", ["2", "both"]),
    ],
)
def test_every_kind_of_work_is_done_without_errors(
    load: Path, server: Server, port: int, mode: str, arguments: Sequence[str]
) -> None:
    with client(load, mode, port, "0.2", *arguments) as working:
        working.expect("go")
        before = server.arrivals(port)
        working.expect("end")
        after = server.arrivals(port)
        said = working.result()
    assert said["errors"] == 0 and 0.1 < said["seconds"] < 5
    if mode == "bulk":
        assert (said["down"] > 0) == (arguments[1] != "up")
        assert (after.received - before.received > 100_000) == (arguments[1] != "down")
    else:
        assert 0 < said["answered"] <= said["count"]
        assert 0 < said["p50"] <= said["p90"] <= said["p99"] <= said["p999"] <= 1.001 * said["max"]


@pytest.mark.parametrize("rate", [0, 500])
def test_at_a_fixed_rate_a_stall_shows_in_all_that_it_delayed(load: Path, server: Server, port: int, rate: int) -> None:
    """Without one, a closed loop asks nothing while the server is stopped, so that one latency in thousands is long."""
    arguments = ["1", "1", "128", "128", *([rate] if rate else [])]
    with client(load, "requests", port, *arguments) as working:
        working.expect("go")
        os.kill(server.pid, signal.SIGSTOP)
        time.sleep(STALL)  # its length, not a wait
        os.kill(server.pid, signal.SIGCONT)
        working.expect("end")
        said = working.result()
    assert said["errors"] == 0 and said["max"] >= 0.9 * STALL
    # 500 a second: 150 of 500 came while it was stopped, and had to wait for what was left of that time.
    assert (said["p90"] > STALL / 3) == bool(rate)


def test_a_server_that_answers_no_more_is_an_error(load: Path, server: Server, port: int) -> None:
    with client(load, "requests", port, "0.1", "4", "128", "128") as working:
        working.expect("go")
        os.kill(server.pid, signal.SIGSTOP)
        working.expect("end")
        said = working.result()
        os.kill(server.pid, signal.SIGCONT)
    assert said["errors"] == 4 and "timed out" in said["first_error"]


def test_a_port_where_nobody_listens_is_an_error_with_a_reason(load: Path, port: int) -> None:
    with client(load, "requests", port, "0.1", "4", "128", "128") as working:
        with pytest.raises(LabError, match="Connection refused"):
            working.expect("go")
