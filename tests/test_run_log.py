"""What a run leaves behind: each step once, whatever kill came between."""

import json
import struct

import pytest

from rwkv_jax import run_log
from rwkv_jax.run_log import METRICS, VALIDATION, RunLog, plot_losses, read_rows, record_environment


def write_steps(folder, resumed_at, steps, value=1.0):
    log = RunLog(folder, resumed_at)
    for step in steps:
        log.write(METRICS, {"step": step, "bits_per_byte": value})
        if step % 2 == 0:
            log.write(VALIDATION, {"step": step, "validation_bits_per_byte": value})
    log.close()


def steps_in(folder, name):
    return [row["step"] for row in read_rows(folder / name)]


def test_rows_are_read_back_as_written(tmp_path):
    row = {"step": 1, "loss": 0.1 + 0.2, "bits_per_byte": 1e-30, "grad_norm": 3.0}
    log = RunLog(tmp_path, 0)
    log.write(METRICS, row)
    log.close()
    assert read_rows(tmp_path / METRICS) == [row]
    assert [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()] == [row]


def test_a_row_can_be_read_as_soon_as_it_is_written(tmp_path):
    log = RunLog(tmp_path, 0)
    log.write(METRICS, {"step": 1, "loss": 2.0})
    assert steps_in(tmp_path, METRICS) == [1]
    log.close()


def test_rows_after_the_resumed_step_are_dropped_so_that_each_step_is_there_once(tmp_path):
    write_steps(tmp_path, 0, range(1, 8))
    write_steps(tmp_path, 4, range(5, 10), value=2.0)
    assert steps_in(tmp_path, METRICS) == list(range(1, 10))
    assert [row["bits_per_byte"] for row in read_rows(tmp_path / METRICS)] == [1.0] * 4 + [2.0] * 5
    assert steps_in(tmp_path, VALIDATION) == [2, 4, 6, 8]


def test_a_run_from_the_start_drops_all_rows(tmp_path):
    write_steps(tmp_path, 0, range(1, 4))
    write_steps(tmp_path, 0, [])
    assert steps_in(tmp_path, METRICS) == steps_in(tmp_path, VALIDATION) == []


@pytest.mark.parametrize("cut", ["{", '{"step": 3, "bits', '{"step": 3, "bits_per_byte": 1.0}'])
def test_a_last_line_cut_by_a_kill_is_left_out_and_overwritten(tmp_path, cut):
    write_steps(tmp_path, 0, [1, 2])
    with (tmp_path / METRICS).open("a") as file:
        file.write(cut)
    assert steps_in(tmp_path, METRICS) == [1, 2]
    write_steps(tmp_path, 2, [3])
    assert steps_in(tmp_path, METRICS) == [1, 2, 3]


def test_a_file_that_is_not_there_has_no_rows(tmp_path):
    assert read_rows(tmp_path / METRICS) == []


def test_tensorboard_events_are_written(tmp_path):
    write_steps(tmp_path, 0, [1, 2])
    events = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").glob("events.out.tfevents.*"))
    assert b"metrics/bits_per_byte" in events
    assert b"validation/validation_bits_per_byte" in events


@pytest.mark.parametrize("last", [1, 30], ids=["one_row_without_validation", "thirty_rows"])
def test_the_plot_is_a_png_of_some_size(tmp_path, last):
    write_steps(tmp_path, 0, range(1, last + 1))
    path = plot_losses(tmp_path)
    data = path.read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    assert path == tmp_path / "loss.png"
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert data.endswith(b"IEND\xaeB`\x82")
    assert min(width, height) >= 400


def test_the_smoothed_line_is_the_mean_of_the_last_rows():
    assert run_log._smooth([1.0, 2.0, 3.0, 8.0], 2) == [1.0, 1.5, 2.5, 5.5]


def test_the_first_start_records_the_environment_and_the_same_one_is_silent(tmp_path):
    assert record_environment(tmp_path) == []
    recorded = json.loads((tmp_path / run_log.ENVIRONMENT).read_text())
    assert {"jax", "jaxlib", "numpy", "python", "cores", "devices"} <= set(recorded)
    assert record_environment(tmp_path) == []


def test_a_changed_environment_is_reported_and_the_record_kept(tmp_path):
    record_environment(tmp_path)
    path = tmp_path / run_log.ENVIRONMENT
    recorded = json.loads(path.read_text())
    cores = recorded["cores"]
    recorded["cores"] = "64"
    del recorded["jaxlib"]
    path.write_text(json.dumps(recorded))
    before = path.read_text()
    differences = record_environment(tmp_path)
    assert f"cores: 64 -> {cores}" in differences
    assert any(line.startswith("jaxlib: None -> ") for line in differences)
    assert len(differences) == 2
    assert path.read_text() == before
