"""What the configs of all versions share."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ModelConfig:
    """The size of a model and how it computes."""

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
    tokenizer: Literal["bytes", "20b", "world"] | None = None
    """The tokenizer that the model was trained with; none: not known."""

    def __post_init__(self):
        for name in ("vocab_size", "num_layers", "embed_dim", "ffn_dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"model.{name} is {value}; it must be at least 1")
        if self.embed_init <= 0:
            raise ValueError(f"model.embed_init is {self.embed_init}; it must be positive")
