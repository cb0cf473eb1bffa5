"""Sets of questions: blanks of text, and the records of published sets; what is held out; what is refused."""

import json
import re
import sys

import numpy as np
import pytest

from rwkv_jax.text import DataConfig, get_tokenizer
from rwkv_jax.text.answers import Answers, answer_batches, check_choices
from rwkv_jax.text.blanks import LINES_AROUND, MARK, make_blanks
from rwkv_jax.text.corpora import Document, split, text_files
from rwkv_jax.text.questions import Item, Question
from rwkv_jax.text.tasks import QuestionsConfig, load_questions, read_items
from rwkv_jax.text.tokenizers import ByteTokenizer

BYTES = get_tokenizer("bytes")
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta1", "theta"]
TEXT = "".join(f"    {WORDS[i % 8]}_{i} = {WORDS[(3 * i) % 8]}({i})\n" for i in range(60))
DOCUMENTS = [Document("a.py", TEXT.encode()), Document("b.py", TEXT[::-1])]


def blanks(seed=0, limit=None, most_bytes=128):
    return make_blanks(DOCUMENTS, most_bytes=most_bytes, seed=seed, limit=limit)


def test_a_blank_filled_by_its_gold_is_a_piece_of_the_text_and_choices_are_words_of_near_lines():
    texts = {document.name: BYTES.encode(document.text).astype(np.uint8).tobytes().decode() for document in DOCUMENTS}
    found = blanks()
    assert len(found) > 50
    for item in found:
        name, _, number = item.name.partition(":")
        question, number = item.question, int(number)
        filled = question.text.replace(MARK, question.choices[question.gold])
        assert filled in texts[name] and len(filled.encode()) <= 128
        lines = texts[name].splitlines()
        assert filled.endswith(lines[number - 1])
        near = " ".join(lines[max(number - 1 - LINES_AROUND, 0) : number + LINES_AROUND])
        assert len(question.choices) == 4 and set(question.choices) <= set(re.findall(r"\w+", near))


def test_blanks_are_drawn_by_the_seed_alone():
    assert blanks(limit=20) == blanks(limit=20) == blanks()[:20]
    assert blanks(seed=1, limit=20) != blanks(limit=20)
    assert {item.name.partition(":")[0] for item in blanks(limit=20)} == {"a.py", "b.py"}


def test_held_out_blanks_come_from_the_files_that_train_py_holds_out(tmp_path):
    for i in range(30):
        (tmp_path / f"{i}.txt").write_text(TEXT.replace("alpha", f"omega{i}"))
    data = DataConfig(source="text", path=str(tmp_path), validation_fraction=0.3, context_length=128)
    held_out_files = {document.name for document in split(text_files(str(tmp_path)), 0.3)[1].documents()}
    sides = load_questions(QuestionsConfig("blanks", 200, 100), data)
    assert {item.name.partition(":")[0] for item in sides.held_out} <= held_out_files
    assert not {item.name.partition(":")[0] for item in sides.training} & held_out_files
    texts = {item.question.context + item.gold for item in sides.held_out}
    assert not texts & {item.question.context + item.gold for item in sides.training}
    assert len(sides.training) + sides.repeated == 200 and sides.repeated > 0


ARC = {"question": "Who?", "answerKey": "B", "choices": {"text": ["you ", "me"], "label": ["A", "B"]}}
RECORDS = {
    "as kept here": ("arc_easy", {"question": "Who?", "choices": ["you", "me"], "gold": 1}),
    "of the hub": ("arc_challenge", ARC),
    "of the release": (
        "arc_easy",
        {
            "answerKey": "2",
            "question": {"stem": "Who?", "choices": [{"text": "you", "label": "1"}, {"text": "me", "label": "2"}]},
        },
    ),
    "of TFDS": (
        "arc_easy",
        {
            "question": b"Who?",
            "answerKey": np.int64(1),
            "choices": {"text": np.array([b"you", b"me"], object), "label": np.array([0, 1])},
        },
    ),
}


@pytest.mark.parametrize("kind", RECORDS)
def test_arc_is_read_in_every_form_that_it_has(kind):
    task, record = RECORDS[kind]
    assert read(task, record) == ("Question: Who?\nAnswer:", (" you", " me"), " me")


@pytest.mark.parametrize(
    ("task", "record", "context", "continuations", "gold"),
    [
        ("piqa", {"goal": "Sit.", "sol1": "down", "sol2": "up", "label": 0}, "Question: Sit.\nAnswer:", (" down", " up"), 0),
        (
            "winogrande",
            {"sentence": "Ann saw Bo, so _ waved.", "option1": "Ann", "option2": "Bo", "answer": "2"},
            "Ann saw Bo, so ",
            ("Ann waved.", "Bo waved."),
            1,
        ),
        (
            "sciq",
            {"question": "What?", "support": "", "distractor1": "a", "distractor2": "b", "distractor3": "c", "correct_answer": "d"},
            "\nQuestion: What?\nAnswer:",
            (" a", " b", " c", " d"),
            3,
        ),
        ("lambada", {"text": "She gave the sign"}, "She gave the", (" sign",), 0),
        ("lambada", {"passage": b"She gave the sign"}, "She gave the", (" sign",), 0),
    ],
)  # fmt: skip
def test_the_other_tasks_are_asked_as_benchmarks_ask_them(task, record, context, continuations, gold):
    assert read(task, record) == (context, continuations, continuations[gold])


class Records:
    """A table of one record."""

    def __init__(self, record):
        self._record = record

    def fingerprint(self):
        return ""

    def documents(self):
        return iter(())

    def records(self):
        yield "file:7", self._record


def read(task, record):
    (item,) = read_items(task, Records(record))
    return item.question.context, item.question.continuations, item.gold


@pytest.mark.parametrize(
    ("task", "record", "message"),
    [
        ("arc_easy", {"question": "?", "choices": ["a", "a"], "gold": 0}, "choices 0 and 1 are both 'a'"),
        ("arc_easy", {"question": "?", "choices": ["a", " "], "gold": 0}, "choice 1 is empty"),
        ("arc_easy", {"question": "?", "choices": ["a", "b"], "gold": 2}, "gold is 2; with 2 choices it must be 0 to 1"),
        ("arc_easy", {"question": "?", "choices": ["a", "b"]}, "no field 'answerKey'"),
        ("arc_easy", {**ARC, "answerKey": "C"}, "answerKey is 'C'; it must be one of the labels"),
        ("piqa", {"goal": "?", "sol1": "a", "sol2": "b", "label": -1}, "gold is -1"),
        ("winogrande", {"sentence": "none", "option1": "a", "option2": "b", "answer": "1"}, "the text has no blank '_'"),
        ("lambada", {"text": "one"}, "the text is 'one'; it must have at least two words"),
    ],
)  # fmt: skip
def test_a_record_that_is_no_question_is_named(task, record, message):
    with pytest.raises(ValueError, match=re.escape(f"file:7: not a question of {task}: {message}")):
        read(task, record)


def test_every_question_of_a_file_is_on_one_side_and_a_repeated_one_is_held_out_only(tmp_path):
    rows = [{"goal": f"{i % 80}", "sol1": "a", "sol2": "b", "label": i % 2} for i in range(100)]
    (tmp_path / "piqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(source="jsonl", path=str(tmp_path / "piqa.jsonl"), validation_fraction=0.3)
    sides = load_questions(QuestionsConfig("piqa"), data)
    assert len(sides.training) + len(sides.held_out) + sides.repeated == 100 and sides.repeated > 0
    assert not {item.question.text for item in sides.training} & {item.question.text for item in sides.held_out}
    few = load_questions(QuestionsConfig("piqa", training_items=10, held_out_items=5), data)
    assert len(few.training) + few.repeated == 10 and set(few.held_out) < set(sides.held_out)


def test_the_datasets_library_reads_a_folder(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason='needs the extra datasets: pip install "rwkv-jax[datasets]"')
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    row = {"support": "s", "distractor1": "a", "distractor2": "b", "distractor3": "c", "correct_answer": "d"}
    folder = tmp_path / "sciq"
    folder.mkdir()
    for side, count in (("train", 5), ("test", 3)):
        rows = [json.dumps({"question": f"{side} {i}", **row}) + "\n" for i in range(count)]
        (folder / f"{side}.jsonl").write_text("".join(rows))
    data = DataConfig(source="huggingface", hub_name=str(folder), hub_validation_split="test")
    sides = load_questions(QuestionsConfig("sciq"), data)
    assert [len(side) for side in sides[:2]] == [5, 3]
    assert sides.held_out[0].question.text == "s\nQuestion: test 0\nAnswer:"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "questions.task='sciq' is read from records, and data.source is 'stdlib'"),
        ({"source": "tfds"}, "sciq is not in TensorFlow Datasets"),
        ({"source": "jsonl"}, "needs data.path"),
        ({"source": "huggingface"}, r"needs the datasets library.*pip install \"rwkv-jax\[datasets\]\""),
    ],
)
def test_a_source_that_a_task_does_not_have_is_refused(settings, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=message):
        load_questions(QuestionsConfig("sciq"), DataConfig(**settings))


def test_an_unknown_task_names_the_nearest():
    with pytest.raises(ValueError, match=r"questions.task is 'arc_esy'; .* the nearest: arc_easy"):
        QuestionsConfig("arc_esy")


def test_the_tokens_that_count_are_those_of_the_gold_answer():
    items = [
        Item("1", Question("ab", ["c", "de"], gold=1)),
        Item("2", Question("a _ c", ["b", "x"], blank="_", gold=0)),
    ]
    answers = Answers([*items, Item("3", Question("a" * 9, ["b", "c"], gold=0))], BYTES, "newline", 8)
    assert (len(answers), answers.too_long, answers.longest) == (2, 1, 11)
    for index, text, answer in ((0, "\nab de", " de"), (1, "\na b c", " b c")):
        row = answers[index]
        assert bytes(row.inputs[: row.length].tolist()).decode() == text[:-1]
        assert bytes(row.targets[: row.length].tolist()).decode() == text[1:]
        assert bytes(row.targets[row.counts].tolist()).decode() == answer
    assert (answers.num_tokens, answers.num_bytes) == (7, 6)


def test_batches_go_on_from_a_saved_position():
    answers = Answers(blanks(), BYTES, "newline", 128)
    batches = answer_batches(answers, batch_size=4, seed=3)
    for _ in range(3):
        next(batches)
    position = batches.get_state()
    expected = [next(batches) for _ in range(3)]
    again = answer_batches(answers, batch_size=4, seed=3)
    again.set_state(position)
    for batch in expected:
        np.testing.assert_equal(next(again)._asdict(), batch._asdict())
    part = answer_batches(answers, batch_size=4, seed=3, rows=np.array([1, 3]))
    part.set_state(position)
    np.testing.assert_array_equal(next(part).inputs, expected[0].inputs[[1, 3]])


def test_questions_that_cannot_be_learned_are_refused():
    with pytest.raises(ValueError, match="all 1 questions have more than data.context_length=4 tokens, the shortest 5"):
        Answers([Item("1", Question("abc", ["d", "e"], gold=0))], BYTES, "newline", 4)
    with pytest.raises(ValueError, match="1: the question has no gold"):
        Answers([Item("1", Question("abc", ["d", "e"]))], BYTES, "newline", 4)
    with pytest.raises(ValueError, match="data.batch_size=5 needs as many"):
        answer_batches(Answers(blanks(limit=4), BYTES, "newline", 128), batch_size=5, seed=0)


def test_choices_that_are_the_same_tokens_are_refused():
    class Lower(ByteTokenizer):
        def encode(self, text):
            return super().encode(text.lower())

    items = [Item("file:3", Question("Who?", ["Ann", "ann"], gold=0))]
    check_choices(items, BYTES, "newline")
    with pytest.raises(ValueError, match="file:3: ' Ann' and ' ann' are the same tokens to the tokenizer 'bytes'"):
        check_choices(items, Lower(), "newline")
