"""What text to train on, and how it is cut into batches."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from . import corpora
from .binidx import binidx_paths, read_binidx
from .cache import TokenStream, check_tokens, count_bytes, tokenise
from .tokenizers import Tokenizer, TokenizerName, get_tokenizer


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it is batched."""

    source: Literal["stdlib", "text", "jsonl", "tfds", "huggingface", "binidx"] = "stdlib"
    """Python's standard library; text files; lines of JSON; TensorFlow Datasets; Hugging Face's datasets library; Megatron's
    tokenised .bin and .idx."""
    path: str | None = None
    """A file, a folder or a glob (text, jsonl), or the prefix of a .bin and .idx (binidx)."""
    validation_path: str | None = None
    """Held-out text, as path; none: documents of path are held out."""
    validation_fraction: float = 0.05
    """Share of documents held out, whole, by a hash of their names (binidx: the last ones)."""
    byte_split: tuple[int, ...] | None = None
    """Bytes of the training, held-out and test parts of a file, from its start, the last being optional (text); none: as above."""
    text_key: str = "text"
    """Field that holds the text (jsonl, tfds, huggingface)."""
    tfds_name: str | None = None
    """Name of the dataset, such as lm1b or wikipedia/20230601.en (tfds)."""
    tfds_split: str = "train"
    """Split to train on (tfds)."""
    tfds_validation_split: str | None = None
    """Held-out split (tfds); none: examples of tfds_split are held out."""
    tfds_data_dir: str | None = None
    """Where the dataset lies or is put (tfds); none: TFDS's own folder."""
    hub_name: str | None = None
    """Name of the data set, such as allenai/sciq, or a folder of files (huggingface)."""
    hub_subset: str | None = None
    """Its subset, such as ARC-Easy of allenai/ai2_arc, if it has some (huggingface)."""
    hub_split: str = "train"
    """Split to train on (huggingface)."""
    hub_validation_split: str | None = None
    """Held-out split (huggingface); none: examples of hub_split are held out."""
    tokenizer: TokenizerName = "bytes"
    """bytes (ids 0 to 255), 20b (RWKV-4's Pile models) or world (RWKV-5 and later)."""
    tokenizer_file: str | None = None
    """Vocabulary; none: pip's pyrwkv-tokenizer (world) or huggingface_hub (20b)."""
    cache_dir: str = "~/.cache/rwkv_jax"
    """Where tokenised text is kept."""
    context_length: int = 256
    """Tokens a sequence."""
    batch_size: int = 8
    """Sequences an update, over all devices and accumulated parts."""
    documents: Literal["stream", "packed", "rows"] = "stream"
    """stream: windows run on through documents; packed: the state is reset where a document starts; rows: one document a row,
    padded, longer ones in pieces."""
    carry: bool = False
    """Rows walk on through the text, each from the state in which the one before it ended; false: shuffled windows, each from zero."""
    seed: int = 0
    """Of the order of windows."""

    def __post_init__(self):
        for name in ("context_length", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"data.seed is {self.seed}; it must be 0 to 2**31 - 1")
        if self.carry and self.documents == "rows":
            raise ValueError(
                "data.carry goes on through the text, and data.documents='rows' starts every row anew; choose one"
            )
        if self.byte_split is not None and (len(self.byte_split) not in (2, 3) or min(self.byte_split) < 1):
            raise ValueError(
                f"data.byte_split is {self.byte_split}; it must be two or three numbers of bytes, each at least 1"
            )
        if self.byte_split is not None and (self.source != "text" or self.validation_path is not None):
            raise ValueError(
                "data.byte_split cuts the file of data.path: it needs data.source='text' and no data.validation_path"
            )
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"data.validation_fraction is {self.validation_fraction}; it must be between 0 and 1")


class Streams(NamedTuple):
    """The text of a run."""

    tokenizer: Tokenizer
    train: TokenStream
    validation: TokenStream
    validation_bytes: Callable[[], bytes | None]
    """Gives the held-out text without separators; None where it is known as tokens only."""
    test: TokenStream | None = None
    """A second held-out text, which is read at the end only."""


def load_streams(config: DataConfig) -> Streams:
    """Returns the tokenizer and both sides of the text, tokenised if they are not yet.

    Raises:
        ValueError, OSError: There is no text, no vocabulary, or a file is not what it should be.
    """
    tokenizer = get_tokenizer(config.tokenizer, config.tokenizer_file)
    if config.source == "binidx":
        _check_source(config)
        return _binidx_streams(config, tokenizer)
    parts = load_corpora(config)
    train = tokenise(parts[0], tokenizer, config.cache_dir, "training text")
    validation = tokenise(parts[1], tokenizer, config.cache_dir, "held-out text")
    test = tokenise(parts[2], tokenizer, config.cache_dir, "test text") if len(parts) > 2 else None

    def validation_bytes() -> bytes:
        texts = (document.text for document in parts[1].documents())
        return b"".join(text.encode() if isinstance(text, str) else text for text in texts)

    return Streams(tokenizer, train, validation, validation_bytes, test)


def load_corpora(config: DataConfig) -> Sequence[corpora.Corpus]:
    """Returns the documents to train on, those held out and, of three parts of bytes, the test's; tokens alone (binidx) have none.

    Raises:
        ValueError, OSError: There is no text, or a file is not what it should be.
    """
    _check_source(config)
    if config.source == "binidx":
        raise ValueError("data.source='binidx' has tokens and no documents; give text")
    splits = {
        "tfds": (config.tfds_split, config.tfds_validation_split),
        "huggingface": (config.hub_split, config.hub_validation_split),
    }
    place, held_out_place = splits.get(config.source, (config.path, config.validation_path))
    whole = _corpus(config, place)
    if config.byte_split is not None:
        assert isinstance(whole, corpora.TextFiles)
        return whole.pieces(config.byte_split)
    if held_out_place is None:
        return corpora.split(whole, config.validation_fraction)
    return whole, _corpus(config, held_out_place)


def _check_source(config: DataConfig) -> None:
    needs = {"text": "path", "jsonl": "path", "binidx": "path", "tfds": "tfds_name", "huggingface": "hub_name"}
    if (needed := needs.get(config.source)) is not None and not getattr(config, needed):
        raise ValueError(f"data.source={config.source!r} needs data.{needed}")
    held_out = {
        "validation_path": ("text", "jsonl", "binidx"),
        "tfds_validation_split": ("tfds",),
        "hub_validation_split": ("huggingface",),
    }
    for name, sources in held_out.items():
        if getattr(config, name) is not None and config.source not in sources:
            *others, last = sources
            of = f"{', '.join(others)} and {last}" if others else last
            raise ValueError(f"data.{name} is for {of}; data.source={config.source!r} has none")


def _corpus(config: DataConfig, place: str | None) -> corpora.Corpus:
    """The documents at a place, which is a path or a split's name."""
    if config.source == "stdlib":
        return corpora.standard_library()
    assert place is not None
    if config.source == "tfds":
        assert config.tfds_name is not None
        return corpora.TfdsSource(config.tfds_name, place, config.tfds_data_dir, config.text_key)
    if config.source == "huggingface":
        assert config.hub_name is not None
        return corpora.HubDataset(config.hub_name, config.hub_subset, place, config.text_key)
    return corpora.text_files(place) if config.source == "text" else corpora.json_lines(place, config.text_key)


def _binidx_streams(config: DataConfig, tokenizer: Tokenizer) -> Streams:
    assert config.path is not None
    tokens, starts = read_binidx(config.path)
    if config.validation_path is not None:
        sides = ((config.path, 0, tokens, starts), (config.validation_path, 0, *read_binidx(config.validation_path)))
    else:
        first = int(len(starts) * (1 - config.validation_fraction))
        if not 0 < first < len(starts):
            raise ValueError(
                f"{config.path}: {len(starts)} documents do not split by data.validation_fraction="
                f"{config.validation_fraction} into two parts; give data.validation_path"
            )
        cut = int(starts[first])
        sides = ((config.path, 0, tokens[:cut], starts[:first]), (config.path, cut, tokens[cut:], starts[first:] - cut))
    train, validation = (_binidx_stream(*side, tokenizer, Path(config.cache_dir).expanduser()) for side in sides)
    return Streams(tokenizer, train, validation, validation_bytes=lambda: None)


def _binidx_stream(
    path: str, offset: int, tokens: np.ndarray, starts: np.ndarray, tokenizer: Tokenizer, cache_dir: Path
) -> TokenStream:
    """The tokens from `offset` on. They are read through once, to check them and to count the bytes they stand for."""
    file = binidx_paths(path)[0].resolve()
    what = f"{file}/{file.stat().st_mtime_ns}/{offset}/{len(tokens)}/{tokens.dtype}/{tokenizer.fingerprint}/"
    index = hashlib.sha256(what.encode() + starts.tobytes())
    counted = cache_dir / f"binidx-{index.hexdigest()[:32]}"
    if counted.exists():
        num_bytes = int(counted.read_text())
    else:
        check_tokens(tokens, tokenizer.vocab_size, path)
        num_bytes = count_bytes(tokens, tokenizer)
        cache_dir.mkdir(parents=True, exist_ok=True)
        temporary = counted.with_suffix(".tmp")
        temporary.write_text(str(num_bytes))
        temporary.replace(counted)
    return TokenStream(tokens, starts, num_bytes, identity=index.hexdigest())
