"""Can this kernel do it? Tried out, in a network namespace that is thrown away: configuration files of kernels lie,
and modules load when they are first used.
"""

import contextlib
import errno
import socket
from collections.abc import Iterator, Mapping
from dataclasses import replace

from tproxy_relay.check import host
from tproxy_relay.check.context import Case
from tproxy_relay.check.finding import Finding, ok, problem, warning
from tproxy_relay.check.namespace import Namespace
from tproxy_relay.errors import RelayError
from tproxy_relay.intercept import backends, iptables, iptables_save, nft
from tproxy_relay.intercept.backend import Backend, Step
from tproxy_relay.intercept.backend_iptables import Iptables
from tproxy_relay.intercept.plan import Family, Plan
from tproxy_relay.intercept.ruleset import Ruleset
from tproxy_relay.net import sockets
from tproxy_relay.settings import PortRange

CONNECT_TIMEOUT = 2.0
"""Seconds for a connection from a namespace to itself, which takes a millisecond."""

REVERSE_PATH_TIMEOUT = 0.2
"""Seconds for a packet to reach a rule; what counts is the rule's counter."""

_REVERSE_PATH = """\
table inet way_back {
    chain c {
        type filter hook prerouting priority mangle + 10; policy accept;
        fib saddr . iif oif missing counter drop
    }
}
"""

_PORT = 8
"""Unassigned by IANA; any would do."""

_HERE = {4: "192.0.2.1", 6: "2001:db8::1"}
_THERE = {4: "198.51.100.1", 6: "2001:db8:1::1"}
_FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}

FEATURES: Mapping[str, tuple[str, str]] = {
    "nft_tproxy": ("filter hook prerouting priority mangle", "meta l4proto tcp tproxy to :1 accept"),
    "nft_socket": ("filter hook prerouting priority mangle", "meta l4proto tcp socket transparent 1 accept"),
    "nft_reject_inet": ("filter hook prerouting priority mangle", "tcp dport 1 reject with tcp reset"),
    "nft_fib_inet": ("route hook output priority mangle", "fib daddr type local return"),
    "nft_ct": ("route hook output priority mangle", "ct mark 1 ct direction original accept"),
    "nft_redir": ("nat hook prerouting priority -100", "tcp dport 1 redirect to :1"),
}
"""By module, a hook and a rule that needs it."""

_IPTABLES_MODULES = "xt_TPROXY xt_socket xt_mark xt_connmark xt_conntrack xt_multiport xt_comment xt_addrtype"


def probe_kernel(case: Case) -> Iterator[Finding]:
    """Sockets that accept for others; the very ruleset; and one connection that it intercepts."""
    if case.plan.mode == "tproxy":
        yield from _transparent_socket(case)
    if not case.intercepts:
        return
    try:
        with _namespace(case) as namespace:
            where, findings = _rules(case, namespace)
        yield from findings
        if where == "nft" and case.plan.mode == "tproxy":
            with _namespace(case) as namespace:
                yield from _connection(case, namespace)
    except RelayError as error:
        yield warning(
            "kernel", f"the ruleset could not be tried out ({error})", "what the kernel lacks shows at start only"
        )


def _transparent_socket(case: Case) -> Iterator[Finding]:
    if not case.host.may(host.NET_RAW) and not case.host.may(host.NET_ADMIN):
        return
    for family in case.plan.families:
        with socket.socket(_FAMILIES[family], socket.SOCK_STREAM) as sock:
            try:
                sockets.set_transparent(sock)
            except OSError as error:
                if error.errno not in (errno.ENOPROTOOPT, errno.EOPNOTSUPP):
                    raise
                yield problem(
                    "transparent-sockets",
                    f"this kernel has no transparent sockets for IPv{family}",
                    "TPROXY gives connections to none but those",
                    case.command(mode="redirect"),
                )
                return
    yield ok("transparent-sockets", "the kernel has transparent sockets")


@contextlib.contextmanager
def _namespace(case: Case) -> Iterator[Namespace]:
    with Namespace(user=not case.host.may(host.SYS_ADMIN)) as namespace:
        namespace.ip("link set lo up")
        yield namespace


def _rules(case: Case, namespace: Namespace) -> tuple[str, list[Finding]]:
    """What `rules apply` would do, done there: the backend that takes the rules, or ''."""
    refusals = []
    for where in _candidates(case):
        try:
            for step in steps_from_nothing(case.plan, where):
                namespace.run(step.argv, step.stdin)
        except RelayError as error:
            refusals.append((where, error))
            continue
        findings = [ok("kernel", f"the ruleset loads with {where.name}")]
        if refusals:
            why = f"iptables is used, because nft does not work here: {_short(refusals[0][1])}"
            mend = _mend(namespace, refusals[0][0], case)
            findings = [warning("kernel", f"the ruleset loads with {where.name} only", why, mend)]
        elif where.name == "nft":
            findings += _owner(case, namespace)
        return where.name, findings
    where, refusal = refusals[0]
    missing = _missing(namespace, where, case)
    what = f"the kernel lacks {' '.join(missing)}" if missing else f"the ruleset does not load ({_short(refusal)})"
    return "", [problem("kernel", what, "nothing can be intercepted", _mend(namespace, where, case))]


def steps_from_nothing(plan: Plan, where: Backend) -> list[Step]:
    """What installs the plan on a host where nothing of ours is, whatever there is on this one."""
    steps = Ruleset(plan, where).steps()
    if isinstance(where, Iptables):
        texts = [iptables.restore(plan, "active", family, iptables_save.read("")) for family in plan.families]
        before = steps[: -len(texts)]
        return before + [step._replace(stdin=text) for step, text in zip(steps[len(before) :], texts)]
    return steps


def _candidates(case: Case) -> list[Backend]:
    names = ["nft", "iptables"] if case.settings.backend == "auto" else [case.settings.backend]
    return [backends.of_name(name) for name in names]


def _owner(case: Case, namespace: Namespace) -> Iterator[Finding]:
    """Does the kernel take the table away when its owner dies?"""
    if case.plan.on_failure != "open":
        return
    try:
        namespace.run(["nft", "-f", "-"], nft.removal() + nft.script(case.plan, "active", held=True))
    except RelayError:
        why = "after a kill -9 of the relay, its guard process has to remove the rules"
        yield warning("owner", "the kernel cannot tie the ruleset to a process (Linux 5.12 can)", why)


def _connection(case: Case, namespace: Namespace) -> Iterator[Finding]:
    """A connection to an address that is nowhere, taken by a listener that is not there."""
    trial = trial_plan(case.plan)
    for family in _prepared(trial, namespace):
        try:
            with namespace.socket(_FAMILIES[family]) as listener, namespace.socket(_FAMILIES[family]) as client:
                _intercepted(listener, client, family, trial.outbound_port)
        except OSError as error:
            yield problem(
                "kernel",
                f"the ruleset loads, and a connection by IPv{family} is not intercepted ({error.strerror or error})",
                "this kernel does not do what it promises; redirect needs less of it",
                case.command(mode="redirect"),
            )
            return
    yield ok("kernel", "in a throw-away namespace a connection is intercepted")


def _prepared(trial: Plan, namespace: Namespace) -> Iterator[Family]:
    """Its rules, and an address of each family."""
    for step in steps_from_nothing(trial, backends.of_name("nft")):
        namespace.run(step.argv, step.stdin)
    for family in trial.families:
        nodad = " nodad" if family == 6 else ""
        namespace.ip(
            f"addr add {_HERE[family]}/{128 if family == 6 else 32} dev lo{nodad}", f"route add {_THERE[family]} dev lo"
        )
        yield family


def way_back_from_lo(case: Case) -> bool | None:
    """Whether nft's `fib saddr . iif` finds the way back of an intercepted packet from lo, by trial; None if that
    cannot be had. It does not where it looks at the socket that the packet is given to (nft_fib.h of the kernel)."""
    try:
        with _namespace(case) as namespace:
            for family in _prepared(trial_plan(case.plan), namespace):
                namespace.run(["nft", "-f", "-"], _REVERSE_PATH)
                with namespace.socket(_FAMILIES[family]) as listener, namespace.socket(_FAMILIES[family]) as client:
                    with contextlib.suppress(OSError):
                        _intercepted(listener, client, family, case.plan.outbound_port, REVERSE_PATH_TIMEOUT)
                return "counter packets 0 " in namespace.run(["nft", "list", "table", "inet", "way_back"])
    except (RelayError, OSError):
        pass
    return None


def trial_plan(plan: Plan) -> Plan:
    """The same numbers, for connections of one host with itself."""
    listen: dict[Family, str] = {family: "::" if family == 6 else "0.0.0.0" for family in plan.families}
    return replace(
        plan,
        inbound=(),
        outbound=(PortRange(_PORT, _PORT),),
        listen=listen,
        interface=None,
        exempt_uid=None,
        preserve_source="no",
        on_failure="closed",
    )


def _intercepted(
    listener: socket.socket, client: socket.socket, family: Family, port: int, timeout: float = CONNECT_TIMEOUT
) -> None:
    """OSError if it is not."""
    if family == 6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    listener.bind(("::" if family == 6 else "0.0.0.0", port))
    sockets.set_transparent(listener)
    listener.listen(1)
    for sock in (listener, client):
        sock.settimeout(timeout)
    client.bind((_HERE[family], 0))
    client.connect((_THERE[family], _PORT))
    accepted, _ = listener.accept()
    with accepted:
        if accepted.getsockname()[:2] != (_THERE[family], _PORT):
            raise OSError(errno.EADDRNOTAVAIL, f"it was accepted as {accepted.getsockname()[0]}")


def _missing(namespace: Namespace, where: Backend, case: Case) -> list[str]:
    """The modules that the kernel cannot load, each tried with one rule."""
    if where.name != "nft":
        return []
    unneeded = {"nft_redir"} if case.plan.mode == "tproxy" else {"nft_tproxy", "nft_reject_inet"}
    return [module for module in FEATURES if module not in unneeded and not works(namespace, *FEATURES[module])]


def works(namespace: Namespace, hook: str, rule: str) -> bool:
    """True if the kernel there takes a chain with that hook and rule."""
    text = f"table inet trial {{\n chain trial {{\n type {hook}; policy accept;\n {rule}\n }}\n}}\n"
    try:
        namespace.run(["nft", "-f", "-"], text)
        namespace.run(["nft", "delete", "table", "inet", "trial"])  # in the same run, not all would be looked at
    except RelayError:
        return False
    return True


def _mend(namespace: Namespace, where: Backend, case: Case) -> str:
    if where.name != "nft":
        return f"modprobe -a {_IPTABLES_MODULES}"
    missing = _missing(namespace, where, case)
    return f"modprobe -a {' '.join(missing)}" if missing else case.command(mode="redirect")


def _short(error: RelayError) -> str:
    return str(error)[:200]
