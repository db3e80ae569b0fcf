"""What the residual blocks share: the chain of convolutions, its shortcut, and where a dense block has them."""

from __future__ import annotations

import functools
import operator
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from .._arguments import kind_of
from .._backend import backend, is_capturing, is_transformed, module, unwatched
from .._geometry import Geometry
from ..ops._common import is_autocast
from ..reference import ACTIVATIONS
from ..sites import ActiveSites
from .dense import HOOKS, computes_as, has_hooks, hook_of, is_frozen_norm
from .normalization import uses_batch_statistics
from .recognition import Chain, Stage, recognise, stand_in


class Frozen:
    """What a block in inference keeps: what `_prepare` made of its stages, and the calls that have used it."""

    def __init__(self, key: tuple, layers: list, held: list[Tensor] | None) -> None:
        self.key, self.layers, self.held = key, layers, held
        self.passed: tuple = ()


class Unchanged:
    """Whether all that a block in inference is made of, but the shortcut, is as it was: in few calls that loop in C.

    These are its layers, their settings, hooks and tensors, and what tells of the tensors' values what `_state` tells.
    """

    def __init__(self, block: ResidualBlock) -> None:
        self.children, self.is_known = block._modules, True
        self.owners: list[dict] = []
        self.names: list[str] = []
        for names, _ in block._kinds:
            layer = block
            for name in names:
                self._watch(layer._modules, name)
                layer = layer._modules[name]
        named = block.named_modules(remove_duplicate=False)
        self.layers = [layer for path, layer in named if path and not block._is_of_shortcut(path)]
        for layer in self.layers:
            self._watch(layer.__dict__, *HOOKS)
        operands = []
        for stage in block.stages:
            conv, norm = block._submodule(stage.conv), block._norm(stage)
            operands += _operands(conv, norm)
            self._read(conv, "weight", "bias", "stride", "padding", "dilation", "groups", "padding_mode")
            if norm is not None:
                operands.append(norm._buffers.get("num_batches_tracked"))
                self._watch(norm._buffers, "num_batches_tracked")
                self._read(norm, "weight", "bias", "running_mean", "running_var", "eps", "training")
        self.values = [*map(dict.get, self.owners, self.names)]
        self.hooks = [getattr(layer, name) for layer in self.layers for name in HOOKS]
        self.kinds = [*map(type, self.layers)]
        self.tensors = [*{id(t): t for t in operands if t is not None}.values()]
        self.addresses = [*map(Tensor.data_ptr, self.tensors)]
        counts = block._counts_writes(self.tensors)
        self.state_of = _versions if counts else module(".cpu.fingerprint").fingerprint
        self.state = self.state_of(self.tensors)

    def _watch(self, owner: dict, *names: str) -> None:
        self.owners += [owner] * len(names)
        self.names += names

    def _read(self, layer: nn.Module, *names: str) -> None:
        """Watch attributes where they lie; none is known that is computed when it is read, or changes in itself."""
        self._watch(layer.__dict__, "_parameters", "_buffers", "forward")
        for name in names:
            value = None
            for place in (layer.__dict__, layer._parameters, layer._buffers):
                self._watch(place, name)
                if name in place:
                    value = place[name]
                    break
            self.is_known &= getattr(layer, name, None) is value and not isinstance(value, list)

    def holds(self, block: ResidualBlock) -> bool:
        """Whether nothing is another one. Types, sizes and strides of the `tensors` are left to a `Likeness`."""
        return (
            block._modules is self.children
            and all(map(operator.is_, map(dict.get, self.owners, self.names), self.values))
            and [*map(type, self.layers)] == self.kinds
            and not any(self.hooks)
            and [*map(Tensor.data_ptr, self.tensors)] == self.addresses
            and self.state_of(self.tensors) == self.state
        )


def _versions(tensors: list[Tensor]) -> list[int]:
    return [*map(operator.attrgetter("_version"), tensors)]


class ResidualBlock(nn.Module):
    """A chain of convolutions with a shortcut, over the children of the dense block.

    Args:
        chain: the convolutions in order, the shortcut around them and the activation behind it.
        statistics: of batch normalisation in training: "active", of what is computed, or "dense", of everything.
    """

    kind = "block"
    _convolutions: int | None = None  # as many as a block of this kind has; None: any number

    def __init__(self, chain: Chain, statistics: str) -> None:
        super().__init__()
        if statistics not in ("active", "dense"):
            raise ValueError(f"statistics: expected 'active' or 'dense', got {statistics!r}")
        # Names that no child of a dense block has: `shortcut` and `activation` are common ones.
        self.stages, self.shortcut_path, self.last_activation = tuple(chain.stages), chain.shortcut, chain.activation
        self.statistics = statistics
        self._kinds: list[tuple[list[str], type[nn.Module]]] = []
        self._is_prepared = False
        self._kept: Frozen | None = None

    def _prepare(self, stage: Stage, conv: nn.Conv2d, norm: nn.BatchNorm2d | None, used: str):
        """What inference on the backend `used` keeps of a stage."""
        raise RuntimeError(f"{type(self).__name__} does not say what to keep of a stage")

    def _frozen(self, input: Tensor, used: str) -> list | None:
        """In inference, what `_prepare` makes of each stage, which is kept until a parameter or a statistic changes.

        None where a gradient, of the shortcut's layers as well, a tangent, autocast, a compiler, another device or the
        batch's own statistics stand against it.
        """
        if torch.compiler.is_compiling() or input.is_meta or is_transformed():
            return None
        if is_autocast(input.device.type) or needs_grad(input):
            return None
        modules, operands = self._parts(), []
        for conv, norm in modules:
            if conv.weight.dtype != input.dtype or (norm is not None and uses_batch_statistics(norm)):
                return None
            operands += _operands(conv, norm)
        if any(t is not None and t.device != input.device for t in operands):
            return None
        if torch.is_grad_enabled() and needs_grad(*operands, *self._shortcut_parameters()):
            return None
        key, before = self._key(modules, used), self._kept  # read once: another thread may replace it at any time
        if key is not None and before is not None and before.key == key:
            return before.layers
        with torch.no_grad():
            layers = [
                self._prepare(stage, conv, norm, used) for stage, (conv, norm) in zip(self.stages, modules, strict=True)
            ]
        # What is made within a mode, of fake tensors, is no good outside; nor is what only a graph's replay computes.
        if torch._C._len_torch_dispatch_stack() or is_capturing():
            return layers
        # What is compared by its address is held, so that no other tensor can come to lie there.
        held = [t.detach() for t in operands if t is not None] if self._is_prepared else None
        self._kept = None if key is None else Frozen(key, layers, held)
        return layers

    def _parts(self) -> list[tuple[nn.Conv2d, nn.BatchNorm2d | None]]:
        """Each stage's convolution and normalisation."""
        return [(self._submodule(stage.conv), self._norm(stage)) for stage in self.stages]

    def _key(self, parts: list[tuple[nn.Conv2d, nn.BatchNorm2d | None]], used: str) -> tuple | None:
        """What changes when what `_prepare` makes of the stages does; None where that cannot be told."""
        operands, counters, settings = [], [], [used]
        for conv, norm in parts:
            operands += _operands(conv, norm)
            counters.append(getattr(norm, "num_batches_tracked", None))
            where = (conv.stride, conv.padding, conv.dilation)
            settings += (conv, *(tuple(v) if isinstance(v, list) else v for v in where), conv.groups)
            settings += (norm, None if norm is None else norm.eps)
        state = self._state(operands, counters, used)
        return None if state is None else (settings, state)

    def _state(self, operands: list[Tensor | None], counters: list[Tensor | None], used: str):
        """What changes when an operand does; None where that cannot be told, or not without waiting for the device.

        Versions alone are not enough: `Tensor.data`, NumPy, fused optimizers and batch normalisation itself write past
        them. So the values are compared, but in a block that `prepare` has been told about.
        """
        tensors = [t for t in operands if t is not None]
        is_plain = all(type(t) in (Tensor, nn.Parameter) for t in tensors)
        if not is_plain or torch._C._functorch.peek_interpreter_stack() is not None:
            return None
        # The address, as what is kept of a convolution without a normalisation may be its very parameters.
        layout = [None if t is None else (t.dtype, t.shape, t.stride(), t.data_ptr()) for t in operands]
        if self._counts_writes(tensors):
            # Batch normalisation writes its statistics past their versions, and then counts the batch.
            tensors += [t for t in counters if t is not None]
            return layout, [(t.data_ptr(), t._version) for t in tensors]
        return (layout, module(".cpu.fingerprint").fingerprint(tensors)) if used == "cpu" else None

    def _counts_writes(self, tensors: list[Tensor]) -> bool:
        """Whether versions tell of writes: in a prepared block, of tensors that have one."""
        return self._is_prepared and not any(map(Tensor.is_inference, tensors))

    def train(self, mode: bool = True) -> ResidualBlock:
        """Set the mode as `nn.Module.train` does; training ends what `dynconv.prepare` began."""
        if mode:
            self._is_prepared, self._kept = False, None
        return super().train(mode)

    def _apply(self, *arguments, **options) -> ResidualBlock:
        self._kept = None
        return super()._apply(*arguments, **options)

    def _sites(self, mask: Tensor | ActiveSites, input: Tensor, size: tuple[int, int]) -> ActiveSites:
        """The active sites of a mask, which must be those of an output of `size`: every way of a block trusts them."""
        shape = (input.shape[0], *size)
        if isinstance(mask, ActiveSites):
            sites = mask
        else:
            borrows = not torch.is_grad_enabled() and unwatched(input)
            sites = ActiveSites._borrowed(mask, shape) if borrows else ActiveSites(mask, shape)
        if tuple(sites.shape) != shape:
            raise ValueError(f"mask: expected sites of {list(shape)} (N, Ho, Wo), got {list(sites.shape)}")
        if sites.mask.device != input.device:
            raise ValueError(f"mask: expected a mask on {input.device}, where the input is, got {sites.mask.device}")
        return sites

    def _computed(self, sites: ActiveSites, sizes: list, geometries: list[Geometry]) -> list[ActiveSites]:
        """The sites that each stage computes: the last one `sites`, the others what the next one reads.

        `sizes`: (H, W) of the input and of each stage's output.
        """
        computed = [sites]
        for size, geometry in zip(sizes[-2:0:-1], geometries[:0:-1], strict=True):
            later = computed[0]
            pointwise = geometry.kernel == geometry.stride == (1, 1) and later.shape[1:] == size
            computed.insert(0, later.ungated if pointwise else later._touched_by(size, geometry))
        return computed

    def _submodule(self, path: str) -> nn.Module:
        module = self
        for name in path.split("."):
            module = module._modules[name]
        return module

    def _norm(self, stage: Stage) -> nn.BatchNorm2d | None:
        return None if stage.norm is None else self._submodule(stage.norm)

    def _uses_batch_statistics(self, stage: Stage) -> bool:
        norm = self._norm(stage)
        return norm is not None and uses_batch_statistics(norm)

    def _dense(self, input: Tensor) -> Tensor:
        shortcut = None if self.shortcut_path is None else self._dense_shortcut(input)
        branch = self._dense_branch(input)
        return branch if shortcut is None else ACTIVATIONS[self.last_activation](branch + shortcut)

    def _dense_branch(self, input: Tensor) -> Tensor:
        """All stages at all sites. In the last one the activation waits for the shortcut, if there is one."""
        for stage in self.stages:
            conv, norm = self._submodule(stage.conv), self._norm(stage)
            input = conv(input) if has_hooks(conv) else nn.Conv2d.forward(conv, input)
            if norm is not None:
                input = norm(input) if has_hooks(norm) else normalise(norm, input)
            input = ACTIVATIONS[stage.activation](input)
        return input

    def _dense_shortcut(self, input: Tensor) -> Tensor:
        for path in self._shortcut_paths():
            input = self._submodule(path)(input)
        return input

    def _shortcut_paths(self) -> tuple[str, ...]:
        """The modules that make the shortcut from the input, one after the other; none where it is the input."""
        if self.shortcut_path is None or self.shortcut_path == "identity":
            return ()
        return self.shortcut_path if isinstance(self.shortcut_path, tuple) else (self.shortcut_path,)

    def _shortcut_parameters(self) -> list[nn.Parameter]:
        return [p for path in self._shortcut_paths() for p in self._submodule(path).parameters()]

    @property
    def _activates_branch(self) -> bool:
        """Whether the branch ends in an activation of its own, before gate and shortcut, which no epilogue has."""
        return self.stages[-1].activation is not None

    def _merge(self, branch: Tensor, input: Tensor, sites: ActiveSites | None) -> Tensor:
        """Gate a branch that ended in an activation of its own, and add the shortcut; `branch` has zeros elsewhere."""
        if sites is not None and sites.gate is not None:
            branch = (branch * sites.gate).to(branch.dtype)
        if self.shortcut_path is None:
            return branch.contiguous(memory_format=torch.channels_last)
        shortcut = self._dense_shortcut(input)
        merged = ACTIVATIONS[self.last_activation](branch + shortcut)
        if sites is not None and self.last_activation is not None:
            merged = torch.where(sites.mask, merged, shortcut)
        return merged.contiguous(memory_format=torch.channels_last)

    def _check_layers(self, masked: bool, argument: str) -> bool:
        """Raise where a stage does not compute what its layers are, or a call would not run the hooks of one.

        Tells whether a layer computes its parameters.
        """
        for names, kind in self._kinds:
            layer = self
            for name in names:
                layer = layer._modules.get(name)
                if layer is None:
                    break
            if type(layer) is not kind or layer.__dict__.get("padding_mode", "zeros") != "zeros":
                self._check_kind(".".join(names), layer, kind)
        hooked: list[tuple[str, nn.Module]] = []
        computed = _find_hooks(self, "", hooked)
        for path, layer in hooked:
            if not self._calls(path, masked):
                raise ValueError(
                    f"{argument}: expected a block whose inner layers have no hooks, got the {hook_of(layer)} of "
                    f"`{path}`, which would not run; remove it (remove_weight_norm, prune.remove, …)"
                )
        return computed

    def _note_layers(self) -> None:
        """Note the kinds of the layers that are not called, as the stages do their work: what replaces them counts.

        These are convolutions, normalisations and what else there is but the shortcut's, as activations.

        Raises ValueError where the shortcut's first layer writes to the block's input, which the branch reads as well.
        """
        first = next((self._submodule(path) for path in self._shortcut_paths()), None)
        while isinstance(first, nn.Sequential):
            first = next(iter(first), None)
        if getattr(first, "inplace", False):
            raise ValueError(f"shortcut: expected layers that leave the block's input as it is, got {first} first")
        own = {path for stage in self.stages for path in (stage.conv, stage.norm)}
        self._kinds = [
            (path.split("."), type(layer))
            for path, layer in self.named_modules(remove_duplicate=False)
            if (path in own or (path and not layer._modules)) and not self._is_of_shortcut(path)
        ]

    def _check_kind(self, path: str, layer: nn.Module | None, kind: type[nn.Module]) -> None:
        """Raise where the layer that is now in a place of the block is not computed as the one of `kind` there was."""
        if issubclass(kind, nn.Conv2d):
            right = layer is not None and computes_as(layer, nn.Conv2d) and layer.padding_mode == "zeros"
        elif any(path == stage.norm for stage in self.stages):
            right = layer is not None and (_is_plain(layer) or is_frozen_norm(layer))
        else:
            right = layer is None  # with the normalisation that it was in
        if not right:
            got = "none" if layer is None else repr(layer) if not layer._modules else type(layer).__name__
            raise ValueError(
                f"block: expected the {kind.__name__} that has been in `{path}`, or what computes the same, got "
                f"{got}; make the block anew, from a dense one with that layer"
            )

    def _is_of_shortcut(self, path: str) -> bool:
        return any(f"{path}.".startswith(f"{start}.") for start in self._shortcut_paths())

    def _calls(self, path: str, masked: bool) -> bool:
        """Whether a layer is called as a module: those of the shortcut, and without a mask the others that can be."""
        if self._is_of_shortcut(path):
            return True
        if masked:
            return False
        plain = [stage.norm for stage in self.stages if stage.norm and _is_plain(self._submodule(stage.norm))]
        return path in [*plain, *(stage.conv for stage in self.stages)]

    @staticmethod
    def _is_promoted(residual: Tensor | None) -> bool:
        """Whether autocast leaves the shortcut in another type than the branch, so that their sum is in the wider one.

        The ops would take both in autocast's type, and round the shortcut.
        """
        if residual is None or not is_autocast(residual.device.type):
            return False
        return residual.dtype not in (torch.get_autocast_dtype(residual.device.type), torch.float64)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_kept": None, "_is_prepared": False}

    @classmethod
    def from_dense(cls, module: nn.Module, *, statistics: str = "active") -> ResidualBlock:
        """Make a block over the children of a dense one; they are shared, not copied, and keep their names.

        What counts is what `module` computes: its forward is traced, and must be convolutions, each with its batch
        normalisation and its activation behind it (ReLU, ReLU6, SiLU, exact GELU, hard-swish) or without, and a
        shortcut around them that is the input, or what submodules make of it, or none. Then both are run on random
        numbers, on copies, in float64.

        Raises ValueError that names the first step without a sparse form (squeeze-and-excitation, anti-aliasing,
        dropout, drop path, pre-activation, …) and its line of code, or a hook of an inner layer; TypeError where
        `module` is no block, or one of another number of convolutions than this class has.
        """
        if isinstance(module, nn.Module) and has_hooks(module):
            raise ValueError(f"module: expected a block without hooks, got the {hook_of(module)}, which would not run")
        if isinstance(module, ResidualBlock):
            made = next((kind for kind in type(module).__mro__ if "forward" in vars(kind)), nn.Module)
            if not made.__module__.startswith(__package__) or "forward" in module.__dict__:
                raise ValueError(
                    f"module: expected a block of dynconv.nn, got {type(module).__name__} with its own forward"
                )
            chain, dense = Chain(module.stages, module.shortcut_path, module.last_activation), None
        else:
            with torch.inference_mode(False):
                dense = _copy_of(module)
                chain = recognise(dense)
            own = [*module._parameters, *module._buffers]
            if own:
                raise ValueError(f"module: expected a block whose layers have all tensors, got `{own[0]}` of its own")
        if cls._convolutions not in (None, len(chain.stages)):
            raise TypeError(
                f"module: expected a {cls.kind} of {cls._convolutions} convolutions, got {type(module).__name__} of "
                f"{len(chain.stages)}"
            )
        block = cls._share(module, chain, statistics)
        block._check_layers(True, "module")
        if dense is not None:
            cls._share(dense, chain, "active").eval()._compare(dense.eval())
        return block

    @classmethod
    def _share(cls, module: nn.Module, chain: Chain, statistics: str) -> ResidualBlock:
        """A block over the very children of a dense block."""
        block = cls.__new__(cls)
        ResidualBlock.__init__(block, chain, statistics)
        for name, child in module._modules.items():
            if hasattr(block, name):
                raise ValueError(f"module: expected no child named `{name}`, which {cls.__name__} has itself")
            block.add_module(name, child)
        block.training = module.training
        block._note_layers()
        return block

    def _compare(self, dense: nn.Module) -> None:
        """Raise ValueError where the block over all sites and the dense block differ on a random input, in float64."""
        convolutions = [self._submodule(stage.conv) for stage in self.stages]
        size = 4
        for conv in reversed(convolutions):
            where = geometry_of(conv)
            taken = [(size - 1) * where.stride[i] + where.dilation[i] * (where.kernel[i] - 1) + 1 for i in (0, 1)]
            size = max(4, *(taken[i] - where.padding[i] - where.padding_end[i] for i in (0, 1)))
        size = -(-size // 8) * 8  # a multiple of common strides, with any rounding
        generator, results = torch.Generator().manual_seed(1), []
        random = functools.partial(torch.randn, dtype=torch.float64, device="cpu", generator=generator)
        input, weights = 4 * random(1, convolutions[0].in_channels, size, size), None
        # The reference backend: what the kernels compute is not in question, and they would be compiled for it.
        exact = torch.autocast("cpu", enabled=False)
        with torch.inference_mode(False), torch.enable_grad(), exact, backend("reference"):
            for masked in (False, True):
                leaf = input.clone().requires_grad_()
                try:
                    if masked:
                        mask = torch.ones(1, 1, *weights.shape[2:], dtype=torch.bool, device="cpu")
                        output = self.forward(leaf * 1, mask=mask)
                    else:
                        output = dense.forward(leaf * 1)  # a block may write to its input, but not to a leaf
                        weights = random(output.shape)
                    results.append([output, *torch.autograd.grad(output, leaf, weights)])
                except Exception as error:
                    raise ValueError(
                        f"module: expected a block that runs on [1, {input.shape[1]}, {size}, {size}] in float64, "
                        f"got {type(error).__name__}: {error}"
                    ) from error
        for name, expected, actual in zip(("values", "gradients"), *results):
            if (actual - expected).abs().max() > 1e-9 * expected.abs().max().clamp(min=1):
                raise ValueError(
                    f"module: expected a block that computes {self.stages}, a shortcut {self.shortcut_path!r} and then "
                    f"{self.last_activation!r}, got other {name} in a comparison on random numbers"
                )


def _copy_of(module: nn.Module) -> nn.Module:
    """Copy a dense block for its recognition; raises where what it has beside its children stands against it."""
    if not isinstance(module, nn.Module) or isinstance(module, nn.Conv2d) or not module._modules:
        raise TypeError(f"module: expected a block of several layers, got {type(module).__name__}")
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise ValueError(f"module: expected parameters that exist, got a lazy `{name}`; run the block once")
    try:
        dense = stand_in(module)
    except Exception as error:
        raise ValueError(f"module: expected a block that can be copied, got {type(error).__name__}: {error}") from error
    return dense


def _find_hooks(module: nn.Module, prefix: str, hooked: list[tuple[str, nn.Module]]) -> bool:
    """Collect the layers that have hooks; tell whether one computes its parameters at each call."""
    computed = False
    for name, child in module._modules.items():
        if child is None:
            continue
        if (
            child._forward_hooks or child._forward_pre_hooks or child._backward_hooks or child._backward_pre_hooks
        ):  # `has_hooks`, written out: this runs for every layer at every call
            hooked.append((f"{prefix}{name}", child))
        if child._modules:
            if "parametrizations" in child._modules:
                computed = True
            else:
                computed |= _find_hooks(child, f"{prefix}{name}.", hooked)
    return computed


_computing = threading.RLock()


@contextmanager
def _alone() -> Iterator[None]:
    with _computing, parametrize.cached():
        yield


def computing_once() -> AbstractContextManager[None]:
    """Let layers compute their parameters once in a call of a block, and one block at a time.

    `parametrize.cached` is the whole process's: blocks of two threads would share what one of them has computed without
    a gradient, or before a step of an optimizer.
    """
    return parametrize.cached() if torch.compiler.is_compiling() else _alone()


def _is_plain(norm: nn.Module) -> bool:
    return computes_as(norm, nn.BatchNorm2d) or computes_as(norm, nn.SyncBatchNorm)


def normalise(norm: nn.Module, input: Tensor) -> Tensor:
    """What a normalisation computes of a dense tensor, without the activation that timm's has inside."""
    if isinstance(norm, nn.SyncBatchNorm):
        return nn.SyncBatchNorm.forward(norm, input)
    if isinstance(norm, _BatchNorm):
        return nn.BatchNorm2d.forward(norm, input)
    return F.batch_norm(input, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)


def check_input(input: Tensor) -> None:
    """Raise where a block's input is no dense tensor [N, C, H, W]."""
    if not isinstance(input, Tensor):
        raise TypeError(f"input: expected a tensor [N, C, H, W], got {kind_of(input)}")
    if input.dim() != 4:
        raise ValueError(f"input: expected a tensor [N, C, H, W], got shape {list(input.shape)}")


def prepare(model: nn.Module) -> nn.Module:
    """Let the blocks of a model keep their folded parameters without looking at the values again; for inference.

    In eval mode a block keeps its parameters with the normalisation folded in, in the order in which its kernels read
    them. Unprepared, a block on the CPU reads all its parameters at each call, to see whether they have changed; one on
    a GPU folds them anew at each call. A prepared block looks at the addresses and the version counters alone. That
    notices what PyTorch counts (in-place operations, optimizers but fused ones, `load_state_dict`, another device or
    type, another submodule), and not what is written through `Tensor.data`, NumPy or a fused optimizer, or by
    `F.batch_norm` to statistics: after such a write, prepare the model again.

    `model.train()` ends it, as does a copy or a pickle of the block.

    Args:
        model: a module with blocks of `dynconv.nn` in it, or one of these, in eval mode.

    Returns the model. Raises TypeError where it is not a module, ValueError where it has no such block, or one in
    training mode.

    Example:
        >>> model = dynconv.prepare(nn.Sequential(dynconv.nn.MaskedBottleneck(32, 8)).eval())
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    blocks = [part for part in model.modules() if isinstance(part, ResidualBlock)]
    if not blocks:
        raise ValueError(f"model: expected a masked or gathered block of dynconv.nn in it, got {type(model).__name__}")
    if any(part.training for block in blocks for part in block.modules()):
        raise ValueError("model: expected blocks in eval mode, got one in training mode (call model.eval() first)")
    for block in blocks:
        block._is_prepared, block._kept = True, None
    return model


def needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def geometry_of(conv: nn.Conv2d) -> Geometry:
    return Geometry.of(conv.kernel_size, conv.stride, conv.padding, conv.dilation)


def _operands(conv: nn.Conv2d, norm: nn.BatchNorm2d | None) -> list[Tensor | None]:
    if norm is None:
        return [conv.weight, conv.bias]
    return [conv.weight, conv.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var]


def fold(conv: nn.Conv2d, norm: nn.BatchNorm2d | None) -> tuple[Tensor, Tensor | None]:
    """The convolution's weight and bias with the normalisation by running statistics folded in."""
    if norm is None:
        return conv.weight, conv.bias
    scale = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -norm.running_mean * scale if conv.bias is None else (conv.bias - norm.running_mean) * scale
    if norm.bias is not None:
        shift = shift + norm.bias
    weight = (conv.weight * scale.view(-1, 1, 1, 1)).to(conv.weight.dtype)
    return weight.contiguous(memory_format=torch.channels_last), shift.to(weight.dtype)


class ResNetBlock(ResidualBlock):
    """What the blocks of ResNet share: stages conv1, bn1, conv2, bn2, … and `downsample`."""

    def __init__(
        self, downsample: nn.Module | None, convolutions: list[nn.Conv2d], norm_layer, statistics: str
    ) -> None:
        numbers = range(1, len(convolutions) + 1)
        norms = [make_norm(norm_layer, conv.out_channels) for conv in convolutions]
        named = [None if type(norm) is nn.Identity else f"bn{i}" for i, norm in zip(numbers, norms)]
        stages = [Stage(f"conv{i}", bn, "relu" if i < len(named) else None) for i, bn in zip(numbers, named)]
        super().__init__(Chain(tuple(stages), "identity" if downsample is None else "downsample", "relu"), statistics)
        for i, conv, norm in zip(numbers, convolutions, norms):
            self.add_module(f"conv{i}", conv)
            self.add_module(f"bn{i}", norm)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self._note_layers()


def make_norm(norm_layer: Callable[..., nn.Module] | None, channels: int) -> nn.Module:
    """A block's normalisation; raises TypeError where it is none that blocks have."""
    expected = "norm_layer: expected one that makes nn.BatchNorm2d, nn.SyncBatchNorm or nn.Identity of a width"
    try:
        norm = (norm_layer or nn.BatchNorm2d)(channels)
    except TypeError as error:
        raise TypeError(f"{expected}, got {norm_layer}: {error}") from error
    if not isinstance(norm, (nn.BatchNorm2d, nn.SyncBatchNorm, nn.Identity)) and not is_frozen_norm(norm):
        raise TypeError(f"{expected}, got {type(norm).__name__}")
    if isinstance(norm, _BatchNorm) and not _is_plain(norm):
        raise TypeError(f"{expected}, got {type(norm).__name__}, whose forward is its own")
    return norm


class BasicBlock(ResNetBlock):
    """Two 3x3 convolutions: ResNet-18 and 34."""

    expansion = 1
    _convolutions = 2
    kind = "BasicBlock"

    def __init__(
        self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None, groups: int = 1,
        base_width: int = 64, dilation: int = 1, norm_layer: Callable[..., nn.Module] | None = None, *,
        statistics: str = "active",
    ) -> None:  # fmt: skip
        if groups != 1 or base_width != 64 or dilation != 1:
            raise ValueError("groups, base_width, dilation: expected 1, 64 and 1 in a BasicBlock")
        first = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        second = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        super().__init__(downsample, [first, second], norm_layer, statistics)


class Bottleneck(ResNetBlock):
    """1x1, 3x3 and 1x1: ResNet-50 and up, ResNeXt, Wide ResNet."""

    expansion = 4
    _convolutions = 3
    kind = "Bottleneck"

    def __init__(
        self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None, groups: int = 1,
        base_width: int = 64, dilation: int = 1, norm_layer: Callable[..., nn.Module] | None = None, *,
        statistics: str = "active",
    ) -> None:  # fmt: skip
        width = int(planes * (base_width / 64.0)) * groups
        convolutions = [
            nn.Conv2d(inplanes, width, 1, bias=False),
            nn.Conv2d(width, width, 3, stride, dilation, dilation, groups, bias=False),
            nn.Conv2d(width, planes * self.expansion, 1, bias=False),
        ]
        super().__init__(downsample, convolutions, norm_layer, statistics)
