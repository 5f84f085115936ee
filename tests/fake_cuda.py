"""CUDA tensors without a GPU: shapes, dtypes, devices and host syncs of the CUDA paths, no values.

    with fake_cuda() as gpu:
        model = fake_model(config)       # on device "cuda"
        ...                              # gpu.syncs: where the host would have waited for the GPU

FakeTensorMode computes shapes only. Where a value is needed, we note the place and go on with 1 or
True. Attention is replaced by functions that check what the real kernels demand of their arguments,
and return the strides that they return.
"""
import contextlib
import ctypes
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.cuda.amp.common
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lib.flex
import model
import sample

ROOT = Path(__file__).resolve().parents[1]
aten = torch.ops.aten

# A torch without CUDA refuses the device "cuda" for want of this class, which does nothing.
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
using Guard = c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>;
static Guard guard;
static c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CUDA, &guard);
"""


def load_guard() -> None:
    if torch.backends.cuda.is_built():
        return
    if shutil.which("g++") is None:
        pytest.skip("no g++ to build the device guard with")
    library = Path(tempfile.gettempdir()) / f"fake-cuda-guard-{torch.__version__}.so"
    if not library.exists():
        home = Path(torch.__file__).parent
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            built = Path(folder) / "guard.so"
            subprocess.run(["g++", "-x", "c++", "-", "-shared", "-fPIC", "-std=c++20",
                            f"-I{home / 'include'}", f"-L{home / 'lib'}", "-lc10", "-o", built],
                           input=GUARD, text=True, check=True)
            built.replace(library)
    ctypes.CDLL(str(library))


class Gpu(TorchDispatchMode):
    """Notes every place that needs a value of a CUDA tensor, and answers with 1 or True."""

    def __init__(self):
        super().__init__()
        self.syncs = []
        self.calls = []
        self.cast = []  # shapes of what was copied into another dtype

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket._qualified_op_name.removeprefix("aten::")
        on_cuda = any(x.is_cuda for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor))
        if not on_cuda:
            return func(*args, **(kwargs or {}))
        self.calls.append(name)
        if name == "_to_copy" and "dtype" in (kwargs or {}):
            self.cast.append(tuple(args[0].shape))
        if name == "_local_scalar_dense":
            self.syncs.append(place())
            return 1.0 if args[0].dtype.is_floating_point else 1
        if name == "nonzero":
            self.syncs.append(place())
            return args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.long)
        if name in ("index", "index_put_", "index_put", "_index_put_impl_"):
            index = []
            for part in args[1]:
                if part is not None and part.dtype == torch.bool:
                    self.syncs.append(place())
                    index += [torch.zeros(part.numel(), dtype=torch.long, device=part.device)
                              for _ in range(part.dim())]
                else:
                    index.append(part)
            args = (args[0], index, *args[2:])
        return func(*args, **(kwargs or {}))


def place() -> str:
    """The function of this project that is running."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and path.parent.name != "tests" and ".venv" not in path.parts:
            return f"{path.stem}.{frame.f_code.co_name}"
        frame = frame.f_back
    return "?"


def check_heads(q, k, v):
    assert q.is_cuda and q.device == k.device == v.device
    assert q.dtype == k.dtype == v.dtype and not torch.is_autocast_enabled("cuda")


def sdpa(q, k, v, attn_mask=None, is_causal=False, enable_gqa=False):
    """Flash without a mask, in bf16; else the memory-efficient kernel, which shares no kv heads."""
    assert attn_mask is None or attn_mask.is_cuda and attn_mask.dtype == torch.bool
    with torch.autocast("cuda", enabled=False):
        check_heads(q, k, v)
    if attn_mask is not None or q.dtype == torch.float32:
        assert q.shape[1] == k.shape[1], "needs repeated kv heads"
    assert q.shape[2] * k.shape[2] < 2**20 or attn_mask is None, "a mask as large as the scores"
    B, H, T, D = q.shape
    return q.new_empty(B, T, H, D).transpose(1, 2)


def flex(q, k, v, block_mask, enable_gqa):
    check_heads(q, k, v)
    assert enable_gqa and block_mask.kv_indices.is_cuda and q.shape[2] == k.shape[2]
    return torch.empty_like(q)


@contextlib.contextmanager
def fake_cuda():
    load_guard()
    with contextlib.ExitStack() as stack:
        for owner, name, value in (
                (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
                (torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True),
                (F, "scaled_dot_product_attention", sdpa),
                (lib.flex, "flex_attention", flex),
                (lib.flex, "compiled", lambda fn, dynamic: fn),
                (sample, "rng", lambda *key, device: None),
                # Not cached: other tests must not get a fake tensor.
                (model, "rope_frequencies", model.rope_frequencies.__wrapped__)):
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield stack.enter_context(Gpu())


def fake_model(kind, config):
    """A model of this class with float32 weights on the fake GPU, whose values nobody draws."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.device("cuda"))
        stack.enter_context(mock.patch.object(kind, "init_weights", lambda self: None))
        for name in ("uniform_", "normal_"):
            draw = mock.patch.object(torch.Tensor, name, lambda self, *args, **kwargs: self)
            stack.enter_context(draw)
        return kind(config)
