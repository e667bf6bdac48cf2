"""The recipe that most documents have, and ours, both as they stand in docs/interception.rst: what the one breaks and
the other does not."""

import socket
import textwrap
from collections.abc import Iterator

import pytest
from exchanges import see_reset
from recipes import DOCS, PATIENCE, attempt, block, options, run, talk

from tproxy_relay.intercept import programs
from tproxy_relay.lab import Lab
from tproxy_relay.net import linux, sockets

pytestmark = pytest.mark.slow

PAGE = "interception.rst"
PORT = 8080
BOTH = pytest.mark.parametrize("recipe", ["usual", "ours"])


@pytest.fixture(autouse=True)
def lab_with_iptables(fresh_lab, require_or_skip) -> Iterator[Lab]:  # type: ignore[no-untyped-def]
    if programs.find("iptables") is None:
        require_or_skip("the usual recipe needs iptables: apt-get install iptables")
    yield fresh_lab


def apply(lab: Lab, recipe: str) -> None:
    run(lab, (DOCS / "examples" / "gateway.sh").read_text() if recipe == "ours" else block(PAGE, "usual"))


@BOTH
def test_it_intercepts_where_nothing_is_in_its_way(recipe: str, fresh_lab: Lab) -> None:
    """The control: both do what they are for."""
    apply(fresh_lab, recipe)
    with fresh_lab.relay_process() as relay:
        client, _ = talk(fresh_lab.client, fresh_lab.server, PORT)
        with client:
            assert relay.record_of(client)["orig_dst"] == f"{fresh_lab.server.ipv4}:{PORT}"


@BOTH
def test_connections_that_were_there_before(recipe: str, fresh_lab: Lab) -> None:
    with fresh_lab.relay_process(), fresh_lab.server.listen(PORT) as listener:
        with fresh_lab.client.connect(fresh_lab.server.ipv4, PORT) as client, listener.accept()[0] as server:
            apply(fresh_lab, recipe)
            client.settimeout(PATIENCE)
            client.sendall(b"?")
            server.settimeout(PATIENCE if recipe == "ours" else 0.5)
            if recipe == "ours":
                assert server.recv(1) == b"?"
            else:
                with pytest.raises(TimeoutError):
                    server.recv(1)
                with pytest.raises(ConnectionResetError):
                    client.recv(1)


@BOTH
def test_a_port_that_is_used_again_while_the_relay_has_it_in_time_wait(recipe: str, fresh_lab: Lab) -> None:
    apply(fresh_lab, recipe)
    lab = fresh_lab
    with lab.relay_process() as relay, lab.server.listen(PORT) as listener:
        listener.settimeout(PATIENCE)
        retransmits = []
        for _ in range(2):
            with lab.client.socket() as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                client.bind((lab.client.ipv4, 40000))
                client.settimeout(PATIENCE)
                client.connect((lab.server.ipv4, PORT))
                retransmits.append(sockets.tcp_info(client).retransmits)
                # The server ends it first, so the relay does towards the client, and TIME_WAIT is the relay's.
                listener.accept()[0].close()
                assert client.recv(1) == b""
                client.shutdown(socket.SHUT_WR)
                if len(retransmits) == 1:
                    relay.record_of(client)
        assert retransmits == [0, 0 if recipe == "ours" else 1]


OTHERS = textwrap.dedent("""\
    table ip other {
        chain early {
            type filter hook prerouting priority raw;
            iifname rc tcp dport 8080 meta mark set 0x40000
        }
        chain late {
            type filter hook input priority 0;
            iifname rc tcp dport 8080 meta mark & 0x40000 == 0 drop
        }
    }
    """)
"""Another program that keeps a bit in the mark, and needs it later."""


@BOTH
def test_a_bit_of_somebody_else_in_the_mark(recipe: str, fresh_lab: Lab) -> None:
    fresh_lab.relay.run(["nft", "-f", "-"], input=OTHERS)
    apply(fresh_lab, recipe)
    with fresh_lab.relay_process(), fresh_lab.server.listen(PORT):
        expected = "connected" if recipe == "ours" else "no answer"
        assert attempt(fresh_lab.client, fresh_lab.server.ipv4, PORT) == expected


@BOTH
@pytest.mark.parametrize("sysctl", ["net.ipv4.conf.all.src_valid_mark", "net.ipv4.tcp_fwmark_accept"])
def test_sysctls_that_let_the_mark_count_elsewhere(recipe: str, sysctl: str, fresh_lab: Lab) -> None:
    fresh_lab.relay.set_sysctl(sysctl, 1)
    apply(fresh_lab, recipe)
    # A listener without a mark: the relay's own, which its listeners have, would help the usual recipe.
    with fresh_lab.relay.socket() as listener:
        listener.setsockopt(socket.SOL_IP, linux.IP_TRANSPARENT, 1)
        listener.bind(("0.0.0.0", 15006))
        listener.listen()
        expected = "connected" if recipe == "ours" else "no answer"
        assert attempt(fresh_lab.client, fresh_lab.server.ipv4, PORT) == expected


@BOTH
def test_without_a_relay(recipe: str, fresh_lab: Lab) -> None:
    apply(fresh_lab, recipe)
    with fresh_lab.server.listen(PORT):
        expected = "connected" if recipe == "ours" else "no answer"
        assert attempt(fresh_lab.client, fresh_lab.server.ipv4, PORT) == expected


NFT_IN_OUTPUT = textwrap.dedent("""\
    table inet other {
        chain output {
            type route hook output priority mangle;
            tcp dport 8080 tproxy to :15002
        }
    }
    """)


def test_tproxy_in_output_is_refused(fresh_lab: Lab) -> None:
    lines = block(PAGE, "usual-output")
    for text in (lines, lines.replace("iptables", "iptables-legacy", 1)):
        if programs.find(text.split()[0]) is not None:
            done = fresh_lab.relay.run(["sh", "-c", text], check=False)
            assert done.returncode and "Invalid argument" in done.stderr
    done = fresh_lab.relay.run(["nft", "-f", "-"], input=NFT_IN_OUTPUT, check=False)
    assert done.returncode and "Operation not supported" in done.stderr


def test_everything_marked_in_output_makes_the_relay_talk_to_itself(fresh_lab: Lab) -> None:
    apply(fresh_lab, "usual")
    run(fresh_lab, block(PAGE, "usual-mark"))
    with fresh_lab.relay_process() as relay, fresh_lab.server.listen(PORT):
        see_reset(fresh_lab.relay, fresh_lab.server.ipv4, PORT)[0].close()
        relay.wait_for_record(lambda record: record["outcome"] == "loop")


def test_and_with_ours_it_does_not(fresh_lab: Lab) -> None:
    outbound = next(line for line in block(PAGE, "run").splitlines() if "outbound" in line)
    with fresh_lab.relay_process(*options(outbound)) as relay:
        client, _ = talk(fresh_lab.relay, fresh_lab.server, 443)
        with client:
            assert relay.record_of(client)["outcome"] == "completed"
        relay.stop()
        assert len(relay.records()) == 1
