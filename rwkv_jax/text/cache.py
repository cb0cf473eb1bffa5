"""Token streams: a corpus tokenised once, in a memory-mapped file that is used again while corpus and tokenizer stay the same."""

import hashlib
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from .corpora import Corpus
from .tokenizers import Tokenizer

_FORMAT = 2
_CHECK_BLOCK = 1 << 22


@dataclass(frozen=True)
class TokenStream:
    """Documents one after the other, each followed by end_of_text."""

    tokens: np.ndarray
    """Ids [n], of the smallest unsigned dtype that holds the vocabulary; usually memory-mapped."""
    document_starts: np.ndarray
    """Where documents start, int64, in order."""
    num_bytes: int
    """Bytes of the text, without separators."""
    identity: str = ""
    """Hash of the tokens: a run goes on only with the text it began with."""


def tokenise(corpus: Corpus, tokenizer: Tokenizer, cache_dir: str | Path, name: str = "text") -> TokenStream:
    """Returns the corpus as a token stream, from the cache if it is there.

    A cache is made under another name and renamed when whole, so that an interrupted one is never used.

    Args:
        corpus: Its fingerprint, with the tokenizer's, names the cache.
        tokenizer: What turns text into ids.
        cache_dir: Where caches are kept.
        name: What errors call it.

    Raises:
        ValueError: The corpus has no text.
    """
    identity = f"{_FORMAT}/{corpus.fingerprint()}/{tokenizer.name}/{tokenizer.fingerprint}"
    folder = Path(cache_dir).expanduser() / hashlib.sha256(identity.encode()).hexdigest()[:32]
    cached = _open(folder)
    if cached is not None:
        return cached
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.tmp-", dir=folder.parent))
    try:
        _write(temporary, corpus, tokenizer, name)
        shutil.rmtree(folder, ignore_errors=True)  # What is there, if anything, is damaged.
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    stream = _open(folder)
    assert stream is not None, f"{folder} was just written"
    return stream


def check_tokens(tokens: np.ndarray, vocab_size: int, origin: str) -> None:
    """Raises ValueError at the first id outside the vocabulary, reading block by block."""
    for start in range(0, len(tokens), _CHECK_BLOCK):
        block = tokens[start : start + _CHECK_BLOCK]
        bad = (block < 0) | (block >= vocab_size)
        if bad.any():
            at = int(np.argmax(bad))
            raise ValueError(
                f"{origin}: token {int(block[at])} at position {start + at}; the tokenizer's ids are 0 to {vocab_size - 1}: "
                "set data.tokenizer to the one that the file was made with"
            )


def count_bytes(tokens: np.ndarray, tokenizer: Tokenizer) -> int:
    """Returns the bytes of text that ids stand for, end_of_text being none."""
    lengths = np.array([len(token) for token in tokenizer.token_bytes], np.int64)
    lengths[tokenizer.end_of_text] = 0
    return sum(int(lengths[tokens[i : i + _CHECK_BLOCK]].sum()) for i in range(0, len(tokens), _CHECK_BLOCK))


def _write(folder: Path, corpus: Corpus, tokenizer: Tokenizer, name: str) -> None:
    dtype = np.dtype(
        np.uint8 if tokenizer.vocab_size <= 256 else np.uint16 if tokenizer.vocab_size <= 65536 else np.int32
    )
    starts, num_tokens, num_bytes, digest = [], 0, 0, hashlib.sha256()
    with (folder / "tokens.bin").open("wb") as file, tqdm(desc="tokenising", unit="B", unit_scale=True, delay=2) as bar:
        for document in corpus.documents():
            try:
                raw = document.text.encode() if isinstance(document.text, str) else document.text
                if not raw:
                    continue
                ids = tokenizer.encode(document.text)
            except ValueError as error:
                raise ValueError(f"{document.name}: {error}") from None
            starts.append(num_tokens)
            content = np.append(ids, tokenizer.end_of_text).astype(dtype).tobytes()
            file.write(content)
            digest.update(content)
            num_tokens += len(ids) + 1
            num_bytes += len(raw)
            bar.update(len(raw))
    if not num_bytes:
        raise ValueError(
            f"the {name} is empty; look at data.path, and, if there are few documents, at data.validation_fraction "
            "(or give data.validation_path)"
        )
    np.save(folder / "document_starts.npy", np.array(starts, np.int64))
    meta = {"dtype": dtype.name, "num_tokens": num_tokens, "num_bytes": num_bytes, "identity": digest.hexdigest()}
    (folder / "meta.json").write_text(json.dumps(meta))


def _open(folder: Path) -> TokenStream | None:
    """The stream in a folder, or None where there is no whole one."""
    try:
        meta: dict[str, Any] = json.loads((folder / "meta.json").read_text())
        starts = np.load(folder / "document_starts.npy", allow_pickle=False)
        dtype = np.dtype(meta["dtype"])
        if (folder / "tokens.bin").stat().st_size != meta["num_tokens"] * dtype.itemsize:
            return None
    except (OSError, ValueError, KeyError):
        return None
    tokens = np.memmap(folder / "tokens.bin", dtype, mode="r")
    return TokenStream(tokens, starts, meta["num_bytes"], meta["identity"])
