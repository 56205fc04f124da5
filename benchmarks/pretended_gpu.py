"""A pretended GPU: what a GPU would notice, on a machine without one.

Its tensors say that they are on cuda:0 and compute on the CPU. They refuse operands from the CPU,
and note when the host waits for one of their values. Kernels and streams are not
pretended. Autocast is, as far as the methods here go.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch.optim import optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

from emp_plugin.transforms.ops.crop import resize_weights

WAITING = (
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::equal",
    "aten::bincount",
)

# a part of autocast's lists for CUDA
LOWERED = (
    torch.conv2d,
    F.conv2d,
    F.linear,
    torch.matmul,
    torch.Tensor.matmul,
    torch.Tensor.__matmul__,
    torch.mm,
    torch.bmm,
    torch.einsum,
)
RAISED = (
    torch.exp,
    torch.Tensor.exp,
    torch.log,
    torch.Tensor.log,
    torch.sum,
    torch.Tensor.sum,
    torch.Tensor.pow,
    torch.norm,
    torch.Tensor.norm,
    torch.linalg.vector_norm,
    torch.log_softmax,
    torch.Tensor.log_softmax,
    torch.Tensor.softmax,
    F.softmax,
    F.log_softmax,
    F.cross_entropy,
    F.cosine_similarity,
    F.mse_loss,
)


class PretendedAutocast(TorchFunctionMode):
    """Casts as CUDA's autocast does while torch says that it is on; weights once a step."""

    def __init__(self):
        super().__init__()
        self.weights: dict[int, torch.Tensor] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if (func in LOWERED or func in RAISED) and torch.is_autocast_enabled("cpu"):
            dtype = torch.bfloat16 if func in LOWERED else torch.float32
            args = tree_map_only(Pretended, lambda tensor: self.cast(tensor, dtype), args)
        return func(*args, **(kwargs or {}))

    def cast(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if not tensor.is_floating_point() or tensor.dtype == dtype:
            return tensor
        if not (tensor.is_leaf and tensor.requires_grad and torch.is_grad_enabled()):
            return tensor.to(dtype)
        if id(tensor) not in self.weights:
            self.weights[id(tensor)] = tensor.to(dtype)
        return self.weights[id(tensor)]


class Pretended(torch.Tensor):
    """A tensor of the pretended GPU around one of the CPU.

    Torch's own side sees a meta tensor, which needs no driver.
    """

    device = property(lambda self: torch.device("cuda:0"))
    is_cuda = property(lambda self: True)
    gpu: "PretendedGPU"

    @staticmethod
    def __new__(cls, inner: torch.Tensor):
        layout = {
            "strides": inner.stride(),
            "storage_offset": inner.storage_offset(),
            "dtype": inner.dtype,
        }
        return torch.Tensor._make_wrapper_subclass(cls, inner.size(), device="meta", **layout)

    def __init__(self, inner: torch.Tensor):
        self.inner = inner

    def to(self, *args, **kwargs):
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None and device.type == "cuda":  # where it is
            return self if dtype is None else super().to(dtype)
        return super().to(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return cls.gpu.compute(func, args, kwargs or {})


class PretendedGPU(TorchDispatchMode):
    """While it is entered, tensors that are made on a GPU are pretended ones.

    ``waits`` names the calls that the host waited at.
    """

    def __init__(self):
        super().__init__()
        self.waits: list[str] = []
        self.pinned: list[torch.Tensor] = []
        self.casts = PretendedAutocast()

    def __enter__(self):
        Pretended.gpu = self
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.compute(func, args, kwargs or {})

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        self.pinned.append(tensor.clone())
        return self.pinned[-1]

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return any(tensor.data_ptr() == pinned.data_ptr() for pinned in self.pinned)

    def waited(self, name: str) -> None:
        self.waits.append(name)

    def launched(self, func: Any) -> None:
        """Called for every call that computes on the GPU."""

    def compute(self, func, args, kwargs):
        name, device = func._schema.name, kwargs.get("device")
        if device is not None and torch.device(device).type == "meta":
            device = torch.device("cuda:0")  # what torch's side sees of it
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        source = "cuda" if any(isinstance(tensor, Pretended) for tensor in tensors) else "cpu"
        target = source if device is None else torch.device(device).type
        if source == "cuda":
            there = [isinstance(tensor, Pretended) or not tensor.ndim for tensor in tensors]
            assert name == "aten::copy_" or all(there), f"{name}: tensors of two devices"
            if name in WAITING or indexes_by_mask(name, args):
                self.waited(name)
        if name in ("aten::_to_copy", "aten::copy_"):
            source = "cuda" if isinstance(args[name == "aten::copy_"], Pretended) else "cpu"
            if name == "aten::copy_":
                target = "cuda" if isinstance(args[0], Pretended) else "cpu"
            if source != target:
                unpinned = source == "cpu" and not self.is_pinned(args[name == "aten::copy_"])
                non_blocking = kwargs.get("non_blocking") or args[2:] == (True,)
                if unpinned or not non_blocking:
                    self.waited(f"copy to {target}")
        inner = kwargs if device is None else kwargs | {"device": torch.device("cpu")}
        out = func(
            *tree_map_only(Pretended, lambda tensor: tensor.inner, args),
            **tree_map_only(Pretended, lambda tensor: tensor.inner, inner),
        )
        if "cuda" in (source, target):
            self.launched(func)
        if target == "cpu" or out is None:
            return out
        out = tree_map_only(torch.Tensor, Pretended, out)
        return return_and_correct_aliasing(func, args, kwargs, out) if source == "cuda" else out


def indexes_by_mask(name: str, args: tuple) -> bool:
    return name == "aten::index" and any(
        index is not None and index.dtype == torch.bool for index in args[1]
    )


def to_the_gpu(module: torch.nn.Module) -> torch.nn.Module:
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                there = Pretended(parameter.detach().clone())
                part._parameters[name] = torch.nn.Parameter(there, parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = Pretended(buffer.clone())
    return module


@contextmanager
def pretending(gpu: PretendedGPU) -> Iterator[PretendedGPU]:
    """Torch takes the pretended GPU for one of its own; ``with gpu:`` then computes on it."""
    event = SimpleNamespace(synchronize=lambda: None)
    stream = SimpleNamespace(record_event=lambda: event)
    autocast, tensor = torch.autocast.__init__, torch.tensor

    def autocast_of_the_cpu(self, device_type, *args, **kwargs):
        autocast(self, "cpu", *args, **kwargs)

    def tensor_on(data, *, device=None, **kwargs):
        made = tensor(data, **kwargs)
        return made if device is None else made.to(device)

    supported = [*optimizer._foreach_supported_types, Pretended]
    with (
        gpu.casts,
        mock.patch.object(torch.cuda, "_lazy_init", return_value=None),
        mock.patch.object(torch.cuda, "get_rng_state", return_value=torch.zeros(1)),
        mock.patch.object(torch.cuda, "set_rng_state", return_value=None),
        mock.patch.object(torch.cuda, "mem_get_info", return_value=(0, 0)),  # images stay here
        mock.patch.object(torch.cuda, "current_stream", return_value=stream),
        mock.patch.object(torch.Tensor, "pin_memory", lambda tensor: gpu.pin(tensor)),
        mock.patch.object(torch.autocast, "__init__", autocast_of_the_cpu),
        mock.patch.object(torch, "tensor", tensor_on),
        mock.patch.object(optimizer, "_foreach_supported_types", supported),
    ):
        yield gpu
    resize_weights.cache_clear()  # it may hold pretended tensors
