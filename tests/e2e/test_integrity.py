"""Bytes in bulk, both ways at once: what arrives is what was sent, and the access line counts every byte."""

import contextlib
import json
import socket
import subprocess
import sys
from collections.abc import Iterator

import bulk
import pytest
from rows import Seen

from tproxy_relay.lab import Lab
from tproxy_relay.net.endpoint import from_sockaddr
from tproxy_relay.net.sockets import SEND_TICK

FAMILIES = {"v4": socket.AF_INET, "v6": socket.AF_INET6}
PORT = 8000
MIB = 1024 * 1024
LONGEST = 100.0
"""Seconds for a transfer; 1 GiB each way takes some ten."""
UP, DOWN = 20261122, 21126202
"""Seeds of the two directions."""


def transfer(client: socket.socket, server: socket.socket, size: int, rest: float) -> list[dict[str, object]]:
    """`size` bytes each way at once: sent and received upwards, sent and received downwards."""
    jobs = [
        (client, ["send", str(UP), str(size)]),
        (server, ["receive", str(UP), str(rest)]),
        (server, ["send", str(DOWN), str(size)]),
        (client, ["receive", str(DOWN), str(rest)]),
    ]
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(started(sock, arguments)) for sock, arguments in jobs]
        return [json.loads(process.communicate(timeout=LONGEST)[0]) for process in processes]


@contextlib.contextmanager
def started(sock: socket.socket, arguments: list[str]) -> Iterator["subprocess.Popen[bytes]"]:
    command = [sys.executable, "-I", "-S", bulk.__file__, *arguments]
    with subprocess.Popen(command, stdin=sock, stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def check(lab: Lab, family: int, size: int, preserve: str = "no", rest: float = 0) -> None:
    """The whole story, once."""
    server_name = (lab.server.address(family), PORT)
    lab.intercept((PORT,), preserve_source=preserve != "no")
    with lab.relay_process("--preserve-source", preserve) as relay, contextlib.ExitStack() as stack:
        listener = stack.enter_context(lab.server.listen(PORT, family))
        listener.settimeout(5)
        client = stack.enter_context(lab.client.connect(*server_name))
        server, peer = listener.accept()
        stack.enter_context(server)
        for sock in (client, server):
            sock.settimeout(None)
        opened = relay.wait_for_line(lambda line: line["message"] == "connection open")
        assert opened["client"] == str(from_sockaddr(client.getsockname())), "not intercepted"
        assert opened["orig_dst"] == str(from_sockaddr(server_name))

        sent_up, got_up, sent_down, got_down = transfer(client, server, size, rest)

        record = relay.record_of(client)
        assert sent_up["bytes"] == sent_down["bytes"] == size
        assert got_up == sent_up
        assert got_down == sent_down
        assert sent_up["sha256"] != sent_down["sha256"]
        assert record["outcome"] == "completed"
        assert (record["bytes_up"], record["bytes_down"]) == (size, size)
        assert record["upstream_local"] == str(from_sockaddr(peer))
        assert (peer[0] == lab.client.address(family)) == (preserve == "address")
        rate = 2 * size * 8 / record["seconds"] / 1e9
        print(f"{size / MIB:.0f} MiB each way in {record['seconds']:.1f} s: {rate:.2f} Gbit/s in all")
    lab.stop_intercepting()


@pytest.mark.parametrize("preserve", ["no", "address"])
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_64_mib_each_way_arrive_unchanged(lab: Lab, family: int, preserve: str) -> None:
    check(lab, family, 64 * MIB, preserve)


def test_readers_that_rest_for_a_while_get_it_all(lab: Lab) -> None:
    """Everything between is full, and the relay's send gives up with a part of its data taken, and again."""
    check(lab, socket.AF_INET, 64 * MIB, rest=2.2 * SEND_TICK)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.row("L5", "1 GiB each way at once", "equal hashes, exact counts")
def test_a_gib_each_way_arrives_unchanged(lab: Lab, family: int, seen: Seen) -> None:
    check(lab, family, 1024 * MIB)
    seen("equal, exact")
