"""What the kernel tells of links, and the number that an interface has now."""

import select
import socket

import pytest

from tproxy_relay.intercept import programs
from tproxy_relay.net import rtnetlink

pytestmark = pytest.mark.usefixtures("network")

RTM_NEWLINK = 16
"""linux/rtnetlink.h."""


def test_a_link_that_is_made_is_told() -> None:
    with rtnetlink.listen(socket.NETLINK_ROUTE, [rtnetlink.LINK]) as heard:
        assert not [*rtnetlink.messages(heard)]
        programs.run(["ip", "link", "add", "one", "type", "veth", "peer", "name", "two"])
        assert select.select([heard], [], [], 5)[0]
        assert RTM_NEWLINK in {message.kind for message in rtnetlink.messages(heard)}
        programs.run(["ip", "route", "add", "local", "192.0.2.0/24", "dev", "lo", "table", "9"])
        assert not [*rtnetlink.messages(heard)], "nobody has asked for routes"


def test_what_is_lost_is_told_too() -> None:
    with rtnetlink.listen(socket.NETLINK_ROUTE, [rtnetlink.LINK]) as heard:
        programs.run(["ip", "-batch", "-"], "link set lo up\nlink set lo down\n" * 500)
        assert rtnetlink.Message(0, b"") in [*rtnetlink.messages(heard)]
        assert not [*rtnetlink.messages(heard)]


def test_an_interface_has_another_number_each_time_that_it_is_made() -> None:
    numbers = {rtnetlink.index_of("one")}
    for _ in range(2):
        programs.run(["ip", "link", "add", "one", "type", "veth", "peer", "name", "two"])
        numbers.add(rtnetlink.index_of("one"))
        programs.run(["ip", "link", "del", "one"])
    assert len(numbers) == 3 and 0 in numbers
    assert rtnetlink.index_of("one") == 0
