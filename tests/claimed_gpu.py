"""The GPU path without a GPU, on tensors without values that claim to be on one: what it waits for and would compile.

    python tests/claimed_gpu.py [NAME]     prints, as JSON, the faults of each case of graph_cases.py, named so or all

A tensor of PyTorch's device "meta" has a shape, strides and no values: what asks for one, to wait for it, to branch on
it or to size something by it, fails. Here such tensors say that they are on cuda:0, every Triton launch is left out
and noted with what it would have compiled, and the ops of this package run what they run for CUDA. So where a case
passes, none of its launches depends on values, nor does what they compile.

Must run without TRITON_INTERPRET: under the interpreter nothing is compiled.
"""

import contextlib
import json
import random
import sys
import types

import graph_cases
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import dynconv
from dynconv import _backend, calibration
from dynconv._backend import observed
from dynconv._launches import recorded

CUDA = torch.device("cuda", 0)
# What makes a tensor of the host's numbers: on a GPU a copy that the host waits for, and no capture allows.
FROM_HOST = {torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor, torch.from_numpy}
state = types.SimpleNamespace(is_warm=False)  # whether a case has been warmed up
specialised: set[str] = set()  # "kernel parameter": the numbers whose value a kernel is compiled for
_places: dict[int, int] = {}  # by storage: a place of its own for each


def _address(tensor: torch.Tensor) -> int:
    """Where a tensor would lie: memory of its own is aligned, as that of PyTorch's allocator on a GPU is."""
    place = _places.setdefault(tensor.untyped_storage()._cdata, 1 + len(_places))
    return (place << 40) + tensor.storage_offset() * tensor.element_size()


_CLAIMS = {
    torch.Tensor.device.__get__: CUDA,
    torch.Tensor.is_cuda.__get__: True,
    torch.Tensor.is_meta.__get__: False,
}


class Waits(AssertionError):
    """A call waits for the GPU, or copies from the host."""


class Claim(TorchFunctionMode):
    """Lets meta tensors say that they are on a GPU."""

    def __torch_function__(self, function, kinds, arguments=(), keywords=None):
        keywords = dict(keywords or {})
        if function in _CLAIMS and arguments[0].device.type == "meta":
            return _CLAIMS[function]
        if function is torch.Tensor.data_ptr:
            return _address(*arguments)
        claims = lambda value: isinstance(value, torch.device) and value.type == "cuda"
        of_gpu = claims(keywords.get("device")) or any(
            isinstance(value, torch.Tensor) and value.device.type == "meta" for value in arguments[:1]
        )
        if function in FROM_HOST and of_gpu and not isinstance(arguments[-1], torch.Tensor):
            raise Waits(f"torch.{function.__name__} copies from the host")
        arguments = [torch.device("meta") if claims(value) else value for value in arguments]
        keywords = {name: torch.device("meta") if claims(value) else value for name, value in keywords.items()}
        return function(*arguments, **keywords)


class Run(TorchDispatchMode):
    """Runs this package's ops as they run for CUDA, and lets nothing go from one device to another."""

    def __torch_dispatch__(self, function, kinds, arguments=(), keywords=None):
        keywords = keywords or {}
        if function.namespace == "dynconv":
            with Claim(), self:
                return function.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *arguments, **keywords)
        tensors = [value for value in arguments if isinstance(value, torch.Tensor)]
        result = function(*arguments, **keywords)
        crosses = function._schema.name in ("aten::_to_copy", "aten::copy_")
        if crosses and isinstance(result, torch.Tensor) and any(t.device != result.device for t in tensors if t.dim()):
            raise Waits(f"{function} copies between devices")
        return result


def _argument(value):
    """What Triton asks of a tensor: its type, and where it lies."""
    if not isinstance(value, torch.Tensor):
        return value
    address = _address(value)
    return types.SimpleNamespace(dtype=value.dtype, data_ptr=lambda: address)


@contextlib.contextmanager
def claimed():
    """Everything inside runs as on a GPU, without one; gives the set of what its launches would compile, to clear."""
    from triton import knobs
    from triton.runtime.jit import JITFunction

    compiled = set()

    def note(*, fn, compile, **_):
        compiled.add((fn.name.rpartition(".")[2].strip("_"), str(compile["key"])))
        return True  # and Triton compiles nothing

    # A call in inference is what nobody watches, although these modes do.
    before = _backend._len_torch_dispatch_stack, _backend._len_torch_function_stack
    on_device, capturing = torch.cuda.device, torch.cuda.is_current_stream_capturing
    properties = torch.cuda.get_device_properties
    try:
        _backend._len_torch_dispatch_stack = _backend._len_torch_function_stack = lambda: 0
        torch.cuda.device = lambda device: contextlib.nullcontext()
        torch.cuda.is_current_stream_capturing = lambda: False
        torch.cuda.get_device_properties = lambda device: types.SimpleNamespace(multi_processor_count=132)
        with recorded("sm_90"):
            noted = JITFunction.run

            def launch(kernel, *arguments, **options):
                given = dict(zip(kernel.arg_names, arguments)) | options
                for parameter in kernel.params:
                    is_number = isinstance(given[parameter.name], int)
                    if is_number and not (parameter.is_constexpr or parameter.do_not_specialize):
                        specialised.add(f"{kernel.__name__.strip('_')} {parameter.name}")
                return noted(kernel, *map(_argument, arguments), **options)

            JITFunction.run = launch
            knobs.runtime.jit_cache_hook = note
            with torch.autograd.set_multithreading_enabled(False), Claim(), Run():
                yield compiled
    finally:
        knobs.runtime.jit_cache_hook = None
        _backend._len_torch_dispatch_stack, _backend._len_torch_function_stack = before
        torch.cuda.device, torch.cuda.is_current_stream_capturing = on_device, capturing
        torch.cuda.get_device_properties = properties


@contextlib.contextmanager
def either_way(seed):
    """The automatic mode of a calibrated machine, whose calls go either way."""
    ways = random.Random(seed)
    times = calibration.Times("", [1.0], [1.0], [0.5], [True])
    before = calibration._times, calibration._latest
    try:
        calibration._times, calibration._latest = lambda call: times, lambda *_: ways.choice((-1, 2**60))
        with dynconv.execution("automatic"):
            yield
    finally:
        calibration._times, calibration._latest = before


@contextlib.contextmanager
def captured():
    """The automatic mode of a calibrated machine in the capture of a graph: counts must not be fetched."""

    def fetch(*_):
        raise Waits("a count is sent to the host in a capture")

    before = calibration._times, calibration._latest, torch.cuda.is_current_stream_capturing, torch.cuda.is_initialized
    times = calibration.Times("", [1.0], [1.0], [0.5], [True])
    try:
        calibration._times, calibration._latest = lambda call: times, fetch
        torch.cuda.is_current_stream_capturing = torch.cuda.is_initialized = lambda: True
        with dynconv.execution("automatic"):
            yield
    finally:
        calibration._times, calibration._latest = before[:2]
        torch.cuda.is_current_stream_capturing, torch.cuda.is_initialized = before[2:]


def faults(case, compiled) -> list[str]:
    """What a case compiles after its warm-up, by kernel, or the error where it cannot run without values."""
    try:
        compiled.clear()
        state.is_warm = False
        dynconv.warmup(case.run)
        state.is_warm = True
        warm = set(compiled)
        if not warm:
            return ["nothing was launched"]
        for seed in range(2):
            with either_way(seed):
                case.run()
        case.run()
        with captured():
            case.run()
        with observed.using(True):
            case.run()
        return sorted(f"{name} {key}" for name, key in compiled - warm)
    except Exception as error:
        if "--trace" in sys.argv:
            raise
        return [f"{type(error).__name__}: {error}"]


def _odd_view(x, w, mask):
    """After the warm-up the features lie at an address that is no multiple of 16."""
    view = x[int(state.is_warm) :][:512].view(2, 4, 4, 16).permute(0, 3, 1, 2)
    return dynconv.masked_conv2d(view, w, padding=1, mask=mask)


def _odd_channels(x, w, in_mask):
    """The same of a mask of channels, which is read an element at a time: no kernel of its own."""
    view = in_mask[int(state.is_warm) :][:32].view(2, 16)
    return dynconv.gathered_conv2d(x, w, padding=1, in_mask=view)


# Faults on purpose, and what is to be said of each: this script must be able to find them.
FAULTY = {
    "item": lambda x, mask: x * int(mask.sum()),
    "branch": lambda x, mask: x if mask.any() else -x,
    "nonzero": lambda x, mask: x[mask.expand_as(x)],
    "to the host": lambda x, mask: x.cpu(),
    "from the host": lambda x, mask: x * torch.tensor(2.0, device=x.device),
    "length": lambda x, mask: x * len(dynconv.ActiveSites(mask)),
    "no launch": lambda x, mask: x + 1,
}


def _faulty_cases() -> dict[str, graph_cases.Case]:
    shapes = dict(x=graph_cases.X, mask=graph_cases.MASK)
    made = {name: graph_cases._case(forward, "meta", **shapes) for name, forward in FAULTY.items()}
    made["odd address"] = graph_cases._case(_odd_view, "meta", x=(513,), w=graph_cases.W, mask=graph_cases.MASK)
    return made


def main() -> None:
    wanted = sys.argv[1] if sys.argv[1:] else ""
    builds = graph_cases.CASES | graph_cases.LAYERS
    cases = {name: build("meta") for name, build in builds.items() if wanted in name}
    shapes = dict(x=graph_cases.X, w=graph_cases.W, in_mask=(33,))
    cases["channels at an odd address"] = graph_cases._case(_odd_channels, "meta", **shapes)
    faulty = _faulty_cases()
    with claimed() as compiled:
        found = {name: faults(case, compiled) for name, case in cases.items()}
        seeded = {name: faults(case, compiled) for name, case in faulty.items()}
    print(json.dumps({"cases": found, "seeded": seeded, "specialised": sorted(specialised)}, indent=1))


if __name__ == "__main__":
    main()
