"""The compiled step of a run: what train.py runs and plan.py compiles."""

from functools import partial
from typing import Any

import jax
import optax

from rwkv_jax import config, finetune, train


def make_step(settings: config.Settings, optimizer: optax.GradientTransformation, shardings: Any) -> Any:
    """Returns the jitted `train_step` of a run; the state given to it is used up.

    Args:
        settings: The run's.
        optimizer: Of the state.
        shardings: Where the state's arrays lie, before and after.
    """
    optim = settings.optim
    step = partial(
        train.train_step, config=settings.model, optimizer=optimizer, l2wrap=optim.l2wrap, accumulate=optim.accumulate,
        loss_chunk=optim.loss_chunk, segment=optim.segment, bptt=optim.bptt, backend=settings.run.backend,
        assemble=finetune.assembler(settings.finetune, settings.model),
    )  # fmt: skip
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
