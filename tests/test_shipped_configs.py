"""The configs in experiments/configs: all can be read, and released models have the numbers of their papers and code."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from rwkv_jax import config, count_params
from rwkv_jax.lm import flops_per_token

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "experiments" / "configs").glob("*.toml"))
TRAINS = re.compile(r"^# +python experiments/(?:train|finetune_qa)\.py (.*)$", re.MULTILINE)
SHIPPED = [path.name for path in FILES if TRAINS.search(path.read_text(encoding="utf-8"))]
STUDIES = [path.name for path in FILES if path.name not in SHIPPED]

# arXiv 2305.13048 (EMNLP text), tables 2 and 3: layers, width, parameters, forward FLOP a token, initial and
# final learning rate, mini-epochs at the initial learning rate.
PUBLISHED = {
    "169m": (12, 768, "1.693e+08", "2.613e+08", 6e-4, 1e-5, 361),
    "430m": (24, 1024, "4.304e+08", "7.573e+08", 4e-4, 1e-5, 411),
    "1b5": (24, 2048, "1.515e+09", "2.823e+09", 3e-4, 1e-5, 443),
    "3b": (32, 2560, "2.985e+09", "5.710e+09", 1.5e-4, 1e-5, 451),
    "7b": (32, 4096, "7.393e+09", "1.437e+10", 1.5e-4, 1e-5, 465),
    "14b": (40, 5120, "1.415e+10", "2.778e+10", 1e-4, 7e-6, 544),
}

# Released RWKV-7: layers, width, the sum of the low-rank widths (decay, in-context learning rate, value residual, gate), and
# the name's parameters in 1e9.
RELEASED = {
    "0b1": (12, 768, 64 + 64 + 32 + 128, 0.1),
    "0b4": (24, 1024, 64 + 64 + 32 + 128, 0.4),
    "1b5": (24, 2048, 96 + 96 + 64 + 256, 1.5),
    "2b9": (32, 2560, 96 + 96 + 64 + 320, 2.9),
    "7b2": (32, 4096, 128 + 128 + 96 + 480, 7.2),
    "13b3": (61, 4096, 128 + 128 + 96 + 480, 13.3),
}


@pytest.fixture
def read(monkeypatch):
    """A function from a config's name to what the command in its first lines would train."""

    def read(name):
        monkeypatch.chdir(ROOT)
        text = Path("experiments", "configs", name).read_text(encoding="utf-8")
        command = TRAINS.search(text)
        assert command, "the config does not say how to run it"
        arguments = shlex.split(command[1])
        assert arguments[:2] == ["--cfg", f"experiments/configs/{name}"]
        return config.parse(arguments)

    return read


@pytest.mark.parametrize("name", SHIPPED)
def test_the_command_in_a_shipped_config_is_accepted_and_trains_in_its_own_folder(name, read):
    assert Path(read(name).run.folder).name == name.removesuffix(".toml")


@pytest.mark.parametrize("name", STUDIES)
def test_the_command_in_a_studys_config_is_accepted(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = Path("experiments", "configs", name).read_text(encoding="utf-8")
    command = re.search(r"^# +python experiments/(\w+)\.py (.*)$", text, re.MULTILINE)
    assert command, "the config does not say how to run it"
    arguments = shlex.split(command[2])
    assert arguments[:2] == ["--cfg", f"experiments/configs/{name}"]
    settings = config.parse_as(importlib.import_module(command[1]).Settings, arguments, command[1])
    assert settings.study.folder.startswith("runs/")


def test_enwik8_is_cut_as_in_the_paper_and_its_models_are_of_equal_size(read):
    settings = {name: read(f"enwik8_{name}.toml") for name in ("rwkv4", "rwkv7", "transformer")}
    assert {s.data.byte_split for s in settings.values()} == {(90_000_000, 5_000_000, 5_000_000)}
    assert {(s.model.num_layers, s.model.embed_dim, s.data.context_length) for s in settings.values()} == {
        (12, 512, 1024)
    }
    sizes = {name: count_params(s.model) for name, s in settings.items()}
    assert all(abs(size / sizes["rwkv4"] - 1) < 0.04 for size in sizes.values()), sizes


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_papers_models_have_the_published_shape_size_and_cost(name, read):
    layers, width, parameters, flops, *_ = PUBLISHED[name]
    model = read(f"rwkv4_{name}.toml").model
    assert (model.num_layers, model.embed_dim, model.vocab_size) == (layers, width, 50277)
    count = 2 * 50277 * width + 13 * width**2 * layers + width * (11 * layers + 4)
    assert count_params(model) == count
    assert f"{count_params(model):.3e}" == parameters
    assert f"{flops_per_token(model):.3e}" == flops


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_papers_models_train_by_the_published_recipe(name, read):
    *_, lr, lr_final, constant = PUBLISHED[name]
    settings = read(f"rwkv4_{name}.toml")
    optim, data = settings.optim, settings.data
    assert (optim.lr, optim.lr_final, optim.schedule) == (lr, lr_final, "exponential")
    assert (optim.b1, optim.b2, optim.eps, optim.weight_decay, optim.clip_norm) == (0.9, 0.99, 1e-8, 0.0, 1.0)
    assert (optim.lr_multiples, optim.l2wrap, optim.warmup_steps) == (True, 1e-4, 0)
    assert settings.model.embed_init == lr  # as RWKV-v4neo does
    assert (settings.model.dtype, data.context_length, data.tokenizer) == ("bfloat16", 1024, "20b")
    # A mini-epoch is 40320 sequences; 8043 of them are an epoch of the Pile.
    assert optim.constant_steps * data.batch_size == constant * 40320
    assert settings.run.steps * data.batch_size == 8043 * 40320


@pytest.mark.parametrize("name", RELEASED)
def test_rwkv7_models_have_the_released_shape_and_size(name, read):
    layers, width, ranks, billions = RELEASED[name]
    model = read(f"rwkv7_{name}.toml").model
    assert (model.num_layers, model.embed_dim, model.vocab_size) == (layers, width, 65536)
    assert (model.head_dim, sum(model.ranks)) == (64, ranks)
    upstream = 2 * 65536 * width + 4 * width + layers * (19 * width + 12 * width**2 + 2 * width * ranks)
    # Upstream's formula, which counts layer 0's unused v0, v1 and v2 too.
    assert count_params(model) == upstream
    assert abs(count_params(model) / 1e9 - billions) < 0.1


@pytest.mark.parametrize("name", [*RELEASED, "minipile"])
def test_rwkv7_models_train_by_the_published_recipe(name, read):
    settings = read(f"rwkv7_{name}.toml")
    optim = settings.optim
    assert (optim.b1, optim.b2, optim.eps, optim.clip_norm) == (0.9, 0.99, 1e-18, 1.0)
    assert (optim.schedule, optim.warmup_steps, optim.warmup_start, optim.lr_multiples) == ("cosine", 10, 0.01, True)
    assert optim.weight_decay == (0.001 if name == "minipile" else 0.1)
    assert (settings.model.dtype, settings.data.tokenizer) == ("bfloat16", "world")


def test_minipile_is_the_demo(read):
    settings = read("rwkv7_minipile.toml")
    model, data = settings.model, settings.data
    assert (model.num_layers, model.embed_dim, data.context_length, data.batch_size) == (12, 768, 512, 16)
    assert (settings.optim.lr, settings.optim.lr_final) == (6e-4, 6e-5)
    assert settings.run.steps == 1_498_226_207 // (512 * 16)
