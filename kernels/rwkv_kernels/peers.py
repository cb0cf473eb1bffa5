"""Other libraries' WKV kernels, for `rwkv_kernels.benchmark`: flash-linear-attention's and those that the `rwkv` package builds.

They take torch tensors, in layouts and with decays of their own. torch and the libraries are imported when a peer is used, not before.

Sources: flash-linear-attention 0.6.0, `fla/ops`; rwkv 0.8.32, `cuda/` and `model.py`.
"""

# pyright: reportMissingImports=false
# Neither torch nor the libraries need be installed where types are checked.

import functools
import importlib.metadata
import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

PACKAGES = {"fla": ("torch", "triton", "fla"), "rwkv": ("torch", "setuptools", "rwkv")}
"""The modules that a package's kernels need."""
HEAD_DIM = 64
"""Channels of a head that the `rwkv` package's kernels are built for."""
DECAY_BOUND = -0.6065306597126334
"""The lowest log-decay of RWKV-7, -exp(-0.5): fla's own layer gives it to `chunk_rwkv7`, which allows longer chunks."""


def as_they_are(*tensors: Any) -> tuple[Any, ...]:
    """Returns the tensors: a peer's layout is ours."""
    return tensors


class Peer(NamedTuple):
    """One way in which a package runs an op; inputs and outputs are the leaves of ours, as torch tensors in our shapes."""

    name: str
    """The package, or "package.kernel"."""
    call: Callable[..., tuple[Any, ...]]
    """From the peer's arguments to its outputs: what is timed."""
    convert: Callable[..., tuple[Any, ...]] = as_they_are
    """From our inputs to its arguments, differentiably."""
    back: Callable[..., tuple[Any, ...]] = as_they_are
    """From its outputs to ours, differentiably."""
    no_backward: str | None = None
    """Why it is not timed both ways."""
    dtypes: tuple[str, ...] = ("bfloat16", "float32")
    """Of tokens."""
    one_row: bool = False
    """Whether it takes nothing but a single row of heads of `HEAD_DIM`."""

    @property
    def package(self) -> str:
        """The key in `PACKAGES`."""
        return self.name.split(".")[0]

    def refuses(self, batch_size: int, head_dim: int, dtype: str) -> str | None:
        """Returns why it cannot take a workload, or None where it can."""
        if dtype not in self.dtypes:
            return f"takes tokens in {' or '.join(self.dtypes)}"
        if self.one_row and (batch_size, head_dim) != (1, HEAD_DIM):
            return f"takes one row (B = 1) of heads of {HEAD_DIM}, and this is B = {batch_size} of {head_dim}"
        return None


def why_not(package: str) -> str | None:
    """Returns why a package's kernels cannot run here, with the way out, or None where they can."""
    if missing := [module for module in PACKAGES[package] if importlib.util.find_spec(module) is None]:
        install = " ".join(missing).replace("fla", "flash-linear-attention")
        return f"{', '.join(missing)} not installed; pip install {install}"
    if jax.default_backend() != "gpu":
        return f"JAX runs on a {jax.default_backend()} here; JAX and torch must share an NVIDIA GPU"
    import torch

    if not torch.cuda.is_available():
        return "torch sees no CUDA device; install a torch that is built for this machine's CUDA"
    if package == "rwkv":
        from torch.utils import cpp_extension

        if cpp_extension.CUDA_HOME is None:
            return "no nvcc, which builds its kernels; install the CUDA toolkit of torch's version, or set CUDA_HOME"
        if shutil.which("ninja") is None:
            return "no ninja on the path, which builds its kernels; pip install ninja"
    return None


def versions(package: str) -> dict[str, str]:
    """Returns the versions of a package that can run here and of what it stands on."""
    return {name: importlib.metadata.version("fla-core" if name == "fla" else name) for name in PACKAGES[package]}


def calls(peer: Peer, inputs: Any, device: str) -> dict[str, Callable[[], Any]]:
    """Returns what is timed: a forward call and, where the peer has a derivative, one both ways, on arguments in its own layout."""
    import torch

    with torch.no_grad():
        arguments = [x.contiguous() for x in peer.convert(*tensors(inputs, device))]
        cotangents = [torch.ones_like(x) for x in peer.call(*arguments)]
    leaves = [x.detach().requires_grad_() for x in arguments]

    def forward() -> Any:
        with torch.no_grad():
            return peer.call(*arguments)

    def both() -> Any:
        return torch.autograd.grad(peer.call(*leaves), leaves, cotangents)

    return {"forward": forward} if peer.no_backward else {"forward": forward, "both": both}


def results(peer: Peer, inputs: Any, device: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Returns the leaves of our outputs and of our inputs' gradients for cotangents of 1; no gradients if it has no derivative."""
    import torch

    leaves = [x.requires_grad_() for x in tensors(inputs, device)]
    with torch.set_grad_enabled(peer.no_backward is None):
        outputs = peer.back(*peer.call(*(x.contiguous() for x in peer.convert(*leaves))))
    gradients = () if peer.no_backward else torch.autograd.grad(outputs, leaves, [torch.ones_like(x) for x in outputs])
    return _arrays(outputs), _arrays(gradients)


def tensors(inputs: Any, device: str) -> list[Any]:
    """Returns copies of the leaves of a tree of arrays, as torch tensors."""
    import torch

    def tensor(x: np.ndarray) -> Any:
        low = x.dtype.name == "bfloat16"  # torch does not take numpy's.
        return (torch.from_numpy(x.view(np.int16)).view(torch.bfloat16) if low else torch.from_numpy(x)).to(device)

    return [tensor(np.array(x)) for x in jax.tree.leaves(inputs)]


def _arrays(tensors: Any) -> list[np.ndarray]:
    return [x.detach().float().cpu().numpy() for x in tensors]


def synchronize(result: Any) -> None:
    """Waits for what torch does on the GPU, if it has one."""
    import torch

    del result
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _wkv4_to_fla(k: Any, v: Any, w: Any, u: Any, aa: Any, bb: Any, pp: Any) -> tuple[Any, ...]:
    import torch

    return (-w).log(), u, k, v, torch.stack((aa, bb, pp), 1)[:, :, None]  # Its decay is exp(-exp w).


def _wkv4_from_fla(y: Any, state: Any) -> tuple[Any, ...]:
    return y, *state[:, :, 0].unbind(1)


def _fla_wkv4(*arguments: Any) -> tuple[Any, ...]:
    from fla.ops.rwkv4 import fused_recurrent_rwkv4

    return fused_recurrent_rwkv4(*arguments)


def _fla(op: str, kernel: str, **options: Any) -> Callable[..., tuple[Any, ...]]:
    """fla's kernels of ops with heads: log-decays as ours, the state last and as [key, value]."""

    def call(*arguments: Any) -> tuple[Any, ...]:
        run = getattr(importlib.import_module(f"fla.ops.{op}"), f"{kernel}_{op}")
        return run(*arguments[:-1], scale=1.0, initial_state=arguments[-1], output_final_state=True, **options)

    return call


def _transpose_state(*tensors: Any) -> tuple[Any, ...]:
    """Between a state of [key, value] and one of [value, key], in arguments or outputs."""
    return *tensors[:-1], tensors[-1].mT


def _wkv4_to_rwkv(k: Any, v: Any, w: Any, u: Any, *state: Any) -> tuple[Any, ...]:
    return w, u, k, v, *state


def _wkv6_to_rwkv(r: Any, k: Any, v: Any, w: Any, u: Any, state: Any) -> tuple[Any, ...]:
    return r, k, v, w.exp(), u.to(r.dtype), state.mT


def _wkv7_to_rwkv(r: Any, w: Any, k: Any, v: Any, a: Any, b: Any, state: Any) -> tuple[Any, ...]:
    return r, (-w).log().to(r.dtype), k, v, a, b, state  # Its decay is exp(-exp w), of a w in the tokens' dtype.


def _rwkv_wkv4(w: Any, u: Any, k: Any, v: Any, *state: Any) -> tuple[Any, ...]:
    state = tuple(x.clone() for x in state)  # Its kernels write over the state that they are given.
    y = k.new_empty(k.shape)
    _built("rwkv", ("wrapper.cpp", "operators.cu")).wkv_forward(*k.shape, w, u, k, v, y, *state)
    return y, *state


def _rwkv(library: str, op: str) -> Callable[..., tuple[Any, ...]]:
    """The `rwkv` package's kernels of ops with heads."""

    def call(*arguments: Any) -> tuple[Any, ...]:
        *tokens, state = arguments
        batch_size, num_tokens, num_heads, head_dim = tokens[0].shape
        dtype = {"bfloat16": "bf16", "float32": "fp32"}[str(tokens[0].dtype).removeprefix("torch.")]
        run = getattr(_built(library, (f"{op}_op.cpp", f"{op}.cu")), f"forward_{dtype}")
        state, y = state.clone(), tokens[0].new_empty(tokens[0].shape)
        run(batch_size, num_tokens, num_heads * head_dim, num_heads, state, *tokens, y)
        return y, state

    return call


@functools.cache
def _built(library: str, sources: tuple[str, ...]) -> Any:
    """The functions of a library of the `rwkv` package, which nvcc builds (with the flags of the package's own `model.py`)."""
    import torch
    from torch.utils import cpp_extension

    spec = importlib.util.find_spec("rwkv")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("rwkv is not installed; pip install rwkv")
    folder = Path(spec.origin).parent / "cuda"
    cpp_extension.load(
        name=f"{library}_peer", sources=[str(folder / source) for source in sources], is_python_module=False,
        extra_cflags=["-DDISABLE_CUBLAS_GEMM"],
        extra_cuda_cflags=["--use_fast_math", "-O3", "-Xptxas -O3", "--extra-device-vectorization", f"-D_N_={HEAD_DIM}"],
    )  # fmt: skip
    return getattr(torch.ops, library)


_INFERENCE = "its kernels are for inference"
PEERS: dict[str, list[Peer]] = {
    "wkv4": [
        Peer("fla.recurrent", _fla_wkv4, _wkv4_to_fla, _wkv4_from_fla),
        Peer("rwkv", _rwkv_wkv4, _wkv4_to_rwkv, no_backward=_INFERENCE, dtypes=("float32",)),
    ],
    "wkv6": [
        Peer("fla.chunk", _fla("rwkv6", "chunk")),
        Peer(
            "fla.recurrent", _fla("rwkv6", "fused_recurrent"),
            no_backward="its backward pass leaves out the final state's cotangent",
        ),
        Peer("rwkv", _rwkv("rwkv6", "rwkv6"), _wkv6_to_rwkv, _transpose_state, _INFERENCE, one_row=True),
    ],
    "wkv7": [
        Peer(
            "fla.chunk", _fla("rwkv7", "chunk", safe_gate=True, lower_bound=DECAY_BOUND, chunk_size=64),
            _transpose_state, _transpose_state,
        ),
        Peer(
            "fla.recurrent", _fla("rwkv7", "fused_recurrent"), _transpose_state, _transpose_state,
            no_backward="it has no backward pass",
        ),
        Peer("rwkv", _rwkv("wkv7s", "rwkv7"), _wkv7_to_rwkv, no_backward=_INFERENCE, one_row=True),
    ],
}  # fmt: skip
"""The peers of each op."""
