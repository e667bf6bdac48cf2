"""``python -m tproxy_relay`` is the same as the ``tproxy-relay`` command."""

import sys

from tproxy_relay.cli import main

if __name__ == "__main__":
    sys.exit(main.main())
