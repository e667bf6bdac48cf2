"""`rules show | apply | remove | status`: what is printed, and the exit code."""

import json
from typing import Any

import loopback
import pytest

from tproxy_relay.cli import rules
from tproxy_relay.cli.arguments import Arguments
from tproxy_relay.config.options import ARGUMENTS
from tproxy_relay.errors import SystemRefusedError
from tproxy_relay.intercept import lock
from tproxy_relay.intercept.lock import Lock
from tproxy_relay.settings import PortRange, Settings

WHAT: dict[str, Any] = {
    "intercept_inbound": (PortRange(443, 443), PortRange(8000, 8100)),
    "intercept_outbound": (PortRange(80, 80),),
    "backend": "nft",
}


class Command:
    """A command, and what it printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, action: str, code: int = 0, **settings: object) -> str:
        return self._run(Settings(**{**WHAT, **settings}), {"action": action}, code)

    def json(self, action: str, code: int = 0, **settings: object) -> Any:
        return json.loads(self._run(Settings(**{**WHAT, **settings}), {"action": action, "json": True}, code))

    def _run(self, settings: Settings, arguments: dict[str, Any], code: int) -> str:
        assert rules.run(settings, Arguments(**{**ARGUMENTS, "command": "rules", **arguments})) == code
        return self._capsys.readouterr().out


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


def test_show_is_a_script(command: Command) -> None:
    lines = command("show").splitlines()
    assert lines[0] == "#!/bin/sh"
    assert lines[1].startswith("# The interception ruleset of tproxy-relay, plan ") and lines[1].endswith(", for nft.")
    assert "nft -f - <<'END'" in lines and lines[-1] == "END"


def test_show_in_json_has_the_same_steps(command: Command) -> None:
    shown = command.json("show")
    assert shown["backend"] == "nft"
    assert shown["steps"][-1]["argv"] == ["nft", "-f", "-"]
    assert all(step["stdin"].rstrip("\n") in command("show") for step in shown["steps"])


@pytest.mark.usefixtures("network")
def test_apply_and_remove_say_what_they_did(command: Command) -> None:
    summary = "with nft: inbound 443,8000-8100 to 15006; outbound 80 to 15002"
    assert command("apply") == f"applied {summary}\n"
    assert command("apply") == f"already applied {summary}\n"
    assert command.json("apply") == {"done": f"already applied {summary}", "warnings": []}
    assert command("remove") == "removed\n"
    assert command("remove") == "there was nothing to remove\n"
    assert command.json("remove") == {"done": "there was nothing to remove", "warnings": []}


@pytest.mark.usefixtures("network")
def test_status(command: Command) -> None:
    nobody = [{"port": port, "listening": False} for port in (15002, 15006)]
    absent = command.json("status", code=1)
    assert absent["state"] == "absent" and absent["backend"] is None and absent["listeners"] == nobody
    assert absent["rules"] == absent["routing"] == [] and absent["holder"] is None
    command("apply")
    deaf = command.json("status", code=1)
    assert deaf["state"] == "degraded"
    assert deaf["problems"] == ["nothing listens on port 15002", "nothing listens on port 15006"]
    with loopback.listen() as one:
        port = one.getsockname()[1]
        both = {"inbound_port": port, "outbound_port": port}
        command("apply", **both)
        well = command.json("status", **both)
        assert (well["state"], well["backend"], well["problems"]) == ("active", "nft", [])
        assert well["listeners"] == [{"port": port, "listening": True}]
        assert set(well["rules"][0]) == {"family", "chain", "label", "packets", "bytes"}
        text = command("status", **both)
        assert text.startswith(f"ruleset: active (nft)\nlistener: port {port}, listening\n")
        assert "0 packets  inet prerouting: inbound, IPv4\n" in text
        assert "problem: nothing listens on port 15006\n" in command("status", code=1)


@pytest.mark.usefixtures("network")
def test_a_running_relay_keeps_apply_and_remove_out(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "ANSWER_TIMEOUT", 0.05)  # this one does not answer
    with Lock():
        for action in "apply", "remove":
            with pytest.raises(SystemRefusedError):
                command(action)
        command("show")
        assert command.json("status", code=1)["state"] == "absent"
