"""Sphinx: MyST pages, the furo theme, the API from the docstrings. Warnings are errors (`make docs`)."""

from __future__ import annotations

from importlib import metadata

project = "vhostuser"
author = "The vhostuser authors"
project_copyright = "2026, the vhostuser authors"
release = metadata.version("vhostuser")

extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"vhostuser {release}"

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
default_role = "code"
