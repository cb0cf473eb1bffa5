"""From text to batches: tokenizers, corpora, the token cache and batches."""

from .batches import Batch, EvalBatch, train_batches, validation_batches
from .binidx import read_binidx, write_binidx
from .cache import TokenStream, tokenise
from .config import DataConfig, Streams, load_streams
from .tokenizers import StreamDecoder, Tokenizer, decode, decode_bytes, get_tokenizer

__all__ = [
    "Batch",
    "DataConfig",
    "EvalBatch",
    "StreamDecoder",
    "Streams",
    "TokenStream",
    "Tokenizer",
    "decode",
    "decode_bytes",
    "get_tokenizer",
    "load_streams",
    "read_binidx",
    "tokenise",
    "train_batches",
    "validation_batches",
    "write_binidx",
]
