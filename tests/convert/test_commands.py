"""The commands: convert, inspect, verify."""

import argparse
import signal
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy
from checkpoint_files import assert_same_bits, official, random_params, write_rwkv_cpp
from small_models import EVERY, RWKV, SMALL

import rwkv_jax
from rwkv_jax import inspect, verify
from rwkv_jax.command import errors_in_words
from rwkv_jax.convert import __main__ as convert
from rwkv_jax.models import module_of

CONFIG = rwkv_jax.RWKV4Config(vocab_size=50277, num_layers=2, embed_dim=8, tokenizer="20b")


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "m.safetensors"
    rwkv_jax.save(path, random_params(CONFIG), CONFIG)
    return path


def ends_in_words(run, arguments, capsys):
    """What a command says of a user's mistake, with status 2."""
    with pytest.raises(SystemExit) as error:
        run(list(map(str, arguments)))
    assert error.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("target", ["out.st", "folder"])
@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16"])
def test_convert_writes_what_load_and_save_would(target, dtype, model, tmp_path, capsys):
    convert.main([str(model), str(tmp_path / target), *(["--dtype", dtype] if dtype else [])])
    assert_same_bits(rwkv_jax.load(tmp_path / target)[0], rwkv_jax.load(model, dtype=dtype)[0])
    assert "wrote" in capsys.readouterr().out


@pytest.mark.parametrize("name", RWKV)
def test_convert_reads_every_version(name, tmp_path):
    config, params = SMALL[name], random_params(SMALL[name])
    write_rwkv_cpp(tmp_path / "m.bin", official(params, config))
    convert.main([str(tmp_path / "m.bin"), str(tmp_path / "m.st"), "--ln_x_eps", "0.001"])
    loaded, loaded_config = rwkv_jax.load(tmp_path / "m.st")
    assert_same_bits(loaded, rwkv_jax.load(tmp_path / "m.bin")[0])
    assert getattr(loaded_config, "ln_x_eps", 0.001) == 0.001


def test_convert_says_what_is_wrong_without_a_traceback(model, tmp_path, capsys):
    (tmp_path / "bad").write_bytes(b"nothing of ours")
    assert "no format that is known" in ends_in_words(convert.main, [tmp_path / "bad", tmp_path / "o.st"], capsys)
    assert "no such file" in ends_in_words(convert.main, [tmp_path / "absent", tmp_path / "o.st"], capsys)
    assert "names no format" in ends_in_words(convert.main, [model, tmp_path / "o.bin"], capsys)
    assert "--dtype" in ends_in_words(convert.main, [model, tmp_path / "o.st", "--dtype", "int8"], capsys)
    assert not (tmp_path / "o.st").exists()


def test_inspect_describes_a_file(model, capsys):
    inspect.main([str(model)])
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["format"] == "safetensors"
    assert lines["version"] == "rwkv4"
    assert (lines["vocab_size"], lines["num_layers"], lines["embed_dim"]) == ("50277", "2", "8")
    assert lines["parameters"] == f"{rwkv_jax.count_params(CONFIG):,}"
    assert lines["types"] == "float32 (100.0%)"
    assert lines["tokenizer"] == "20b"


def test_inspect_names_quantisation(tmp_path):
    config = rwkv_jax.RWKV4Config(vocab_size=8, num_layers=1, embed_dim=32)

    def quantised(key, tensor):
        return ("Q8_0", bytes(tensor.size // 32 * 34)) if key.endswith("ffn.key.weight") else None

    write_rwkv_cpp(tmp_path / "m", official(random_params(config), config), quantised)
    text = inspect.describe(tmp_path / "m")
    assert "rwkv.cpp, version 101" in text
    share = 4 * 32 * 32 / rwkv_jax.count_params(config)
    assert f"Q8_0 ({share:.1%})" in text
    assert "not known (a vocabulary of 8)" in text


def test_inspect_reads_no_weights(model, monkeypatch):
    from rwkv_jax.convert import stored

    monkeypatch.setattr(stored, "mapped", None)
    monkeypatch.setattr("rwkv_jax.convert.safetensors_file.mapped", None)
    assert "rwkv4" in inspect.describe(model)


def test_inspect_says_what_is_wrong(shared, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "posix.system" in ends_in_words(inspect.main, [shared / "reference/hostile.pth"], capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("version", ["4v0", "5v1", "5v2", "6v0", "7v0"])
def test_every_version_is_within_its_rounding(version, dtype, shared, capsys):
    verify.main([str(shared / f"reference/synthetic-rwkv-{version}.safetensors"), "--dtype", dtype, "--tokens", "40"])
    out = capsys.readouterr().out
    assert f"within the rounding of {dtype}" in out
    assert out.count(" ok") == 4  # three layers and the logits


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_a_layer_that_is_wrong_is_named(name, tmp_path, monkeypatch, capsys):
    config, params = SMALL[name], random_params(SMALL[name])
    ln1 = params.blocks.ln1
    marked = ln1._replace(bias=ln1.bias.at[1].set(7.0))
    params = params._replace(blocks=params.blocks._replace(ln1=marked))
    rwkv_jax.save(tmp_path / "m.st", params, config)
    model = module_of(config)
    right = model.block

    def wrong_in_the_second_layer(own, config, inputs, state, **options):
        (x, depth), state = right(own, config, inputs, state, **options)
        if x.dtype == np.float32:
            x = x * (1 + 1e-4 * (own.ln1.bias[0] == 7.0))
        return (x, depth), state

    monkeypatch.setattr(model, "block", wrong_in_the_second_layer)
    with pytest.raises(SystemExit) as error:
        verify.main([str(tmp_path / "m.st"), "--tokens", "20"])
    assert error.value.code == 1
    out = capsys.readouterr().out
    assert "first in layer 1" in out
    assert "layer 0" in out.split("DIVERGES")[0]


def test_what_is_not_a_number_diverges():
    assert verify.Row("layer 0", float("nan"), 1.0).diverges
    assert not verify.Row("layer 0", 0.0, 0.0).diverges


def test_verify_says_what_is_wrong(tmp_path, capsys):
    config = rwkv_jax.RWKV4Config(vocab_size=8, num_layers=1, embed_dim=4)
    rwkv_jax.save(tmp_path / "m.st", random_params(config), config)
    file = tmp_path / "m.st"
    assert "no such file" in ends_in_words(verify.main, [tmp_path / "absent"], capsys)
    assert "no tokenizer is known" in ends_in_words(verify.main, [file, "--text", "a"], capsys)
    assert "abacus" in ends_in_words(verify.main, [file, "--backend", "abacus"], capsys)
    assert "at least 1" in ends_in_words(verify.main, [file, "--tokens", "0"], capsys)


@pytest.mark.slow
def test_the_text_given_is_what_is_run(tmp_path, capsys):
    config = rwkv_jax.RWKV4Config(vocab_size=256, num_layers=1, embed_dim=4)
    rwkv_jax.save(tmp_path / "m.st", random_params(config), config)
    verify.main([str(tmp_path / "m.st"), "--text", "seven t"])
    assert "7 tokens" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["convert", "inspect", "verify"])
def test_a_command_runs_as_a_module(command):
    result = subprocess.run(
        [sys.executable, "-m", f"rwkv_jax.{command}", "--help"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert f"rwkv_jax.{command}" in result.stdout


def test_sigterm_ends_a_command_as_an_exception_that_removes_what_is_half_written():
    parser = argparse.ArgumentParser(prog="command")
    removed = []

    def work():
        with errors_in_words(parser):
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                removed.append(True)

    with pytest.raises(SystemExit) as error:
        work()
    assert removed and error.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_inspect_says_that_a_file_has_a_tuned_state_too(tmp_path):
    config = SMALL["rwkv7"]
    tensors = official(random_params(config), config)
    states = {f"blocks.{i}.att.time_state": np.zeros((3, 4, 4), np.float32) for i in range(config.num_layers)}
    safetensors.numpy.save_file(tensors | states, tmp_path / "m")
    assert "a tuned state" in inspect.describe(tmp_path / "m")
