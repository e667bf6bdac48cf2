"""Measure the relay beside others, in turns. See README.md here.

python tests/bench/run.py [--short] [--rounds N] [--seconds S] [--only CELL,...] [--peers NAME,...] [--json FILE]
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import cells  # noqa: E402
import peers  # noqa: E402
import report  # noqa: E402
from cells import CELLS, Cell  # noqa: E402
from peers import Peer, Relay  # noqa: E402
from stage import HERE, Stage  # noqa: E402

from tproxy_relay import __version__  # noqa: E402

SHORT = ("bulk1-up", "bulk4-down", "rr1", "rr32", "rr256", "conn32", "mixed", "idle1000")
NOT_ALWAYS = ("curve",)
"""Groups that are measured only when they are asked for."""
STRANGERS = 0.10
"""Of the machine: as much as others may have used before a cell before it is said."""


def main(argv: Sequence[str]) -> int:
    """Returns 1 if a relay has failed, or a target was missed and --strict wants them."""
    args = _arguments(argv)
    chosen = _chosen(args)
    rounds: dict[str, list[dict[str, Any]]] = {cell.name: [] for cell in chosen}
    failures: list[str] = []
    with Stage() as stage, peers.started(stage, args.peers.split(","), args.option) as (there, absent):
        for what in absent:
            print(f"left out, because it is not installed: {what}", file=sys.stderr)
        if absent and args.require:
            return 1
        for number in range(args.rounds):
            for cell in chosen:
                rounds[cell.name].append(_round(cell, there, args.seconds, number, failures))
        warnings = [line for peer in there if isinstance(peer, Relay) for line in peer.warnings()]
    result = {
        "machine": _machine(),
        "options": vars(args),
        "rounds": rounds,
        "failures": failures,
        "warnings": warnings,
    }
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    print(report.table(result))
    for line in [*failures, *(f"in the log: {line}" for line in warnings)]:
        print(line)
    return 1 if failures or warnings else 0


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the relay beside others, in turns.")
    parser.add_argument("--short", action="store_true", help="a few cells, one round: under three minutes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="for a cell of one relay (default: 1)")
    parser.add_argument("--only", default="", help="cells or groups, with commas between them")
    parser.add_argument("--peers", default=",".join(peers.KINDS), help="the relays (default: all)")
    parser.add_argument("--require", action="store_true", help="fail if one of the peers is not installed")
    parser.add_argument("--option", action="append", default=[], metavar="'NAME = VALUE'", help="for our relay")
    parser.add_argument("--json", metavar="FILE", help="write everything there")
    args = parser.parse_args(argv)
    if args.short:
        args.rounds, args.only = 1, args.only or ",".join(SHORT)
    return args


def _chosen(args: argparse.Namespace) -> list[Cell]:
    wanted = set(filter(None, args.only.split(",")))
    unknown = wanted - {cell.name for cell in CELLS} - {cell.group for cell in CELLS}
    if unknown:
        sys.exit(f"no such cell: {', '.join(sorted(unknown))}; there are {', '.join(cell.name for cell in CELLS)}")
    if not wanted:
        return [cell for cell in CELLS if cell.group not in NOT_ALWAYS]
    return [cell for cell in CELLS if cell.name in wanted or cell.group in wanted]


def _round(cell: Cell, there: Sequence[Peer], seconds: float, number: int, failures: list[str]) -> dict[str, Any]:
    """Every relay once, another one first each time."""
    found: dict[str, Any] = {}
    turn = number % len(there)
    for peer in [*there[turn:], *there[:turn]]:
        strangers = _strangers()
        try:
            found[peer.name] = {**cell.run(peer, seconds), "strangers": strangers}
        except (RuntimeError, OSError, subprocess.SubprocessError, peers.LabError) as error:
            failures.append(f"{cell.name}, {peer.name}, round {number + 1}: {error}")
        main = found.get(peer.name, {}).get(cell.main)
        note = f" (others use {strangers:.0%} of the machine)" if strangers > STRANGERS else ""
        print(
            f"{number + 1} {cell.name:14} {peer.name:14} {main if main is None else f'{main:,.6g}'}{note}",
            file=sys.stderr,
        )
    return found


def _strangers() -> float:
    """The part of the machine that is busy while nothing of ours is."""
    before = cells._machine()
    time.sleep(0.1)
    passed = [after - earlier for earlier, after in zip(before, cells._machine())]
    return 1 - sum(passed[3:5]) / max(1, sum(passed))


def _machine() -> dict[str, Any]:
    commit = subprocess.run(
        ["git", "-C", str(HERE), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "version": __version__,
        "commit": commit.stdout.strip(),
        "python": platform.python_version(),
        "kernel": platform.release(),
        "processors": len(os.sched_getaffinity(0)),
        "model": model[0].partition(":")[2].strip() if model else platform.machine(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
