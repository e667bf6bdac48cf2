"""The throw-away namespace in which rules are tried, for root and for others."""

import os
import socket

import pytest
from doctor import USERS

from tproxy_relay.check.namespace import Namespace
from tproxy_relay.errors import RelayError


@pytest.mark.parametrize("user", USERS)
def test_sockets_and_programs_are_in_it(possible: None, user: bool) -> None:
    with Namespace(user=user) as namespace:
        namespace.ip("link set lo up", "link add dummy77 type veth")
        assert "dummy77" in namespace.run(["ip", "-o", "link"])
        with namespace.socket(socket.AF_INET) as server, namespace.socket(socket.AF_INET) as client:
            server.bind(("127.0.0.1", 0))
            server.listen(1)
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(server.getsockname(), 5)
            client.settimeout(5)
            client.connect(server.getsockname())
        with pytest.raises(OSError):
            namespace.socket(255)
        pid = namespace.pid
    assert not os.path.exists("/sys/class/net/dummy77") and not os.path.exists(f"/proc/{pid}")


@pytest.mark.parametrize("user", USERS)
def test_what_fails_in_it_says_so(possible: None, user: bool) -> None:
    with Namespace(user=user) as namespace, pytest.raises(RelayError):
        namespace.ip("link set nonsense up")


def test_where_it_is_not_allowed_it_says_so(possible: None, monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    program = f"{tmp_path}/unshare"
    with open(program, "w", encoding="ascii") as file:
        file.write("#!/bin/sh\necho 'unshare: Operation not permitted' >&2\nexit 1\n")
    os.chmod(program, 0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(RelayError, match="Operation not permitted"), Namespace(user=False):
        pass
