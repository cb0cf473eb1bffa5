"""What the tests of the scripts share."""

import contextlib
import importlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import generate
import loop

ROOT = Path(__file__).parents[1]
COMPILING = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
"""An environment in which a resumed run compiles its step itself, as a user's does, and must get the same bits."""


def rows(folder, name="metrics.jsonl"):
    """What a run has logged."""
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def losses(folder):
    """What two runs must have alike, bit for bit."""
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows(folder)]


def run_here(folder, script, *arguments):
    """A script of experiments in this process, which spares its imports; what `subprocess.run` gives of it in a folder.

    What would end the script with a traceback is raised.
    """
    module, out, err, status = importlib.import_module(script.removesuffix(".py")), io.StringIO(), io.StringIO(), 0
    main = generate.main if module is generate else lambda: loop.main(script, module.prepare)
    with (
        mock.patch.object(sys, "argv", [script, *arguments]), contextlib.chdir(folder),
        contextlib.redirect_stdout(out), contextlib.redirect_stderr(err),
    ):  # fmt: skip
        try:
            main()
        except SystemExit as end:
            status = end.code or 0
    return subprocess.CompletedProcess([script, *arguments], status, out.getvalue(), err.getvalue())


STEPS = 40


def arguments(corpus, folder, *overrides):
    """Those of train.py for a run of STEPS steps on a folder of texts, its config written beside the run's folder."""
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
validation_tokens = 500
checkpoint_every = 5
peak_tflops = 1.0
"""
    )
    return ["--cfg", str(config), *overrides]


def command(corpus, folder, *overrides):
    """The command of such a run."""
    return [sys.executable, str(ROOT / "experiments/train.py"), *arguments(corpus, folder, *overrides)]
