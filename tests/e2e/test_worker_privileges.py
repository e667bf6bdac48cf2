"""How little the relay needs: a worker has no right that it does not use, however the relay was started, and everything
works in every place that a relay can stand.

Each connection's way is proven by the relay's one record of it.
"""

import contextlib
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest
from accounts import ACCOUNT, HAVE_ACCOUNTS, NUMBER, OTHER, becoming, for_all_accounts, gid_of, uid_of
from activation import passing
from deadlines import wait_until
from interception import BOTH_WAYS, FAMILIES, OWN_SERVERS, PORT, processes
from rows import Seen
from topologies import PLACES, Place, ends

from tproxy_relay.lab import Lab, LabError, RelayProcess
from tproxy_relay.net.endpoint import from_sockaddr
from tproxy_relay.system import privileges

pytestmark = pytest.mark.slow

WORKERS = 2
NET_RAW = 1 << privileges.NUMBERS["net_raw"]
SETS = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
LISTENERS = ("0.0.0.0,15006,transparent", "::,15006,transparent", "0.0.0.0,15002,transparent", "::,15002,transparent")

NOTHING = ("setpriv", "--bounding-set=-all", "--inh-caps=-all")
NET_RAW_ONLY = ("setpriv", "--bounding-set=-all,+net_raw", "--inh-caps=-all,+net_raw", "--no-new-privs")
IN_GROUPS = ("setpriv", "--groups", "0,6")
AMBIENT = becoming(ACCOUNT, "net_raw", "net_admin")


@dataclass(frozen=True)
class Start:
    """A way to start the relay, and what its workers may have then."""

    name: str
    options: tuple[str, ...] = ()
    wrapper: tuple[str, ...] = ()
    account: str | None = None
    """Of the workers, if it is not the one that the lab is ours in."""
    keeps: int = 0
    """Their capabilities."""
    bounding: int | None = None
    """Where the supervisor must leave the bounding set as it found it; None: it is what they keep."""
    manages: bool = True
    """False: it lacks CAP_NET_ADMIN, and root has applied the rules."""
    needs_accounts: bool = False

    @property
    def preserve(self) -> str:
        """The value of preserve-source."""
        words = dict(zip(self.options, self.options[1:]))
        return words.get("--preserve-source", "no")


def to(account: str) -> tuple[str, ...]:
    return ("--user", account)


def by_root(user: str | None, *options: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Options and wrapper for workers of that account."""
    return (*options, *(to(user) if user else ())), for_all_accounts() if user else ()


ALL_CAPABILITIES = int(Path("/proc/self/status").read_text().partition("CapBnd:")[2].split()[0], 16)

STARTS = (
    Start("root", keeps=NET_RAW),
    Start("root-address", ("--preserve-source", "address"), keeps=NET_RAW),
    # Without CAP_SETPCAP the bounding set stays as it is: here, empty but for this one.
    Start("net-raw", wrapper=NET_RAW_ONLY, keeps=NET_RAW, manages=False),
    Start("net-raw-address", ("--preserve-source", "address"), NET_RAW_ONLY, keeps=NET_RAW, manages=False),
    Start("activated", wrapper=passing(*LISTENERS), keeps=NET_RAW),
)
WITH_ACCOUNTS = (
    Start("root-user", to(ACCOUNT), IN_GROUPS, account=ACCOUNT),
    Start("root-user-number", to(NUMBER), IN_GROUPS, account=NUMBER),
    Start("root-user-address", (*to(ACCOUNT), "--preserve-source", "address"), account=ACCOUNT, keeps=NET_RAW),
    Start("root-user-full", (*to(ACCOUNT), "--preserve-source", "full"), account=ACCOUNT, keeps=NET_RAW),
    Start("activated-user", to(ACCOUNT), passing(*LISTENERS), account=ACCOUNT),
    Start(
        "activated-nothing-user",
        to(ACCOUNT),
        (*passing(*LISTENERS), *becoming(ACCOUNT)),
        account=ACCOUNT,
        manages=False,
    ),
    Start("ambient", wrapper=AMBIENT, account=ACCOUNT, keeps=NET_RAW, bounding=ALL_CAPABILITIES),
    Start("ambient-user", to(ACCOUNT), AMBIENT, account=ACCOUNT, bounding=ALL_CAPABILITIES),
    Start(
        "ambient-address",
        ("--preserve-source", "address"),
        AMBIENT,
        account=ACCOUNT,
        keeps=NET_RAW,
        bounding=ALL_CAPABILITIES,
    ),
)
if HAVE_ACCOUNTS:  # else only what the one account that we have can do
    STARTS += tuple(Start(**{**vars(start), "needs_accounts": True}) for start in WITH_ACCOUNTS)

USERS = [None, ACCOUNT] if HAVE_ACCOUNTS else [None]
"""Of the workers, for tests of a relay that root has started."""


def status_of_threads(pid: int) -> Iterator[dict[str, str]]:
    """proc(5), /proc/PID/task/TID/status. There is at least the main thread."""
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):  # it has just ended
            yield dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)
    assert is_running(pid)


def check_workers(relay: RelayProcess, start: Start) -> None:
    """Every thread of each of them has what it may have, and no way to more."""
    workers = relay.workers
    assert len(workers) == WORKERS
    for pid in workers:
        check_worker(pid, start)


def check_worker(pid: int, start: Start) -> None:
    uid, gid = (uid_of(start.account), gid_of(start.account)) if start.account else (os.geteuid(), os.getegid())
    expected = dict.fromkeys(SETS, start.keeps)
    if start.bounding is not None:
        expected["CapBnd"] = start.bounding
    for status in status_of_threads(pid):
        assert {name: int(status[name], 16) for name in SETS} == expected
        assert status["NoNewPrivs"] == "1"
        assert set(status["Uid"].split()) == {str(uid)} and set(status["Gid"].split()) == {str(gid)}
        if start.needs_accounts:
            assert set(status["Groups"].split()) <= {str(gid)}


# --- the matrix


@dataclass
class Stage:
    """The lab with a relay that was started in one of these ways."""

    lab: Lab
    relay: RelayProcess
    start: Start
    served: int = 0
    """Connections so far."""


@contextlib.contextmanager
def started(lab: Lab, start: Start, ways: Sequence[str] = BOTH_WAYS) -> Iterator[Stage]:
    """The relay, and rules that lead to it: its own if it may have some."""
    wrapper = (*(for_all_accounts() if start.needs_accounts else ()), *start.wrapper)
    options = (*start.options, "--workers", str(WORKERS))
    if start.manages:
        with lab.relay_process(*options, *ways, wrapper=wrapper) as relay:
            yield Stage(lab, relay, start)
        return
    rules = (sys.executable, "-m", "tproxy_relay", "rules")
    lab.relay.run([*rules, "apply", "--config", os.devnull, *start.options, *ways])
    with lab.relay_process(*options, *OWN_SERVERS, wrapper=wrapper) as relay:
        yield Stage(lab, relay, start)
    lab.relay.run([*rules, "remove", "--config", os.devnull])


@pytest.fixture(scope="module", params=[pytest.param(start, id=start.name) for start in STARTS])
def stage(request: pytest.FixtureRequest, require_or_skip: Callable[[str], NoReturn]) -> Iterator[Stage]:
    with contextlib.ExitStack() as stack:
        try:
            lab = stack.enter_context(Lab())
        except LabError as error:
            require_or_skip(str(error))
        stage = stack.enter_context(started(lab, request.param))
        yield stage
        check_sum(stage)


def check_sum(stage: Stage) -> None:
    """Each of the connections was intercepted once, and none of the relay itself."""
    stage.relay.stop()
    stopped = stage.relay.wait_for_line(lambda line: line["message"] == "stopped")
    assert (stopped["accepted"], stopped["closed"]) == (stage.served, {"completed": stage.served})
    assert len(stage.relay.records()) == stage.served


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.topology)
@pytest.mark.row(
    "S1", "every thread of every worker, in 14 ways to start", "no capability but what is needed; no new privileges"
)
def test_workers_have_what_they_need_and_no_more(stage: Stage, place: Place, family: int, seen: Seen) -> None:
    check_exchange(stage, place, family)
    seen("none")


def test_inherited_listeners_need_no_capability_at_all(lab: Lab) -> None:
    """Root without any. It can neither mark its sockets nor has it an account that a rule could exempt: that is only
    for connections from outside."""
    start = Start("", wrapper=(*passing(*LISTENERS), *NOTHING), manages=False)
    with started(lab, start, BOTH_WAYS[:2]) as stage:
        listening = stage.relay.wait_for_line(lambda line: line["message"] == "listening")
        assert listening["listeners"] == "0.0.0.0:15006, [::]:15006, 0.0.0.0:15002, [::]:15002"
        for place in PLACES[:2]:
            for family in FAMILIES.values():
                check_exchange(stage, place, family)
        check_sum(stage)


def check_exchange(stage: Stage, place: Place, family: int) -> None:
    """A request and its answer go through the relay; a look at its workers on the way."""
    client_host, server_host = ends(stage.lab, place)
    with server_host.listen(PORT, family) as listener:
        listener.settimeout(5)
        with client_host.connect(server_host.address(family), PORT) as client:
            server, peer = listener.accept()
            with server:
                client.sendall(b"request")
                assert server.recv(100) == b"request"
                check_workers(stage.relay, stage.start)
                client.shutdown(socket.SHUT_WR)
                assert server.recv(100) == b""
                server.sendall(b"the answer")
            assert client.recv(100) == b"the answer" and client.recv(100) == b""
            record, name = stage.relay.record_of(client), client.getsockname()
    assert (record["outcome"], record["bytes_up"], record["bytes_down"]) == ("completed", 7, 10)
    assert record["orig_dst"] == str(from_sockaddr((server_host.address(family), PORT)))
    assert record["upstream_local"] == str(from_sockaddr(peer))
    source = "relay" if stage.start.preserve == "no" else place.can_preserve[stage.start.preserve == "full"]
    assert record["source"] == source
    assert (peer[0] == name[0]) == (source != "relay" or place.topology == "local")
    assert source != "full" or peer[1] == name[1]
    stage.served += 1


# --- the supervisor


def set_of(names: Sequence[str]) -> int:
    return sum(1 << privileges.NUMBERS[name] for name in names)


@pytest.mark.parametrize("user", USERS)
def test_a_supervisor_of_root_keeps_what_it_has_a_use_for(lab: Lab, user: str | None) -> None:
    options, wrapper = by_root(user, *BOTH_WAYS)
    with lab.relay_process(*options, wrapper=wrapper) as relay:
        expected = dict.fromkeys(("CapPrm", "CapEff", "CapBnd"), set_of(privileges.SUPERVISOR))
        guards = processes(lab, "-m tproxy_relay.guard")
        assert guards
        for pid in (relay.pid, *guards):
            for status in status_of_threads(pid):
                assert {name: int(status[name], 16) for name in expected} == expected
                assert int(status["CapAmb"], 16) == 0
                assert status["Uid"].split() == [str(os.geteuid())] * 4


@pytest.mark.parametrize("user", USERS)
def test_workers_that_come_later_have_no_more(lab: Lab, user: str | None) -> None:
    """In the place of one that has died, and those of a new generation."""
    start = Start("", keeps=0 if user else NET_RAW, account=user, needs_accounts=user is not None)
    options, wrapper = by_root(user, "--workers", str(WORKERS))
    with lab.relay_process(*options, wrapper=wrapper) as relay:
        first = relay.workers
        os.kill(first[0], signal.SIGKILL)
        wait_until(lambda: len(relay.workers) == WORKERS and first[0] not in relay.workers, "a new worker")
        wait_until(lambda: all(map(has_become_worker, relay.workers)), "it has become one")
        check_workers(relay, start)
        second = relay.workers
        relay.signal(signal.SIGHUP)
        relay.wait_for_line(lambda line: line["message"] == "reloaded")
        wait_until(lambda: len(relay.workers) == WORKERS, "the end of the generation before")
        assert not set(second) & set(relay.workers)
        check_workers(relay, start)
        relay.stop()


def has_become_worker(pid: int) -> bool:
    """False while it is one of the programs that lead there."""
    return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[1:3] == [b"-m", b"tproxy_relay.worker"]


@pytest.mark.parametrize("user", USERS)
def test_workers_end_with_the_supervisor(lab: Lab, user: str | None) -> None:
    """The kernel forgets to kill a child with its parent when the child changes its account (prctl(2))."""
    options, wrapper = by_root(user, "--workers", str(WORKERS))
    with lab.relay_process(*options, wrapper=wrapper) as relay:
        workers = relay.workers
        for pid in workers:  # so that they cannot go by themselves
            os.kill(pid, signal.SIGSTOP)
        os.kill(relay.pid, signal.SIGKILL)
        wait_until(lambda: not any(map(is_running, workers)), "the workers are gone", 1.0)


def is_running(pid: int) -> bool:
    """False for a zombie too."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("user", USERS)
def test_a_stalled_worker_is_killed(lab: Lab, user: str | None) -> None:
    """The account of a worker is not root's, and root has given up most of its rights."""
    options, wrapper = by_root(user, "--stall-timeout", "1")
    with lab.relay_process(*options, wrapper=wrapper) as relay:
        stalled = relay.worker
        os.kill(stalled, signal.SIGSTOP)
        ended = relay.wait_for_line(lambda line: line["message"] == "worker ended")
        assert (ended["pid"], ended["how"]) == (stalled, "signal 9")


# --- what cannot be


def without(*capabilities: str) -> tuple[str, ...]:
    """Root that lacks these."""
    listed = ",".join(f"-{name}" for name in capabilities)
    return ("setpriv", f"--bounding-set={listed}", f"--inh-caps={listed}")


REFUSED = [
    pytest.param(
        ("--mode", "redirect", "--intercept-outbound", str(PORT)),
        without("net_raw"),
        "exited with 77 .*cannot mark sockets.*CAP_NET_RAW is missing.*--user",
        id="neither-mark-nor-account",
    ),
    pytest.param(
        ("--intercept-outbound", str(PORT)),
        (*passing(*LISTENERS), *without("net_raw")),
        "exited with 77 .*cannot mark sockets.*CAP_NET_RAW is missing.*--user",
        id="neither-mark-nor-account-activated",
    ),
    pytest.param(
        ("--preserve-source", "address"),
        (*passing(*LISTENERS), *NOTHING),
        "exited with 77 .*preserve-source needs CAP_NET_RAW",
        id="preserve-source-without-net-raw",
    ),
    pytest.param(
        to(OTHER),
        without("setuid"),
        f"exited with 77 .*workers of account number {uid_of(OTHER)} take CAP_SETUID, CAP_SETGID and CAP_KILL",
        id="another-account-without-setuid",
    ),
    pytest.param(
        to(OTHER),
        without("setgid"),
        f"exited with 77 .*workers of account number {uid_of(OTHER)} take CAP_SETUID, CAP_SETGID and CAP_KILL",
        id="another-account-without-setgid",
    ),
    pytest.param(
        to(OTHER),
        without("kill"),
        f"exited with 77 .*workers of account number {uid_of(OTHER)} take CAP_SETUID, CAP_SETGID and CAP_KILL",
        id="another-account-without-kill",
    ),
    pytest.param(to("nosuch"), (), "exited with 78 .*no account 'nosuch'", id="unknown-account"),
]
if HAVE_ACCOUNTS:
    REFUSED += [
        pytest.param(
            to(OTHER),
            (*for_all_accounts(), *AMBIENT),
            f"exited with 77 .*workers of account number {uid_of(OTHER)} take CAP_SETUID, CAP_SETGID and CAP_KILL",
            id="another-account-by-an-ordinary-one",
        ),
        pytest.param(
            ("--intercept-outbound", str(PORT), "--mode", "redirect"),
            (*for_all_accounts(), *becoming(ACCOUNT, "net_admin")),
            "exited with 77 .*cannot mark sockets.*CAP_NET_RAW is missing.*--user",
            id="neither-mark-nor-account-ambient",
        ),
    ]


@pytest.mark.parametrize(("options", "wrapper", "words"), REFUSED)
def test_a_start_that_cannot_be_is_refused_in_words(
    lab: Lab, options: Sequence[str], wrapper: Sequence[str], words: str
) -> None:
    """And leaves nothing behind."""
    with pytest.raises(LabError, match=words), lab.relay_process(*options, wrapper=wrapper):
        pass
    assert "tproxy_relay" not in lab.relay.run(["nft", "list", "ruleset"]).stdout
    assert processes(lab, "tproxy_relay.") == []
