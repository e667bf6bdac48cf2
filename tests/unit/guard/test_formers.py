"""Relays before the present one, as channels whose other ends are here."""

import os
import select
import time

import pytest

from tproxy_relay.guard import formers
from tproxy_relay.guard.formers import Formers
from tproxy_relay.ipc import channel
from tproxy_relay.ipc.channel import Channel


def joined(some: Formers) -> tuple[Channel, Channel]:
    """The relay's end and the guard's."""
    talk, theirs = channel.pair()
    some.add(theirs)
    return talk, theirs


def test_what_they_say_means_nothing_and_their_end_is_known() -> None:
    some = Formers()
    assert not some
    talk, theirs = joined(some)
    reader, writer = os.pipe()
    talk.send({"order": "remove"}, [writer])
    os.close(writer)
    assert some.receive(theirs) and some
    assert select.select([reader], [], [], 5)[0] and os.read(reader, 1) == b"", "what came with it is closed"
    os.close(reader)
    talk.close()
    assert not some.receive(theirs) and not some
    theirs.close()


def test_they_are_told_and_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    some = Formers()
    ends = [end for _ in range(2) for end in joined(some)]
    some.send_orphaned()
    ends[0].close()
    monkeypatch.setattr(formers, "FAREWELL_TIMEOUT", 0.2)
    began = time.monotonic()
    some.part()
    assert time.monotonic() - began >= 0.2 and some, "one of them has not ended"
    assert [ends[2].receive(5), ends[2].receive(5)] == [
        ({"event": "orphaned"}, []),
        ({"event": "orphaned", "at_once": True}, []),
    ]
    ends[2].close()
    began = time.monotonic()
    monkeypatch.setattr(formers, "FAREWELL_TIMEOUT", 60)
    some.part()
    assert time.monotonic() - began < 30 and not some


def test_they_can_be_left() -> None:
    some = Formers()
    talk, theirs = joined(some)
    some.leave()
    assert not some
    some.send_orphaned()
    theirs.close()
    assert talk.receive(5) is None, "nothing was said to it"
    talk.close()
