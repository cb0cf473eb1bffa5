"""The training script as a user runs it: to the end, again, killed, stopped, and with bad input."""

import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from loop import DIVERGED
from scripts import COMPILING, ROOT, STEPS, arguments, command, losses, rows, run_here

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Orbax's and its dependencies' own
]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder of small texts."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    words = ["state", "decay", "token", "mix", "key", "value", "receptance", "time", "channel", "bonus"]
    for i in range(60):
        (folder / f"{i:02d}.txt").write_text(" ".join(rng.choice(words) for _ in range(80)) + ".\n")
    return folder


def train(corpus, folder, *overrides, env=None):
    return subprocess.run(
        command(corpus, folder, *overrides), capture_output=True, text=True, timeout=300, cwd=folder.parent, env=env
    )


def train_here(corpus, folder, *overrides):
    return run_here(folder.parent, "train.py", *arguments(corpus, folder, *overrides))


@pytest.fixture(scope="session")
def finished(corpus, tmp_path_factory):
    """A run that was never interrupted, and what it printed."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    result = train(corpus, folder)
    assert result.returncode == 0, result.stderr
    return folder, result


def test_a_run_leaves_everything_promised(finished):
    folder, result = finished
    assert [row["step"] for row in rows(folder)] == list(range(1, STEPS + 1))
    assert rows(folder)[-1]["loss"] < rows(folder)[0]["loss"] - 1
    keys = {
        "step",
        "loss",
        "bits_per_byte",
        "grad_norm",
        "learning_rate",
        "tokens_per_second",
        "model_flop_utilisation",
    }
    assert keys == set(rows(folder)[0])
    assert [row["step"] for row in rows(folder, "validation.jsonl")] == list(range(5, STEPS + 1, 5))
    assert (folder / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert list((folder / "tensorboard").glob("events.*"))
    assert (folder / "config.toml").exists() and (folder / "environment.json").exists()
    kept = {int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit()}
    best = min(rows(folder, "validation.jsonl"), key=lambda row: row["validation_bits_per_byte"])["step"]
    assert kept == {STEPS - 5, STEPS, best}
    for text in ("bits per byte", "gzip -9", "xz -9", "a sample", "resume", "experiments/generate.py --checkpoint"):
        assert text in result.stdout


def test_a_finished_run_says_so_and_a_changed_config_is_refused_with_the_fields(finished, corpus):
    folder, _ = finished
    before = losses(folder)
    again = train_here(corpus, folder)
    assert again.returncode == 0 and "This run is finished" in again.stdout
    changed = train_here(corpus, folder, "--model.num_layers", "3", "--optim.lr=0.02")
    assert changed.returncode == 1
    assert "model.num_layers: 2 -> 3" in changed.stderr and "optim.lr: 0.01 -> 0.02" in changed.stderr
    assert losses(folder) == before


def test_a_checkpoint_of_the_run_loads_and_generates(finished):
    folder, _ = finished
    options = ["--checkpoint", str(folder), "--prompt", "state ", "--max_tokens", "20", "--temperature", "0"]
    script = [sys.executable, str(ROOT / "experiments/generate.py"), *options]
    output = subprocess.run(script, capture_output=True, text=True, timeout=120)
    assert output.returncode == 0, output.stderr
    assert output.stdout.startswith("state ") and len(output.stdout) > 10
    assert run_here(folder, "generate.py", *options).stdout == output.stdout


def test_a_run_killed_at_random_moments_repeats_the_losses_bit_for_bit(finished, corpus, tmp_path):
    whole, _ = finished
    folder, rng, kills = tmp_path / "run", random.Random(1), 0
    while kills < 4:
        process = subprocess.Popen(
            command(corpus, folder), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        metrics, aim = folder / "metrics.jsonl", (kills + 1) * STEPS // 6 + rng.randrange(4)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if metrics.exists() and metrics.read_text().count("\n") >= aim:
                break
            time.sleep(0.01)
        time.sleep(rng.random() * 0.05)
        assert process.poll() is None, process.communicate()[1]
        process.kill()
        process.communicate()
        kills += 1
    result = train(corpus, folder, env=COMPILING)
    assert result.returncode == 0, result.stderr
    assert losses(folder) == losses(whole)
    validation = [[row["validation_bits_per_byte"] for row in rows(f, "validation.jsonl")] for f in (folder, whole)]
    assert validation[0] == validation[1]


def test_sigterm_saves_and_the_run_goes_on_bit_for_bit(finished, corpus, tmp_path):
    whole, _ = finished
    folder = tmp_path / "run"
    process = subprocess.Popen(
        command(corpus, folder), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not (folder / "metrics.jsonl").exists() or (folder / "metrics.jsonl").read_text().count("\n") < 7:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "stopped by a signal" in out
    assert train_here(corpus, folder).returncode == 0
    assert losses(folder) == losses(whole)


def test_a_non_finite_loss_stops_the_run_and_is_never_saved(corpus, tmp_path):
    folder = tmp_path / "run"
    result = train_here(corpus, folder, "--optim.lr", "1e30", "--optim.lr_final", "1e30", "--run.checkpoint_every", "1")
    assert result.returncode == DIVERGED
    assert "step 2: loss nan" in result.stderr and "the last good checkpoint is" in result.stderr
    finite = [row for row in rows(folder) if row["loss"] == row["loss"] and abs(row["loss"]) != float("inf")]
    assert len(finite) == len(rows(folder))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--data.path", "/nowhere/at/all"], "/nowhere/at/all: no text here"),
        (["--data.context_length", "100000"], "data.context_length=100000"),
        (["--model.vocab_size", "200"], "set it to at least 256"),
        (["--run.folder", "/proc/run"], "/proc/run: cannot be written"),
        (["--run.backend", "cuda"], "parallel: runs here"),
        (["--model.num_layer", "3"], "the nearest is --model.num_layers"),
        (["--optim.accumulate", "3"], "does not divide into accumulate=3"),
    ],
)
def test_bad_input_ends_with_a_message_that_names_it(corpus, tmp_path, overrides, message):
    result = train_here(corpus, tmp_path / "run", *overrides)
    assert result.returncode in (1, 2)
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_the_transformers_quickstart_trains_on_and_generates(corpus, tmp_path):
    file, folder = ROOT / "experiments/configs/quickstart_transformer.toml", tmp_path / "run"
    run = ["--cfg", str(file), "--run.folder", str(folder)]
    text = ["--data.source", "text", "--data.path", str(corpus), "--data.cache_dir", str(tmp_path / "cache")]
    sizes = ["--data.context_length", "32", "--model.num_layers", "2", "--model.embed_dim", "64", "--run.steps", "3"]
    rest = [
        "--run.peak_tflops",
        "1",
        "--data.validation_fraction",
        "0.2",
        "--optim.constant_steps",
        "1",
        "--optim.warmup_steps",
        "1",
    ]
    result = run_here(tmp_path, "train.py", *run, *text, *sizes, *rest)
    assert result.returncode == 0, result.stderr
    assert losses(folder)[2][1] < losses(folder)[0][1] and "transformer" in result.stdout
    options = ["--checkpoint", str(folder), "--prompt", "state ", "--max_tokens", "5", "--temperature", "0"]
    shown = run_here(tmp_path, "generate.py", *options)
    assert shown.returncode == 0 and len(shown.stdout) > len("state "), shown.stderr


def test_two_processes_do_not_train_in_one_folder(corpus, tmp_path):
    folder = tmp_path / "run"
    first = subprocess.Popen(
        command(corpus, folder), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not (folder / "config.toml").exists():
        assert first.poll() is None
        time.sleep(0.01)
    second = train_here(corpus, folder)
    first.kill()
    first.wait()
    assert second.returncode == 1 and "another process is training" in second.stderr


def test_a_start_that_failed_is_not_held_against_the_corrected_command(corpus, tmp_path):
    folder = tmp_path / "run"
    assert train_here(corpus, folder, "--data.path", "/nowhere").returncode == 1
    result = train_here(corpus, folder, "--run.steps", "2")
    assert result.returncode == 0, result.stderr


def test_a_moved_run_goes_on_and_one_whose_text_changed_does_not(corpus, tmp_path):
    copy = shutil.copytree(corpus, tmp_path / "corpus")
    folder, moved = tmp_path / "run", tmp_path / "moved"
    assert train(copy, folder, "--run.steps", "6").returncode == 0
    folder.rename(moved)
    again = train_here(copy, moved, "--run.steps", "6")
    assert again.returncode == 0 and "This run is finished" in again.stdout, again.stderr
    for file in copy.iterdir():
        file.write_text("another text " * 40)
    changed = train_here(copy, moved, "--run.steps", "6")
    assert changed.returncode == 1 and "the training text is not the one" in changed.stderr
