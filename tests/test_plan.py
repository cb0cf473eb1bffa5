"""The planner: collectives read off a program, and a plan of a small run for absent hardware."""

import os
import re
import subprocess
import sys

import pytest
from rwkv_kernels import hardware
from scripts import COMPILING, ROOT

import rwkv_jax
from experiments.hlo import collectives

PROGRAM = """HloModule step

%inner (p: f32[8]) -> f32[8] {
  %all-reduce.1 = f32[8]{0} all-reduce(%p), to_apply=%add
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %all-gather-start = ((f32[2,4]{1,0}, bf16[3]{0}), (f32[8,4]{1,0}, bf16[12]{0})) all-gather-start(%a, %b), dimensions={0}
  %all-gather-done = (f32[8,4]{1,0}, bf16[12]{0}) all-gather-done(%all-gather-start)
  %while.2 = f32[8] while(%x), condition=%c, body=%inner, backend_config={"known_trip_count":{"n":"5"}}
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %collective-permute-start = (f32[16]{0}, f32[16]{0}, u32[], u32[]) collective-permute-start(%p), source_target_pairs={{0,1}}
  %while.1 = (s32[], f32[8]) while(%y), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %reduce-scatter = f32[2]{0} reduce-scatter(%p), channel_id=1, dimensions={0}
  %reduce-scatter.1 = f32[2]{0} reduce-scatter(%q), channel_id=1, dimensions={0}
  %all-to-all.1 = f32[4]{0} all-to-all(%p), channel_id=2, frontend_attributes={chain_id="0"}
  %all-to-all.2 = f32[4]{0} all-to-all(%p), channel_id=2, frontend_attributes={chain_id="0"}
}
"""


def test_collectives_are_counted_with_their_loops_and_results():
    assert collectives(PROGRAM) == {
        "collective-permute": (1, 64),
        "reduce-scatter": (2, 16),
        "all-to-all": (1, 16),
        "all-gather": (3, 3 * (128 + 24)),
        "all-reduce": (15, 15 * 32),
    }


def plan(*arguments):
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.run(
        [sys.executable, str(ROOT / "experiments/plan.py"), *arguments],
        capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip


def test_without_the_compilers_it_says_what_makes_them():
    if hardware.why_not() is None:
        pytest.skip("says that the compilers are missing, and they are here")
    done = plan("--target", "h200:1x8", "--cfg", "experiments/configs/quickstart.toml")
    assert done.returncode == 1 and ".venv-aot/bin/pip install" in done.stderr


STEP = """
import sys
from functools import partial
import jax, numpy as np, optax
import rwkv_jax
from rwkv_jax import train

def status(field):
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])

config = rwkv_jax.RWKV4Config(vocab_size=4096, num_layers=4, embed_dim=256)
optimizer = optax.adam(1e-3)
state = train.init_train_state(jax.random.key(0), config, optimizer)
tokens = jax.numpy.asarray(np.random.default_rng(0).integers(0, 4096, (8, 512)), "int32")
step = jax.jit(partial(train.train_step, config=config, optimizer=optimizer, l2wrap=1e-4), donate_argnums=0)
compiled = step.lower(state, tokens, tokens, None).compile()
memory = compiled.memory_analysis()
jax.block_until_ready(state)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = status("VmRSS")
state = jax.block_until_ready(compiled(state, tokens, tokens, None))
print(memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes, status("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc")
def test_what_the_compiler_says_of_memory_is_what_a_step_takes():
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-c", STEP], capture_output=True, text=True, env=COMPILING | {"PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    planned, taken = map(int, done.stdout.split())
    assert 0.85 < taken / planned < 1.15


@pytest.mark.aot
@pytest.mark.skipif(hardware.why_not() is not None, reason=str(hardware.why_not()))
def test_a_plan_has_the_bytes_of_sharded_parameters_and_a_target_that_is_too_small_gets_advice():
    small = ["--cfg", "experiments/configs/quickstart.toml", "--mesh.fsdp", "8", "--mesh.data", "1"]
    done = plan("--target", "a100:1x8", *small, "--model.embed_dim", "1024")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "fsdp 8" in done.stdout and ": fits" in done.stdout and "all-gather" in done.stdout
    model = rwkv_jax.RWKV4Config(vocab_size=256, num_layers=6, embed_dim=1024)
    (said,) = re.findall(r"  parameters +([\d.]+)\n", done.stdout)
    assert float(said) == pytest.approx(4 * rwkv_jax.count_params(model) / 8 / 2**30, abs=0.006)
    refused = plan("--target", "a100:8", *small)
    assert refused.returncode == 1 and "it must be h200:4x8" in refused.stderr
    large = plan(
        "--target", "v5e:2x2", "--cfg", "experiments/configs/quickstart.toml", "--model.embed_dim", "4096",
        "--model.num_layers", "3", "--model.vocab_size", "65536", "--mesh.data", "4",
        "--optim.loss_chunk", "64", "--model.remat", "block",
    )  # fmt: skip
    assert "does not fit" in large.stdout and "mesh.data=1, mesh.fsdp=4" in large.stdout
