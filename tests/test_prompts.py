"""The study of prompts: items, templates and orders, its measures against plain sums, and the script as a user runs it."""

import ast
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from prompt_task import CHOICE, Item, Template, ask, load_task, sample
from prompts import check_there, judged, macro_f1
from scripts import ROOT

import rwkv_jax

KEYWORDS = ROOT / "experiments/tasks/prompts_keywords.toml"
ARC = ROOT / "experiments/tasks/prompts_arc_easy.toml"
ROWS = [
    {"question": f"Which is {i}? {{}}", "choices": [f"a{i}", "b", "c", "d"][: 3 + (i > 0)], "gold": i % 4}
    for i in range(17)
]


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def test_parts_stand_in_the_order_asked_for_and_the_answer_at_the_end():
    template = Template("t", "Do.", "Data: {data}", "Ask: {what}?", "So: {choice}.")
    item = Item({"data": "{x}", "what": "y"}, 1)
    question = ask(template, ("p", "q"), "QID", item)
    assert question.text == f"Ask: y?\nDo.\nData: {{x}}\nSo: {CHOICE}." and question.gold == 1
    assert question.context == "Ask: y?\nDo.\nData: {x}\nSo: " and question.continuations == ("p.", "q.")
    within = ask(Template("t", "Do.", "{data}", "<{choice}>"), ("p", "q"), "QDI", item)
    assert within.continuations == ("p>\n{x}\nDo.", "q>\n{x}\nDo.")  # What stands after the question counts in.
    with pytest.raises(ValueError, match="'other', which an item has not; it has data, what"):
        ask(Template("t", "{other}", "", "{choice}"), ("p", "q"), "IDQ", item)


def test_statements_are_python_with_the_keyword_in_the_blank_and_lines_before():
    task = load_task(KEYWORDS)
    first, second = (sample(task, None, 40, seed) for seed in (0, 1))
    for item in [*first, *second]:
        line = task.labels[item.gold] + item.values["after"]
        tree = ast.parse(f"def f():\n  {line}{'pass' if line.endswith(':') else ''}")
        assert type(tree.body[0].body[0]).__name__.lower() == task.labels[item.gold]
        assert len(item.values["data"].splitlines()) == 2 and not item.values["before"].strip()
    assert np.bincount([item.gold for item in first]).tolist() == [10] * 4
    assert not {id(item) for item in first} & {id(item) for item in second}
    texts = [json.dumps(item.values) for item in (*first, *second)]
    assert len(set(texts)) > 75  # The library repeats itself in places.


def test_rows_of_json_become_items_of_which_samples_share_none(rows):
    task = load_task(ARC)
    first, second = (sample(task, rows, 8, seed) for seed in (0, 1))
    asked = [item.values["question"] for item in (*first, *second)]
    assert len(set(asked)) == 16 and ROWS[0]["question"] not in asked  # It has three choices only.
    assert [item.gold for item in first] == [0, 1, 2, 3] * 2
    text = ask(task.templates[2], task.labels, "DQI", first[0])
    assert text.choices == tuple(first[0].values["choices"]) and text.text.startswith(f"Choices: {text.choices[0]}; b")
    with pytest.raises(ValueError, match=r"16 items .* seed 2 is the sample from 16 to 24"):
        sample(task, rows, 8, 2)
    with pytest.raises(ValueError, match="--prompts.data"):
        sample(task, None, 8, 0)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('source = "stdlib"', 'source = "web"', "must be stdlib or jsonl"),
        ('"raise"]', '"while"]', "source stdlib has if, for, return, raise"),
        ('answer = "keyword', 'anser = "keyword', "no key 'anser' in a template"),
        ("\"keyword = '{choice}'\"", '"keyword"', "'assignment' must have {choice} once"),
        ('name = "comment"', 'name = "code"', "each with a name of its own"),
    ],
)
def test_a_bad_task_is_refused_by_file_and_key(old, new, message, tmp_path):
    text = KEYWORDS.read_text()
    assert old in text
    path = tmp_path / "task.toml"
    path.write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=f"{path}: .*{message}"):
        load_task(path)


def test_macro_f1_is_the_mean_of_f1_from_precision_and_recall():
    rng = np.random.default_rng(0)
    predicted, gold = rng.integers(0, 3, (2, 5, 40))
    for row, truth in zip(predicted, gold, strict=True):
        expected = []
        for label in range(3):
            right = sum(p == t == label for p, t in zip(row, truth, strict=True))
            precision, recall = right / list(row).count(label), right / list(truth).count(label)
            expected.append(2 * precision * recall / (precision + recall) if right else 0)
        np.testing.assert_allclose(macro_f1(row, truth, 3), np.mean(expected))
    assert macro_f1(np.zeros(4, int), np.array([0, 1, 2, 3]), 4) == pytest.approx(0.4 / 4)


def test_a_difference_within_its_interval_is_not_resolved():
    rng = np.random.default_rng(0)
    noise = rng.choice([-1.0, 0.0, 1.0], 400)
    standard_error = noise.std() / 20
    assert "not resolved" in judged("A", "B", noise - noise.mean() + 1.5 * standard_error, 0.95)
    assert judged("A", "B", noise - noise.mean() + 3 * standard_error, 0.95).startswith("A beats B (+")
    assert judged("A", "B", noise - noise.mean() - 3 * standard_error, 0.95).startswith("B beats A (-")


def test_missing_models_are_named_with_the_commands_that_make_them(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        check_there([f"{tmp_path}/quickstart_rwkv7", f"{tmp_path}/mine", str(tmp_path)])
    lines = str(error.value).splitlines()
    assert len(lines) == 3 and lines[2].endswith("mine: give the path of a checkpoint")
    assert lines[1].endswith(
        f"--cfg experiments/configs/quickstart_rwkv7.toml --run.folder {tmp_path}/quickstart_rwkv7"
    )


@pytest.mark.slow
def test_the_study_asks_each_cell_once_and_ends_in_a_record(tmp_path):
    config = rwkv_jax.RWKV4Config(vocab_size=256, num_layers=1, embed_dim=16)
    params = rwkv_jax.init(jax.random.key(0), config)
    rwkv_jax.save(tmp_path / "tiny.safetensors", params, config)
    settings = ROOT / "experiments/configs/prompts_smoke.toml"
    command = [sys.executable, str(ROOT / "experiments/prompts.py"), "--cfg", str(settings), "--study.folder", "asked"]
    command += ["--prompts.task", str(KEYWORDS), "--prompts.checkpoints", '["tiny.safetensors"]']

    def run(*overrides):
        env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
        done = subprocess.run([*command, *overrides], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout, json.loads((tmp_path / "asked/prompts.json").read_text())

    shown, row = run()
    assert (tmp_path / "asked/prompts.png").read_bytes()[:4] == b"\x89PNG"
    assert len(row["cells"]) == 4 * 2 * 2
    own = [cell["result"] for name, cell in row["cells"].items() if name.startswith("tiny.safetensors-code-IDQ")]
    predicted, gold = ("".join(result[key] for result in own) for key in ("predicted", "gold"))
    accuracy = np.mean([a == b for a, b in zip(predicted, gold, strict=True)])
    assert len(gold) == 16 and f"| {100 * accuracy:.1f} [" in shown
    assert "not resolved" in shown and "chance 25 %" in row["notes"]
    cells = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "asked/cells").iterdir()}
    run()
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "asked/cells").iterdir()} == cells
