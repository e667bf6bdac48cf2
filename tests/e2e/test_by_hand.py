"""The commands on the page "A first interception by hand", run as they stand there."""

import re
import socket
import textwrap
from pathlib import Path

from tproxy_relay.lab import Lab

PAGE = Path(__file__).parents[2] / "docs" / "by-hand.rst"
PORT = 8080


def commands(name: str) -> str:
    """One code block of the page, for this lab's interface."""
    block = re.search(rf":name: {name}\n\n((?:   .*\n|\n)+)", PAGE.read_text())
    assert block, name
    return textwrap.dedent(block.group(1)).replace("eth0", "rc")


def test_the_recipe_intercepts_and_its_undoing_leaves_nothing(lab: Lab) -> None:
    looks = (["nft", "list", "ruleset"], ["ip", "rule"], ["ip", "-6", "rule"], ["ip", "route", "show", "table", "all"])
    before = [lab.relay.run(look).stdout for look in looks]
    with lab.relay_process() as relay:
        lab.relay.run(["sh", "-e"], input=commands("apply"))
        for server in (lab.server.ipv4, lab.server.ipv6):
            with lab.server.listen(PORT, socket.AF_INET6 if ":" in server else socket.AF_INET) as listener:
                listener.settimeout(5)
                client = lab.client.connect(server, PORT)
                accepted, _ = listener.accept()
                accepted.sendall(b"welcome")
                assert client.recv(100) == b"welcome"
                accepted.close()
                assert client.recv(1) == b""
                port = client.getsockname()[1]
                client.close()
                record = relay.wait_for_record(lambda line, port=port: line["client"].endswith(f":{port}"))
                assert record["outcome"] == "completed"
        relay.stop()
    lab.relay.run(["sh", "-e"], input=commands("undo"))
    assert [lab.relay.run(look).stdout for look in looks] == before
