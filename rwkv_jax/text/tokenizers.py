"""Tokenizers: text to ids and back, exactly as the released models were trained."""

import ast
import codecs
import hashlib
import importlib.metadata
import json
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

TokenizerName = Literal["bytes", "20b", "world"]

WORLD_FILE = "rwkv_vocab_v20230424.txt"
"""The World vocabulary's name wherever it is published."""
NEOX_REPOSITORY, NEOX_FILE = "EleutherAI/gpt-neox-20b", "tokenizer.json"
"""Where huggingface_hub finds the 20B vocabulary."""
WORLD_FINGERPRINT = "f783235cd4bf41d357764f44c51464e4624223f6108e464a88eec72c36dff7ee"
"""Of the World vocabulary of the released models (rwkv_vocab_v20230424)."""
NEOX_FINGERPRINT = "e84a15a086ccdad923b0da63eddf7857bde74323705fff04be350b7c554e5952"
"""Of the 20B vocabulary, merges and added tokens of GPT-NeoX-20B, whatever the layout of the JSON file."""


@runtime_checkable
class Tokenizer(Protocol):
    """What a corpus, a sampler and an evaluator need of a tokenizer."""

    name: TokenizerName
    vocab_size: int
    """Rows that a model needs: every id is below it."""
    end_of_text: int
    """Id that ends a document."""

    @property
    def fingerprint(self) -> str:
        """Hash of the vocabulary: the same only for tokenizers that give the same ids."""
        ...

    @property
    def token_bytes(self) -> Sequence[bytes]:
        """The bytes that each id stands for; none for unused ids and for what text cannot hold."""
        ...

    def encode(self, text: str | bytes) -> np.ndarray:
        """Returns int32 ids [n]."""
        ...


def decode_bytes(tokenizer: Tokenizer, ids: Sequence[int] | np.ndarray) -> bytes:
    """Returns the bytes that ids stand for."""
    table = tokenizer.token_bytes
    return b"".join(table[i] for i in map(int, ids))


def decode(tokenizer: Tokenizer, ids: Sequence[int] | np.ndarray) -> str:
    """Returns the text that ids stand for, with U+FFFD for bytes that are not UTF-8."""
    return decode_bytes(tokenizer, ids).decode("utf-8", errors="replace")


class StreamDecoder:
    """Turns ids into text as they come and never cuts a character: its first bytes are held until the last one is there."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, ids: Sequence[int] | np.ndarray) -> str:
        """Returns the text that became complete; bytes that cannot be UTF-8 become U+FFFD."""
        return self._decoder.decode(decode_bytes(self._tokenizer, ids))


class ByteTokenizer:
    """Ids are the bytes of UTF-8; NUL, which text does not contain, ends a document."""

    name: TokenizerName = "bytes"
    vocab_size = 256
    end_of_text = 0
    fingerprint = "bytes"
    token_bytes: Sequence[bytes] = (b"", *(bytes([i]) for i in range(1, 256)))

    def encode(self, text: str | bytes) -> np.ndarray:
        """Returns the bytes as int32.

        Raises:
            ValueError: The text contains NUL.
        """
        raw = text.encode() if isinstance(text, str) else text
        if b"\0" in raw:
            raise ValueError(
                f"the text has a NUL byte at {raw.index(0)}, which ends documents; remove it, or use another tokenizer"
            )
        return np.frombuffer(raw, np.uint8).astype(np.int32)


class WorldTokenizer:
    """The World tokenizer of RWKV-5 and later: the longest token that matches, from left to right, over bytes."""

    name: TokenizerName = "world"
    vocab_size = 65536
    end_of_text = 0

    def __init__(self, vocabulary: Path):
        """Reads the published vocabulary, a token a line: id, Python literal, length in bytes.

        Raises:
            ValueError: A line is not of this form, or the 256 bytes are not all tokens.
        """
        table = [b""] * self.vocab_size
        ids: dict[bytes, int] = {}
        for number, line in enumerate(vocabulary.read_text(encoding="utf-8").splitlines(), 1):
            index, token = _world_line(line, f"{vocabulary}:{number}")
            if not 0 < index < self.vocab_size or token in ids:
                raise ValueError(f"{vocabulary}:{number}: id {index} is outside 1 to 65535, or its token stands twice")
            table[index] = token
            ids[token] = index
        missing = [i for i in range(256) if bytes([i]) not in ids]
        if missing:
            raise ValueError(f"{vocabulary}: byte {missing[0]} is not a token; this is not the World vocabulary")
        self.token_bytes: Sequence[bytes] = table
        self.fingerprint = _hash([token.hex() for token in table])
        self._ids = ids
        self._lengths = _lengths_by_start(ids)
        _check_fingerprint(self.fingerprint, WORLD_FINGERPRINT, vocabulary, "World")

    def encode(self, text: str | bytes) -> np.ndarray:
        """Returns the ids of the longest matches."""
        raw = text.encode() if isinstance(text, str) else text
        ids, lengths_of, single, found, at, end = self._ids, self._lengths, (1,), [], 0, len(raw)
        while at < end:
            for length in lengths_of.get(raw[at : at + 2], single):
                index = ids.get(raw[at : at + length])
                if index is not None:
                    found.append(index)
                    at += length
                    break
        return np.array(found, np.int32)


class NeoXTokenizer:
    """The 20B tokenizer of RWKV-4's Pile models: byte-pair encoding of NFC text, through tiktoken."""

    name: TokenizerName = "20b"
    vocab_size = 50277
    end_of_text = 0

    def __init__(self, vocabulary: Path):
        """Reads a tokenizer.json of Hugging Face's tokenizers.

        Raises:
            ValueError: It is not JSON, or not the vocabulary of GPT-NeoX-20B.
        """
        import tiktoken

        try:
            content = json.loads(vocabulary.read_text(encoding="utf-8"))
            model, added = content["model"], {token["content"]: token["id"] for token in content["added_tokens"]}
            merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
            self.fingerprint = _hash([sorted(model["vocab"].items()), merges, sorted(added.items())])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{vocabulary}: not a tokenizer.json with vocabulary, merges and added tokens ({error!r})"
            ) from None
        _check_fingerprint(self.fingerprint, NEOX_FINGERPRINT, vocabulary, "20B")

        specials = {text: index for text, index in added.items() if text.startswith("<|")}
        by_bytes = {_bytes_of_neox(token): index for token, index in model["vocab"].items() if token not in specials}
        table = [b""] * self.vocab_size
        for token, index in by_bytes.items():
            table[index] = token
        # The added runs of 2 to 24 spaces win over the vocabulary's own, whose ids remain for decoding.
        for text, index in added.items():
            table[index] = text.encode()
            if text not in specials:
                by_bytes[text.encode()] = index
        self.token_bytes: Sequence[bytes] = table
        self._encoding = tiktoken.Encoding(
            "20b", pat_str=_NEOX_PATTERN, mergeable_ranks=by_bytes, special_tokens=specials
        )

    def encode(self, text: str | bytes) -> np.ndarray:
        """Returns the ids of the text in NFC; "<|endoftext|>" in it is that token, as in the tokenizers library.

        Raises:
            ValueError: Bytes that are not UTF-8, which this vocabulary was not trained on.
        """
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        ids = self._encoding.encode(unicodedata.normalize("NFC", text), allowed_special="all")
        return np.array(ids, np.int32)


_NEOX_SPACE = r"(?:[^\S ]| (?! ))"
_NEOX_PATTERN = (
    r" {2,24}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+"
    rf"|{_NEOX_SPACE}+(?!\S)|{_NEOX_SPACE}+"
)
"""GPT-2's split, with runs of 2 to 24 spaces as pieces of their own, as the added tokens cut them."""


def get_tokenizer(name: TokenizerName, tokenizer_file: str | Path | None = None) -> Tokenizer:
    """Returns a tokenizer; vocabularies are not part of this package.

    Args:
        name: "bytes", "20b" or "world".
        tokenizer_file: The vocabulary; None takes the installed pyrwkv-tokenizer's ("world") or huggingface_hub's ("20b").

    Raises:
        ValueError: The name is unknown, or the file is another vocabulary.
        FileNotFoundError: There is no vocabulary; the message names the ways to get one.
    """
    if name == "bytes":
        return ByteTokenizer()
    if name not in ("world", "20b"):
        raise ValueError(f"there is no tokenizer {name!r}; choose bytes, 20b or world")
    if tokenizer_file is not None and not Path(tokenizer_file).is_file():
        raise FileNotFoundError(f"{tokenizer_file}: no such file; data.tokenizer_file is the vocabulary of {name}")
    if name == "world":
        return WorldTokenizer(Path(tokenizer_file or _installed_world_vocabulary()))
    return NeoXTokenizer(Path(tokenizer_file or _downloaded_neox_vocabulary()))


def _installed_world_vocabulary() -> Path:
    try:
        files = importlib.metadata.files("pyrwkv-tokenizer") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == WORLD_FILE:
            return Path(str(file.locate()))
    raise FileNotFoundError(
        'the World vocabulary is not installed: pip install "rwkv-jax[world]", '
        f"or give --data.tokenizer_file with the path of {WORLD_FILE}"
    )


def _downloaded_neox_vocabulary() -> Path:
    ways = (
        'pip install "rwkv-jax[hub]" and have a network once, or give --data.tokenizer_file with the path of '
        f"20B_tokenizer.json (tokenizer.json of {NEOX_REPOSITORY})"
    )
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise FileNotFoundError(
            f"the 20B vocabulary is not here, and huggingface_hub is not installed: {ways}"
        ) from None
    try:
        return Path(hf_hub_download(NEOX_REPOSITORY, NEOX_FILE))
    except (OSError, RuntimeError) as error:  # Whatever the network or the hub says, the way out is the same.
        raise FileNotFoundError(f"the 20B vocabulary could not be downloaded ({error}): {ways}") from error


def _world_line(line: str, where: str) -> tuple[int, bytes]:
    try:
        index, rest = line.split(" ", 1)
        literal, length = rest.rsplit(" ", 1)
        token = ast.literal_eval(literal)
        token = token.encode() if isinstance(token, str) else token
        if not isinstance(token, bytes) or len(token) != int(length):
            raise ValueError("the literal does not have that many bytes")
        return int(index), token
    except (ValueError, SyntaxError) as error:
        raise ValueError(
            f"{where}: {line[:60]!r} is not 'id literal length' ({error}); this is not the World vocabulary"
        ) from None


def _lengths_by_start(ids: dict[bytes, int]) -> dict[bytes, tuple[int, ...]]:
    """For each two first bytes, the lengths of the tokens that start so, longest first, and 1."""
    lengths: dict[bytes, set[int]] = {}
    for token in ids:
        if len(token) > 1:
            lengths.setdefault(token[:2], {1}).add(len(token))
    return {start: tuple(sorted(found, reverse=True)) for start, found in lengths.items()}


def _bytes_of_neox(token: str) -> bytes:
    """GPT-2 writes every byte as a printable character: its own where that prints, else one from 256 on."""
    return bytes(_BYTE_OF_CHARACTER[character] for character in token)


def _byte_of_character() -> dict[str, int]:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_of_character()


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _check_fingerprint(actual: str, expected: str, path: Path, name: str) -> None:
    if actual != expected:
        raise ValueError(
            f"{path}: its vocabulary hashes to {actual[:16]}..., the {name} tokenizer's to {expected[:16]}...; "
            "models trained with the one cannot read the other: give the published file"
        )
