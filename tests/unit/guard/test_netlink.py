"""Who changes rules is heard."""

import select

import pytest

from tproxy_relay.guard.netlink import Changes
from tproxy_relay.intercept import programs

pytestmark = pytest.mark.usefixtures("network")


def heard(changes: Changes) -> bool:
    """Whether a change has been told that may concern us. The kernel tells before the change returns."""
    return bool(select.select(changes.sockets, [], [], 0)[0]) and changes.read()


@pytest.mark.parametrize(
    "command, concerns_us",
    [
        ("nft add table inet somebodys", True),
        ("ip rule add pref 9 lookup 9", True),
        ("ip -6 rule add pref 9 lookup 9", True),
        ("ip route add local 192.0.2.0/24 dev lo table 9 proto 206", True),
        ("ip route add local 192.0.2.0/24 dev lo table 9", False),
        ("ip -6 route add local 2001:db8::/64 dev lo table 9 proto 206", True),
        ("ip link set lo down", True),
        ("sysctl -q -w net.ipv6.conf.lo.disable_ipv6=1", True),
        ("ip -6 address add 2001:db8::1 dev lo", True),
        ("ip -6 address add 2001:db8::2/64 dev one", False),
        ("ip -4 address add 192.0.2.1 dev lo", False),
    ],
)
def test_a_change_is_told_once(command: str, concerns_us: bool) -> None:
    programs.run("ip link add one type veth peer name two".split())
    changes = Changes(nftables=True)
    assert changes.complete and not heard(changes)
    programs.run(command.split())
    assert heard(changes) is concerns_us
    assert not heard(changes)


def test_a_flood_is_a_change() -> None:
    changes = Changes(nftables=True)
    chains = "".join(f"add chain inet somebodys c{number}\n" for number in range(1000))
    programs.run(["nft", "-f", "-"], f"add table inet somebodys\n{chains}")
    assert heard(changes)
    changes.read()
    assert not heard(changes)


def test_without_nftables_it_says_that_it_does_not_hear_everything() -> None:
    changes = Changes(nftables=False)
    assert not changes.complete
    programs.run(["nft", "add", "table", "inet", "somebodys"])
    assert not heard(changes)
