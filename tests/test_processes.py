"""Training in several processes: killed, resumed on other devices, and started differently."""

import os
import socket
import subprocess
import sys
import time

import pytest
from scripts import COMPILING, ROOT, rows

STEPS = 30


def command(folder, *overrides):
    config = folder.parent / "tiny.toml"
    config.write_text(
        f"""
[model]
vocab_size = 256
num_layers = 2
embed_dim = 16
[data]
source = "text"
path = {str(ROOT / "rwkv_jax" / "nn")!r}
validation_fraction = 0.2
cache_dir = {str(folder.parent / "cache")!r}
context_length = 32
batch_size = 4
documents = "packed"
[optim]
lr = 1e-2
[run]
folder = {str(folder)!r}
steps = {STEPS}
validate_every = 10
checkpoint_every = 10
peak_tflops = 1.0
"""
    )
    return [sys.executable, str(ROOT / "experiments/train.py"), "--cfg", str(config), *overrides]


def environment(devices):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    return COMPILING | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


def start(folder, count, *overrides, each=()):
    """Processes of two devices each; `each` has further overrides for them, one by one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = [
        "--mesh.coordinator", f"127.0.0.1:{port}", "--mesh.num_processes", str(count), "--mesh.timeout", "20", *overrides,
    ]  # fmt: skip
    return [
        subprocess.Popen(
            command(folder, *together, "--mesh.process_id", str(i), *(each[i] if each else ())),
            env=environment(2), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder.parent,
        )
        for i in range(count)
    ]  # fmt: skip


def ended(processes):
    """Their outputs, once all have ended."""
    return [process.communicate(timeout=240)[0] for process in processes]


@pytest.mark.slow
def test_two_processes_of_which_one_is_killed_end_and_one_process_resumes_as_if_nothing_had_been(tmp_path):
    straight = subprocess.run(command(tmp_path / "straight"), env=environment(1), capture_output=True, text=True)
    assert straight.returncode == 0, straight.stderr
    folder = tmp_path / "killed"
    both = start(folder, 2, "--mesh.data", "2", "--mesh.fsdp", "2")
    while not (folder / "checkpoints" / "20").is_dir():
        assert all(process.poll() is None for process in both), ended(both)
        time.sleep(0.05)
    both[1].kill()
    output, _ = ended(both)
    assert both[0].returncode not in (0, None), output
    assert "process 0 of 2 stops" in output or "distributed service" in output, output[-2000:]

    resumed = subprocess.run(
        command(folder, "--mesh.sequence", "2", "--mesh.data", "2"), env=environment(4), capture_output=True, text=True
    )
    assert resumed.returncode == 0, resumed.stderr
    assert "step 20 of 30" in resumed.stdout
    expected, found = rows(tmp_path / "straight"), rows(folder)
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    for own, other in zip(found, expected, strict=True):
        assert own["loss"] == pytest.approx(other["loss"], rel=1e-5)


@pytest.mark.slow
def test_processes_with_different_configs_are_told_what_differs(tmp_path):
    both = start(tmp_path / "run", 2, each=([], ["--optim.lr", "0.5"]))
    outputs = ended(both)
    assert all(process.returncode == 1 for process in both)
    for output in outputs:
        assert "the processes of this run differ" in output
        assert "optim.lr: here (process" in output
    assert not (tmp_path / "run").exists()
