"""Fine-tuning as a user runs it: each method from a tiny run, to the end, interrupted, loaded, and with bad input."""

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from huggingface_hub import constants
from scripts import COMPILING, ROOT, losses, run_here

import rwkv_jax
from rwkv_jax import checkpoint, config, sharding

STEPS = 12
METHODS = {
    "all": ["--optim.weight_decay", "0.01"],
    "lora": [
        "--finetune.method",
        "lora",
        "--finetune.lora_rank",
        "2",
        "--optim.accumulate",
        "2",
        "--data.documents",
        "packed",
    ],
    "state": ["--finetune.method", "state", "--data.documents", "rows", "--optim.lr", "0.1"],
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Orbax's and its dependencies' own
]


def write_corpus(folder, words):
    rng = random.Random(0)
    folder.mkdir()
    for i in range(40):
        (folder / f"{i:02d}.txt").write_text(" ".join(rng.choice(words) for _ in range(rng.randrange(3, 30))) + ".\n")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with two corpora and a finished run on the first, base."""
    folder = tmp_path_factory.mktemp("finetune")
    write_corpus(folder / "old", ["state", "decay", "token", "mix", "key", "value"])
    write_corpus(folder / "new", ["stone", "river", "mountain", "forest", "lake"])
    shared = f"""
[data]
source = "text"
validation_fraction = 0.2
cache_dir = {json.dumps(str(folder / "cache"))}
context_length = 32
batch_size = 4
[optim]
lr = 1e-2
lr_final = 1e-3
[run]
steps = {STEPS}
validate_every = 4
checkpoint_every = 4
validation_tokens = 500
"""
    (folder / "base.toml").write_text(f"[model]\nvocab_size = 256\nnum_layers = 2\nembed_dim = 16\n{shared}")
    (folder / "tune.toml").write_text(
        f'{shared}[finetune]\ninit_from = "base"\ncompare_source = "text"\ncompare_path = "old"\n'
    )
    result = train_here(folder, "base.toml", "--data.path", "old", "--run.folder", "base", "--run.steps", "40")
    assert result.returncode == 0, result.stderr
    return folder


def command(config_file, *overrides):
    return [sys.executable, str(ROOT / "experiments/train.py"), "--cfg", config_file, *overrides]


def train_here(home, config_file, *overrides):
    return run_here(home, "train.py", "--cfg", config_file, *overrides)


def tuning(method, folder):
    return ("tune.toml", "--data.path", "new", "--run.folder", folder, *METHODS[method])


@pytest.fixture(scope="module", params=METHODS)
def finished(request, home):
    """A method, the folder of a run of it that was never interrupted, and what it printed."""
    result = train_here(home, *tuning(request.param, f"{request.param}_whole"))
    assert result.returncode == 0, result.stderr
    return request.param, home / f"{request.param}_whole", result.stdout


def test_a_run_learns_the_new_text_and_shows_both_corpora_before_and_after(finished):
    _, folder, printed = finished
    shown = re.findall(r"text, (tuned on|compared) +([\d.]+) -> ([\d.]+)", printed)
    assert [name for name, *_ in shown] == ["tuned on", "compared"]
    assert float(shown[0][2]) < float(shown[0][1])
    assert [step for step, *_ in losses(folder)] == list(range(1, STEPS + 1))


def test_the_run_loads_as_a_whole_model_and_generates(finished, home):
    method, folder, _ = finished
    params, model = rwkv_jax.load(folder)
    base, base_model = rwkv_jax.load(home / "base")
    assert model == base_model and (model.num_layers, model.embed_dim) == (2, 16)
    moved = [bool((x != y).any()) for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(base), strict=True)]
    assert {"all": all(moved), "lora": any(moved) and not all(moved), "state": not any(moved)}[method]
    mesh = sharding.make_mesh(sharding.MeshConfig(data=-1))
    spread, _ = rwkv_jax.load(folder, dtype="bfloat16", sharding=sharding.on(mesh))
    for x, y in zip(jax.tree.leaves(spread), jax.tree.leaves(params), strict=True):
        assert x.sharding.device_set == set(mesh.devices.flat)
        np.testing.assert_allclose(np.float32(x), np.float32(y), rtol=2**-8)  # One rounding to bfloat16.
    start = checkpoint.load_first_state(folder)
    assert (start is not None) == (method == "state")
    if start is not None:
        assert max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(start)) > 0
    output = run_here(home, "generate.py", "--checkpoint", str(folder), "--prompt", "river ", "--max_tokens", "10")
    assert output.returncode == 0, output.stderr
    assert output.stdout.startswith("river ")


def test_the_settings_of_a_run_load_equal_and_train_it_again(finished, home):
    _, folder, _ = finished
    settings = config.load(folder / "config.toml")
    assert settings == checkpoint.load_checkpoint(folder)[2]
    again = train_here(home, str(folder / "config.toml"))
    assert again.returncode == 0 and "This run is finished" in again.stdout, again.stderr


def test_a_killed_and_then_stopped_run_goes_on_bit_for_bit_without_reading_the_model_again(finished, home):
    method, whole, _ = finished
    folder = home / f"{method}_interrupted"
    arguments = tuning(method, folder.name)

    metrics = folder / "metrics.jsonl"

    def interrupted(way, ready, env=None):
        process = subprocess.Popen(
            command(*arguments), cwd=home, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env
        )
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and process.poll() is None and not ready():
            time.sleep(0.005)
        assert process.poll() is None, process.communicate()[1]
        process.send_signal(way)
        process.communicate(timeout=120)

    # Before the first checkpoint nothing is lost, and a run begins again.
    interrupted(signal.SIGKILL, lambda: checkpoint.is_checkpoint(folder))
    kept = max(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit())
    file = metrics.stat().st_ino  # Of a run that goes on it is another, without the steps that were lost.
    (home / "base").rename(home / "away")
    try:
        goes_on = lambda: metrics.stat().st_ino != file and metrics.read_text().count("\n") > kept
        interrupted(signal.SIGTERM, goes_on, env=COMPILING)
        result = train_here(home, *arguments)
    finally:
        (home / "away").rename(home / "base")
    assert result.returncode == 0, result.stderr
    assert losses(folder) == losses(whole)


def test_a_run_keeps_to_the_commit_of_the_hub_that_it_began_with(home, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository, commit = tmp_path / "hub/models--org--repo", "0123456789abcdef0123456789abcdef01234567"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(commit)
    (repository / "snapshots").mkdir()
    rwkv_jax.save(repository / "snapshots" / commit, *rwkv_jax.load(home / "base"), "huggingface")
    run = (
        "tune.toml",
        "--data.path",
        "new",
        "--run.folder",
        str(tmp_path / "run"),
        "--init_from",
        "hf://org/repo@main",
    )
    first = train_here(home, *run)
    assert first.returncode == 0, first.stderr
    recorded = config.load(tmp_path / "run/config.toml").finetune
    assert (recorded.init_from, recorded.init_commit) == ("hf://org/repo@main", commit)
    shutil.rmtree(repository)
    again = train_here(home, *run)
    assert again.returncode == 0 and "This run is finished" in again.stdout, again.stderr


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--model.num_layers", "3"], "model.num_layers: 3, in base 2"),
        (["--finetune.init_from", "nowhere"], "nowhere"),
        (["--finetune.method", "lora", "--finetune.lora_targets", '["query"]'], "the matrices of rwkv4 are"),
        (["--finetune.compare_path", "no_text"], "no_text: no text here"),
        (["--finetune.method", "state"], "set data.documents to 'rows'"),
        (["--data.tokenizer", "world"], "base was trained with 'bytes'"),
    ],
)
def test_bad_input_ends_with_a_message_that_names_it(home, tmp_path, overrides, message):
    result = train_here(home, "tune.toml", "--data.path", "new", "--run.folder", str(tmp_path / "run"), *overrides)
    assert result.returncode in (1, 2)
    assert message in result.stderr
    assert "Traceback" not in result.stderr
