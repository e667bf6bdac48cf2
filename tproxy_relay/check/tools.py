"""The programs that the ruleset is made with, and the right to use them."""

import re
from collections.abc import Iterator

from tproxy_relay.check import host
from tproxy_relay.check.context import Case
from tproxy_relay.check.finding import Finding, install, ok, problem, warning
from tproxy_relay.intercept import programs
from tproxy_relay.system import privileges

OLDEST_NFT = (0, 9, 7)
"""The first with `reject` in prerouting (Debian 11 has 0.9.8)."""
OWNER_NFT = (0, 9, 9)
"""The first with `flags owner`."""

_VERSION = re.compile(r"v?(\d+)\.(\d+)(?:\.(\d+))?")


def probe_capabilities(case: Case) -> Iterator[Finding]:
    """CAP_NET_ADMIN for the rules; CAP_NET_RAW where that one and an account of the workers do not do."""
    settings = case.settings
    needed = {"CAP_NET_ADMIN": host.NET_ADMIN} if case.intercepts else {}
    keep_raw = settings.preserve_source != "no" or bool(case.plan.outbound) and settings.user is None
    if keep_raw or settings.mode == "tproxy" and not case.host.may(host.NET_ADMIN):
        needed["CAP_NET_RAW"] = host.NET_RAW
    missing = [name for name, capability in needed.items() if not case.host.may(capability)]
    if missing:
        yield problem(
            "capabilities",
            f"{' and '.join(missing)} missing",
            "a relay started like this ends with exit code 77, and not all can be looked at; in a unit set "
            f"AmbientCapabilities={' '.join(missing)}",
            f"sudo {case.command()}",
        )
    elif needed:
        yield ok("capabilities", " and ".join(needed))


def probe_setpriv(case: Case) -> Iterator[Finding]:
    """`setpriv` of util-linux, by which every worker gives up its privileges."""
    if programs.find("setpriv") is None:
        why = "the relay cannot start its workers without it"
        yield problem("setpriv", "no program `setpriv`", why, install("util-linux"))
        return
    ended = programs.run(["setpriv", "--help"], check=False).stdout
    if "--pdeathsig" not in ended:
        why = "it has no --pdeathsig, so the workers would outlive a relay that was killed (util-linux 2.33 has it)"
        yield problem("setpriv", "this setpriv is too old, or not the one of util-linux", why, install("util-linux"))
    else:
        yield _workers_account(case)


def _workers_account(case: Case) -> Finding:
    """May workers be of the account that they are to be of?"""
    user, why = case.settings.user, "a relay started like this ends with exit code 77"
    if user and not privileges.may_become(privileges.account(user)):
        return problem("user", f"may not have workers of {user}", why, f"sudo {case.command()}")
    if user and (reason := privileges.not_mapped(privileges.account(user))):
        return problem("user", f"may not have workers of {user}: {reason}", why, case.command(user=None))
    return ok("setpriv", f"workers run as {user or 'the account that starts the relay'}")


def probe_ip(case: Case) -> Iterator[Finding]:
    """`ip` of iproute2, which adds the rules of routing and answers in JSON."""
    if not (case.intercepts and case.plan.needs_routing):
        return
    if programs.find("ip") is None:
        yield problem("ip", "no program `ip`", "intercepted packets need routing of their own", install("iproute2"))
    elif not host.ask("ip", "-json", "-4", "rule", "show"):
        yield problem(
            "ip",
            "`ip -json rule` gives no answer",
            "this is not the ip of iproute2, or one from before 2018; the ruleset is compared with its answers",
            install("iproute2"),
        )
    else:
        yield ok("ip", programs.run(["ip", "-V"]).stdout.strip())


def probe_nft(case: Case) -> Iterator[Finding]:
    """`nft`, for the backends nft and auto."""
    wanted = case.settings.backend
    if not case.intercepts or wanted not in ("auto", "nft"):
        return
    fallback = wanted == "auto" and programs.find("iptables-restore") is not None
    if programs.find("nft") is None:
        if fallback:
            why = "iptables is used instead: with it the rules are not tied to the life of a process"
            yield warning("nft", "no program nft", why, install("nftables"))
        else:
            yield problem("nft", "no program nft", "nothing else can install the ruleset", install("nftables"))
        return
    said = programs.run(["nft", "--version"], check=False).stdout.strip()
    found = version(said)
    if found is None or found < OLDEST_NFT:
        why = f"the ruleset needs nft {'.'.join(map(str, OLDEST_NFT))}"
        level = warning if fallback else problem
        yield level("nft", f"nft is too old ({said or 'it does not tell its version'})", why, install("nftables"))
    elif found < OWNER_NFT:
        why = "it cannot tie the ruleset to a process, so after a kill -9 the guard has to remove it"
        yield warning("nft", f"nft is old ({said})", why, install("nftables"))
    else:
        yield ok("nft", said.split(" (")[0])


def probe_iptables(case: Case) -> Iterator[Finding]:
    """The programs of iptables, where that backend is chosen, for each family."""
    wanted = case.settings.backend
    if not case.intercepts or not wanted.startswith("iptables"):
        return
    variant = wanted.removeprefix("iptables")
    names = ["iptables", *(["ip6tables"] if 6 in case.plan.families else [])]
    needed = [f"{name}{variant}{job}" for name in names for job in ("-restore", "-save")]
    missing = [name for name in needed if programs.find(name) is None]
    if missing:
        yield problem("iptables", f"no program {', '.join(missing)}", f"backend is {wanted}", install("iptables"))
    else:
        yield ok("iptables", programs.run([f"iptables{variant}", "-V"]).stdout.strip())


def version(text: str) -> tuple[int, ...] | None:
    """The first version number in a text, always of three parts (1.1 is 1, 1, 0); None if there is none."""
    match = _VERSION.search(text)
    return tuple(int(part or 0) for part in match.groups()) if match else None
