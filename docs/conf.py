"""Sphinx: `make docs` builds these pages into build/docs, without network; the theme brings all that it shows."""

from docutils import nodes
from sphinx.util.nodes import make_refnode

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
}
autodoc_inherit_docstrings = False
autodoc_class_signature = "mixed"
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_preprocess_types = False

# Between backticks stands code, in pages and in docstrings alike; what is the name of something documented becomes a
# link to it. tests/test_docs.py holds that every public name is there to link to.
default_role = "literal"
PREFIXES = ("", "dynconv.", "dynconv.nn.", "dynconv.gating.")


def link_names(app, doctree, docname):
    """Make a link of each name between backticks that has an entry in the API reference."""
    entries = app.env.domains.python_domain.objects
    for code in list(doctree.findall(nodes.literal)):
        name = next((prefix + code.astext() for prefix in PREFIXES if prefix + code.astext() in entries), None)
        if name and not isinstance(code.parent, nodes.reference):
            entry = entries[name]
            link = make_refnode(app.builder, docname, entry.docname, entry.node_id, code.deepcopy(), name)
            code.replace_self(link)


def leave_out(app, what, name, obj, skip, options):
    """Fields of a NamedTuple say only that they are fields; its docstring has them as attributes."""
    return True if (getattr(obj, "__doc__", None) or "").startswith("Alias for field number") else None


def setup(app):
    app.connect("doctree-resolved", link_names)
    app.connect("autodoc-skip-member", leave_out)
