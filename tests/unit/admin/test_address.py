"""Where a relay can be asked, and who may."""

import os
import socket
import stat
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tproxy_relay.admin import address
from tproxy_relay.admin.address import AdminSocket
from tproxy_relay.errors import SystemRefusedError
from tproxy_relay.net import unix_sockets
from tproxy_relay.net.unix_sockets import Peer
from tproxy_relay.settings import HostPort


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "run" / "admin.sock")


@pytest.fixture
def there(path: str) -> Iterator[AdminSocket]:
    with closing(address.listen(path)) as admin:
        yield admin


def connected(admin: AdminSocket, where: address.Where | int) -> None:
    """A client comes through."""
    with closing(address.dial(where, 5)), closing(admin.sock.accept()[0]):
        pass


def test_a_path(there: AdminSocket, path: str) -> None:
    connected(there, path)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o660
    assert stat.S_IMODE(os.stat(Path(path).parent).st_mode) & ~0o750 == 0
    assert os.listdir(Path(path).parent) == ["admin.sock"]
    there.close()
    assert os.listdir(Path(path).parent) == []


def test_a_socket_that_nobody_listens_on_is_replaced(path: str) -> None:
    with closing(address.listen(path)) as first:
        first.sock.close()  # as if it had been killed
        with closing(address.listen(path)) as second:
            first.close()
            connected(second, path)


def test_another_program_is_left_alone(there: AdminSocket, path: str) -> None:
    with pytest.raises(SystemRefusedError, match="another program listens there"):
        address.listen(path)
    connected(there, path)


def test_a_socket_of_somebody_elses_by_now_stays(there: AdminSocket, path: str) -> None:
    there.sock.close()
    with closing(address.listen(path)) as after:
        there.close()
        connected(after, path)
    assert not os.path.exists(path)


@pytest.mark.parametrize("kind", ["link", "file", "folder"])
def test_what_is_no_socket_stays(tmp_path: Path, kind: str) -> None:
    path, victim = tmp_path / "admin.sock", tmp_path / "victim"
    victim.write_text("precious")
    if kind == "link":
        path.symlink_to(victim)
    elif kind == "file":
        path.write_text("precious")
    else:
        path.mkdir()
    with pytest.raises(SystemRefusedError, match="is there and is no socket"):
        address.listen(str(path))
    assert (path.is_symlink(), path.is_dir()) == (kind == "link", kind == "folder")
    assert victim.read_text() == "precious"


def test_where_it_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(SystemRefusedError, match=f"admin: cannot listen on {tmp_path}/a/b/c: No such file"):
        address.listen(f"{tmp_path}/a/b/c")


def test_a_port(ipv6_loopback: None) -> None:
    for host in ("127.0.0.1", "::1"):
        with closing(address.listen(HostPort(host, 0))) as admin:
            port = admin.sock.getsockname()[1]
            connected(admin, HostPort(host, port))
            with pytest.raises(SystemRefusedError, match=f"cannot listen on .*{port}: Address already in use"):
                address.listen(HostPort(host, port))


def test_the_relays_own() -> None:
    with closing(address.own()) as admin:
        assert os.getpid() in address.running()
        connected(admin, os.getpid())
        with pytest.raises(OSError):
            address.own()
    assert os.getpid() not in address.running()


def test_who_may_change_something(there: AdminSocket, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(address.own()) as own, closing(address.listen(HostPort("127.0.0.1", 0))) as tcp:
        port = tcp.sock.getsockname()[1]
        for admin, where, may in (
            (own, os.getpid(), (True, True)),
            (there, path, (True, True)),
            (tcp, HostPort("127.0.0.1", port), (True, False)),
        ):
            with closing(address.dial(where, 5)), closing(admin.sock.accept()[0]) as peer:
                assert (admin.admits(peer), admin.permits(peer)) == may
    # Somebody else's process at the other end, as the kernel would tell of it.
    monkeypatch.setattr(unix_sockets, "peer", lambda sock: Peer(1, 65534))
    one, other = socket.socketpair()
    with one, other:
        assert (AdminSocket(one, None).admits(one), AdminSocket(one, None).permits(one)) == (False, False)
        assert (AdminSocket(one, "/x").admits(one), AdminSocket(one, "/x").permits(one)) == (True, False)
