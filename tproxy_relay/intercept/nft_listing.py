"""What nftables has, as `nft -j` lists it (libnftables-json(5)), also where nft stumbles over its own listing.

nft 1.0.6 has no word for `flags owner`, which the table of a running relay has: with -j it prints whatever is in
memory there, and mostly that is no JSON. Chains by themselves are printed without their table. So that is how it is
asked where the first answer cannot be read.
"""

import json
from collections.abc import Callable
from typing import Any

from tproxy_relay.intercept import programs
from tproxy_relay.intercept.programs import ProgramError

Object = dict[str, Any]
"""One of `table`, `chain`, `rule` ..., and what it is."""


def ruleset() -> list[Object]:
    """Every object; where nft stumbles, every chain with its rules. Raises RelayError if nft cannot say."""
    try:
        return _list("ruleset")
    except ValueError:
        return _by_chains(lambda chain: True)


def table(family: str, name: str) -> list[Object]:
    """The objects of one table; nothing if it is not there. Raises RelayError if nft cannot say."""
    try:
        return _list("table", family, name)
    except ValueError:
        return _by_chains(lambda chain: (chain["family"], chain["table"]) == (family, name))
    except _NotThere:
        return []


class _NotThere(Exception):
    """There is nothing of that name."""


def _by_chains(wanted: Callable[[Object], bool]) -> list[Object]:
    try:
        chains = [one["chain"] for one in _list("chains") if "chain" in one]
        found = []
        for chain in filter(wanted, chains):
            found += _list("chain", chain["family"], chain["table"], chain["name"])
        return found
    except (ValueError, _NotThere) as error:  # or it has just gone
        raise ProgramError("`nft -j list` did not answer in JSON") from error


def _list(*what: str) -> list[Object]:
    """Raises ValueError for an answer that is not JSON, _NotThere, or RelayError."""
    argv = ["nft", "-j", "list", *what]
    done = programs.run(argv, check=False)
    if done.returncode:
        said = done.stderr or done.stdout
        if "no such file or directory" in said.lower():
            raise _NotThere
        raise programs.refusal(argv, said)
    try:
        return list(json.loads(done.stdout)["nftables"])
    except (KeyError, TypeError) as error:
        raise ValueError("no objects") from error
