"""The answer of a command on standard output."""

import json
import sys
from collections.abc import Iterable, Mapping
from typing import Any


def answer(document: Mapping[str, Any], lines: Iterable[str], as_json: bool) -> None:
    """Print the document as JSON, or the lines that say the same for people. Never fails for a reader that has seen
    enough (`| head`): nothing is printed after that."""
    text = json.dumps(document) if as_json else "\n".join(lines)
    try:
        print(text, flush=True)
    except BrokenPipeError:
        sys.stdout = None
