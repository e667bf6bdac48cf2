"""The fault table: runs every test that shows a row of it and prints what was done, the limit and what was seen.

    python tests/faults/table.py [--keep] [arguments of pytest]

Ends with 1 if a row does not hold. --keep writes docs/faults.csv, which the manual shows.
"""

import csv
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "docs" / "faults.csv"
HEAD = ("row", "what was done", "limit", "seen", "test")
KINDS = "LFHBS"

Entry = tuple[str, str, str, str, str]


def main(arguments: list[str]) -> int:
    """Run, print, keep."""
    keep = "--keep" in arguments
    found, code = run([argument for argument in arguments if argument != "--keep"])
    table = entries(found)
    for entry in table:
        print(" | ".join(entry))
    failed = sorted({part["number"] for part in found if not part["passed"]}, key=order)
    print(f"{len(table)} rows, {len(found)} tests", *(["NOT SHOWN:", *failed] if failed else []))
    if keep and not failed and code == 0:
        with KEPT.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([HEAD, *table])
    return code


def run(arguments: list[str]) -> tuple[list[dict[str, Any]], int]:
    """The rows as pytest wrote them, and its exit code."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        places = ["tests/unit", "tests/e2e", "tests/faults"]
        command = [sys.executable, "-m", "pytest", "-q", "-m", "row", "--rows", str(path), *(arguments or places)]
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        return (json.loads(path.read_text("utf-8")) if path.exists() else []), code


def entries(found: Iterable[dict[str, Any]]) -> list[Entry]:
    """A line for each row and thing done, with all that was seen of it."""
    together: dict[tuple[str, str, str], tuple[dict[str, None], dict[str, None]]] = {}
    for part in found:
        seen, tests = together.setdefault((part["number"], part["done"], part["limit"]), ({}, {}))
        seen.update(dict.fromkeys(part["seen"] if part["passed"] else ["NOT SHOWN"]))
        tests[re.sub(r"\[.*", "", part["test"])] = None
    lines = [(*key, "; ".join(seen), ", ".join(tests)) for key, (seen, tests) in together.items()]
    return sorted(lines, key=lambda line: order(line[0]))


def order(number: str) -> tuple[int, int]:
    """Load first, then peers, the host, input, security; then by number."""
    return KINDS.index(number[0]), int(number[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
