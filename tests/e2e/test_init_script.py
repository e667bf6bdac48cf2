"""The init script as init, an operator and service(8) call it: every exit code of the LSB, on a machine that has an
/etc, a /run and process ids of its own, in the relay's host of the lab.

Linux Standard Base 5.0, "Init Script Actions".
"""

import contextlib
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest
from deadlines import wait_until
from flows import echo_server, steady, streams
from init_host import InitHost, gone, stranger
from interception import PORT, look, ping
from machine import NAME, SCRIPT
from rows import Seen

from tproxy_relay.lab import Lab, LabError

pytestmark = pytest.mark.slow

CONFIG = f"""\
bind = 127.0.0.1,::1
log-format = json
log-level = info
workers = 1
intercept-inbound = {PORT}
drain-timeout = 1
"""
WRONG = CONFIG + "mode = tporxy\n"
WRONG_AT = f"/etc/{NAME}.conf:7: mode: "
CALLS = pytest.mark.parametrize("service", [False, True], ids=["script", "service"])
VERBS = ("start", "stop", "restart", "try-restart", "reload", "force-reload", "status", "check")


@pytest.fixture
def machine(lab: Lab, tmp_path: Path, require_or_skip: Callable[[str], NoReturn]) -> Iterator[InitHost]:
    """The service is installed, and stopped. Afterwards no rule is left."""
    for tool in ("start-stop-daemon", "service"):
        if shutil.which(tool, path="/usr/sbin:/sbin:/usr/bin:/bin") is None:
            require_or_skip(f"there is no {tool} here")
    before = look(lab)
    with contextlib.ExitStack() as stack:
        try:
            machine = stack.enter_context(InitHost(lab.relay, tmp_path, CONFIG))
        except LabError as error:
            require_or_skip(str(error))
        yield machine
        machine.set_defaults()
        machine.must("stop")
        wait_until(lambda: look(lab) == before, "the rules are as before")


@pytest.fixture
def running(machine: InitHost) -> InitHost:
    """The service has been started."""
    machine.must("start")
    return machine


def relayed(lab: Lab, port: int = PORT) -> str:
    """'' if a new connection works; it does so with and without the relay."""
    with lab.client.connect(lab.server.ipv4, port) as sock:
        return ping(sock)


# --- one verb after the other


@CALLS
def test_from_the_first_start_to_the_stop(lab: Lab, machine: InitHost, service: bool) -> None:
    rules = look(lab)
    assert machine.do("status", service=service)[:2] == (3, f"{NAME} is not running\n")
    assert machine.do("start", service=service).code == 0
    pid = machine.pid
    assert machine.do("status", service=service)[:2] == (0, f"{NAME} is running (pid {pid})\n")
    assert look(lab) != rules, "it is ready, but does not intercept"
    done = machine.do("check", service=service)
    assert done.code == 0 and "is the running relay's" in done.said, done
    assert machine.do("start", service=service)[:2] == (0, f"{NAME}: is running already (pid {pid})\n")
    assert machine.do("reload", service=service).code == 0
    assert machine.do("force-reload", service=service).code == 0
    assert machine.pid == pid and machine.relays() == [pid]
    assert machine.do("restart", service=service).code == 0
    gone(machine, pid)
    assert machine.relays() == [machine.pid] != [pid]
    assert machine.do("stop", service=service).code == 0
    assert machine.left() == [] and look(lab) == rules
    assert machine.do("status", service=service).code == 3
    done = machine.do("check", service=service)
    assert done.code == 0 and "ok: " in done.said, done


def test_what_it_does_when_stopped(machine: InitHost) -> None:
    assert machine.do("stop").code == 0
    assert machine.do("try-restart").code == 0
    assert machine.do("reload")[:2] == (7, f"{NAME}: is not running\n")
    assert machine.left() == []
    for verb in ("restart", "force-reload"):
        machine.must(verb)
        assert machine.relays() == [machine.pid]
        machine.must("stop")
        assert machine.left() == []


def test_try_restart_restarts_what_runs(running: InitHost) -> None:
    old = running.pid
    running.must("try-restart")
    gone(running, old)
    assert running.relays() == [running.pid]


@pytest.mark.parametrize("arguments", [(), ("strat",), ("start", "now"), ("--help",)])
def test_a_wrong_verb(machine: InitHost, arguments: tuple[str, ...]) -> None:
    done = machine.run(SCRIPT, *arguments)
    assert done.code == 2
    assert done.said == f"Usage: {SCRIPT} {{start|stop|restart|try-restart|reload|force-reload|status|check}}\n"


def test_only_root(running: InitHost) -> None:
    """Nobody is root in a user namespace into which no user is mapped."""
    for verb in VERBS:
        done = running.run("unshare", "--user", SCRIPT, verb)
        assert "only root" in done.said if verb not in ("status", "check") else done.code in (0, 1), (verb, done)
        assert done.code == 4 or verb in ("status", "check"), (verb, done)
    assert running.relays() == [running.pid]


def test_a_program_that_is_not_installed(machine: InitHost) -> None:
    machine.daemon.unlink()
    for verb in VERBS:
        expected = {"stop": 0, "status": 3}.get(verb, 5)
        assert machine.do(verb).code == expected, verb


def test_it_stops_a_relay_whose_program_has_been_removed(running: InitHost) -> None:
    running.daemon.unlink()
    running.must("stop")
    assert running.left() == []


# --- not configured


@CALLS
@pytest.mark.row("H25", "init script with a bad file", "exit code 6 within 1 s")
def test_a_bad_configuration_makes_start_fail_at_once(lab: Lab, machine: InitHost, service: bool, seen: Seen) -> None:
    rules = look(lab)
    machine.config.write_text(WRONG)
    best = 60.0
    for verb in ("start", "restart", "force-reload"):
        done = machine.do(verb, service=service)
        assert done.code == 6 and WRONG_AT in done.said, done
        best = min(best, done.seconds)
    assert best < 1.0
    assert machine.left() == [] and look(lab) == rules
    seen("6, at once")


def test_a_bad_configuration_leaves_the_running_relay_alone(lab: Lab, running: InitHost) -> None:
    pid, rules = running.pid, look(lab)
    running.config.write_text(WRONG)
    for verb in ("reload", "force-reload", "restart", "try-restart", "check"):
        done = running.do(verb)
        assert done.code == 6 and WRONG_AT in done.said, (verb, done)
    assert running.relays() == [pid] and look(lab) == rules
    assert "reload" not in running.log
    running.must("stop")


BAD_DEFAULTS = {
    "syntax": "if then\n",
    "quotes": 'DAEMON_OPTS="--log-file \'/var/log/half"\n',
    "START_TIMEOUT": "START_TIMEOUT=soon\n",
    "STOP_TIMEOUT": "STOP_TIMEOUT=0\n",
    "option": "DAEMON_OPTS=--prots=1\n",
}


@pytest.mark.parametrize("wrong", BAD_DEFAULTS)
def test_bad_defaults(running: InitHost, wrong: str) -> None:
    """Nothing starts with them, but the relay that runs can be stopped."""
    pid = running.pid
    running.set_defaults(BAD_DEFAULTS[wrong])
    for verb in ("restart", "reload", "check"):
        done = running.do(verb)
        # The program itself has the last word on options.
        assert done.code == 6 and (wrong == "option" or f"/etc/default/{NAME}" in done.said), (verb, done)
    assert running.do("status").code == 0 and running.pid == pid
    running.must("stop")
    wait_until(lambda: running.left() == [], "nothing is left")
    assert running.do("start").code == 6
    assert running.left() == []


def test_no_defaults_at_all(machine: InitHost) -> None:
    machine.defaults.unlink()
    assert machine.do("start")[:2] == (5, f"{NAME}: not installed: there is no program /usr/sbin/{NAME}\n")


# --- a start that fails


def test_a_start_that_fails_says_why_and_does_not_wait(lab: Lab, machine: InitHost) -> None:
    rules = look(lab)
    with lab.relay.socket(socket.AF_INET) as taken:
        taken.bind(("127.0.0.1", 15006))
        taken.listen()
        done = machine.do("start")
        assert done.code == 1 and "cannot listen on 127.0.0.1:15006" in done.said
        assert done.seconds < 10, "START_TIMEOUT is 30"
        assert machine.left() == [] and look(lab) == rules
        assert machine.do("status").code == 3
    machine.must("start")


NEVER_READY = """\
#!/bin/sh
[ "$2" = --print-config ] || while :; do sleep 1; done
"""


def test_one_that_is_never_ready(machine: InitHost) -> None:
    machine.daemon.write_text(NEVER_READY)
    machine.set_defaults("START_TIMEOUT=1")
    done = machine.do("start")
    assert done.code == 1 and "not ready within 1 seconds" in done.said
    wait_until(lambda: machine.left() == [], "nothing is left")


def test_a_start_that_is_interrupted(machine: InitHost) -> None:
    machine.daemon.write_text(NEVER_READY)
    with machine.start("sh", "-c", f"echo $$; exec {SCRIPT} start") as script:
        assert script.stdout is not None
        pid = int(script.stdout.readline())
        wait_until(lambda: machine.pidfile.exists() and machine.pidfile.read_text(), "it is starting")
        machine.kill("-TERM", pid)
        assert script.wait(20) != 0
    wait_until(lambda: machine.left() == [], "nothing is left")


def test_two_starts_at_once(machine: InitHost) -> None:
    with machine.start(SCRIPT, "start") as one, machine.start(SCRIPT, "start") as other:
        said = [start.communicate(timeout=60)[0].decode() for start in (one, other)]
        assert (one.returncode, other.returncode) == (0, 0), said
    assert machine.relays() == [machine.pid]
    assert sum("is running already" in text for text in said) == 1
    machine.must("stop")
    assert machine.left() == []


def test_ten_starts_and_stops(lab: Lab, machine: InitHost) -> None:
    rules, pids = look(lab), set()
    for _ in range(10):
        machine.must("start")
        pids.add(machine.pid)
        machine.must("stop")
        assert machine.left() == []
    assert len(pids) == 10 and look(lab) == rules


# --- who is the relay, and who is not


STALE = {"start": 0, "stop": 0, "restart": 0, "try-restart": 0, "reload": 7, "force-reload": 0, "status": 1}


@pytest.mark.parametrize("name", ["stranger", NAME])
@pytest.mark.row("H26", "a pidfile that names somebody else", "never signalled")
def test_a_pidfile_that_names_somebody_else(machine: InitHost, name: str, seen: Seen) -> None:
    """Also one who has the relay's name, if the relay that had the number began at another time."""
    folder = machine.root / "run" / NAME
    folder.mkdir()
    with stranger(machine, name) as pid:
        for verb, code in STALE.items():
            machine.pidfile.write_text(f"{pid}\n")
            (folder / "relays").write_text(f"{pid} 1\n")
            done = machine.do(verb)
            assert done.code == code, (verb, done)
            if code == 0 and verb not in ("stop", "try-restart"):
                assert machine.pid != pid and machine.pid in machine.relays(), verb
                machine.must("stop")
            assert pid in machine.processes(), verb
    seen("not signalled")


def test_former_relays_whose_numbers_others_have_now(running: InitHost) -> None:
    relays = running.root / "run" / NAME / "relays"
    with stranger(running) as one, stranger(running, "tproxy-relay") as other:
        relays.write_text(f"{relays.read_text()}{one} 1\n{other} 1\n999999 1\nrubbish\n")
        assert running.do("status").said == f"{NAME} is running (pid {running.pid})\n"
        old = running.pid
        running.must("restart")
        gone(running, old)
        running.must("stop")
        assert sorted(running.processes()) == sorted((one, other))


@pytest.mark.parametrize("text", ["", "rubbish\n", "0\n", "-1\n", "1\n", "99999999\n", "1 2 3\n"])
def test_a_pidfile_with_rubbish_in_it(machine: InitHost, text: str) -> None:
    machine.pidfile.parent.mkdir()
    machine.pidfile.write_text(text)
    assert machine.do("status")[:2] == (1, f"{NAME} is not running, but its pidfile is there\n")
    assert machine.do("reload").code == 7
    machine.must("stop")
    assert machine.left() == []


def test_a_relay_that_was_killed(lab: Lab, running: InitHost) -> None:
    rules, dead = look(lab), running.pid
    running.kill("-KILL", dead)
    wait_until(lambda: running.processes() == {}, "workers and guard have died with it")
    assert running.do("status").code == 1
    assert running.do("reload").code == 7
    running.must("start")
    assert running.do("status").code == 0 and running.pid != dead and look(lab) == rules
    running.kill("-KILL", running.pid)
    running.must("stop")
    wait_until(lambda: running.left() == [], "nothing is left")


def test_the_state_is_unknown_without_proc(running: InitHost) -> None:
    done = running.run("unshare", "--mount", "sh", "-c", f"mount -t tmpfs none /proc && {SCRIPT} status")
    assert done[:2] == (4, f"{NAME}: state unknown: there is no /proc\n")


# --- where it is called from


def test_folders_that_do_not_exist_yet(running: InitHost) -> None:
    assert (running.root / "run" / NAME).stat().st_mode & 0o7777 == 0o755
    assert (running.root / "log" / NAME).stat().st_mode & 0o7777 == 0o750
    wait_until(lambda: '"listening"' in running.log, "its first line is in the log")
    assert (running.root / "log" / NAME / "stderr.log").read_text() == ""


@pytest.mark.parametrize("shell", ["dash", "bash"])
def test_shells(machine: InitHost, shell: str) -> None:
    for verb, code in {"start": 0, "restart": 0, "reload": 0, "status": 0, "stop": 0}.items():
        done = machine.run(shell, SCRIPT, verb)
        assert done.code == code, (verb, done)
    assert machine.left() == []


def test_the_environment_of_the_caller_changes_nothing(running: InitHost) -> None:
    running.must("stop")
    shell = {
        "PATH": "/nonexistent",
        "LOG_LEVEL": "rubbish",
        "TPROXY_RELAY_PORTS": "rubbish",
        "PYTHONHOME": "/nonexistent",
        "NOTIFY_SOCKET": "/nonexistent",
        "TMPDIR": "/nonexistent",
    }
    for verb in ("start", "reload", "restart", "status", "stop", "check"):
        done = running.run("/usr/bin/env", *(f"{name}={value}" for name, value in shell.items()), SCRIPT, verb)
        assert done.code == 0, (verb, done)
    assert running.left() == []


def test_the_environment_of_the_defaults_and_options_with_blanks(machine: InitHost) -> None:
    machine.set_defaults(
        "DAEMON_OPTS=\"--log-file '/var/log/log of the relay' --ports 15002,15006,15010\"\n"
        "export TPROXY_RELAY_LOG_LEVEL=debug\n"
    )
    machine.must("start")
    machine.must("stop")
    log = (machine.root / "log" / "log of the relay").read_text()
    assert "127.0.0.1:15010" in log and '"DEBUG"' in log


# --- new settings


def test_reload_puts_a_new_configuration_in_force(lab: Lab, running: InitHost) -> None:
    pid = running.pid
    with echo_server(lab.server, PORT, PORT + 1):
        assert relayed(lab, PORT + 1) == ""
        assert running.log.count("connection closed") == 0
        running.config.write_text(CONFIG.replace(f"= {PORT}", f"= {PORT}-{PORT + 1}"))
        running.must("reload")
        wait_until(lambda: '"reloaded"' in running.log, "it says so")
        assert relayed(lab, PORT + 1) == ""
        wait_until(lambda: "connection closed" in running.log, "it was relayed")
    assert running.relays() == [pid] == [running.pid]


def test_a_restart_while_it_reloads(running: InitHost) -> None:
    old = []
    for number in range(3):
        old.append(running.pid)
        running.kill("-HUP", running.pid)
        done = running.must("restart")
        assert "cannot" not in done.said, number
    for pid in old:
        gone(running, pid)
    assert running.relays() == [running.pid]


def test_a_restart_under_load_loses_no_connection(lab: Lab, running: InitHost) -> None:
    rules, pids = look(lab), [running.pid]
    with contextlib.ExitStack() as stack:
        stack.enter_context(echo_server(lab.server, PORT, PORT))
        stays = stack.enter_context(streams(lab.client, lab.server.ipv6, PORT))
        come = stack.enter_context(steady(lab.client, lab.server.ipv4, PORT))
        stays.go_on("at first")
        for number in range(4):
            done = running.do("restart", service=bool(number % 2))
            assert done.code == 0 and "cannot" not in done.said, done
            pids.append(running.pid)
            come.go_on(f"after restart {number}")
            stays.go_on(f"after restart {number}")
            assert look(lab) == rules
        last = come.finish()
        assert last["errors"] == {} and last["begun"] == last["served"] > 0, last
        for pid in pids[1:-1]:
            gone(running, pid)
        assert running.relays() == [pids[0], pids[-1]], "the first one still has its transfer"
        said = f"{NAME} is running (pid {pids[-1]}); former relays finish their connections (pid {pids[0]})\n"
        assert running.do("status")[:2] == (0, said)
        assert stays.finish()["errors"] == {}
        gone(running, pids[0])
    wait_until(lambda: running.log.count('"connection closed"') >= last["served"] + 1, "all are in the log")
    assert running.log.count('"connection closed"') == last["served"] + 1
    running.must("stop")
    assert running.left() == []


def test_stop_leaves_no_former_relay(lab: Lab, running: InitHost) -> None:
    """They have drain-timeout, and until then the rules that their connections need."""
    running.config.write_text(CONFIG.replace("drain-timeout = 1", "drain-timeout = 0"))
    with echo_server(lab.server, PORT, PORT), contextlib.ExitStack() as stack:
        first = running.pid
        one = stack.enter_context(lab.client.connect(lab.server.ipv4, PORT))
        assert ping(one) == ""
        running.must("restart")
        second = running.pid
        other = stack.enter_context(lab.client.connect(lab.server.ipv4, PORT))
        assert ping(other) == ""
        running.must("restart")
        assert running.relays() == [first, second, running.pid]
        assert ping(one) == ping(other) == ""
        running.must("stop")
        assert running.left() == []
        assert "ConnectionReset" in ping(one) and "ConnectionReset" in ping(other)
    assert running.log.count('"outcome": "drained"') == 2


def test_a_former_relay_that_does_not_end_is_killed(lab: Lab, running: InitHost) -> None:
    running.set_defaults("STOP_TIMEOUT=1")
    with echo_server(lab.server, PORT, PORT), lab.client.connect(lab.server.ipv4, PORT) as sock:
        assert ping(sock) == ""
        old = running.pid
        running.must("restart")
        running.kill("-STOP", old)
        running.must("stop")
        wait_until(lambda: running.left() == [], "nothing is left")


# --- restarts that need a stop


def restarted_with_a_stop(machine: InitHost, config: str) -> str:
    """What it said."""
    old = machine.pid
    machine.config.write_text(config)
    done = machine.must("restart")
    assert f"process {old} cannot hand over to a relay with this configuration: stopping it" in done.said
    assert machine.relays() == [machine.pid] != [old]
    return done.said


def test_another_mode(lab: Lab, running: InitHost) -> None:
    said = restarted_with_a_stop(running, CONFIG.replace("127.0.0.1,::1", "0.0.0.0,::") + "mode = redirect\n")
    assert "its mode differs" in said
    with echo_server(lab.server, PORT, PORT):
        assert relayed(lab) == ""
        wait_until(lambda: "connection closed" in running.log, "it was relayed")


def test_the_end_of_interception(lab: Lab, running: InitHost) -> None:
    assert "intercepts, and this relay would not" in restarted_with_a_stop(
        running, CONFIG.replace("intercept-", "#intercept-")
    )
    running.must("restart")
    restarted_with_other_ports(lab, running, CONFIG.replace("intercept-", "#intercept-"))


def restarted_with_other_ports(lab: Lab, machine: InitHost, config: str) -> None:
    """None of them is the old relay's, so it is not asked to hand over, and must be told to stop."""
    old = machine.pid
    machine.config.write_text(config + "ports = 15012,15016\n")
    machine.must("restart")
    gone(machine, old)
    assert machine.relays() == [machine.pid]
    assert not lab.relay.run(["ss", "-Hltn", "sport = :15006"]).stdout


def test_other_ports_and_the_ruleset_of_the_old_relay(running: InitHost) -> None:
    said = restarted_with_a_stop(running, CONFIG + "ports = 15012,15016\noutbound-port = 15012\ninbound-port = 15016\n")
    assert "holds the ruleset" in said


def test_less_to_keep_of_the_source(running: InitHost) -> None:
    running.config.write_text(CONFIG + "preserve-source = address\n")
    running.must("restart")
    assert "no longer preserving source addresses" in restarted_with_a_stop(running, CONFIG)


def test_all_addresses_instead_of_one(running: InitHost) -> None:
    """The same port cannot be open on both."""
    said = restarted_with_a_stop(running, CONFIG.replace("127.0.0.1,::1", "0.0.0.0,::"))
    assert "cannot listen on 0.0.0.0:15002 while 127.0.0.1:15002 is open" in said


def test_one_that_cannot_start_leaves_the_old_one(lab: Lab, running: InitHost) -> None:
    old, rules = running.pid, look(lab)
    running.config.write_text(CONFIG + "ports = 15002,15006,15010\n")
    with lab.relay.socket(socket.AF_INET) as taken:
        taken.bind(("127.0.0.1", 15010))
        taken.listen()
        done = running.do("restart")
        assert done.code == 1 and "cannot listen on 127.0.0.1:15010" in done.said
        assert f"process {old} goes on" in done.said and done.seconds < 10
        assert running.relays() == [old] == [running.pid] and look(lab) == rules
        assert sorted(path.name for path in running.pidfile.parent.iterdir()) == ["relays", f"{NAME}.pid"]
    running.must("restart")
    gone(running, old)
