"""Checkpoints: what is saved comes back, and what is not whole is never taken for whole."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rwkv_jax
from rwkv_jax import checkpoint, config, optim, train
from rwkv_jax.models import module_of
from rwkv_jax.text import DataConfig

MODEL = rwkv_jax.RWKV4Config(vocab_size=256, num_layers=2, embed_dim=8)
SETTINGS = config.Settings(MODEL, DataConfig(), optim.OptimConfig(), config.RunConfig(prompt="é\n"))
OPTIMIZER = optim.make_optimizer(SETTINGS.optim, module_of(MODEL).declare(MODEL), 10)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Orbax's and its dependencies' own


@pytest.fixture(scope="module")
def states():
    """Three training states, each a step after the other."""
    state = train.init_train_state(jax.random.key(0), MODEL, OPTIMIZER)
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, 256)
    step = jax.jit(
        lambda s: train.train_step(
            s, tokens[:, :-1], tokens[:, 1:], None, config=MODEL, optimizer=OPTIMIZER, l2wrap=0.0
        )[0]
    )
    result = []
    for _ in range(3):
        state = step(state)
        result.append(state)
    return result


def equal(a, b):
    leaves = [jax.tree.leaves(jax.tree.map(lambda x: x, tree)) for tree in (a, b)]
    for x, y in zip(*leaves, strict=True):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def run(states, tmp_path_factory):
    """The folder of a run with those states, of which the last and the best are kept."""
    folder = tmp_path_factory.mktemp("checkpoint") / "run"
    checkpoints = checkpoint.Checkpoints(folder, keep_last=1, keep_best=1)
    for state, bits in zip(states, [3.0, 1.0, 2.0], strict=True):
        checkpoints.save(state, {"next": int(state.step)}, SETTINGS, bits)
    checkpoints.close()
    return folder


@pytest.fixture
def saved(run, tmp_path):
    """A copy of it."""
    return shutil.copytree(run, tmp_path / "run")


def test_float64_that_jax_does_not_have_is_refused_of_a_run_too(saved):
    with pytest.raises(ValueError, match="jax_enable_x64"):
        rwkv_jax.load(saved, dtype="float64")


def test_the_newest_comes_back_whole_and_the_best_is_kept(saved, states):
    checkpoints = checkpoint.Checkpoints(saved, keep_last=1, keep_best=1)
    restored = checkpoints.restore(states[0], SETTINGS)
    assert restored is not None
    equal(restored.train_state, states[2])
    assert restored.data_state == {"next": 3}
    assert {path.name for path in (saved / "checkpoints").iterdir()} == {"2", "3"}
    checkpoints.close()


def test_saving_is_not_disturbed_by_donating_the_state_at_once(states, tmp_path):
    state = states[0]._replace(params=jax.tree.map(jnp.copy, states[0].params))
    expected = jax.tree.map(np.asarray, states[0].params)
    checkpoints = checkpoint.Checkpoints(tmp_path / "run", keep_last=1, keep_best=0)
    checkpoints.save(state, {}, SETTINGS, 1.0)
    jax.block_until_ready(jax.jit(lambda p: jax.tree.map(lambda x: x * 0 - 7, p), donate_argnums=0)(state.params))
    checkpoints.close()
    equal(rwkv_jax.load(tmp_path / "run")[0], expected)


@pytest.mark.parametrize("inside", ["", "checkpoints", "checkpoints/3"])
def test_load_takes_a_run_its_checkpoints_or_one_step(saved, states, inside):
    params, model = rwkv_jax.load(saved / inside)
    assert model == dataclasses.replace(MODEL, tokenizer="bytes")
    equal(params, states[2].params)
    assert checkpoint.load_checkpoint(saved / inside)[2] == SETTINGS


def test_load_casts_and_an_older_step_can_be_named(saved, states):
    params, _ = rwkv_jax.load(saved / "checkpoints/2", dtype="bfloat16")
    equal(params, jax.tree.map(lambda x: x.astype("bfloat16"), states[1].params))


def test_an_unfinished_checkpoint_is_not_seen(saved, states):
    folder = saved / "checkpoints"
    shutil.copytree(folder / "3", folder / "4.orbax-checkpoint-tmp")
    checkpoints = checkpoint.Checkpoints(saved, keep_last=1, keep_best=1)
    assert checkpoints.latest_step() == 3
    checkpoints.close()
    equal(rwkv_jax.load(saved)[0], states[2].params)


def test_a_damaged_checkpoint_is_refused_and_named(saved, states):
    for file in (saved / "checkpoints/3/params").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"checkpoints/3: this checkpoint is damaged"):
        rwkv_jax.load(saved)
    checkpoints = checkpoint.Checkpoints(saved, keep_last=1, keep_best=1)
    with pytest.raises(ValueError, match="remove it to use an earlier one"):
        checkpoints.restore(states[0], SETTINGS)
    checkpoints.close()
    shutil.rmtree(saved / "checkpoints/3")
    equal(rwkv_jax.load(saved)[0], states[1].params)


@pytest.mark.parametrize("error", [PermissionError("not yours"), MemoryError()])
def test_what_may_be_sound_is_not_called_damaged(error, saved, states, monkeypatch):
    def refuse(*arguments, **options):
        raise error

    checkpoints = checkpoint.Checkpoints(saved, keep_last=1, keep_best=1)
    monkeypatch.setattr(checkpoints._manager, "restore", refuse)
    with pytest.raises(type(error)):
        checkpoints.restore(states[0], SETTINGS)
    checkpoints.close()


def test_a_checkpoint_of_another_model_is_refused(saved):
    other = dataclasses.replace(MODEL, embed_dim=16)
    optimizer = optim.make_optimizer(SETTINGS.optim, module_of(other).declare(other), 10)
    checkpoints = checkpoint.Checkpoints(saved, keep_last=1, keep_best=1)
    with pytest.raises(ValueError, match=r"checkpoints/3 was made with another config.*\n  model.embed_dim: 8 -> 16"):
        checkpoints.restore(
            train.init_train_state(jax.random.key(0), other, optimizer), dataclasses.replace(SETTINGS, model=other)
        )
    checkpoints.close()


def test_a_folder_without_checkpoints_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no whole checkpoint here"):
        rwkv_jax.load(tmp_path)
    assert not checkpoint.is_checkpoint(tmp_path)


def test_the_best_is_still_kept_by_a_run_that_was_resumed(states, tmp_path):
    for first in (0, 1, 2):
        checkpoints = checkpoint.Checkpoints(tmp_path / "run", keep_last=1, keep_best=1)
        checkpoints.save(states[first], {}, SETTINGS, [1.0, 5.0, 4.0][first])
        checkpoints.close()
    assert {path.name for path in (tmp_path / "run/checkpoints").iterdir()} == {"1", "3"}


def test_a_checkpoint_that_cannot_be_written_is_an_error_that_names_the_last(saved, states, monkeypatch):
    checkpoints = checkpoint.Checkpoints(saved, keep_last=1, keep_best=1)

    def full(*arguments, **options):
        raise ValueError("no space left\nand much more")

    monkeypatch.setattr(checkpoints._manager, "save", full)
    with pytest.raises(OSError, match=r"could not be written \(no space left\); the last whole one is that of step 3"):
        checkpoints.save(states[2], {}, SETTINGS, 1.0)
    checkpoints.close()
