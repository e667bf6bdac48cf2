"""The ways of relayed packets through the rules of others, in a network of the test's own."""

import socket

import pytest
from doctor import PORT, case

from tproxy_relay.check import journeys
from tproxy_relay.check.context import Case
from tproxy_relay.check.journeys import Journey
from tproxy_relay.intercept import programs
from tproxy_relay.settings import PortRange

pytestmark = pytest.mark.usefixtures("network")

OUT = PortRange(9000, 9001)


def of_ipv4(one: Case) -> list[Journey]:
    return [journey for journey in journeys.of(one) if journey.packet.family == 4]


def test_what_arrives_keeps_its_mark_after_the_relays_rules() -> None:
    one = case()
    for journey in (each for each in of_ipv4(one) if not each.in_floods):
        assert (journey.packet.mark, journey.packet.port) == (one.plan.marks.inbound, PORT.first)
        assert [(station.hook, station.first) for station in journey.keeps] == [("prerouting", journeys.MANGLE)]


def test_what_programs_here_send_comes_by_lo_before_the_relays_rules() -> None:
    one = case(intercept_inbound=(), intercept_outbound=(OUT,))
    outbound = one.plan.marks.outbound
    arriving = [each for each in of_ipv4(one) if (each.packet.iif, each.packet.mark) == ("lo", outbound)]
    assert {station.last for each in arriving for station in each.keeps} == {journeys.MANGLE}
    assert {each.packet.ct_mark for each in arriving} == {one.plan.marks.outbound}
    own = [each for each in of_ipv4(one) if each.what.startswith("the relay's own")]
    assert [each.packet.port for each in own] == [9000] and own[0].keeps[0].hook == "output"
    assert not [each for each in of_ipv4(case()) if each.what.startswith("the relay's own")], "no rules take them"


def test_a_server_here_is_another_way() -> None:
    one = case(preserve_source="address")
    assert not journeys.served_here(PORT)
    assert any("answers of servers" in journey.what for journey in of_ipv4(one))
    with socket.create_server(("127.0.0.1", PORT.first)):
        assert journeys.served_here(PORT) and not journeys.served_here(OUT)
        words = {journey.what for journey in of_ipv4(case(preserve_source="address"))}
        assert "answers of port 8000 of this host on their way to the relay" in words
        assert not any("answers of servers" in each for each in words)
        assert not [each for each in of_ipv4(case()) if each.keeps], "it is delivered here, whatever its mark is"


def test_each_interface_with_an_address_is_a_way_in() -> None:
    for name, address in (("one", "192.0.2.1/24"), ("two", "198.51.100.1/24")):
        programs.run(f"ip link add {name} type bridge".split())
        programs.run(f"ip link set {name} up".split())
        programs.run(f"ip addr add {address} dev {name}".split())
    assert {journey.packet.iif for journey in of_ipv4(case()) if journey.keeps} == {"one", "two"}
    assert {journey.packet.iif for journey in of_ipv4(case(interface="two")) if journey.keeps} == {"two"}


def test_redirected_connections_are_to_be_tracked() -> None:
    found = of_ipv4(case(mode="redirect", intercept_outbound=(OUT,)))
    assert [(each.packet.port, each.tracked[0].hook) for each in found if each.tracked] == [
        (8000, "prerouting"),
        (9000, "output"),
    ]


def test_a_reverse_path_from_lo_is_tried_only_where_somebody_asks_for_it() -> None:
    outbound = {"intercept_inbound": (), "intercept_outbound": (OUT,)}
    assert {journey.packet.way_back for journey in of_ipv4(case(**outbound))} == {None}
    rule = "type filter hook prerouting priority mangle + 10; fib saddr . iif oif missing drop;"
    programs.run(["nft", "-f", "-"], f"table inet n {{ chain c {{ {rule} }}; }}")
    ways = {journey.packet.way_back for journey in of_ipv4(case(**outbound))}
    assert len(ways) == 2 and None in ways, "this kernel finds it, or does not"
