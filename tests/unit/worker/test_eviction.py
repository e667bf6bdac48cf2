"""Which connection goes when there is no room."""

import time
from collections.abc import Iterator

import loopback
import pytest
from deadlines import wait_until
from desks import DeskMaker, target_of
from lines import Lines, collected

from tproxy_relay.worker import eviction
from tproxy_relay.worker.eviction import Eviction

pytestmark = pytest.mark.usefixtures("nothing_left_behind")


@pytest.fixture
def lines() -> Iterator[Lines]:
    with collected() as lines:
        yield lines


def test_those_that_have_rested_go_and_the_idlest_first(lines: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eviction, "REST", 0.2)
    maker = DeskMaker()
    with loopback.listen() as server:
        desk = maker(target_of(server))
        evictions = Eviction(desk.registry)
        assert not evictions.make_room(), "nobody is there"
        ends = []
        for _ in range(3):
            client = desk.dial()
            desk.start()
            ends += [client, server.accept()[0]]
        wait_until(lambda: all(one.relay for one in desk.registry.live()), "all are open")
        first, second, third = desk.registry.live()
        time.sleep(0.25)  # they rest
        ends[0].sendall(b"x")
        assert ends[1].recv(1) == b"x"
        wait_until(lambda: first.moved == (1, 0), "it is counted")
        assert [evictions.make_room() for _ in range(3)] == [True, True, False], "the first one is busy"
        assert lines.outcomes(2) == ["evicted", "evicted"]
        assert {line["id"] for line in lines.closed(2)} == {second.id, third.id}
        for end in ends:
            end.close()
        desk.close()
