"""Settings: the command line beats the file, errors name the way out, and what is saved reads back equal."""

import ast
import dataclasses
import inspect
import re
import types
import typing
from dataclasses import replace
from itertools import pairwise

import pytest

from rwkv_jax import config
from rwkv_jax.config import ConfigError, RunConfig, Settings, parse
from rwkv_jax.models.rwkv4 import RWKV4Config
from rwkv_jax.optim import OptimConfig
from rwkv_jax.text import DataConfig

DEFAULT = Settings(RWKV4Config(), DataConfig(), OptimConfig(), RunConfig())
SECTIONS = {field.name: type(getattr(DEFAULT, field.name)) for field in dataclasses.fields(Settings)}
FIELDS = [(section, field.name) for section, kind in SECTIONS.items() for field in dataclasses.fields(kind)]
FILE = """
[model]
num_layers = 3
embed_dim = 64
ffn_dim = 100
[optim]
lr = 0.001
[run]
folder = "runs/from_file"
backend = "scan"
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "some.toml"
    path.write_text(FILE)
    return str(path)


def refuse(arguments, *parts):
    """Asserts that the arguments are refused by a message with all the parts."""
    with pytest.raises(ConfigError) as error:
        parse(arguments)
    for part in parts:
        assert part in str(error.value)


def write(tmp_path, text):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    return ["--cfg", str(path)]


def test_no_arguments_give_the_defaults():
    assert parse([]) == DEFAULT


def test_a_file_changes_what_it_names_and_nothing_else(file):
    expected = replace(
        DEFAULT,
        model=replace(DEFAULT.model, num_layers=3, embed_dim=64, ffn_dim=100),
        optim=replace(DEFAULT.optim, lr=0.001),
        run=replace(DEFAULT.run, folder="runs/from_file", backend="scan"),
    )
    assert parse(["--cfg", file]) == parse([f"--cfg={file}"]) == config.load(file) == expected


@pytest.mark.parametrize("order", ["file first", "file last", "file between"])
@pytest.mark.parametrize("joined", [False, True], ids=["separate", "joined_by_equals"])
def test_the_command_line_beats_the_file_in_any_order(file, order, joined):
    overrides = [
        ("--model.num_layers", "12"),
        ("--optim.lr", "0.5"),
        ("--run.folder", "runs/from command line"),
    ]
    words = [[f"{key}={value}"] if joined else [key, value] for key, value in overrides]
    words.insert({"file first": 0, "file last": 3, "file between": 1}[order], ["--cfg", file])
    settings = parse([word for part in words for word in part])
    assert (settings.model.num_layers, settings.model.embed_dim) == (12, 64)
    assert settings.optim.lr == 0.5
    assert (settings.run.folder, settings.run.backend) == ("runs/from command line", "scan")


def test_null_on_the_command_line_undoes_an_optional_value_of_the_file(file):
    settings = parse(["--cfg", file, "--model.ffn_dim", "null", "--run.backend", "null"])
    assert settings.model.ffn_dim is None
    assert settings.run.backend is None


@pytest.mark.parametrize("arguments", [["--init_from", "model.pth"], ["--init_from=model.pth"]])
def test_init_from_may_be_given_without_its_section(file, arguments):
    assert parse(["--cfg", file, *arguments]) == parse(["--cfg", file, "--finetune.init_from", "model.pth"])
    assert "finetune.init_from" in config.given_fields(arguments)


@pytest.mark.parametrize("abbreviation", ["--model.num", "--model.num_layer", "--mod.num_layers", "--num_layers", "-m"])
def test_abbreviations_are_refused(abbreviation):
    with pytest.raises(ConfigError):
        parse([abbreviation, "3"])


def test_an_unknown_option_names_itself_and_the_nearest():
    refuse(["--model.nun_layers", "3"], "command line", "--model.nun_layers", "the nearest is --model.num_layers")


def test_an_unknown_key_in_a_file_names_file_key_and_nearest(tmp_path):
    refuse(
        write(tmp_path, "[model]\nembed_dims = 3\n"),
        "bad.toml",
        "model.embed_dims",
        "the nearest is model.embed_dim",
    )


def test_an_unknown_section_names_file_section_and_nearest(tmp_path):
    refuse(write(tmp_path, "[optimizer]\nlr = 3\n"), "bad.toml", "[optimizer]", "the nearest is optim")


@pytest.mark.parametrize("text", ["steps = 3\n", "model = 3\n"], ids=["key_outside_sections", "section_as_a_key"])
def test_a_key_outside_all_sections_is_refused(tmp_path, text):
    refuse(write(tmp_path, text), "bad.toml", f"[{text.partition(' ')[0]}]")


@pytest.mark.parametrize(
    ("text", "key", "value", "wanted"),
    [
        ('[model]\nnum_layers = "12"', "model.num_layers", "'12' (str)", "a whole number"),
        ("[model]\nnum_layers = 12.0", "model.num_layers", "12.0 (float)", "a whole number"),
        ("[model]\nnum_layers = true", "model.num_layers", "True (bool)", "a whole number"),
        ("[optim]\nlr = inf", "optim.lr", "inf (float)", "a finite number"),
        ("[optim]\nlr = true", "optim.lr", "True (bool)", "a finite number"),
        ('[optim]\nlr = "fast"', "optim.lr", "'fast' (str)", "a finite number"),
        ("[optim]\nlr_multiples = 1", "optim.lr_multiples", "1 (int)", "true or false"),
        ("[run]\nfolder = 3", "run.folder", "3 (int)", "a string"),
        ("[model]\nffn_dim = 1.5", "model.ffn_dim", "1.5 (float)", "a whole number, or left out"),
        ('[model]\ndtype = "float16"', "model.dtype", "'float16'", "one of 'float32', 'bfloat16'"),
        ("[run]\nfolder = [1]", "run.folder", "[1] (list)", "a string"),
        ("[model]\ndtype = []", "model.dtype", "[]", "one of 'float32'"),
    ],
)
def test_a_wrong_type_in_a_file_names_file_key_value_and_what_it_must_be(tmp_path, text, key, value, wanted):
    refuse(write(tmp_path, text), "bad.toml", f"{key} is {value}", f"must be {wanted}")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.num_layers", "many"), ("model.num_layers", "1.5"), ("model.num_layers", "null"),
        ("model.num_layers", "true"), ("optim.lr", "fast"),
        ("optim.lr_multiples", "3"), ("model.dtype", "float16"),
        ("optim.schedule", "linear"),
    ],
)  # fmt: skip
def test_a_wrong_type_on_the_command_line_names_the_key(key, value):
    refuse([f"--{key}", value], "command line", key)


@pytest.mark.parametrize("where", ["file", "command line"])
def test_another_architecture_names_those_there_are(tmp_path, where):
    arguments = (
        write(tmp_path, '[model]\narchitecture = "rwkv9"\n') if where == "file" else ["--model.architecture", "rwkv9"]
    )
    refuse(arguments, "bad.toml" if where == "file" else where, "model.architecture is 'rwkv9'", "rwkv4")


@pytest.mark.parametrize("value", [["rwkv4"], 4])
def test_an_architecture_that_is_no_string_is_refused(tmp_path, value):
    refuse(write(tmp_path, f"[model]\narchitecture = {value!r}\n"), "bad.toml", "model.architecture")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.vocab_size", 0), ("model.num_layers", -1), ("model.embed_init", 0.0), ("optim.lr", 0.0),
        ("run.steps", 0), ("run.keep_best", -1), ("run.validation_tokens", 0), ("run.peak_tflops", -1.0),
        ("run.checkpoint_every", 0),
    ],
)  # fmt: skip
def test_a_value_out_of_range_names_key_and_value(tmp_path, key, value):
    section, name = key.split(".")
    refuse([f"--{key}={value}"], "command line", f"{key} is {value}")
    refuse(write(tmp_path, f"[{section}]\n{name} = {value}\n"), "bad.toml", f"{key} is {value}")


def test_a_value_out_of_range_that_a_file_and_the_command_line_give_together_names_both(file):
    refuse(["--cfg", file, "--optim.lr=0"], "some.toml and command line: optim.lr is 0")


def test_whole_numbers_in_a_file_are_numbers_where_one_is_wanted(tmp_path):
    arguments = write(tmp_path, "[optim]\nlr = 1\nlr_final = 0\nclip_norm = 2\n")
    optim = parse(arguments).optim
    assert (optim.lr, optim.lr_final, optim.clip_norm) == (1, 0, 2)
    assert {type(value) for value in (optim.lr, optim.lr_final, optim.clip_norm)} == {float}
    assert config.load(arguments[1]).optim == optim


def test_a_missing_file_is_named_with_an_example(tmp_path):
    refuse(["--cfg", str(tmp_path / "absent.toml")], "absent.toml", "No such file", "quickstart.toml")


def test_a_file_that_is_not_toml_is_named_with_the_place(tmp_path):
    refuse(write(tmp_path, "[model]\nnum_layers = \n"), "bad.toml", "not TOML", "line 2")


def test_a_file_that_is_not_text_is_named(tmp_path):
    (tmp_path / "bad.toml").write_bytes(b"\xff\xfe\x00")
    refuse(["--cfg", str(tmp_path / "bad.toml")], "bad.toml", "not TOML")


@pytest.mark.parametrize("arguments", [["--cfg"], ["--cfg="], ["--cfg", ""], ["--cfg", "a.toml", "--cfg", "b.toml"]])
def test_cfg_wants_one_file(arguments):
    refuse(arguments, "--cfg")


@pytest.mark.parametrize("arguments", [["12"], ["--model.num_layers"], ["--model.num_layers", "3", "stray"], ["-x"]])
def test_words_that_are_no_option_are_refused(arguments):
    with pytest.raises(ConfigError):
        parse(arguments)


def test_parse_or_exit_prints_one_message_and_ends_with_status_2(capsys):
    with pytest.raises(SystemExit) as stopped:
        config.parse_or_exit(["--model.nun_layers", "3"], "train.py")
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("train.py: command line: there is no option --model.nun_layers")


FULL = Settings(
    RWKV4Config(vocab_size=7, num_layers=2, embed_dim=4, ffn_dim=9, embed_init=3e-7, dtype="bfloat16", remat="none"),
    DataConfig(),
    OptimConfig(lr=1e-5 / 3, lr_final=0.0, weight_decay=0.1, weight_decay_final=1e-3, lr_multiples=False),
    RunConfig(validation_tokens=10, backend="scan", peak_tflops=0.1 + 0.2),
)


@pytest.mark.parametrize("settings", [DEFAULT, FULL], ids=["none_in_optional_fields", "nothing_none"])
def test_saved_settings_load_equal(tmp_path, settings):
    path = tmp_path / "saved.toml"
    path.write_text(config.to_toml(settings))
    assert config.load(path) == settings
    assert parse(["--cfg", str(path)]) == settings
    assert config.from_dict(config.to_dict(settings), "test") == settings


def test_settings_overridden_with_null_load_equal_after_saving(tmp_path, file):
    settings = parse(["--cfg", file, "--model.ffn_dim", "null", "--run.backend=null"])
    path = tmp_path / "saved.toml"
    path.write_text(config.to_toml(settings))
    assert config.load(path) == settings
    assert "# ffn_dim: none" in path.read_text()


@pytest.mark.parametrize(
    "text",
    [
        "", '"', "'''", '"""', "\\", "\n", "\r\n\t", "null", "12", "true", "a = [1]", "# no comment",
        "naïve Привет 日本 🎉",
        "\x00\x1f\x7f\u0085\u2028",
    ],
)  # fmt: skip
@pytest.mark.parametrize("way", ["file", "command line"])
def test_any_string_survives_saving_and_the_command_line(tmp_path, text, way):
    settings = replace(DEFAULT, run=replace(DEFAULT.run, prompt=text))
    if way == "command line":
        assert parse([f"--run.prompt={text}"]) == settings
        return
    path = tmp_path / "saved.toml"
    path.write_text(config.to_toml(settings), encoding="utf-8")
    assert config.load(path) == settings


def test_every_optional_field_defaults_to_none_because_toml_has_no_none():
    optional = set()
    for section, kind in SECTIONS.items():
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            if types.NoneType in typing.get_args(hints[field.name]):
                assert field.default is None, f"{section}.{field.name}"
                optional.add(f"{section}.{field.name}")
    assert {"model.ffn_dim", "run.backend", "optim.weight_decay_final"} <= optional


def test_differences_name_each_field_but_the_folder_with_both_values():
    assert config.differences(FULL, FULL) == []
    changed = replace(FULL, model=replace(FULL.model, ffn_dim=None), run=replace(FULL.run, folder="elsewhere", steps=7))
    assert config.differences(FULL, changed) == [
        "model.ffn_dim: 9 -> None",
        "run.steps: 1000 -> 7",
    ]


def described(kind):
    """The string under each field of a dataclass, read off its source."""
    (tree,) = ast.parse(inspect.getsource(kind)).body
    assert isinstance(tree, ast.ClassDef)
    texts = {
        name: text
        for base in kind.__bases__
        if dataclasses.is_dataclass(base)
        for name, text in described(base).items()
    }
    for field, text in pairwise(tree.body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            texts[field.target.id] = ast.literal_eval(text.value)
    return texts


def test_help_lists_every_field_with_its_text_and_default(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(["--help"])
    assert stopped.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for section, name in FIELDS:
        text, default = described(SECTIONS[section])[name], getattr(getattr(DEFAULT, section), name)
        # The option, its type in some notation, then its text.
        shown_default = "null" if default is None else " ".join(str(default).split())
        text = " ".join(text.split())
        pattern = rf"--{section}\.{name} .{{0,120}}{re.escape(text)} [^-]*default: ?{re.escape(shown_default)}"
        assert re.search(pattern, shown), f"{section}.{name}"
