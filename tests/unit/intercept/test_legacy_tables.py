"""Only tables that are in use are looked at."""

import networks
import pytest

from tproxy_relay.intercept import legacy_tables, programs

pytestmark = [
    pytest.mark.usefixtures("network"),
    pytest.mark.skipif(not networks.LEGACY_IPTABLES, reason="the list of them is root's"),
]


def test_only_what_is_in_use() -> None:
    assert list(legacy_tables.saved()) == []
    programs.run("iptables-legacy -t nat -A PREROUTING -p tcp -j ACCEPT".split())
    (lines,) = legacy_tables.saved("-t", "nat", table="nat")
    assert "-A PREROUTING -p tcp -j ACCEPT" in lines
    assert list(legacy_tables.saved(table="mangle")) == []
    (lines,) = legacy_tables.saved()
    assert "*nat" in lines
