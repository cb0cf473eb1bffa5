"""What the tests of the scripts share."""

import json
import os
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
