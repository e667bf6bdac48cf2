"""What `iptables-save` prints, as chains that firewall.py can judge (iptables-extensions(8)).

Comments and names are other people's text: in a command each is one word, whatever is in it.
"""

import functools
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

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
_WORDS = re.compile(r'"((?:\\.|[^"\\])*)"(?=\s|$)|(\S+)')
_WHOLE = re.compile(r"(?<=/)0xffffffff$")


def chains(program: str, saved: str) -> Mapping[str, dict[str, Chain]]:
    """By table, every chain but the relay's own. `program` is iptables, ip6tables-legacy and the like."""
    tables: dict[str, dict[str, Chain]] = {}
    rules: dict[tuple[str, str], list[Rule]] = {}
    ours: Counter[tuple[str, str]] = Counter()
    numbers: Counter[tuple[str, str]] = Counter()
    heads: list[tuple[str, str, str]] = []
    table = ""
    for line in saved.split("\n"):
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
    place = [program, "-w", "-t", table, "-I", name, *([str(number)] if number > 1 else [])]

    def let_pass(condition: str) -> str:
        return _joined([*place, *condition.split(), "-j", "ACCEPT"])

    return Chain(
        name=name,
        title=f"{program} -t {table}, chain {name}",
        hook=name.lower() if built_in else "",
        kind="nat" if table == "nat" else "filter",
        families=(6,) if program.startswith("ip6") else (4,),
        drops=policy == "DROP",
        rules=rules,
        insert=lambda mask: let_pass(f"-m mark ! --mark 0x0/{mask:#010x}"),
        priority=_NAT.get(name, 0) if table == "nat" else _PRIORITIES.get(table, 0),
        let_pass=let_pass,
    )


def _rule(program: str, table: str, line: str, number: int) -> Rule:
    """`number`: its place in its chain, as iptables counts."""
    conditions: list[Condition] = []
    marks: list[tuple[int, int]] = []
    action = target = word = ""
    words = _words(line)
    options = list(_options(words[2:]))
    modules = {arguments[0] for option, arguments, _ in options if option == "-m" and arguments}
    for option, arguments, negated in options:
        values = tuple(arguments[0].split(",")) if arguments else ()
        if option in ("-j", "-g"):
            word = arguments[0]
            action = _ACTIONS.get(word, "" if word in _DECIDES_NOTHING else "jump" if option == "-j" else "goto")
            target = word if action in ("jump", "goto") else ""
        elif option in _SETS_MARKS:
            marks.append(_mark(arguments[0]))
        elif option == "--mark":
            marks.append(_mark(arguments[0]))
            # connmark's option has the same name
            kind = "ct_mark" if "connmark" in modules else "mark"
            kind = "unknown" if {"connmark", "mark"} <= modules else kind
            conditions.append(Condition(kind, (_mark(arguments[0]),), negated))
        elif option in _KINDS and arguments:
            conditions.append(_condition(_KINDS[option], values, negated))
        elif option not in _SAY_NOTHING and not word:  # what comes after the target is the target's
            conditions.append(Condition("unknown"))
    given = {option: arguments[0] if arguments else "" for option, arguments, _ in options}
    return Rule(
        conditions=tuple(conditions),
        action=action,
        target=target,
        marks=tuple(marks),
        where=f"{program} -t {table} {line}",
        changes=tuple(_changes(word, given)),
        untracks=word == "NOTRACK" or (word == "CT" and "--notrack" in given),
        spare=functools.partial(_spare, [program, "-w", "-t", table, "-R", words[1], str(number)], line),
    )


def _condition(kind: str, words: tuple[str, ...], negated: bool) -> Condition:
    if kind in ("ports", "sports"):
        return Condition(kind, tuple(map(_range, words)), negated)
    return Condition(kind, words if kind in ("iif", "oif") else tuple(word.lower() for word in words), negated)


def _changes(target: str, given: Mapping[str, str]) -> Iterator[Change]:
    """What the rule does to a mark, by its options (iptables-extensions(8), MARK and CONNMARK)."""
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


def _spare(command: list[str], line: str, bits: int, ours: int) -> str:
    """The same rule in its place: without these bits in its masks, or, where it has none, for packets without them."""
    if '"' in _WORDS.sub("", line) or not line.isprintable():
        return ""  # a comment of several lines
    words = _words(line)[2:]
    at = _target_at(words)
    match, target = words[:at], words[at:]
    keep = f"{ALL_BITS & ~ours:#x}"
    masked = [
        keep if word == "0xffffffff" and before.endswith("mask") else _WHOLE.sub(keep, word)
        for before, word in zip(["", *target], target)
    ]
    if masked == target:
        match += ["-m", "mark", "--mark", f"0x0/{bits:#010x}"]
    return _joined([*command, *match, *masked])


def _target_at(words: list[str]) -> int:
    """Where the target begins; at the end, if there is none."""
    for number, (before, word) in enumerate(zip(["", *words], words)):
        if word in ("-j", "-g") and before not in _FREE_TEXT:
            return number
    return len(words)


def _words(line: str) -> list[str]:
    """As iptables-restore takes it: a word may be in double quotes, and there a backslash is before what follows it
    (xtables_save_string() of libxtables)."""
    return [
        found[2] if found[1] is None else re.sub(r"\\(.)", r"\1", found[1]) for found in _WORDS.finditer(line)
    ]


def _joined(words: Iterable[str]) -> str:
    """The command for a shell; '' if a person would not see what it is."""
    command = " ".join(word if word == "!" else shlex.quote(word) for word in words)
    return command if command.isprintable() else ""


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
