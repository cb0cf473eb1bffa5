"""Run with eight devices: compares training on meshes with training on one device, and prints what was found as JSON.

`python tests/eight_devices.py rwkv7 mixed sequence`, with any of the models and meshes below; without meshes, on all.
"""

import json
import os
import sys
from functools import partial

if "device_count" not in os.environ.get("XLA_FLAGS", ""):  # Of a CPU, eight are made.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

import rwkv_jax
from experiments.hlo import collectives
from rwkv_jax import generate, sharding, train
from rwkv_jax.models import module_of
from rwkv_jax.text import get_tokenizer

SIZE = {"vocab_size": 256, "num_layers": 2, "embed_dim": 32, "ffn_dim": 64}
RANKS7 = {"decay_rank": 3, "iclr_rank": 5, "value_rank": 2, "gate_rank": 7}
MODELS = {
    "rwkv4": rwkv_jax.RWKV4Config(**SIZE),
    "rwkv5": rwkv_jax.RWKV5Config(**SIZE, head_dim=8),
    "rwkv6": rwkv_jax.RWKV6Config(**SIZE, head_dim=8, mix_rank=3, decay_rank=5),
    "rwkv7": rwkv_jax.RWKV7Config(**SIZE, head_dim=8, **RANKS7),
    "transformer": rwkv_jax.TransformerConfig(**SIZE, head_dim=8, context_length=64),
}
MESHES = {
    "data": {"data": 8},
    "fsdp": {"data": 1, "fsdp": 8},
    "tensor": {"data": 4, "tensor": 2},
    "sequence": {"data": 1, "sequence": 8},
    "mixed": {"data": 1, "fsdp": 2, "tensor": 2, "sequence": 2},
}
ROWS, TOKENS, STEPS = 8, 32, 20


def run(config, batches, mesh):
    """Returns the first gradient, the losses of all steps, and the compiled step's collectives: executions and bytes."""
    optimizer = optax.chain(optax.trace(decay=0), optax.adam(3e-3, eps=1e-8))  # The trace holds the gradient.
    declaration = module_of(config).declare(config)
    state = train.init_train_state(jax.random.key(0), config, optimizer, mesh=mesh, declaration=declaration)
    step = partial(train.train_step, config=config, optimizer=optimizer, l2wrap=1e-4, accumulate=1, loss_chunk=5)
    step = jax.jit(step, out_shardings=(jax.tree.map(lambda x: x.sharding, state), None))
    compiled = step.lower(state, *on_mesh(mesh, *batches[0])).compile()
    losses, gradient = [], None
    for batch in batches:
        state, metrics = compiled(state, *on_mesh(mesh, *batch))
        losses.append(float(metrics.loss))
        gradient = gradient or jax.tree.map(np.asarray, state.opt_state[0].trace)
    return gradient, losses, collectives(compiled.as_text())


def on_mesh(mesh, *arrays):
    """Arrays [B, T] cut by rows, where there is a mesh."""
    if mesh is None:
        return arrays
    return jax.device_put(arrays, NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))


def greedy(config, params):
    """What is generated after a prompt."""
    sampling = generate.Sampling(temperature=0.0)
    return (
        "".join(generate.stream(params, config, get_tokenizer("bytes"), "a prompt", max_tokens=12, sampling=sampling))
        .encode()
        .hex()
    )


def main(name, *meshes):
    """Compares meshes with one device."""
    config, rng = MODELS[name], np.random.default_rng(0)
    batches = []
    for _ in range(STEPS):
        text = rng.integers(1, 8, (ROWS, TOKENS + 1)).cumsum(1).astype(np.int32) % 256  # Something can be learned.
        batches.append((text[:, :-1], text[:, 1:], rng.random((ROWS, TOKENS)) < 0.06))
    reference = run(config, batches, None)
    norm = float(optax.tree.norm(reference[0]))
    params = rwkv_jax.init(jax.random.key(1), config)
    params = jax.tree.map(lambda x: x + 0.1 * jnp.sin(jnp.arange(x.size).reshape(x.shape)), params)
    text, found = greedy(config, params), {}
    for kind in meshes or MESHES:
        mesh = sharding.make_mesh(sharding.MeshConfig(**MESHES[kind]))
        with jax.set_mesh(mesh):
            gradient, losses, exchanged = run(config, batches, mesh)
            where = sharding.param_shardings(module_of(config).declare(config), config.num_layers, mesh)
            own_text = greedy(config, jax.device_put(params, where))
        difference = jax.tree.map(np.subtract, gradient, reference[0])
        found[kind] = {
            "gradient": float(optax.tree.norm(difference)) / norm,
            "loss": max(abs(a - b) for a, b in zip(losses, reference[1], strict=True)),
            "learned": reference[1][0] - losses[-1],
            "same text": own_text == text,
            "collectives": exchanged,
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
