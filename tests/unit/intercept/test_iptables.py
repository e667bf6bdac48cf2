"""The iptables text: what must be true of it for every plan, how it is read back, and that iptables takes it."""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NoReturn

import networks
import pytest
from plans import PLAN, STATES, VARIANTS, every_plan, quickly

from tproxy_relay.intercept import iptables, iptables_save, programs
from tproxy_relay.intercept.backend_iptables import Iptables
from tproxy_relay.intercept.iptables import Chain, Rule
from tproxy_relay.intercept.iptables_save import PREFIX, Saved
from tproxy_relay.intercept.plan import Family, Plan, State

NOTHING = iptables_save.read("")
FAMILIES: tuple[Family, ...] = (4, 6)


def rules(plan: Plan, state: State) -> Iterator[tuple[Chain, Rule]]:
    for family in plan.families:
        for chain in iptables.chains(plan, state, family):
            for rule in chain.rules:
                yield chain, rule


def as_saved(restored: str) -> str:
    """What iptables-save -c would say after this, on a host where nothing else is."""
    lines = [line.replace("-I PREROUTING 1", "-A PREROUTING") for line in restored.splitlines()]
    lines = [re.sub(r"^-I (\w+) 1", r"-A \1", line) for line in lines]
    return "\n".join(f"[3:180] {line}" if line.startswith("-A") else line for line in lines)


def installed(plan: Plan, state: State, family: Family, made: str = "") -> Saved:
    return iptables_save.read(as_saved(iptables.restore(plan, state, family, NOTHING, made)))


@every_plan
def test_it_is_made_of_harmless_characters(plan: Plan, state: State) -> None:
    for family in plan.families:
        for line in iptables.restore(plan, state, family, NOTHING).splitlines():
            assert re.fullmatch(r'[a-zA-Z0-9_.:,/\[\]!=" *-]*', line)
            assert line.count('"') in (0, 2)


@every_plan
def test_every_rule_says_what_it_is_for(plan: Plan, state: State) -> None:
    for family in plan.families:
        for line in iptables.restore(plan, state, family, NOTHING).splitlines():
            assert not line.startswith(("-A", "-I")) or re.search(r'--comment "[\w ,:-]{4,200}"', line), line
            assert not line.startswith(("-A", "-I")) or re.search(r"^-[AI] (TPROXY_RELAY_\w+|\w+ 1) ", line), line


@every_plan
def test_tproxy_is_for_prerouting(plan: Plan, state: State) -> None:
    """xt_TPROXY has no other hook; LO is led to from there only."""
    assert {chain.name for chain, rule in rules(plan, state) if "TPROXY --" in rule.then} <= {"PRE", "LO", "ANSWERED"}
    for name in "LO", "ANSWERED":
        assert not any(f"{PREFIX}{name}" in rule.then for chain, rule in rules(plan, state) if chain.name != "PRE")


@every_plan
def test_a_bare_syn_never_matches_an_old_socket(plan: Plan, state: State) -> None:
    for chain, rule in rules(plan, state):
        asks = "-m socket --transparent" in rule.match
        assert not asks or "! --syn" in rule.match or chain.name == "ERRORS" and "-p icmp" in rule.match
        assert chain.name != "ANSWERED" or "TPROXY --" not in rule.then or "SYN,RST,ACK ACK" in rule.match


@every_plan
def test_only_what_the_relay_has_answered_is_offered_to_its_listener(plan: Plan, state: State) -> None:
    ours, relay = (f"{bits:#x}/{plan.mark_mask:#x}" for bits in (plan.marks.inbound, plan.marks.relay))
    takes = plan.mode == "tproxy" and bool(plan.inbound) and state != "closed"
    for family in plan.families:
        there = {chain.name: chain for chain in iptables.chains(plan, state, family)}
        all_rules = [rule for chain in there.values() for rule in chain.rules]
        marking = [rule for rule in all_rules if f"CONNMARK --set-xmark {ours}" in rule.then]
        assert all(f"--tcp-flags SYN,ACK SYN,ACK -m mark --mark {relay}" in rule.match for rule in marking)
        assert bool(marking) == takes == ("ANSWERED" in there)
        if takes:
            (jump,) = (rule for rule in there["PRE"].rules if rule.then == f"-j {PREFIX}ANSWERED")
            assert f"--mark {ours} -m conntrack --ctdir ORIGINAL" in jump.match
            assert there["PRE"].rules.index(jump) == 2, "after what has a socket"


@every_plan
def test_errors_come_to_relays_that_speak_in_the_name_of_others(plan: Plan, state: State) -> None:
    """By a jump of their own: the other one is for TCP."""
    for family in plan.families:
        there = {chain.name: chain for chain in iptables.chains(plan, state, family)}
        wanted = plan.imitates and state != "closed"
        assert ("ERRORS" in there) == ("OWN_ERRORS" in there) == wanted
        text = iptables.restore(plan, state, family, NOTHING)
        for name, hook in (("ERRORS", "PREROUTING"), ("OWN_ERRORS", "OUTPUT")) if wanted else ():
            icmp = "icmp" if family == 4 else "icmpv6"
            assert re.search(rf'^-I {hook} 1 -p {icmp} -m comment --comment "[^"]*" -j {PREFIX}{name}$', text, re.M)


@every_plan
def test_foreign_bits_of_marks_survive(plan: Plan, state: State) -> None:
    for _, rule in rules(plan, state):
        for value in re.findall(r"--(?:set-xmark|tproxy-mark|mark) (\S+)", rule.text):
            bits, mask = (int(part, 16) for part in value.split("/"))
            assert bits in plan.marks or f"connmark --mark {value}" in rule.match or " --syn" in rule.match
            assert mask == plan.mark_mask
        assert not re.search(r"--(set-mark|or-mark|and-mark|restore-mark|save-mark)", rule.text)


@every_plan
def test_the_relay_is_exempt_before_anything_is_taken(plan: Plan, state: State) -> None:
    own = f"-m mark --mark {plan.marks.relay:#x}/{plan.mark_mask:#x}"
    for family in plan.families:
        for chain in iptables.chains(plan, state, family):
            if chain.name in ("OUT", "NAT_OUT", "LO", "CLOSED_OUT"):
                matches = [rule.match for rule in chain.rules]
                exempt = [own in match for match in matches] + [True]
                taking = [" --syn" in match or "TPROXY --" in rule.then for match, rule in zip(matches, chain.rules)]
                assert exempt.index(True) <= [*taking, True].index(True)


@every_plan
def test_only_answers_are_sent_to_the_relay_for_its_own_mark(plan: Plan, state: State) -> None:
    """And none that carry that mark themselves, unless servers here may have inherited it (tcp_fwmark_accept)."""
    relays = f"mark --mark {plan.marks.relay:#x}/{plan.mark_mask:#x}"
    for family in plan.families:
        out = [rule for chain in iptables.chains(plan, state, family) if chain.name == "OUT" for rule in chain.rules]
        answers = [n for n, rule in enumerate(out) if f"-m conn{relays}" in rule.match]
        assert [out[n].then for n in answers[1:]] == ["-j RETURN"] * (plan.speaks_here and state != "closed")
        assert all("--ctdir REPLY" in out[n].match for n in answers)
        if answers and not (plan.inbound and plan.keeps_source):
            assert next(n for n, rule in enumerate(out) if rule.match == f"-m {relays}") < answers[0]


@every_plan
def test_draining_takes_nothing(plan: Plan, state: State) -> None:
    active, draining = (set(rules(plan, one)) for one in ("active", "draining"))
    names = {chain.name for chain, _ in active} - {chain.name for chain, _ in draining}
    texts = {(chain.name, rule.text) for chain, rule in draining}
    assert texts <= {(chain.name, rule.text) for chain, rule in active}
    # A bare SYN may lose a mark, and one in the name of a client is the relay's own.
    left = [rule.match for chain, rule in draining if " --syn" in rule.match and "! --syn" not in rule.match]
    own = f"-p tcp -m tcp --syn -m mark --mark {plan.marks.relay:#x}/"
    answered = [rule.match for chain, rule in draining if chain.name == "ANSWERED"]
    assert all(match.startswith(own) or match in answered for match in left)
    assert not names or plan.mode == "redirect"


def test_ports_come_in_rules_that_multiport_can_hold() -> None:
    many = VARIANTS["many ports"]
    sizes = []
    for chain, rule in rules(many, "active"):
        if chain.name == "PRE" and "TPROXY --" in rule.then:
            sizes.append(len(re.split("[,:]", re.findall(r"--dports (\S+)", rule.match)[0])))
    assert max(sizes) <= 15 and sum(sizes) == len(many.families) * 2 * len(many.inbound)


@every_plan
def test_what_was_saved_is_understood(plan: Plan, state: State) -> None:
    for family in plan.families:
        saved = installed(plan, state, family, "mangle/PREROUTING,nat/OUTPUT")
        wanted = iptables.chains(plan, state, family)
        there: dict[str, list[str]] = {}
        for rule in saved.rules:
            if rule.chain.startswith(PREFIX):
                there.setdefault(rule.chain, []).append(rule.label)
            assert (rule.packets, rule.bytes) == (3, 180)
        assert there == iptables.expected(plan, state, family)
        assert len(saved.jumps) == len([chain for chain in wanted if chain.hook])
        assert not saved.rest
        assert saved.made == (["mangle/PREROUTING", "nat/OUTPUT"] if wanted else [])


@every_plan
def test_all_that_was_put_in_is_taken_out_again(plan: Plan, state: State) -> None:
    for family in plan.families:
        saved = installed(plan, state, family)
        text = iptables.removal(saved)
        assert sorted(re.findall(r"^-X (\S+)$", text, re.M)) == sorted(name for _, name in saved.chains)
        assert sorted(re.findall(r"^-D (.*)$", text, re.M)) == sorted(line.split(" -A ")[1] for line in saved.jumps)
        assert not re.search("^-[AIF]", text, re.M)
    assert iptables.removal(NOTHING) == ""


@every_plan
def test_what_was_there_of_an_older_plan_goes_in_the_same_transaction(plan: Plan, state: State) -> None:
    for family in plan.families:
        old = installed(PLAN, "active", family)
        text = iptables.restore(plan, state, family, old)
        assert re.findall(r"^-D PREROUTING .*-j TPROXY_RELAY_PRE$", text, re.M)
        kept = {PREFIX + chain.name for chain in iptables.chains(plan, state, family)}
        assert set(re.findall(r"^-X (\S+)$", text, re.M)) == {name for _, name in old.chains} - kept


@pytest.mark.parametrize("name", ["full", "beside nat"])
def test_what_was_there_is_led_to_in_the_same_order(name: str) -> None:
    former = installed(VARIANTS[name], "active", 4)
    for section in iptables.again(former, NOTHING).split("COMMIT\n")[:-1]:
        table = section.split("\n")[0].removeprefix("*")
        jumps = re.findall(r"^-I (\w+) 1 (.*)$", section, re.M)
        assert [f"-A {hook} {rest}" for hook, rest in reversed(jumps)] == former.jumps_in(table)


@pytest.mark.parametrize(
    "name, chain, expected",
    [
        ("tproxy", "PRE", "! -i lo -p tcp -m tcp --syn -m multiport --dports 443,8000:8100"),
        ("interface", "PRE", "-i a-b_c.d:1 -p tcp -m tcp --syn"),
        ("tproxy", "PRE", "-j TPROXY --on-port 15006 --tproxy-mark 0x1000000/0x7000000"),
        ("loopback", "LO", "-j TPROXY --on-port 15002 --on-ip ::1 --tproxy-mark"),
        ("account", "OUT", "-m owner --uid-owner 4294967294"),
        ("redirect", "NAT_PRE", "-j REDIRECT --to-ports 15006"),
        ("redirect addresses", "NAT_OUT", "-j DNAT --to-destination [2001:db8::1]:15002"),
        ("full", "ZONE_OUT", "-j CT --zone 7006"),
    ],
)
def test_what_a_setting_becomes(name: str, chain: str, expected: str) -> None:
    assert any(expected in rule.text for one, rule in rules(VARIANTS[name], "active") if one.name == chain)


def test_closed_refuses_everywhere_what_would_have_been_taken() -> None:
    chains = {chain.hook: chain for chain in iptables.chains(PLAN, "closed", 4)}
    assert set(chains) == {"INPUT", "FORWARD", "OUTPUT"}
    for chain in chains.values():
        assert chain.table == "filter" and chain.rules[-1].then == "-j REJECT --reject-with tcp-reset"


# --- the real ones


@pytest.fixture(params=["-nft", "-legacy"])
def variant(request: pytest.FixtureRequest, require_or_skip: Callable[[str], NoReturn]) -> str:
    for name in "iptables", "ip6tables":
        if programs.find(f"{name}{request.param}-restore") is None:
            require_or_skip(f"{name}{request.param} is not installed")
    if request.param == "-legacy" and not networks.LEGACY_IPTABLES:
        pytest.skip("legacy iptables need the real root")
    return str(request.param)


def restore(variant: str, family: Family, text: str, *more: str) -> None:
    name = {4: "iptables", 6: "ip6tables"}[family]
    programs.run([f"{name}{variant}-restore", "-w", "--noflush", *more], text)


def ours(variant: str) -> list[list[str]]:
    """The rules and our chains. Not the built-in ones: the legacy kind cannot unload a table that it has loaded."""
    saved = (
        programs.run([f"{name}{variant}-save"], check=networks.LEGACY_IPTABLES).stdout
        for name in ("iptables", "ip6tables")
    )
    return [sorted(re.findall("^-.*", re.sub(r" made=[^\"]*", "", text), re.M)) for text in saved]


def everything() -> object:
    """All that there is of either kind."""
    return programs.run(["nft", "list", "ruleset"]).stdout, ours("-legacy")


@pytest.mark.usefixtures("network")
@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_iptables_takes_it_in_every_state(name: str, variant: str) -> None:
    for family in VARIANTS[name].families:
        for state in STATES:
            restore(variant, family, iptables.restore(VARIANTS[name], state, family, NOTHING), "--test")


@pytest.mark.usefixtures("network")
@pytest.mark.parametrize("name", quickly(["tproxy", "redirect", "full", "many ports", "beside nat"], "full"))
def test_it_goes_in_changes_and_goes_out_without_a_trace(name: str, variant: str) -> None:
    plan, where = VARIANTS[name], Iptables(variant)
    assert not where.remove()
    before = everything()
    where.install(plan, "active")
    assert where.problems(plan, "active") == []
    active = ours(variant)
    for state in "closed", "draining":
        where.change(plan, state)
        assert where.problems(plan, state) == []
        assert where.problems(plan, "active") != []
    where.install(plan, "active")
    assert ours(variant) == active, "twice"
    assert where.problems(replace(plan, route_table=7), "active") != [], "of another plan"
    assert where.remove() and not where.remove()
    assert everything() == before


@pytest.mark.usefixtures("network")
def test_the_rules_of_others_stay(variant: str) -> None:
    theirs = "*mangle\n:OTHER - [0:0]\n-A PREROUTING -p tcp -j OTHER\n-A OTHER -j RETURN\nCOMMIT\n"
    where = Iptables(variant)
    for family in FAMILIES:
        restore(variant, family, theirs)
    where.install(PLAN, "active")
    where.install(VARIANTS["redirect"], "active")
    assert where.problems(VARIANTS["redirect"], "active") == []
    where.remove()
    for family in FAMILIES:
        name = {4: "iptables", 6: "ip6tables"}[family]
        there = programs.run([f"{name}{variant}-save"]).stdout
        assert "-A PREROUTING -p tcp -j OTHER" in there and "-A OTHER -j RETURN" in there and "TPROXY" not in there
