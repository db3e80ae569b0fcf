"""Make ``dynconv.kernels`` importable when ``dynconv`` is imported straight from a source tree.

The Triton kernels lie in ``kernels/``, beside ``dynconv/`` and not inside it. At top level that name belongs
to another project, so setup.py maps the folder to ``dynconv.kernels`` on installation. Whoever imports
``dynconv/`` as it lies in the tree (python started in the repository root, the root on ``PYTHONPATH``,
``pip install -e`` in compat mode) bypasses that mapping; this module supplies it, for that one name.

A finder, not an import: ``import dynconv`` must not need Triton. Not an entry in ``dynconv.__path__``: that
would expose setup.py as ``dynconv.setup``. Last in ``sys.meta_path``: an installed copy wins.
"""

import sys
from importlib.abc import MetaPathFinder
from importlib.util import spec_from_file_location
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
_KERNELS = _ROOT / "kernels" / "__init__.py"


class SourceTreeFinder(MetaPathFinder):
    """Finds ``dynconv.kernels`` in the source tree; its submodules are then found as usual."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != "dynconv.kernels":
            return None
        return spec_from_file_location(fullname, _KERNELS, submodule_search_locations=[str(_KERNELS.parent)])


# In site-packages `../kernels` is another project's: only our own project file marks a source tree.
if (_ROOT / "setup.py").is_file() and _KERNELS.is_file():
    sys.meta_path.append(SourceTreeFinder())
