"""Opening and inheriting listeners: what comes out, and the one line for each thing that can go wrong."""

import errno
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

import children
import lines as lines_module
import loopback
import pytest
from deadlines import PATIENCE
from lines import Lines
from rows import Seen

from tproxy_relay.errors import CapabilityMissingError, KernelUnsupportedError, SystemRefusedError
from tproxy_relay.intercept import programs
from tproxy_relay.net import endpoint, ingress, linux, listeners
from tproxy_relay.net.sockets import Tuning
from tproxy_relay.settings import Settings

pytestmark = pytest.mark.usefixtures("nothing_left_behind")

TUNED = Tuning(keepalive=40, user_timeout=7.5, mark=0)


def plain(**more: object) -> Settings:
    """Settings that need no capability, on a port of the kernel's choice."""
    return Settings(**{"mode": "redirect", "bind": ("127.0.0.1",), "ports": (0,), **more})  # type: ignore[arg-type]


@pytest.fixture
def opened() -> Iterator[Callable[..., list[listeners.Listener]]]:
    made: list[listeners.Listener] = []

    def open_all(settings: Settings, tuning: Tuning = TUNED) -> list[listeners.Listener]:
        these = listeners.open_all(settings, tuning)
        made.extend(these)
        return these

    yield open_all
    listeners.close_all(made)
    assert not made


def option(sock: socket.socket, level: int, name: int) -> int:
    """An option that is a number."""
    return sock.getsockopt(level, name)


# --- opened here


def test_every_address_with_every_port(opened: Callable[..., list[listeners.Listener]]) -> None:
    made = opened(plain(bind=("127.0.0.1", "127.0.0.2"), ports=(0, 0)))
    assert [one.endpoint.host for one in made] == ["127.0.0.1", "127.0.0.1", "127.0.0.2", "127.0.0.2"]
    for one in made:
        assert one.name == str(one.endpoint) == str(endpoint.from_sockaddr(one.sock.getsockname()))
        with loopback.dial(one.endpoint[:2]):
            one.sock.setblocking(True)
            one.sock.settimeout(PATIENCE)
            one.sock.accept()[0].close()


def test_accept_does_not_block_and_the_descriptor_is_not_inherited(
    opened: Callable[..., list[listeners.Listener]],
) -> None:
    (one,) = opened(plain())
    assert not one.sock.get_inheritable()
    with pytest.raises(BlockingIOError):
        one.sock.accept()


def test_a_restart_finds_its_port_free_beside_old_connections(opened: Callable[..., list[listeners.Listener]]) -> None:
    (one,) = opened(plain())
    port = one.endpoint.port
    with loopback.dial(one.endpoint[:2]) as client:
        accepted, _ = one.sock.accept()
        with accepted:
            one.close()
            (again,) = opened(plain(ports=(port,)))
            assert again.endpoint.port == port
            client.close()


def test_what_an_accepted_socket_inherits(opened: Callable[..., list[listeners.Listener]]) -> None:
    """All that sockets.tune sets; with an option that Linux did not pass on, tune would be needed per connection."""
    (one,) = opened(plain())
    with loopback.dial(one.endpoint[:2]):
        one.sock.setblocking(True)
        accepted, _ = one.sock.accept()
        with accepted:
            sol, tcp = socket.SOL_SOCKET, socket.IPPROTO_TCP
            assert accepted.gettimeout() is None
            assert accepted.getsockopt(sol, socket.SO_LINGER, 8) == linux.LINGER.pack(1, 0)
            assert accepted.getsockopt(sol, socket.SO_SNDTIMEO, 16) == linux.TIMEVAL.pack(1, 0)
            assert accepted.getsockopt(sol, socket.SO_RCVTIMEO, 16) == linux.TIMEVAL.pack(0, 0)
            assert option(accepted, sol, socket.SO_OOBINLINE) == 1
            assert option(accepted, sol, socket.SO_KEEPALIVE) == 1
            assert option(accepted, tcp, socket.TCP_NODELAY) != 0
            assert option(accepted, tcp, socket.TCP_KEEPIDLE) == 40
            assert option(accepted, tcp, socket.TCP_KEEPINTVL) == 10
            assert option(accepted, tcp, socket.TCP_KEEPCNT) == 48
            assert option(accepted, tcp, socket.TCP_USER_TIMEOUT) == 7500


def test_the_backlog_is_deep(opened: Callable[..., list[listeners.Listener]]) -> None:
    (one,) = opened(plain())
    clients = []
    try:
        for _ in range(200):
            clients.append(loopback.dial(one.endpoint[:2]))
    finally:
        for client in clients:
            client.close()


@pytest.mark.usefixtures("ipv6_loopback")
def test_the_ipv6_listener_takes_no_ipv4(opened: Callable[..., list[listeners.Listener]]) -> None:
    """So that 0.0.0.0 and :: fit beside each other on one port."""
    (one,) = opened(plain(bind=("::",)))
    (other,) = opened(plain(bind=("0.0.0.0",), ports=(one.endpoint.port,)))
    assert other.endpoint.port == one.endpoint.port
    assert option(one.sock, socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) == 1


def test_a_taken_port() -> None:
    with loopback.listen() as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SystemRefusedError) as caught:
            listeners.open_all(plain(ports=(0, port)), TUNED)
    assert str(caught.value) == (
        f"cannot listen on 127.0.0.1:{port}: the port is taken; `ss -ltnp 'sport = :{port}'` shows by whom. "
        "Stop that program, or choose other ports with --ports"
    )
    assert caught.value.exit_code == 71


def test_an_address_that_is_not_ours() -> None:
    with pytest.raises(SystemRefusedError, match=r"192\.0\.2\.1:0: no interface has that address .* --bind"):
        listeners.open_all(plain(bind=("127.0.0.1", "192.0.2.1")), TUNED)


def reached(listener: listeners.Listener) -> bool:
    """Whether a client on lo is answered."""
    try:
        socket.create_connection(listener.endpoint[:2], timeout=0.3).close()
    except TimeoutError:
        return False
    return True


def test_an_interface(opened: Callable[..., list[listeners.Listener]]) -> None:
    (one,) = opened(plain(interface="lo"))
    assert one.sock.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16) == b"", "connections would inherit it"
    assert reached(one)


@pytest.mark.usefixtures("network")
def test_an_interface_that_is_not_there_is_waited_for(opened: Callable[..., list[listeners.Listener]]) -> None:
    programs.run(["ip", "link", "set", "lo", "up"])
    (one,) = opened(plain(interface="nope0"))
    assert not reached(one)
    listeners.confine(one, "lo")
    assert reached(one)
    listeners.confine(one, "nope0")
    assert not reached(one)
    listeners.confine(one, None)
    assert reached(one)


@pytest.mark.usefixtures("network")
def test_a_stored_listener_that_was_bound_to_an_interface_is_bound_no_more(
    opened: Callable[..., list[listeners.Listener]],
) -> None:
    """A relay of before has stored it: its connections would end with the interface."""
    programs.run(["ip", "link", "set", "lo", "up"])
    (one,) = opened(plain())
    one.sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo\0")
    stored = listeners.Listener(one.sock, one.wanted, stored=True)
    assert listeners.open_all(plain(interface="lo"), TUNED, [stored]) == [stored]
    assert ingress.bound_to(one.sock) == 0


def test_to_wait_for_an_interface_takes_a_capability(require_or_skip: Callable[[str], NoReturn]) -> None:
    """Of this kernel: on others a filter takes none."""
    prefix = children.traced("setsockopt", "EPERM:when=2", "trace=setsockopt", require_or_skip)
    answer = open_in_child(prefix, bind=["127.0.0.1"], ports=[0], mode="redirect", interface="nope0")
    assert answer["code"] == 71
    assert answer["error"] == (
        "no interface 'nope0' on this host (`ip link` lists them); to wait for it takes CAP_NET_ADMIN"
    )


def test_a_link_local_address_is_of_an_interface_that_is_there() -> None:
    with pytest.raises(SystemRefusedError, match=r"\[fe80::1\]:0: nope0 has that address, and there is"):
        listeners.open_all(plain(bind=("fe80::1",), interface="nope0"), TUNED)


@pytest.mark.usefixtures("network")
def test_a_link_local_address(opened: Callable[..., list[listeners.Listener]]) -> None:
    programs.run(["ip", "link", "set", "lo", "up"])
    programs.run(["ip", "address", "add", "fe80::1/64", "dev", "lo", "nodad"])
    (one,) = opened(plain(bind=("fe80::1",), interface="lo"))
    assert one.name == f"[fe80::1%1]:{one.endpoint.port}"


# --- some are there already


def test_what_is_there_is_kept_and_the_rest_opened(opened: Callable[..., list[listeners.Listener]]) -> None:
    first, second = opened(plain(bind=("127.0.0.1", "127.0.0.2")))
    settings = plain(bind=("127.0.0.2", "127.0.0.3"))
    again = listeners.open_all(settings, TUNED, [first, second])
    assert again[0] is second, "known by the address that was asked for, though the kernel chose the port"
    assert again[1].endpoint.host == "127.0.0.3"
    assert first.sock.fileno() >= 0, "whether it is closed is not decided here"
    listeners.close_all(again[1:])


def test_what_was_there_stays_open_when_another_one_cannot_be_opened(
    opened: Callable[..., list[listeners.Listener]],
) -> None:
    (first,) = opened(plain())
    with pytest.raises(SystemRefusedError, match="no interface has that address"):
        listeners.open_all(plain(bind=("127.0.0.1", "127.0.0.3", "192.0.2.1")), TUNED, [first])
    loopback.dial(first.endpoint[:2]).close()


@pytest.mark.parametrize("tuning", [Tuning(0, 0, 0), Tuning(5, 0, 0), Tuning(0, 3, 0)])
def test_a_listener_can_be_tuned_anew(opened: Callable[..., list[listeners.Listener]], tuning: Tuning) -> None:
    (one,) = opened(plain())
    listeners.tune(one, tuning)
    with loopback.dial(one.endpoint[:2]):
        one.sock.setblocking(True)
        accepted, _ = one.sock.accept()
        with accepted:
            assert option(accepted, socket.SOL_SOCKET, socket.SO_KEEPALIVE) == bool(tuning.keepalive)
            assert option(accepted, socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == tuning.user_timeout * 1000


# --- in a process of its own, where rights or the kernel differ

OPEN = """
import json, logging, os, sys
from tproxy_relay.net import listeners, sockets
from tproxy_relay.errors import RelayError
from tproxy_relay.settings import Settings

said = []
class Keep(logging.Handler):
    def emit(self, record):
        said.append([record.levelname, record.getMessage()])
logging.getLogger().addHandler(Keep())
settings = Settings(**{k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(sys.argv[1]).items()})
try:
    tuning = sockets.Tuning(0, 0, 0)
    made, unfit = listeners.adopt_all(settings, os.environ)
    for one in made:
        listeners.tune(one, tuning)
    stored = [one.stored for one in made]
    made = made or listeners.open_all(settings, tuning)
    names = [one.name for one in made]
    assert not any(one.sock.get_inheritable() for one in made), "a child would hold the port"
    transparent = [sockets.is_transparent(one.sock) for one in made]
    listeners.close_all(made)
    print(json.dumps({"names": names, "transparent": transparent, "said": said, "stored": stored, "unfit": unfit}))
except RelayError as error:
    print(json.dumps({"error": str(error), "code": error.exit_code, "kind": type(error).__name__, "said": said}))
"""


def open_in_child(prefix: tuple[str, ...], **settings: object) -> dict[str, object]:
    """What open_all says in a process that is started with `prefix`."""
    ran = children.run_python(OPEN, json.dumps(settings), prefix=prefix)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == "", "something was not closed"
    answer: dict[str, object] = json.loads(ran.stdout)
    return answer


def test_tproxy_without_the_capability(require_or_skip: Callable[[str], NoReturn]) -> None:
    prefix = children.need(children.no_capabilities() or ("env",), require_or_skip)
    answer = open_in_child(prefix, bind=["127.0.0.1"], ports=[0])
    assert answer["kind"] == CapabilityMissingError.__name__
    assert answer["code"] == 77
    for word in ("127.0.0.1:0", "CAP_NET_RAW", "AmbientCapabilities", "setpriv", "--mode redirect"):
        assert word in str(answer["error"])
    assert "\n" not in str(answer["error"])


def test_redirect_needs_no_capability(require_or_skip: Callable[[str], NoReturn]) -> None:
    prefix = children.need(children.no_capabilities() or ("env",), require_or_skip)
    answer = open_in_child(prefix, bind=["127.0.0.1"], ports=[0], mode="redirect", interface="lo")
    assert answer["transparent"] == [False]


def test_tproxy_with_the_capability(require_or_skip: Callable[[str], NoReturn]) -> None:
    prefix = children.need(children.NETWORK, require_or_skip)
    answer = open_in_child(prefix, ports=[15002, 15006])
    assert answer["names"] == ["0.0.0.0:15002", "0.0.0.0:15006", "[::]:15002", "[::]:15006"]
    assert answer["transparent"] == [True] * 4
    assert answer["said"] == []


def test_a_low_port_without_the_capability(require_or_skip: Callable[[str], NoReturn]) -> None:
    lower = ("sh", "-c", 'echo 1024 >/proc/sys/net/ipv4/ip_unprivileged_port_start && exec "$@"', "sh")
    inside = (*children.NETWORK, *lower, *children.WITHOUT_CAPABILITIES)
    prefix = children.need(inside, require_or_skip)
    answer = open_in_child(prefix, bind=["127.0.0.1"], ports=[80], mode="redirect")
    assert answer["code"] == 71
    assert "CAP_NET_BIND_SERVICE" in str(answer["error"])


@pytest.mark.parametrize("number", ["ENOPROTOOPT", "EOPNOTSUPP"])
def test_a_kernel_without_tproxy(number: str, require_or_skip: Callable[[str], NoReturn]) -> None:
    """The first setsockopt of a listener is SO_REUSEADDR, the second IP_TRANSPARENT."""
    prefix = children.traced("setsockopt", f"{number}:when=2", "trace=setsockopt", require_or_skip)
    answer = open_in_child((*prefix,), bind=["127.0.0.1"], ports=[0])
    assert answer["kind"] == KernelUnsupportedError.__name__
    assert answer["code"] == 69
    assert "CONFIG_NETFILTER_XT_TARGET_TPROXY" in str(answer["error"])
    assert os.strerror(getattr(errno, number)) in str(answer["error"])


@pytest.mark.row("H23", "no IPv6 on the host", "listens on IPv4, one warning")
def test_a_host_without_ipv6_listens_on_ipv4_and_says_so_once(
    require_or_skip: Callable[[str], NoReturn], seen: Seen
) -> None:
    """As after a boot with ipv6.disable=1. (With the sysctl disable_ipv6=1 the wildcard can still be bound.)"""
    prefix = children.traced("socket", "EAFNOSUPPORT:when=3+", "trace=socket", require_or_skip)
    for address in ("::", "::1"):
        answer = open_in_child(prefix, bind=["127.0.0.1", address], ports=[0, 0], mode="redirect")
        assert len(answer["names"]) == 2  # type: ignore[arg-type]
        assert answer["said"] == [["WARNING", "no IPv6 on this host, listening on IPv4 only"]]
    seen("IPv4, one warning")


def test_with_the_ipv6_sysctl_off_everything_works_as_ever(require_or_skip: Callable[[str], NoReturn]) -> None:
    off = ("sh", "-c", 'echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6 && exec "$@"', "sh")
    prefix = children.need((*children.NETWORK, *off), require_or_skip)
    answer = open_in_child(prefix, ports=[15002])
    assert answer["names"] == ["0.0.0.0:15002", "[::]:15002"]


def test_with_the_ipv6_sysctl_off_the_loopback_address_may_come(require_or_skip: Callable[[str], NoReturn]) -> None:
    off = ("sh", "-c", 'echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6 && exec "$@"', "sh")
    prefix = children.need((*children.NETWORK, *off), require_or_skip)
    answer = open_in_child(prefix, bind=["127.0.0.1", "::1"], ports=[15002], mode="redirect")
    assert answer["names"] == ["127.0.0.1:15002", "[::1]:15002"], "it may come"
    assert answer["said"] == []


def test_another_ipv6_address_on_a_host_without_ipv6_is_an_error(require_or_skip: Callable[[str], NoReturn]) -> None:
    off = ("sh", "-c", 'echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6 && exec "$@"', "sh")
    prefix = children.need((*children.NETWORK, *off), require_or_skip)
    answer = open_in_child(prefix, bind=["127.0.0.1", "2001:db8::1"], ports=[15002], mode="redirect")
    assert answer["code"] == 71
    assert "no interface has that address" in str(answer["error"])


def test_ipv6_only_on_a_host_without_it(require_or_skip: Callable[[str], NoReturn]) -> None:
    prefix = children.traced("socket", "EAFNOSUPPORT", "trace=socket", require_or_skip)
    answer = open_in_child(prefix, bind=["::"], ports=[0], mode="redirect")
    assert (answer["code"], answer["error"]) == (71, "none of the addresses :: exists on this host")


# --- inherited

INHERIT = """
import os, socket, sys
from tproxy_relay.net import linux
kinds = sys.argv[1].split(",")
os.closerange(3, 64)
kept = []
for number, kind in enumerate(kinds, 3):
    if kind == "file":
        fd = os.open("/dev/null", os.O_RDONLY)
    elif kind == "pipe":
        fd = os.pipe()[0]
    elif kind == "none":
        continue
    else:
        family = socket.AF_INET6 if "6" in kind else socket.AF_UNIX if "unix" in kind else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_DGRAM if "udp" in kind else socket.SOCK_STREAM)
        if "dual" in kind:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        if "transparent" in kind:
            sock.setsockopt(*((socket.IPPROTO_IPV6, 75) if "6" in kind else (socket.SOL_IP, 19)), 1)
        if "unix" in kind:
            sock.bind("")
        if "tcp" in kind and "unbound" not in kind:
            sock.bind(("::" if "6" in kind else "127.0.0.1", 0))
        if "listening" in kind:
            sock.listen(5)
        fd = sock.detach()
    os.dup2(fd, 100 + number)
    os.close(fd)
for number, kind in enumerate(kinds, 3):
    if kind != "none":
        os.dup2(100 + number, number, inheritable=True)
        os.close(100 + number)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(kinds)), LISTEN_FDNAMES=sys.argv[2])
os.execv(sys.executable, [sys.executable, "-c", *sys.argv[3:]])
"""


def inherit(kinds: str, mode: str, prefix: tuple[str, ...] = (), names: str = "") -> dict[str, object]:
    """What adopt_all says in a process that was given these descriptors."""
    ran = children.run_python(INHERIT, kinds, names, OPEN, json.dumps({"mode": mode}), prefix=prefix)
    assert ran.returncode == 0, ran.stderr
    answer: dict[str, object] = json.loads(ran.stdout)
    return answer


def test_inherited_listeners_are_used_in_their_order() -> None:
    answer = inherit("tcp-listening,tcp-listening", "redirect")
    assert [str(name).rpartition(":")[0] for name in answer["names"]] == ["127.0.0.1"] * 2  # type: ignore
    assert answer["said"] == []


def test_a_listener_that_a_relay_has_left_with_the_service_manager_is_known_by_its_name() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        name = listeners.Listener(sock).stored_name
    assert ":" not in name
    answer = inherit("tcp-listening,tcp-listening,tcp-listening", "redirect", names=f"tproxy-relay.socket:{name}")
    assert answer["stored"] == [False, True, False]


def test_a_stored_listener_that_will_not_do_is_left_alone() -> None:
    """The service manager is told to forget it."""
    stored = [f"{listeners.STORED_PREFIX}{number}" for number in range(4)]
    answer = inherit("udp,tcp-listening,tcp,file", "redirect", names=":".join(stored))
    assert (answer["stored"], answer["unfit"]) == ([True], [stored[0], *stored[2:]])


def test_inherited_transparent_listeners(require_or_skip: Callable[[str], NoReturn]) -> None:
    prefix = children.need(children.NETWORK, require_or_skip)
    answer = inherit("tcp-listening-transparent,tcp6-listening-transparent", "tproxy", prefix)
    assert answer["transparent"] == [True, True]


@pytest.mark.parametrize(
    ("kinds", "mode", "complaint"),
    [
        ("tcp-listening,none", "redirect", "inherited descriptor 4 is not a socket (Bad file descriptor)"),
        ("file", "redirect", "inherited descriptor 3 is not a socket (Socket operation on non-socket)"),
        ("pipe", "redirect", "inherited descriptor 3 is not a socket (Socket operation on non-socket)"),
        ("udp", "redirect", "inherited descriptor 3 is not a TCP socket"),
        ("unix-listening", "redirect", "inherited descriptor 3 is not a TCP socket"),
        ("tcp", "redirect", "inherited descriptor 3 is not listening"),
        ("tcp-unbound", "redirect", "inherited descriptor 3 is not listening"),
        (
            "tcp-listening",
            "tproxy",
            "inherited descriptor 3 is not transparent: the kernel would give it no intercepted connection. "
            "Set `Transparent=yes`",
        ),
    ],
)
@pytest.mark.row("B16", "LISTEN_FDS with what will not do", "a clear error")
def test_an_unfit_descriptor_stops_the_start(kinds: str, mode: str, complaint: str, seen: Seen) -> None:
    answer = inherit(kinds, mode)
    assert (answer.get("error"), answer.get("code")) == (complaint, 71)
    seen("named")


def test_a_count_that_is_none_stops_the_start() -> None:
    environ = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "two"}
    with pytest.raises(SystemRefusedError, match="LISTEN_FDS is 'two', not a number"):
        listeners.adopt_all(plain(), environ)
    assert environ == {}


@pytest.mark.usefixtures("ipv6_loopback")
def test_a_dual_stack_listener_shows_ipv4_clients_as_ipv4() -> None:
    with socket.socket(socket.AF_INET6) as raw:
        raw.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        raw.bind(("::", 0))
        raw.listen(5)
        raw.settimeout(PATIENCE)
        port = raw.getsockname()[1]
        with loopback.dial(("127.0.0.1", port)) as client:
            accepted, address = raw.accept()
            with accepted:
                assert address[0] == "::ffff:127.0.0.1"
                assert endpoint.from_sockaddr(address) == endpoint.from_sockaddr(client.getsockname())
                assert str(endpoint.from_sockaddr(accepted.getsockname())) == f"127.0.0.1:{port}"


def test_nothing_is_said_when_all_is_well(opened: Callable[..., list[listeners.Listener]]) -> None:
    with lines_module.collected() as lines:
        opened(plain())
    assert not Lines.of(lines, "no IPv6 on this host, listening on IPv4 only")
    assert not lines.records


def test_an_address_that_is_not_ours_is_refused_in_both_modes(require_or_skip: Callable[[str], NoReturn]) -> None:
    """A transparent socket may bind to any address: a mistyped one would wait for connections that never come."""
    network = children.need(children.NETWORK, require_or_skip)
    for mode in ("tproxy", "redirect"):
        line = [*network, sys.executable, "-m", "tproxy_relay", "--config", "/dev/null", "--log-level", "error"]
        line += ["--mode", mode, "--bind", "192.0.2.77"]
        done = subprocess.run(line, capture_output=True, text=True, timeout=20, check=False, env=children.environment())
        assert done.returncode == 71, done.stderr
        assert "no interface has that address" in done.stderr
