"""FLOP formulas of the ops, handed to PyTorch's counter when somebody imports that.

`torch.utils.flop_counter` imports Triton, which takes longer than the rest of `import dynconv`. The counter copies its
table of formulas when it is made, so the formulas have to be in it by then: they go in as soon as its module has run.
"""

import itertools
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder

_COUNTER = "torch.utils.flop_counter"
_formulas: list[tuple[object, bool, Callable]] = []


class _CounterFinder(MetaPathFinder):
    """Finds PyTorch's counter where the other finders do, and hands it the formulas once its module has run."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != _COUNTER:
            return None
        # Those behind it, so that two of its kind, as after a reload, do not ask each other for ever.
        behind = itertools.islice(itertools.dropwhile(lambda finder: finder is not self, sys.meta_path), 1, None)
        specs = (finder.find_spec(fullname, path, target) for finder in behind if hasattr(finder, "find_spec"))
        spec = next(filter(None, specs), None)
        if spec is not None:
            run = spec.loader.exec_module

            def run_and_register(module):
                run(module)
                if module.__name__ != _COUNTER:  # a loader of many modules, such as that of a zip file
                    return
                for op, get_raw, formula in _formulas:
                    module.register_flop_formula(op, get_raw)(formula)

            spec.loader.exec_module = run_and_register
        return spec


def register_flop_formula(op, get_raw: bool = False) -> Callable[[Callable], Callable]:
    """Decorate an op's FLOP formula, as PyTorch's function of this name does, without importing its module."""

    def register(formula: Callable) -> Callable:
        _formulas.append((op, get_raw, formula))
        if _COUNTER in sys.modules:
            sys.modules[_COUNTER].register_flop_formula(op, get_raw)(formula)
        return formula

    return register


sys.meta_path.insert(0, _CounterFinder())
