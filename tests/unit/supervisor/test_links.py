"""The interface of the settings goes and comes: who may come in, and what is said of it."""

import contextlib
import selectors
import socket
import time
from collections.abc import Iterator
from dataclasses import replace

import lines as lines_module
import pytest
from deadlines import wait_until
from lines import Lines

from tproxy_relay.intercept import programs
from tproxy_relay.net import listeners
from tproxy_relay.settings import Settings
from tproxy_relay.supervisor.generation import Generation, prepare
from tproxy_relay.supervisor.links import Links
from tproxy_relay.supervisor.state import RelayState

pytestmark = pytest.mark.usefixtures("network")

SETTINGS = Settings(bind=("0.0.0.0",), ports=(0,), mode="redirect", interface="one")


class Loop:
    """The little of a supervisor that it takes."""

    def __init__(self) -> None:
        programs.run(["ip", "link", "set", "lo", "up"])
        self.state = RelayState({})
        self.selector = selectors.DefaultSelector()
        self.links = Links(self.selector, self.state)

    def put_in_force(self, settings: Settings = SETTINGS, number: int = 1) -> Generation:
        kept = self.state.current.listeners if self.state.current else ()
        self.state.current = prepare(settings, kept, number=number, inherited=False)
        self.turn()
        return self.state.current

    def turn(self, timeout: float = 0.0) -> None:
        for key, _ in self.selector.select(timeout):
            key.data()
        self.links.tick(time.monotonic())

    def close(self) -> None:
        self.links.close()
        self.links.close()
        self.selector.close()
        if self.state.current:
            listeners.close_all([*self.state.current.listeners])


@contextlib.contextmanager
def looping() -> Iterator[Loop]:
    """No fixture: that would be made before the network of the test."""
    made = Loop()
    try:
        yield made
    finally:
        made.close()


def reached(generation: Generation) -> bool:
    """Whether a client that comes in by lo, where packets of this host to itself do, is answered."""
    with socket.socket() as client:
        client.settimeout(0.3)
        return client.connect_ex(("127.0.0.1", generation.listeners[0].endpoint.port)) == 0


def said(lines: Lines) -> list[str]:
    return [record.getMessage() for record in lines.records if record.name.endswith(".links")]


def test_an_interface_comes_and_goes_and_comes() -> None:
    with looping() as loop, lines_module.collected() as lines:
        generation = loop.put_in_force()
        assert loop.state.missing_interface == "one" and not reached(generation)
        for _ in range(3):
            programs.run(["ip", "link", "set", "lo", "name", "one"])
            loop.turn()
            assert loop.state.missing_interface is None and reached(generation)
            programs.run(["ip", "link", "set", "one", "name", "lo"])
            loop.turn()
            assert loop.state.missing_interface == "one" and not reached(generation)
    assert said(lines) == [
        "interface one is not there yet: nothing is intercepted until it comes",
        "interface one is there: its clients are served",
        "interface one is gone: nothing is intercepted until it is back",
    ]


def test_without_an_interface_there_is_nothing_to_look_for() -> None:
    with looping() as loop:
        loop.turn()
        assert loop.links.deadline is None
        generation = loop.put_in_force(replace(SETTINGS, interface=None))
        assert loop.links.deadline is None and reached(generation)


def test_a_generation_with_other_listeners_is_kept_to_it_too() -> None:
    with looping() as loop:
        first = loop.put_in_force()
        programs.run(["ip", "link", "set", "lo", "name", "one"])
        second = prepare(replace(SETTINGS, bind=("127.0.0.1",)), [], number=2, inherited=False)
        programs.run(["ip", "link", "set", "one", "name", "lo"])
        loop.turn()
        listeners.close_all([*first.listeners])
        loop.state.current = second
        loop.turn()
        assert loop.state.missing_interface == "one" and not reached(second)


def test_it_looks_without_being_told() -> None:
    """A service manager may keep it from netlink."""
    with looping() as loop:
        generation = loop.put_in_force()
        loop.links.close()
        programs.run(["ip", "link", "set", "lo", "name", "one"])
        wait_until(lambda: loop.turn() or loop.state.missing_interface is None, "it has looked")
        assert reached(generation)
