"""The models in lm-evaluation-harness: its metrics on local files, against a plain script; text that is generated; bad input."""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scripts import ROOT
from small_models import forward

import rwkv_jax

pytest.importorskip("lm_eval", reason='needs the extra eval: pip install "rwkv-jax[eval]"')
pytestmark = pytest.mark.slow
FILES = {
    "lambada_openai": ("lambada_test.jsonl", 200),
    "arc_easy": ("arc_easy_test.jsonl", 12),
    "arc_challenge": ("arc_challenge_test.jsonl", 12),
    "piqa": ("piqa_val.jsonl", 12),
    "winogrande": ("winogrande_xl_val.jsonl", 12),
    "sciq": ("sciq_test.jsonl", 2),
}
SCIQ = [
    {
        "question": "What do cells divide by?",
        "support": " Body cells divide by mitosis.",
        "distractor1": "osmosis",
        "distractor2": "fission",
        "distractor3": "meiosis",
        "correct_answer": "mitosis",
    },
    {
        "question": "Ice is what kind of matter?",
        "support": "",
        "distractor1": "gas",
        "distractor2": "liquid",
        "distractor3": "plasma",
        "correct_answer": "solid",
    },
]


@cache
def evaluate():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("evaluate", ROOT / "experiments/evaluate.py")
    module = sys.modules["evaluate"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def datasets_cache(tmp_path_factory):
    """The datasets library's cache in a folder of the tests, and no network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("DISABLE_MULTIPROC", "1")
        import datasets
        import huggingface_hub

        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        # Both read the environment when they are imported, which another test may have done before.
        for settings in (datasets.config, huggingface_hub.constants):
            patch.setattr(settings, "HF_HUB_OFFLINE", True)
        yield


def first(shared, name):
    """The items of a task that the tests use."""
    if name == "sciq":
        return SCIQ
    file, limit = FILES[name]
    return [json.loads(line) for line in (shared / "data" / file).read_text().splitlines()[:limit]]


@pytest.fixture(scope="module")
def data(shared, tmp_path_factory):
    """Those items as files."""
    folder = tmp_path_factory.mktemp("data")
    for name, (file, _) in FILES.items():
        (folder / file).write_text("".join(json.dumps(item) + "\n" for item in first(shared, name)))
    return folder


@pytest.fixture(scope="module")
def model(shared):
    """The smallest one."""
    return str(shared / "reference/synthetic-rwkv-4v0.safetensors")


@pytest.fixture(scope="module")
def trained(shared):
    return str(shared / "reference/tiny-rwkv-4v0.safetensors")


def run(model, data, tasks, output):
    """What the script returns for tasks, and where it writes."""
    names = ",".join(tasks)
    config = evaluate().EvaluateConfig(model, names, data=str(data), bootstrap_iters=100, output=str(output))
    return evaluate().run(config), output


@pytest.fixture(scope="module")
def evaluated(model, data, datasets_cache, tmp_path_factory):
    return run(model, data, FILES, tmp_path_factory.mktemp("evaluation"))


def plain_metrics(model, items):
    """The harness's metrics of these items by task, from one forward pass a sequence and without the library's evaluator."""
    params, config = rwkv_jax.load(model)

    def score(context, continuation):
        head, tail = list(f"\n{context}".encode()), list(continuation.encode())
        ids = np.zeros((1, -(-len(head + tail) // 512) * 512), np.int32)
        ids[0, : len(head + tail)] = head + tail
        logits = np.asarray(forward(params, config, jnp.asarray(ids))[0][0], np.float64)
        logits = logits[len(head) - 1 : len(head + tail) - 1]
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return log_p[np.arange(len(tail)), tail].sum(), (logits.argmax(-1) == tail).all()

    found = {}
    words = [item["text"].rpartition(" ") for item in items["lambada_openai"]]
    lambada = [score(before, f" {word}") for before, _, word in words]
    found["lambada_openai"] = {
        "perplexity": np.exp(-np.mean([value for value, _ in lambada])),
        "acc": np.mean([greedy for _, greedy in lambada]),
    }
    asked = {
        "arc_easy": [(i["question"], i["choices"], i["gold"]) for i in items["arc_easy"]],
        "arc_challenge": [(i["question"], i["choices"], i["gold"]) for i in items["arc_challenge"]],
        "piqa": [(i["goal"], [i["sol1"], i["sol2"]], i["label"]) for i in items["piqa"]],
        "sciq": [
            (i["question"], [i[f"distractor{n}"] for n in (1, 2, 3)] + [i["correct_answer"]], 3) for i in items["sciq"]
        ],
    }
    support = {item["question"]: item["support"].lstrip() + "\n" for item in items["sciq"]}
    for name, questions in asked.items():
        right, right_by_length = [], []
        for text, choices, gold in questions:
            values = np.array(
                [score(f"{support.get(text, '')}Question: {text}\nAnswer:", f" {choice}")[0] for choice in choices]
            )
            right.append(values.argmax() == gold)
            right_by_length.append((values / [len(choice) for choice in choices]).argmax() == gold)
        found[name] = {"acc": np.mean(right), "acc_norm": np.mean(right_by_length)}
    right = []
    for item in items["winogrande"]:
        before, _, after = item["sentence"].partition("_")
        values = [score(before + item[option], f" {after.strip()}")[0] for option in ("option1", "option2")]
        right.append(np.argmax(values) == int(item["answer"]) - 1)
    found["winogrande"] = {"acc": np.mean(right)}
    return found


def test_the_metrics_are_those_of_a_plain_script(evaluated, model, shared):
    results, _ = evaluated
    for name, metrics in plain_metrics(model, {name: first(shared, name) for name in FILES}).items():
        for metric, value in metrics.items():
            assert results["results"][name][f"{metric},none"] == pytest.approx(value, rel=1e-4), (name, metric)
            assert results["n-samples"][name]["effective"] == FILES[name][1]


def test_a_second_run_gives_the_same_results_and_samples(model, data, datasets_cache, tmp_path):
    tasks = ("piqa", "winogrande")
    (once, first_output), (again, second_output) = (run(model, data, tasks, tmp_path / name) for name in ("a", "b"))
    assert once["results"] == again["results"]
    for name in tasks:
        own = (first_output / f"samples_{name}.jsonl").read_text()
        assert own == (second_output / f"samples_{name}.jsonl").read_text()
        assert len(own.splitlines()) == FILES[name][1]


def test_the_output_records_the_model_and_compares_with_published_figures(evaluated):
    _, output = evaluated
    results = json.loads((output / "results.json").read_text())
    recorded = results["config"]
    assert recorded["first_token"] == "newline" and recorded["tokenizer"] == "bytes"
    assert recorded["architecture"] == "rwkv4" and recorded["model_num_parameters"] > 0
    table = (output / "table.md").read_text()
    assert "| RWKV-4 169M | Pythia 70M | OPT 125M | BLOOM 1.1B |" in table
    assert "| 32.99 | 18.46 | 37.90 | 42.58 |" in table
    assert "arXiv 2305.13048v1" in table


def requests(*arguments):
    """As the harness makes them."""
    from lm_eval.api.instance import Instance

    return [Instance("loglikelihood", {}, own, i) for i, own in enumerate(arguments)]


@pytest.fixture(scope="module")
def harness(trained):
    from rwkv_jax.harness import RWKVHarness

    return RWKVHarness(trained, first_token="zero", batch_size=3)


def test_a_rolling_log_likelihood_is_that_of_the_whole_text(harness, trained):
    params, config = rwkv_jax.load(trained)
    text = "The quick brown fox. " * 40
    ids = jnp.array([[0, *text.encode()]])
    logits, _ = forward(params, config, ids)
    exact = np.asarray(jax.nn.log_softmax(logits[0, :-1]), np.float64)[np.arange(len(text)), ids[0, 1:]].sum()
    short, whole = harness.loglikelihood_rolling(requests(("The",), (text,)), disable_tqdm=True)
    assert whole == pytest.approx(exact, rel=1e-6)
    assert short == pytest.approx(harness.loglikelihood(requests(("", "The")), disable_tqdm=True)[0][0], abs=1e-4)


def test_text_is_generated_until_a_stop_string_or_the_limit(harness):
    def generate(**options):
        return harness.generate_until(requests(("The quick", options)), disable_tqdm=True)[0]

    text = generate(max_gen_toks=20)
    assert len(text.encode()) == 20
    assert text == generate(max_gen_toks=20, do_sample=False, temperature=0.0)
    assert generate(until=[text[5:8]], max_gen_toks=20) == text[: text.index(text[5:8])]
    assert generate(until=text[5:8]) == text[: text.index(text[5:8])]
    ((_, greedy),) = harness.loglikelihood(requests(("The quick", text[:10])), disable_tqdm=True)
    assert greedy
    drawn = [generate(max_gen_toks=20, do_sample=True, temperature=3.0) for _ in range(2)]
    assert drawn[0] == drawn[1] != text
    with pytest.raises(ValueError, match="generation_kwargs has num_beams; known here are do_sample"):
        generate(num_beams=2)


def test_the_harness_knows_the_model_by_name(harness):
    from lm_eval.api.registry import get_model

    assert get_model("rwkv_jax") is type(harness)
    points = importlib.metadata.entry_points(group="lm_eval.models")
    assert points["rwkv_jax"].value == "rwkv_jax.harness:RWKVHarness"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": "many"}, "batch_size is 'many'; it must be auto or a whole number"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"first_token": "bos"}, "first_token is 'bos'"),
        ({"tokenizer": "world"}, "the tokenizer is 'world', but the model was trained with 'bytes'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(model, arguments, message, unchecked):
    from rwkv_jax.harness import RWKVHarness

    with pytest.raises(ValueError, match=message):
        RWKVHarness(model, **arguments)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ("", "--tasks is empty; give names such as arc_challenge,arc_easy"),
        ("arc_esy", "there is no task 'arc_esy'; the nearest are arc_easy"),
        ("piqa", "piqa_val.jsonl: no such file; the task piqa reads it from --data"),
        (
            "arc_challenge_chat",
            "arc_challenge_chat: its data is not here and could not be fetched, which needs a network",
        ),
    ],
)
def test_a_task_that_cannot_be_run_is_refused_before_the_model_is_loaded(
    datasets_cache, tmp_path, monkeypatch, tasks, message
):
    import lm_eval.tasks

    # Two of the harness's folders stand for all, which take seconds to read.
    folders = [str(Path(lm_eval.tasks.__file__).parent / name) for name in ("arc", "sciq")]
    manager = lm_eval.tasks.TaskManager(include_path=folders, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda include_defaults: manager)
    config = evaluate().EvaluateConfig("no such model", tasks, data=str(tmp_path), output=str(tmp_path / "out"))
    with pytest.raises((ValueError, OSError), match=message):
        evaluate().run(config)


def test_without_the_extra_the_error_says_what_to_install(tmp_path):
    # An lm_eval that cannot be imported stands for none.
    (tmp_path / "lm_eval.py").write_text("raise ImportError('No module named lm_eval')")
    paths = [str(tmp_path), str(ROOT), str(ROOT / "kernels")]
    result = subprocess.run(
        [sys.executable, str(ROOT / "experiments/evaluate.py"), "--checkpoint", "x", "--tasks", "piqa"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        check=False,
    )
    assert result.returncode == 1
    assert 'pip install "rwkv-jax[eval]"' in result.stderr and "Traceback" not in result.stderr
