"""Our exports in other programs, each in a process of its own, as they read settings from the environment when imported."""

import subprocess
import sys

import numpy as np
import pytest
from checkpoint_files import needs

import rwkv_jax

TOLERANCE = 1e-4
"""Absolute, on float32 logits."""
TOKENS = 60
TRANSFORMERS = """
import sys, numpy as np, torch, transformers
model, report = transformers.RwkvForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not report["missing_keys"] and not report["unexpected_keys"], report
tokens = torch.tensor(np.load(sys.argv[2])[None])
with torch.no_grad():
    np.save(sys.argv[3], model.train()(tokens).logits[0].numpy())  # In train mode it does not rescale its weights.
"""
RWKV = """
import os, sys, numpy as np
os.environ |= {"RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0", "RWKV_V7_ON": sys.argv[4]}
from rwkv.model import RWKV
path = sys.argv[1].removesuffix(".pth") if sys.argv[4] == "1" else sys.argv[1]
logits, _ = RWKV(model=path, strategy="cpu fp32").forward(np.load(sys.argv[2]).tolist(), None)
np.save(sys.argv[3], logits.float().numpy())
"""


def run(program, exported, expected, tmp_path, *arguments):
    """The other program's logits after the first tokens of a reference."""
    np.save(tmp_path / "tokens.npy", expected["tokens"][:TOKENS].astype(np.int64))
    files = [str(exported), str(tmp_path / "tokens.npy"), str(tmp_path / "logits.npy")]
    command = [sys.executable, "-c", program, *files, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return np.load(tmp_path / "logits.npy")


@pytest.mark.slow
def test_transformers_runs_our_folder_of_rwkv4(shared, tmp_path):
    needs("torch", "transformers")
    rwkv_jax.save(tmp_path / "folder", *rwkv_jax.load(shared / "reference/synthetic-rwkv-4v0.safetensors"))
    expected = np.load(shared / "reference/expected-synthetic-4v0.npz")
    logits = run(TRANSFORMERS, tmp_path / "folder", expected, tmp_path)
    np.testing.assert_allclose(logits, expected["logits"][:TOKENS], rtol=0, atol=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["synthetic-4v0", "synthetic-5v2", "synthetic-6v0", "synthetic-7v0"])
def test_the_rwkv_package_runs_our_pth(name, shared, tmp_path):
    needs("torch", "rwkv")
    source = shared / f"reference/{name.replace('-', '-rwkv-')}.safetensors"
    rwkv_jax.save(tmp_path / "m.pth", *rwkv_jax.load(source))
    expected = np.load(shared / f"reference/expected-{name}.npz")
    logits = run(RWKV, tmp_path / "m.pth", expected, tmp_path, "1" if "7v0" in name else "0")
    np.testing.assert_allclose(logits, expected["logits"][TOKENS - 1], rtol=0, atol=TOLERANCE)
