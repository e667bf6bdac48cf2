"""What `iptables-save` prints, as chains that firewall.py can judge (iptables-extensions(8))."""

import shlex
from collections.abc import Iterator, Mapping

from tproxy_relay.check.firewall import ALL_BITS, Chain, Condition, Rule
from tproxy_relay.intercept.iptables_save import PREFIX

_ACTIONS = {
    **{"ACCEPT": "accept", "DROP": "drop", "REJECT": "drop", "RETURN": "return", "TPROXY": "tproxy"},
    **{"REDIRECT": "redirect", "DNAT": "dnat", "SNAT": "snat", "MASQUERADE": "masquerade"},
}
_DECIDES_NOTHING = {"MARK", "CONNMARK", "LOG", "NFLOG", "TCPMSS", "CT", "NOTRACK", "TOS", "DSCP", "TTL", "CHECKSUM"}
_KINDS = {
    **{"-p": "proto", "-i": "iif", "-o": "oif", "--ctstate": "state", "--state": "state"},
    "--ctstatus": "state",
    **dict.fromkeys(("--dport", "--dports", "--destination-port", "--destination-ports"), "ports"),
}
_SETS_MARKS = {"--set-xmark", "--set-mark", "--or-mark", "--tproxy-mark"}
_SAY_NOTHING = {"-m", "--comment"}
_FREE_TEXT = {"--comment", "--log-prefix", "--nflog-prefix"}


def chains(program: str, saved: str) -> Mapping[str, dict[str, Chain]]:
    """By table, every chain but the relay's own. `program` is iptables, ip6tables-legacy and the like."""
    tables: dict[str, dict[str, Chain]] = {}
    rules: dict[tuple[str, str], list[Rule]] = {}
    heads: list[tuple[str, str, str]] = []
    table = ""
    for line in saved.splitlines():
        if line.startswith("*"):
            table = line[1:].strip()
        elif line.startswith(":"):
            name, policy = line[1:].split()[:2]
            heads.append((table, name, policy))
        elif line.startswith("-A ") and f" {PREFIX}" not in line:
            rules.setdefault((table, line.split()[1]), []).append(_rule(program, table, line))
    for table, name, policy in heads:
        if not name.startswith(PREFIX):
            found = tuple(rules.get((table, name), ()))
            tables.setdefault(f"{program} {table}", {})[name] = _chain(program, table, name, policy, found)
    return tables


def _chain(program: str, table: str, name: str, policy: str, rules: tuple[Rule, ...]) -> Chain:
    built_in = policy != "-"
    return Chain(
        name=name,
        title=f"{program} -t {table}, chain {name}",
        hook=name.lower() if built_in else "",
        kind="nat" if table == "nat" else "filter",
        families=(6,) if program.startswith("ip6") else (4,),
        drops=policy == "DROP",
        rules=rules,
        insert=f"{program} -w -t {table} -I {name} -m mark ! --mark 0x0/{{mask:#010x}} -j ACCEPT",
    )


def _rule(program: str, table: str, line: str) -> Rule:
    conditions: list[Condition] = []
    marks: list[tuple[int, int]] = []
    action = target = ""
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
            # connmark's option has the same name, and a connection's mark is not known here
            known = "-m connmark" not in line
            conditions.append(Condition("mark", (_mark(arguments[0]),), negated) if known else Condition("unknown"))
        elif option in _KINDS and arguments:
            kind = _KINDS[option]
            values = tuple(map(_range, words)) if kind == "ports" else tuple(word.lower() for word in words)
            conditions.append(Condition(kind, words if kind in ("iif", "oif") else values, negated))
        elif option not in _SAY_NOTHING and not action:  # what comes after the target is the target's
            conditions.append(Condition("unknown"))
    delete = f"{program} -w -t {table} -D {line.removeprefix('-A ')}"
    title = f"{program} -t {table} {line}"
    return Rule(tuple(conditions), action, target, tuple(marks), title, delete)


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
