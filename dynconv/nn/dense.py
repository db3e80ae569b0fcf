"""Which dense layers the drop-in modules may stand for: what calling one computes, and what else it would run."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

HOOKS = {
    "_forward_pre_hooks": "forward pre-hook",
    "_forward_hooks": "forward hook",
    "_backward_pre_hooks": "backward pre-hook",
    "_backward_hooks": "backward hook",
}


def has_hooks(module: nn.Module) -> bool:
    """Tell whether a call of `module` runs hooks of its own."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def hook_of(module: nn.Module) -> str:
    """Name the first hook of a module that has one, for an error."""
    kind, hook = next((name, hook) for key, name in HOOKS.items() for hook in getattr(module, key).values())
    return f"{kind} `{getattr(hook, '__qualname__', type(hook).__name__)}`"


def computes_as(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Tell whether calling `module` runs the forward of `kind`, or of a layer of ours that stands for `kind`.

    A subclass with a forward of its own, as of weight standardisation or "same" padding, computes something else.
    """
    actual = type_before_parametrizations(module)
    if not issubclass(actual, kind) or "forward" in module.__dict__:
        return False
    if vars(actual).get("stands_for") is kind:
        return True
    return all(getattr(actual, name, None) is getattr(kind, name, None) for name in ("forward", "_conv_forward"))


def check_layer(module: nn.Module, kind: type[nn.Module]) -> None:
    """Raise where a layer that shares the parameters of `module` and computes what `kind` does would not equal it.

    Raises TypeError where `module` is no `kind`, is one whose parameters do not exist yet, or has a forward of its own;
    ValueError where it has hooks, or parameters that are computed at each call (parametrizations, weight_norm, prune).
    """
    expected, name = f"expected an nn.{kind.__name__}", type(module).__name__
    if not isinstance(module, kind) or isinstance(module, nn.modules.lazy.LazyModuleMixin):
        raise TypeError(f"module: {expected}, got {name}")
    if not computes_as(module, kind):
        raise TypeError(f"module: {expected}, got {name}, whose forward is its own and would not run")
    # An attribute that `kind` registers as a parameter is something else where the parameter is computed.
    computed = [key for key in ("weight", "bias") if key not in module._parameters]
    if computed:
        raise ValueError(
            f"module: {expected} whose `{computed[0]}` is a parameter, got one that is computed at each call; remove "
            "the parametrization, weight_norm or prune first"
        )
    if has_hooks(module):
        raise ValueError(f"module: {expected} without hooks, got one with the {hook_of(module)}, which would not run")


def share_tensors(shared: nn.Module, module: nn.Module) -> nn.Module:
    """Give `shared`, which has been made without memory, the parameters, the buffers and the mode of `module`."""
    shared._parameters, shared._buffers = dict(module._parameters), dict(module._buffers)
    shared._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
    return shared.train(module.training)


def is_frozen_norm(module: nn.Module) -> bool:
    """Tell whether `module` is the frozen batch normalisation of detection backbones: four buffers and an eps."""
    tensors: dict[str, Tensor] = module._buffers
    return (
        not module._parameters
        and set(tensors) - {"num_batches_tracked"} == {"weight", "bias", "running_mean", "running_var"}
        and isinstance(getattr(module, "eps", None), float)
    )
