"""A throw-away namespace and the process in it, for root and for others."""

import errno
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest

from tproxy_relay.lab import LabError, needs
from tproxy_relay.net.namespace import GoneError, NetworkNamespace, NoNamespaceError

USERS = [
    pytest.param(False, id="root", marks=pytest.mark.skipif(not needs.privileged(), reason="not root")),
    pytest.param(True, id="user namespace"),
]

TTL = "/proc/sys/net/ipv4/ip_default_ttl"


@pytest.fixture(autouse=True)
def possible(require_or_skip: Callable[[str], NoReturn]) -> None:
    try:
        needs.require_tools()
    except LabError as error:
        require_or_skip(str(error))


def lead(user: bool) -> list[str]:
    return ["unshare", *(["-U", "-r"] if user else []), "-n", "--"]


@contextmanager
def made(user: bool, presence: int | None = None) -> Iterator[NetworkNamespace]:
    namespace = NetworkNamespace(lead(user), presence=presence)
    try:
        namespace.await_ready()
        yield namespace
    finally:
        namespace.close()


def sleeper(namespace: NetworkNamespace, user: bool) -> "subprocess.Popen[bytes]":
    """A program in it, which runs by the time that this returns."""
    enter = ["nsenter", "-t", str(namespace.pid), *(["-U", "--preserve-credentials"] if user else []), "-n", "--"]
    process = subprocess.Popen([*enter, "sh", "-c", "echo; exec sleep 600"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == b"\n"
    return process


@pytest.mark.parametrize("user", USERS)
def test_sockets_are_of_that_network(user: bool) -> None:
    with made(user) as namespace, namespace.socket(socket.AF_INET) as server:
        assert type(server) is socket.socket and not server.get_inheritable()
        server.bind(("127.0.0.1", 0))
        server.listen(1)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(server.getsockname(), 5)
        with pytest.raises(OSError) as caught:
            namespace.socket(socket.AF_INET, 77)
        assert caught.value.errno == errno.EINVAL
        pid = namespace.pid
    assert not os.path.exists(f"/proc/{pid}")


@pytest.mark.parametrize("user", USERS)
def test_files_are_of_that_network(user: bool) -> None:
    here = Path(TTL).read_text()
    with made(user) as namespace:
        namespace.write(TTL, "17\n")
        assert namespace.read(TTL) == "17\n" and Path(TTL).read_text() == here
        with pytest.raises(FileNotFoundError, match="/proc/no/such"):
            namespace.read("/proc/no/such")


@pytest.mark.parametrize("user", USERS)
def test_what_runs_in_it_is_killed_only_if_that_was_wanted(user: bool) -> None:
    with made(user) as namespace:
        kept = sleeper(namespace, user)
    assert kept.poll() is None
    kept.kill()
    kept.wait()
    reader, writer = os.pipe()
    with made(user, reader) as namespace:
        killed = sleeper(namespace, user)
        os.close(reader)
        os.close(writer)
    assert killed.wait(20) == -signal.SIGKILL


@pytest.mark.parametrize("user", USERS)
def test_one_that_is_gone_says_so(user: bool) -> None:
    with made(user) as namespace:
        os.kill(namespace.pid, signal.SIGKILL)
        with pytest.raises(GoneError):
            for _ in range(2):  # the request may be sent before the signal takes effect
                namespace.socket(socket.AF_INET).close()


@pytest.mark.parametrize("script, said", [("echo one >&2; echo two >&2; exit 1", "two"), ("exit 1", "")])
def test_what_keeps_it_from_being_made(script: str, said: str) -> None:
    namespace = NetworkNamespace(["sh", "-c", script])
    with pytest.raises(NoNamespaceError) as caught:
        namespace.await_ready()
    assert str(caught.value) == said
    namespace.close()
