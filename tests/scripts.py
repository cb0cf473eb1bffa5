"""What the tests of the scripts share."""

import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMPILING = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
"""An environment in which a resumed run compiles its step itself, as a user's does, and must get the same bits."""


def rows(folder, name="metrics.jsonl"):
    """What a run has logged."""
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def losses(folder):
    """What two runs must have alike, bit for bit."""
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows(folder)]


STEPS = 40


def command(corpus, folder, *overrides):
    """The command of a run of STEPS steps on a folder of texts, its config written beside the run's folder."""
    config = folder.parent / "tiny.toml"
    config.write_text(
        f"""
[model]
vocab_size = 256
num_layers = 2
embed_dim = 16
[data]
source = "text"
path = {json.dumps(str(corpus))}
validation_fraction = 0.2
cache_dir = {json.dumps(str(folder.parent / "cache"))}
context_length = 32
batch_size = 4
documents = "packed"
[optim]
lr = 1e-2
lr_final = 1e-3
[run]
folder = {json.dumps(str(folder))}
steps = {STEPS}
validate_every = 10
checkpoint_every = 5
peak_tflops = 1.0
"""
    )
    return [sys.executable, str(ROOT / "experiments/train.py"), "--cfg", str(config), *overrides]
