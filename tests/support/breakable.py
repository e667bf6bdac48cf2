"""A relay whose workers cannot boot, or take their time, once a test says so; and whether a relay listens."""

import os
from pathlib import Path

import children
import loopback

BROKEN = """
import os, sys, time
def is_there(name):
    return os.path.exists(os.path.join(os.path.dirname(__file__), name))
if "tproxy_relay.worker" in sys.orig_argv:
    while is_there("held"):
        time.sleep(0.01)
    if is_there("broken"):
        print("no use", file=sys.stderr, flush=True)
        os._exit(3)
"""


def breakable(folder: Path) -> tuple[str, ...]:
    """A command that becomes a relay whose workers cannot start once the file `broken` is in that folder, and do not
    while the file `held` is."""
    (folder / "sitecustomize.py").write_text(BROKEN, encoding="utf-8")  # site: loaded by each Python that finds it
    path = os.pathsep.join((str(folder), str(children.ROOT)))
    return ("env", f"PYTHONPATH={path}")


def accepts(port: int) -> bool:
    """The connection ends at once on both sides: half closed, it would outlive a drain."""
    try:
        loopback.reset(loopback.dial(("127.0.0.1", port)))
    except ConnectionRefusedError:
        return False
    return True
