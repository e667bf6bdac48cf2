"""Programs that people use: each works directly and through the relay, and cannot tell the difference.

Each test starts a server in the server host and lets its client work twice, first without rules and then with
them. The results must be equal; and the relay's access lines must show the second time, and not the first.
"""

import contextlib
import functools
import hashlib
import http.server
import json
import os
import random
import shutil
import socket
import ssl
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import pytest

from tproxy_relay.lab import Host, Lab, RelayProcess
from tproxy_relay.net.endpoint import from_sockaddr

FAMILIES = {"v4": socket.AF_INET, "v6": socket.AF_INET6}
START_TIMEOUT = 10.0
LISTEN = "0A"
"""The state of a listener in /proc/net/tcp (TCP_LISTEN)."""

Result = TypeVar("Result")
Require = Callable[[str], NoReturn]

pytestmark = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


@pytest.fixture(scope="module")
def relay(lab: Lab) -> Iterator[RelayProcess]:
    with lab.relay_process() as running:
        yield running


@pytest.fixture
def tools(require_or_skip: Require) -> Callable[..., None]:
    def need(*names: str) -> None:
        for name in names:
            if shutil.which(name) is None:
                require_or_skip(f"{name} is not installed")

    return need


def directly_and_relayed(
    lab: Lab, relay: RelayProcess, family: int, port: int, work: Callable[[], Result], connections: int
) -> Result:
    """What `work` returned both times. `connections` is how many it makes to the port, at the least."""
    server = str(from_sockaddr((lab.server.address(family), port)))
    client = str(from_sockaddr((lab.client.address(family), 0)))[:-1]

    def intercepted() -> list[dict[str, Any]]:
        records = [record for record in relay.records() if record.get("orig_dst") == server]
        return [record for record in records if record["client"].startswith(client)]

    directly = work()
    assert not intercepted(), "the direct connections were intercepted"
    lab.intercept((port,))
    try:
        relayed = work()
        relay.wait_for_record(lambda _: len(intercepted()) >= connections)
    finally:
        lab.stop_intercepting()
    assert relayed == directly
    assert not [record for record in intercepted() if record["outcome"] == "internal-error"]
    return relayed


@contextlib.contextmanager
def server_program(
    lab: Lab, port: int, argv: Sequence[str], env: dict[str, str] | None = None
) -> Iterator["subprocess.Popen[bytes]"]:
    """A program in the server host, from when it listens until it is told to end."""
    environment = {**os.environ, **(env or {})}
    process = lab.server.start(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    try:
        await_listening(process, port)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def await_listening(process: "subprocess.Popen[bytes]", port: int) -> None:
    """Until somebody in the process's namespace listens there. A connection would be a client to some."""
    deadline = time.monotonic() + START_TIMEOUT
    while not is_listening(process.pid, port):
        assert process.poll() is None, f"{process.args} exited with {process.returncode}"
        assert time.monotonic() < deadline, f"{process.args} does not listen on {port}"
        time.sleep(0.01)


def is_listening(pid: int, port: int) -> bool:
    """proc(5), /proc/net/tcp: the second field is ADDRESS:PORT in hexadecimal, the fourth the state."""
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            if state == LISTEN and local.endswith(f":{port:04X}"):
                return True
    return False


def url_host(host: Host, family: int) -> str:
    return f"[{host.ipv6}]" if family == socket.AF_INET6 else host.ipv4


def digest(folder: Path) -> dict[str, str]:
    """Each file, link and folder below, with what is in it and its mode."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name, mode = str(path.relative_to(folder)), f"{path.lstat().st_mode:o}"
        if path.is_symlink():
            found[name] = f"{mode} -> {os.readlink(path)}"
        elif path.is_file():
            found[name] = f"{mode} {hashlib.sha256(path.read_bytes()).hexdigest()}"
        else:
            found[name] = mode
    return found


def plant(folder: Path) -> None:
    """A tree of all sorts of files, the same every time."""
    rng = random.Random(7)
    for number, size in enumerate([0, 1, 700, 65_536, 100_001, 3_000_000] + [rng.randrange(5000) for _ in range(60)]):
        path = folder / f"branch-{number % 5}" / f"leaf {number}"
        path.parent.mkdir(mode=0o700, exist_ok=True)
        path.write_bytes(rng.randbytes(size))
        path.chmod(0o700 if number % 3 else 0o600)
    (folder / "link").symlink_to("branch-0/leaf 0")
    for path in [folder, *folder.rglob("*")]:
        os.utime(path, (1, 1), follow_symlinks=False)


# --- curl

BIG = random.Random(1).randbytes(8_000_000)
PIECES = [random.Random(size).randbytes(size) for size in (1, 1000, 1, 70_000, 3)]


class Site(http.server.BaseHTTPRequestHandler):
    """Answers in all the ways in which a body can begin and end."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path == "/big":
            self._reply(BIG)
        elif self.path == "/pieces":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for piece in [*PIECES, b""]:
                self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        elif self.path == "/until-the-end":
            self.send_response(200)
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(BIG)
        else:
            self._break_off()

    def do_POST(self) -> None:
        """Also with `Expect: 100-continue`."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self._reply(hashlib.sha256(body).hexdigest().encode())

    def _reply(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _break_off(self) -> None:
        """Promise more than comes; then a FIN, or for /reset a reset."""
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b"the beginning")
        self.close_connection = True
        if self.path == "/reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal of the tests."""


class SiteServer(http.server.ThreadingHTTPServer):
    """On a listener that exists already."""

    daemon_threads = True

    def __init__(self, listener: socket.socket) -> None:
        super().__init__(listener.getsockname()[:2], Site, bind_and_activate=False)
        self.socket.close()
        self.socket = listener

    def shutdown_request(self, request: Any) -> None:
        """Only close it: a shutdown() would send a FIN before the reset."""
        self.close_request(request)


@contextlib.contextmanager
def site(lab: Lab, port: int, family: int, context: ssl.SSLContext | None = None) -> Iterator[None]:
    listener = lab.server.listen(port, family)
    if context:
        listener = context.wrap_socket(listener, server_side=True)
    with SiteServer(listener) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), name="site")
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


def browse(lab: Lab, base: str, folder: Path, options: Sequence[str] = ()) -> list[object]:
    """All of the site: four exchanges in one connection, and then those that end one, in one each."""
    upload = folder / "upload"
    upload.write_bytes(BIG[:3_000_000])
    seen: list[object] = []
    report = ["-w", "%{url.path} %{http_code} %{size_download} %{num_connects}\\n"]
    got = [folder / f"got-{number}" for number in range(4)]
    for path in got:
        path.unlink(missing_ok=True)
    argv = ["curl", "-sS", "-g", "--max-time", "20", *options]
    several = [*report, "-o", str(got[0]), f"{base}/big", "-o", str(got[1]), f"{base}/pieces"]
    several += ["-o", str(got[2]), f"{base}/big", "-o", str(got[3]), f"{base}/pieces"]
    done = lab.client.run([*argv, *several], check=False)
    seen += [
        done.returncode,
        done.stdout,
        done.stderr,
        [hashlib.sha256(path.read_bytes()).hexdigest() for path in got],
    ]
    post = ["--data-binary", f"@{upload}", f"{base}/sum"]
    done = lab.client.run([*argv, *report, *post], check=False)
    seen += [done.returncode, done.stdout, done.stderr]
    done = lab.client.run([*argv, "-o", str(got[0]), f"{base}/until-the-end"], check=False)
    seen += [done.returncode, done.stderr, hashlib.sha256(got[0].read_bytes()).hexdigest()]
    for path in ("/short", "/reset"):
        done = lab.client.run(
            [*argv, "-w", "%{http_code} %{size_download}", "-o", "/dev/null", base + path], check=False
        )
        seen += [done.returncode, done.stdout]
    return seen


def check_browsed(seen: list[object]) -> None:
    """That it was a success at all, and where it was to fail, a failure."""
    pieces = b"".join(PIECES)
    big, small = hashlib.sha256(BIG).hexdigest(), hashlib.sha256(pieces).hexdigest()
    assert seen[0] == 0
    lengths = (len(BIG), len(pieces)) * 2
    assert [int(line.split()[-2]) for line in str(seen[1]).splitlines()] == list(lengths)
    assert [int(line.split()[-1]) for line in str(seen[1]).splitlines()] == [1, 0, 0, 0], "not one connection"
    assert seen[3] == [big, small, big, small]
    assert seen[4] == 0 and str(seen[5]).startswith(hashlib.sha256(BIG[:3_000_000]).hexdigest())
    assert seen[7] == 0 and seen[9] == big
    assert seen[10] != 0 and seen[12] != 0, "a body that broke off was taken for complete"


def test_curl(lab: Lab, relay: RelayProcess, family: int, tmp_path: Path, tools: Callable[..., None]) -> None:
    tools("curl")
    port = 8080
    base = f"http://{url_host(lab.server, family)}:{port}"
    with site(lab, port, family):
        work = functools.partial(browse, lab, base, tmp_path)
        check_browsed(directly_and_relayed(lab, relay, family, port, work, connections=5))


@pytest.mark.slow
def test_curl_over_tls(lab: Lab, relay: RelayProcess, family: int, tmp_path: Path, tools: Callable[..., None]) -> None:
    tools("curl", "openssl")
    port = 8443
    host = url_host(lab.server, family)
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    make = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    names = ["-subj", "/CN=server", "-addext", f"subjectAltName=IP:{lab.server.address(family)}"]
    subprocess.run([*make, *names, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with site(lab, port, family, context):
        trust = ["--cacert", str(certificate)]
        work = functools.partial(browse, lab, f"https://{host}:{port}", tmp_path, trust)
        check_browsed(directly_and_relayed(lab, relay, family, port, work, connections=5))


# --- iperf3


@pytest.mark.parametrize("direction", [[], ["--reverse"], ["--bidir"]], ids=["up", "down", "both"])
def test_iperf3(lab: Lab, relay: RelayProcess, family: int, direction: list[str], tools: Callable[..., None]) -> None:
    tools("iperf3")
    port = 8521 + len("".join(direction))
    amount = 200_000_000

    def measure() -> tuple[int, object, list[bool]]:
        argv = [
            "iperf3",
            "-c",
            lab.server.address(family),
            "-p",
            str(port),
            "-J",
            "-n",
            str(amount),
            "-P",
            "2",
        ]
        done = lab.client.run([*argv, *direction], check=False)
        said = json.loads(done.stdout)
        sent = [total["bytes"] for name, total in said["end"].items() if name.startswith("sum_sent")]
        # With --bidir, the direction that is through first ends the other.
        return done.returncode, said.get("error"), [max(sent) >= amount, min(sent) > 0]

    with server_program(lab, port, ["iperf3", "-s", "-p", str(port)]):
        streams = 4 if direction == ["--bidir"] else 2
        code, error, sent = directly_and_relayed(lab, relay, family, port, measure, connections=1 + streams)
    assert (code, error) == (0, None)
    assert sent == [True, True]


# --- redis

HASH_OF_ALL = """
local values = {}
for number = 0, 4999 do values[number + 1] = redis.call('GET', 'key:' .. number) end
return redis.sha1hex(table.concat(values))
"""


def test_redis(lab: Lab, relay: RelayProcess, family: int, tmp_path: Path, tools: Callable[..., None]) -> None:
    tools("redis-server", "redis-benchmark", "redis-cli")
    port, clients = 8379, 50
    to_server = ["-h", lab.server.address(family), "-p", str(port)]
    mass = "".join(f"SET key:{number} {'v' * (number % 300 + 1)}\r\n" for number in range(5000))

    def work() -> list[object]:
        benchmark = [
            "redis-benchmark",
            *to_server,
            "-n",
            "3000",
            "-c",
            str(clients),
            "-P",
            "4",
            "-d",
            "200",
            "--csv",
        ]
        marks = lab.client.run([*benchmark, "-t", "ping,set,get,lpush,lrange_100"], check=False)
        tests = [line.split(",")[0] for line in marks.stdout.splitlines()]
        cli = ["redis-cli", *to_server]
        lab.client.run([*cli, "FLUSHALL"])
        piped = lab.client.run([*cli, "--pipe"], input=mass, check=False)
        sizes = lab.client.run([*cli, "DBSIZE"], check=False)
        state = lab.client.run([*cli, "EVAL", HASH_OF_ALL, "0"], check=False)
        return [
            marks.returncode,
            marks.stderr,
            tests,
            piped.returncode,
            piped.stdout,
            sizes.stdout,
            state.stdout,
        ]

    server = [
        "redis-server",
        "--port",
        str(port),
        "--bind",
        "0.0.0.0",
        "::",
        "--save",
        "",
        "--protected-mode",
        "no",
    ]
    with server_program(lab, port, [*server, "--dir", str(tmp_path)]):
        seen = directly_and_relayed(lab, relay, family, port, work, connections=5 * clients)
    assert (seen[0], seen[1], seen[3]) == (0, "", 0)
    assert len(seen[2]) >= 6, "a benchmark is missing"  # one line of names, and one for each
    assert "errors: 0, replies: 5000" in str(seen[4])
    assert seen[5] == "5000\n"


# --- rsync


@pytest.mark.slow
def test_rsync(lab: Lab, relay: RelayProcess, family: int, tmp_path: Path, tools: Callable[..., None]) -> None:
    tools("rsync")
    port = 8873
    original, published, pushed, pulled = (tmp_path / name for name in ("original", "published", "pushed", "pulled"))
    for folder in (original, published, pushed, pulled):
        folder.mkdir()
    modules = "".join(f"[{path.name}]\npath = {path}\nread only = no\n" for path in (published, pushed))
    config = tmp_path / "rsyncd.conf"
    identity = "" if lab.user_namespace else "uid = 0\ngid = 0\n"
    general = f"use chroot = no\nmunge symlinks = no\nreverse lookup = no\n{identity}"
    config.write_text(general + modules)
    base = f"rsync://{url_host(lab.server, family)}:{port}"
    rsync = [
        "rsync",
        "-rlpt",
        "--itemize-changes",
        "--no-whole-file",
        "--contimeout=5",
        "--timeout=20",
        "--delete",
    ]

    changed = original / "branch-0" / "leaf 5"

    def edit() -> None:
        content = bytearray(changed.read_bytes())
        content[1_000_000:1_000_010] = b"0123456789"
        changed.write_bytes(content[:-7])

    def work() -> list[object]:
        for folder in (original, published, pushed, pulled):
            shutil.rmtree(folder)
            folder.mkdir()
        plant(original)
        plant(published)
        seen: list[object] = []
        for prepare in (None, edit):  # all of it, then the difference
            if prepare:
                prepare()
            for source, target in ((original, "pushed"), ("published", pulled)):
                pair = [f"{base}/{place}/" if isinstance(place, str) else f"{place}/" for place in (source, target)]
                done = lab.client.run([*rsync, *pair], check=False)
                seen += [done.returncode, done.stdout, done.stderr]
            seen += [digest(pushed), digest(pulled)]
        assert digest(original) == digest(pushed), "it did not do its work"
        assert digest(published) == digest(pulled)
        seen.append(lab.client.run(["rsync", f"{base}/nowhere/"], check=False).returncode)
        return seen

    # Where root is root of a user namespace only, the daemon cannot call setgroups(2): it must not be root.
    account = ["unshare", "-U", "--map-user=1", "--map-group=1"] if lab.user_namespace else []
    daemon = [*account, "rsync", "--daemon", "--no-detach", f"--port={port}", f"--config={config}"]
    with server_program(lab, port, daemon):
        seen = directly_and_relayed(lab, relay, family, port, work, connections=5)
    assert [code for code in seen if isinstance(code, int)] == [0] * 4 + [5]


# --- git


@pytest.mark.slow
def test_git(lab: Lab, relay: RelayProcess, family: int, tmp_path: Path, tools: Callable[..., None]) -> None:
    tools("git")
    port = 8418
    settings = {
        "HOME": str(tmp_path),
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_AUTHOR_DATE": "2026-11-22T12:00:00Z",
        "GIT_COMMITTER_DATE": "2026-11-22T12:00:00Z",
    }
    for role in ("AUTHOR", "COMMITTER"):
        settings |= {f"GIT_{role}_NAME": "A. Tester", f"GIT_{role}_EMAIL": "tester@example.org"}
    (tmp_path / ".gitconfig").write_text("[safe]\ndirectory = *\n[gc]\nauto = 0\n[init]\ndefaultBranch = main\n")
    published, clone = tmp_path / "published.git", tmp_path / "clone"
    env = ["env", *(f"{name}={value}" for name, value in settings.items())]
    remote = f"git://{url_host(lab.server, family)}:{port}/published.git"

    def git(*arguments: str) -> list[object]:
        done = lab.client.run([*env, "git", *arguments], check=False)
        return [done.returncode, done.stdout]

    def commit_all(folder: Path) -> None:
        assert git("-C", str(folder), "add", "--all")[0] == 0
        assert git("-C", str(folder), "commit", "-q", "-m", "all of it")[0] == 0

    first = tmp_path / "first"
    assert git("init", "-q", str(first))[0] == 0
    plant(first)
    commit_all(first)
    assert git("clone", "-q", "--bare", str(first), str(published))[0] == 0

    def work() -> list[object]:
        shutil.rmtree(clone, ignore_errors=True)
        seen = git("clone", "-q", remote, str(clone))
        seen += [{name: what for name, what in digest(clone).items() if not name.startswith(".git/")}]
        seen += git("-C", str(clone), "fsck", "--strict")
        (clone / "another").write_bytes(BIG[:2_000_000])
        commit_all(clone)
        seen += git("-C", str(clone), "push", "-q", remote, "HEAD:refs/heads/another")
        seen += git("ls-remote", remote)
        seen += git("-C", str(clone), "push", "-q", remote, ":refs/heads/another")
        seen += [git("clone", "-q", f"{remote}-that-is-not-there", str(tmp_path / "none"))[0]]
        return seen

    daemon = ["git", "daemon", "--reuseaddr", "--export-all", "--enable=receive-pack", f"--port={port}"]
    with server_program(lab, port, [*daemon, f"--base-path={tmp_path}"], env=settings):
        seen = directly_and_relayed(lab, relay, family, port, work, connections=5)
    assert [code for code in seen if isinstance(code, int)] == [0, 0, 0, 0, 0, 128]
    assert str(seen[8]).count("refs/heads/") == 2
    assert git("-C", str(published), "fsck", "--strict")[0] == 0


# --- a person at a keyboard

ARROW = "\x1b[A"
"""A key that comes as several bytes."""


def test_an_interactive_session(lab: Lab, relay: RelayProcess, family: int) -> None:
    """One key at a time, each echoed before the next; nothing is held back to wait for company."""
    port, keys = 8023, [*"echo hello, world\n", ARROW] * 12 + [ARROW] * 100

    def type_and_read() -> tuple[str, str, bool]:
        with lab.server.listen(port, family) as listener:
            thread = threading.Thread(target=echo_keys, args=(listener,), name="echo")
            thread.start()
            with lab.client.connect(lab.server.address(family), port) as client:
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                echoed, took = "", []
                for key in keys:
                    began = time.monotonic()
                    for byte in key:
                        client.sendall(byte.encode())
                    echoed += read(client, len(key)).decode()
                    took.append(time.monotonic() - began)
                client.shutdown(socket.SHUT_WR)
                last_words = read(client, 100).decode()
            thread.join()
        # Nagle's algorithm and delayed acknowledgements together would cost 40 ms an arrow.
        return echoed, last_words, sum(took) / len(took) < 0.005

    echoed, last_words, at_once = directly_and_relayed(lab, relay, family, port, type_and_read, connections=1)
    assert echoed == "".join(keys).upper()
    assert last_words == "bye"
    assert at_once


def read(sock: socket.socket, count: int) -> bytes:
    """So many bytes, or what comes before the end. MSG_WAITALL does not wait on a socket with a timeout."""
    got = b""
    while len(got) < count and (block := sock.recv(count - len(got))):
        got += block
    return got


def echo_keys(listener: socket.socket) -> None:
    """Echo each key when the whole of it has come, byte by byte."""
    listener.settimeout(10)
    server, _ = listener.accept()
    with server:
        server.settimeout(10)
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while key := server.recv(1):
            if key == b"\x1b":
                key += read(server, 2)
            for byte in key.upper():
                server.sendall(bytes([byte]))
        server.sendall(b"bye")
