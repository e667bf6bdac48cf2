"""`tproxy-relay demo` as its users run it: as root and not, to its end and not, with and without a reader."""

import contextlib
import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest

from tproxy_relay.demo import screen
from tproxy_relay.lab import Lab, needs

PACKAGE = Path(needs.__file__).parents[1]
LIBRARIES = ("configargparse", "pythonjsonlogger")
NOBODY = ("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", "env")
"""setpriv still has root's rights when it opens the program that it becomes; what `env` opens is nobody's."""
PATIENCE = 60.0

PROMISED = (
    r"IPv4 +status 200 from 10\.81\.2\.2:8080",
    r"IPv6 +status 200 from \[fd81:2::2\]:8080",
    r"not relayed +10\.81\.2\.2 +10\.81\.1\.2 +the client",
    r"not relayed +fd81:2::2 +fd81:1::2 +the client",
    r"relayed +10\.81\.2\.2 +10\.81\.2\.1 +the relay",
    r"relayed +fd81:2::2 +fd81:2::1 +the relay",
    r"--preserve-source address +10\.81\.2\.2 +10\.81\.1\.2 +the client",
    r"--preserve-source address +fd81:2::2 +fd81:1::2 +the client",
    r"directly +server got 1,048,576 bytes, .* client got EOF",
    r"relayed +server got 1,048,576 bytes, .* client got EOF",
    r"directly +client got 100,000 bytes, then ECONNRESET",
    r"relayed +client got 100,000 bytes, then ECONNRESET",
    r"directly +[0-9.]+ Gbit/s",
    r"relayed +[0-9.]+ Gbit/s, [0-9]+% of that",
    r"10\.81\.1\.2:\d+ +10\.81\.2\.2:8081 +address upstream-reset +0 +100,000",
    r"everything was removed",
)


@dataclass(frozen=True)
class Stage:
    """How to run the demo as some user; `home` marks every process of it, its TMPDIR catches every file."""

    prefix: tuple[str, ...]
    python: str
    home: Path

    def environment(self) -> dict[str, str]:
        clean = {name: os.environ[name] for name in ("PATH", "CI") if name in os.environ}
        own = {"HOME": str(self.home), "TMPDIR": str(self.home / "tmp"), "PYTHONDONTWRITEBYTECODE": "1"}
        return {**clean, **own, "PYTHONPATH": str(self.home)}

    def start(self, *options: str, program: Sequence[str] = ("-m", "tproxy_relay")) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [*self.prefix, self.python, *program, "demo", *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environment(),
            cwd="/",
        )

    @contextlib.contextmanager
    def started(self, *options: str) -> "Iterator[subprocess.Popen[str]]":
        with self.start(*options) as process:
            try:
                yield process
            finally:
                process.kill()

    def leftovers(self) -> list[str]:
        """What is still there of the demo a moment after its end: processes, files, links."""
        deadline = time.monotonic() + 10
        while (found := self._leftovers()) and time.monotonic() < deadline:
            time.sleep(0.02)
        return found

    def _leftovers(self) -> list[str]:
        mark = f"HOME={self.home}".encode()
        found = [str(path) for path in (self.home / "tmp").iterdir()]
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (process / "environ").read_bytes().split(b"\0"):
                    found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        links = re.findall(r"^ *(rc|rs|cr|sr):", Path("/proc/net/dev").read_text(), re.MULTILINE)
        return found + links


@pytest.fixture(params=["as-we-are", "ordinary-user"])
def stage(request: pytest.FixtureRequest, lab: Lab, require_or_skip: Callable[[str], NoReturn]) -> Iterator[Stage]:
    """The demo for us and for a user without any privilege. `lab` says if there can be none at all."""
    folder = Path(tempfile.mkdtemp(prefix="tproxy-relay-test-"))
    try:
        yield _stage(folder, request.param == "ordinary-user" and os.geteuid() == 0, require_or_skip)
    finally:
        shutil.rmtree(folder)


def _stage(folder: Path, drop: bool, require_or_skip: Callable[[str], NoReturn]) -> Stage:
    _install(folder)
    if not drop:
        return Stage((), sys.executable, folder)
    # The interpreter of the tests may live where only its owner can go.
    for python in (sys.executable, "/usr/bin/python3"):
        stage = Stage(NOBODY, python, folder)
        probe = [*NOBODY, python, "-c", f"import tproxy_relay, {', '.join(LIBRARIES)}"]
        if subprocess.run(probe, env=stage.environment(), capture_output=True, check=False).returncode == 0:
            return stage
    require_or_skip("there is no Python that another user may run")


def _install(folder: Path) -> None:
    """A copy of the package and its libraries that everybody may read."""
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PACKAGE, folder / "tproxy_relay", ignore=ignore)
    for name in LIBRARIES:
        found = importlib.util.find_spec(name)
        assert found is not None and found.origin is not None
        if found.submodule_search_locations:
            shutil.copytree(Path(found.origin).parent, folder / name, ignore=ignore)
        else:
            shutil.copy(found.origin, folder)
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    (folder / "tmp").mkdir()
    (folder / "tmp").chmod(0o777)


def read_until(process: "subprocess.Popen[str]", text: str) -> str:
    """Standard output up to and with the line that contains the text."""
    assert process.stdout is not None
    read = ""
    for line in process.stdout:
        read += line
        if text in line:
            return read
    assert process.stderr is not None
    raise AssertionError(f"the demo ended before {text!r}:\n{read}{process.stderr.read()}")


@pytest.mark.slow
def test_it_shows_what_it_promises_and_leaves_nothing(stage: Stage) -> None:
    with stage.started() as process:
        output, errors = process.communicate(timeout=PATIENCE)
    assert (process.returncode, errors) == (0, ""), output + errors
    for pattern in PROMISED:
        assert re.search(rf"^ *{pattern}|{pattern}", output), f"{pattern!r} not in:\n{output}"
    assert all(line.isascii() and line.isprintable() and len(line) <= 80 for line in output.splitlines())
    assert not stage.leftovers()


@pytest.mark.parametrize(
    "number, moment, code",
    [
        pytest.param(signal.SIGINT, "made of namespaces", 130, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, "3. What one side does", 130, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, "4. How fast", 130, marks=pytest.mark.slow),
        (signal.SIGTERM, "2. Whom", 143),
        pytest.param(signal.SIGHUP, "6. What the relay", 129, marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_it_at_any_moment(stage: Stage, number: int, moment: str, code: int) -> None:
    with stage.started() as process:
        read_until(process, moment)
        process.send_signal(number)
        output, errors = process.communicate(timeout=PATIENCE)
    assert (process.returncode, errors) == (code, "")
    assert output.endswith("Stopped. Everything was removed.\n")
    assert not stage.leftovers()


@pytest.mark.slow
def test_kill_9_leaves_nothing_either(stage: Stage) -> None:
    with stage.started() as process:
        read_until(process, "4. How fast")
        process.kill()
        process.communicate(timeout=PATIENCE)
    assert not stage.leftovers()


@pytest.mark.slow
def test_a_reader_that_goes_away_ends_it_quietly(stage: Stage) -> None:
    with stage.started() as process:
        assert process.stdout is not None and process.stderr is not None
        read_until(process, "1. The client")
        process.stdout.close()
        assert process.wait(PATIENCE) == 1
        assert process.stderr.read() == ""
    assert not stage.leftovers()


@pytest.mark.slow
def test_keep_leaves_it_to_the_user_until_an_interrupt(stage: Stage) -> None:
    with stage.started("--keep") as process:
        told = read_until(process, "as they end:")
        commands = re.findall(r"^ +(nsenter .*) # the (\w+)$", told, re.MULTILINE)
        assert [host for _, host in commands] == ["client", "relay", "server"]
        shell, *_ = (shlex.split(command) for command, _ in commands)
        fetch = "from urllib.request import urlopen; print(urlopen('http://10.81.2.2:8080/').read())"
        argv = [*stage.prefix, *shell[:-1], stage.python, "-c", fetch]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=PATIENCE, check=True)
        assert '"hello": "10.81.1.2"' in done.stdout
        read_until(process, "10.81.2.2:8080   address completed")
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=PATIENCE)
    assert (process.returncode, errors) == (130, "")
    assert not stage.leftovers()


WITHOUT_RULES = """
import sys
from tproxy_relay.cli.main import main
from tproxy_relay.lab import Lab
start = Lab.relay_process
Lab.relay_process = lambda lab, *options: start(lab, *options[2:])
sys.exit(main())
"""


@pytest.mark.slow
def test_without_interception_it_does_not_claim_success(stage: Stage) -> None:
    with stage.start(program=("-c", WITHOUT_RULES)) as process:
        output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert re.fullmatch(r"tproxy-relay: the demo is not as promised: .*10\.81\.2\.2:8080.*\n", errors), errors
    assert not stage.leftovers()


@pytest.mark.parametrize("variable, coloured", [("", True), ("NO_COLOR", False)])
def test_colour_is_for_terminals_that_want_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], variable: str, coloured: bool
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if variable:
        monkeypatch.setenv(variable, "")
    screen.title("hello")
    assert ("\033[" in capsys.readouterr().out) is coloured
