"""The packages: what is in them, what Debian's own critic says, and the life of the .deb on a Debian machine, from its
installation to the day when nothing reminds of it."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest
from deadlines import wait_until
from debian_host import DebianHost
from flows import steady
from interception import FAMILIES, PORT, echo_servers, look, ping, ways
from machine import NAME

from tproxy_relay.intercept import programs
from tproxy_relay.lab import Lab, LabError

pytestmark = pytest.mark.slow

PROJECT = Path(__file__).parents[2]
OTHER = PORT + 1
LIBRARIES = ("configargparse.py", "pythonjsonlogger")
"""Of Debian; the package depends on them."""

Need = Callable[[str], NoReturn]

PLACES = {
    "completion/_tproxy-relay": "/usr/share/zsh/vendor-completions/_tproxy-relay",
    "completion/tproxy-relay.bash": "/usr/share/bash-completion/completions/tproxy-relay",
    "default/tproxy-relay": "/etc/default/tproxy-relay",
    "init.d/tproxy-relay": "/etc/init.d/tproxy-relay",
    "logrotate.d/tproxy-relay": "/etc/logrotate.d/tproxy-relay",
    "sysctl.d/10-tproxy-relay.conf": "/usr/lib/sysctl.d/10-tproxy-relay.conf",
    "systemd/tproxy-relay.service": "/lib/systemd/system/tproxy-relay.service",
    "systemd/tproxy-relay.service.d/socket.conf": "/usr/share/doc/tproxy-relay/examples/socket.conf",
    "prometheus/tproxy-relay.rules.yml": "/usr/share/doc/tproxy-relay/examples/tproxy-relay.rules.yml",
    "grafana/tproxy-relay.json": "/usr/share/doc/tproxy-relay/examples/grafana.json",
    "systemd/tproxy-relay.socket": "/lib/systemd/system/tproxy-relay.socket",
    "sysusers.d/tproxy-relay.conf": "/usr/lib/sysusers.d/tproxy-relay.conf",
    "tmpfiles.d/tproxy-relay.conf": "/usr/lib/tmpfiles.d/tproxy-relay.conf",
    "tproxy-relay.conf": "/etc/tproxy-relay.conf",
}
"""Each file of etc/ that is for a machine, and where it is then."""
ELSEWHERE = ("package", "container")
"""Folders of etc/ whose files are for somebody else."""
ONLY_DEBIAN = ("/etc/default/tproxy-relay", "/etc/init.d/tproxy-relay")


# --- what is in them


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which they were built."""
    folder = tmp_path_factory.mktemp("packages")
    build(folder)
    return folder


def build(folder: Path) -> None:
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    command = ["sh", str(PROJECT / "etc/package/build"), str(folder)]
    subprocess.run(command, check=True, env={**os.environ, "PATH": path}, stdout=subprocess.DEVNULL, timeout=60)


@pytest.fixture
def deb(packages: Path) -> Path:
    (found,) = packages.glob("*.deb")
    return found


@pytest.fixture
def rpm(packages: Path) -> Path:
    (found,) = packages.glob("*.rpm")
    return found


def told(*command: object) -> str:
    """On its standard output; it succeeds."""
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True, timeout=60).stdout


def shipped() -> set[str]:
    files = (str(path.relative_to(PROJECT / "etc")) for path in (PROJECT / "etc").rglob("*") if path.is_file())
    return {name for name in files if name.split("/")[0] not in ELSEWHERE}


def program() -> set[str]:
    files = (path for path in (PROJECT / "tproxy_relay").rglob("*") if path.suffix in (".py", ".html"))
    return {str(path.relative_to(PROJECT)) for path in files}


@pytest.fixture
def unpacked(deb: Path, tmp_path: Path) -> Path:
    told("dpkg-deb", "-R", deb, tmp_path / "deb")
    return tmp_path / "deb"


def test_every_file_has_its_place(unpacked: Path) -> None:
    assert set(PLACES) == shipped()
    for name, place in PLACES.items():
        ours, theirs = PROJECT / "etc" / name, unpacked / place[1:]
        assert theirs.read_bytes() == ours.read_bytes(), place
        assert theirs.stat().st_mode & 0o7777 == (0o755 if "init.d" in place else 0o644), place
    home = unpacked / "usr/share/tproxy-relay"
    assert {str(path.relative_to(home)) for path in home.rglob("*") if path.is_file()} == program()
    assert (unpacked / "usr/sbin/tproxy-relay").stat().st_mode & 0o7777 == 0o755
    conffiles = (unpacked / "DEBIAN/conffiles").read_text().split()
    assert sorted(conffiles) == sorted(place for place in PLACES.values() if place.startswith("/etc/"))
    for page in ("man8/tproxy-relay.8.gz", "man5/tproxy-relay.conf.5.gz"):
        assert (unpacked / "usr/share/man" / page).is_file()


def test_what_the_rpm_has(rpm: Path, require_or_skip: Need) -> None:
    if shutil.which("rpm") is None:
        require_or_skip("there is no rpm here")
    listed = set(told("rpm", "-qlp", rpm).splitlines())
    expected = set(PLACES.values()) - set(ONLY_DEBIAN)
    for theirs, ours in {"/lib/systemd": "/usr/lib/systemd", "zsh/vendor-completions": "zsh/site-functions"}.items():
        expected = {place.replace(theirs, ours) for place in expected}
    assert expected <= listed and not listed & set(ONLY_DEBIAN)
    assert {f"/usr/share/tproxy-relay/{name}" for name in program()} <= listed
    assert set(told("rpm", "-qcp", rpm).split()) == {place for place in expected if place.startswith("/etc/")}
    scripts = told("rpm", "-qp", "--scripts", rpm)
    for name in ("post", "preun", "postun"):
        assert (PROJECT / "etc/package/rpm" / name).read_text().strip() in scripts


def test_each_form_depends_on_what_pip_would_install(deb: Path, rpm: Path, require_or_skip: Need) -> None:
    setup = (PROJECT / "setup.cfg").read_text()
    floors = dict(re.findall(r"^    (ConfigArgParse|python-json-logger) >=(\S+)$", setup, re.MULTILINE))
    python = re.findall(r"^python_requires = >=(\S+)$", setup, re.MULTILINE)[0]
    depends = told("dpkg-deb", "-f", deb, "Depends").strip().split(", ")
    wanted = (
        f"python3 (>= {python})",
        f"python3-configargparse (>= {floors['ConfigArgParse']})",
        f"python3-pythonjsonlogger (>= {floors['python-json-logger']})",
    )
    assert set(wanted) < set(depends)
    if shutil.which("rpm") is None:
        require_or_skip("there is no rpm here")
    requires = told("rpm", "-qp", "--requires", rpm).splitlines()
    assert f"python3 >= {python}" in requires
    for name, floor in floors.items():
        assert f"python3dist({name.lower()}) >= {floor}" in requires


def test_debian_finds_no_error(deb: Path, require_or_skip: Need) -> None:
    if shutil.which("lintian") is None:
        require_or_skip("there is no lintian here")
    command = ["lintian", "--allow-root", "--fail-on", "error,warning"]
    # It has no bug number of "intent to package".
    command += ["--suppress-tags", "initial-upload-closes-no-bugs", str(deb)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout


SCRIPTS = [
    path for path in (PROJECT / "etc/package").rglob("*") if path.parent.name in ("deb", "rpm") or path.name == "build"
]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_shellcheck_finds_nothing_in_the_scripts(script: Path, require_or_skip: Need) -> None:
    if shutil.which("shellcheck") is None:
        require_or_skip("there is no shellcheck here")
    done = subprocess.run(["shellcheck", "--shell=sh", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_same_checkout_gives_the_same_packages(packages: Path, tmp_path: Path) -> None:
    build(tmp_path)
    for path in packages.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


# --- their life


@pytest.fixture
def debian(lab: Lab, deb: Path, tmp_path: Path, require_or_skip: Need) -> Iterator[DebianHost]:
    """Everything is there that the package depends on. Afterwards no rule is left."""
    if os.geteuid() or lab.user_namespace:
        require_or_skip("it takes root to install a package")
    for path in (f"/usr/lib/python3/dist-packages/{name}" for name in LIBRARIES):
        if not Path(path).exists():
            require_or_skip(f"there is no {path}")
    before = look(lab)
    machine = DebianHost(lab.relay, tmp_path)
    shutil.copy(deb, machine.given / "relay.deb")
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(machine)
        except LabError as error:
            require_or_skip(str(error))
        succeeds(machine, "rm", "-f", "/usr/sbin/policy-rc.d")  # with which a container forbids services
        machine.remember()
        yield machine
        assert machine.processes() == {}
        assert look(lab) == before


AS_BOOTED = {"PATH": programs.search_path(), "RUNLEVEL": "2", "PREVLEVEL": "N"}
"""For invoke-rc.d(8), which does nothing on a machine that nobody has booted."""


def succeeds(machine: DebianHost, *command: str) -> str:
    """What it says."""
    done = machine.run(*command, env=AS_BOOTED)
    assert done.code == 0, (command, done)
    return done.said


def configure(machine: DebianHost, **settings: object) -> None:
    """Edit the one file."""
    file = machine.root / "etc/tproxy-relay.conf"
    text = file.read_text()
    for name, value in settings.items():
        option = name.replace("_", "-")
        text, count = re.subn(rf"^#?{option} =.*$", f"{option} = {value}", text, flags=re.MULTILINE)
        assert count == 1, name
    file.write_text(text)


def log_of(machine: DebianHost) -> str:
    return (machine.root / "var/log/tproxy-relay/relay.log").read_text()


def relays(machine: DebianHost, lab: Lab) -> None:
    """In three topologies, both families."""
    before = log_of(machine).count("connection closed")
    with echo_servers(lab):
        for source, destination in ways(lab).values():
            for family in FAMILIES.values():
                with source.connect(destination.address(family), PORT) as sock:
                    assert ping(sock) == ""
    expected = before + len(FAMILIES) * len(ways(lab))
    wait_until(lambda: log_of(machine).count("connection closed") == expected, "all were intercepted")


def account(machine: DebianHost) -> bool:
    return machine.run("getent", "passwd", NAME).code == 0


def test_from_the_installation_to_the_purge(lab: Lab, debian: DebianHost) -> None:
    as_it_was = look(lab)
    succeeds(debian, "dpkg", "-i", "/mnt/given/relay.deb")
    assert account(debian) and debian.processes() == {}, "it was started unasked"
    configure(debian, intercept_inbound=PORT, intercept_outbound=PORT, drain_timeout=1)
    succeeds(debian, "service", NAME, "start")
    relays(debian, lab)
    assert "is running" in succeeds(debian, "service", NAME, "status")
    workers = [pid for pid, name in debian.processes().items() if name == "tproxy-worker"]
    assert workers and set(succeeds(debian, "ps", "-o", "user=", "-p", ",".join(map(str, workers))).split()) == {NAME}

    configure(debian, intercept_inbound=f"{PORT}-{OTHER}")
    succeeds(debian, "service", NAME, "reload")
    wait_until(lambda: '"reloaded"' in log_of(debian), "it has read the file again")
    with echo_servers(lab), steady(lab.client, lab.server.ipv4, PORT) as come:
        for number in range(3):
            succeeds(debian, "service", NAME, "restart")
            come.go_on(f"after restart {number}")
        # An upgrade restarts it, too.
        upgrade = succeeds(debian, "dpkg", "-i", "/mnt/given/relay.deb")
        come.go_on("after the upgrade")
        last = come.finish()
        assert last["errors"] == {} and last["begun"] == last["served"] > 0, (last, upgrade)
    assert log_of(debian).count('"message": "listening"') == 5, upgrade
    wait_until(lambda: len(debian.relays()) == 1, "the former ones have ended")
    wait_until(lambda: log_of(debian).count('"connection closed"') >= last["served"] + 6, "all are in the log")
    assert log_of(debian).count('"connection closed"') == last["served"] + 6

    succeeds(debian, "service", NAME, "stop")
    assert debian.run("service", NAME, "status").code == 3
    assert debian.processes() == {} and look(lab) == as_it_was
    succeeds(debian, "dpkg", "--purge", NAME)
    assert not account(debian)
    assert debian.changes() == []


def test_a_machine_that_has_a_group_already_and_lacks_the_init_script(debian: DebianHost) -> None:
    """dpkg does not bring back what the administrator has removed from /etc."""
    succeeds(debian, "groupadd", "--system", NAME)
    succeeds(debian, "dpkg", "-i", "/mnt/given/relay.deb")
    assert succeeds(debian, "id", "-gn", NAME) == f"{NAME}\n"
    succeeds(debian, "rm", f"/etc/init.d/{NAME}")
    succeeds(debian, "update-rc.d", NAME, "remove")
    succeeds(debian, "dpkg", "-i", "/mnt/given/relay.deb")
    succeeds(debian, "dpkg", "--purge", NAME)
    assert debian.changes() == []


def test_removed_while_it_runs_and_installed_again(lab: Lab, debian: DebianHost) -> None:
    """What the administrator has written stays until the purge."""
    as_it_was = look(lab)
    succeeds(debian, "dpkg", "-i", "/mnt/given/relay.deb")
    assert "/usr/sbin/tproxy-relay" in debian.changes()
    configure(debian, intercept_inbound=PORT, intercept_outbound=PORT)
    succeeds(debian, "service", NAME, "start")
    relays(debian, lab)
    succeeds(debian, "dpkg", "--remove", NAME)
    assert debian.processes() == {} and look(lab) == as_it_was
    assert not (debian.root / "usr/share/tproxy-relay").exists()
    succeeds(debian, "dpkg", "-i", "/mnt/given/relay.deb")
    succeeds(debian, "service", NAME, "start")
    relays(debian, lab)
    succeeds(debian, "dpkg", "--purge", NAME)
    assert debian.changes() == []
