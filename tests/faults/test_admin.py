"""Those who look in cannot hurt: slow ones, many, strangers, and requests that are none."""

import contextlib
import json
import os
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from accounts import for_all_accounts
from admin_views import ADMIN, fetch, program, status
from clients import EchoServer
from deadlines import wait_until
from rows import Seen

from tproxy_relay.admin import http, server
from tproxy_relay.lab import Lab, RelayProcess

PORT = 8000
ROUNDS = 300
SLOWER = 0.02
"""Seconds that the 99th percentile of a round may take more: two processors do all of the work."""


@pytest.fixture
def relay(fresh_lab: Lab) -> Iterator[RelayProcess]:
    fresh_lab.intercept((PORT,))
    with EchoServer(fresh_lab, PORT), fresh_lab.relay_process("--admin", f"127.0.0.1:{ADMIN}") as running:
        yield running


def p99(client: socket.socket) -> float:
    """Seconds, of rounds of one byte through the relay."""
    took = []
    for _ in range(ROUNDS):
        began = time.monotonic()
        client.sendall(b".")
        assert client.recv(1) == b"."
        took.append(time.monotonic() - began)
    return sorted(took)[int(0.99 * ROUNDS)]


def ends(sock: socket.socket) -> float:
    """Seconds until the relay closes it."""
    began = time.monotonic()
    with contextlib.suppress(ConnectionResetError):
        while sock.recv(65536):
            pass
    return time.monotonic() - began


@pytest.mark.row(
    "H27",
    "somebody who asks says nothing, or never stops, or 500 ask at once",
    "closed after 2 s, or after 8 KiB; p99 of a relayed byte at most 20 ms more; the relay answers again",
)
@pytest.mark.row("H28", "100 half requests at the admin port", "the same")
def test_who_asks_badly(fresh_lab: Lab, relay: RelayProcess, seen: Seen) -> None:
    lab = fresh_lab
    with lab.client.connect(lab.server.ipv4, PORT) as client, contextlib.ExitStack() as stack:
        before = p99(client)
        silent, endless = lab.relay.connect("127.0.0.1", ADMIN), lab.relay.connect("127.0.0.1", ADMIN)
        with silent, endless:
            with contextlib.suppress(ConnectionResetError, BrokenPipeError):
                sent = 0
                while sent < 1 << 30:
                    sent += endless.send(b"x" * 65536)
            assert sent < 16 << 20, "it does not read on"
            took = ends(silent)
            assert took <= server.REQUEST_TIMEOUT + 0.5
        many = [stack.enter_context(lab.relay.connect("127.0.0.1", ADMIN)) for _ in range(server.MAX_CONVERSATIONS)]
        for one in many:
            one.sendall(b"GET /status HTTP/1.1\r\nHo")
        with_many = p99(client)
        assert with_many <= before + SLOWER
        seen(f"closed after {took:.1f} s, or {http.MAX_HEAD} bytes; p99 {1000 * (with_many - before):+.1f} ms", "H27")
        half = [lab.relay.socket() for _ in range(500 - server.MAX_CONVERSATIONS)]
        for one in half:
            stack.enter_context(one)
            one.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                one.connect(("127.0.0.1", ADMIN))  # beyond the backlog, their SYNs are sent again and again
        with_all = p99(client)
        assert with_all <= before + SLOWER
        seen(f"p99 {1000 * (with_all - before):+.1f} ms", "H28")
        assert status(lab)["health"] == "ok", "the relay's own socket is no part of it"
    wait_until(lambda: fetch(lab, "/healthz", "-m", "5")[0] == 200, "it answers again", 30)


@pytest.mark.row(
    "S9",
    "the admin socket: its permissions, strangers, a stale one, a link at its path",
    "folder 0750, socket 0660; strangers EACCES; who may look may not abort; stale: replaced; a link: refused",
)
def test_the_socket_of_the_admin_interface(fresh_lab: Lab, tmp_path: Path, seen: Seen) -> None:
    lab, folder = fresh_lab, tmp_path / "run"
    path = folder / "admin.sock"
    for one in (tmp_path, *tmp_path.parents):
        if one.name.startswith(("pytest-of", "pytest-", "popen", "test_")):
            one.chmod(0o755)
    with lab.relay_process("--admin", str(path)) as relay:
        assert [stat.S_IMODE(os.stat(one).st_mode) for one in (folder, path)] == [0o750, 0o660]
        relay.kill()
    assert path.exists(), "it was killed"
    with lab.relay_process("--admin", str(path)):
        assert fetch(lab, "/healthz", "--unix-socket", str(path)) == (200, "ok")
        if os.getuid() == 0:
            strangers = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
            ask = ["curl", "-s", "-m", "5", "--unix-socket", str(path)]
            assert lab.relay.run([*strangers, *ask, "http://x/status"], check=False).returncode == 7
            assert "only root and the account of this relay may ask" in program(
                lab, "status", code=77, before=(*for_all_accounts(), *strangers)
            )
            in_group = [*strangers[:3], "--regid", "0", "--clear-groups"]
            answer = lab.relay.run([*in_group, *ask, "-X", "DELETE", "http://x/sessions/1-1-1"], check=False)
            assert "may, over a unix socket" in answer.stdout
            assert lab.relay.run([*in_group, *ask, "http://x/healthz"], check=False).stdout == "ok\n"
    assert not path.exists()
    victim = tmp_path / "victim"
    victim.write_text("precious")
    path.symlink_to(victim)
    refused = program(lab, "run", "--admin", str(path), code=71)
    assert f"admin: {path} is there and is no socket" in refused and victim.read_text() == "precious"
    seen("0750, 0660; EACCES; no abort; replaced; refused")


@pytest.mark.row(
    "S10",
    "HTTP to the admin port: from elsewhere, other methods and paths, a foreign Host, 8 KiB and more, secrets",
    "loopback only; GET and HEAD; 404; 403; 431; nothing of the configuration's secrets",
)
def test_the_port_of_the_admin_interface(fresh_lab: Lab, relay: RelayProcess, seen: Seen) -> None:
    lab = fresh_lab
    with pytest.raises(ConnectionRefusedError):
        lab.client.connect(lab.relay.ipv4, ADMIN)
    for method, code in (("GET", 200), ("HEAD", 200), ("POST", 405), ("PUT", 405), ("DELETE", 405), ("OPTIONS", 405)):
        wanted = ["-I"] if method == "HEAD" else ["-X", method]
        assert fetch(lab, "/status", *wanted)[0] == code, method
    for path in ("/x", "//", "/status/", "/../etc/passwd", "/sessions/1-1-1", "/%00"):
        assert fetch(lab, path, "--path-as-is")[0] == 404, path
    assert fetch(lab, "/status", "-H", "Host: evil.example")[0] == 403
    assert fetch(lab, "/status", "-H", f"X: {'x' * 9000}")[0] == 431
    assert fetch(lab, "/status?x=1")[0] == 400 == fetch(lab, "/sessions?sort=x")[0]
    document = json.loads(fetch(lab, "/status")[1])
    assert "settings" not in document and "config" not in json.dumps(document)
    for bad in ("allow", "target", "log-file", "user"):
        assert f'"{bad}"' not in json.dumps(document)
    seen("refused from elsewhere; 405; 404; 403; 431; nothing")
