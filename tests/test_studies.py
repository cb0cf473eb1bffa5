"""The studies of the paper's questions: their parts against independent sums, and the three as a user runs them."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial

import context
import jax
import numpy as np
import pytest
import scaling
import study
import training_cells
from equal_size import non_embedding
from scripts import ROOT
from small_models import forward
from study import Finished
from training_cells import TrainingConfig, models, training_cell

import rwkv_jax
from rwkv_jax import config
from rwkv_jax.config import ConfigError
from rwkv_jax.text import DataConfig

DATA = DataConfig(context_length=64, batch_size=8)


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    """Recipes are named from the project's folder."""
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(("num_layers", "embed_dim"), [(1, 64), (4, 96), (5, 128), (12, 768)])
def test_architectures_of_a_size_differ_by_less_than_two_percent_in_parameters(num_layers, embed_dim):
    sized = models(TrainingConfig(), num_layers, embed_dim, window=128)
    assert list(sized) == ["rwkv4", "rwkv7", "transformer"]
    published = 13 * embed_dim**2 * num_layers  # RWKV-4's matrices, arXiv 2305.13048, appendix B.
    for model in sized.values():
        counted = sum(
            x.size
            for x in jax.tree.leaves(jax.eval_shape(partial(rwkv_jax.init, config=model), jax.random.key(0)).blocks)
        )
        assert abs(counted / published - 1) < 0.02 + 20 / embed_dim
        assert abs(non_embedding(model) / non_embedding(sized["rwkv4"]) - 1) < 0.02
    assert sized["transformer"].context_length == 128


def test_an_architecture_that_cannot_be_as_small_is_refused():
    with pytest.raises(ValueError, match="take a larger width"):
        models(TrainingConfig(head_dim=8), 1, 16, window=128)


def test_cells_of_one_seed_have_the_same_batches_and_differ_where_architectures_do():
    training = TrainingConfig(tokens=8192, validations=4)
    sized = models(training, 1, 64, DATA.context_length)
    cells = [training_cell(training, DATA, model, rate=1e-3, seed=7) for model in sized.values()]
    assert len({cell.name for cell in cells}) == 3
    for section in ("data", "run"):
        assert all(cell.settings[section] == cells[0].settings[section] for cell in cells)
    assert cells[0].settings["data"]["seed"] == cells[0].settings["run"]["seed"] == 7
    assert cells[0].settings["run"]["steps"] * 64 * 8 == 8192
    schedule = ("lr", "lr_final", "schedule", "constant_steps", "warmup_steps")
    assert len({tuple(cell.settings["optim"][name] for name in schedule) for cell in cells}) == 1


def test_what_train_py_would_refuse_is_refused_before_a_cell_is_trained():
    (model, *_) = models(TrainingConfig(), 1, 64, 64).values()
    with pytest.raises(ConfigError, match="optim.schedule"):
        training_cell(TrainingConfig(tokens=8192, schedule="cosin"), DATA, model, rate=1e-3, seed=0)
    with pytest.raises(ValueError, match="must be a multiple of training.validations=8 times the 512 tokens"):
        training_cell(TrainingConfig(tokens=9000), DATA, model, rate=1e-3, seed=0)


@pytest.mark.parametrize("floor", [0.0, 0.9])
def test_a_power_law_is_found_again(floor):
    parameters = np.array([1e5, 2e5, 5e5, 1e6, 3e6])
    losses = floor + 12.5 * parameters**-0.17
    law = scaling.fit(parameters.tolist(), losses.tolist(), floor=floor > 0)
    np.testing.assert_allclose([law.scale, law.exponent, law.floor], [12.5, 0.17, floor], rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(law(parameters), losses, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["transformer", "rwkv4"])
def test_losses_by_position_are_those_of_one_call_and_cleared_ones_those_of_documents_cut_up(name):
    model = models(TrainingConfig(vocab_size=32), 1, 64, window=16)[name]
    params = rwkv_jax.init(jax.random.key(0), model)
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), params)
    tokens = np.random.default_rng(0).integers(0, 32, (2, 65)).astype(np.int32)

    def expected(model, tokens):
        log_p = jax.nn.log_softmax(forward(params, model, tokens[:, :-1])[0])
        return -np.take_along_axis(np.asarray(log_p), tokens[:, 1:, None], axis=2)[..., 0]

    whole = expected(model, tokens)
    np.testing.assert_allclose(context.read(params, model, tokens, 32), whole, rtol=2e-4, atol=2e-4)
    parts = [expected(model, tokens[:, i : i + 17]) for i in range(0, 64, 16)]
    cleared = context.read_cleared(params, model, tokens, 16)
    np.testing.assert_allclose(cleared, np.concatenate(parts, axis=1), rtol=2e-4, atol=2e-4)
    assert np.abs(cleared - whole)[:, :16].max() < 2e-4 < 0.01 < np.abs(cleared - whole)[:, 16:].max()
    if name == "transformer":
        wide = context.read(params, replace(model, context_length=64), tokens, 32)
        assert np.abs(wide - whole)[:, :16].max() < 2e-4 < 0.01 < np.abs(wide - whole)[:, 16:].max()


def test_bins_hold_every_position_once():
    assert context.bins(512) == [0, 16, 32, 64, 128, 256, 512]
    found = context.by_position(np.arange(64.0)[None], 2.0, length=32)
    assert found == {"bins": [15.0, 47.0, 95.0], "past": 95.0}


def test_a_rate_that_diverges_is_not_chosen_and_never_compared(monkeypatch):
    def train(study, cells):
        results = [{"diverged": "step 3"} if "rate0.3" in c.name else {"held_out": 2.0} for c in cells]
        return {c.name: Finished(result, 1.0, {}) for c, result in zip(cells, results, strict=True)}

    monkeypatch.setattr(training_cells, "train_or_diverge", train)
    sized = models(TrainingConfig(), 1, 64, DATA.context_length)

    def choose(*rates):
        training = TrainingConfig(tokens=8192, rates=rates)
        return training_cells.choose_rates(study.StudyConfig(), training, DATA, sized)

    rates, how = choose(0.1, 0.3)
    assert set(rates.values()) == {0.1} and set(how["rates_tried"]["rwkv4"].values()) == {2.0, "diverged"}
    with pytest.raises(ValueError, match="rwkv4, rwkv7, transformer diverged at every one"):
        choose(0.3, 0.31)
    cell = training_cell(TrainingConfig(tokens=8192), DATA, sized["rwkv4"], rate=0.3, seed=0)
    with pytest.raises(ValueError, match="rwkv4-1x64-.*-rate0.3-seed0: step 3"):
        training_cells.train_all(study.StudyConfig(), [cell])


@pytest.mark.slow
def test_a_run_that_diverges_is_a_result_and_not_a_failure(tmp_path):
    (model, *_) = models(TrainingConfig(), 1, 64, DATA.context_length).values()
    own = study.StudyConfig(folder=str(tmp_path))
    cell = training_cell(TrainingConfig(tokens=8192, validations=4), DATA, model, rate=1e30, seed=0)
    assert "step 2: loss nan" in training_cells.train_cell(own, cell, lambda share: None)["diverged"]


@pytest.mark.slow
def test_the_three_studies_end_in_records_and_plots_and_never_train_a_cell_twice(tmp_path, capsys):
    folder = tmp_path / "studies"

    def arguments(name, *recipes):
        names = json.dumps([f"experiments/configs/{recipe}.toml" for recipe in recipes])
        shorter = ["--training.tokens", "2048", "--training.validations", "2", "--training.recipes", names]
        return ["--cfg", f"experiments/configs/{name}_smoke.toml", "--study.folder", str(folder), *shorter]

    def record(name):
        assert (folder / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        return json.loads((folder / f"{name}.json").read_text())

    command = [sys.executable, "experiments/learning_curves.py"]
    command += arguments("learning_curves", "quickstart", "quickstart_transformer")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    row = record("learning_curves")
    ends = {name: cell["result"]["held_out"] for name, cell in row["cells"].items()}
    a, b = ([end for name, end in ends.items() if name.startswith(kind)] for kind in ("rwkv4", "transformer"))
    assert len(a) == len(b) == 2
    assert row["verdicts"] == [study.verdict("RWKV-4", a, "transformer", b, 0.95, unit="bits per byte")]
    assert row["verdicts"][0] in done.stdout

    trained = {path: path.read_bytes() for path in (folder / "cells").iterdir()}
    for module, own in ((scaling, []), (context, ["--lengths.trained", "[64]"])):
        name = module.__name__
        given = [*arguments(name, "quickstart"), "--study.seeds", "[0]", *own]
        module.run(config.parse_as(module.Settings, given, name))
        shown, row = capsys.readouterr().out, record(name)
        assert all(line in shown for line in row["table"]) and all(verdict in shown for verdict in row["verdicts"])
    assert {path: path.read_bytes() for path in trained} == trained
    assert len(list((folder / "runs").glob("*.toml"))) == 5
