"""Values: what is written is read again, and whatever else comes is refused in one line, by one kind of error."""

import re

import pytest
import written
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tproxy_relay.config import option_types
from tproxy_relay.config.option_types import BadValue
from tproxy_relay.config.options import OPTIONS
from tproxy_relay.settings import Network, PortRange

KINDS = {name: option.kind for name, option in OPTIONS.items() if option.kind}

PIECES = st.sampled_from(
    [*"0123456789abcdefxX:.,;/[]%-+_ \t\n\0", "::", "ffff", "10.0.0.0/8", "65535", "0x", "٣", "１"]
)
NEARLY = st.lists(PIECES, max_size=12).map("".join)
"""What looks like a list of ports or networks, more or less."""


@given(st.lists(written.PORTS, min_size=1, max_size=option_types.MAX_ITEMS, unique=True))
def test_a_list_of_ports_is_read_as_written(ports: list[int]) -> None:
    assert option_types.PORTS.parse(option_types.PORTS.write(tuple(ports))) == tuple(ports)


@given(written.ranges_apart(count=32), st.randoms(use_true_random=False))
def test_ranges_of_ports_are_read_as_written_in_any_order(ranges: tuple[PortRange, ...], random: st.DataObject) -> None:
    assert option_types.PORT_RANGES.parse(option_types.PORT_RANGES.write(ranges)) == ranges
    shuffled = list(ranges)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert option_types.PORT_RANGES.parse(" , ".join(map(str, shuffled))) == ranges


@given(written.ranges_apart(count=8), written.ranges_apart(count=1))
def test_ranges_are_refused_exactly_when_they_share_a_port(
    ranges: tuple[PortRange, ...], more: tuple[PortRange]
) -> None:
    [one] = more
    ports = [port for both in (*ranges, one) for port in range(both.first, both.last + 1)]
    text = ",".join(map(str, (*ranges, one)))
    if len(ports) == len(set(ports)):
        assert option_types.PORT_RANGES.parse(text) == tuple(sorted((*ranges, one)))
    else:
        with pytest.raises(BadValue, match="overlap"):
            option_types.PORT_RANGES.parse(text)


@given(st.lists(written.networks(), max_size=option_types.MAX_ITEMS // 4, unique=True))
def test_networks_are_read_as_written(networks: list[Network]) -> None:
    assert option_types.NETWORKS.parse(option_types.NETWORKS.write(tuple(networks))) == tuple(networks)
    for one in networks:
        assert option_types.NETWORKS.parse(str(one)) == (one,)


@pytest.mark.parametrize("name", KINDS)
@hypothesis_settings(max_examples=100)
@given(st.text(max_size=40) | NEARLY)
def test_whatever_is_written_is_read_again_or_refused(name: str, text: str) -> None:
    kind = KINDS[name]
    try:
        value = kind.parse(text)
    except BadValue as refused:
        assert str(refused).isprintable() and len(str(refused)) < 400
        return
    again = kind.write(value)
    assert not again or kind.parse(again) == value, "what --print-config shows means the same"
    assert again.isprintable()


@hypothesis_settings(max_examples=1000)
@given(NEARLY)
def test_ports_that_are_accepted_are_ports(text: str) -> None:
    for kind in (option_types.PORTS, option_types.PORT_RANGES):
        try:
            kind.parse(text)
        except BadValue:
            continue
        assert re.fullmatch(r"[0-9, \t-]+", text) and "00" not in re.split(r"[^0-9]+", text)
        assert all(0 < int(number) <= 65535 for number in re.findall(r"[0-9]+", text))
