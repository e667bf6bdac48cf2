"""Marks and ports as iptables-restore reads them."""

from dataclasses import replace

from plans import PLAN

from tproxy_relay.intercept import iptables_words
from tproxy_relay.intercept.iptables_words import Rule
from tproxy_relay.settings import PortRange

MASKED = replace(PLAN, mark_mask=0x70)


def test_only_our_bits_of_a_mark_are_set_and_compared() -> None:
    assert iptables_words.bits(MASKED, 0x20) == "0x20/0x70"
    there = "-m connmark --mark 0x20/0x70 -m conntrack --ctdir ORIGINAL"
    assert iptables_words.marked(MASKED, 0x20, "ORIGINAL") == there


def test_seven_ranges_fit_into_a_rule() -> None:
    ranges = [PortRange(port, port + 1) for port in range(100, 260, 20)]
    first, second = iptables_words.by_ports("-p tcp", ranges, "-j ACCEPT", "some")
    assert first.match.endswith("--dports 100:101,120:121,140:141,160:161,180:181,200:201,220:221")
    assert second == Rule("-p tcp -m multiport --dports 240:241", "-j ACCEPT", "some")
    assert second.text == '-p tcp -m multiport --dports 240:241 -m comment --comment "some" -j ACCEPT'
