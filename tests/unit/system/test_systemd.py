"""sd_notify and sd_listen_fds, against real datagram sockets and hostile variables."""

import os
import socket
from pathlib import Path

import children
import pytest
from deadlines import PATIENCE

from tproxy_relay.system import systemd

pytestmark = pytest.mark.usefixtures("nothing_left_behind")


@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_the_state_arrives(tmp_path: Path, kind: str) -> None:
    name = str(tmp_path / "notify") if kind == "path" else f"@tproxy-relay-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(PATIENCE)
        manager.bind(name if kind == "path" else "\0" + name[1:])
        systemd.notify("READY=1", {"NOTIFY_SOCKET": name})
        systemd.notify("STOPPING=1", {"NOTIFY_SOCKET": name})
        assert [manager.recv(100), manager.recv(100)] == [b"READY=1", b"STOPPING=1"]


@pytest.mark.parametrize(
    "value",
    ["", "relative", "/nobody/there", "@", "@nobody", "/" + "x" * 300, "@" + "x" * 300, "vsock:2:1", "/dev/null"],
)
def test_a_manager_that_cannot_be_reached_is_nobodys_problem(value: str) -> None:
    systemd.notify("READY=1", {"NOTIFY_SOCKET": value})


def test_no_manager() -> None:
    systemd.notify("READY=1", {})


def test_a_manager_that_does_not_read_holds_nobody_up(tmp_path: Path) -> None:
    name = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(name)
        for _ in range(2000):  # more than its queue takes
            systemd.notify("READY=1", {"NOTIFY_SOCKET": name})


NO_DESCRIPTORS = """
import os, resource
from tproxy_relay.system import systemd as notify
import socket, encodings.idna
resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) - 1, 100))
try:
    socket.socket()
except OSError:
    notify.notify("STOPPING=1", {"NOTIFY_SOCKET": "/run/nobody"})
    print("survived")
"""


def test_without_a_descriptor_to_spare_it_is_nobodys_problem_either() -> None:
    """The relay says STOPPING when it may be at its limit."""
    ran = children.run_python(NO_DESCRIPTORS)
    assert (ran.stdout, ran.stderr) == ("survived\n", "")


def passed(count: str, pid: str | None = None) -> dict[str, str]:
    """The variables of a manager that passes descriptors to this process, or to another."""
    return {
        "LISTEN_FDS": count,
        "LISTEN_PID": str(os.getpid()) if pid is None else pid,
        "LISTEN_FDNAMES": "inbound:outbound",
        "OTHER": "stays",
    }


def test_inherited_descriptors() -> None:
    environ = passed("2")
    assert systemd.inherited_descriptors(environ) == [(3, "inbound"), (4, "outbound")]
    assert environ == {"OTHER": "stays"}, "a child must not take them for its own"
    assert systemd.inherited_descriptors(environ) == []


@pytest.mark.parametrize(
    "pid",
    ["", "1", str(os.getpid() + 1), f" {os.getpid()}", "self"],
    ids=["none", "another", "the next one", "blank", "word"],
)
def test_descriptors_of_another_process_are_not_ours(pid: str) -> None:
    environ = passed("2", pid)
    assert systemd.inherited_descriptors(environ) == []
    assert environ == {"OTHER": "stays"}


def test_none_passed() -> None:
    assert systemd.inherited_descriptors({}) == []
    assert systemd.inherited_descriptors(passed("")) == []
    assert systemd.inherited_descriptors(passed("0")) == []


@pytest.mark.parametrize("count", ["-1", "two", "1.0", "1e3", "٣", " 2", "2\n", "1024", "9" * 20, "0x2", "²"])
def test_a_count_that_is_none(count: str) -> None:
    with pytest.raises(ValueError, match="LISTEN_FDS is .*, not a number of descriptors"):
        systemd.inherited_descriptors(passed(count))
