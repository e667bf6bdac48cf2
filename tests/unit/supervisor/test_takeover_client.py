"""A relay that looks for the one that it is to take over from."""

import os
import socket
from pathlib import Path

import loopback
import pytest
from relays import Relay
from successor import asking, question

from tproxy_relay.errors import SystemRefusedError
from tproxy_relay.settings import Settings
from tproxy_relay.supervisor import takeover_client, takeover_server

pytestmark = pytest.mark.usefixtures("nothing_left_behind")


def settings(relay: Relay, **more: object) -> Settings:
    return Settings(bind=("127.0.0.1",), ports=(relay.port,), mode="redirect", **more)  # type: ignore[arg-type]


def test_one_that_listens_elsewhere_is_not_in_the_way(tmp_path: Path) -> None:
    """Not even if it could not be taken over: it has another mode, or is busy."""
    (tmp_path / "other").mkdir()
    with Relay(tmp_path) as relay, Relay(tmp_path / "other") as other:
        with asking(other) as channel:
            assert question(channel)
            found = takeover_client.find(settings(relay))
            assert found is not None and found.pid == relay.process.pid
            for listener in found.listeners:
                listener.close()
            found.close()
            with pytest.raises(SystemRefusedError, match=f"process {other.process.pid}: another relay takes over"):
                takeover_client.find(settings(other))
        with pytest.raises(
            SystemRefusedError, match=f"cannot take over from process {relay.process.pid}: its route-table"
        ):
            takeover_client.find(settings(relay, route_table=7))
        with loopback.listen() as free:
            port = free.getsockname()[1]
        assert takeover_client.find(Settings(bind=("127.0.0.1",), ports=(port,), mode="tproxy")) is None


def test_one_who_only_has_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any account can take it, and let others wait."""
    monkeypatch.setattr(takeover_client, "ANSWER_TIMEOUT", 0.2)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock, socket.socket(
        socket.AF_UNIX, socket.SOCK_SEQPACKET
    ) as first:
        sock.bind(f"\0{takeover_server.NAME}{os.getpid()}")
        sock.listen(0)
        first.connect(f"\0{takeover_server.NAME}{os.getpid()}")  # the backlog is full
        assert takeover_client.find(Settings()) is None
