"""Trains a language model: `python experiments/train.py --cfg experiments/configs/quickstart.toml`.

The run's folder holds everything; the same command continues it. Any field of the config can be overridden, for example
`--model.num_layers 4 --run.folder runs/small`; `--help` lists them all. `--init_from PATH` starts from a trained model.
"""

import launch

if __name__ == "__main__":
    launch.with_tuned_malloc()  # Before the imports that take seconds.

import math
from typing import Any

import loop
import numpy as np
from jax.sharding import Mesh
from report import bits_per_byte, report, second_held_out

from rwkv_jax import config, distributed, text


def prepare(settings: config.Settings, mesh: Mesh, rows: np.ndarray) -> loop.Work:
    """Returns a run's text, as the loop takes it; arguments as in `loop.Prepare`."""
    if settings.questions.task is not None:
        raise config.ConfigError(
            f"questions.task is {settings.questions.task!r}, and train.py trains on text; use experiments/finetune_qa.py"
        )
    data, limit = settings.data, settings.run.validation_tokens
    streams = distributed.main_first(lambda: text.load_streams(data))
    tunes = settings.finetune.init_from is not None
    other = distributed.main_first(lambda: second_held_out(settings)) if tunes else None
    batches = text.train_batches(
        streams.train, context_length=data.context_length, batch_size=data.batch_size, seed=data.seed,
        documents=data.documents, carry=data.carry, rows=rows,
    )  # fmt: skip

    def arguments(batch: text.Batch) -> dict[str, Any]:
        return {
            "inputs": batch.inputs,
            "targets": batch.targets,
            "reset": batch.reset if data.documents == "packed" or data.carry else None,
            "length": batch.length if data.documents == "rows" else None,
        }

    return loop.Work(
        description=f"{len(streams.train.tokens) / 1e6:.2f}M training tokens",
        identity=streams.train.identity,
        tokenizer=streams.tokenizer,
        batches=batches,
        arguments=arguments,
        bits_per_nat=len(streams.train.tokens) / streams.train.num_bytes / math.log(2),
        validate=lambda params, start: bits_per_byte(params, start, settings, streams.validation, limit),
        report=lambda params, start: report(params, start, settings, streams, other, mesh),
    )


if __name__ == "__main__":
    loop.main("train.py", prepare)
