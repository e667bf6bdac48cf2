"""The nft text: what must be true of it for every plan, and that nft takes it."""

import json
import re
from dataclasses import replace

import pytest
from plans import PLAN, VARIANTS, every_plan, quickly

from tproxy_relay.intercept import nft, programs
from tproxy_relay.intercept.backend_nft import Nft
from tproxy_relay.intercept.nft import Chain, Rule
from tproxy_relay.intercept.plan import Plan, State

SYN, NOT_SYN = "tcp flags & (fin | syn | rst | ack) == syn", "tcp flags & (fin | syn | rst | ack) != syn"
SYN_ACK, ACK = "tcp flags & (syn | ack) == (syn | ack)", "tcp flags & (syn | rst | ack) == ack"


def rules(plan: Plan, state: State) -> list[tuple[Chain, Rule]]:
    return [(chain, rule) for chain in nft.chains(plan, state) for rule in chain.rules]


def labels(plan: Plan, chain: str, state: State = "active") -> list[str]:
    return [rule.label for one, rule in rules(plan, state) if one.name == chain]


@every_plan
def test_it_is_made_of_harmless_characters(plan: Plan, state: State) -> None:
    for text in nft.script(plan, state, held=True), nft.change(plan, state):
        assert re.fullmatch(r"[a-zA-Z0-9_.:,;(){}\[\]=!&|/\" \n-]*", text)
        for line in text.splitlines():
            assert line.count('"') % 2 == 0
            assert re.sub(r'"[^"]*"', "", line).count(";") <= (2 if "policy" in line else 1)


@every_plan
def test_it_touches_one_table(plan: Plan, state: State) -> None:
    for text in nft.script(plan, state), nft.change(plan, state), nft.removal():
        assert set(re.findall(r"\btable\b.*?(?= \{|$)", text, re.MULTILINE)) == {"table inet tproxy_relay"}


@every_plan
def test_every_rule_says_what_it_is_for(plan: Plan, state: State) -> None:
    for _, rule in rules(plan, state):
        assert re.fullmatch(r"[\w ,:-]{4,100}", rule.label)
        assert f'{rule.text} comment "{rule.label}"\n' in nft.script(plan, state)


@every_plan
def test_the_first_rule_of_a_chain_knows_the_plan(plan: Plan, state: State) -> None:
    for chain in nft.chains(plan, state):
        if chain.hook and not chain.name.startswith("zone"):
            assert chain.rules[0].label == f"plan {plan.digest} {state}: TCP only"


@every_plan
@pytest.mark.row("B12", "TPROXY rules", "in prerouting only")
def test_tproxy_is_for_prerouting(plan: Plan, state: State) -> None:
    """nft_tproxy.c has no other hook, and refuses the whole table."""
    assert all("tproxy" not in rule.text for chain, rule in rules(plan, state) if "output" in chain.hook)


@every_plan
def test_a_bare_syn_never_matches_an_old_socket(plan: Plan, state: State) -> None:
    for chain, rule in rules(plan, state):
        assert "socket transparent" not in rule.text or NOT_SYN in rule.text or "icmp" in rule.text
        assert chain.name != "answered" or not re.search(r"\btproxy\b", rule.text) or ACK in rule.text


@every_plan
def test_only_bare_syns_are_taken(plan: Plan, state: State) -> None:
    for chain, rule in rules(plan, state):
        takes = re.search(r"\b(tproxy|redirect|dnat)\b", rule.text) or "ct mark set" in rule.text
        answer = chain.name == "output" and SYN_ACK in rule.text or chain.name == "answered" and ACK in rule.text
        assert not takes or SYN in rule.text or answer or chain.name in ("from_lo", "nat_keep")


@every_plan
def test_only_what_the_relay_has_answered_is_offered_to_its_listener(plan: Plan, state: State) -> None:
    """A mark from the SYN would be that of one, too, which finds the backlog full and goes direct in the end."""
    mark = f"ct mark set {own(plan, plan.marks.inbound)}"
    marks = [rule.text for _, rule in rules(plan, state) if mark in rule.text]
    assert all(f"meta mark & {plan.mark_mask:#010x} == {plan.marks.relay:#010x} {SYN_ACK}" in text for text in marks)
    there = {chain.name: [one.text for one in chain.rules] for chain in nft.chains(plan, state)}
    takes = plan.mode == "tproxy" and plan.imitates
    assert bool(marks) == takes
    if takes:
        jump = next(number for number, text in enumerate(there["prerouting"]) if text.endswith("jump answered"))
        assert f"ct mark & {plan.mark_mask:#010x} == {plan.marks.inbound:#010x} ct direction original" in (
            there["prerouting"][jump]
        )
        assert not any("socket" in text for text in there["prerouting"][:jump]), "it finds a server's listener"
        assert there["answered"][-1] == f"{SYN} ct mark set ct mark & {0xFFFFFFFF ^ plan.mark_mask:#010x}"


def own(plan: Plan, bits: int) -> str:
    return f"ct mark & {0xFFFFFFFF ^ plan.mark_mask:#010x} | {bits:#010x}"


@every_plan
def test_errors_come_to_relays_that_speak_in_the_name_of_others(plan: Plan, state: State) -> None:
    """And to nobody else's packets; what is on lo has the mark that leads it here already."""
    for chain in nft.chains(plan, state):
        if chain.name in ("prerouting", "output"):
            to = {"prerouting": "errors", "output": "own_errors"}[chain.name]
            assert chain.rules[0].text == f"meta l4proto != tcp {f'goto {to}' if plan.imitates else 'return'}"
        if chain.name == "errors":
            # A listener for all addresses is found for every packet to its port.
            steps = [re.split(" socket (wildcard|transparent) 1 ", rule.text)[:2] for rule in chain.rules]
            passed = {family: ["wildcard"] if plan.on_address(family) is None else [] for family in plan.families}
            assert [step for _, step in steps] == [s for one in passed.values() for s in (*one, "transparent")]
            assert len({match for match, _ in steps}) == len(plan.families)
            assert all('iifname != "lo" icmp' in rule.text for rule in chain.rules)
            assert not any("redirect" in rule.text or "echo" in rule.text for rule in chain.rules)
        if chain.name == "own_errors":
            assert all('oifname != "lo" ct state related ct mark' in rule.text for rule in chain.rules)


@every_plan
def test_foreign_bits_of_marks_survive(plan: Plan, state: State) -> None:
    for _, rule in rules(plan, state):
        writes = re.findall(r"(meta|ct) mark set (meta|ct) mark & (0x\w+)(?: \| (0x\w+))?", rule.text)
        assert len(writes) == rule.text.count("mark set")
        for to, of, kept, added in writes:
            assert to == of and int(kept, 16) == 0xFFFFFFFF ^ plan.mark_mask
            assert int(added, 16) in plan.marks if added else SYN in rule.text and to == "ct"
        reads = re.findall(r"mark & (0x\w+) == (0x\w+)", rule.text)
        assert len(reads) == rule.text.count("mark &") - len(writes)
        for mask, value in reads:
            assert int(mask, 16) == plan.mark_mask and int(value, 16) in (*plan.marks, 0)


@every_plan
def test_the_relay_is_exempt_before_anything_is_taken(plan: Plan, state: State) -> None:
    for name in "output", "nat_output", "from_lo":
        texts = [rule.text for chain, rule in rules(plan, state) if chain.name == name]
        own = f"meta mark & {plan.mark_mask:#010x} == {plan.marks.relay:#010x}"
        exempt = next((number for number, text in enumerate(texts) if text.startswith(own)), len(texts))
        taking = (number for number, text in enumerate(texts) if SYN in text or re.search(r"\btproxy\b", text))
        assert exempt <= next(taking, len(texts))


@every_plan
def test_only_answers_are_sent_to_the_relay_for_its_own_mark(plan: Plan, state: State) -> None:
    """And none that carry that mark themselves, unless servers here may have inherited it (tcp_fwmark_accept)."""
    texts = [rule.text for chain, rule in rules(plan, state) if chain.name == "output"]
    to_relay = [n for n, text in enumerate(texts) if f"meta mark set {own_bits(plan)}" in text]
    answers = [n for n in to_relay if f"ct mark & {plan.mark_mask:#010x} == {plan.marks.relay:#010x}" in texts[n]]
    assert len(answers) == bool(plan.mode == "tproxy" and plan.outbound or plan.imitates and plan.keeps_source)
    assert all(texts[n].startswith("ct direction reply ") for n in answers)
    if not (plan.imitates and plan.keeps_source):
        exempt = [n for n, text in enumerate(texts) if text == f"{own_packets(plan)} counter return"]
        assert all(exempt[0] < n for n in answers)


def own_bits(plan: Plan) -> str:
    return f"meta mark & {0xFFFFFFFF ^ plan.mark_mask:#010x} | {plan.marks.outbound:#010x}"


@every_plan
def test_draining_is_active_without_what_takes_new_connections(plan: Plan, state: State) -> None:
    active, draining = ([(chain.name, rule.text) for chain, rule in rules(plan, one)] for one in ("active", "draining"))
    left_out = [rule for rule in active if rule not in draining]
    assert [rule for rule in active if rule in draining] == draining
    # A bare SYN may lose a mark, and one in the name of a client is the relay's own.
    kept = [text for name, text in draining if SYN in text and name != "answered"]
    assert all(text.startswith(own_packets(plan)) and "meta mark set" not in text for text in kept)
    assert len(kept) == (plan.keeps_source and plan.imitates)
    # What is left out beside those only kept something from them, or refused what a relay that is gone had.
    assert all(SYN in text or text.endswith((" return", "with tcp reset")) for _, text in left_out)
    assert {name for name, _ in active} == {name for name, _ in draining}, "its hooks stay"


def own_packets(plan: Plan) -> str:
    return f"meta mark & {plan.mark_mask:#010x} == {plan.marks.relay:#010x}"


@every_plan
def test_one_line_says_the_same(plan: Plan, state: State) -> None:
    text = nft.script(plan, state, held=True)
    line = nft.one_line(text)
    assert "\n" not in line
    assert line.replace(";", "").split() == text.replace(";", "").split()
    assert not re.search(r"[;{]\s*;", line)
    assert line.count(";") == sum(not one.endswith("{") for one in text.splitlines()) + text.count("; policy")


@pytest.mark.parametrize(
    "name, chain, expected",
    [
        ("tproxy", "prerouting", "tproxy ip to :15006"),
        ("tproxy", "from_lo", "tproxy ip6 to :15002"),
        ("loopback", "prerouting", "tproxy ip to 127.0.0.1:15006"),
        ("loopback", "from_lo", "tproxy ip6 to [::1]:15002"),
        ("interface", "prerouting", 'iifname "a-b_c.d:1" meta nfproto ipv4'),
        ("tproxy", "prerouting", 'iifname != "lo" meta nfproto ipv6'),
        ("account", "output", "meta skuid 4294967294 counter return"),
        ("redirect", "nat_prerouting", "redirect to :15006"),
        ("redirect loopback", "nat_output", "redirect to :15002"),
        ("redirect addresses", "nat_prerouting", "dnat ip to 192.0.2.1:15006"),
        ("redirect addresses", "nat_output", "dnat ip6 to [2001:db8::1]:15002"),
        ("mask", "output", "ct mark set ct mark & 0x7ffffefe | 0x00000100"),
        ("full", "zone_output", "ct zone set 7006"),
        ("tproxy", "prerouting", "tcp dport { 443, 8000-8100 }"),
    ],
)
def test_what_a_setting_becomes(name: str, chain: str, expected: str) -> None:
    assert any(expected in rule.text for one, rule in rules(VARIANTS[name], "active") if one.name == chain)


def test_closed_refuses_what_has_no_listener_right_after_it_was_offered() -> None:
    def prerouting(plan: Plan) -> list[str]:
        return [re.sub(r", IPv[46]$", "", label) for label in labels(plan, "prerouting")[5:]]

    assert prerouting(VARIANTS["tproxy"]) == ["never intercepted", "inbound"] * 2
    assert prerouting(VARIANTS["closed"]) == ["never intercepted", "inbound", "inbound without a relay"] * 2
    answered = labels(VARIANTS["closed"], "answered")
    assert [label.partition(",")[0] for label in answered[:-1]] == [
        "to its socket or listener",
        "answered by a relay that is gone",
    ] * 2


def test_listeners_on_all_addresses_are_passed_over_and_others_are_not_found() -> None:
    def passed_over(name: str) -> list[str]:
        return [
            chain.name for chain, rule in rules(VARIANTS[name], "active") if "socket wildcard 1 return" in rule.text
        ]

    assert passed_over("tproxy") == ["errors", "errors", "prerouting"]
    assert passed_over("full") == ["zone_prerouting", "errors", "errors", "prerouting"]
    assert passed_over("loopback") == []


def test_no_chain_without_a_purpose() -> None:
    def names(name: str) -> list[str]:
        return [chain.name for chain in nft.chains(VARIANTS[name], "active")]

    imitating = ["from_lo", "errors", "answered", "prerouting", "own_errors", "output"]
    assert names("tproxy") == names("inbound") == imitating
    assert names("outbound") == ["from_lo", "prerouting", "output"]
    assert names("redirect") == ["nat_prerouting", "nat_output"]
    assert names("redirect outbound") == ["nat_output"]
    assert names("redirect full") == [
        *("zone_prerouting", "zone_output", "from_lo", "errors", "prerouting", "own_errors", "output"),
        *("nat_prerouting", "nat_output"),
    ]
    assert names("full") == ["zone_prerouting", "zone_output", *imitating]
    assert "IPv6" not in nft.script(VARIANTS["IPv4"], "active") and "IPv4" not in nft.script(VARIANTS["IPv6"], "active")


# --- the real nft


def table() -> list[object]:
    """The table as nft lists it, without what differs from one installation to the next."""
    listed = programs.run(["nft", "-j", "list", "ruleset"]).stdout
    listed = re.sub(r'"handle": \d+', '"handle": 0', listed)
    return list(json.loads(listed)["nftables"][1:])


@pytest.mark.usefixtures("network")
@pytest.mark.parametrize("name", quickly(VARIANTS, "tproxy", "addresses", "beside nat", "full", "redirect full"))
def test_nft_takes_it_in_every_state_and_leaves_nothing_behind(name: str) -> None:
    plan, where = VARIANTS[name], Nft()
    before = table()
    where.install(plan, "active")
    assert where.problems(plan, "active") == []
    active = table()
    where.change(plan, "draining")
    assert where.problems(plan, "draining") == []
    assert where.problems(plan, "active") != []
    where.change(plan, "active")
    assert table() == active
    programs.run(["nft", "-f", "-"], nft.one_line(nft.script(plan, "active")))
    assert table() == active, "in one line"
    where.install(plan, "active")
    assert table() == active, "twice"
    assert where.remove() and table() == before
    programs.run(["nft", "-f", "-"], nft.removal())
    assert table() == before and not where.remove()


@pytest.mark.usefixtures("network")
def test_nft_takes_any_plan() -> None:
    @every_plan
    def check(plan: Plan, state: State) -> None:
        programs.run(["nft", "-c", "-f", "-"], nft.script(plan, state))

    check()


@pytest.mark.usefixtures("network")
def test_other_tables_are_left_alone() -> None:
    programs.run(["nft", "-f", "-"], "table inet other { chain c { type filter hook input priority 0; accept; }; }")
    before = table()
    where = Nft()
    where.install(replace(PLAN, on_failure="closed"), "active")
    where.change(PLAN, "draining")
    where.remove()
    assert table() == before
