"""flash-linear-attention's kernels in Triton's interpreter, on torch's CPU tensors, by the adapters of `rwkv_kernels.peers`.

`TRITON_INTERPRET=1 python tests/peers_interpreter.py` prints a line of JSON for each kernel and dtype: the errors of its outputs and
gradients against the scan, and the benchmark's rows. What differs from a GPU: no configuration is timed, the first is taken, and a
loop's counter is given the `to` that Triton's compiler gives it. The chunked kernels are left out in bfloat16, whose products of
matrices that interpreter gets wrong (Triton 3.9 multiplies the bits).
"""

# pyright: reportMissingImports=false

import builtins
import importlib
import itertools
import json
import sys
from functools import partial

import jax
import jax.numpy as jnp
from rwkv_kernels import benchmark, numerics, peers

SHAPE = benchmark.Shape(2, 40, 32, 16)


class Counter(int):
    def to(self, dtype):
        del dtype
        return self


def adapt_to_the_interpreter():
    from triton.runtime.autotuner import Autotuner

    Autotuner._bench = lambda *args, **kwargs: [0.0, 0.0, 0.0]
    for op in ("rwkv4", "rwkv6", "rwkv7"):
        importlib.import_module(f"fla.ops.{op}")
    for name, module in [*sys.modules.items()]:
        if name.startswith("fla.ops."):
            module.range = lambda *bounds: map(Counter, builtins.range(*bounds))


def main():
    adapt_to_the_interpreter()
    for op, known in peers.PEERS.items():
        for peer, dtype in itertools.product(known, ("float32", "bfloat16")):
            if peer.package != "fla" or (peer.name, dtype) == ("fla.chunk", "bfloat16"):
                continue
            inputs = benchmark.make(op, SHAPE, dtype)
            wide = jax.tree.map(lambda x: x.astype(jnp.float32), inputs)
            exact = benchmark.outputs_and_gradients(partial(benchmark.OPS[op][0], backend="scan"), wide)
            actual = peers.results(peer, inputs, "cpu")
            outputs, gradients = (
                [numerics.relative_error(*pair) for pair in zip(ours, jax.tree.leaves(true), strict=True)]
                if ours
                else []
                for ours, true in zip(actual, exact, strict=True)
            )
            rows = benchmark.measure_peer(op, peer, SHAPE, dtype, 0.0, "cpu")
            case = {"op": op, "peer": peer.name, "dtype": dtype}
            print(json.dumps({**case, "outputs": outputs, "gradients": gradients, "rows": rows}), flush=True)


if __name__ == "__main__":
    main()
