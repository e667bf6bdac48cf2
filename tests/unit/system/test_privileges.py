"""What a process has left after it became what it is: as /proc/self/status says it there, not as it was asked for."""

import json
import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import accounts
import children
import pytest
from deadlines import wait_until

from tproxy_relay.errors import CapabilityMissingError, ConfigError, SystemRefusedError
from tproxy_relay.system import privileges
from tproxy_relay.system.privileges import NUMBERS, SUPERVISOR, Account, Held

Need = Callable[[str], NoReturn]

BECOME = """
import json, os, sys
from tproxy_relay.system import privileges
from tproxy_relay.errors import RelayError
user, keep, *becoming = json.loads(sys.argv[1])
try:
    command = privileges.for_worker(None if user is None else privileges.account(user), keep)
except RelayError as error:
    sys.exit(f"{error.exit_code} {error}")
os.execvp(command[0], [*command, *becoming])
"""

CAT = ("cat", "/proc/self/status")
NET_RAW = 1 << NUMBERS["net_raw"]
ALL_OF_SUPERVISOR = sum(1 << NUMBERS[name] for name in SUPERVISOR)
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another account")


class Status(dict[str, str]):
    """Of a process: the lines of its /proc/PID/status."""

    def caps(self) -> dict[str, int]:
        """Its capability sets, by the last letters of their names."""
        return {name[3:]: int(value, 16) for name, value in self.items() if name.startswith("Cap")}


def becomes(user: str | None, keep: Sequence[str] = (), prefix: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """A program that was started as a worker is: cat, which every account may execute."""
    return children.run_python(BECOME, json.dumps([user, list(keep), *CAT]), prefix=prefix)


def status_of(ran: subprocess.CompletedProcess[str]) -> Status:
    assert (ran.returncode, ran.stderr) == (0, "")
    return Status(line.split(":\t", 1) for line in ran.stdout.splitlines())


def sets(kept: int, bounding: int | None = None) -> dict[str, int]:
    """The five sets of a process that keeps these."""
    return {"Inh": kept, "Prm": kept, "Eff": kept, "Amb": kept, "Bnd": kept if bounding is None else bounding}


# --- a worker


@pytest.mark.parametrize(("keep", "left"), [((), 0), (("net_raw",), NET_RAW)])
def test_of_root(keep: Sequence[str], left: int, require_or_skip: Need) -> None:
    """uid 0 alone means nothing: what it could gain at exec is not in its bounding set."""
    status = status_of(becomes(None, keep, children.need(children.NETWORK, require_or_skip)))
    assert status.caps() == sets(left)
    assert status["NoNewPrivs"] == "1"
    assert status["Uid"].split() == ["0"] * 4


@as_root
@pytest.mark.parametrize(("keep", "left"), [((), 0), (("net_raw",), NET_RAW)])
def test_of_root_as_another_account(keep: Sequence[str], left: int) -> None:
    status = status_of(becomes("nobody", keep))
    nobody = privileges.account("nobody")
    assert status.caps() == sets(left)
    assert status["NoNewPrivs"] == "1"
    assert status["Uid"].split() == [str(nobody.uid)] * 4
    assert status["Gid"].split() == [str(nobody.gid)] * 4
    assert set(status["Groups"].split()) <= {str(gid) for gid in os.getgrouplist("nobody", nobody.gid)}


@as_root
def test_as_a_number_without_an_account() -> None:
    status = status_of(becomes("54321"))
    assert status["Uid"].split() == status["Gid"].split() == ["54321"] * 4
    assert status["Groups"].strip() == ""
    assert status.caps() == sets(0)


@as_root
def test_none_of_root_s_groups_is_left() -> None:
    prefix = ("setpriv", "--groups", "4,24")
    assert not {"4", "24", "0"} & set(status_of(becomes("nobody", (), prefix))["Groups"].split())


def test_of_one_that_may_do_nothing(require_or_skip: Need) -> None:
    """An ordinary account; or root without any capability, which is no more than that."""
    prefix = children.need(children.no_capabilities() or ("env",), require_or_skip)
    status = status_of(becomes(None, (), prefix))
    assert status.caps() == sets(0, status.caps()["Bnd"])
    assert status["NoNewPrivs"] == "1"
    ran = becomes("54321", (), prefix)
    assert ran.returncode == 1
    assert ran.stderr.startswith(
        "77 user: workers of account number 54321 take CAP_SETUID, CAP_SETGID and CAP_KILL: start "
    )


@pytest.mark.parametrize(("keep", "left"), [((), 0), (("net_raw",), NET_RAW)])
@as_root
def test_of_an_account_with_ambient_capabilities(keep: Sequence[str], left: int) -> None:
    """It has no CAP_SETPCAP, so the bounding set stays; with no_new_privs nothing is to be had from it."""
    given = ("--inh-caps=+net_raw,+net_admin", "--ambient-caps=+net_raw,+net_admin")
    becoming = ("setpriv", "--reuid=54321", "--regid=54321", "--clear-groups", *given)
    prefix = (*accounts.for_all_accounts(), *becoming)
    status = status_of(becomes(None, keep, prefix))
    bounding = status.caps()["Bnd"]
    assert bounding & ~NET_RAW
    assert status.caps() == sets(left, bounding)
    assert status["NoNewPrivs"] == "1"
    assert status_of(becomes("54321", keep, prefix)).caps() == sets(left, bounding), "its own account is no change"


def test_of_root_without_setpcap(require_or_skip: Need) -> None:
    """As in a container that was given two capabilities and no more: exec gives root all that the bounding set has."""
    given = "-all,+net_raw,+net_admin"
    prefix = (*children.need(children.NETWORK, require_or_skip), "setpriv", f"--bounding-set={given}")
    status = status_of(becomes(None, ("net_raw",), (*prefix, f"--inh-caps={given}")))
    assert status["NoNewPrivs"] == "1"
    bounding = status.caps()["Bnd"]
    assert bounding == NET_RAW | 1 << NUMBERS["net_admin"]
    assert status.caps() == {**sets(NET_RAW, bounding), "Eff": bounding, "Prm": bounding}


SLEEP = "echo $$; exec sleep 600"
"""For sh: every account may execute that."""
PARENT = """
import subprocess, sys
child = subprocess.Popen(sys.argv[1:])
child.wait()
"""


@pytest.mark.parametrize("user", [None, pytest.param("nobody", marks=as_root)])
def test_it_dies_with_its_parent(user: str | None) -> None:
    command = privileges.for_worker(None if user is None else privileges.account(user), ())
    with children.running_python(PARENT, *command, "sh", "-c", SLEEP) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert Path(f"/proc/{pid}").exists()
        os.kill(parent.pid, signal.SIGKILL)  # not its process group
        parent.wait()
        wait_until(lambda: ended(pid), "it dies", 1)


def ended(pid: int) -> bool:
    """Also one that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):  # before and after the file was opened
        return True


# --- accounts


def test_accounts() -> None:
    root = privileges.account("root")
    assert root == privileges.account("0") == Account(0, 0, True)
    nobody = privileges.account("nobody")
    assert nobody == privileges.account(str(nobody.uid))
    assert privileges.account("54321") == Account(54321, 54321, False)


def test_an_account_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="user: there is no account 'no-such-account' on this host") as caught:
        privileges.account("no-such-account")
    assert caught.value.exit_code == 78


@pytest.mark.parametrize("number", [str(2**32 - 1), str(2**32), "9" * 30])
def test_a_number_that_no_account_can_have(number: str) -> None:
    """(uid_t) -1 means "no change" to setreuid(2): the worker would stay root."""
    with pytest.raises(ConfigError, match="user: "):
        privileges.account(number)


def test_without_setpriv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda *_args, **_more: None)
    with pytest.raises(SystemRefusedError, match="there is no setpriv here.*: install util-linux") as caught:
        privileges.for_worker(None, ())
    assert caught.value.exit_code == 71


def test_setpriv_is_found_with_any_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """A service manager's PATH may be short."""
    monkeypatch.setenv("PATH", "/nowhere")
    assert os.access(privileges.for_worker(None, ())[0], os.X_OK)
    monkeypatch.delenv("PATH")
    assert os.access(privileges.for_worker(None, ())[0], os.X_OK)


def test_becoming_another_takes_capabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("setuid", "setgid", "kill")
    for missing in names:
        bits = sum(1 << NUMBERS[name] for name in names if name != missing)
        monkeypatch.setattr(privileges, "held", lambda bits=bits: Held(bits, 0))
        with pytest.raises(CapabilityMissingError) as caught:
            privileges.for_worker(Account(54321, 54321, False), ())
        assert caught.value.exit_code == 77


ONE_ACCOUNT = ("unshare", "--user", "--map-root-user", "--")


def test_an_account_that_this_user_namespace_has_not_is_refused_in_words(require_or_skip: Need) -> None:
    children.need(children.NETWORK, require_or_skip)
    assert privileges.not_mapped(privileges.account(str(os.geteuid()))) == ""
    for user, told in ((accounts.ACCOUNT, f"account number {accounts.uid_of(accounts.ACCOUNT)} is not"), ("0", "")):
        ran = becomes(user, prefix=ONE_ACCOUNT)
        assert (ran.returncode, told in ran.stderr, "setres" in ran.stderr) == (1 if told else 0, True, False)
        assert not told or ran.stderr.startswith("77 user: ") and "/proc/self/uid_map" in ran.stderr


def test_groups_that_may_not_be_changed_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {"uid_map": "0 0 10", "gid_map": "0 0 10\n20 20 1", "setgroups": "deny"}
    monkeypatch.setattr(privileges, "_text_of", lambda name: texts[name])
    assert privileges.not_mapped(Account(10, 5, True)).startswith("account number 10 is not mapped")
    assert privileges.not_mapped(Account(9, 19, True)).startswith("group number 19 is not mapped")
    assert "/proc/self/setgroups" in privileges.not_mapped(Account(9, 20, True))
    texts["setgroups"] = "allow"
    assert privileges.not_mapped(Account(9, 20, True)) == ""


def test_the_numbers_of_capabilities(require_or_skip: Need) -> None:
    """linux/capability.h, as setpriv knows it."""
    prefix = children.need(children.NETWORK, require_or_skip)
    for name, number in NUMBERS.items():
        only = ("setpriv", f"--bounding-set=-all,+{name}", f"--inh-caps=-all,+{name}")
        ran = subprocess.run([*prefix, *only, *CAT], capture_output=True, text=True, check=False, timeout=20)
        assert status_of(ran).caps()["Bnd"] == 1 << number, name


# --- the supervisor


SHED = """
import os, sys
from tproxy_relay.system import privileges
privileges.shed(os.environ)
assert "_TPROXY_RELAY_SHED" not in os.environ
print(sys.argv[1:], file=sys.stderr)
with open("/proc/self/status") as status: print(status.read(), end="")
"""


def shed(*prefix: str, seconds: float = 10) -> Status:
    """A process that has given up what it does not need."""
    ran = children.run_python(SHED, "an argument", "--user=x y", prefix=prefix, seconds=seconds)
    assert ran.stderr == "['an argument', '--user=x y']\n", "just once, and with the same command line"
    ran.stderr = ""
    return status_of(ran)


def test_root_keeps_what_it_needs(require_or_skip: Need) -> None:
    network = children.need(children.NETWORK, require_or_skip)
    caps = shed(*network).caps()
    assert {caps["Eff"], caps["Prm"], caps["Bnd"]} == {ALL_OF_SUPERVISOR}
    assert caps["Amb"] == 0


def test_root_with_less_than_that(require_or_skip: Need) -> None:
    """As in a container: no reason to fail, nor to start again for ever."""
    network = children.need(children.NETWORK, require_or_skip)
    caps = shed(*network, "setpriv", "--bounding-set=-net_admin,-kill", "--inh-caps=-net_admin,-kill").caps()
    less = 1 << NUMBERS["net_admin"] | 1 << NUMBERS["kill"]
    assert {caps["Eff"], caps["Bnd"]} == {ALL_OF_SUPERVISOR & ~less}


def test_root_that_has_no_more_than_that_goes_on_at_once(require_or_skip: Need) -> None:
    network = children.need(children.NETWORK, require_or_skip)
    kept = "-all,+" + ",+".join(SUPERVISOR)
    caps = shed(*network, "setpriv", f"--bounding-set={kept}", f"--inh-caps={kept}").caps()
    assert {caps["Eff"], caps["Bnd"]} == {ALL_OF_SUPERVISOR}


def test_it_cannot_be_caught_in_a_loop(require_or_skip: Need, tmp_path: Path) -> None:
    """Whatever setpriv has done, it is asked once."""
    network = children.need(children.NETWORK, require_or_skip)
    useless, asked = tmp_path / "setpriv", tmp_path / "asked"
    useless.write_text(f'#!/bin/sh\necho asked >> {asked}\nwhile [ "$1" != -- ]; do shift; done\nshift\nexec "$@"\n')
    useless.chmod(0o755)
    path = f"PATH={tmp_path}{os.pathsep}{os.environ['PATH']}"
    caps = shed(*network, "env", path).caps()
    assert asked.read_text().splitlines() == ["asked"]
    assert caps["Bnd"] & ~ALL_OF_SUPERVISOR


def test_one_who_cannot_give_anything_up_goes_on_as_it_is(require_or_skip: Need) -> None:
    network = children.need(children.NETWORK, require_or_skip)
    caps = shed(*network, "setpriv", "--bounding-set=-setpcap", "--inh-caps=-setpcap").caps()
    assert caps["Bnd"] & ~ALL_OF_SUPERVISOR


@as_root
def test_an_ordinary_account_keeps_what_it_was_given() -> None:
    given = ("--inh-caps=+net_raw", "--ambient-caps=+net_raw")
    becoming = ("setpriv", "--reuid=54321", "--regid=54321", "--clear-groups", *given)
    caps = shed(*accounts.for_all_accounts(), *becoming).caps()
    assert caps == sets(NET_RAW, caps["Bnd"])
