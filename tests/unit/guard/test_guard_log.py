"""A ruleset in trouble does not fill the log."""

from collections.abc import Iterator

import lines as lines_module
import pytest
from deadlines import wait_until
from lines import Lines
from plans import PLAN

from tproxy_relay.errors import RelayError
from tproxy_relay.guard import messages
from tproxy_relay.guard.guard_client import Interception
from tproxy_relay.guard.guard_log import MOST_RESTORED, GuardLog
from tproxy_relay.ipc import channel


@pytest.fixture
def said() -> Iterator[Lines]:
    with lines_module.collected() as lines:
        yield lines


def test_what_comes_again_is_said_once(said: Lines) -> None:
    guard_log = GuardLog()
    for _ in range(2 * MOST_RESTORED):
        guard_log.died()
        guard_log.not_started(RelayError("no memory"))
        guard_log.warned("using iptables")
        guard_log.restored("a rule")
    guard_log.restored("another rule")
    assert [(line.levelname, line.getMessage()) for line in said.records] == [
        ("ERROR", "the guard of the ruleset has died, starting another one"),
        ("ERROR", "no memory"),
        ("WARNING", "using iptables"),
        *[("WARNING", "ruleset restored")] * (MOST_RESTORED + 1),
    ]


def test_trouble_that_goes_on_is_one_line_and_its_end_another(said: Lines) -> None:
    talk, guards = channel.pair()
    messages.send_event(guards, messages.Serving("nft", PLAN.digest, "active"))
    interception = Interception(PLAN, "nft", talk)
    interception.install()
    for event in (*[messages.Trouble("IPv6 is off")] * 5, messages.Well()) * 2:
        messages.send_event(guards, event)
    for _ in range(2 * MOST_RESTORED):
        messages.send_event(guards, messages.Restored("a rule", "active"))
    messages.send_event(guards, messages.Trouble("the last one"))
    wait_until(lambda: interception.health.trouble == "the last one", "all of them are read")
    assert len(said.of("the ruleset could not be changed: IPv6 is off")) == 1
    assert len(said.of("the ruleset is as it should be again")) == 1
    assert len(said.of("ruleset restored")) == MOST_RESTORED
    interception.hand_over(guards.fileno(), 4711)
    guards.close()
