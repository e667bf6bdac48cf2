"""What etc/container says, and a container of it as far as that goes without an engine: environment, account,
capabilities and mounts as an engine would give them, with the relay as process 1, in the network of a host of the lab.
"""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import yaml
from accounts import for_all_accounts
from deadlines import wait_until

import tproxy_relay
from tproxy_relay.intercept import programs
from tproxy_relay.lab import Host, LabError
from tproxy_relay.net import endpoint

PROJECT = Path(tproxy_relay.__file__).resolve().parents[1]
FOLDER = PROJECT / "etc/container"
OPT = "/opt/tproxy-relay/bin"
LIMIT = 20.0
"""Seconds for one command in a container, and for its end."""

_MOUNTS = """\
set -e
mount --make-rprivate /
mount --bind "$1/passwd" /etc/passwd
mount --bind "$1/group" /etc/group
mount --bind /proc/sys /proc/sys
awk '{ print $5 }' /proc/self/mountinfo | while read -r where; do
    case $where in /proc | /dev | /dev/*) continue ;; esac
    mount -o remount,bind,ro "$where" 2>/dev/null || :
done
shift
exec "$@"
"""
"""A root file system that is only read, and who is who in the image."""

_PROGRAM = """\
#!{python}
import sys
sys.path.insert(0, {project!r})
from tproxy_relay.cli.main import main
sys.exit(main())
"""


# --- the files


def instructions() -> list[tuple[str, str]]:
    """Of the Containerfile: what, and the rest of the line; continued lines are one, comments are left out."""
    text = re.sub(r"^\s*#.*\n", "", (FOLDER / "Containerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(what, rest) for what, _, rest in (line.partition(" ") for line in lines if line)]


def stages() -> list[list[tuple[str, str]]]:
    """The same by stages."""
    found: list[list[tuple[str, str]]] = []
    for what, rest in instructions():
        if what == "FROM":
            found.append([])
        found[-1].append((what, rest))
    return found


def of_image(what: str) -> str:
    """The only such instruction of the image itself."""
    (found,) = [rest for name, rest in stages()[-1] if name == what]
    return found


def image_environment() -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in shlex.split(of_image("ENV")))


def account() -> tuple[str, int]:
    """Name and number of the account that the image has for the workers."""
    uid, name = re.search(r"useradd --uid (\d+) .* (\S+)$", of_image("RUN")).groups()  # type: ignore[union-attr]
    return name, int(uid)


def kubernetes() -> dict[str, Any]:
    """The object of kubernetes.yaml."""
    found: dict[str, Any] = yaml.safe_load((FOLDER / "kubernetes.yaml").read_text())
    return found


def compose() -> dict[str, Any]:
    """compose.yaml."""
    found: dict[str, Any] = yaml.safe_load((FOLDER / "compose.yaml").read_text())
    return found


@dataclass(frozen=True)
class Recipe:
    """What an engine is told of the relay's container."""

    name: str
    environment: Mapping[str, str]
    """Beside the image's own."""
    capabilities: tuple[str, ...]
    """All that it has, by setpriv's names."""
    probe: tuple[str, ...]

    def without(self, capability: str) -> "Recipe":
        return replace(self, capabilities=tuple(one for one in self.capabilities if one != capability))

    def having(self, *capabilities: str, **environment: str) -> "Recipe":
        return replace(
            self,
            capabilities=(*self.capabilities, *capabilities),
            environment={**self.environment, **environment},
        )


def recipes() -> list[Recipe]:
    (sidecar,) = kubernetes()["spec"]["template"]["spec"]["initContainers"]
    context, service = sidecar["securityContext"], compose()["services"]["tproxy-relay"]
    assert context["capabilities"]["drop"] == service["cap_drop"] == ["ALL"]
    assert context["readOnlyRootFilesystem"] is service["read_only"] is True
    assert context["allowPrivilegeEscalation"] is False and service["security_opt"] == ["no-new-privileges:true"]
    assert (context["runAsUser"], context["runAsGroup"], service["user"]) == (0, 0, "0:0")
    assert service["healthcheck"]["test"][0] == "CMD"
    return [
        Recipe(
            "kubernetes",
            {one["name"]: one["value"] for one in sidecar["env"]},
            tuple(map(str.lower, context["capabilities"]["add"])),
            tuple(sidecar["startupProbe"]["exec"]["command"]),
        ),
        Recipe(
            "compose",
            service["environment"],
            tuple(map(str.lower, service["cap_add"])),
            tuple(service["healthcheck"]["test"][1:]),
        ),
    ]


# --- a container


class Container:
    """In a `with`: started on entry, killed at the end if it still runs."""

    def __init__(self, host: Host, folder: Path, recipe: Recipe) -> None:
        self._host = host
        self._folder = folder
        self._recipe = recipe
        self._process: subprocess.Popen[bytes] | None = None
        self._changed = threading.Condition()
        self._ended = False
        self.out: list[str] = []
        """The lines on its stdout."""

    def __enter__(self) -> "Container":
        self._furnish()
        whole = [*for_all_accounts(), "unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        whole += ["sh", "-c", _MOUNTS, "sh", str(self._folder), *self._as_in_there(self._entry())]
        with open(self._folder / "stderr", "wb") as errors:
            environment = {"PATH": programs.search_path()}
            self._process = self._host.start(whole, stdout=subprocess.PIPE, stderr=errors, env=environment)
        assert self._process.stdout is not None
        threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        self._process.kill()  # and with it process 1, and with that all others
        self._process.wait()

    def _furnish(self) -> None:
        name, uid = account()
        bin_ = self._folder / "bin"
        bin_.mkdir(parents=True)
        program = bin_ / "tproxy-relay"
        program.write_text(_PROGRAM.format(python=sys.executable, project=str(PROJECT)))
        program.chmod(0o755)
        for file, line in (("passwd", f"{name}:x:{uid}:{uid}::/:/bin/false\n"), ("group", f"{name}:x:{uid}:\n")):
            (self._folder / file).write_text(Path("/etc", file).read_text() + line)

    @staticmethod
    def _entry() -> list[str]:
        return [*json.loads(of_image("ENTRYPOINT")), *json.loads(of_image("CMD"))]

    def _as_in_there(self, argv: Sequence[str]) -> list[str]:
        """The command as the engine runs it."""
        capabilities = ",".join(("-all", *(f"+{name}" for name in self._recipe.capabilities)))
        numbers = ["--reuid", "0", "--regid", "0", "--clear-groups", "--no-new-privs"]
        rights = ["setpriv", *numbers, f"--bounding-set={capabilities}", "--inh-caps=-all", "--ambient-caps=-all", "--"]
        environment = {**image_environment(), **self._recipe.environment}
        environment["PATH"] = environment["PATH"].replace(OPT, str(self._folder / "bin"))
        return [*rights, "env", "-i", *(f"{name}={value}" for name, value in environment.items()), *argv]

    def _read(self, stream: IO[bytes]) -> None:
        with stream:
            for line in stream:
                with self._changed:
                    self.out.append(line.decode(errors="replace"))
                    self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    # --- what is in it

    @property
    def errors(self) -> str:
        """All that it has written to its stderr."""
        return (self._folder / "stderr").read_text()

    @property
    def first(self) -> int:
        """Its process 1, as we count."""
        assert self._process is not None
        return children_of(self._process.pid)[0]

    @property
    def workers(self) -> list[int]:
        """As we count."""
        return [pid for pid in children_of(self.first) if name_of(pid) == "tproxy-worker"]

    @property
    def guard(self) -> int | None:
        """As we count."""
        found = [pid for pid in children_of(self.first) if name_of(pid) == "tproxy-guard"]
        assert len(found) < 2
        return found[0] if found else None

    def run(self, *argv: str) -> "subprocess.CompletedProcess[str]":
        """Another command in it, as `docker exec` and probes are run."""
        try:
            first = self.first
        except (IndexError, OSError) as error:
            raise LabError(f"it has ended: {self.errors}") from error
        inside = ["nsenter", "-t", str(first), "-m", "-p", "--", *self._as_in_there(argv)]
        return self._host.run(inside, check=False, timeout=LIMIT)

    @property
    def is_healthy(self) -> bool:
        """What the probe says."""
        return self.run(*self._recipe.probe).returncode == 0

    def await_healthy(self) -> None:
        """Its probe says yes. AssertionError if it ends instead."""
        wait_until(lambda: self._has_ended or self._has_begun and self.is_healthy, "the probe says yes")
        assert not self._has_ended, self.errors

    @property
    def _has_begun(self) -> bool:
        """Process 1 is the relay."""
        assert self._process is not None
        return [name_of(pid) for pid in children_of(self._process.pid)] == ["tproxy-relay"]

    @property
    def _has_ended(self) -> bool:
        assert self._process is not None
        return self._process.poll() is not None

    # --- its end, and what it says

    def signal(self, number: signal.Signals) -> None:
        """To its process 1, from outside."""
        os.kill(self.first, number)

    def wait(self) -> int:
        """Its exit code; for a death by a signal minus its number. All that it has written is there then."""
        assert self._process is not None
        code = self._process.wait(LIMIT)
        with self._changed:
            assert self._changed.wait_for(lambda: self._ended, LIMIT)
        return code

    def lines(self) -> list[dict[str, Any]]:
        """Its log so far. ValueError if anything else is among it."""
        with self._changed:
            return [json.loads(line) for line in self.out]

    def wait_for(self, message: str, **fields: object) -> dict[str, Any]:
        """The first such line of its log, past or future."""

        def found() -> dict[str, Any] | None:
            for line in map(json.loads, self.out):
                if {"message": message, **fields}.items() <= line.items():
                    return dict(line)
            return None

        with self._changed:
            line = self._changed.wait_for(found, LIMIT)
            if line is None:
                raise LabError(f"no {message!r} with {fields} in: {''.join(self.out[-5:])}{self.errors}")
            return line

    def record_of(self, client: Any) -> dict[str, Any]:
        """The access line of the connection of this client's socket."""
        return self.wait_for("connection closed", client=str(endpoint.from_sockaddr(client.getsockname())))


def children_of(pid: int) -> list[int]:
    """Of all its threads."""
    found = [file.read_text().split() for file in Path(f"/proc/{pid}/task").glob("*/children")]
    return [int(child) for children in found for child in children]


def name_of(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def zombies(pid: int) -> Iterator[int]:
    """Its children that have ended and were not reaped."""
    for child in children_of(pid):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                yield child
