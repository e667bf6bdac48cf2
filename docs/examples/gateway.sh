#!/bin/sh
# The interception ruleset of tproxy-relay, plan a3910ecc, for nft.
# `tproxy-relay rules remove` takes it away again.
set -e

ip -4 -batch - <<'END'
route add local default dev lo table 7006 proto 206
rule add pref 7006 fwmark 0x1000000/0x7000000 iif lo goto 7008 protocol 206
rule add pref 7006 fwmark 0x2000000/0x7000000 iif lo lookup 7006 protocol 206
rule add pref 7007 fwmark 0x1000000/0x7000000 lookup 7006 protocol 206
rule add pref 7008 nop protocol 206
END

nft -f - <<'END'
table inet tproxy_relay
delete table inet tproxy_relay
table inet tproxy_relay {
    chain from_lo {
        meta mark & 0x07000000 == 0x04000000 accept comment "from the relay"
    }
    chain errors {
        iifname != "lo" icmp type { destination-unreachable, time-exceeded, parameter-problem } socket wildcard 1 return comment "errors about a port with the number of ours, IPv4"
        iifname != "lo" icmp type { destination-unreachable, time-exceeded, parameter-problem } socket transparent 1 meta mark set meta mark & 0xf8ffffff | 0x01000000 counter accept comment "errors about packets of the relay, IPv4"
    }
    chain answered {
        meta nfproto ipv4 tcp flags & (syn | rst | ack) == ack tproxy ip to :15006 meta mark set meta mark & 0xf8ffffff | 0x01000000 counter accept comment "to its socket or listener, IPv4"
        tcp flags & (fin | syn | rst | ack) == syn ct mark set ct mark & 0xf8ffffff comment "has not heard it, and sends its SYN again"
    }
    chain prerouting {
        type filter hook prerouting priority mangle; policy accept;
        meta l4proto != tcp goto errors comment "plan a3910ecc active: TCP only"
        iifname "lo" goto from_lo comment "sent by this host to itself"
        ct mark & 0x07000000 == 0x01000000 ct direction original jump answered comment "from clients that the relay has answered"
        tcp flags & (fin | syn | rst | ack) != syn socket wildcard 1 return comment "to a port that has the number of ours"
        tcp flags & (fin | syn | rst | ack) != syn socket transparent 1 meta mark set meta mark & 0xf8ffffff | 0x01000000 counter accept comment "packets of relayed connections"
        iifname != "lo" ip daddr { 127.0.0.0/8, 169.254.0.0/16, 224.0.0.0/4, 255.255.255.255/32 } return comment "never intercepted, IPv4"
        iifname != "lo" meta nfproto ipv4 tcp flags & (fin | syn | rst | ack) == syn tcp dport { 8080 } tproxy ip to :15006 meta mark set meta mark & 0xf8ffffff | 0x01000000 counter accept comment "inbound, IPv4"
    }
    chain own_errors {
        oifname != "lo" ct state related ct mark & 0x07000000 == 0x01000000 ct direction original meta mark set meta mark & 0xf8ffffff | 0x02000000 counter accept comment "errors about packets of the relay to clients"
    }
    chain output {
        type route hook output priority mangle; policy accept;
        meta l4proto != tcp goto own_errors comment "plan a3910ecc active: TCP only"
        oifname != "lo" meta mark & 0x07000000 == 0x04000000 tcp flags & (syn | ack) == (syn | ack) ct mark set ct mark & 0xf8ffffff | 0x01000000 comment "the relay answers a client"
    }
}
END
