"""Sources of text and the cache of their tokens."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rwkv_jax.text import DataConfig, corpora, load_streams, read_binidx, tokenise, write_binidx
from rwkv_jax.text.cache import check_tokens, count_bytes
from rwkv_jax.text.corpora import json_lines, split, standard_library, text_files
from rwkv_jax.text.tokenizers import ByteTokenizer


@pytest.fixture
def folder(tmp_path):
    """Twenty small files, two folders deep."""
    (tmp_path / "text/inner").mkdir(parents=True)
    for i in range(20):
        (tmp_path / "text" / ("inner" if i % 2 else ".") / f"{i:02d}.txt").write_text(f"file {i} é\n")
    return tmp_path / "text"


def names(corpus):
    return [document.name for document in corpus.documents()]


def test_the_standard_library_is_found_without_tests_and_packages():
    found = names(standard_library())
    assert {"os.py", "json/decoder.py", "asyncio/events.py"} <= set(found)
    assert not any(part in ("test", "tests", "site-packages") for name in found for part in name.split("/"))
    assert found == sorted(found, key=lambda name: name.split("/"))


def test_a_split_parts_whole_documents_and_does_not_depend_on_the_others(folder):
    train, held_out = split(text_files(str(folder)), 0.3)
    assert sorted(names(train) + names(held_out)) == sorted(names(text_files(str(folder))))
    before = set(names(held_out))
    assert names(train) and before
    (folder / "00.txt").unlink()
    assert set(names(split(text_files(str(folder)), 0.3)[1])) == before - {"00.txt"}


@pytest.mark.parametrize("path", ["", "/inner/*.txt", "/00.txt"])
def test_a_folder_a_glob_and_a_file_are_read(folder, path):
    assert len(names(text_files(str(folder) + path))) == {"": 20, "/inner/*.txt": 10, "/00.txt": 1}[path]


@pytest.mark.parametrize("path", ["/nowhere", "/*.md", "/empty"])
def test_a_path_without_text_is_named(folder, path):
    (folder / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=f"{folder}{path.replace('*', '.')}: no text here"):
        text_files(str(folder) + path)


def test_empty_text_is_refused(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="the text is empty"):
        tokenise(text_files(str(tmp_path)), ByteTokenizer(), tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_jsonl_texts_are_read_and_bad_lines_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "one"}\n\n{"body": "two"}\n')
    assert [d.text for d in json_lines(str(path), "body").documents()] == ["one", "two"]
    for line, message in [
        ('{"text": 1}', "no text under data.text_key='body'; the line has text"),
        ("{", "not JSON"),
        ("[]", "has list"),
    ]:
        path.write_text('{"body": "one"}\n' + line)
        with pytest.raises(ValueError, match=rf"a.jsonl:2: .*{message}"):
            list(json_lines(str(path), "body").documents())


def test_documents_are_separated_and_counted(folder, tmp_path):
    stream = tokenise(text_files(str(folder)), ByteTokenizer(), tmp_path / "cache")
    texts = [document.text for document in text_files(str(folder)).documents()]
    assert stream.tokens.tobytes() == b"".join(text + b"\0" for text in texts)
    assert stream.num_bytes == sum(map(len, texts)) == count_bytes(stream.tokens, ByteTokenizer())
    assert stream.document_starts.tolist() == [sum(len(t) + 1 for t in texts[:i]) for i in range(20)]


def test_the_cache_is_used_again_and_made_anew_when_a_file_changes(folder, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        ByteTokenizer, "encode", lambda self, text: calls.append(1) or np.frombuffer(text, np.uint8).astype(np.int32)
    )
    make = lambda: tokenise(text_files(str(folder)), ByteTokenizer(), tmp_path / "cache")
    make(), make()
    assert len(calls) == 20
    (folder / "00.txt").write_text("changed")
    assert b"changed" in make().tokens.tobytes()
    monkeypatch.setattr(ByteTokenizer, "fingerprint", "another")
    make()
    assert len(calls) == 60


def test_a_damaged_or_half_written_cache_is_made_anew(folder, tmp_path):
    make = lambda: tokenise(text_files(str(folder)), ByteTokenizer(), tmp_path / "cache")
    expected = make().tokens.tobytes()
    (cached,) = (tmp_path / "cache").iterdir()
    for name in ("tokens.bin", "meta.json", "document_starts.npy"):
        (cached / name).write_bytes((cached / name).read_bytes()[:-7])
        assert make().tokens.tobytes() == expected
        assert [path.name for path in (tmp_path / "cache").iterdir()] == [cached.name]


def test_binidx_round_trips(tmp_path):
    documents = [np.array([1, 2, 3, 0]), np.array([40000, 0]), np.array([5])]
    write_binidx(tmp_path / "a", documents)
    tokens, starts = read_binidx(tmp_path / "a")
    assert tokens.tolist() == [1, 2, 3, 0, 40000, 0, 5] and starts.tolist() == [0, 4, 6]
    assert read_binidx(tmp_path / "a.bin")[0].dtype == np.uint16
    with pytest.raises(ValueError, match="uint16 cannot hold"):
        write_binidx(tmp_path / "b", [np.array([70000])])


def test_binidx_layout_is_megatrons(tmp_path):
    write_binidx(tmp_path / "a", [np.array([7, 8]), np.array([9])])
    expected = b"MMIDIDX\0\0" + b"\1\0\0\0\0\0\0\0" + b"\x08" + b"\2\0\0\0\0\0\0\0" + b"\3\0\0\0\0\0\0\0"
    expected += (
        np.array([2, 1], "<i4").tobytes() + np.array([0, 4], "<i8").tobytes() + np.array([0, 1, 2], "<i8").tobytes()
    )
    assert (tmp_path / "a.idx").read_bytes() == expected
    assert (tmp_path / "a.bin").read_bytes() == np.array([7, 8, 9], "<u2").tobytes()


@pytest.mark.parametrize(
    ("suffix", "change", "message"),
    [(".bin", lambda b: b[:-1], "truncated"), (".idx", lambda b: b[:-1], "truncated"),
     (".idx", lambda b: b"X" + b[1:], "Megatron index"),
     (".idx", lambda b: b[:9] + b"\2" + b[10:], "version 2"), (".idx", lambda b: b[:17] + b"\6" + b[18:], "dtype code 6"),
     (".idx", lambda b: b[:42] + b"\4" + b[43:], "do not follow"), (".idx", lambda b: b[:20], "Megatron index")],
)  # fmt: skip
def test_a_damaged_binidx_is_refused(tmp_path, suffix, change, message):
    write_binidx(tmp_path / "a", [np.array([1, 2]), np.array([3])])
    path = tmp_path / f"a{suffix}"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        read_binidx(tmp_path / "a")


def test_binidx_streams_split_and_refuse_foreign_tokens(tmp_path):
    write_binidx(tmp_path / "a", [np.array([65 + i, 66, 0]) for i in range(10)])
    config = DataConfig(
        source="binidx", path=str(tmp_path / "a"), validation_fraction=0.2, cache_dir=str(tmp_path / "c")
    )
    streams = load_streams(config)
    assert len(streams.train.tokens) == 24 and len(streams.validation.tokens) == 6
    assert streams.validation.document_starts.tolist() == [0, 3] and streams.validation.num_bytes == 4
    assert streams.validation_bytes() is None
    write_binidx(tmp_path / "a", [np.array([1, 2]), np.array([3, 300])])
    with pytest.raises(ValueError, match="token 300 at position 1; the tokenizer's ids are 0 to 255"):
        load_streams(config)
    with pytest.raises(FileNotFoundError, match=r"b.bin: no such file"):
        load_streams(DataConfig(source="binidx", path=str(tmp_path / "b")))


def test_tokens_outside_the_vocabulary_are_found_in_any_block(monkeypatch):
    monkeypatch.setattr("rwkv_jax.text.cache._CHECK_BLOCK", 4)
    check_tokens(np.arange(10), 10, "x")
    with pytest.raises(ValueError, match="x: token 9 at position 9"):
        check_tokens(np.arange(10), 9, "x")
    with pytest.raises(ValueError, match="token -1 at position 5"):
        check_tokens(np.array([0, 1, 2, 3, 4, -1]), 9, "x")


def test_both_paths_of_text_are_kept_apart(folder, tmp_path):
    (tmp_path / "other.txt").write_text("held out")
    config = DataConfig(
        source="text", path=str(folder), validation_path=str(tmp_path / "other.txt"), cache_dir=str(tmp_path / "c")
    )
    streams = load_streams(config)
    assert len(streams.train.document_starts) == 20
    assert streams.validation_bytes() == b"held out" == streams.validation.tokens[:-1].tobytes()


TFDS_PROGRAM = """
import sys
import tensorflow_datasets as tfds

class Tiny(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({"words": tfds.features.Text()}))
    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(12), "test": self._generate_examples(3)}
    def _generate_examples(self, n):
        for i in range(n):
            yield i, {"words": f"example {i} é"}

builder = Tiny(data_dir=sys.argv[1], file_format="array_record")
builder.download_and_prepare()
assert "tensorflow" not in sys.modules
print(builder.data_dir)
"""


@pytest.mark.slow
def test_tfds_is_read_without_tensorflow(tmp_path):
    (tmp_path / "tiny.py").write_text(TFDS_PROGRAM)
    made = subprocess.run(
        [sys.executable, tmp_path / "tiny.py", str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert made.returncode == 0, made.stderr
    name = os.path.relpath(made.stdout.splitlines()[-1], tmp_path)
    program = f"""
import json, sys
from rwkv_jax.text import DataConfig, load_streams
config = dict(source="tfds", tfds_name={name!r}, tfds_data_dir={str(tmp_path)!r}, text_key="words", cache_dir={str(tmp_path / "c")!r})
streams = load_streams(DataConfig(**config, tfds_validation_split="test"))
assert "tensorflow" not in sys.modules
try:
    load_streams(DataConfig(**(config | {{"text_key": "text"}}), tfds_validation_split="test"))
except ValueError as error:
    print(error)
try:
    load_streams(DataConfig(**config, tfds_validation_split="dev"))
except ValueError as error:
    print(error)
print(json.dumps([bytes(streams.validation.tokens).decode("latin1"), len(streams.train.document_starts)]))
"""
    read = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert read.returncode == 0, read.stderr
    no_key, no_split, result = read.stdout.splitlines()[-3:]
    assert "no data.text_key='text'; examples have words" in no_key
    assert "no split 'dev'; it has" in no_split
    expected = b"".join(f"example {i} é".encode() + b"\0" for i in range(3))
    text, documents = json.loads(result)
    assert sorted(text.encode("latin1").split(b"\0")) == sorted(expected.split(b"\0")) and documents == 12


def test_settings_that_cannot_be_are_refused():
    for values, message in [
        ({"source": "text"}, "needs data.path"), ({"source": "binidx"}, "needs data.path"),
        ({"source": "tfds"}, "needs data.tfds_name"), ({"batch_size": 0}, "data.batch_size is 0"),
        ({"validation_fraction": 1.0}, "between 0 and 1"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            load_streams(DataConfig(**values))


def test_the_last_lines_of_a_single_file_are_held_out(tmp_path):
    lines = [f"line {i}\n" for i in range(100)]
    (tmp_path / "one.txt").write_text("".join(lines))
    config = DataConfig(source="text", path=str(tmp_path / "one.txt"), cache_dir=str(tmp_path / "c"))
    streams = load_streams(config)
    train, held_out = (bytes(side.tokens[:-1]).decode() for side in (streams.train, streams.validation))
    assert train + held_out == "".join(lines)
    assert train.endswith("\n") and 0.03 < len(held_out) / len("".join(lines)) < 0.06
    assert streams.validation_bytes() == held_out.encode()


def test_a_file_is_cut_at_the_bytes_given_into_text_to_train_on_to_hold_out_and_to_test(tmp_path):
    raw = bytes(range(32, 127)) * 3
    (tmp_path / "enwik8").write_bytes(raw)
    values = {"source": "text", "path": str(tmp_path / "enwik8"), "cache_dir": str(tmp_path / "c")}
    streams = load_streams(DataConfig(**values, byte_split=(200, 40, 30)))
    assert [bytes(side.tokens[:-1]) for side in streams[1:3]] == [raw[:200], raw[200:240]]
    assert streams.test is not None and bytes(streams.test.tokens[:-1]) == raw[240:270]
    assert streams.validation_bytes() == raw[200:240]
    assert load_streams(DataConfig(**values, byte_split=(200, 40))).test is None
    with pytest.raises(ValueError, match=r"cuts 286 bytes of one file; data.path means 1 files of 285 bytes"):
        load_streams(DataConfig(**values, byte_split=(200, 86)))
    with pytest.raises(ValueError, match="needs data.source='text'"):
        DataConfig(byte_split=(200, 40))
    with pytest.raises(FileNotFoundError, match="mattmahoney.net/dc/enwik8.zip"):
        load_streams(DataConfig(**values | {"path": str(tmp_path / "nowhere" / "enwik8")}))


def test_the_side_of_a_split_without_text_is_named(tmp_path):
    for i in range(2):
        (tmp_path / f"{i}.txt").write_text("text")
    config = DataConfig(source="text", path=str(tmp_path), validation_fraction=1e-9, cache_dir=str(tmp_path / "c"))
    with pytest.raises(ValueError, match="the held-out text is empty"):
        load_streams(config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"validation_path": "somewhere"}, "data.validation_path is for text, jsonl and binidx"),
        ({"tfds_validation_split": "test"}, "data.tfds_validation_split is for tfds"),
    ],
)
def test_held_out_text_that_the_source_does_not_have_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        load_streams(DataConfig(source="stdlib", **fields))


def test_jsonl_is_read_with_a_byte_order_mark_and_bad_characters_are_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\n')
    assert [document.text for document in json_lines(str(path), "text").documents()] == ["one"]
    path.write_bytes(b'{"text": "one"}\n{"text": "\xff"}\n')
    with pytest.raises(ValueError, match="a.jsonl:2: not JSON"):
        list(json_lines(str(path), "text").documents())
    path.write_bytes(b'{"text": "\\ud800"}\n')
    with pytest.raises(ValueError, match="a.jsonl:1: .*surrogates not allowed"):
        tokenise(json_lines(str(path), "text"), ByteTokenizer(), tmp_path / "c")


def test_the_same_files_below_another_root_are_another_corpus(folder):
    names = [file.name for file in sorted(Path(folder).iterdir())]
    below, above = (corpora.TextFiles([Path(folder, n) for n in names], root) for root in (folder, Path(folder).parent))
    assert below.fingerprint() != above.fingerprint()


def test_the_identity_of_a_text_is_that_of_its_tokens(tmp_path):
    def identity(name, text):
        (tmp_path / name).write_text(text)
        return tokenise(text_files(str(tmp_path / name)), ByteTokenizer(), tmp_path / "c").identity

    assert identity("a.txt", "same") == identity("b.txt", "same") != identity("c.txt", "other")


def test_a_binidx_is_checked_and_counted_once_until_it_changes(tmp_path, monkeypatch):
    write_binidx(tmp_path / "a", [np.full(3, i + 1) for i in range(10)])
    config = DataConfig(
        source="binidx", path=str(tmp_path / "a"), validation_fraction=0.2, cache_dir=str(tmp_path / "c")
    )
    first = load_streams(config)
    monkeypatch.setattr("rwkv_jax.text.config.check_tokens", lambda *arguments: pytest.fail("read again"))
    again = load_streams(config)
    assert (again.train.num_bytes, again.train.identity) == (first.train.num_bytes, first.train.identity)
    monkeypatch.undo()
    write_binidx(tmp_path / "a", [np.full(3, 300) for i in range(10)])
    with pytest.raises(ValueError, match="token 300"):
        load_streams(config)
