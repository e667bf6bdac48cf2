"""A throw-away network of three hosts, client - relay - server, on this machine, for the demo and the tests.

    with Lab() as lab, lab.relay_process("--preserve-source", "address"):
        lab.intercept(preserve_source=True)
        listener = lab.server.listen(8080)
        client = lab.client.connect(lab.server.ipv4, 8080)    # goes through the relay

It needs util-linux, iproute2 and nftables, and root or permission to make user namespaces; otherwise
entering the `with` raises LabError, whose text says what to do.
"""

from tproxy_relay.lab.host import Host
from tproxy_relay.lab.needs import LabError
from tproxy_relay.lab.network import Lab, Topology
from tproxy_relay.lab.relay_process import Line, RelayProcess

__all__ = ["Host", "Lab", "LabError", "Line", "RelayProcess", "Topology"]
