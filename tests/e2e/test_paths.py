"""What is chosen for the way to the clients, and for that to the servers, as the kernel tells it."""

import re
import time

import pytest
from flows import echo_server
from interception import FAMILIES, PORT, ping

from tproxy_relay.lab import Lab, LabError

RATE = 400_000
"""Bytes a second."""
BUFFER = 65536


def legs(lab: Lab) -> dict[str, str]:
    """What ss(8) tells of the two sockets of one relayed connection."""
    text = lab.relay.run(["ss", "-Htinm", "state", "established"]).stdout
    found = {}
    for line in re.split(r"\n(?=\S)", text.strip()):
        local, peer = line.split()[2:4]
        if local.endswith(f":{PORT}"):
            found["client"] = line
        elif peer.endswith(f":{PORT}"):
            found["upstream"] = line
    return found


def another_congestion(lab: Lab) -> str:
    """That anybody may choose, and that is not the default."""
    names = lab.relay.run(["sysctl", "-n", "net.ipv4.tcp_allowed_congestion_control"]).stdout.split()
    default = lab.relay.run(["sysctl", "-n", "net.ipv4.tcp_congestion_control"]).stdout.strip()
    return next(name for name in names if name != default)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("side", ["client", "upstream"])
@pytest.mark.slow
def test_each_path_has_its_own(lab: Lab, side: str, family: int) -> None:
    name = another_congestion(lab)
    options = (f"--{side}-congestion", name, f"--{side}-pacing", str(RATE), "--intercept-inbound", str(PORT))
    with echo_server(lab.server, PORT, PORT), lab.relay_process(*options) as relay:
        client = lab.client.connect(lab.server.address(family), PORT)
        assert ping(client) == ""
        found = legs(lab)
        other = {"client": "upstream", "upstream": "client"}[side]
        limits = {leg: re.search(r"pacing_rate \S+/(\S+)bps", line) for leg, line in found.items()}
        assert {leg: limit and limit[1] for leg, limit in limits.items()} == {side: str(RATE * 8), other: None}
        assert name in found[side].split() and name not in found[other].split()
        client.close()
        relay.stop()
        assert [record["outcome"] for record in relay.records()] == ["completed"]


def test_pacing_holds_a_stream_back(lab: Lab) -> None:
    size = RATE * 2
    options = ("--upstream-pacing", str(RATE), "--intercept-inbound", str(PORT))
    with lab.server.listen(PORT) as listener, lab.relay_process(*options) as relay:
        client = lab.client.connect(lab.server.ipv4, PORT)
        server, _ = listener.accept()
        began = time.monotonic()
        client.settimeout(30)
        client.sendall(bytes(size // 2))
        client.close()
        got = 0
        while data := server.recv(1 << 16):
            got += len(data)
        server.close()
        assert got == size // 2
        assert time.monotonic() - began > 0.5 * got / RATE, "a burst is allowed, and no more"
        relay.stop()


def test_a_buffer_bounds_what_the_kernel_keeps(lab: Lab) -> None:
    options = ("--socket-buffer", str(BUFFER), "--intercept-inbound", str(PORT))
    with echo_server(lab.server, PORT, PORT), lab.relay_process(*options) as relay:
        client = lab.client.connect(lab.server.ipv4, PORT)
        assert ping(client) == ""
        for side, line in legs(lab).items():
            assert f"rb{2 * BUFFER}," in line and f"tb{2 * BUFFER}," in line, side
        client.close()
        relay.stop()


@pytest.mark.parametrize("side", ["client", "upstream"])
def test_a_congestion_control_that_there_is_not_is_named(lab: Lab, side: str) -> None:
    with pytest.raises(LabError, match=f"exited with 78 .*{side}-congestion: nonesuch: this kernel does not have it"):
        with lab.relay_process(f"--{side}-congestion", "nonesuch"):
            pass
