"""What the configs of all versions share."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of an official checkpoint's tensors, by key."""

Tokenizer = Literal["bytes", "20b", "world"]
TOKENIZERS: dict[int, Tokenizer] = {
    256: "bytes",
    50277: "20b",
    50304: "20b",
    50432: "20b",
    50688: "20b",
    65536: "world",
}
"""Tokenizer by the vocabulary sizes of released models."""


@dataclass(frozen=True)
class ModelConfig:
    """The size of a model and how it computes."""

    implied_by_shapes: ClassVar[bool] = True
    """Whether the shapes of a checkpoint's tensors say all that the config does of the model."""
    reference_backend: ClassVar[str | None] = "scan"
    """The backend that the others are held against; none where there is nothing to choose."""

    architecture: str = ""
    """Which model this is."""
    vocab_size: int = 50277
    """Rows of the embedding and of the head (256 for bytes, 50277 or 50304 for 20B, 65536 for World)."""
    num_layers: int = 12
    """Blocks, each of a time mix and a channel mix."""
    embed_dim: int = 768
    """Width of the residual stream (channels)."""
    ffn_dim: int | None = None
    """Hidden width of the channel mix; none: the version's own multiple of embed_dim."""
    embed_init: float = 1e-4
    """Bound of the uniform initialisation of the embedding; RWKV-4 upstream uses the initial learning rate."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What activations and matrix products are computed in; normalisation, WKV and logits are always float32."""
    remat: Literal["block", "elementwise", "none"] = "block"
    """What the backward pass recomputes instead of storing: every block from its input (least memory), all but the matrix
    products (fastest on CPU), or nothing."""
    tokenizer: Tokenizer | None = None
    """The tokenizer that the model was trained with; none: not known."""

    def __post_init__(self):
        for name in ("vocab_size", "num_layers", "embed_dim", "ffn_dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"model.{name} is {value}; it must be at least 1")
        if self.embed_init <= 0:
            raise ValueError(f"model.embed_init is {self.embed_init}; it must be positive")


def rounded_width(embed_dim: int, multiple: int | float, step: int) -> int:
    """Returns multiple * embed_dim rounded down to a multiple of `step`, which it is at least."""
    return max(int(multiple * embed_dim) // step * step, step)


def common_fields(shapes: Shapes, ffn_multiple: int | float, ffn_step: int = 1) -> dict[str, Any]:
    """Returns the fields of a config that every version's official checkpoint shows alike.

    Args:
        shapes: The checkpoint's.
        ffn_multiple: The version's own hidden width of the channel mix, in multiples of embed_dim.
        ffn_step: What that is rounded down to a multiple of.

    Raises:
        ValueError: emb.weight or the channel mix's key is missing or not a matrix.
    """
    for key in ("emb.weight", "blocks.0.ffn.key.weight"):
        if len(shapes.get(key, ())) != 2:
            raise ValueError(f"{key} is {shapes.get(key, 'missing')}; it must be a matrix")
    vocab_size, embed_dim = shapes["emb.weight"]
    ffn_dim = shapes["blocks.0.ffn.key.weight"][0]
    layers = {int(match[1]) for key in shapes if (match := re.match(r"blocks\.(\d+)\.", key))}
    # A gap is a missing layer, but not a gap that is longer than the rest of the model.
    highest = max(layer for i, layer in enumerate(sorted(layers)) if layer <= 2 * i)
    return {
        "vocab_size": vocab_size,
        "num_layers": highest + 1,
        "embed_dim": embed_dim,
        "ffn_dim": None if ffn_dim == rounded_width(embed_dim, ffn_multiple, ffn_step) else ffn_dim,
        "tokenizer": TOKENIZERS.get(vocab_size),
    }
