"""Connections that must not be relayed: to the relay itself, and from the relay itself."""

import os
import socket
from collections.abc import Sequence

import pytest
from accounts import ACCOUNT, HAVE_ACCOUNTS, for_all_accounts
from exchanges import see_reset
from relay_fixtures import intercepting_relay
from rows import Seen

from tproxy_relay.lab import Host, Lab, Line, RelayProcess
from tproxy_relay.net.endpoint import from_sockaddr

FAMILIES = {"v4": socket.AF_INET, "v6": socket.AF_INET6}
INBOUND, OUTBOUND = 15006, 15002


relay = intercepting_relay(("8000-8999",))


def descriptors(relay: RelayProcess) -> int:
    return len(os.listdir(f"/proc/{relay.worker}/fd"))


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("port", [INBOUND, OUTBOUND])
@pytest.mark.parametrize("origin", ["client", "relay"])
@pytest.mark.row(
    "S4", "a direct connection to a listener, each address and family", "reset, not-intercepted, nothing upstream"
)
def test_a_direct_connection_to_a_listener_is_reset(
    lab: Lab, relay: RelayProcess, origin: str, port: int, family: int, seen: Seen
) -> None:
    before, took = descriptors(relay), []
    for number in range(1, 6):
        client, seconds = see_reset(getattr(lab, origin), lab.relay.address(family), port)
        name = client.getsockname()[1]
        record = relay.wait_for_record(lambda line: line["client"].endswith(f":{name}"))
        assert record["outcome"] == "not-intercepted"
        assert "upstream_local" not in record, "it dialled out"
        assert len(relay.records()) == number, "it called itself"
        assert descriptors(relay) <= before + 3
        client.close()
        took.append(seconds)
    assert min(took) < 0.05
    seen("reset")


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_an_intercepted_connection_to_the_other_listener_is_a_self_call(lab: Lab, family: int) -> None:
    lab.intercept((OUTBOUND,))
    with lab.relay_process() as relay:
        client, _ = see_reset(lab.client, lab.relay.address(family), OUTBOUND)
        record = relay.wait_for_record(lambda line: True)
        assert record["outcome"] == "self-call"
        assert record["orig_dst"] == str(from_sockaddr((lab.relay.address(family), OUTBOUND)))
        assert "upstream_local" not in record
        assert len(relay.records()) == 1
        client.close()
    lab.stop_intercepting()


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_a_destination_elsewhere_with_the_same_port_is_no_self_call(lab: Lab, family: int) -> None:
    lab.intercept((INBOUND,))
    with lab.relay_process() as relay, lab.server.listen(INBOUND, family) as listener:
        listener.settimeout(5)
        client = lab.client.connect(lab.server.address(family), INBOUND)
        server, peer = listener.accept()
        assert peer[0] == lab.relay_address(family), "not intercepted"
        server.sendall(b"welcome")
        assert client.recv(100) == b"welcome"
        client.close()
        server.close()
        assert relay.wait_for_record(lambda line: line["client"].startswith("[" if ":" in peer[0] else "10."))
    lab.stop_intercepting()


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("origin", ["client", "relay"])
@pytest.mark.slow
def test_a_direct_connection_goes_to_the_target(lab: Lab, family: int, origin: str) -> None:
    target = str(from_sockaddr((lab.server.address(family), 7000)))
    host: Host = getattr(lab, origin)
    with lab.relay_process("--target", target) as relay, lab.server.listen(7000, family) as listener:
        listener.settimeout(5)
        client = host.connect(lab.relay.address(family), INBOUND)
        server, _ = listener.accept()
        server.sendall(b"welcome")
        server.close()
        assert client.recv(100) == b"welcome" and client.recv(1) == b""
        name = str(from_sockaddr(client.getsockname()))
        client.close()
        record = relay.wait_for_record(lambda line: line["client"] == name)
        assert record["outcome"] == "completed"
        assert record["destination"] == target


UNKNOWN_TO_THE_RULES = {
    "mark": ("--mark-mask", "0x00070000"),
    **({"account": ("--user", ACCOUNT)} if HAVE_ACCOUNTS else {}),  # its workers set no marks at all
}


@pytest.mark.parametrize("options", UNKNOWN_TO_THE_RULES.values(), ids=UNKNOWN_TO_THE_RULES)
@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.row("S5", "the relay's own connection comes back", "seen at the first round, reset, the rule named")
@pytest.mark.slow
def test_the_relays_own_connection_coming_back_is_a_loop(
    lab: Lab, family: int, workers: int, options: Sequence[str], seen: Seen
) -> None:
    """A ruleset that forgets to let the relay's own packets pass: here, one for the wrong mark. Another worker than the
    one that has opened the connection may be the one that it comes back to."""
    clients = 5 * workers
    lab.intercept(("8000-8999",), topology="local")
    wrapper = for_all_accounts() if "--user" in options else ()
    with lab.relay_process(*options, "--workers", str(workers), wrapper=wrapper) as relay:
        with lab.server.listen(8000, family):
            for _ in range(clients):
                client, _ = see_reset(lab.relay, lab.server.address(family), 8000)
                client.close()
        loop = relay.wait_for_record(lambda line: line["outcome"] == "loop")
        assert "ruleset lacks the rule" in loop["error"]
        relay.stop()
        records = relay.records()
        assert clients <= len(records) <= 10 * clients, "the loop went on"
        assert sum(record["outcome"] == "loop" for record in records) >= clients
        assert workers == 1 or seen_across_workers(records), "each worker sees only its own"
    lab.stop_intercepting()
    seen("reset, loop")


def seen_across_workers(records: list[Line]) -> bool:
    """True if one worker was found to have accepted what another one had opened. Ids begin with a worker's number."""
    opened_by = {record.get("upstream_local"): record["id"].partition("-")[0] for record in records}
    accepted_by = {record["client"]: record["id"].partition("-")[0] for record in records}
    for record in records:
        source = record.get("error", "").partition(" -> ")[0].rpartition(" ")[2]
        if record["outcome"] == "loop" and source in opened_by and source in accepted_by:
            if opened_by[source] != accepted_by[source]:
                return True
    return False
