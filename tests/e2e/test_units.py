"""The files for systemd: that it takes them, how exposed the service is, and that the relay works with what they leave
it. No systemd runs here, so setpriv(1) does what the unit says of capabilities."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import pytest
from accounts import ACCOUNT, HAVE_ACCOUNTS, becoming, for_all_accounts
from activation import passing
from deadlines import PATIENCE, wait_until
from interception import BOTH_WAYS, FAMILIES, OWN_SERVERS, PORT, EchoServer, opened, ping, ways
from rows import Seen

from tproxy_relay.config import loader
from tproxy_relay.lab import Lab, RelayProcess
from tproxy_relay.net import listeners
from tproxy_relay.settings import Settings
from tproxy_relay.supervisor import workers

pytestmark = pytest.mark.slow

ETC = Path(__file__).parents[2] / "etc"
UNITS = ETC / "systemd"
MOST_EXPOSED = "20"
"""Tenths of the 10 that `systemd-analyze security` gives a service without any restriction."""

Need = Callable[[str], NoReturn]


def settings(name: str) -> dict[str, list[str]]:
    """Of a unit: the values of each key."""
    found: dict[str, list[str]] = {}
    for line in (UNITS / name).read_text().splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(key, []).append(value)
    return found


@pytest.fixture
def installed(tmp_path: Path, require_or_skip: Need) -> Path:
    """The units, with a program that is there."""
    if shutil.which("systemd-analyze") is None:
        require_or_skip("systemd-analyze is not installed")
    for unit in UNITS.glob("*.*"):
        if unit.is_file():
            text = unit.read_text().replace("/usr/sbin/tproxy-relay", "/bin/true")
            (tmp_path / unit.name).write_text(text)
    return tmp_path


def analyze(*arguments: object) -> "subprocess.CompletedProcess[str]":
    """systemd-analyze(1)."""
    return subprocess.run(["systemd-analyze", *map(str, arguments)], capture_output=True, text=True, check=False)


def test_systemd_understands_every_line(installed: Path) -> None:
    told = analyze("verify", "--recursive-errors=no", "--man=no", *installed.iterdir())
    assert (told.returncode, told.stderr) == (0, "")


def test_systemd_understands_the_drop_in(installed: Path) -> None:
    folder = installed / "tproxy-relay.service.d"
    folder.mkdir()
    shutil.copy(UNITS / folder.name / "socket.conf", folder)
    told = analyze("verify", "--recursive-errors=no", "--man=no", installed / "tproxy-relay.service")
    assert (told.returncode, told.stderr) == (0, "")


def test_systemd_makes_the_account_and_the_folder(tmp_path: Path, require_or_skip: Need) -> None:
    """The folder is the one that the unit would make."""
    if os.geteuid():
        require_or_skip("it takes root to make an account")
    (tmp_path / "etc").mkdir()
    for tool, *options in (("systemd-sysusers",), ("systemd-tmpfiles", "--create")):
        if shutil.which(tool) is None:
            require_or_skip(f"{tool} is not installed")
        file = ETC / f"{tool.removeprefix('systemd-')}.d/tproxy-relay.conf"
        subprocess.run([tool, *options, f"--root={tmp_path}", str(file)], check=True)
    name, _, uid, gid, *rest = (tmp_path / "etc/passwd").read_text().strip().split(":")
    assert name == "tproxy-relay" and rest[-1] == "/usr/sbin/nologin"
    made, service = (tmp_path / "var/log/tproxy-relay").stat(), settings("tproxy-relay.service")
    assert (made.st_uid, made.st_gid) == (int(uid), int(gid)) and service["User"] == service["Group"] == [name]
    assert service["LogsDirectory"] == [name]
    assert made.st_mode & 0o7777 == int(service["LogsDirectoryMode"][0], 8)


@pytest.mark.row("S15", "systemd-analyze security", "at most 2.0")
def test_the_service_can_do_little_else(installed: Path, seen: Seen) -> None:
    told = analyze("security", "--offline=true", f"--threshold={MOST_EXPOSED}", installed / "tproxy-relay.service")
    assert told.returncode == 0, told.stdout[-200:]
    seen("within")


def test_there_is_time_to_drain_and_room_for_threads() -> None:
    service = settings("tproxy-relay.service")
    longest = Settings.drain_timeout + workers.HANDSHAKE_GRACE
    assert float(service["TimeoutStopSec"][0].removesuffix("s")) > longest
    assert service["ExecStart"] == ["/usr/sbin/tproxy-relay run"]
    assert service["ExecReload"] == ["/usr/sbin/tproxy-relay run --print-config", "/bin/kill -HUP $MAINPID"]
    # Two descriptors and two threads for each connection.
    assert int(service["TasksMax"][0]) >= int(service["LimitNOFILE"][0]) <= int(service["LimitNPROC"][0])
    assert int(service["FileDescriptorStoreMax"][0]) >= len(unit_sockets())


def test_the_sockets_are_those_of_the_shipped_configuration() -> None:
    shipped = loader.load(["--config", str(ETC / "tproxy-relay.conf")], {}).settings
    assert unit_sockets() == [(address, str(port)) for address in shipped.bind for port in shipped.ports]
    unit = settings("tproxy-relay.socket")
    assert unit["Backlog"] == [str(listeners.BACKLOG)]
    assert unit["Transparent"] == ["yes"] and shipped.mode == "tproxy"


# --- the relay with no more than they leave it

SANDBOX = """\
set -e
mount --make-rprivate /
mount -o bind,remount,ro /
mount -t proc -o hidepid=invisible none /proc
mount --bind /proc/sys /proc/sys
mount -o bind,remount,ro /proc/sys
exec "$@"
"""
"""ProtectSystem=strict, ProtectProc=invisible, ProtectKernelTunables=yes."""


def words(key: str) -> list[str]:
    """Of the service, what this key is set to."""
    return " ".join(settings("tproxy-relay.service")[key]).split()


def capabilities(key: str) -> list[str]:
    return [name.removeprefix("CAP_").lower() for name in words(key)]


def as_a_service() -> tuple[str, ...]:
    """The command that becomes the one after it, as the service is started."""
    assert words("AmbientCapabilities") == words("CapabilityBoundingSet") and words("NoNewPrivileges") == ["yes"]
    *command, end = becoming(ACCOUNT, *capabilities("AmbientCapabilities"))
    bounding = ",".join(("-all", *(f"+{name}" for name in capabilities("CapabilityBoundingSet"))))
    mounts = ("unshare", "--mount", "sh", "-c", SANDBOX, "sh")
    return (*for_all_accounts(), *mounts, *command, f"--bounding-set={bounding}", "--no-new-privs", end)


def serves(lab: Lab, relay: RelayProcess) -> None:
    """In three topologies and both families, and it takes no capability of the workers."""
    before = opened(relay)
    servers = [EchoServer(host) for host in (lab.server, lab.relay)]
    try:
        for source, destination in ways(lab).values():
            for family in FAMILIES.values():
                with source.connect(destination.address(family), PORT) as sock:
                    assert ping(sock) == ""
        wait_until(lambda: opened(relay) == before + 2 * len(ways(lab)), "all were intercepted")
    finally:
        for server in servers:
            server.close()
    assert relay.workers
    for worker in relay.workers:
        assert capabilities_of(worker) == {"CapEff": 0, "CapPrm": 0}


def capabilities_of(pid: int) -> dict[str, int]:
    """Those in force, and those that it could have in force; of every thread."""
    found = []
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        fields = dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)
        found.append({name: int(fields[name], 16) for name in ("CapEff", "CapPrm")})
    assert found and all(one == found[0] for one in found)
    return found[0]


@pytest.fixture
def accounts(lab: Lab, require_or_skip: Need) -> None:
    if not HAVE_ACCOUNTS or lab.user_namespace:
        require_or_skip("it takes root to become another account")


@pytest.mark.usefixtures("accounts")
def test_the_relay_works_within_the_limits_of_the_service(lab: Lab) -> None:
    with lab.relay_process(*BOTH_WAYS, "--user", ACCOUNT, wrapper=as_a_service()) as relay:
        serves(lab, relay)
        relay.stop()


@pytest.mark.usefixtures("accounts")
@pytest.mark.row("S16", "strace of a whole life under the unit's filter", "no forbidden call")
def test_it_makes_no_system_call_that_the_service_forbids(
    lab: Lab, tmp_path: Path, require_or_skip: Need, seen: Seen
) -> None:
    """From its start over a death of a worker and a reload to its end, all processes of it."""
    for tool in ("strace", "systemd-analyze"):
        if shutil.which(tool) is None:
            require_or_skip(f"{tool} is not installed")
    trace = tmp_path / "trace"
    # -D: the process that was started is the relay, and strace(1) is its grandchild.
    tracing = ("strace", "-D", "-f", "-q", "-e", "signal=none", "-s", "256", "-o", str(trace))
    with lab.relay_process(*BOTH_WAYS, "--user", ACCOUNT, wrapper=(*tracing, *as_a_service())) as relay:
        serves(lab, relay)
        os.kill(relay.worker, signal.SIGKILL)
        wait_until(lambda: messages(relay).count("worker started") == 2, "there is another")
        relay.signal(signal.SIGHUP)
        wait_until(lambda: "reloaded" in messages(relay), "it has read the file again")
        serves(lab, relay)
        relay.stop()
    its_end = rf"^{relay.pid} +\+\+\+ exited with 0 \+\+\+$"
    wait_until(lambda: bool(re.search(its_end, trace.read_text(), re.MULTILINE)), "strace has seen its end")
    _, _, of_the_relay = trace.read_text().partition(f'["{sys.executable}", "-m", "tproxy_relay", "run"')
    made = set(re.findall(r"^\d+ +(\w+)\(", of_the_relay, re.MULTILINE))
    assert {"accept4", "recvfrom", "sendto", "capset"} <= made
    assert made <= allowed_calls(), made - allowed_calls()
    seen("none")


# --- the socket unit


def unit_sockets() -> list[tuple[str, str]]:
    """Address and port of each socket of the unit."""
    found = [value.rpartition(":") for value in settings("tproxy-relay.socket")["ListenStream"]]
    return [(address.strip("[]"), port) for address, _, port in found]


@contextlib.contextmanager
def ruled(lab: Lab, *options: str) -> Iterator[None]:
    """Root has applied the rules, as the drop-in says."""
    command = (sys.executable, "-m", "tproxy_relay", "rules")
    lab.relay.run([*command, "apply", "--config", os.devnull, "--user", ACCOUNT, *options, *BOTH_WAYS])
    try:
        yield
    finally:
        lab.relay.run([*command, "remove", "--config", os.devnull])


@pytest.mark.usefixtures("accounts")
def test_with_the_sockets_of_the_unit_it_needs_no_capability(lab: Lab) -> None:
    unit, drop_in = settings("tproxy-relay.socket"), settings("tproxy-relay.service.d/socket.conf")
    assert drop_in["CapabilityBoundingSet"] == drop_in["AmbientCapabilities"] == [""]
    assert (unit["Transparent"], unit["BindIPv6Only"]) == (["yes"], ["ipv6-only"])
    sockets = passing(*(f"{address},{port},transparent" for address, port in unit_sockets()))
    wrapper = (*for_all_accounts(), *sockets, *becoming(ACCOUNT))
    bind = ",".join(dict.fromkeys(address for address, _ in unit_sockets()))
    with ruled(lab, "--bind", bind), lab.relay_process("--user", ACCOUNT, *OWN_SERVERS, wrapper=wrapper) as relay:
        serves(lab, relay)
        assert capabilities_of(relay.pid) == {"CapEff": 0, "CapPrm": 0}
        relay.stop()


@pytest.mark.usefixtures("accounts")
def test_what_systemd_itself_passes_on(lab: Lab, require_or_skip: Need) -> None:
    """systemd-socket-activate(1) starts the relay for the first client. Its sockets are not transparent."""
    if shutil.which("systemd-socket-activate") is None:
        require_or_skip("systemd-socket-activate is not installed")
    ports = [port for _, port in unit_sockets()[:2]]
    sockets = [f"--listen=[::]:{port}" for port in ports]  # for both families
    passed = ("PATH", "PYTHONPATH", "NOTIFY_SOCKET")
    names = ":".join(settings("tproxy-relay.socket")["FileDescriptorName"] * len(sockets))
    environment = [f"--setenv={name}" for name in passed]
    wrapper = (
        *for_all_accounts(),
        "systemd-socket-activate",
        *sockets,
        f"--fdname={names}",
        *environment,
        *becoming(ACCOUNT),
    )
    relay = lab.relay_process("--user", ACCOUNT, "--mode", "redirect", *OWN_SERVERS, wrapper=wrapper)
    with ruled(lab, "--mode", "redirect"), contextlib.ExitStack() as stack:
        with first_client(lab):
            stack.enter_context(relay)
        wait_until(lambda: opened(relay) == 1, "the client that it was started for is relayed")
        serves(lab, relay)
        assert capabilities_of(relay.pid) == {"CapEff": 0, "CapPrm": 0}
        relay.stop()


@contextlib.contextmanager
def first_client(lab: Lab) -> Iterator[None]:
    """One that comes as soon as somebody listens, and waits to be served."""
    server = EchoServer(lab.server)
    with contextlib.closing(server), ThreadPoolExecutor() as pool:
        coming = pool.submit(come, lab)
        yield
        assert coming.result(PATIENCE) == ""


def come(lab: Lab) -> str:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            with lab.client.connect(lab.server.ipv4, PORT) as sock:
                return ping(sock)
        except ConnectionRefusedError:  # nobody listens yet
            if time.monotonic() > deadline:
                raise


def messages(relay: RelayProcess) -> list[str]:
    return [line["message"] for line in relay.lines()]


def allowed_calls() -> set[str]:
    """What is left by the lines of SystemCallFilter, one after the other (systemd.exec(5))."""
    allowed: set[str] = set()
    for line in settings("tproxy-relay.service")["SystemCallFilter"]:
        calls = {call for name in line.removeprefix("~").split() for call in calls_in(name)}
        allowed = allowed - calls if line.startswith("~") else allowed | calls
    return allowed


def calls_in(name: str) -> set[str]:
    """Of a group such as @system-service; a call is a group of one."""
    if not name.startswith("@"):
        return {name}
    listed = [line.strip() for line in analyze("syscall-filter", name).stdout.splitlines()[1:]]
    return {call for one in listed if one[:1] not in ("", "#") for call in calls_in(one)}
