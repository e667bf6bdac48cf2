"""Marks and ports as nft reads them."""

from dataclasses import replace

from plans import PLAN

from tproxy_relay.intercept import nft_words
from tproxy_relay.settings import PortRange

MASKED = replace(PLAN, mark_mask=0x70)


def test_only_our_bits_of_a_mark_are_set_and_compared() -> None:
    assert nft_words.set_mark(MASKED, "ct mark", 0x20) == "ct mark set ct mark & 0xffffff8f | 0x00000020"
    assert nft_words.set_mark(MASKED, "meta mark", 0) == "meta mark set meta mark & 0xffffff8f"
    assert nft_words.is_marked(MASKED, "meta mark", 0x40) == "meta mark & 0x00000070 == 0x00000040"


def test_ports_are_a_set() -> None:
    assert nft_words.ports((PortRange(80, 80), PortRange(8000, 8100))) == "{ 80, 8000-8100 }"
