"""Training in several processes: killed, resumed on other devices, and started differently."""

import os
import socket
import subprocess
import time

import pytest
from scripts import COMPILING, ROOT, STEPS, command, rows

TEXTS = ROOT / "rwkv_jax" / "nn"
EVERY_20 = ["--run.checkpoint_every", "20", "--run.validate_every", "20"]
PATIENCE = 600
"""Seconds: four processes that compile share two cores."""


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
            command(TEXTS, folder, *together, "--mesh.process_id", str(i), *(each[i] if each else ())),
            env=environment(2), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder.parent,
        )
        for i in range(count)
    ]  # fmt: skip


def ended(processes):
    """Their outputs, once all have ended."""
    return [process.communicate(timeout=PATIENCE)[0] for process in processes]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """What a run of one device logs that is never interrupted."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    done = subprocess.run(command(TEXTS, folder, *EVERY_20), env=environment(1), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return rows(folder)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "mesh"), [(2, {}), (4, {"--mesh.tensor": "2"})])
def test_processes_of_which_one_is_killed_end_and_one_process_resumes_as_if_nothing_had_been(
    count, mesh, straight, tmp_path
):
    folder = tmp_path / "killed"
    # The checkpoint at 20 is whole, and the next one, at 40, is never reached.
    cut = ["--mesh.data", "2", "--mesh.fsdp", "2", *(word for pair in mesh.items() for word in pair)]
    every = start(folder, count, *EVERY_20, *cut)
    end = time.monotonic() + PATIENCE
    while not (folder / "checkpoints" / "20").is_dir():
        assert time.monotonic() < end and all(process.poll() is None for process in every)
        time.sleep(0.02)
    every[1].kill()
    outputs = ended(every)
    for i, (process, output) in enumerate(zip(every, outputs, strict=True)):
        assert process.returncode != 0, output
        assert i == 1 or f"process {i} of {count} stops" in output or "distributed service" in output, output[-2000:]

    resumed = subprocess.run(
        command(TEXTS, folder, *EVERY_20, "--mesh.sequence", "2", "--mesh.data", "2"),
        env=environment(4),
        capture_output=True,
        text=True,
    )
    assert resumed.returncode == 0, resumed.stderr
    assert f"step 20 of {STEPS}" in resumed.stdout
    expected, found = straight, rows(folder)
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
