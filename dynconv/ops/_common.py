"""What the ops share: memory formats and checks of arguments."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from numbers import Real
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .._arguments import kind_of
from .._backend import check_tracer, is_transformed, module, unwatched
from .._geometry import Geometry
from ..packed import PackedFeatures
from ..reference import NORMALIZATIONS
from ..sites import ActiveSites

if TYPE_CHECKING:
    from ..kernels.compaction import Fill

ACTIVATIONS = ("relu", "relu6", "silu", "gelu", "hardswish")
FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class Compacted:
    """What an op gets of an `ActiveSites`."""

    def __init__(self, mask: Tensor, index: Tensor, count: Tensor) -> None:
        self.mask, self.index, self.count = mask, index, count

    def __len__(self) -> int:
        return int(self.count)

    def _fill(self, fill: Fill) -> None:
        module(".kernels.compaction").fill_skipped(self.mask, fill)


class Counted:
    """The mask of some sites, and how many there are."""

    def __init__(self, mask: Tensor, length: int) -> None:
        self.mask, self._length = mask, length

    def __len__(self) -> int:
        return self._length


def channels_last(shape, like: Tensor) -> Tensor:
    """An uninitialised channels_last tensor of `like`'s type, on its device."""
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def new_rows(rows: int, channels: int, like: Tensor, count: Tensor, backend: str) -> Tensor:
    """Packed rows of `like`'s type that are uninitialised up to `count` and zeros from there on.

    None is initialised for the Triton kernels, which write the zeros themselves.
    """
    packed = like.new_empty(rows, channels)
    if backend != "cpu":
        return packed
    if (active := int(count)) < rows:
        packed[active:].zero_()
    return packed


def allow_tf32() -> bool:
    """The switch that F.conv2d obeys for float32 on CUDA."""
    return torch.backends.cudnn.conv.fp32_precision == "tf32"


def in_rows(tensor: Tensor | None) -> Tensor | None:
    """Dense features in channels_last, packed ones contiguous: a row of channels for each pixel."""
    if tensor is None:
        return None
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor.contiguous()


_IN_PLACE = {
    "none": lambda x: x,
    "relu": torch.relu_,
    "relu6": lambda x: F.relu6(x, inplace=True),
    "silu": lambda x: F.silu(x, inplace=True),
    "gelu": F.gelu,
    "hardswish": lambda x: F.hardswish(x, inplace=True),
}


def in_place(activation: str | None) -> Callable[[Tensor], Tensor]:
    """The activation as a function of a tensor that nobody else sees."""
    return _IN_PLACE[activation or "none"]


def activate_(result: Tensor, activation: str | None) -> Tensor:
    """The activation of a tensor that nobody else sees."""
    return in_place(activation)(result)


def settle(
    result: Tensor,
    sites: ActiveSites,
    gate: Tensor | None,
    residual: Tensor | None,
    inactive: Tensor | None,
    activation: str | None,
    out: Tensor | None,
) -> Tensor:
    """What a masked convolution gives, from a dense one's `result`, which is used up; inference.

    `sites` has the mask and the length of an ActiveSites, and `gate` is theirs. `out` is updated at the active sites
    and returned.
    """
    skips = not result.is_cpu or len(sites) < sites.mask.numel()
    # Half types are rounded step by step, as PyTorch does it; the others in one pass, which only a mask is worth.
    in_steps = not skips or not result.is_cpu or result.element_size() == 2
    if in_steps:
        if gate is not None:
            result.copy_(result * gate)
        if residual is not None:
            result += residual
        result = in_rows(activate_(result, activation))
    if not skips:
        return result if out is None else out.copy_(result)
    inactive = in_rows(expanded("inactive", inactive, result.shape, result))
    if not result.is_cpu:
        if out is not None:
            return out.copy_(torch.where(sites.mask, result, out))
        return in_rows(torch.where(sites.mask, result, 0 if inactive is None else inactive))
    if in_steps:
        gate = residual = activation = None
    result, residual = in_rows(result), in_rows(expanded("residual", residual, result.shape, result))
    adds = gate is not None or residual is not None
    pass_ = module(".cpu.epilogue").DenseEpilogue(
        tuple(result.shape), result.dtype, activation or "none", adds=adds, copies=out is not None
    )
    pass_.run(result, sites.mask, gate, residual, inactive, result if out is None else out)
    if out is None:
        return result
    torch.autograd.graph.increment_version(out)  # a graph that saved what was overwritten has to notice
    return out


class Settled:
    """`settle` of results of one size and type, on the CPU without a gate and `out`: worked out once.

    Args:
        shape: [N, C, H, W] of the results.
        dtype: theirs.
        activation: its name, or None.
        adds: whether there is a residual.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, activation: str | None, *, adds: bool) -> None:
        self.sites, self.activation, self.activate_ = shape[0] * shape[2] * shape[3], activation, in_place(activation)
        self.settling = None  # half types settle in steps
        if dtype.itemsize > 2:
            kind = activation or "none"
            self.settling = module(".cpu.epilogue").DenseEpilogue(shape, dtype, kind, adds=adds, copies=False)

    def __call__(
        self, result: Tensor, mask: Tensor, active: int, residual: Tensor | None, inactive: Tensor | None
    ) -> Tensor:
        """`active`: how many sites of the mask are; the operands are of the result's shape."""
        if active == self.sites:
            if residual is not None:
                result += residual
            return in_rows(self.activate_(result))
        if self.settling is None:
            return settle(result, Counted(mask, active), None, residual, inactive, self.activation, None)
        result = in_rows(result)
        self.settling.run(result, mask, None, in_rows(residual), in_rows(inactive), result)
        return result


def check_features(name: str, features: Tensor | PackedFeatures) -> Tensor:
    """The tensor behind dense or packed features."""
    tensor = features.rows if isinstance(features, PackedFeatures) else features
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor or PackedFeatures, got {kind_of(tensor)}")
    _check_layout(name, tensor)
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name}: expected float32, float64, float16 or bfloat16, got {tensor.dtype}")
    if isinstance(features, PackedFeatures):
        if not isinstance(features.sites, ActiveSites):
            raise TypeError(f"{name}: expected sites in an ActiveSites, got {type(features.sites).__name__}")
        least = _least_rows(features.sites)
        if tensor.dim() != 2 or tensor.shape[0] < least:
            raise ValueError(f"{name}: expected rows [{least} or more, C], got shape {list(tensor.shape)}")
        if tensor.device != features.sites.mask.device:
            raise ValueError(f"{name}: expected rows on {features.sites.mask.device}, where the sites are")
    return tensor


def _least_rows(sites: ActiveSites) -> int:
    """How many rows features packed for these sites have at least, as far as that is known without a wait."""
    if not sites.mask.is_cpu:
        return sites.capacity
    return len(sites) if unwatched(sites.mask) else 0  # the ops look again


def check_rows(rows: Tensor, count: Tensor, name: str = "input") -> None:
    """That packed rows in a compiled graph, or given to an op itself, are as many as their sites; on the CPU."""
    if rows.shape[0] < int(count):
        raise ValueError(f"{name}: expected rows [{int(count)} or more, C], got shape {list(rows.shape)}")


def check_operand(name: str, operand: Tensor, input: Tensor) -> None:
    """That an argument is a floating tensor beside the input."""
    if not isinstance(operand, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {kind_of(operand)}")
    _check_layout(name, operand)
    if operand.dtype not in FLOATING:
        raise TypeError(f"{name}: expected float32, float64, float16 or bfloat16, got {operand.dtype}")
    if operand.device != input.device:
        raise ValueError(f"{name}: expected a tensor on {input.device}, where the input is, got {operand.device}")


def _check_layout(name: str, tensor: Tensor) -> None:
    if tensor.layout != torch.strided or tensor.is_nested:
        layout = "a nested one" if tensor.is_nested else tensor.layout
        raise TypeError(f"{name}: expected a strided tensor, got {layout}")


def check_map(input: Tensor) -> None:
    """That the input is a floating tensor [N, C, H, W] with a channel."""
    check_tracer(input)
    check_operand("input", input, input)
    if input.dim() != 4 or input.shape[1] == 0:
        cure = unsqueezed("input", input)
        raise ValueError(f"input: expected shape [N, C, H, W] with at least one channel, got {list(input.shape)}{cure}")


def check_convolution(
    input: Tensor | PackedFeatures,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int] | str,
    dilation: tuple[int, int],
    groups: int,
) -> tuple[Geometry, tuple[int, int]]:
    """Return the convolution's geometry and its (Ho, Wo); the last four arguments are those of `_geometry.plain`."""
    check_tracer(input)
    tensor = check_features("input", input)
    check_operand("weight", weight, tensor)
    if bias is not None:
        check_operand("bias", bias, tensor)
    if input is tensor and input.dim() != 4:
        raise ValueError(f"input: expected shape [N, Cin, H, W] or [Cin, H, W], got {list(input.shape)}")
    channels = tensor.shape[1]
    if weight.dim() != 4 or 0 in weight.shape:
        raise ValueError(f"weight: expected a shape [Cout, Cin / groups, kH, kW] of no zeros, got {list(weight.shape)}")
    if groups < 1 or weight.shape[0] % groups or channels % groups:
        raise ValueError(f"groups: expected a divisor of Cin = {channels} and Cout = {weight.shape[0]}, got {groups}")
    if weight.shape[1] * groups != channels:
        raise ValueError(
            f"weight: expected {channels // groups} input channels for an input of {channels} and groups "
            f"{groups}, got {weight.shape[1]}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected shape [{weight.shape[0]}], got {list(bias.shape)}")
    where = (tuple(weight.shape[2:]), stride, padding, dilation, *input.shape[2:])
    if torch.compiler.is_compiling():  # hashing a symbolic size would tie the graph to it
        return _placed(*where)
    try:
        return _placed_before(*where)
    except TypeError:  # symbolic sizes
        return _placed(*where)


def _placed(kernel, stride, padding, dilation, height, width) -> tuple[Geometry, tuple[int, int]]:
    geometry = Geometry.of(kernel, stride, padding, dilation)
    return geometry, geometry.output_size(height, width)


_placed_before = functools.lru_cache(1024)(_placed)


def check_types(input: Tensor, **operands: Tensor | None) -> None:
    for name, tensor in operands.items():
        if tensor is not None and tensor.dtype != input.dtype:
            raise TypeError(f"{name}: expected {input.dtype}, the input's type, got {tensor.dtype}")


def below_autograd(name: str, function: Callable, *arguments):
    """Run `dynconv::{name}` inside of its autograd.Function: where nobody watches, the function behind it."""
    if unwatched(*(a for a in arguments if isinstance(a, Tensor))):
        return function(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return getattr(torch.ops.dynconv, name)(*arguments)


def register_autograd(library: torch.library.Library, name: str, function: Callable | None = None) -> None:
    """Let `dynconv::{name}` run `function` under autograd; None: it has no derivative, and runs as it is.

    Refuses forward mode and the transforms of torch.func, which would take an op that drops a tangent for a constant.
    """
    op = getattr(torch.ops.dynconv, name)

    def run(*arguments):
        if is_transformed():
            refuse_transforms(op, arguments)
        if function is not None:
            return function(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*arguments)

    library.impl(name, run, "Autograd")


def refuse_transforms(op, arguments: Sequence) -> None:
    """Raise where an operand of an op carries a tangent, or is one of a transform of torch.func."""
    for argument, value in zip(op.default._schema.arguments, arguments):
        for tensor in value if isinstance(value, (list, tuple)) else [value]:
            if not isinstance(tensor, Tensor):
                continue
            if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
                what = "the transforms of torch.func (grad, vjp, jvp, vmap, ...)"
            elif torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None:
                what = "forward mode AD (jvp, jacfwd, linearize, ...)"
            else:
                continue
            raise RuntimeError(
                f"{op}: expected `{argument.name}` outside of {what}, got one inside; differentiate in reverse mode "
                "with torch.autograd, or under dynconv.backend('reference')"
            )


class _Once(torch.autograd.Function):
    """Here so that a second derivative is refused rather than silently taken as zero."""

    @staticmethod
    def forward(ctx, name, *arguments):
        ctx.name = name
        with torch._C._AutoDispatchBelowAutograd():
            return getattr(torch.ops.dynconv, f"{name}_backward")(*arguments)

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(f"{ctx.name}: differentiable once, got a second derivative (create_graph=True)")


def once_differentiable(library: torch.library.Library, name: str) -> None:
    """Let `dynconv::{name}_backward`, where gradients are asked for, run and refuse to be differentiated itself."""
    library.impl(f"{name}_backward", functools.partial(_Once.apply, name), "Autograd")


def check_normalization(normalization: str | None) -> None:
    """That an argument names a normalisation of filters, or is None."""
    if normalization is not None and not isinstance(normalization, str):
        raise TypeError(f"normalization: expected None or a str, got {normalization!r}")
    if normalization == "none" or normalization not in (None, *NORMALIZATIONS):
        raise ValueError(f"normalization: expected None, softmax, sigmoid or l2, got {normalization!r}")


def check_activation(activation: str | None) -> None:
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected None or one of {', '.join(ACTIVATIONS)}, got {activation!r}")


def unsqueezed(name: str, features: Tensor) -> str:
    """Name the cure, for an error message, where features of one image lack the dimension of samples."""
    return f"; {name}.unsqueeze(0) makes a batch of one image" if features.dim() == 3 else ""


def is_unbatched(input: object, out: Tensor | None = None, packed: bool = False) -> bool:
    """Whether the input is one image [C, H, W], which `F.conv2d` takes as well; checks what may not stand beside it."""
    if not isinstance(input, Tensor) or input.dim() != 3:
        return False
    if packed:
        raise ValueError(f"packed: expected False beside an input [C, H, W], got True{unsqueezed('input', input)}")
    if isinstance(out, Tensor) and out.dim() != 3:
        raise ValueError(f"out: expected shape [Cout, Ho, Wo], as the input is [C, H, W], got {list(out.shape)}")
    return True


def expanded(name: str, tensor: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor | None:
    """Return an argument that broadcasts to the output's shape in that shape; its gradient adds up again."""
    if isinstance(tensor, Tensor) and tensor.shape != shape:
        if tensor.dim() > len(shape) or any(h not in (1, w) for h, w in zip(tensor.shape[::-1], shape[::-1])):
            raise ValueError(f"{name}: expected a shape that broadcasts to {list(shape)}, got {list(tensor.shape)}")
        tensor = tensor.expand(shape)
    check_result(name, tensor, shape, like)
    return tensor


def expanded_inactive(inactive: Tensor | float | None, shape: tuple[int, ...], like: Tensor) -> Tensor | None:
    """Return what stands at the skipped sites in the output's shape; it may be a number as well."""
    if inactive is not None and not isinstance(inactive, Tensor):
        if not isinstance(inactive, Real) or isinstance(inactive, bool):
            raise TypeError(f"inactive: expected a tensor or a number, got {kind_of(inactive)}")
        inactive = like.new_full((), float(inactive))  # `new_tensor` copies from the host, which waits for a GPU
    return expanded("inactive", inactive, shape, like)


def check_result(name: str, tensor: Tensor | None, shape: tuple[int, ...], like: Tensor) -> None:
    """That an argument of the output's shape is one."""
    if tensor is None:
        return
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {kind_of(tensor)}")
    if tensor.dtype != like.dtype:
        raise TypeError(f"{name}: expected {like.dtype}, the output's type, got {tensor.dtype}")
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")
    if tensor.device != like.device:
        raise ValueError(f"{name}: expected a tensor on {like.device}, where the input is, got {tensor.device}")


def check_residual(
    residual: Tensor | PackedFeatures | None, sites: ActiveSites | None, shape, like: Tensor, packed: bool
) -> Tensor | None:
    """The residual's tensor: dense for a dense output, packed for the same sites for a packed one."""
    if residual is None:
        return None
    if isinstance(residual, PackedFeatures) != packed:
        wanted = "PackedFeatures, as the output is" if packed else "a dense tensor, as the output is"
        raise TypeError(f"residual: expected {wanted}, got {type(residual).__name__}")
    if not packed:
        return expanded("residual", residual, shape, like)
    rows = check_features("residual", residual)
    if residual.sites.index is not sites.index:
        raise ValueError("residual: expected features packed for the same ActiveSites as the output")
    if rows.shape[1] != shape[1] or rows.dtype != like.dtype:
        raise ValueError(f"residual: expected {shape[1]} channels of {like.dtype}, got {rows.shape[1]} of {rows.dtype}")
    return rows


def sites_of(mask: Tensor | ActiveSites, size: tuple[int, int, int], input: Tensor) -> ActiveSites:
    """The mask as the ActiveSites of an output (N, Ho, Wo)."""
    sites = mask if isinstance(mask, ActiveSites) else ActiveSites(mask, size)
    if sites.shape != size:
        raise ValueError(f"mask: expected sites of [{size[0]}, 1, {size[1]}, {size[2]}], got {sites.shape}")
    if sites.mask.device != input.device:
        raise ValueError(f"mask: expected a mask on {input.device}, where the input is, got {sites.mask.device}")
    return sites


def check_out(out, inactive, packed: bool, *operands: Tensor | None) -> None:
    """That `out` can be updated in place."""
    if inactive is not None:
        raise ValueError("out: expected no `inactive` beside it (out itself holds the skipped sites), got both")
    if packed:
        raise ValueError("out: expected packed=False beside it, got True")
    if not out.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"out: expected a channels_last tensor, got strides {list(out.stride())}")
    tracked = [t for t in (out, *operands) if t is not None and t.requires_grad]
    if torch.is_grad_enabled() and tracked:
        raise ValueError("out: expected torch.no_grad() (it is for inference only), got tensors that need gradients")


def check_overlap(name: str, out: Tensor, **operands: Tensor | None) -> None:
    """That a tensor to write to, of elements without gaps, has no memory in common with what is read."""
    begin = out.data_ptr()
    end = begin + out.numel() * out.element_size()
    for read, tensor in operands.items():
        if tensor is None or (first := tensor.data_ptr()) >= end or tensor.numel() == 0:
            continue
        last = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride()))
        if first + (last + 1) * tensor.element_size() > begin:
            raise ValueError(f"{name}: expected memory of its own, got a tensor that overlaps `{read}`")


def is_same_memory(residual: Tensor | None, out: Tensor) -> bool:
    """Whether the residual is `out` itself, element by element; both have its shape and type."""
    if residual is None or residual.data_ptr() != out.data_ptr():
        return False
    return residual.is_contiguous(memory_format=torch.channels_last)


def placed(kernel_size, stride, padding, dilation) -> Geometry:
    """The geometry from an op's lists of ints; its padding behind the input shows in the output's size alone."""
    return Geometry(tuple(kernel_size), tuple(stride), tuple(padding), (0, 0), tuple(dilation))


def is_autocast(kind: str) -> bool:
    """Whether autocast is on for a type of device; it raises for "meta"."""
    return kind != "meta" and torch.is_autocast_enabled(kind)


def autocast(*operands, dtype: torch.dtype | None = None):
    """What autocast does for F.conv2d: everything but float64 in its lower precision, packed rows as well.

    Or, where it is on, in another `dtype`.
    """
    kind = operands[0].device.type
    if not is_autocast(kind):
        return operands
    dtype = dtype or torch.get_autocast_dtype(kind)

    def cast(operand):
        if isinstance(operand, PackedFeatures):
            return operand._replace(rows=cast(operand.rows))
        return operand.to(dtype) if isinstance(operand, Tensor) and operand.dtype != torch.float64 else operand

    return tuple(cast(operand) for operand in operands)


def gate_of(sites: ActiveSites, dtype: torch.dtype) -> Tensor | None:
    """The sites' gate, contiguous in the type that `dtype` is computed in."""
    if sites.gate is None:
        return None
    return sites.gate.to(torch.promote_types(dtype, torch.float32)).contiguous()
