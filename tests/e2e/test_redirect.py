"""Mode redirect: nat rules rewrite the destination, and conntrack tells the relay what it was."""

import socket
from collections.abc import Iterator

import pytest
from activation import passing
from exchanges import see_reset

from tproxy_relay.lab import Host, Lab, RelayProcess
from tproxy_relay.net.endpoint import from_sockaddr

PORT = 8000
FAMILIES = {"v4": socket.AF_INET, "v6": socket.AF_INET6}

RULES = f"""
table inet redirect_test {{
    chain prerouting {{
        type nat hook prerouting priority dstnat; policy accept;
        iifname "rc" tcp dport {PORT} redirect to :15006
    }}
    chain output {{
        type nat hook output priority -100; policy accept;
        meta mark & 0x07000000 == 0x04000000 return
        oifname "rs" tcp dport {PORT} redirect to :15002
    }}
}}
"""


WRAPPERS = {
    "a socket a family": (),
    "inherited dual-stack sockets": passing("::,15002,dual-stack", "::,15006,dual-stack"),
}
"""In a socket for both families IPv4 clients appear with mapped addresses."""


@pytest.fixture(scope="module", params=WRAPPERS.values(), ids=WRAPPERS)
def relay(request: pytest.FixtureRequest, lab: Lab) -> Iterator[RelayProcess]:
    lab.relay.run(["nft", "-f", "-"], input=RULES)
    try:
        with lab.relay_process("--mode", "redirect", wrapper=request.param) as running:
            yield running
            running.stop()
    finally:
        lab.relay.run(["nft", "delete", "table", "inet", "redirect_test"])


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("origin", ["client", "relay"])
def test_the_original_destination_is_found(lab: Lab, relay: RelayProcess, origin: str, family: int) -> None:
    host: Host = getattr(lab, origin)
    with lab.server.listen(PORT, family) as listener:
        listener.settimeout(5)
        client = host.connect(lab.server.address(family), PORT)
        server, peer = listener.accept()
        assert peer[0] == lab.relay_address(family)
        server.sendall(b"welcome")
        server.close()
        assert client.recv(100) == b"welcome" and client.recv(1) == b""
        client.shutdown(socket.SHUT_WR)
        record = relay.record_of(client)
        assert record["orig_dst"] == str(from_sockaddr((lab.server.address(family), PORT)))
        assert record["outcome"] == "completed"
        client.close()


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("origin", ["client", "relay"])
def test_a_direct_connection_was_not_intercepted(lab: Lab, relay: RelayProcess, origin: str, family: int) -> None:
    client, _ = see_reset(getattr(lab, origin), lab.relay.address(family), 15006)
    port = client.getsockname()[1]
    record = relay.wait_for_record(lambda line: line["client"].endswith(f":{port}"))
    assert record["outcome"] == "not-intercepted"
    client.close()
