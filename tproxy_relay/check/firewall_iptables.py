"""What `iptables-save` prints, as chains that firewall.py can judge (iptables-extensions(8))."""

import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping

from tproxy_relay.check.firewall import ALL_BITS, Chain, Change, Condition, Rule
from tproxy_relay.intercept.iptables_save import PREFIX

_ACTIONS = {
    **{"ACCEPT": "accept", "DROP": "drop", "REJECT": "drop", "RETURN": "return", "TPROXY": "tproxy"},
    **{"REDIRECT": "redirect", "DNAT": "dnat", "SNAT": "snat", "MASQUERADE": "masquerade"},
    "SYNPROXY": "synproxy",
}
_DECIDES_NOTHING = {"MARK", "CONNMARK", "LOG", "NFLOG", "TCPMSS", "CT", "NOTRACK", "TOS", "DSCP", "TTL", "CHECKSUM"}
_KINDS = {
    **{"-p": "proto", "-i": "iif", "-o": "oif", "--ctstate": "state", "--state": "state"},
    "--ctstatus": "state",
    **dict.fromkeys(("--dport", "--dports", "--destination-port", "--destination-ports"), "ports"),
    **dict.fromkeys(("--sport", "--sports", "--source-port", "--source-ports"), "sports"),
}
_PRIORITIES = {"raw": -300, "mangle": -150, "filter": 0, "security": 50}
_NAT = {"PREROUTING": -100, "OUTPUT": -100, "INPUT": 100, "POSTROUTING": 100}
"""linux/netfilter_ipv4.h, nf_ip_hook_priorities."""
_SETS_MARKS = {"--set-xmark", "--set-mark", "--or-mark", "--tproxy-mark"}
_SAY_NOTHING = {"-m", "--comment"}
_FREE_TEXT = {"--comment", "--log-prefix", "--nflog-prefix"}


def chains(program: str, saved: str) -> Mapping[str, dict[str, Chain]]:
    """By table, every chain but the relay's own. `program` is iptables, ip6tables-legacy and the like."""
    tables: dict[str, dict[str, Chain]] = {}
    rules: dict[tuple[str, str], list[Rule]] = {}
    ours: Counter[tuple[str, str]] = Counter()
    numbers: Counter[tuple[str, str]] = Counter()
    heads: list[tuple[str, str, str]] = []
    table = ""
    for line in saved.splitlines():
        if line.startswith("*"):
            table = line[1:].strip()
        elif line.startswith(":"):
            name, policy = line[1:].split()[:2]
            heads.append((table, name, policy))
        elif line.startswith("-A "):
            place = table, line.split()[1]
            numbers[place] += 1
            if f" {PREFIX}" in line:
                ours[place] += 1
            else:
                rules.setdefault(place, []).append(_rule(program, table, line, numbers[place]))
    for table, name, policy in heads:
        if not name.startswith(PREFIX):
            found = tuple(rules.get((table, name), ()))
            one = _chain(program, table, name, policy, found, ours[table, name] + 1)
            tables.setdefault(f"{program} {table}", {})[name] = one
    return tables


def _chain(program: str, table: str, name: str, policy: str, rules: tuple[Rule, ...], number: int) -> Chain:
    """`number`: where a rule may be put in, after the relay's, which come first."""
    built_in = policy != "-"
    place = f"{program} -w -t {table} -I {name}{f' {number}' if number > 1 else ''}"
    return Chain(
        name=name,
        title=f"{program} -t {table}, chain {name}",
        hook=name.lower() if built_in else "",
        kind="nat" if table == "nat" else "filter",
        families=(6,) if program.startswith("ip6") else (4,),
        drops=policy == "DROP",
        rules=rules,
        insert=f"{place} -m mark ! --mark 0x0/{{mask:#010x}} -j ACCEPT",
        priority=_NAT.get(name, 0) if table == "nat" else _PRIORITIES.get(table, 0),
        let_pass=f"{place} {{condition}} -j ACCEPT",
    )


def _rule(program: str, table: str, line: str, number: int) -> Rule:
    """`number`: its place in its chain, as iptables counts."""
    conditions: list[Condition] = []
    marks: list[tuple[int, int]] = []
    action = target = word = ""
    for option, arguments, negated in _options(shlex.split(line)[2:]):
        words = tuple(arguments[0].split(",")) if arguments else ()
        if option in ("-j", "-g"):
            word = arguments[0]
            action = _ACTIONS.get(word, "" if word in _DECIDES_NOTHING else "jump" if option == "-j" else "goto")
            target = word if action in ("jump", "goto") else ""
        elif option in _SETS_MARKS:
            marks.append(_mark(arguments[0]))
        elif option == "--mark":
            marks.append(_mark(arguments[0]))
            # connmark's option has the same name
            kind = "ct_mark" if "-m connmark" in line else "mark"
            both = "-m connmark" in line and "-m mark" in line
            conditions.append(Condition("unknown" if both else kind, (_mark(arguments[0]),), negated))
        elif option in _KINDS and arguments:
            kind = _KINDS[option]
            values = tuple(map(_range, words)) if kind in ("ports", "sports") else tuple(word.lower() for word in words)
            conditions.append(Condition(kind, words if kind in ("iif", "oif") else values, negated))
        elif option not in _SAY_NOTHING and not word:  # what comes after the target is the target's
            conditions.append(Condition("unknown"))
    delete = f"{program} -w -t {table} -D {line.removeprefix('-A ')}"
    title = f"{program} -t {table} {line}"
    return Rule(
        conditions=tuple(conditions),
        action=action,
        target=target,
        marks=tuple(marks),
        where=title,
        delete=delete,
        changes=tuple(_changes(line)),
        untracks=bool(re.search(r"-j (NOTRACK|CT\b.* --notrack)", line)),
        spare=_spare(f"{program} -w -t {table}", line, number),
    )


def _changes(line: str) -> Iterator[Change]:
    """What the rule does to a mark (iptables-extensions(8), MARK and CONNMARK)."""
    words = shlex.split(line)
    target = next((after for word, after in zip(words, words[1:]) if word == "-j"), "")
    given = {word: after for word, after in zip(words, [*words[1:], ""]) if word.startswith("--")}
    of_packet, of_connection = (int(given.get(name, hex(ALL_BITS)), 0) for name in ("--nfmask", "--ctmask"))
    if "--set-xmark" in given and target in ("MARK", "CONNMARK"):
        value, mask = _mark(given["--set-xmark"])
        if target == "MARK":
            yield Change("mark", ALL_BITS & ~mask, 0, value)
        else:
            yield Change("ct_mark", 0, ALL_BITS & ~mask, value)
    elif "--restore-mark" in given:
        yield Change("mark", ALL_BITS & ~of_packet, of_connection, 0)
    elif "--save-mark" in given:
        yield Change("ct_mark", of_packet, ALL_BITS & ~of_connection, 0)
    elif target == "HMARK":
        yield Change("mark", 0, 0, 0, known=False)


_WHOLE = re.compile(r"(?<=[-a-z]mask )0xffffffff\b|(?<=/)0xffffffff\b")


def _spare(command: str, line: str, number: int) -> str:
    """The same rule in its place: without these bits in its masks, or, where it has none, for packets without them."""
    _, chain, rest = line.split(maxsplit=2) if line.count(" ") > 1 else (*line.split(), "")
    match, jump, target = f" {rest}".partition(" -j ")
    bits = "-m mark --mark 0x0/{mask:#010x}"
    text = f"{match.strip()} ".lstrip().replace("{", "{{").replace("}", "}}")
    masked = _WHOLE.sub("{keep:#x}", target)
    if masked != target:
        return f"{command} -R {chain} {number} {text}{jump.strip()} {masked}"
    return f"{command} -R {chain} {number} {text}{bits}{jump}{target}"


def _options(words: list[str]) -> Iterator[tuple[str, list[str], bool]]:
    """Each option with its arguments, and whether it is negated."""
    negated, option, arguments = False, "", list[str]()
    for word in words:
        if option in _FREE_TEXT and not arguments:
            arguments.append(word)
        elif word.startswith("-") or word == "!":
            if option:
                yield option, arguments, negated
                option, negated = "", False
            if word == "!":
                negated = True
            else:
                option, arguments = word, []
        else:
            arguments.append(word)
    if option:
        yield option, arguments, negated


def _mark(text: str) -> tuple[int, int]:
    value, _, mask = text.partition("/")
    return int(value, 0), int(mask, 0) if mask else ALL_BITS


def _range(text: str) -> tuple[int, int]:
    first, _, last = text.partition(":")
    return int(first), int(last or first)
