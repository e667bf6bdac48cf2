"""`tproxy-relay rules` against a real kernel: as often as one likes, all of it or nothing, and with a clear line.

What was there before is compared to the byte with what is there after; others' rules stand beside all the time.
"""

import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest
from deadlines import wait_until
from interception import (
    BACKENDS,
    BOTH_WAYS,
    FAMILIES,
    OWN_SERVERS,
    PORT,
    attempt,
    echo_servers,
    furnish,
    look,
    opened,
    processes,
    ways,
)
from rows import Seen

import tproxy_relay
from tproxy_relay.intercept import programs
from tproxy_relay.lab import Lab, LabError

Done = subprocess.CompletedProcess[str]

EVERY_BACKEND = [pytest.param(name, marks=[] if name == "nft" else pytest.mark.slow) for name in BACKENDS]
INBOUND = ("--intercept-inbound", str(PORT))
REFUSED, NOT_PERMITTED = 71, 77
"""sysexits.h: EX_OSERR, EX_NOPERM."""


@pytest.fixture
def lab(fresh_lab: Lab, require_or_skip: Callable[[str], NoReturn]) -> Iterator[Lab]:
    """With rules of others, which are untouched when the test has taken ours away."""
    missing = [f"{name}-save" for name in BACKENDS[1:] if programs.find(f"{name}-save") is None]
    if missing:
        require_or_skip(f"no {' and no '.join(missing)}: apt-get install iptables")
    furnish(fresh_lab)
    before = rulesets(fresh_lab)
    yield fresh_lab
    assert rules(fresh_lab, "remove").returncode == 0
    assert rulesets(fresh_lab) == before


def rulesets(lab: Lab) -> str:
    """All rules and routes of the host, without counters."""
    return re.sub(r"packets \d+ bytes \d+", "packets bytes", look(lab))


def own(*arguments: str, wrapper: Sequence[str] = (), path: Path | None = None, **variables: str) -> list[str]:
    """The relay's command line, from this checkout, with a folder before all others in PATH."""
    package = Path(tproxy_relay.__file__).parents[1]
    if path:
        variables["PATH"] = f"{path}:{programs.search_path()}"
    settings = [f"{name}={value}" for name, value in {"PYTHONPATH": str(package), **variables}.items()]
    return ["env", *settings, *wrapper, sys.executable, "-m", "tproxy_relay", *arguments]


def rules(
    lab: Lab, action: str, *options: str, wrapper: Sequence[str] = (), path: Path | None = None, **variables: str
) -> Done:
    """`rules ACTION`, to its end, whatever that is."""
    ports = INBOUND if "--interface" in options else BOTH_WAYS
    words = ["rules", action, "--config", os.devnull, *(() if action == "remove" else ports), *options]
    return lab.relay.run(own(*words, wrapper=wrapper, path=path, **variables), check=False)


def applied(lab: Lab, *options: str) -> str:
    """Apply; what there is then."""
    done = rules(lab, "apply", *options)
    assert done.returncode == 0, done.stderr
    return rulesets(lab)


def status(lab: Lab, *options: str) -> tuple[int, dict[str, Any]]:
    """Its exit code and its answer."""
    done = rules(lab, "status", "--json", *options)
    return done.returncode, json.loads(done.stdout)


def rules_of_ours(text: str) -> list[str]:
    """In any order, and without the note of what iptables-nft had to make for us: that grows with every plan."""
    tables: list[str] = re.findall(r"^table inet tproxy_relay.*?^}", text, re.MULTILINE | re.DOTALL)
    lines = [line for line in text.splitlines() if re.search("^-A .*TPROXY_RELAY|proto 206", line)]
    return "".join(tables).splitlines() + sorted(re.sub(' made=[^"]*', "", line) for line in lines)


def is_one_line(done: Done) -> bool:
    """The refusal as a user reads it."""
    return done.stdout == "" and bool(re.fullmatch(r"tproxy-relay: [^\n]+\n", done.stderr))


# --- as often as one likes ---


@pytest.mark.parametrize("backend", EVERY_BACKEND)
@pytest.mark.row("H10", "rules apply twice", "the same ruleset as once")
def test_twice_is_like_once(lab: Lab, backend: str, seen: Seen) -> None:
    before = rulesets(lab)
    done = rules(lab, "apply", "--backend", backend)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith(f"applied with {backend}")
    there = rulesets(lab)
    assert there != before
    done = rules(lab, "apply", "--backend", backend)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("already applied")
    assert rulesets(lab) == there
    for said in ("removed\n", "there was nothing to remove\n"):
        done = rules(lab, "remove")
        assert (done.returncode, done.stdout, done.stderr) == (0, said, "")
        assert rulesets(lab) == before
    seen("the same")


@pytest.mark.row("H9", "rules remove, and again", "code 0; as before")
def test_nothing_to_remove_is_no_error(lab: Lab, seen: Seen) -> None:
    before = rulesets(lab)
    assert json.loads(rules(lab, "remove", "--json").stdout)["done"] == "there was nothing to remove"
    assert rulesets(lab) == before
    seen("code 0; as before")


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "other",
    [
        ("--intercept-inbound", "8000,9000-9010"),
        ("--preserve-source", "full"),
        ("--mode", "redirect"),
        ("--route-table", "7100", "--route-priority", "5000"),
        ("--on-failure", "closed", "--mark-mask", "0x70"),
    ],
    ids=" ".join,
)
def test_another_plan_takes_the_place_of_the_first(lab: Lab, backend: str, other: tuple[str, ...]) -> None:
    alone = applied(lab, *other, "--backend", backend)
    rules(lab, "remove")
    first = applied(lab, "--backend", backend)
    assert first != alone
    assert rules_of_ours(applied(lab, *other, "--backend", backend)) == rules_of_ours(alone)
    assert status(lab, *other)[1]["problems"] == [f"nothing listens on port {port}" for port in (15002, 15006)]


@pytest.mark.slow
@pytest.mark.parametrize("backends", [("nft", "iptables-nft"), ("iptables-nft", "iptables-legacy"), BACKENDS[::-2]])
def test_another_backend_takes_the_place_of_the_first(lab: Lab, backends: tuple[str, str]) -> None:
    first, second = backends
    alone = applied(lab, "--backend", second)
    rules(lab, "remove")
    applied(lab, "--backend", first)
    assert applied(lab, "--backend", second) == alone
    assert status(lab)[1]["backend"] == second


@pytest.mark.slow
def test_several_at_once_leave_one_ruleset(lab: Lab) -> None:
    alone = applied(lab)
    rules(lab, "remove")
    command = own("rules", "apply", "--config", os.devnull, *BOTH_WAYS)
    together = [lab.relay.start(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for _ in range(6)]
    said = [process.communicate(timeout=30)[1].decode() for process in together]
    codes = [process.returncode for process in together]
    assert set(codes) <= {0, REFUSED} and 0 in codes
    assert all("holds the ruleset" in line or "try again" in line for line, code in zip(said, codes) if code)
    assert rulesets(lab) == alone


# --- all of it or nothing ---


@dataclass(frozen=True)
class Broken:
    """A program that does not do what it should."""

    name: str
    program: str
    what: str
    """The end of a shell script."""
    when: str = "*"
    """Pattern of the arguments with which it is broken; with others it is as always."""
    backend: str = "nft"
    says: str = ""
    """What the user is told."""

    def __str__(self) -> str:
        return self.name


def broken(name: str, program: str, what: str, **more: str) -> Any:
    quick = name in ("nft refuses to load", "ip adds in IPv4 only")
    return pytest.param(Broken(name, program, what, **more), id=name, marks=[] if quick else pytest.mark.slow)


BROKEN = [
    broken("nft always refuses", "nft", "echo 'out of order today' >&2; exit 1", says="out of order today"),
    broken("nft refuses to load", "nft", "echo 'no such thing' >&2; exit 1", when="-f*", says="no such thing"),
    broken("nft refuses without a word", "nft", "exit 3", when="-f*", says="nothing"),
    broken("nft says what is no JSON", "nft", "echo '%&/('", says="nft"),
    broken("nft loads nothing and is content", "nft", "cat > /dev/null", when="-f*", says="does not have them"),
    broken("nft is killed", "nft", "kill -KILL $$", when="-f*", says="nft"),
    broken("nft cannot be run", "nft", "", when="", says="nft"),
    broken("ip refuses to add", "ip", "echo 'RTNETLINK answers: no' >&2; exit 2", when="*-batch*", says="answers: no"),
    broken("ip adds in IPv4 only", "ip", "echo 'no IPv6' >&2; exit 2", when="-6*-batch*", says="no IPv6"),
    broken("iptables-restore refuses", "iptables-nft-restore", "exit 1", backend="iptables-nft", says="iptables-nft"),
    broken(
        "ip6tables-restore refuses",
        "ip6tables-nft-restore",
        "echo 'not on Mondays' >&2; exit 1",
        backend="iptables-nft",
        says="not on Mondays",
    ),
    broken(
        "legacy ip6tables-restore refuses",
        "ip6tables-legacy-restore",
        "echo 'not on Mondays' >&2; exit 1",
        backend="iptables-legacy",
        says="not on Mondays",
    ),
    broken(
        "ip6tables-restore loads nothing and is content",
        "ip6tables-nft-restore",
        "cat > /dev/null",
        backend="iptables-nft",
        says="does not have them",
    ),
]


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder for PATH with the broken program in it."""
    case: Broken = request.getfixturevalue("case")
    script = tmp_path / case.program
    genuine = programs.find(case.program)
    lines = ["#!/bin/sh", 'case "$*" in', f"{case.when}) {case.what};;", f'*) exec {genuine} "$@";;', "esac"]
    script.write_text("\n".join([*lines, ""]) if case.when else "#!/no/such/shell\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
    return tmp_path


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.slow
def test_what_fails_leaves_nothing_behind(lab: Lab, case: Broken, folder: Path) -> None:
    before = rulesets(lab)
    done = rules(lab, "apply", "--backend", case.backend, path=folder)
    assert done.returncode == REFUSED and is_one_line(done), done
    assert case.says in done.stderr
    assert rulesets(lab) == before


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.slow
def test_what_fails_leaves_the_former_rules_as_they_were(lab: Lab, case: Broken, folder: Path) -> None:
    former = applied(lab, "--backend", case.backend, "--route-table", "7100")
    done = rules(lab, "apply", "--backend", case.backend, "--intercept-inbound", "9000", path=folder)
    assert done.returncode == REFUSED and is_one_line(done), done
    assert rulesets(lab) == former


@pytest.mark.slow
@pytest.mark.parametrize("case", BROKEN)
def test_a_relay_does_not_start_without_its_ruleset(lab: Lab, case: Broken, folder: Path) -> None:
    before = rulesets(lab)
    wrapper = ("env", f"PATH={folder}:{programs.search_path()}")
    with pytest.raises(LabError, match=f"exited with {REFUSED} before it was ready: tproxy-relay: ") as refusal:
        with lab.relay_process(*BOTH_WAYS, "--backend", case.backend, "--on-failure", "closed", wrapper=wrapper):
            pass
    assert case.says in str(refusal.value)
    assert rulesets(lab) == before
    assert not processes(lab, "-m tproxy_relay.guard")


def without(folder: Path, *prefixes: str) -> list[str]:
    """The command that becomes the one after it, on a machine that lacks the programs whose names begin so."""
    mounts = []
    homes = {os.path.realpath(home) for home in programs.search_path().split(":") if os.path.isdir(home)}
    for number, home in enumerate(sorted(homes)):
        if not any(name.startswith(prefixes) for name in os.listdir(home)):
            continue
        genuine, reduced = folder / f"genuine{number}", folder / f"reduced{number}"
        genuine.mkdir()
        reduced.mkdir()
        for name in os.listdir(home):
            if not name.startswith(prefixes):
                target = os.path.realpath(os.path.join(home, name))
                inside = target.startswith(home + "/")
                (reduced / name).symlink_to(genuine / os.path.relpath(target, home) if inside else target)
        mounts.append(f"mount --bind {home} {genuine} && mount --bind {reduced} {home} && ")
    assert mounts, f"nothing here is called {prefixes}"
    return ["unshare", "-m", "sh", "-c", "".join(mounts) + 'exec "$@"', "sh"]


@pytest.mark.parametrize(
    ("backend", "prefix", "missing", "package"),
    [
        ("nft", "nft", "nft", "nftables"),
        pytest.param("nft", "ip", "ip", "iproute2", marks=pytest.mark.slow),
        pytest.param("iptables", "ip6tables", "ip6tables.*-restore", "iptables", marks=pytest.mark.slow),
        pytest.param("iptables-legacy", "ip6tables", "ip6tables-legacy-restore", "iptables", marks=pytest.mark.slow),
    ],
)
def test_a_missing_program_is_named_with_its_package(
    lab: Lab, tmp_path: Path, backend: str, prefix: str, missing: str, package: str
) -> None:
    before = rulesets(lab)
    done = rules(lab, "apply", "--backend", backend, wrapper=without(tmp_path, prefix))
    assert done.returncode == REFUSED and is_one_line(done), done
    assert re.search(rf"{missing} not found: install the package {package}\b", done.stderr)
    assert rulesets(lab) == before


@pytest.mark.slow
def test_auto_takes_iptables_where_there_is_no_nft(lab: Lab, tmp_path: Path) -> None:
    no_nft = without(tmp_path, "nft")
    done = rules(lab, "apply", "--json", wrapper=no_nft)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["done"].startswith("applied with iptables")
    assert "nft not found" in answer["warnings"][0]
    assert status(lab)[1]["backend"].startswith("iptables")
    done = rules(lab, "remove", wrapper=no_nft)
    assert (done.returncode, done.stdout) == (0, "removed\n")
    assert not rules_of_ours(rulesets(lab))
    # A table that iptables-nft had to make stays, empty: only nft could take it away.
    lab.relay.run(["nft", "delete", "table", "ip6", "mangle"])


@pytest.mark.parametrize("action", ["apply", "remove", "status"])
@pytest.mark.row("B14", "rules without CAP_NET_ADMIN", "exit code 77")
@pytest.mark.slow
def test_without_the_right_to_it(lab: Lab, action: str, seen: Seen) -> None:
    there = applied(lab)
    options = ("--intercept-inbound", "9000") if action == "apply" else ()
    done = rules(lab, action, *options, wrapper=("setpriv", "--bounding-set", "-net_admin", "--inh-caps", "-net_admin"))
    assert done.returncode == NOT_PERMITTED and is_one_line(done), done
    assert "CAP_NET_ADMIN" in done.stderr
    assert rulesets(lab) == there
    seen("77")


# --- what is there, against the plan ---

DAMAGE = {
    "nft": (
        "nft delete rule inet tproxy_relay prerouting handle "
        "$(nft -a list chain inet tproxy_relay prerouting | sed -n 's/.*inbound, IPv6.*handle //p')",
        "nft add rule inet tproxy_relay output counter drop",
        "nft delete table inet tproxy_relay",
    ),
    "iptables-nft": ("ip6tables-nft -t mangle -F TPROXY_RELAY_PRE", "iptables-nft -t mangle -D OUTPUT 1"),
    "iptables-legacy": ("iptables-legacy -t mangle -D PREROUTING 1", "ip6tables-legacy -t mangle -F TPROXY_RELAY_LO"),
}
ROUTING_DAMAGE = ("ip rule del pref 7008", "ip -6 rule del pref 7007", "ip route flush table 7006")


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_status_finds_every_damage_and_apply_mends_it(lab: Lab, backend: str) -> None:
    whole = rules_of_ours(applied(lab, "--backend", backend))
    with lab.relay_process():
        for damage in (*DAMAGE[backend], *ROUTING_DAMAGE):
            assert (status(lab)[0], status(lab)[1]["state"]) == (0, "active"), f"before {damage}"
            lab.relay.run(["sh", "-e", "-c", damage])
            code, answer = status(lab)
            assert code == 1 and answer["state"] == "degraded" and answer["problems"], damage
            done = rules(lab, "apply", "--backend", backend)
            assert done.returncode == 0 and done.stdout.startswith("applied"), damage
            assert rules_of_ours(rulesets(lab)) == whole, damage


@pytest.mark.parametrize("backend", EVERY_BACKEND)
@pytest.mark.slow
def test_status_tells_what_there_is(lab: Lab, backend: str) -> None:
    assert (status(lab)[0], status(lab)[1]["state"], status(lab)[1]["backend"]) == (1, "absent", None)
    applied(lab, "--backend", backend)
    code, answer = status(lab)
    assert code == 1 and answer["problems"] == [f"nothing listens on port {port}" for port in (15002, 15006)]
    with echo_servers(lab), lab.relay_process(*OWN_SERVERS) as relay:
        assert not [way for way, ends in ways(lab).items() for f in FAMILIES.values() if attempt(*ends, f)]
        wait_until(lambda: opened(relay) == 6, "all are intercepted")
        code, answer = status(lab)
        assert (code, answer["state"], answer["backend"], answer["problems"]) == (0, "active", backend, [])
        assert answer["holder"] is None, "rules that were applied by hand"
        taken = [rule for rule in answer["rules"] if rule["label"].startswith("inbound") and rule["packets"]]
        assert sum(rule["packets"] for rule in taken) == 4, "SYNs of gateway and host in both families"
        assert all(listener["listening"] for listener in answer["listeners"])
        assert status(lab, "--intercept-inbound", "9000")[1]["state"] == "degraded", "another plan"
    rules(lab, "remove")
    with lab.relay_process(*BOTH_WAYS, "--backend", backend) as relay:
        code, answer = status(lab)
        assert (code, answer["state"], answer["holder"]) == (0, "active", relay.pid)
        for word in ("active", backend, str(relay.pid)):
            assert word in rules(lab, "status").stdout


# --- show ---


@pytest.mark.parametrize(
    "options",
    [
        (),
        pytest.param(("--preserve-source", "full", "--on-failure", "closed"), marks=pytest.mark.slow),
        pytest.param(("--mode", "redirect"), marks=pytest.mark.slow),
        pytest.param(("--interface", "rc", "--bind", "127.0.0.1,::1"), marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_what_is_shown_does_the_same(lab: Lab, backend: str, options: tuple[str, ...]) -> None:
    options = (*options, "--backend", backend)
    before = rulesets(lab)
    shown, steps = rules(lab, "show", *options), json.loads(rules(lab, "show", "--json", *options).stdout)
    assert (shown.returncode, shown.stderr, rulesets(lab)) == (0, "", before)
    there = applied(lab, *options)
    rules(lab, "remove")
    lab.relay.run(["sh"], input=shown.stdout)
    assert rulesets(lab) == there
    assert rules(lab, "apply", *options).stdout.startswith("already applied")
    rules(lab, "remove")
    assert rulesets(lab) == before
    assert steps["backend"] == backend
    for step in steps["steps"]:
        lab.relay.run(step["argv"], input=step["stdin"])
    assert rulesets(lab) == there


# --- nothing of the user's reaches a program unread ---

BAD_INTERFACES = {
    "quote": 'eth0"; flush ruleset; #',
    "newline": "eth0\nflush ruleset",
    "16 characters": "abcdefghijklmnop",
    "blank": "eth 0",
    "slash": "../eth0",
    "dots": "..",
    "semicolon": "eth0;reboot",
    "dollar": "$(reboot)",
    "letters of other scripts": "еth0",
    "final newline": "eth0\n",
    "brace": "eth0 } }",
}


@pytest.fixture
def traced(tmp_path: Path) -> Path:
    """A folder for PATH in which every program that could change rules writes down that it was run."""
    for name in (
        "nft",
        "ip",
        *(f"{kind}{way}" for kind in ("iptables", "ip6tables") for way in ("", "-save", "-restore")),
    ):
        (tmp_path / name).write_text(f'#!/bin/sh\necho "$0 $*" >> {tmp_path}/ran\nexit 1\n')
        (tmp_path / name).chmod(0o755)
    return tmp_path


@pytest.fixture(scope="module")
def bare_lab(require_or_skip: Callable[[str], NoReturn]) -> Iterator[Lab]:
    try:
        with Lab() as built:
            yield built
    except LabError as error:
        require_or_skip(str(error))


NAMES = [
    pytest.param(
        name, (*command, *INBOUND), id=f"{title}, {' '.join(command)}", marks=[] if quick else pytest.mark.slow
    )
    for title, name in BAD_INTERFACES.items()
    for command in (("rules", "apply"), ("rules", "show"), ("run",), ("check",))
    if command == ("rules", "apply") or title == "quote"
    for quick in (command == ("rules", "apply") and title == "quote",)
]


@pytest.mark.parametrize(("name", "command"), NAMES)
@pytest.mark.row("B9", "an interface name with nft or shell in it", "refused; no shell anywhere")
def test_a_name_that_no_interface_has(
    bare_lab: Lab, traced: Path, name: str, command: tuple[str, ...], seen: Seen
) -> None:
    without_file = [*command, "--config", os.devnull]
    refused(bare_lab, own(*without_file, f"--interface={name}", path=traced), 2, traced)
    refused(bare_lab, own(*without_file, path=traced, TPROXY_RELAY_INTERFACE=name), 78, traced)
    if name.endswith("\n"):
        return  # in a file that is the end of the line
    file = traced / "tproxy-relay.conf"
    file.write_text(f"interface = {name}\n")
    done = bare_lab.relay.run(own(*command, "--config", str(file), path=traced), check=False)
    assert done.returncode == 78 and is_one_line(done) and not (traced / "ran").exists(), done
    seen("refused; no shell")


def refused(lab: Lab, command: list[str], code: int, folder: Path) -> None:
    done = lab.relay.run(command, check=False)
    assert done.returncode == code and is_one_line(done), done
    assert "interface" in done.stderr
    assert not (folder / "ran").exists(), (folder / "ran").read_text()


def test_the_trace_would_have_shown_it(bare_lab: Lab, traced: Path) -> None:
    """The control."""
    done = rules(bare_lab, "apply", "--backend", "nft", path=traced)
    assert done.returncode == REFUSED and "/nft " in (traced / "ran").read_text()
