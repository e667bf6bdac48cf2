"""Sockets, programs and sysctls of one host at a time."""

import errno
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tproxy_relay.lab import Lab, LabError

FAMILIES = {"v4": socket.AF_INET, "v6": socket.AF_INET6}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_a_connection_through_the_lab_with_sockets_of_this_process(lab: Lab, family: int) -> None:
    with lab.server.listen(7000, family) as listener:
        with lab.client.connect(lab.server.address(family), 7000) as client:
            server, peer = listener.accept()
            with server:
                assert peer == client.getsockname()
                assert peer[0] == lab.client.address(family)
                client.sendall(b"hello")
                assert server.recv(10) == b"hello"


def test_the_sockets_are_ordinary(lab: Lab) -> None:
    with lab.client.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
        assert type(sock) is socket.socket
        assert (sock.family, sock.type) == (socket.AF_INET6, socket.SOCK_DGRAM)
        assert not sock.get_inheritable(), "a child would keep the connection open"
        assert sock.getblocking()


def test_the_agent_keeps_no_descriptor_of_what_it_gave_away(lab: Lab) -> None:
    before = descriptors_of_the_agent(lab)
    for _ in range(20):
        lab.client.socket().close()
    assert descriptors_of_the_agent(lab) == before


def descriptors_of_the_agent(lab: Lab) -> int:
    lab.client.sysctl("net.ipv4.ip_default_ttl")  # it answers when it is done with what it was asked before
    return len(os.listdir(f"/proc/{lab.client.pid}/fd"))


def test_a_socket_that_cannot_be_made_raises_what_it_would_raise_here(lab: Lab) -> None:
    with pytest.raises(OSError) as caught:
        lab.client.socket(socket.AF_INET, 77)
    assert caught.value.errno == errno.EINVAL
    lab.client.socket().close()  # and the agent lives on


def test_nothing_listens_means_refused(lab: Lab) -> None:
    with pytest.raises(ConnectionRefusedError):
        lab.client.connect(lab.server.ipv4, 7999)


def test_sysctls_are_the_hosts_own(lab: Lab) -> None:
    here = Path("/proc/sys/net/ipv4/ip_default_ttl").read_text()
    lab.client.set_sysctl("net.ipv4.ip_default_ttl", 17)
    assert lab.client.sysctl("net.ipv4.ip_default_ttl") == "17"
    assert lab.server.sysctl("net.ipv4.ip_default_ttl") != "17"
    assert Path("/proc/sys/net/ipv4/ip_default_ttl").read_text() == here
    with pytest.raises(FileNotFoundError):
        lab.client.sysctl("net.ipv4.no_such_thing")


def test_the_relay_forwards_and_nobody_paces(lab: Lab) -> None:
    assert lab.relay.sysctl("net.ipv4.ip_forward") == "1"
    assert lab.relay.sysctl("net.ipv6.conf.all.forwarding") == "1"
    assert {host.sysctl("net.ipv4.tcp_congestion_control") for host in lab.hosts} == {"reno"}


def test_programs_run_on_their_host(lab: Lab) -> None:
    assert f"inet {lab.server.ipv4}/" in lab.server.run(["ip", "-o", "addr"]).stdout
    assert f"inet {lab.server.ipv4}/" not in lab.client.run(["ip", "-o", "addr"]).stdout


def test_a_program_that_fails_is_an_error_with_its_words(lab: Lab) -> None:
    with pytest.raises(LabError, match="no-such-device"):
        lab.client.run(["ip", "link", "show", "no-such-device"])
    assert lab.client.run(["ip", "link", "show", "no-such-device"], check=False).returncode != 0


def test_a_programs_pid_is_its_own_and_its_session_too(lab: Lab) -> None:
    tell = "import os; print(os.getpid(), os.getsid(0))"
    with lab.server.start([sys.executable, "-I", "-S", "-c", tell], stdout=subprocess.PIPE) as program:
        assert program.stdout is not None
        assert program.stdout.read().split() == [str(program.pid).encode()] * 2


def test_the_command_prefix_works_for_anybody_else_too(lab: Lab) -> None:
    command = lab.client.command(["ip", "-o", "addr"])
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"inet {lab.client.ipv4}/" in done.stdout
