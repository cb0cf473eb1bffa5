"""What studies share: cells are computed once, and a difference within the spread is not called one."""

import json
import re
from dataclasses import dataclass, field

import numpy as np
import pytest
import study
from scipy import stats
from scripts import ROOT
from study import Cell, Estimate, StudyConfig, compute_cells, estimate, table, verdict

from rwkv_jax.config import ConfigError, parse_as


@pytest.fixture
def config(tmp_path):
    return StudyConfig(folder=str(tmp_path / "study"))


def squares(*numbers):
    return [Cell(f"of-{number}", {"number": number, "rule": {"power": 2}}) for number in numbers]


class Computer:
    """Computes squares, says which, and fails at one."""

    def __init__(self, failing=None):
        self.asked, self.failing = [], failing

    def __call__(self, cell, advance):
        number = cell.settings["number"]
        if number == self.failing:
            raise OSError("killed")
        self.asked.append(number)
        advance(0.5)
        return {"square": number**2}


def test_a_cell_that_is_finished_is_never_computed_again_also_after_a_failure(config):
    first, second, third = Computer(failing=3), Computer(), Computer()
    with pytest.raises(OSError, match="killed"):
        compute_cells(config, squares(1, 2, 3, 4), first)
    found = compute_cells(config, squares(1, 2, 3, 4), second)
    assert compute_cells(config, squares(1, 2, 3, 4), third) == found
    assert (first.asked, second.asked, third.asked) == ([1, 2], [3, 4], [])
    assert [cell.result["square"] for cell in found.values()] == [1, 4, 9, 16]


def test_a_finished_cell_with_other_settings_is_refused_by_name_and_before_anything_is_computed(config):
    compute_cells(config, squares(2), Computer())
    later = Computer()
    with pytest.raises(ConfigError, match=r"'of-2'.*\n  rule.power: 2 -> 3"):
        compute_cells(config, [*squares(1), Cell("of-2", {"number": 2, "rule": {"power": 3}})], later)
    assert later.asked == []


def test_a_study_is_computed_by_one_process_at_a_time(config):
    with study.locked(study.Path(config.folder, ".lock"), "busy"), pytest.raises(OSError, match="another process"):
        compute_cells(config, squares(1), Computer())


def test_intervals_are_students():
    values = [1.0, 1.2, 1.7, 0.9]
    low, high = stats.t.interval(0.9, 3, loc=np.mean(values), scale=stats.sem(values))
    found = estimate(values, 0.9)
    np.testing.assert_allclose([found.mean - found.half_width, found.mean + found.half_width], [low, high])
    assert estimate([2.0], 0.9) == Estimate(2.0, float("inf"))


@pytest.mark.parametrize("paired", [True, False])
def test_a_verdict_is_that_of_the_t_test(paired):
    rng = np.random.default_rng(0)
    for shift in np.linspace(-1, 1, 21):
        a, b = (rng.normal(size=(2, 4)) * 0.3 + [[shift], [0]]).tolist()
        test = stats.ttest_rel(a, b) if paired else stats.ttest_ind(a, b, equal_var=False)
        said = verdict("A", a, "B", b, 0.95, unit="nats", paired=paired)
        better = "A is better than B" if np.mean(a) < np.mean(b) else "B is better than A"
        assert ("not resolved" in said) == (test.pvalue > 0.05)
        assert "not resolved" in said or said.startswith(better)


def test_a_verdict_goes_by_what_is_better_and_one_seed_resolves_nothing():
    assert verdict("A", [1, 1.1], "B", [3, 3.1], 0.9, unit="s").startswith("A is better")
    assert verdict("A", [1, 1.1], "B", [3, 3.1], 0.9, unit="points", lower_is_better=False).startswith("B is better")
    for paired in (True, False):
        assert "not resolved" in verdict("A", [1], "B", [9], 0.95, unit="s", paired=paired)
        assert "not resolved" in verdict("A", [2, 2], "B", [2, 2], 0.95, unit="s", paired=paired)


@dataclass(frozen=True)
class Probe:
    """A section."""

    rates: tuple[float, ...] = (1.0,)
    """Some."""


@dataclass(frozen=True)
class ProbeSettings:
    """Two sections."""

    study: StudyConfig = field(default_factory=StudyConfig)
    probe: Probe = field(default_factory=Probe)


def test_a_studys_command_line_beats_its_file_and_its_record_has_both(tmp_path):
    file = tmp_path / "probe.toml"
    file.write_text(f'[study]\nfolder = "{tmp_path}/from_file"\nseeds = [4, 5]\n[probe]\nrates = [2, 3]\n')
    settings = parse_as(ProbeSettings, ["--cfg", str(file), "--probe.rates", "[5, 7]"], "probe.py")
    assert settings == ProbeSettings(StudyConfig(f"{tmp_path}/from_file", seeds=(4, 5)), Probe((5.0, 7.0)))
    with pytest.raises(ConfigError, match="the nearest is --study.folder"):
        parse_as(ProbeSettings, ["--cfg", str(file), "--study.foldr", "x"], "probe.py")
    cells = compute_cells(settings.study, squares(3), Computer())
    prefix = study.record(settings.study, settings, cells, {"verdicts": ["none"]})
    row = json.loads(prefix.with_suffix(".json").read_text())
    assert row["settings"]["study"]["seeds"] == [4, 5] and row["settings"]["probe"]["rates"] == [5.0, 7.0]
    assert row["cells"]["of-3"]["result"] == {"square": 9} and row["verdicts"] == ["none"]
    assert {"jax", "commit", "devices"} <= row["environments"][0].keys()


def test_a_table_is_markdown_with_columns_aligned():
    lines = table(["name", "loss"], [["rwkv4", 1.5], ["x", "12.25"]]).splitlines()
    assert lines == ["| name  | loss  |", "|-------|-------|", "| rwkv4 | 1.5   |", "| x     | 12.25 |"]


@pytest.mark.parametrize("page", ["README.md", "experiments/README.md"])
def test_every_interval_on_a_page_is_in_a_committed_record(page):
    records = [json.loads(path.read_text()) for path in (ROOT / "experiments/results").glob("*.json")]
    found = "\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    shown = re.findall(r"[\d.]+ ± [\d.]+\d", (ROOT / page).read_text(encoding="utf-8"))
    assert len(shown) > 10
    assert [interval for interval in shown if not re.search(rf"(?<![\d.]){re.escape(interval)}", found)] == []


def test_a_record_has_lists_of_numbers_on_one_line_and_loses_nothing():
    row = {"a": [1, -2.5e-07, 3.0], "b": ["[1,\n 2]", "[ 3 ]"], "c": [], "d": [[1], {"e": [4, None]}]}
    text = study._indented(row)
    assert json.loads(text) == row
    assert '"a": [ 1, -2.5e-07, 3.0 ]' in text
