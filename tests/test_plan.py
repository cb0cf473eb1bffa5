"""The planner: collectives read off a program, and a plan of a small run for absent hardware."""

import os
import subprocess
import sys

import pytest
from rwkv_kernels import hardware
from scripts import ROOT

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
  %reduce-scatter = f32[2]{0} reduce-scatter(%p), dimensions={0}
}
"""


def test_collectives_are_counted_with_their_loops_and_results():
    assert collectives(PROGRAM) == {
        "collective-permute": (1, 64),
        "reduce-scatter": (1, 8),
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
        pytest.skip("the compilers are here")
    done = plan("--target", "h200:1x8", "--cfg", "experiments/configs/quickstart.toml")
    assert done.returncode == 1 and ".venv-aot/bin/pip install" in done.stderr


@pytest.mark.aot
@pytest.mark.skipif(hardware.why_not() is not None, reason=str(hardware.why_not()))
def test_a_plan_has_the_bytes_of_sharded_parameters_and_a_target_that_is_too_small_gets_advice():
    small = ["--cfg", "experiments/configs/quickstart.toml", "--mesh.fsdp", "8", "--mesh.data", "1"]
    done = plan("--target", "a100:1x8", *small, "--model.embed_dim", "1024")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "fsdp 8" in done.stdout and ": fits" in done.stdout and "all-gather" in done.stdout
    refused = plan("--target", "a100:8", *small)
    assert refused.returncode == 1 and "it must be h200:4x8" in refused.stderr
    large = plan(
        "--target", "v5e:2x2", "--cfg", "experiments/configs/quickstart.toml", "--model.embed_dim", "4096",
        "--data.context_length", "4096", "--model.vocab_size", "65536", "--mesh.data", "4",
    )  # fmt: skip
    assert "does not fit" in large.stdout and "mesh.data=1, mesh.fsdp=4" in large.stdout
