"""How little the relay needs: CAP_NET_RAW for everything, and with inherited listeners nothing at all."""

import socket
from pathlib import Path

import pytest
from activation import passing

from tproxy_relay.endpoint import from_sockaddr
from tproxy_relay.lab import Lab, RelayProcess

PORT = 8000
FAMILIES = (socket.AF_INET, socket.AF_INET6)

NET_RAW_ONLY = ("setpriv", "--bounding-set=-all,+net_raw", "--inh-caps=-all,+net_raw", "--no-new-privs")
NOTHING = ("setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs")

LISTENERS = ("0.0.0.0,15006,transparent", "::,15006,transparent")


def capabilities(relay: RelayProcess) -> dict[str, int]:
    """Of all its threads together."""
    seen: dict[str, int] = {}
    for status in Path(f"/proc/{relay.pid}/task").glob("*/status"):
        for line in status.read_text().splitlines():
            name, _, value = line.partition(":\t")
            if name in ("CapEff", "CapPrm", "CapBnd", "CapAmb"):
                seen[name] = seen.get(name, 0) | int(value, 16)
    return seen


def check_traffic(lab: Lab, relay: RelayProcess, source: str) -> None:
    for family in FAMILIES:
        with lab.server.listen(PORT, family) as listener:
            listener.settimeout(5)
            client = lab.client.connect(lab.server.address(family), PORT)
            server, peer = listener.accept()
            server.sendall(b"welcome")
            server.close()
            assert client.recv(100) == b"welcome" and client.recv(1) == b""
            client.shutdown(socket.SHUT_WR)
            record = relay.record_of(client)
            assert (record["outcome"], record["source"]) == ("completed", source)
            assert record["upstream_local"] == str(from_sockaddr(peer))
            assert (peer[0] == client.getsockname()[0]) == (source == "address")
            client.close()


@pytest.mark.parametrize("preserve", ["no", "address"])
def test_cap_net_raw_alone_is_enough(lab: Lab, preserve: str) -> None:
    lab.intercept((PORT,), preserve_source=preserve != "no")
    with lab.relay_process("--preserve-source", preserve, wrapper=NET_RAW_ONLY) as relay:
        net_raw = 1 << 13
        assert {name: bits & ~net_raw for name, bits in capabilities(relay).items() if name != "CapAmb"} == {
            "CapEff": 0,
            "CapPrm": 0,
            "CapBnd": 0,
        }
        check_traffic(lab, relay, "relay" if preserve == "no" else "address")
        relay.stop()
    lab.stop_intercepting()


def test_inherited_listeners_need_no_capability_at_all(lab: Lab) -> None:
    lab.intercept((PORT,))
    with lab.relay_process(wrapper=(*passing(*LISTENERS), *NOTHING)) as relay:
        assert set(capabilities(relay).values()) == {0}
        listening = relay.wait_for_line(lambda line: line["message"] == "listening")
        assert listening["listeners"] == "0.0.0.0:15006, [::]:15006"
        check_traffic(lab, relay, "relay")
        relay.stop()
    lab.stop_intercepting()
