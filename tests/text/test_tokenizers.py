"""Tokenizers, exact on cases made with the libraries that the released models were trained with."""

import json
import unicodedata

import numpy as np
import pytest

from rwkv_jax.text import StreamDecoder, decode, decode_bytes, get_tokenizer
from rwkv_jax.text.tokenizers import ByteTokenizer, NeoXTokenizer, WorldTokenizer

VOCABULARIES = {"20b": "20B_tokenizer.json", "world": "rwkv_vocab_v20230424.txt"}
TEXTS = ["", "plain", "  two  spaces\n\n\ttab", "Ünïcödé – 日本語 🙂👩‍👩‍👧", "a\r\nb", "x" * 1000]


@pytest.fixture(scope="module", params=VOCABULARIES)
def published(request, shared):
    return get_tokenizer(request.param, shared / "data" / VOCABULARIES[request.param])


def test_golden_cases_encode_and_decode_exactly(published, shared):
    cases = [
        json.loads(line)
        for line in (shared / f"data/golden_{published.name}.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert len(cases) > 150
    for case in cases:
        text = case["text"] if "text" in case else bytes.fromhex(case["bytes_hex"])
        assert published.encode(text).tolist() == case["ids"], case
        normal = unicodedata.normalize("NFC", text) if published.name == "20b" else text
        assert decode_bytes(published, case["ids"]) == (normal.encode() if isinstance(normal, str) else normal), case


def test_ids_stay_below_the_vocabulary_and_text_does_not_end_a_document(published, shared):
    ids = published.encode((shared / "data/book_kalevala.txt").read_text(encoding="utf-8"))
    assert ids.dtype == np.int32
    assert ids.min() > 0 and ids.max() < published.vocab_size
    assert len(published.token_bytes) == published.vocab_size


@pytest.fixture(scope="module")
def world():
    return get_tokenizer("world")  # from the installed package


@pytest.mark.parametrize("text", TEXTS)
def test_world_round_trips_text(world, text):
    assert decode(world, world.encode(text)) == text


def test_world_takes_the_longest_match(world):
    by_bytes = {token: i for i, token in enumerate(world.token_bytes) if token}
    raw, at = "The quick brown fox; naïve  \n\nspaces".encode(), 0
    for index in world.encode(raw):
        token = world.token_bytes[index]
        assert raw.startswith(token, at)
        assert not any(raw[at : at + n] in by_bytes for n in range(len(token) + 1, 130) if at + n <= len(raw))
        at += len(token)
    assert at == len(raw)


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_are_utf8(text):
    tokenizer = ByteTokenizer()
    assert tokenizer.encode(text).tolist() == list(text.encode())
    assert decode(tokenizer, tokenizer.encode(text)) == text


def test_bytes_refuse_nul():
    with pytest.raises(ValueError, match="NUL byte at 1"):
        ByteTokenizer().encode("a\0b")


def test_stream_decoder_never_cuts_a_character():
    tokenizer, text = ByteTokenizer(), "é日🙂x"
    decoder, pieces = StreamDecoder(tokenizer), []
    for byte in text.encode():
        pieces.append(decoder.feed([byte]))
    assert [piece for piece in pieces if piece] == list(text)


def test_stream_decoder_replaces_bytes_that_cannot_be_text():
    decoder = StreamDecoder(ByteTokenizer())
    assert decoder.feed([0xFF, ord("a"), 0xE6, 0x97]) == "\N{REPLACEMENT CHARACTER}a"
    assert decoder.feed([ord("b")]) == "\N{REPLACEMENT CHARACTER}b"


def test_a_missing_world_vocabulary_names_both_ways(monkeypatch):
    import importlib.metadata

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(FileNotFoundError, match=r'pip install "rwkv-jax\[world\]".*--data.tokenizer_file'):
        get_tokenizer("world")


@pytest.mark.parametrize("failure", ["absent", "offline"])
def test_a_missing_20b_vocabulary_names_both_ways(monkeypatch, failure):
    import sys

    import huggingface_hub

    def offline(*args, **kwargs):
        raise OSError("no network")

    if failure == "absent":
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    else:
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(FileNotFoundError, match=r'pip install "rwkv-jax\[hub\]".*--data.tokenizer_file'):
        get_tokenizer("20b")


def test_a_downloaded_20b_vocabulary_is_used_and_its_content_checked(monkeypatch, shared, tmp_path):
    import huggingface_hub

    file = shared / "data/20B_tokenizer.json"
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *args: str(file))
    assert get_tokenizer("20b").encode("Hello").tolist() == [12092]
    content = json.loads(file.read_text(encoding="utf-8"))
    relaid = tmp_path / "relaid.json"
    relaid.write_text(json.dumps(content, indent=1))
    assert NeoXTokenizer(relaid).encode(" Hello world").tolist() == [24387, 1533]
    content["model"]["merges"][5], content["model"]["merges"][6] = (
        content["model"]["merges"][6],
        content["model"]["merges"][5],
    )
    (tmp_path / "changed.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="the 20B tokenizer's to"):
        NeoXTokenizer(tmp_path / "changed.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [("1 'a' 2\n", ":1: .* does not have that many bytes"), ("1 a\n", ":1: .* not 'id literal length'"),
     ("1 __import__('os').system('x') 1\n", ":1: .* not 'id literal length'"), ("1 'a' 1\n2 'a' 1\n", ":2: .*stands twice"),
     ("1 'a' 1\n", "byte 0 is not a token")],
)  # fmt: skip
def test_a_file_that_is_not_the_world_vocabulary_is_refused(content, message, tmp_path):
    path = tmp_path / "vocabulary.txt"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        WorldTokenizer(path)


def test_unknown_names_and_missing_files_are_named(tmp_path, unchecked):
    with pytest.raises(ValueError, match="no tokenizer 'gpt2'"):
        get_tokenizer("gpt2")  # pyright: ignore[reportArgumentType]
    with pytest.raises(FileNotFoundError, match="nowhere.json: no such file"):
        get_tokenizer("20b", tmp_path / "nowhere.json")
