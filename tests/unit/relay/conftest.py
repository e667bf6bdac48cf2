"""Fixtures of the tests of connections, and of what several workers know of theirs."""

import socket
from collections.abc import Iterator

import lines as lines_module
import loopback
import pytest
import slots
from desks import DeskMaker
from lines import Lines
from registries import Two, registry_of

from tproxy_relay.ipc.slot import Slot


@pytest.fixture
def lines() -> Iterator[Lines]:
    with lines_module.collected() as collected:
        yield collected


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with loopback.listen() as listening:
        yield listening


@pytest.fixture
def desks() -> Iterator[DeskMaker]:
    maker = DeskMaker()
    yield maker
    for desk in maker.made:
        desk.close()


@pytest.fixture
def slot() -> Iterator[Slot]:
    with slots.slots() as (made,):
        yield made


@pytest.fixture
def two() -> Iterator[Two]:
    """Registries of two workers."""
    with slots.slots(2) as (one, other):
        yield registry_of(one, share_sources=True), registry_of(other, share_sources=True)
