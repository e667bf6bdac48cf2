"""One source for the HTML manual and the man page: sphinx-build -b html|man docs OUT."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tproxy_relay import __version__  # noqa: E402

project = "tproxy-relay"
author = "the tproxy-relay contributors"
project_copyright = f"2026, {author}"
version = release = __version__

exclude_patterns = ["_build"]
html_theme = "alabaster"
html_theme_options = {"description": "A transparent TCP relay for Linux"}

# (source, name, description, authors, section)
man_pages = [("index", "tproxy-relay", "transparent TCP relay for Linux", [author], 8)]
