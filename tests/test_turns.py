"""What is compared takes turns, in processes of their own (`experiments/turns.py`)."""

import os
import sys
from pathlib import Path

import pytest
import turns

WORKER = f"""
import os, sys
from types import SimpleNamespace

sys.path.insert(0, {str(Path(turns.__file__).parent)!r})
import turns

clock, (name, log, dies_at) = 0.0, sys.argv[1:]
turns.time = SimpleNamespace(perf_counter=lambda: clock)

def call(calls):
    "Takes 1 s, but 100 s as a turn's first: the calls are one at the start, then two a turn."
    global clock
    with open(log, "a") as file:
        file.write(f"{{name}} {{os.getpid()}}\\n")
    if calls == int(dies_at):
        sys.exit(3)
    clock += 100 if calls % 2 else 1
    return calls + 1

turns.SECONDS = 0.5
turns.serve(turns.Workload(call, 0, 10))
"""


@pytest.fixture
def log(tmp_path):
    return tmp_path / "log"


def program(name, log, dies_at=-1):
    return turns.Program(f"work {name}", [sys.executable, "-c", WORKER, name, str(log), str(dies_at)], dict(os.environ))


def test_none_is_always_the_one_after_another_and_a_turns_first_call_is_not_counted(log, monkeypatch):
    monkeypatch.setattr(turns, "TURNS", 2)
    measured = turns.in_turns({name: program(name, log) for name in "ab"})
    assert "".join(line[0] for line in log.read_text().splitlines()) == "ab" + "aabb" + "bbaa"
    assert [measured[name].speeds for name in "ab"] == [[10.0, 10.0]] * 2
    figures = measured["a"].figures
    assert (figures["tokens_per_second"], figures["first_call"]) == (10, 0.01)


def test_when_one_ends_early_it_is_named_and_the_others_are_ended(log):
    with pytest.raises(RuntimeError, match="process of work b ended with exit code 3"):
        turns.in_turns({"a": program("a", log), "b": program("b", log, dies_at=2)})
    for process in {int(line.split()[1]) for line in log.read_text().splitlines()}:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


def test_a_ratio_is_the_median_over_rounds():
    one, other = turns.Measured([10, 40, 3], {}), turns.Measured([10, 20, 30], {})
    assert one.over(other) == 1 and other.over(one) == 1
