"""Measure the relay beside others, in turns. README.md here tells what, and how to read it.

python tests/bench/run.py [--short] [--rounds N] [--seconds S] [--only CELL,...] [--peers NAME,...] [--json FILE]
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import report  # noqa: E402
from cells import CELLS, ON_DEMAND, Cell  # noqa: E402
from company import KINDS, USUAL, Company  # noqa: E402
from peers import DEFAULT, Peer, Unable  # noqa: E402
from stage import Stage  # noqa: E402

from tproxy_relay.errors import RelayError  # noqa: E402
from tproxy_relay.lab import LabError  # noqa: E402

SHORT = ("bulk1-up", "bulk4-down", "rr1", "rr32", "rr256", "conn32", "mixed", "idle1000")
NOISE = 0.05
"""Of the machine: as much as others may use during a measurement before it is said."""
NOBODY = "direct"

Round = dict[str, dict[str, float]]
"""The figures of each relay."""


class Run:
    """What is found, piece by piece."""

    def __init__(self, company: Company, cells: Sequence[Cell], seconds: float) -> None:
        self.company = company
        self.cells = cells
        self.seconds = seconds
        self.rounds: dict[str, list[Round]] = {cell.name: [] for cell in cells}
        self.failures: list[dict[str, Any]] = []
        self.unable: dict[str, dict[str, str]] = defaultdict(dict)
        self.noisy = 0

    def round(self, number: int) -> None:
        """Every cell, and in each every relay."""
        for cell in self.cells:
            found: Round = {}
            for peer in self.company.in_turn(number):
                figures = self._cell(cell, peer, number)
                if figures is not None:
                    found[peer.name] = figures
            self.rounds[cell.name].append(found)

    def result(self) -> dict[str, Any]:
        """So far, for the JSON."""
        return {
            "versions": self.company.versions,
            "absent": self.company.absent,
            "unable": self.unable,
            "failures": self.failures,
            "warnings": self.company.warnings(),
            "noisy": self.noisy,
            "rounds": self.rounds,
        }

    def _cell(self, cell: Cell, peer: Peer, number: int) -> dict[str, float] | None:
        began = time.monotonic()
        try:
            figures = self._figures(cell, peer)
        except Unable as why:
            self.unable[cell.name][peer.name] = str(why)
            return None
        except (RelayError, OSError, subprocess.SubprocessError) as error:
            failure = {"cell": cell.name, "peer": peer.name, "round": number + 1, "why": str(error)}
            self.failures.append(failure)
            _say(f"{number + 1} {cell.name:14} {peer.name:14} FAILED: {error}")
            peer.stop()  # whatever has happened to it, the next cell gets a new one
            return None
        strangers = figures.get("strangers", 0.0) + figures.get("stolen", 0.0)
        noise = f"   others used {strangers:.0%} of the machine" if strangers > NOISE else ""
        self.noisy += bool(noise)
        value = report.shown(cell.main, figures.get(cell.main))
        _say(f"{number + 1} {cell.name:14} {peer.name:14} {value:>14}{noise}")
        return {**figures, "took": time.monotonic() - began}

    def _figures(self, cell: Cell, peer: Peer) -> dict[str, float]:
        if cell.connections > peer.most:
            raise Unable(f"it can hold {peer.most:,} connections, with the descriptors that there are")
        peer.run(cell.variant, fresh=cell.fresh)
        with peer.witnessed():
            figures = cell.work(peer, self.seconds)
        peer.rest()
        if cell.variant != DEFAULT:
            peer.run()  # now: its rules and threads are in the way of the others
        return figures


def main(argv: Sequence[str]) -> int:
    """Returns 1 if there is no result to rely on: ours or no relay has failed, or our log has warnings."""
    args = _arguments(argv)
    try:
        result = _run(args, _chosen(args.only))
    except LabError as error:
        _say(f"cannot measure here: {error}")
        return 1
    print(report.tables(result))
    print(*_remarks(result), sep="\n")
    serious = [failure for failure in result["failures"] if failure["peer"] in ("relay", NOBODY)]
    return 1 if serious or result["warnings"] else 0


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the relay beside others, in turns.")
    parser.add_argument("--short", action="store_true", help="a few cells, one round: under three minutes")
    parser.add_argument("--rounds", type=int, default=5, help="(default: 5)")
    parser.add_argument("--seconds", type=float, default=1.0, help="of a measurement (default: 1)")
    parser.add_argument("--only", default="", help="cells or groups, with commas between them")
    parser.add_argument("--peers", default=",".join(USUAL), help="the relays (default: %(default)s)")
    parser.add_argument("--require", action="store_true", help="fail if one of the peers is not installed")
    parser.add_argument("--option", action="append", default=[], metavar="'NAME = VALUE'", help="for our relay")
    parser.add_argument("--json", metavar="FILE", help="write everything there")
    args = parser.parse_args(argv)
    if args.short:
        args.rounds, args.only = 1, args.only or ",".join(SHORT)
    unknown = set(args.peers.split(",")) - set(KINDS)
    if unknown:
        parser.error(f"no such peer: {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}")
    return args


def _chosen(only: str) -> list[Cell]:
    wanted = set(filter(None, only.split(",")))
    unknown = wanted - {cell.name for cell in CELLS} - {cell.group for cell in CELLS}
    if unknown:
        groups = ", ".join(dict.fromkeys(cell.group for cell in CELLS))
        cells = ", ".join(cell.name for cell in CELLS)
        sys.exit(f"no such cell: {', '.join(sorted(unknown))}\ngroups: {groups}\ncells: {cells}")
    if not wanted:
        return [cell for cell in CELLS if cell.group not in ON_DEMAND]
    return [cell for cell in CELLS if cell.name in wanted or cell.group in wanted]


def _run(args: argparse.Namespace, cells: Sequence[Cell]) -> dict[str, Any]:
    with Stage() as stage:
        company = Company(stage, args.peers.split(","), args.option)
        for name, package in company.absent.items():
            _say(f"left out, because it is not installed: {name} ({package})")
        if company.absent and args.require:
            raise LabError("not everything is installed that was required")
        with company:
            run = Run(company, cells, args.seconds)
            about = {"machine": _machine(), "settings": stage.settings(), "options": vars(args)}
            result = {**about, **run.result()}
            for number in range(args.rounds):
                run.round(number)
                result = {**about, **run.result()}
                if args.json:  # now: who interrupts the rest has the rounds so far
                    Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
        return result


def _remarks(result: dict[str, Any]) -> list[str]:
    """What a reader of the tables must know beside them."""
    lines = [""]
    left_out: dict[tuple[str, str], list[str]] = defaultdict(list)
    for cell, peers in result["unable"].items():
        for peer, why in peers.items():
            left_out[peer, why].append(cell)
    lines += [f"without {peer}: {', '.join(names)} ({why})" for (peer, why), names in left_out.items()]
    for failure in result["failures"]:
        lines.append("FAILED: {cell}, {peer}, round {round}: {why}".format(**failure))
    lines += [f"in the relay's log: {line}" for line in result["warnings"]]
    if result["noisy"]:
        lines.append(f"others used the machine during {result['noisy']} of the measurements: see strangers in the JSON")
    return lines


def _machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "model": model[0] if model else platform.machine(),
        "processors": len(os.sched_getaffinity(0)),
        "memory": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "kernel": platform.release(),
        "load": os.getloadavg(),
    }


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
