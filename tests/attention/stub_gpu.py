"""A GPU that is none: what launches Triton's kernels runs, and whatever would wait for it raises.

Tensors say that they are on ``cuda:0`` and hold their numbers on the CPU. Torch's operators compute
there, unless the host would wait for a GPU's result. Triton's own launcher runs up to its driver,
for which a stub stands, and compiles nothing.
"""

from __future__ import annotations

import contextlib
import sys
import types
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

CUDA = torch.device("cuda:0")
INDEXING = ("aten::index", "aten::index_put", "aten::index_put_")  # by a mask, they count it


class WaitedError(Exception):
    """The host would have waited for the GPU, which cannot be captured in a graph."""


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device=CUDA
        )

    def __init__(self, held):
        self.held = held

    def data_ptr(self):
        return self.held.data_ptr()

    def record_stream(self, stream):
        """There is one stream."""

    # Torch asks its build for the GPU before it dispatches these.
    def copy_(self, source):
        return torch.ops.aten.copy_(self, source)

    def nonzero(self):
        return torch.ops.aten.nonzero(self)

    def __getitem__(self, index):
        return OnGpu(self.held[self._place(index)])

    def __setitem__(self, index, value):
        self.held[self._place(index)] = _held(value)

    def _place(self, index):
        tensors = [x for x in tree_flatten(index)[0] if isinstance(x, torch.Tensor)]
        devices = {x.device for x in (self, *tensors)}
        stub = _get_current_dispatch_mode()
        stub.refuse_waiting(torch.ops.aten.index.Tensor, [self, *tensors], devices)
        return tree_map(_held, index)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} was called outside of stub_gpu.StubGpu")


class StubGpu(TorchDispatchMode):
    """Where tensors are on the GPU that is none, whose launches and compilations are noted."""

    def __init__(self, capability=(8, 0)):
        super().__init__()
        self.capability = capability
        self.launched = []
        self.index = 0  # the current device
        self.searched = 0  # how often Triton has looked for a compiled kernel by all arguments
        self.kernels = []  # those that were launched, by their place in ``compiled``
        self.compiled = []  # what Triton would have compiled, in its order
        self.options = []  # that it would have been compiled with
        self.described = 0  # descriptors that the latest launch was given
        self.copies = True  # between the CPU and the GPU, which a first call may make
        self._functions = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given, spec = tree_flatten((args, kwargs or {}))
        tensors = [x for x in given if isinstance(x, torch.Tensor)]
        named = [x for x in given if isinstance(x, torch.device)]
        devices = {x.device for x in tensors if x.ndim} | {torch.device(x) for x in named}
        if CUDA not in {*devices, *(x.device for x in tensors)}:
            return func(*args, **(kwargs or {}))
        self.refuse_waiting(func, tensors, devices)
        cpu = [_held(torch.device("cpu") if isinstance(x, torch.device) else x) for x in given]
        args, kwargs = tree_unflatten(cpu, spec)
        found = func(*args, **kwargs)
        if "empty" in func._schema.name:  # which no kernel fills, and indices may be made of
            found.zero_()
        wrapped = {id(x.held): x for x in tensors if isinstance(x, OnGpu)}

        def wrap(x):
            if not isinstance(x, torch.Tensor) or torch.device("cpu") in named:
                return x
            return wrapped[id(x)] if id(x) in wrapped else OnGpu(x)

        return tree_map(wrap, found)

    def refuse_waiting(self, func, tensors, devices):
        """Raises where an operator of tensors on these devices would make the host wait."""
        tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
        if func._schema.name in INDEXING:
            waits = any(x.dtype == torch.bool for x in tensors[1:])
        else:
            waits = tags & set(func.tags)
        if waits:
            raise WaitedError(f"{func} reads numbers of the GPU")
        if len(devices) > 1 and not self.copies:
            raise WaitedError(f"{func} copies between the CPU and the GPU")

    # ---- Triton's driver ----

    def get_current_device(self):
        return self.index

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        major, minor = self.capability
        return GPUTarget("cuda", 10 * major + minor, 32)

    @property
    def utils(self):
        properties = {"max_shared_mem": 166912, "multiprocessor_count": 108}
        return types.SimpleNamespace(get_device_properties=lambda index: properties)

    def _compiled(self, function):
        """Returns a compiled kernel without a binary: launched, it notes the function's name."""
        from triton.compiler import CompiledKernel
        from triton.tools.tensor_descriptor import TensorDescriptor

        self._functions.add(function)
        place = len(self.compiled)
        self.compiled.append(function.__name__)

        def run(x, y, z, stream, handle, packed, metadata, enter, leave, *arguments):
            enter(metadata)
            for x in tree_flatten(arguments)[0]:
                if isinstance(x, torch.Tensor) and not isinstance(x, OnGpu):
                    raise AssertionError(f"{function.__name__} got a tensor on {x.device}")
            self.described = sum(isinstance(x, TensorDescriptor) for x in arguments)
            if len(arguments) != len(function.signature.parameters):
                raise AssertionError(f"{function.__name__} got {len(arguments)} arguments")
            self.launched.append(function.__name__)
            self.kernels.append(place)

        class Kernel(CompiledKernel):
            def __del__(self):
                """There is no module, which Triton unloads from 3.8 on."""

        kernel = object.__new__(Kernel)
        kernel.name, kernel.src, kernel._run = function.__name__, None, run
        kernel.module = kernel.function = kernel.packed_metadata = 0  # is loaded
        return kernel

    @contextlib.contextmanager
    def installed(self):
        """A context in which the backends find this GPU."""
        from triton.runtime import driver, jit

        from vstar_kernels.attention import autograd, triton
        from vstar_kernels.attention.triton import devices

        def compiled(function, key, signature, device, constants, options, *args):
            kernels, *_ = function.device_caches[device]
            kernels[key] = self._compiled(function)
            self.options.append(options)
            return kernels[key]

        search = jit.JITFunction.run

        def run(function, *args, **kwargs):
            self.searched += 1
            return search(function, *args, **kwargs)

        stream = types.SimpleNamespace(cuda_stream=3)
        caches = [
            x
            for name, module in list(sys.modules.items())
            if name.startswith("vstar_kernels.attention.triton")
            for x in vars(module).values()
            if hasattr(x, "cache_clear")
        ]
        with (
            mock.patch.object(driver, "_active", self),
            mock.patch.object(jit.JITFunction, "_do_compile", compiled),
            mock.patch.object(jit.JITFunction, "run", run),
            mock.patch.object(torch.cuda, "_lazy_init", return_value=None),
            mock.patch.object(torch.cuda, "current_device", return_value=0),
            mock.patch.object(torch.cuda, "current_stream", return_value=stream),
            mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=True),
            mock.patch.object(torch.cuda, "get_device_capability", return_value=self.capability),
            mock.patch.object(devices, "CAPTURED", set()),
            mock.patch.object(triton, "interpreted", return_value=False),
            mock.patch.object(triton, "unavailable", list),
            # The mode that is on here is no one's who wants to see operators.
            mock.patch.object(autograd, "traced", return_value=False),
        ):
            try:
                with self:
                    yield self
            finally:
                for function in self._functions:
                    function.device_caches.clear()
                for cache in caches:
                    cache.cache_clear()


def _held(x):
    return x.held if isinstance(x, OnGpu) else x
