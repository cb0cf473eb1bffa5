"""The study of inference cost: what is generated with a doubled cache, sizes, settings, and the script as a user runs it."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import inference_cost
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import study
from inference_cost import CostConfig, model_config
from scripts import ROOT
from small_models import forward

import rwkv_jax


@pytest.mark.parametrize("size", ["12x768x50277", "6x256x256", "4x128x256"])
def test_the_models_of_a_size_have_equally_many_parameters(size):
    layers, width, vocab_size = map(int, size.split("x"))
    published = (
        2 * vocab_size * width + 13 * width**2 * layers + width * (11 * layers + 4)
    )  # arXiv 2305.13048, appendix B
    for name in ("rwkv4", "rwkv7", "transformer"):
        assert abs(rwkv_jax.count_params(model_config(name, size, 64, "float32")) / published - 1) < 0.02


def test_a_doubled_cache_gives_what_a_whole_one_does():
    whole = rwkv_jax.TransformerConfig(vocab_size=32, num_layers=2, embed_dim=32, head_dim=16, context_length=16)
    small = replace(whole, context_length=8)
    params = rwkv_jax.init(jax.random.key(0), whole)
    params = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(jax.random.key(x.size), x.shape), params)
    tokens = jax.random.randint(jax.random.key(1), (1, 16), 0, 32)
    expected = forward(params, whole, tokens)[0]
    first, state = forward(params, small, tokens[:, :8], rwkv_jax.init_state(small, 1))
    rest, _ = forward(params, whole, tokens[:, 8:], inference_cost.with_room(state, 16))
    np.testing.assert_allclose(jnp.concatenate([first, rest], 1), expected, atol=1e-5)
    assert (
        np.abs(rest - forward(params, whole, tokens[:, 8:])[0]).max() > 0.01
    )  # What stands in the first room matters.


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sizes": ("12x768",)}, "LAYERSxWIDTHxVOCABULARY"),
        ({"lengths": (64, 128)}, "2 lengths for 1 sizes"),
        ({"lengths": (100,)}, "multiple of cost.block, 16"),
        ({"prompts": (0,)}, "must be at least 1"),
    ],
)
def test_what_cannot_be_measured_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        CostConfig(**values)


@pytest.mark.slow
def test_the_study_measures_each_cell_once_in_a_process_of_its_own(tmp_path):
    config = ROOT / "experiments/configs/inference_cost_smoke.toml"
    command = [
        sys.executable,
        str(ROOT / "experiments/inference_cost.py"),
        "--cfg",
        str(config),
        "--study.folder",
        "cost",
    ]

    def run(*overrides):
        env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
        done = subprocess.run([*command, *overrides], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout, json.loads((tmp_path / "cost/inference_cost.json").read_text())

    shown, row = run("--study.seeds", "[0]")
    assert (tmp_path / "cost/inference_cost.png").read_bytes()[:4] == b"\x89PNG"
    assert "not resolved" in shown  # One repeat resolves nothing.
    cells = {path.name: path.read_bytes() for path in (tmp_path / "cost/cells").iterdir()}
    results = {name: cell["result"] for name, cell in row["cells"].items()}
    rwkv, transformer = (results[f"{name}-1x64x256-float32-seed0"] for name in ("rwkv4", "transformer-doubled"))
    assert len(rwkv["seconds"]) == 128 / 16 and min(rwkv["seconds"]) > 0 and rwkv["prompt_seconds"]["16"] > 0
    assert set(rwkv["state_bytes"]) == {5 * 64 * 4}  # Two token shifts and the WKV's three, of one layer.
    assert transformer["state_bytes"] == [(2 * room * 64 + 1) * 4 for room in [64] * 4 + [128] * 4]
    assert rwkv["peak_bytes"] == sorted(rwkv["peak_bytes"]) and rwkv["peak_bytes"][0] > 4 * rwkv["parameters"]

    shown, row = run("--cost.models", '["rwkv4"]')  # With the config's two repeats, of which one is there.
    kept = {path.name: path.read_bytes() for path in (tmp_path / "cost/cells").iterdir()}
    assert len(kept) == 3 and all(kept[name] == content for name, content in cells.items())
    totals = [sum(cell["result"]["seconds"]) for cell in row["cells"].values()]
    mean = study.estimate(totals, 0.95).mean
    assert len(totals) == 2 and f"{mean:.3g} ± " in shown
