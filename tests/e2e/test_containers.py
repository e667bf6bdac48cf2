"""The files for containers: that they are what engines read, that they agree with each other and with the program, and
that the relay works with no more than they give it. No engine runs here: see container.py."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
from accounts import HAVE_ACCOUNTS
from container import (
    FOLDER,
    OPT,
    PROJECT,
    Container,
    Recipe,
    account,
    children_of,
    compose,
    image_environment,
    instructions,
    kubernetes,
    of_image,
    recipes,
    stages,
    zombies,
)
from deadlines import wait_until
from interception import FAMILIES, EchoServer, ping

from tproxy_relay.check import kernel
from tproxy_relay.config import environment, loader
from tproxy_relay.lab import Host, Lab
from tproxy_relay.relay import read_buffer
from tproxy_relay.supervisor import shutdown, workers

pytestmark = pytest.mark.slow

Need = Callable[[str], NoReturn]
INBOUND, OUTBOUND = 8080, 443
EACH = pytest.mark.parametrize("recipe", recipes(), ids=lambda recipe: recipe.name)
APP_GRACE = 30
"""Seconds that Kubernetes gives the app by itself (terminationGracePeriodSeconds of a pod that does not say)."""


def program(name: str) -> str:
    """Of the Python packages for tests, which need not be on PATH."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else name


# --- the files


def kubernetes_errors(found: dict[str, Any], version: str) -> str:
    import kubernetes_validate

    try:
        kubernetes_validate.validate(found, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("version", ["1.29", "1.33"])
def test_kubernetes_understands_every_key(version: str) -> None:
    found = kubernetes()
    assert kubernetes_errors(found, version) == ""
    found["spec"]["template"]["spec"]["initContainers"][0]["restartpolicy"] = "Always"
    assert "restartpolicy" in kubernetes_errors(found, version)


def test_compose_understands_every_key(tmp_path: Path) -> None:
    text = (FOLDER / "compose.yaml").read_text()
    (tmp_path / "typo.yaml").write_text(text.replace("cap_drop", "cap_dorp"))
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    for file, good in ((FOLDER / "compose.yaml", True), (tmp_path / "typo.yaml", False)):
        done = subprocess.run([*check, str(file)], capture_output=True, text=True, check=False)
        assert (done.returncode == 0) is good, done.stdout + done.stderr


def test_hadolint(tmp_path: Path, require_or_skip: Need) -> None:
    if shutil.which(program("hadolint")) is None:
        require_or_skip("hadolint is not installed")
    done = subprocess.run([program("hadolint"), str(FOLDER / "Containerfile")], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_what_is_copied_exists_and_is_let_through() -> None:
    ignored = (FOLDER / "Containerfile.dockerignore").read_text().splitlines()
    copied = [word for what, rest in instructions() if what == "COPY" for word in rest.split()[:-1]]
    own = [word for word in copied if not word.startswith(("--", "/"))]
    assert own and ignored[1] == "*"
    assert sorted(own) == sorted(line[1:] for line in ignored if line.startswith("!"))
    assert all((PROJECT / name).exists() for name in own)
    # What setup.cfg reads when a wheel is built.
    assert {"README.md", "LICENSE", "setup.cfg", "setup.py"} <= set(own)


def test_the_image_has_what_the_program_calls() -> None:
    table = re.search(r"^core_tools='(.*?)'", (PROJECT / ".ci/setup").read_text(), re.MULTILINE | re.DOTALL)
    assert table
    needed = {pair.partition("=")[2] for pair in table[1].split()}
    build, image = (installed(stage) for stage in stages())
    assert image == {"python3", *needed} and build == {"python3-venv"}
    first, second = (rest.split()[0] for what, rest in instructions() if what == "FROM")
    assert first == second  # the same python3


def installed(stage: list[tuple[str, str]]) -> set[str]:
    """By apt-get."""
    text = " ".join(rest for what, rest in stage if what == "RUN")
    (found,) = re.findall(r"apt-get install ([^&]*)", text)
    return {word for word in found.split() if not word.startswith("-")}


def test_the_image_starts_the_relay() -> None:
    assert "tproxy-relay = tproxy_relay.cli.main:main" in (PROJECT / "setup.cfg").read_text()
    assert (of_image("ENTRYPOINT"), of_image("CMD")) == ('["tproxy-relay"]', '["run"]')
    assert of_image("STOPSIGNAL") == "SIGTERM"
    assert image_environment()["PATH"].split(":")[0] == OPT
    (copied,) = [rest.split() for what, rest in stages()[-1] if what == "COPY"]
    assert copied == ["--from=build", str(Path(OPT).parent), str(Path(OPT).parent)]
    assert f"python3 -m venv {Path(OPT).parent} " in " ".join(rest for _, rest in stages()[0])


def test_the_labels_are_true() -> None:
    labels = dict(pair.split("=", 1) for pair in shlex.split(of_image("LABEL")))
    labels = {name.removeprefix("org.opencontainers.image."): value for name, value in labels.items()}
    metadata = (PROJECT / "setup.cfg").read_text()
    assert f"\nname = {labels.pop('title')}\n" in metadata
    assert f"\ndescription = {labels.pop('description')}\n" in metadata
    assert f"\nlicense = {labels.pop('licenses')}\n" in metadata
    assert f"FROM {labels.pop('base.name')}\n" in (FOLDER / "Containerfile").read_text()
    assert labels == {}


@EACH
def test_every_variable_is_known(recipe: Recipe) -> None:
    variables = {**image_environment(), **recipe.environment}
    assert list(environment.warnings(variables)) == []
    settings = loader.load(["--config", os.devnull], variables).settings
    assert (settings.log_format, settings.log_level, settings.user) == ("json", "info", account()[0])
    assert settings.workers and settings.max_connections


def test_the_recipes_agree() -> None:
    first, second = recipes()
    assert first.environment == second.environment
    assert (first.capabilities, first.probe) == (second.capabilities, second.probe)


def test_nobody_else_has_the_account_of_the_workers() -> None:
    """Its connections are not intercepted."""
    number = account()[1]
    (app,) = kubernetes()["spec"]["template"]["spec"]["containers"]
    assert app["securityContext"]["runAsUser"] != number
    assert compose()["services"]["app"]["user"] != f"{number}:{number}"
    for name in ("kubernetes.yaml", "compose.yaml"):
        assert f"account but {number}, whose" in " ".join((FOLDER / name).read_text().replace("#", " ").split())


def test_there_is_time_to_drain() -> None:
    drain = float(recipes()[0].environment["TPROXY_RELAY_DRAIN_TIMEOUT"])
    longest = drain + workers.HANDSHAKE_GRACE + shutdown.END_TIMEOUT
    pod = kubernetes()["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] >= APP_GRACE + longest
    assert float(compose()["services"]["tproxy-relay"]["stop_grace_period"].removesuffix("s")) > longest


def test_there_is_memory_for_the_connections() -> None:
    """Both directions of all of them in bulk."""
    connections = int(recipes()[0].environment["TPROXY_RELAY_MAX_CONNECTIONS"])
    (sidecar,) = kubernetes()["spec"]["template"]["spec"]["initContainers"]
    assert sidecar["resources"]["limits"] == {"memory": "1Gi"}
    assert compose()["services"]["tproxy-relay"]["mem_limit"] == "1g"
    assert 1024**3 > 1.5 * connections * 2 * read_buffer.BULK_READ


def test_the_app_waits_for_the_relay_and_does_not_need_it() -> None:
    services = compose()["services"]
    assert services["app"]["network_mode"] == services["tproxy-relay"]["network_mode"] == "service:network"
    assert services["app"]["depends_on"] == {"tproxy-relay": {"condition": "service_healthy"}}
    (sidecar,) = kubernetes()["spec"]["template"]["spec"]["initContainers"]
    assert sidecar["restartPolicy"] == "Always" and "livenessProbe" not in sidecar


# --- the page


PAGE = " ".join((PROJECT / "docs/containers.rst").read_text().split())


def test_the_page_names_the_capabilities() -> None:
    cells = re.findall(r"^``([A-Z_ ]+)``  ", (PROJECT / "docs/containers.rst").read_text(), re.MULTILINE)
    named = " ".join(cells).lower().split()
    assert sorted(named) == sorted((*recipes()[0].capabilities, "net_raw"))
    assert f"account {account()[1]} and have no capability" in PAGE


def test_the_page_names_the_modules() -> None:
    told = re.search(r"must have the modules (.*?)\. .*? needs (\w+) in place of (\w+) and (\w+),", PAGE)
    assert told
    needed = set(re.findall(r"\w+_\w+", told[1]))
    assert needed | {told[2]} == set(kernel.FEATURES) and told[2] not in needed
    assert {told[3], told[4]} == {"nft_tproxy", "nft_reject_inet"} < needed


# --- the relay in a container


@pytest.fixture
def accounts(lab: Lab, require_or_skip: Need) -> Iterator[None]:
    """Also takes away what a container leaves behind whose test has failed."""
    if not HAVE_ACCOUNTS or lab.user_namespace:
        require_or_skip("it takes root to become another account")
    yield
    lab.relay.run([sys.executable, "-m", "tproxy_relay", "rules", "remove", "--config", os.devnull])


@pytest.fixture
def app(lab: Lab) -> Iterator[list[EchoServer]]:
    """The app of the pod, and what it connects to."""
    servers = [EchoServer(lab.relay, INBOUND), EchoServer(lab.server, OUTBOUND)]
    yield servers
    for server in servers:
        server.close()


def talk(source: Host, destination: Host, port: int, family: int) -> str:
    """An exchange on a new connection works; the client's address and port."""
    with source.connect(destination.address(family), port) as sock:
        assert ping(sock) == ""
        host, number = sock.getsockname()[:2]
    return f"[{host}]:{number}" if ":" in host else f"{host}:{number}"


def ways(lab: Lab) -> list[tuple[Host, Host, int]]:
    """Into the pod and out of it."""
    return [(lab.client, lab.relay, INBOUND), (lab.relay, lab.server, OUTBOUND)]


def is_clean(lab: Lab) -> bool:
    """Nothing of the relay is left on the pod's network."""
    commands = (["nft", "list", "ruleset"], ["ip", "rule"], ["ip", "-6", "rule"])
    told = "".join(lab.relay.run(command).stdout for command in commands)
    return "tproxy_relay" not in told and "fwmark" not in told


def goes_direct(lab: Lab) -> None:
    """Both ways, and nothing in between."""
    for source, destination, port in ways(lab):
        for family in FAMILIES.values():
            talk(source, destination, port, family)


@pytest.mark.usefixtures("accounts", "app")
def test_the_traffic_of_a_pod(lab: Lab, tmp_path: Path) -> None:
    """From the first probe to the end: on stdout is nothing but JSON, on stderr nothing."""
    recipe = recipes()[0]
    with Container(lab.relay, tmp_path / "box", recipe) as box:
        box.await_healthy()
        for source, destination, port in ways(lab):
            for family in FAMILIES.values():
                client = talk(source, destination, port, family)
                assert box.wait_for("connection closed", client=client)["outcome"] == "completed"
        assert len(box.workers) == int(recipe.environment["TPROXY_RELAY_WORKERS"])
        for pid in box.workers:
            status = status_of(pid)
            assert {status[name] for name in ("CapEff", "CapPrm", "CapInh", "CapAmb")} == {"0" * 16}
            assert (status["NoNewPrivs"], set(status["Uid"].split())) == ("1", {str(account()[1])})
        with lab.client.connect(lab.relay.ipv4, INBOUND) as sock:
            assert ping(sock) == ""
            box.signal(signal.SIGTERM)
            box.wait_for("draining")
            assert ping(sock) == ""  # finishes
        assert box.wait() == 0
        assert [line["message"] for line in box.lines()][-1] == "stopped" and box.errors == ""
        assert box.lines()[-1]["closed"] == {"completed": 2 * len(FAMILIES) + 1}
    assert is_clean(lab)
    goes_direct(lab)


def status_of(pid: int) -> dict[str, str]:
    text = Path(f"/proc/{pid}/status").read_text()
    return dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)


@pytest.mark.usefixtures("accounts", "app")
def test_what_the_account_of_the_workers_connects_to_is_left_alone(lab: Lab, tmp_path: Path) -> None:
    number = str(account()[1])
    speak = f"exec 3<>/dev/tcp/{lab.server.ipv4}/{OUTBOUND} && echo hello >&3 && head -n 1 <&3"
    with Container(lab.relay, tmp_path / "box", recipes()[0]) as box:
        box.await_healthy()
        for uid, relayed in ((number, 0), ("1000", 1)):
            become = ["setpriv", "--reuid", uid, "--regid", uid, "--clear-groups"]
            assert lab.relay.run([*become, "bash", "-c", speak]).stdout == "hello\n"
            if relayed:
                box.wait_for("connection closed", orig_dst=f"{lab.server.ipv4}:{OUTBOUND}")
        assert sum(line["message"] == "connection closed" for line in box.lines()) == 1
        assert json.loads(box.run("tproxy-relay", "check", "--json").stdout)["ok"] is True
        # A tcpSocket probe of the relay's own ports finds nobody: they are on loopback.
        with pytest.raises(ConnectionRefusedError):
            lab.client.connect(lab.relay.ipv4, 15006)


@pytest.mark.slow
@pytest.mark.usefixtures("accounts", "app")
@pytest.mark.parametrize("on_failure", ["open", "closed"])
def test_a_container_that_is_killed(on_failure: str, lab: Lab, tmp_path: Path) -> None:
    """With process 1 the kernel kills all others, the guard, too; then the container is started again."""
    recipe = recipes()[0].having(TPROXY_RELAY_ON_FAILURE=on_failure)
    with Container(lab.relay, tmp_path / "first", recipe) as box:
        box.await_healthy()
        box.signal(signal.SIGKILL)
        assert box.wait() != 0
    if on_failure == "open":
        goes_direct(lab)
    else:
        for source, destination, port in ways(lab):
            with pytest.raises(ConnectionRefusedError):
                talk(source, destination, port, FAMILIES["v4"])
    with Container(lab.relay, tmp_path / "second", recipe) as box:
        box.await_healthy()
        for source, destination, port in ways(lab):
            client = talk(source, destination, port, FAMILIES["v4"])
            assert box.wait_for("connection closed", client=client)["outcome"] == "completed"
        box.signal(signal.SIGTERM)
        assert box.wait() == 0
    assert is_clean(lab)


@pytest.mark.slow
@pytest.mark.usefixtures("accounts", "app")
def test_as_process_1_it_looks_after_all(lab: Lab, tmp_path: Path) -> None:
    """Orphans are reaped; a worker and the guard are replaced; a reload works."""
    with Container(lab.relay, tmp_path / "box", recipes()[0]) as box:
        box.await_healthy()
        before = set(children_of(box.first))
        orphans = "for n in 1 2 3 4 5; do (sleep 0.1; exit $n) >/dev/null 2>&1 </dev/null & done"
        assert box.run("sh", "-c", orphans).returncode == 0
        wait_until(lambda: set(children_of(box.first)) == before, "the orphans are gone")
        victim, guard = box.workers[0], box.guard
        os.kill(victim, signal.SIGKILL)
        box.wait_for("worker ended", how="signal 9")
        wait_until(lambda: len(box.workers) == len(before) - 1 and victim not in box.workers, "another worker")
        os.kill(guard, signal.SIGKILL)
        box.wait_for("ruleset restored")
        assert box.guard not in (None, guard) and box.is_healthy
        box.signal(signal.SIGHUP)
        box.wait_for("reloaded")
        talk(lab.client, lab.relay, INBOUND, FAMILIES["v4"])
        box.wait_for("connection closed", outcome="completed")
        wait_until(lambda: not list(zombies(box.first)), "all are reaped")
        box.signal(signal.SIGTERM)
        assert box.wait() == 0 and box.errors == ""
    assert is_clean(lab)


@pytest.mark.usefixtures("accounts")
def test_whoever_only_connects_finds_the_relay_and_not_the_app(lab: Lab, tmp_path: Path) -> None:
    """So the app has no tcpSocket probe."""
    (app,) = kubernetes()["spec"]["template"]["spec"]["containers"]
    assert [name for name in app if name.endswith("Probe")] == ["readinessProbe"]
    assert app["readinessProbe"]["httpGet"]["port"] == INBOUND
    with Container(lab.relay, tmp_path / "box", recipes()[0]) as box:
        box.await_healthy()
        with pytest.raises(ConnectionResetError):  # perhaps before connect() has looked
            with lab.client.connect(lab.relay.ipv4, INBOUND) as sock:
                sock.recv(1)
        box.wait_for("connection closed", outcome="connect-refused")


@pytest.mark.slow
@pytest.mark.usefixtures("accounts", "app")
def test_with_redirect(lab: Lab, tmp_path: Path) -> None:
    """With what the page says that it takes."""
    told = dict(re.findall(r"``(TPROXY_RELAY_[A-Z_]+)=(\S+)``", PAGE.partition("**The node's kernel**")[2]))
    assert set(told) == {"TPROXY_RELAY_MODE", "TPROXY_RELAY_BIND"}
    with Container(lab.relay, tmp_path / "box", recipes()[0].having(**told)) as box:
        box.await_healthy()
        for source, destination, port in ways(lab):
            for family in FAMILIES.values():
                client = talk(source, destination, port, family)
                assert box.wait_for("connection closed", client=client)["outcome"] == "completed"


@pytest.mark.usefixtures("accounts")
def test_it_could_write_nothing(lab: Lab, tmp_path: Path) -> None:
    with Container(lab.relay, tmp_path / "box", recipes()[0]) as box:
        box.await_healthy()
        for folder in ("/", "/run", "/tmp", "/var/tmp", "/etc", str(tmp_path)):
            done = box.run("touch", f"{folder}/file")
            assert "Read-only file system" in done.stderr, (folder, done)
        assert "Read-only" in box.run("sh", "-c", "echo 1 >/proc/sys/net/ipv4/ip_forward").stderr


@pytest.mark.usefixtures("accounts")
@pytest.mark.parametrize("capability", recipes()[0].capabilities)
def test_every_capability_is_needed(capability: str, lab: Lab, tmp_path: Path) -> None:
    recipe = recipes()[0].having("net_raw").without(capability)  # either of the two lets it listen
    with Container(lab.relay, tmp_path / "box", recipe) as box:
        assert box.wait() == 77
        assert f"CAP_{capability.upper()}" in box.errors
    assert is_clean(lab)


@pytest.mark.slow
@pytest.mark.usefixtures("accounts", "app")
def test_the_app_sees_its_clients(lab: Lab, tmp_path: Path) -> None:
    """With what kubernetes.yaml says about it."""
    told = " ".join((FOLDER / "kubernetes.yaml").read_text().replace("#", " ").split())
    assert "Add NET_RAW below; the workers keep that one. - name: TPROXY_RELAY_PRESERVE_SOURCE value: address" in told
    recipe = recipes()[0].having("net_raw", TPROXY_RELAY_PRESERVE_SOURCE="address")
    with Container(lab.relay, tmp_path / "box", recipe) as box:
        box.await_healthy()
        for family in FAMILIES.values():
            client = talk(lab.client, lab.relay, INBOUND, family)
            record = box.wait_for("connection closed", client=client)
            assert (record["outcome"], record["source"]) == ("completed", "address")
        for pid in box.workers:
            assert int(status_of(pid)["CapEff"], 16) == 1 << 13
