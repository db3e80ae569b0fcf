"""Sphinx: `make docs` builds these pages into build/docs, without network; the theme brings all that it shows."""

import re

from docutils import nodes
from sphinx.roles import XRefRole

import dynconv

project = "dynconv"
version = release = dynconv.__version__
author = "dynconv contributors"
copyright = "dynconv contributors, Apache-2.0"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3  # links to a heading are checked as well

html_theme = "furo"
html_title = f"dynconv {release}"
html_copy_source = False
html_show_sphinx = False

autodoc_default_options = {
    "members": True,
    "member-order": "bysource",
    "exclude-members": "stands_for",
    "no-value": True,
}
autodoc_inherit_docstrings = False
autodoc_class_signature = "mixed"
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_preprocess_types = False

# Signatures name types by their imports, and docstrings put expressions between backticks: what looks like a name of
# dynconv links to it, and everything else is code. tests/test_docs.py holds that every public name is there to link to.
default_role = "code_or_link"
_NAME = re.compile(r"~?(dynconv\.)?[A-Za-z_][\w.]*")


class CodeOrLink(XRefRole):
    """A link where the text is the name of something documented, and code otherwise."""

    def run(self):
        if _NAME.fullmatch(self.text):
            self.name, self.refdomain, self.reftype = "py:obj", "py", "obj"
            self.classes = ["xref", "py", "py-obj"]
            return self.create_xref_node()
        return [nodes.literal(self.rawtext, self.text)], []


def _is_left_out(app, what, name, obj, skip, options):
    """Fields of a NamedTuple say only that they are fields; its docstring has them as attributes."""
    return True if (getattr(obj, "__doc__", None) or "").startswith("Alias for field number") else None


def setup(app):
    app.add_role("code_or_link", CodeOrLink())
    app.connect("autodoc-skip-member", _is_left_out)
