"""A lab leaves nothing behind, however its maker ends; and labs do not see each other."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tproxy_relay.intercept import programs
from tproxy_relay.lab import Lab, LabError, needs

MAKER = """
import subprocess, sys
from tproxy_relay.lab import Lab
with Lab(user_namespace={user!r}) as lab:
    sleeper = lab.server.start(["sleep", "600"])
    print(*(host.pid for host in lab.hosts), sleeper.pid, flush=True)
    {then}
"""
"""Another process that makes a lab with a program in it, tells the pids, and goes on with `then`."""


def alive(pid: int) -> bool:
    """A zombie is dead: it only waits for its parent."""
    try:
        return re.search(r"^State:\tZ", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE) is None
    except (FileNotFoundError, ProcessLookupError):
        return False


def gone(pids: list[int], within: float = 10.0) -> bool:
    """Wait for processes that are not our children; True if all have ended."""
    deadline = time.monotonic() + within
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not any(map(alive, pids))


@contextlib.contextmanager
def maker(then: str, user: bool | None) -> Iterator[tuple["subprocess.Popen[str]", list[int]]]:
    script = MAKER.format(user=user, then=then)
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pids = [int(word) for word in process.stdout.readline().split()]
        try:
            yield process, pids
        finally:
            process.kill()


@pytest.fixture(params=[None, True], ids=["as-we-are", "user-namespace"])
def user(request: pytest.FixtureRequest, lab_possible: None) -> "bool | None":
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def lab_possible(require_or_skip: Callable[[str], object]) -> None:
    try:
        with Lab():
            pass
    except LabError as error:
        require_or_skip(str(error))


def test_kill_9_of_the_maker_ends_everything(user: bool | None) -> None:
    with maker("import time; time.sleep(600)", user) as (process, pids):
        assert len(pids) == 4 and all(map(alive, pids))
        process.kill()
        process.wait()
        assert gone(pids)


def test_kill_9_with_programs_just_being_started(user: bool | None) -> None:
    """A program that is forked but has not entered the namespace yet must not arrive in an empty house."""
    then = "while True: print(lab.client.start(['sleep', '600']).pid, flush=True)"
    with maker(then, user) as (process, pids):
        assert process.stdout is not None
        for _ in range(20):
            pids.append(int(process.stdout.readline()))
        process.kill()
        pids += [int(line) for line in process.stdout if line.endswith("\n")]
        assert gone(pids)


def test_leaving_the_with_ends_everything(user: bool | None) -> None:
    with Lab(user_namespace=user) as lab:
        sleeper = lab.client.start(["sleep", "600"])
        agents = [host.pid for host in lab.hosts]
    assert sleeper.wait(10) == -signal.SIGKILL
    assert not any(os.path.exists(f"/proc/{pid}") for pid in agents)
    lab.close()  # again does no harm


def test_an_exception_in_the_with_ends_everything(user: bool | None) -> None:
    with pytest.raises(ZeroDivisionError), Lab(user_namespace=user) as lab:
        agents = [host.pid for host in lab.hosts]
        raise ZeroDivisionError
    assert not any(os.path.exists(f"/proc/{pid}") for pid in agents)


def test_labs_side_by_side_do_not_meet(user: bool | None) -> None:
    with Lab(user_namespace=user) as one, Lab(user_namespace=user) as other:
        with one.server.listen(7000) as listener:
            one.client.connect(one.server.ipv4, 7000).close()
            listener.accept()[0].close()
            with pytest.raises(ConnectionRefusedError):
                other.client.connect(other.server.ipv4, 7000)


def test_nothing_shows_on_this_machine(user: bool | None) -> None:
    before = Path("/proc/net/dev").read_text().count(":"), os.listdir("/proc/sys/net/ipv4/conf")
    with Lab(user_namespace=user):
        after = Path("/proc/net/dev").read_text().count(":"), os.listdir("/proc/sys/net/ipv4/conf")
        assert after == before


def test_a_host_that_is_gone_says_so(user: bool | None) -> None:
    with Lab(user_namespace=user) as lab:
        os.kill(lab.client.pid, signal.SIGKILL)
        with pytest.raises(LabError, match="client host of the lab is gone"):
            for _ in range(2):  # the request may be sent before the signal takes effect
                lab.client.socket().close()


def test_a_namespace_that_cannot_be_made_is_one_line_with_the_kernels_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    refusing = tmp_path / "unshare"
    refusing.write_text("#!/bin/sh\necho 'unshare: unshare failed: Operation not permitted' >&2\nexit 1\n")
    refusing.chmod(0o755)
    monkeypatch.setattr(programs, "search_path", lambda: str(tmp_path))
    monkeypatch.setattr(needs, "require_tools", lambda: None)
    with pytest.raises(LabError) as caught:
        Lab().__enter__()
    assert "unshare failed: Operation not permitted" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_rules_steer_only_while_they_are_wanted(lab: Lab) -> None:
    before = lab.relay.run(["nft", "list", "ruleset"]).stdout, lab.relay.run(["ip", "rule"]).stdout
    for topology, preserve_source in (("gateway", False), ("local", True)):
        lab.intercept(["8000-8999", 22], topology=topology, preserve_source=preserve_source)  # type: ignore[arg-type]
        rules = lab.relay.run(["nft", "list", "ruleset"]).stdout
        assert "22" in rules and "8000-8999" in rules
        with pytest.raises(ConnectionRefusedError):
            lab.client.connect(lab.relay.ipv4, 8000)
    lab.stop_intercepting()
    lab.stop_intercepting()
    assert (lab.relay.run(["nft", "list", "ruleset"]).stdout, lab.relay.run(["ip", "rule"]).stdout) == before


def test_a_report_has_rules_and_sockets(lab: Lab) -> None:
    with lab.server.listen(7001):
        report = lab.report()
    assert "--- relay: nft list ruleset" in report and ":7001" in report
