"""What other programs do on hosts with a relay: what harms it, case by case, and what does not.

As those programs make it, or as people have reported it: NixOS and firewalld (reverse paths), routers with several
uplinks (marks), hosts that want no connection tracking, Docker, Kubernetes, Tailscale, wg-quick, libvirt, Calico.
"""

from neighbour_trials import ANSWERED, LOST, RESET, Neighbour, chain

LATER, EARLIER = "mangle + 10", "mangle - 10"
PREROUTING, OUTPUT = f"filter hook prerouting priority {LATER}", f"route hook output priority {LATER}"
KEEPS_SOURCE = ("--preserve-source", "address")
STAYS = "nft list table inet neighbour | grep -q "


def both(program: str, rule: str) -> str:
    """The command that adds a rule for IPv4 and IPv6: `iptables-nft`, or `iptables-legacy`."""
    return f"for p in {program} {program.replace('iptables', 'ip6tables')}; do $p {rule}; done"


def kept(program: str, table: str, word: str) -> str:
    """The command that fails if either family has lost the rule with that word."""
    six = program.replace("iptables", "ip6tables")
    return f"for p in {program} {six}; do $p -t {table} -S | grep -q -e {word} || exit 1; done"


BY_NFT = (
    Neighbour(
        "strict reverse path",
        (chain(PREROUTING, "fib saddr . mark . iif oif exists accept", policy="drop"),),
        ("local",),
        "filter",
        keeps=f"{STAYS}fib",
    ),
    Neighbour(
        "reverse path missing",
        (chain(PREROUTING, "fib saddr . mark . iif oif missing drop"),),
        ("local",),
        "filter",
        keeps=f"{STAYS}fib",
    ),
    Neighbour(
        "strict reverse path, source kept for a server here",
        (chain(PREROUTING, "fib saddr . iif oif exists accept", policy="drop"),),
        ("host",),
        "filter",
        KEEPS_SOURCE,
        f"{STAYS}fib",
    ),
    Neighbour(
        "marks restored on arrival",
        (chain(PREROUTING, "meta mark set ct mark"),),
        ("gateway",),
        "lost-marks",
        keeps=f"{STAYS}'mark set ct mark'",
    ),
    Neighbour(
        "marks restored on arrival, source kept",
        (chain(PREROUTING, "meta mark set ct mark"),),
        ("gateway",),
        "lost-marks",
        KEEPS_SOURCE,
        f"{STAYS}'mark set ct mark'",
    ),
    Neighbour(
        "marks restored on the way out",
        (chain(OUTPUT, "meta mark set ct mark"),),
        ("local",),
        "lost-marks",
        keeps=f"{STAYS}'mark set ct mark'",
    ),
    Neighbour(
        "answers of a server here, marks restored",
        (chain(OUTPUT, "meta mark set ct mark"),),
        ("host",),
        "lost-marks",
        ("--intercept-inbound", "8000", *KEEPS_SOURCE),
        f"{STAYS}'mark set ct mark'",
    ),
    Neighbour(
        "marks by turns", (chain(PREROUTING, "meta mark set numgen inc mod 2 offset 1"),), ("gateway",), "lost-marks"
    ),
    Neighbour("marks by hash", (chain(PREROUTING, "meta mark set symhash mod 2"),), ("gateway",), "lost-marks"),
    Neighbour(
        "one mark for what arrives",
        (chain(PREROUTING, "meta mark set 1"),),
        ("gateway",),
        "lost-marks",
        keeps=f"{STAYS}0x00000001",
    ),
    Neighbour(
        "one mark for what arrives by one interface",
        (chain(PREROUTING, 'iifname "rc" meta mark set 1'),),
        ("gateway",),
        "lost-marks",
        level="warning",
    ),
    Neighbour(
        "one mark for what programs here send",
        (chain(OUTPUT, "tcp dport 8000 meta mark set 1"),),
        ("local",),
        "lost-marks",
        sees=(ANSWERED,),
    ),
    Neighbour(
        "one mark for what is sent, before the relay's rules",
        (chain(f"filter hook output priority {EARLIER}", "meta mark set 1"),),
        ("gateway", "local"),
        "lost-marks",
        sees=(RESET,),
    ),
    Neighbour(
        "marks saved on the way out",
        (chain("filter hook postrouting priority mangle", "ct mark set meta mark"),),
        ("local",),
        "lost-marks",
        keeps=f"{STAYS}'ct mark set'",
        sees=(LOST, RESET, ANSWERED),
    ),
    Neighbour(
        "no tracking of what programs here send",
        (chain("filter hook output priority raw", "tcp dport 8000 notrack"),),
        ("local",),
        "tracking",
        keeps=f"{STAYS}notrack",
        sees=(ANSWERED,),
    ),
    Neighbour(
        "no tracking of answers",
        (chain("filter hook output priority raw", "tcp sport 8000 notrack"),),
        ("local",),
        "tracking",
        keeps=f"{STAYS}notrack",
        sees=(RESET,),
        floods=True,
    ),
    Neighbour(
        "no tracking to a server here, source kept",
        (chain("filter hook output priority raw", "tcp dport 8000 notrack"),),
        ("host",),
        "tracking",
        ("--intercept-inbound", "8000", *KEEPS_SOURCE),
        f"{STAYS}notrack",
    ),
    Neighbour(
        "no tracking of a server's answers here, source kept",
        (chain("filter hook output priority raw", "tcp sport 8000 notrack"),),
        ("host",),
        "tracking",
        ("--intercept-inbound", "8000", *KEEPS_SOURCE),
        f"{STAYS}notrack",
        floods=True,
    ),
    Neighbour(
        "no tracking, redirect",
        (chain("filter hook prerouting priority raw", "tcp dport 8000 notrack"),),
        ("gateway",),
        "tracking",
        ("--intercept-inbound", "8000", "--mode", "redirect"),
        f"{STAYS}notrack",
        sees=(ANSWERED,),
    ),
    Neighbour(
        "programs here sent to another proxy",
        (chain("nat hook output priority -100", "tcp dport 8000 redirect to :8001"),),
        ("local",),
        "other-proxy",
        keeps=f"{STAYS}redirect",
        sees=(RESET,),
    ),
)
"""By nft, with the relay's rules in nft."""


def by_iptables(program: str) -> tuple[Neighbour, ...]:
    """The same by iptables of either kind; they harm whatever the relay's rules are made with."""
    return (
        Neighbour(
            "marks restored on the way out",
            (both(program, "-t mangle -A OUTPUT -j CONNMARK --restore-mark"),),
            ("local",),
            "lost-marks",
            keeps=kept(program, "mangle", "restore"),
            sees=(LOST, RESET),
            by_order=True,
        ),
        Neighbour(
            "one mark for what is sent",
            (both(program, "-t mangle -A OUTPUT -p tcp --dport 8000 -j MARK --set-mark 1"),),
            ("local",),
            "lost-marks",
            keeps=kept(program, "mangle", "xmark"),
            sees=(ANSWERED, RESET),
        ),
        Neighbour(
            "no tracking of what programs here send",
            (both(program, "-t raw -A OUTPUT -p tcp --dport 8000 -j CT --notrack"),),
            ("local",),
            "tracking",
            keeps=kept(program, "raw", "CT"),
            sees=(ANSWERED,),
        ),
    )


HARMLESS = (
    # Docker
    both("iptables-nft", "-t nat -N DOCKER"),
    both("iptables-nft", "-t nat -A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER"),
    both("iptables-nft", "-t nat -A OUTPUT -m addrtype --dst-type LOCAL -j DOCKER"),
    "iptables-nft -t nat -A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE",
    both("iptables-nft", "-t nat -A DOCKER ! -i docker0 -p tcp --dport 8080 -j DNAT --to-destination :80"),
    # kube-proxy
    both("iptables-nft", "-t nat -N KUBE-MARK-MASQ"),
    both("iptables-nft", "-t nat -A KUBE-MARK-MASQ -j MARK --or-mark 0x4000"),
    both("iptables-nft", "-N KUBE-FIREWALL"),
    both("iptables-nft", "-A KUBE-FIREWALL -m mark --mark 0x8000/0x8000 -j DROP"),
    both("iptables-nft", "-A INPUT -j KUBE-FIREWALL"),
    both("iptables-nft", "-A FORWARD -m conntrack --ctstate INVALID -j DROP"),
    # Calico, Tailscale, several uplinks: all by masks
    both("iptables-legacy", "-t mangle -A PREROUTING -j MARK --set-xmark 0x0/0xe0000"),
    both("iptables-legacy", "-t raw -A PREROUTING -j MARK --set-xmark 0x0/0xf0000"),
    both("iptables-nft", "-t mangle -A PREROUTING -j CONNMARK --restore-mark --nfmask 0x3f00 --ctmask 0x3f00"),
    both("iptables-nft", "-t mangle -A OUTPUT -j CONNMARK --restore-mark --nfmask 0x3f00 --ctmask 0x3f00"),
    both("iptables-nft", "-t mangle -A POSTROUTING -j CONNMARK --save-mark --nfmask 0x3f00 --ctmask 0x3f00"),
    "ip rule add pref 5210 fwmark 0x80000/0xff0000 lookup main",
    # Istio: only its own marks
    both("iptables-nft", "-t mangle -A OUTPUT -m connmark --mark 0x539 -j CONNMARK --restore-mark"),
    # reverse paths by iptables, which knows lo
    both("iptables-nft", "-t mangle -A PREROUTING -m rpfilter --validmark --invert -j DROP"),
    both("iptables-nft", "-t raw -A PREROUTING -m rpfilter --validmark --invert -j DROP"),
    # wg-quick
    chain(
        "filter hook prerouting priority mangle", "meta l4proto udp meta mark set ct mark", family="inet"
    ).replace("neighbour", "wg_quick"),
    chain(
        "filter hook prerouting priority raw", 'iifname != "wg0" ip daddr 10.9.0.2 fib saddr type != local drop'
    ).replace("neighbour", "wg_quick_raw"),
    "ip rule add pref 32764 lookup main suppress_prefixlength 0",
    "ip rule add pref 32765 not fwmark 0xca6c lookup 51820",
    # NetworkManager's sharing, libvirt
    chain("nat hook postrouting priority 100", "ip saddr 10.42.0.0/24 ip daddr != 10.42.0.0/24 masquerade"),
    # name servers without tracking; scans
    chain("filter hook prerouting priority raw", "udp dport 53 notrack", "tcp dport 53 notrack").replace(
        "neighbour", "dns"
    ),
    chain("filter hook output priority raw", "udp sport 53 notrack").replace("neighbour", "dns_out"),
    chain("filter hook output priority filter", "ct state invalid drop").replace("neighbour", "out"),
    chain(PREROUTING, "ct state invalid drop", "tcp flags & (fin | syn) == fin | syn drop").replace(
        "neighbour", "scans"
    ),
)
"""What is on many hosts, and in nobody's way."""

FIREWALLD = chain(PREROUTING, "meta nfproto ipv6 fib saddr . mark . iif oif missing drop")
"""Harmless as long as nothing outbound is intercepted."""

TAILSCALE = (
    *("ip route add throw 10.81.1.0/24 table 52", "ip -6 route add throw fd81:1::/64 table 52"),
    *("ip route add default via 10.81.2.2 table 52", "ip -6 route add default via fd81:2::2 table 52"),
    *("ip rule add pref 5270 lookup 52", "ip -6 rule add pref 5270 lookup 52"),
)
"""An exit node, with access to the local network."""


def docker(program: str) -> tuple[str, ...]:
    """A container, which is the server, is published at the relay's host."""
    if program == "nft":
        rules = "".join(
            f"add table {table}; add chain {table} {name} {{ type nat hook {hook} priority -100; }}; "
            f"add rule {table} {name} fib daddr type local tcp dport 8000 dnat to {to}; "
            for table, to in (("ip docker", "10.81.2.2"), ("ip6 docker", "fd81:2::2"))
            for name, hook in (("pre", "prerouting"), ("out", "output"))
        )
        return (f"nft '{rules}'",)
    return tuple(
        f"{name} -t nat -A {hook} -p tcp -m addrtype --dst-type LOCAL --dport 8000 -j DNAT --to-destination {to}"
        for name, to in ((program, "10.81.2.2"), (program.replace("iptables", "ip6tables"), "fd81:2::2"))
        for hook in ("PREROUTING", "OUTPUT")
    )
