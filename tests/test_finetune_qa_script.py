"""Fine-tuning on questions as a user runs it: each method, killed, measured, on blanks and on lines of JSON, and with bad input."""

import functools
import importlib
import json
import random
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from scripts import COMPILING, ROOT, losses, run_here

from rwkv_jax import accuracy, checkpoint, config, sharding

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Orbax's and its dependencies' own
]
METHODS = {
    "all": [],
    "lora": ["--finetune.method", "lora", "--optim.accumulate", "2"],
    "state": ["--finetune.method", "state", "--optim.lr", "0.1"],
}
WORDS = ["stone", "river", "mountain", "forest", "lake"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a corpus, a finished run on it, base, and questions whose answer is the word that is asked about."""
    folder, rng = tmp_path_factory.mktemp("qa"), random.Random(0)
    (folder / "text").mkdir()
    for i in range(30):
        lines = [" ".join(rng.choices(WORDS, k=4)) for _ in range(8)]
        (folder / "text" / f"{i:02d}.txt").write_text("\n".join(lines) + "\n")
    rows = []
    for i in range(240):
        choices = rng.sample(WORDS, 4)
        gold = choices.index(min(choices))
        rows.append({"question": f"{i} {min(choices)}?", "choices": choices, "gold": gold})
    (folder / "arc.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = f"""
[data]
source = "text"
path = "text"
validation_fraction = 0.2
cache_dir = {json.dumps(str(folder / "cache"))}
context_length = 48
batch_size = 4
documents = "rows"
[optim]
lr = 1e-2
lr_final = 1e-3
[run]
steps = 12
validate_every = 4
checkpoint_every = 4
validation_tokens = 500
"""
    (folder / "base.toml").write_text(f"[model]\nvocab_size = 256\nnum_layers = 2\nembed_dim = 16\n{shared}")
    (folder / "qa.toml").write_text(
        f'{shared}[finetune]\ninit_from = "base"\n[questions]\ntask = "blanks"\ntraining_items = 150\nheld_out_items = 40\n'
    )
    result = run_here(folder, "train.py", "--cfg", "base.toml", "--run.folder", "base")
    assert result.returncode == 0, result.stderr
    return folder


def tuning(method, folder):
    return "finetune_qa.py", "--cfg", "qa.toml", "--run.folder", folder, *METHODS[method]


@pytest.fixture(scope="module")
def finished(home):
    """A function from a method to the folder of a run of it that was never interrupted, and what it printed."""

    @functools.cache
    def run(method):
        result = run_here(home, *tuning(method, f"{method}_whole"))
        assert result.returncode == 0, result.stderr
        return home / f"{method}_whole", result.stdout

    return run


@pytest.mark.parametrize("method", METHODS)
def test_a_run_reports_both_accuracies_and_the_gain_with_intervals(finished, method):
    folder, printed = finished(method)
    results = json.loads((folder / "results.json").read_text())
    assert (results["task"], results["method"], results["chance"]) == ("blanks", method, 0.25)
    for name in ("before", "after"):
        own = results[name]
        right = round(own["value"] * 40)
        assert list(accuracy.share([i < right for i in range(40)])) == [own["value"], own["low"], own["high"]]
        assert f"{own['value']:.1%} [{own['low']:.1%}, {own['high']:.1%}]" in printed
    gain = results["gain"]
    assert gain["value"] == pytest.approx(results["after"]["value"] - results["before"]["value"])
    assert ("not resolved" in printed) == (not gain["resolved"]) == (gain["low"] <= 0 <= gain["high"])
    assert results["after"]["bits_per_byte"] < results["before"]["bits_per_byte"]
    assert "40 questions held out, chance 25.0%" in printed


def test_a_killed_run_goes_on_bit_for_bit_and_a_finished_one_says_so(finished, home):
    method, folder = "lora", home / "killed"
    whole, _ = finished(method)
    name, *arguments = tuning(method, folder.name)
    command = [sys.executable, str(ROOT / "experiments" / name), *arguments]
    process = subprocess.Popen(command, cwd=home, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None and not checkpoint.is_checkpoint(folder):
        time.sleep(0.005)
    assert process.poll() is None, process.communicate()[1]
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=120)
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=home, env=COMPILING)
    assert result.returncode == 0, result.stderr
    assert losses(folder) == losses(whole)
    ours, theirs = (json.loads((run / "results.json").read_text()) for run in (folder, whole))
    assert [ours[name] for name in ("before", "after", "gain")] == [
        theirs[name] for name in ("before", "after", "gain")
    ]
    again = run_here(home, *tuning(method, folder.name))
    assert again.returncode == 0 and "This run is finished" in again.stdout, again.stderr


def test_a_run_learns_what_is_asked_in_a_file(home):
    arguments = ["--questions.task", "arc_easy", "--data.source", "jsonl", "--data.path", "arc.jsonl"]
    longer = ["--run.steps", "200", "--run.validate_every", "200", "--run.checkpoint_every", "200"]
    result = run_here(home, "finetune_qa.py", "--cfg", "qa.toml", "--run.folder", "arc", *arguments, *longer)
    assert result.returncode == 0, result.stderr
    results = json.loads((home / "arc/results.json").read_text())
    assert results["gain"]["resolved"] and results["after"]["low"] > results["chance"]


def experiments(monkeypatch, *names):
    """Modules of experiments, which find each other in their own folder."""
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    return [importlib.import_module(name) for name in names]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--finetune.init_from", "runs/quickstart"], "python experiments/train.py --cfg experiments/configs/quickstart"),
        (["--questions.task", "arc_esy"], "questions.task is 'arc_esy'; there is none of that name, the nearest: arc_easy"),
        (["--questions.task", "null"], "give questions.task"),
        (["--questions.task", "piqa"], "set it to 'jsonl' with a data.path"),
        (["--questions.task", "piqa", "--data.source", "jsonl", "--data.path", "arc.jsonl"], "arc.jsonl:1: not a question"),
        (["--data.tokenizer", "world"], "base was trained with 'bytes'"),
        (["--data.documents", "stream"], "every question is a row of its own: set it to 'rows'"),
    ],
)  # fmt: skip
def test_bad_input_is_named_before_anything_is_computed(home, monkeypatch, overrides, message):
    monkeypatch.chdir(home)
    loop, finetune_qa = experiments(monkeypatch, "loop", "finetune_qa")
    mesh = sharding.make_mesh(sharding.MeshConfig())

    def prepare():
        settings = config.parse(["--cfg", "qa.toml", *overrides])
        finetune_qa.prepare(loop.starting_point(settings, (), mesh)[0], mesh, np.arange(4))

    with pytest.raises((ValueError, OSError), match=re.escape(message)):
        prepare()


@pytest.mark.parametrize(
    ("size", "parts", "advice"),
    [
        (12, 3, "try --optim.accumulate 6, which computes the same in smaller parts, or --data.batch_size 6"),
        (4, 4, "try --data.context_length 24"),
    ],
)
def test_a_batch_that_is_too_large_for_the_device_is_answered_with_one_to_try(home, monkeypatch, size, parts, advice):
    (loop,) = experiments(monkeypatch, "loop")
    overrides = ["--data.batch_size", str(size), "--optim.accumulate", str(parts)]
    settings = config.parse(["--cfg", str(home / "qa.toml"), *overrides])
    with pytest.raises(MemoryError, match=advice), loop.naming_a_batch_that_fits(settings):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 byte")
