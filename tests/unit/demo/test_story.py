"""What the demo promises; the whole of it is tried in tests/e2e/test_demo.py."""

import contextlib
import socket

import pytest

from tproxy_relay.demo import exchanges, story
from tproxy_relay.demo.story import BrokenPromise, Story
from tproxy_relay.lab import Lab


def test_a_promise_is_kept_or_broken() -> None:
    story.promise("a sum", 1 + 1, 2)
    with pytest.raises(BrokenPromise, match="^the demo is not as promised: a sum: 3, expected 2$") as caught:
        story.promise("a sum", 3, 2)
    assert caught.value.exit_code == 1


@pytest.mark.slow
def test_what_goes_wrong_on_the_way_is_a_broken_promise(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ConnectionRefusedError("nobody is there")

    monkeypatch.setattr(exchanges, "get", refuse)
    with contextlib.ExitStack() as opened, pytest.raises(BrokenPromise, match="ConnectionRefusedError: nobody"):
        Story(lab, opened).show()


def test_each_server_is_on_a_port_of_either_kind() -> None:
    first, last = map(int, story.INTERCEPTED.split("-"))
    assert all(first <= port <= last for port in (story.WEB, story.TALK, story.STREAM))
    assert not any(first <= port <= last for port in (story.WEB_DIRECT, story.TALK_DIRECT, story.STREAM_DIRECT))
    assert set(story.FAMILIES.values()) == {socket.AF_INET, socket.AF_INET6}
