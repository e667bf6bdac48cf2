"""What the process in a namespace answers; here it runs in no namespace of its own."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tproxy_relay.net import namespace_agent


@contextmanager
def running() -> Iterator[tuple["subprocess.Popen[bytes]", socket.socket]]:
    control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    control.settimeout(20)
    command = [sys.executable, "-I", "-S", namespace_agent.__file__, str(theirs.fileno())]
    with subprocess.Popen(command, pass_fds=[theirs.fileno()]) as process, control:
        theirs.close()
        assert json.loads(control.recv(100)) == {"pid": process.pid}
        yield process, control


def ask(control: socket.socket, *request: object) -> tuple[dict[str, object], list[int]]:
    control.send(json.dumps(request).encode())
    message, descriptors, _, _ = socket.recv_fds(control, 10_000, 5)
    return json.loads(message), descriptors


def test_requests(tmp_path: Path) -> None:
    file = tmp_path / "file"
    with running() as (process, control):
        answer, descriptors = ask(control, "socket", socket.AF_INET, socket.SOCK_DGRAM, 0)
        with socket.socket(fileno=descriptors[0]) as made:
            assert not answer and (made.family, made.type) == (socket.AF_INET, socket.SOCK_DGRAM)
        assert ask(control, "write", str(file), "text") == ({}, [])
        assert ask(control, "read", str(file)) == ({"text": "text"}, []) and file.read_text() == "text"
        assert ask(control, "read", "/no/such")[0] == {"errno": 2, "error": "No such file or directory"}
        control.close()
        assert process.wait(20) == 0


def test_who_is_on_the_way_is_known_by_the_pipe() -> None:
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    assert not namespace_agent.at_end(reader)
    os.close(writer)
    assert namespace_agent.at_end(reader)
    os.close(reader)


def test_others_in_the_same_network_are_seen() -> None:
    with subprocess.Popen(["sleep", "600"]) as process:
        assert process.pid in namespace_agent.inhabitants() and os.getpid() not in namespace_agent.inhabitants()
        process.kill()
    assert not namespace_agent.lives_in(process.pid, os.stat("/proc/self/ns/net"))


@pytest.mark.usefixtures("network")
def test_none_of_another_network_is_seen() -> None:
    assert namespace_agent.inhabitants() == []
