"""What a relay says of itself, with real workers behind it."""

import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hands import Hands

from tproxy_relay.admin.client import Client
from tproxy_relay.errors import RelayError, SystemRefusedError
from tproxy_relay.ipc.scoreboard import Numbers
from tproxy_relay.outcome import Outcome
from tproxy_relay.supervisor.health import MINOR, Health, Problem
from tproxy_relay.supervisor.respawn import Respawn
from tproxy_relay.supervisor.state import Phase, RelayState
from tproxy_relay.supervisor.status import Status, failed


class Relay:
    """The state of a relay with these workers, and what is said of it."""

    def __init__(self, hands: Hands) -> None:
        self.hands = hands
        self.state = RelayState({})
        self.state.workers, self.state.current, self.state.phase = hands.workers, hands.generation, Phase.RUNNING
        self.state.current = replace(hands.generation, pool=replace(hands.generation.pool, size=1))
        self.respawn = Respawn(self.state)
        self.health = Health()
        self.status = Status(self.state, self.respawn, hands.selector, hands.log, self.health)  # type: ignore[arg-type]

    @property
    def complaints(self) -> Any:
        """What the document complains of."""
        return self.status.status["complaints"]

    def get(self, where: object, path: str) -> Any:
        """Ask it, as another process would."""
        answers: list[Any] = []

        def ask() -> None:
            try:
                answers.append(Client(where).get(path))  # type: ignore[arg-type]
            except RelayError as error:
                answers.append(str(error))

        thread = threading.Thread(target=ask)
        thread.start()
        self.hands.turn_until(lambda: self.status.tick(time.monotonic()) or answers, "it is answered")
        thread.join()
        return answers[0]


@pytest.fixture
def relay(hands: Hands) -> Iterator[Relay]:
    made = Relay(hands)
    yield made
    made.status.close()


def test_a_relay_at_work(relay: Relay) -> None:
    (worker,) = relay.hands.serving()
    relay.hands.connect()
    relay.status.sample()
    found: dict[str, Any] = relay.status.status
    json.dumps(found)
    assert (found["state"], found["health"], found["complaints"]) == ("running", "ok", [])
    assert (found["pid"], found["ruleset"], found["reloads"]) == (os.getpid(), None, 0)
    assert found["connections"] | {"accepted": 1, "active": 1, "closed": {}} == found["connections"]
    (row,) = found["workers"]
    assert (row["pid"], row["generation"], row["state"], row["active"]) == (worker.pid, 1, "serving", 1)
    assert relay.status.why_not_ready is None
    assert list(relay.status.askable) == [worker]


def test_what_is_wrong(relay: Relay) -> None:
    assert relay.complaints == ["0 of 1 workers are at work"]
    assert relay.status.why_not_ready == "no worker is at work"
    assert relay.respawn.schedule()
    assert relay.complaints[1] == "1 workers have died within 60 s; the log says how"
    assert relay.status.status["health"] == "degraded"
    relay.state.phase = Phase.ROLLING_OUT
    assert relay.complaints[0] == "the relay is reloading"
    for phase in (Phase.DRAINING, Phase.HANDED_OVER):
        relay.state.phase = phase
        assert relay.status.why_not_ready == f"the relay is {phase.value}" == relay.complaints[0]


def test_a_worker_that_leaves_may_still_be_asked(relay: Relay) -> None:
    (worker,) = relay.hands.start()
    relay.hands.ready(worker)
    states = [relay.status.status["workers"][0]["state"]]  # type: ignore[index]
    assert list(relay.status.askable) == []
    worker.serve()
    relay.hands.connect()
    worker.leave(None, 0.0, None)
    states.append(relay.status.status["workers"][0]["state"])  # type: ignore[index]
    assert states == ["starting", "leaving"]
    assert list(relay.status.askable) == [worker]
    assert relay.status.why_not_ready == "no worker is at work"


def test_nearly_full(relay: Relay) -> None:
    relay.hands.serving()
    relay.hands.connect()
    limits = relay.hands.generation.limits
    relay.state.current = replace(relay.state.generation, limits=limits._replace(most=1))
    assert relay.complaints == ["full: 1 connections, max-connections is 1; new ones wait or are refused"]
    (before,) = relay.status.status["problems"]  # type: ignore[misc]
    relay.hands.connect()
    (after,) = relay.status.status["problems"]  # type: ignore[misc]
    assert after["what"].startswith("full: 2 ") and after["since"] == before["since"], "since it is full"


def test_its_problems(relay: Relay) -> None:
    log = logging.getLogger("tproxy_relay.test")
    log.addHandler(relay.status.problems)
    try:
        log.error("a problem")
    finally:
        log.removeHandler(relay.status.problems)
    (line,) = relay.status.status["last_problems"]  # type: ignore[misc]
    assert (line["level"], line["message"]) == ("ERROR", "a problem")


def test_it_answers_where_the_settings_say(relay: Relay, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second = (str(tmp_path / name / "admin.sock") for name in ("first", "second"))
    relay.status.listen(first)
    relay.state.current = replace(
        relay.state.generation, settings=replace(relay.state.generation.settings, admin=first)
    )
    relay.status.open()
    for where in (first, os.getpid()):
        assert relay.get(where, "/status")["state"] == "running"
    relay.state.current = replace(
        relay.state.generation, settings=replace(relay.state.generation.settings, admin=second)
    )
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / "admin.sock").touch()
    for _ in range(2):
        relay.status.follow_settings()
    assert not os.path.exists(first)
    assert caplog.text.count("is there and is no socket") == 1, "once is enough"
    (tmp_path / "second" / "admin.sock").unlink()
    relay.status.follow_settings()
    assert relay.get(second, "/history")["live"] == [0]
    relay.status.close_public()
    assert not os.path.exists(second)
    assert relay.get(os.getpid(), "/status")["silent"] == []


def test_where_it_cannot_be(relay: Relay, tmp_path: Path) -> None:
    (tmp_path / "admin.sock").touch()
    with pytest.raises(SystemRefusedError, match="is there and is no socket"):
        relay.status.listen(str(tmp_path / "admin.sock"))


def test_what_has_failed() -> None:
    closed = {Outcome.COMPLETED: 4, Outcome.DENIED: 2, Outcome.CLIENT_RESET: 3}
    assert failed(Numbers(9, 0, {outcome.value: count for outcome, count in closed.items()})) == 2


def test_it_stops_with_its_sockets(relay: Relay, tmp_path: Path) -> None:
    path = str(tmp_path / "admin.sock")
    relay.status.listen(path)
    relay.status.close()
    assert not os.path.exists(path)


def test_what_the_doctor_has_found(relay: Relay) -> None:
    relay.hands.serving()
    relay.health.put("look", [Problem("full", "it is rather full", kind=MINOR)])
    assert relay.complaints == ["it is rather full"] and relay.status.why_not_ready is None
    relay.health.put("look", [Problem("marks", "nft rule x sets marks", "nft delete x")])
    assert relay.complaints == ["nft rule x sets marks; do: nft delete x"]
    assert relay.status.why_not_ready == "degraded: nft rule x sets marks; do: nft delete x"
    (found,) = relay.status.status["problems"]  # type: ignore[misc]
    assert (found["name"], found["remedy"], found["class"]) == ("marks", "nft delete x", "relay")
    relay.health.put("look", [])
    assert relay.status.status["health"] == "ok" and relay.status.why_not_ready is None
