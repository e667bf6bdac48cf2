"""What is allowed and what is denied, in every spelling that slips past naive filters."""

import ipaddress
import itertools
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tproxy_relay.relay import acl
from tproxy_relay.relay.acl import SPECIAL, AccessList
from tproxy_relay.settings import Network, PortRange

UNTOLD = AccessList((), ())

DENIED = [
    "0.0.0.0",
    "0.1.2.3",
    "127.0.0.1",
    "127.255.255.254",
    "169.254.169.254",
    "169.254.0.1",
    "224.0.0.1",
    "239.255.255.255",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "fe80::1",
    "febf:ffff::1",
    "fec0::1",
    "ff02::1",
    "fd00:ec2::254",
    "::ffff:127.0.0.1",
    "::ffff:169.254.169.254",
    "::ffff:0.0.0.0",
    "::ffff:0:127.0.0.1",
    "::ffff:0:a9fe:a9fe",
    "::127.0.0.1",
    "::169.254.169.254",
    "64:ff9b::7f00:1",
    "64:ff9b::169.254.169.254",
    "64:ff9b::e000:1",
    "64:ff9b:1::7f00:1",
    "64:ff9b:1:7f00:0:100::",
    "2002:7f00:1::",
    "2002:a9fe:a9fe::1",
    "2001:0:7f00:1:0:0:f5f5:f5f5",
    "2001:0:102:304::80ff:fffe",
    "2001:db8::5efe:127.0.0.1",
    "2001:db8::200:5efe:a9fe:a9fe",
]
ALLOWED = [
    "1.1.1.1",
    "10.0.0.1",
    "126.255.255.255",
    "128.0.0.1",
    "169.253.1.1",
    "169.255.1.1",
    "192.168.1.1",
    "223.255.255.255",
    "2001:db8::1",
    "fd00::1",
    "fd00:ec2::253",
    "::ffff:10.0.0.1",
    "64:ff9b::10.0.0.1",
    "64:ff9b:1::10.0.0.1",
    "64:ff9b:1:a00:0:100::",
    "2002:a00:1::1",
    "fe7f::1",
    "ff::1",
]


@pytest.mark.parametrize("host", DENIED)
def test_denied_from_the_beginning(host: str) -> None:
    verdict = UNTOLD.judge(host, 80)
    assert verdict.allowed is False
    assert "/" in verdict.why, "it names the network"


@pytest.mark.parametrize("host", ALLOWED)
def test_nothing_is_said_of_the_others(host: str) -> None:
    assert UNTOLD.judge(host, 80).allowed is None


@given(st.sampled_from(SPECIAL), st.randoms(use_true_random=False))
def test_every_address_of_a_special_network_is_denied_in_every_disguise(
    special: tuple[str, str], random: Random
) -> None:
    network = ipaddress.ip_network(special[0])
    number = int(network.network_address) + random.randrange(network.num_addresses)
    host = str(ipaddress.ip_address(number.to_bytes(network.max_prefixlen // 8, "big")))
    assert UNTOLD.judge(host, 1).allowed is False
    if network.version == 4:
        disguises = [number + (0xFFFF << 32), number + (0x64FF9B << 96), (0x2002 << 112) + (number << 80) + 1]
        for disguise in disguises:
            assert UNTOLD.judge(str(ipaddress.IPv6Address(disguise)), 1).allowed is False


def networks(*texts: str) -> tuple[Network, ...]:
    """'network' or 'network port' or 'network first-last'."""
    found = []
    for text in texts:
        address, _, ports = text.partition(" ")
        first, _, last = ports.partition("-")
        found.append(Network(address, PortRange(int(first), int(last or first)) if ports else None))
    return tuple(found)


@pytest.mark.parametrize(
    "allow, deny, host, port, allowed",
    [
        ([], ["10.0.0.0/8"], "10.1.2.3", 80, False),
        ([], ["10.0.0.0/8"], "11.1.2.3", 80, None),
        (["10.1.0.0/16"], ["10.0.0.0/8"], "10.1.2.3", 80, True),
        (["10.1.0.0/16"], ["10.0.0.0/8"], "10.2.2.3", 80, False),
        (["10.0.0.0/8"], ["10.1.0.0/16"], "10.1.2.3", 80, False),
        (["10.0.0.0/8"], ["10.1.0.0/16"], "10.2.2.3", 80, True),
        ([], ["10.0.0.0/8 22"], "10.1.2.3", 22, False),
        ([], ["10.0.0.0/8 22"], "10.1.2.3", 23, None),
        ([], ["10.0.0.0/8 22-24"], "10.1.2.3", 24, False),
        (["10.0.0.0/8 443"], ["10.0.0.0/8"], "10.1.2.3", 443, True),
        (["10.0.0.0/8 443"], ["10.0.0.0/8"], "10.1.2.3", 444, False),
        (["10.0.0.0/8"], ["10.0.0.0/8 22"], "10.1.2.3", 22, False),
        (["10.0.0.0/8 1-100"], ["10.0.0.0/8 22"], "10.1.2.3", 22, False),
        (["169.254.169.254/32"], [], "169.254.169.254", 80, True),
        (["169.254.169.254/32"], [], "169.254.169.253", 80, False),
        (["169.254.169.254/32 80"], [], "169.254.169.254", 81, False),
        (["0.0.0.0/0", "::/0"], [], "127.0.0.1", 80, False),
        (["0.0.0.0/0", "::/0"], [], "1.1.1.1", 80, True),
        (["::1/128"], [], "::1", 80, True),
        (["10.0.0.0/8"], ["0.0.0.0/0", "::/0"], "10.0.0.1", 80, True),
        (["10.0.0.0/8"], ["0.0.0.0/0", "::/0"], "1.1.1.1", 80, False),
        (["10.0.0.0/8"], ["0.0.0.0/0", "::/0"], "2001:db8::1", 80, False),
        (["127.0.0.0/8"], [], "64:ff9b::7f00:1", 80, True),
        (["64:ff9b::/96"], [], "64:ff9b::7f00:1", 80, False),
        (["64:ff9b::/96"], [], "64:ff9b::a00:1", 80, True),
        (["10.0.0.0/8"], ["::/0"], "64:ff9b::a00:1", 80, False),
        ([], ["10.0.0.0/8"], "::ffff:10.0.0.1", 80, False),
        ([], ["10.0.0.0/8"], "2002:a00:1::", 80, False),
    ],
)
def test_the_longest_prefix_wins(allow: list[str], deny: list[str], host: str, port: int, allowed: bool | None) -> None:
    rules = AccessList(networks(*allow), networks(*deny))
    for _ in range(2):  # the second time it is remembered
        assert rules.judge(host, port).allowed is allowed


def test_the_order_in_which_they_are_written_does_not_matter() -> None:
    allow, deny = networks("10.1.0.0/16", "10.0.0.0/8 443"), networks("10.0.0.0/8", "10.1.1.0/24")
    questions = [(host, port) for host in ("10.1.1.1", "10.1.2.3", "10.9.9.9") for port in (80, 443)]
    answers = {
        tuple(AccessList(a, d).judge(*question).allowed for question in questions)
        for a in itertools.permutations(allow)
        for d in itertools.permutations(deny)
    }
    assert answers == {(False, False, True, True, False, True)}


def test_it_says_which_rule_it_was() -> None:
    rules = AccessList((), networks("10.0.0.0/8 22"))
    assert rules.judge("10.0.0.1", 22).why == "deny = 10.0.0.0/8:22"
    assert rules.judge("64:ff9b::7f00:1", 22).why == "127.0.0.0/8 (loopback)"


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acl, "_REMEMBERED", 3)
    rules = AccessList((), ())
    for number in range(20):
        assert rules.judge(f"10.0.0.{number}", 80).allowed is None
        assert rules.judge("127.0.0.1", number).allowed is False
