"""What a dense block computes: the chain of convolutions and the shortcut, read from a trace of its own forward."""

from __future__ import annotations

import copy
import inspect
import linecache
import math
import operator
import random
import sys
import traceback
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from .dense import computes_as, is_frozen_norm


class Stage(NamedTuple):
    """A convolution, its normalisation and its activation: the paths of the two modules in the block, and a name."""

    conv: str
    norm: str | None
    activation: str | None


class Chain(NamedTuple):
    """What a block computes of its input: convolutions in order, then a shortcut that is added, then an activation.

    `shortcut` is "identity", the path of the submodule that makes it from the input, the paths of several that do so
    one after the other, or None.
    """

    stages: tuple[Stage, ...] = ()
    shortcut: str | tuple[str, ...] | None = None
    activation: str | None = None


class _Refusal(NamedTuple):
    """The first step towards a value that has no sparse form."""

    reason: str


ACTIVATION_MODULES = {
    nn.Identity: None,
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    nn.GELU: "gelu",
    nn.Hardswish: "hardswish",
}
_ACTIVATION_FUNCTIONS = {
    F.relu: "relu", torch.relu: "relu", torch.relu_: "relu", "relu": "relu", "relu_": "relu", F.relu6: "relu6",
    F.silu: "silu", F.gelu: "gelu", F.hardswish: "hardswish",
}  # fmt: skip
_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
_COPIES = ("contiguous", "clone", torch.clone)  # the same values
_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)
# Of a tensor, and not of its values.
_QUERIES = ("dim", "ndimension", "size", "numel", "stride", "is_contiguous", "shape", "ndim", "dtype", "device")
_NOT_THEIRS = (str(Path(torch.__file__).parent), __file__)  # files of PyTorch's, and this one


def recognise(module: nn.Module) -> Chain:
    """Read from a dense block's forward what it computes, in inference and in training alike.

    `module` is a copy that may be changed: it is traced, in both modes, with `torch.fx`. Its parts may have any names.
    Control flow on attributes is followed.

    Raises ValueError that names the first step that has no sparse form, and where in the code it is.
    """
    chains = []
    for training in (False, True):
        module.train(training)
        chains.append(_Reader(module, "in training " if training else "").read())
    if chains[0] != chains[1]:
        raise _error(f"{type(module).__name__}, which computes something else in training: {chains[1]}")
    return chains[0]


def stand_in(module: nn.Module) -> nn.Module:
    """Copy a block, with random float64 values on the CPU for its tensors and without its hooks.

    Random values tell blocks apart that the initial ones do not, such as zeros in the last normalisation, and exist for
    tensors on the meta device too. The generator is of its own: nobody's random numbers change.
    """
    generator = torch.Generator().manual_seed(0)

    def values_for(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu")
        if tensor.dim() < 2:  # scales, shifts and variances: positive
            return torch.rand(tensor.shape, dtype=torch.float64, device="cpu", generator=generator) + 0.5
        values = torch.randn(tensor.shape, dtype=torch.float64, device="cpu", generator=generator)
        return values / max(math.prod(tensor.shape[1:]), 1) ** 0.5

    memo = {}
    for part in module.modules():
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            memo[id(getattr(part, hooks))] = OrderedDict()
        if getattr(part, "process_group", None) is not None:  # of SyncBatchNorm: it cannot be copied
            memo[id(part.process_group)] = part.process_group
        for tensor in (*part._parameters.values(), *part._buffers.values(), *vars(part).values()):
            if isinstance(tensor, Tensor) and id(tensor) not in memo:
                value = values_for(tensor)
                memo[id(tensor)] = nn.Parameter(value) if isinstance(tensor, nn.Parameter) else value
    return copy.deepcopy(module, memo)


def _random_states() -> tuple[bytes, tuple, tuple]:
    """The states of the generators that a forward may draw from: PyTorch's, Python's and NumPy's."""
    kind, words, *rest = np.random.get_state()
    return bytes(torch.get_rng_state().numpy()), random.getstate(), (kind, words.tolist(), *rest)


def _error(got: str) -> ValueError:
    return ValueError(
        "module: expected a chain of convolutions, each with its batch normalisation and activation, and at most one "
        f"shortcut around it; got {got}"
    )


class _Tracer(fx.Tracer):
    """Records which module calls make which values; a module that cannot be traced is one step of the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, fx.Node, fx.Node]] = []  # of one input each: path, input, output
        self.failures: dict[str, Exception] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, _BatchNorm):
            return any(computes_as(m, kind) for kind in (nn.BatchNorm2d, nn.SyncBatchNorm))
        return isinstance(m, nn.Conv2d) or is_frozen_norm(m) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward, args: tuple, kwargs: dict):
        if not any(isinstance(value, fx.Proxy) for value in (*args, *kwargs.values())):
            return forward(*args, **kwargs)
        path, nodes, calls = self.path_of_module(m), len(self.graph.nodes), len(self.calls)
        stack = self.module_stack.copy()
        try:
            result = super().call_module(m, m.forward, args, kwargs)
            if is_frozen_norm(m):  # the activation that timm's keeps inside comes behind
                for child in m.children():
                    result = child(result)
        except Exception as error:
            self.failures[path], self.module_stack = error, stack
            del self.calls[calls:]
            for node in list(self.graph.nodes)[: nodes - 1 : -1]:
                self.graph.erase_node(node)
            result = self.create_proxy("call_module", path, args, kwargs)
        if len(args) == 1 and not kwargs and isinstance(result, fx.Proxy):
            self.calls.append((path, args[0].node, result.node))
        return result

    def create_proxy(self, kind: str, target, args: tuple, kwargs: dict, *rest, **options):
        if kind == "call_method" and target in ("dim", "ndimension"):
            return 4  # features have no other number of dimensions where a chain of convolutions can be recognised
        library = inspect.isfunction(target) and target.__module__.partition(".")[0]
        if kind == "call_function" and library and library != "torch":
            return target(*args, **kwargs)  # a library's `fx.wrap`: what is inside decides
        proxy, frame = super().create_proxy(kind, target, args, kwargs, *rest, **options), sys._getframe(1)
        while frame is not None and frame.f_code.co_filename.startswith(_NOT_THEIRS):
            frame = frame.f_back
        if frame is not None:
            proxy.node.meta["line of code"] = (frame.f_code.co_filename, frame.f_lineno)
        return proxy


class _Reader:
    """Follows the values of a traced block from its input to its output."""

    def __init__(self, module: nn.Module, mode: str) -> None:
        self.module, self.mode, self.tracer = module, mode, _Tracer()
        self.values: dict[fx.Node, Chain | _Refusal | None] = {}  # None: not made from the input
        self.depth: dict[fx.Node, int] = {}  # the most convolutions between the input and a node
        self.same: dict[fx.Node, fx.Node] = {}  # nodes that pass on the value of another
        self.unused: list[fx.Node] = []  # nodes that may change what other nodes read, and do not lead to the output

    def read(self) -> Chain:
        graph = self._trace()
        output, reached = next(node for node in graph.nodes if node.op == "output"), set()
        waiting = list(output.all_input_nodes)
        while waiting:
            node = waiting.pop()
            if node not in reached:
                reached.add(node)
                waiting += node.all_input_nodes
        for node in graph.nodes:
            if node is not output:
                self._visit(node, node in reached)
        made = output.args[0]
        chain = self.values[made] if isinstance(made, fx.Node) else _Refusal("more than one output tensor")
        if isinstance(chain, _Refusal):
            raise _error(f"{self.mode}{chain.reason}")
        if chain is None or not chain.stages:
            raise _error(f"{self.mode}{type(self.module).__name__}, without a convolution")
        if self.unused:
            raise _error(f"{self.mode}{self._named(self.unused[0])}, whose result is not used")
        return chain

    def _trace(self) -> fx.Graph:
        parameters = list(inspect.signature(self.module.forward).parameters.values())[1:]
        defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
        name, before = type(self.module).__name__, _random_states()
        try:
            graph = self.tracer.trace(self.module, defaults or None)
        except Exception as error:
            raise _error(f"{self.mode}{_failure(name, error)}") from error
        finally:
            drawn = before != _random_states()
            torch.set_rng_state(torch.frombuffer(bytearray(before[0]), dtype=torch.uint8))
            random.setstate(before[1])
            np.random.set_state(before[2])
        if drawn:  # and perhaps taken another way than it would the next time
            raise _error(f"{self.mode}{name}, which draws random numbers that do not depend on its input")
        return graph

    def _visit(self, node: fx.Node, reached: bool) -> None:
        inputs = node.all_input_nodes
        self.depth[node] = max((self.depth[i] for i in inputs), default=0)
        if node.op == "placeholder":
            first = not any(value == Chain() for value in self.values.values())
            self.values[node] = Chain() if first else None
        elif all(self.values[i] is None for i in inputs) or self._queries(node):
            self.values[node] = None
        else:
            self.values[node] = self._step(node)
        if node.op == "call_module" and node.target:
            parts = self.module.get_submodule(node.target).modules()
            self.depth[node] += sum(isinstance(part, nn.modules.conv._ConvNd) for part in parts)
        if not reached and self.values[node] is not None and self._acts_in_place(node):
            self.unused.append(node)

    def _queries(self, node: fx.Node) -> bool:
        name = node.args[1] if node.target is getattr else node.target
        return name in _QUERIES and node.op in ("call_function", "call_method")

    def _acts_in_place(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return type(self.module.get_submodule(node.target)) is not nn.Identity
        name = node.target if isinstance(node.target, str) else node.target.__name__
        written = (operator.setitem, operator.iadd, operator.imul, operator.isub, operator.itruediv)
        return name.endswith("_") or node.kwargs.get("inplace", False) or node.target in written

    def _step(self, node: fx.Node) -> Chain | _Refusal:
        if node.target in _ADDITIONS and node.op != "call_module":
            return self._add(node)
        values = [self.values[i] for i in node.all_input_nodes]
        refused = next((value for value in values if isinstance(value, _Refusal)), None)
        if refused is not None:
            return refused
        chains = [value for value in values if value is not None]
        if len(chains) > 1 or not node.args or self.values.get(node.args[0]) is None:
            return self._refuse(node)
        if node.op == "call_module":
            return self._apply(node, chains[0])
        if node.target in _ACTIVATION_FUNCTIONS:
            options = {key: value for key, value in node.kwargs.items() if key != "inplace"}
            exact = options in ({}, {"approximate": "none"}) and all(isinstance(a, bool) for a in node.args[1:])
            return self._activate(node, chains[0], _ACTIVATION_FUNCTIONS[node.target]) if exact else self._refuse(node)
        if node.target is F.batch_norm:
            path = self._norm_of(node)
            return self._refuse(node) if path is None else self._normalise(node, chains[0], path)
        if node.target in _DROPOUTS:
            options = inspect.signature(node.target).bind(*node.args, **node.kwargs)
            options.apply_defaults()
            if options.arguments["training"] and options.arguments["p"] > 0:
                return self._refuse(node)
        elif node.target not in _COPIES:
            return self._refuse(node)
        self.same[node] = node.args[0]
        return chains[0]

    def _apply(self, node: fx.Node, chain: Chain) -> Chain | _Refusal:
        """Append what the leaf module of a node computes."""
        module = self.module.get_submodule(node.target)
        if node.target in self.tracer.failures:
            return _Refusal(self._named(node))
        if isinstance(module, nn.Conv2d):
            if not computes_as(module, nn.Conv2d):
                return self._refuse(node, "whose forward is its own")
            if module.padding_mode != "zeros":
                return self._refuse(node, f"whose padding_mode is {module.padding_mode!r}, not 'zeros'")
            if chain.shortcut is not None:
                return self._refuse(node, "a convolution behind the shortcut's addition")
            return chain._replace(stages=(*chain.stages, Stage(node.target, None, None)))
        if isinstance(module, _BatchNorm) or is_frozen_norm(module):
            return self._normalise(node, chain, node.target)
        if isinstance(module, _DropoutNd):
            if module.p > 0 and module.training:
                return self._refuse(node)
        elif type(module) not in ACTIVATION_MODULES or getattr(module, "approximate", "none") != "none":
            return self._refuse(node)
        elif ACTIVATION_MODULES[type(module)] is not None:
            return self._activate(node, chain, ACTIVATION_MODULES[type(module)])
        self.same[node] = node.args[0]
        return chain

    def _normalise(self, node: fx.Node, chain: Chain, path: str) -> Chain | _Refusal:
        last = chain.stages[-1] if chain.stages else None
        if last is None or chain.shortcut is not None or last.norm is not None or last.activation is not None:
            return self._refuse(node, "a normalisation that does not come right behind a convolution")
        return chain._replace(stages=(*chain.stages[:-1], last._replace(norm=path)))

    def _norm_of(self, node: fx.Node) -> str | None:
        """Find the module whose statistics and parameters a call of `F.batch_norm` takes: all of one, or none."""
        call = inspect.signature(F.batch_norm).bind(*node.args, **node.kwargs)
        call.apply_defaults()
        given = call.arguments
        names = ("weight", "bias", "running_mean", "running_var")
        paths = {name: given[name].target if isinstance(given[name], fx.Node) else given[name] for name in names}
        owner = next((str(path).rpartition(".")[0] for path in paths.values() if path is not None), None)
        norm = None if owner is None else self.module.get_submodule(owner)
        if not isinstance(norm, nn.BatchNorm2d):
            return None
        batch = norm.training or norm.running_mean is None
        prefix = f"{owner}." if owner else ""
        expected = {name: None if getattr(norm, name) is None else f"{prefix}{name}" for name in names}
        agrees = paths == expected and given["training"] == batch and given["eps"] == norm.eps
        if batch and norm.momentum is not None:
            agrees = agrees and given["momentum"] == norm.momentum
        return owner if agrees and owner else None

    def _activate(self, node: fx.Node, chain: Chain, activation: str) -> Chain | _Refusal:
        if chain.shortcut is not None:
            free = chain.activation is None
            return chain._replace(activation=activation) if free else self._refuse(node, "a second activation")
        if not chain.stages:
            return self._refuse(node, "an activation of the block's input")
        if chain.stages[-1].activation is not None:
            return self._refuse(node, "a second activation")
        return chain._replace(stages=(*chain.stages[:-1], chain.stages[-1]._replace(activation=activation)))

    def _add(self, node: fx.Node) -> Chain | _Refusal:
        """Add the shortcut. The branch is the side with more convolutions, which a mask skips."""
        if len(node.args) != 2 or not all(isinstance(side, fx.Node) for side in node.args):
            refused = [self.values[i] for i in node.all_input_nodes if isinstance(self.values[i], _Refusal)]
            return refused[0] if refused else self._refuse(node)
        if node.kwargs.get("alpha", 1) != 1:
            return self._refuse(node)
        side, branch = sorted(node.args, key=lambda part: self.depth[part])
        chain, alike = self.values[branch], self.depth[branch] == self.depth[side]
        if isinstance(chain, _Refusal):
            return chain
        if alike and isinstance(self.values[side], _Refusal):
            return self.values[side]
        if chain is None or self.values[side] is None:
            return self._refuse(node, "which adds what is not made from the input")
        if alike:
            return self._refuse(node, "two branches of as many convolutions, of which neither is the shortcut")
        if chain.shortcut is not None:
            return self._refuse(node, "a second addition")
        paths = self._paths(side)
        if paths is None:
            made = self.values[side]
            return made if isinstance(made, _Refusal) else self._refuse(node, "whose shortcut no submodule makes")
        own = [path for stage in chain.stages for path in (stage.conv, stage.norm) if path is not None]
        if any(f"{path}.".startswith(f"{start}.") for path in own for start in paths):
            return self._refuse(node, "whose shortcut shares a convolution with the branch")
        return chain._replace(shortcut={0: "identity", 1: "".join(paths)}.get(len(paths), paths))

    def _paths(self, node: fx.Node) -> tuple[str, ...] | None:
        """Find the submodules that, one after the other, make a value from the block's input."""
        if self.values[node] == Chain():
            return ()
        for path, source, result in reversed(self.tracer.calls):  # the outermost first
            if result is node and source is not node:
                before = self._paths(source)
                if before is not None:
                    return (*before, path)
        return self._paths(self.same[node]) if node in self.same else None

    def _refuse(self, node: fx.Node, why: str = "which has no sparse form") -> _Refusal:
        return _Refusal(f"{self._named(node)}, {why}")

    def _named(self, node: fx.Node) -> str:
        """Say what a node is and where in the block's code it stands."""
        if node.op == "call_module":
            module = self.module.get_submodule(node.target)
            if node.target in self.tracer.failures:
                return _failure(f"`{node.target}` ({type(module).__name__})", self.tracer.failures[node.target])
            what = repr(module)
            what = f"`{node.target}` ({type(module).__name__ if len(what) > 80 else what})"
        else:
            name = node.target if isinstance(node.target, str) else node.target.__name__
            inside = list(node.meta.get("nn_module_stack", {}).values())
            what = f"`{name}`" + "".join(f" in `{path}` ({kind.__name__})" for path, kind in inside[-1:])
        return what + _place(*node.meta["line of code"]) if "line of code" in node.meta else what


def _failure(what: str, error: Exception) -> str:
    """Say where a trace has ended and why."""
    frames = [(file, line) for file, line, *_ in traceback.extract_tb(error.__traceback__)]
    theirs = [frame for frame in frames if not frame[0].startswith(_NOT_THEIRS)]
    place = _place(*theirs[-1]) if theirs else ""
    reason = str(error).strip().split("\n")[0]
    if isinstance(error, fx.proxy.TraceError):
        reason = "its control flow depends on values"
    return f"{what}{place}, which cannot be traced ({reason})"


def _place(file: str, line: int) -> str:
    return f" at {Path(file).name}:{line} `{linecache.getline(file, line).strip()}`"
