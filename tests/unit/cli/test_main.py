"""The command as a user meets it: one line that says what is wrong, and the exit code, and never a traceback."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
from children import no_capabilities
from rows import Seen

ROOT = Path(__file__).parents[3]
REDIRECT = ["--mode", "redirect", "--bind", "127.0.0.1"]
"""Needs no capability."""


def command(*arguments: str, conf: bytes | None = None, tmp_path: Path | None = None) -> list[str]:
    line = [sys.executable, "-m", "tproxy_relay", *arguments]
    if conf is not None:
        assert tmp_path is not None
        path = tmp_path / "relay.conf"
        path.write_bytes(conf)
        line += ["--config", str(path)]
    return line


def run(line: list[str], env: dict[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
    clean = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        line, env={**clean, **(env or {})}, capture_output=True, text=True, timeout=20, check=False, cwd="/"
    )


def check_one_line(done: "subprocess.CompletedProcess[str]", code: int, *words: str) -> None:
    assert done.returncode == code, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("tproxy-relay: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in lines[0]


@pytest.mark.parametrize(
    ("conf", "words"),
    [
        (b"prots = 1\n", ("relay.conf:1: ", "'prots'", "did you mean 'ports'?")),
        (b"\nports = 1,x\n", ("relay.conf:2: ", "ports", "'x'")),
        (b"ports = 1\n\nports = 2\n", ("relay.conf:3: ", "line 1")),
        (b"port = 7\n", ("relay.conf:1: ", "'port'")),
        (b"no-keep = no\n", ("relay.conf:1: ", "'no-keep'")),
        (b"config = /other\n", ("relay.conf:1: ", "config")),
        (b"ports = \xff\xfe\n", ("relay.conf", "UTF-8")),
        (b"ports = 0\n", ("relay.conf:1: ", "'0'")),
        (b"ports = 65536\n", ("relay.conf:1: ", "'65536'")),
        (b"ports = 15002,\n", ("relay.conf:1: ",)),
        (b"ports = 15002,15002\n", ("relay.conf:1: ", "15002")),
        ("ports = ٣\n".encode(), ("relay.conf:1: ",)),
        ("ports = １５００２\n".encode(), ("relay.conf:1: ",)),
        (b"ports = 1_000\n", ("relay.conf:1: ",)),
        (b"ports = +5\n", ("relay.conf:1: ",)),
        (b"ports = 00080\n", ("relay.conf:1: ",)),
        (b"ports = " + b",".join(b"%d" % port for port in range(1, 65536)) + b"\n", ("relay.conf:1: ", "64")),
    ],
)
@pytest.mark.row("B1", "unknown keys, duplicates, bad values, 19 files", "exit code 78, one line with file and line")
def test_a_bad_file_is_named_with_its_line(conf: bytes, words: tuple[str, ...], tmp_path: Path, seen: Seen) -> None:
    check_one_line(run(command(conf=conf, tmp_path=tmp_path)), 78, *words)
    seen("78, one line")


@pytest.mark.parametrize("kind", ["missing", "folder", "fifo", "huge", "unreadable"])
@pytest.mark.row("B4", "a directory, a FIFO, a huge file, one that is not UTF-8", "one line within 1 s")
def test_what_is_no_file_is_said_at_once(kind: str, tmp_path: Path, seen: Seen) -> None:
    path = tmp_path / "relay.conf"
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "huge":
        with open(path, "wb") as file:
            file.truncate(100_000_000)
    elif kind == "unreadable":
        path.touch(0)
    began = time.monotonic()
    check_one_line(run([*no_capabilities(), *command("--config", str(path))]), 78, "relay.conf")
    assert time.monotonic() - began < 5
    seen("one line")


@pytest.mark.row("B2", "a bad value in the environment", "names the variable")
def test_a_bad_variable_is_named(seen: Seen) -> None:
    check_one_line(
        run(command("--config", "/dev/null"), {"TPROXY_RELAY_CONNECT_TIMEOUT": "x"}),
        78,
        "TPROXY_RELAY_CONNECT_TIMEOUT",
        "'x'",
    )
    seen("named")


@pytest.mark.parametrize("option", ["-port", "-p", "--prots", "--port"])
@pytest.mark.row("B2", "a bad value on the command line", "names the option")
def test_a_bad_option_is_named(option: str, seen: Seen) -> None:
    check_one_line(run(command("--config", "/dev/null", option, "9")), 2, option)
    seen("named")


def test_an_empty_variable_is_none_and_an_unknown_one_is_a_warning() -> None:
    done = run(
        command("--config", "/dev/null", "--print-config"), {"TPROXY_RELAY_PORTS": "", "TPROXY_RELAY_PROTS": "1"}
    )
    check_one_line(done, 0, "TPROXY_RELAY_PROTS", "TPROXY_RELAY_PORTS")
    assert "ports = 15002,15006" in done.stdout


@pytest.mark.row("B13", "no capability", "exit code 77, says how to get it")
def test_without_the_capability_it_says_how_to_get_it(seen: Seen) -> None:
    done = run([*no_capabilities(), *command("--config", "/dev/null", "--log-level", "error")])
    check_one_line(done, 77, "CAP_NET_RAW", "setpriv", "AmbientCapabilities=CAP_NET_RAW")
    seen("77, and how")


@pytest.mark.row("H22", "the port is taken", "one line that names address and port, exit code 71")
def test_a_taken_port_is_named_with_the_remedy(seen: Seen) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run(command("--config", "/dev/null", "--log-level", "error", *REDIRECT, "--ports", str(port)))
    check_one_line(done, 71, f"127.0.0.1:{port}", "taken", "--ports")
    seen("one line, 71")


def test_a_kernel_without_tproxy_is_named(require_or_skip: Callable[[str], NoReturn]) -> None:
    """The kernel's answer to IP_TRANSPARENT, injected."""
    strace = shutil.which("strace")
    if strace is None or run([strace, "-e", "trace=none", "true"]).returncode:
        require_or_skip("strace")
    options = ["--config", "/dev/null", "--log-level", "error", "--bind", "127.0.0.1", "--ports", str(free_port())]
    # The probe for SO_MARK comes first, then SO_REUSEADDR, then IP_TRANSPARENT.
    inject = [
        "-f",
        "-qq",
        "-o",
        "/dev/null",
        "-e",
        "trace=setsockopt",
        "-e",
        "inject=setsockopt:error=ENOPROTOOPT:when=3",
    ]
    check_one_line(run([str(strace), *inject, *command(*options)]), 69, "IP_TRANSPARENT", "--mode redirect")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_starts_and_stops(number: signal.Signals, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(tmp_path / "notify"))
        notify.settimeout(15)
        environ = {**os.environ, "PYTHONPATH": str(ROOT), "NOTIFY_SOCKET": str(tmp_path / "notify")}
        port = free_port()
        line = command("--config", "/dev/null", *REDIRECT, "--ports", str(port))
        with subprocess.Popen(line, env=environ, stderr=subprocess.PIPE, text=True) as process:
            try:
                assert told(notify).startswith("READY=1\n")
                process.send_signal(number)
                assert told(notify) == "STOPPING=1"
                assert process.wait(10) == 0
                assert process.stderr is not None and "stopped" in process.stderr.read()
            finally:
                process.kill()


def told(manager: socket.socket) -> str:
    """What it says next, beside its signs of life and the listeners that it leaves with the service manager."""
    while (state := manager.recv(200).decode()).startswith(("FDSTORE=1", "WATCHDOG=1")):
        pass
    return state


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
