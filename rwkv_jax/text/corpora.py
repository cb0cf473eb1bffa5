"""Corpora: where documents come from. A document is a whole file, line or example, and is never split in two halves."""

import glob
import hashlib
import json
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
"""What a folder is searched for."""
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "pydoc_data"}
"""Folders left out; pydoc_data is one generated file, as large as sixty others, that would decide what a split measures."""

_ADDRESSES = {"enwik8": "https://mattmahoney.net/dc/enwik8.zip"}
"""Where to get files that configs name, by name."""


class Document(NamedTuple):
    """A document; the name decides on which side of a split it falls."""

    name: str
    text: str | bytes


@runtime_checkable
class Corpus(Protocol):
    """Documents in a fixed order."""

    def fingerprint(self) -> str:
        """Hash of what the documents depend on, without reading them: names, sizes, times, settings."""
        ...

    def documents(self) -> Iterator[Document]:
        """Yields every document."""
        ...


@runtime_checkable
class Table(Corpus, Protocol):
    """A corpus whose documents are a field of records."""

    def records(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields every record after the name of its document."""
        ...


class TextFiles:
    """One document a file."""

    def __init__(self, files: list[Path], root: Path):
        self._files, self._root = files, root

    def fingerprint(self) -> str:
        """Names, sizes and times of change, and the names that documents have."""
        return _hash_files(self._files) + f"/{self._root.resolve()}"

    def documents(self) -> Iterator[Document]:
        """Yields the files' bytes, in the order of their names."""
        for file in self._files:
            yield Document(file.relative_to(self._root).as_posix(), file.read_bytes())

    def __len__(self) -> int:
        return len(self._files)

    def cut(self, fraction: float) -> tuple["Piece", "Piece"]:
        """Returns the first and the last lines of the only file, cut after about `fraction` of its bytes."""
        (document,) = self.documents()
        raw = document.text if isinstance(document.text, bytes) else document.text.encode()
        at = raw.find(b"\n", int(fraction * len(raw))) + 1 or int(fraction * len(raw))
        return Piece(self, slice(0, at)), Piece(self, slice(at, None))

    def pieces(self, sizes: Sequence[int]) -> list["Piece"]:
        """Returns the first bytes of the only file in pieces of these sizes.

        Raises:
            ValueError: There are more files, or fewer bytes.
        """
        size = sum(file.stat().st_size for file in self._files)
        if len(self) != 1 or sum(sizes) > size:
            raise ValueError(
                f"data.byte_split={tuple(sizes)} cuts {sum(sizes)} bytes of one file; data.path means {len(self)} files of "
                f"{size} bytes, the first being {self._files[0]}"
            )
        ends = list(accumulate(sizes))
        return [Piece(self, slice(end - size, end)) for size, end in zip(sizes, ends, strict=True)]


class Piece:
    """A part of the only document of a corpus."""

    def __init__(self, corpus: TextFiles, where: slice):
        self._corpus, self._where = corpus, where

    def fingerprint(self) -> str:
        """That of the corpus, and which bytes."""
        return f"{self._corpus.fingerprint()}/{self._where.start}-{self._where.stop}"

    def documents(self) -> Iterator[Document]:
        """Yields the piece."""
        return (document._replace(text=document.text[self._where]) for document in self._corpus.documents())


class JsonLines:
    """One document a line: an object with the text under `key`."""

    def __init__(self, files: list[Path], key: str):
        self._files, self._key = files, key

    def fingerprint(self) -> str:
        """Names, sizes, times of change, and the key."""
        return _hash_files(self._files) + self._key

    def documents(self) -> Iterator[Document]:
        """Yields the texts.

        Raises:
            ValueError: A line is not such an object; the file and line are named.
        """
        for file, number, value in self._lines():
            if not isinstance(value, dict) or not isinstance(value.get(self._key), str):
                found = ", ".join(value) if isinstance(value, dict) else type(value).__name__
                raise ValueError(f"{file}:{number}: no text under data.text_key={self._key!r}; the line has {found}")
            yield Document(f"{file.name}:{number}", value[self._key])

    def records(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields the objects.

        Raises:
            ValueError: A line is not an object; the file and line are named.
        """
        for file, number, value in self._lines():
            if not isinstance(value, dict):
                raise ValueError(f"{file}:{number}: a {type(value).__name__}; every line must be an object")
            yield f"{file.name}:{number}", value

    def _lines(self) -> Iterator[tuple[Path, int, Any]]:
        for file in self._files:
            with file.open("rb") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        try:
                            yield file, number, json.loads(line.decode("utf-8-sig"))
                        except ValueError as error:
                            raise ValueError(
                                f"{file}:{number}: not JSON ({error}); every line must be an object"
                            ) from None


class TfdsSource:
    """One document an example of a TFDS data source, read without TensorFlow."""

    def __init__(self, name: str, split: str, data_dir: str | None, key: str):
        self._name, self._split, self._data_dir, self._key = name, split, data_dir, key

    def fingerprint(self) -> str:
        """Name, version as resolved, split and key."""
        info = self._load()[1]
        return f"{info.full_name}/{self._split}/{self._key}/{info.splits[self._split].num_examples}"

    def documents(self) -> Iterator[Document]:
        """Yields the texts.

        Raises:
            ValueError: The examples have no such key.
        """
        for name, example in self.records():
            if self._key not in example:
                raise ValueError(
                    f"tfds {self._name}: no data.text_key={self._key!r}; examples have {', '.join(example)}"
                )
            text = example[self._key]
            yield Document(name, text if isinstance(text, str) else bytes(text))

    def records(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields the examples."""
        source, _ = self._load()
        return ((f"{self._split}:{index}", source[index]) for index in range(len(source)))

    def _load(self) -> tuple[Any, Any]:
        try:
            import tensorflow_datasets as tfds
            import tensorflow_datasets.text
        except ImportError as error:
            raise ValueError(
                f'data.source="tfds" needs TensorFlow Datasets ({error}): pip install "rwkv-jax[tfds]"'
            ) from None
        folder = Path(self._data_dir or "", self._name) if self._data_dir else None
        if folder is not None and (folder / "dataset_info.json").is_file():
            builder = tfds.builder_from_directory(str(folder))
        else:
            builder = tfds.builder(self._name, data_dir=self._data_dir, file_format="array_record")
            builder.download_and_prepare()
        if self._split not in builder.info.splits:
            raise ValueError(f"tfds {self._name}: no split {self._split!r}; it has {', '.join(builder.info.splits)}")
        source: Any = builder.as_data_source
        return source(split=self._split), builder.info


class HubDataset:
    """One document an example of a data set that the datasets library reads: of the Hugging Face hub, or a folder's."""

    def __init__(self, name: str, subset: str | None, split: str, key: str):
        self._name, self._subset, self._split, self._key = name, subset, split, key

    def fingerprint(self) -> str:
        """Name, subset, split, key, and the library's own fingerprint of the examples."""
        return f"{self._name}/{self._subset}/{self._split}/{self._key}/{self._load()._fingerprint}"

    def documents(self) -> Iterator[Document]:
        """Yields the texts.

        Raises:
            ValueError: The examples have no such key.
        """
        for name, example in self.records():
            if not isinstance(example.get(self._key), str):
                raise ValueError(
                    f"{self._name}: no text under data.text_key={self._key!r}; examples have {', '.join(example)}"
                )
            yield Document(name, example[self._key])

    def records(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields the examples."""
        return ((f"{self._split}:{index}", example) for index, example in enumerate(self._load()))

    def _load(self) -> Any:
        try:
            import datasets
        except ImportError as error:
            raise ValueError(
                f'data.source="huggingface" needs the datasets library ({error}): pip install "rwkv-jax[datasets]"'
            ) from None
        try:
            return datasets.load_dataset(self._name, self._subset, split=self._split)
        # The library and its readers raise many kinds for what a network or a file refuses; the chain has them all.
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).partition("\n")[0][:300]
            raise OSError(
                f"{self._name}, subset {self._subset}, split {self._split}: cannot be read ({reason}); it is fetched once, which "
                "needs a network. Without one, set data.source to 'jsonl' and data.path to a file"
            ) from error


class Part:
    """The documents of a corpus that fall on one side of a split."""

    def __init__(self, corpus: Corpus, keep: Callable[[str], bool], name: str):
        self._corpus, self._keep, self._name = corpus, keep, name

    def fingerprint(self) -> str:
        """That of the corpus, and which part."""
        return f"{self._corpus.fingerprint()}/{self._name}"

    def documents(self) -> Iterator[Document]:
        """Yields the part's documents."""
        return (document for document in self._corpus.documents() if self._keep(document.name))


class PartOfTable(Part):
    """The same, of records."""

    def __init__(self, table: Table, keep: Callable[[str], bool], name: str):
        super().__init__(table, keep, name)
        self._table = table

    def records(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields the part's records."""
        return ((name, record) for name, record in self._table.records() if self._keep(name))


def standard_library() -> TextFiles:
    """Returns the sources of the running Python's standard library, without its tests and installed packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [file for file in root.rglob("*.py") if not _NOT_LIBRARY & set(file.relative_to(root).parts)]
    if not files:
        raise ValueError(f"{root}: the standard library has no sources here; give data.source='text' and a data.path")
    return TextFiles(sorted(files), root)


def text_files(path: str) -> TextFiles:
    """Returns the files that a path means: a file, a glob, or all text files below a folder.

    Raises:
        FileNotFoundError: Nothing is there.
    """
    files = _find(path, TEXT_SUFFIXES)
    root = Path(path) if Path(path).is_dir() else Path(*_common_parts(files))
    return TextFiles(files, root)


def json_lines(path: str, key: str) -> JsonLines:
    """Returns the .jsonl files that a path means, with the text under `key`; as `text_files`."""
    return JsonLines(_find(path, (".jsonl",)), key)


def split(corpus: Corpus, fraction: float) -> tuple[Corpus, Corpus]:
    """Returns (training, held-out) parts: a document is held out if a hash of its name falls below `fraction`.

    The last lines of a text file that is alone are held out.
    """
    if isinstance(corpus, TextFiles) and len(corpus) == 1:
        return corpus.cut(1 - fraction)

    def held_out(name: str) -> bool:
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) < fraction * 2**64

    training, validation = f"train-{fraction}", f"validation-{fraction}"
    if isinstance(corpus, Table):
        return PartOfTable(corpus, lambda name: not held_out(name), training), PartOfTable(corpus, held_out, validation)
    return Part(corpus, lambda name: not held_out(name), training), Part(corpus, held_out, validation)


def _find(path: str, suffixes: tuple[str, ...]) -> list[Path]:
    place = Path(path).expanduser()
    if place.is_file():
        return [place]
    if place.is_dir():
        files = [file for file in place.rglob("*") if file.is_file() and file.suffix in suffixes]
        rule = f"a folder is searched for {', '.join(suffixes)}"
    else:
        files = [Path(found) for found in glob.glob(str(place), recursive=True) if Path(found).is_file()]
        rule = "it is neither a file, a folder nor a glob that matches a file"
    if not files:
        address = f"; it can be had from {_ADDRESSES[place.name]}" if place.name in _ADDRESSES else ""
        raise FileNotFoundError(f"{path}: no text here; {rule}. Set data.path to where the text is{address}")
    return sorted(files)


def _common_parts(files: list[Path]) -> tuple[str, ...]:
    parts = files[0].parent.parts
    for file in files:
        while parts != file.parts[: len(parts)]:
            parts = parts[:-1]
    return parts


def _hash_files(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        status = file.stat()
        digest.update(f"{file.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()
