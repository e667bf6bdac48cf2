"""One source for the HTML manual and the man pages: sphinx-build -b html|man docs OUT."""

import sys
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

sys.path.insert(0, str(Path(__file__).parents[1]))

from tproxy_relay import __version__  # noqa: E402
from tproxy_relay.config import manual  # noqa: E402

project = "tproxy-relay"
author = "the tproxy-relay contributors"
project_copyright = f"2026, {author}"
version = release = __version__

exclude_patterns = ["_build"]
html_theme = "alabaster"
html_static_path = ["_static"]
html_css_files = ["manual.css"]
html_theme_options = {"description": "A transparent TCP relay for Linux"}

# (source, name, description, authors, section)
man_pages = [
    ("command", "tproxy-relay", "transparent TCP relay for Linux", [], 8),
    ("configuration", "tproxy-relay.conf", "settings of tproxy-relay", [], 5),
]


class Part(SphinxDirective):
    """``.. part:: NAME``: what tproxy_relay.config.manual makes from the table of options."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        self.state_machine.insert_input(manual.PARTS[name]().splitlines(), f"part {name}")
        return []


def setup(app: Sphinx) -> None:
    app.add_directive("part", Part)
