"""Configuration of a run: typed sections, read from TOML and overridden on the command line."""

import dataclasses
import difflib
import json
import math
import sys
import tomllib
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from .finetune import FinetuneConfig
from .models import ARCHITECTURES, Config
from .optim import OptimConfig
from .sharding import MeshConfig
from .text import DataConfig
from .text.tasks import QuestionsConfig


@dataclass(frozen=True)
class RunConfig:
    """How long a run is, where it goes and what it reports."""

    folder: str = "runs/default"
    """Where the run writes; started again with the same config, it goes on from there."""
    steps: int = 1000
    """Updates in all."""
    seed: int = 0
    """Of the initialisation."""
    validate_every: int = 200
    """Steps between validations; one is also made with every checkpoint and at the end."""
    validation_tokens: int | None = None
    """Tokens of the held-out text used while training; none: all. The end always uses all."""
    checkpoint_every: int = 200
    """Steps between checkpoints; one is also written at the end and on SIGTERM."""
    keep_last: int = 2
    """Checkpoints kept, the newest ones."""
    keep_best: int = 1
    """Checkpoints kept besides, by held-out bits per byte."""
    backend: str | None = None
    """Of the WKV operator: scan, parallel, or none for the best on this device."""
    peak_tflops: float | None = None
    """Peak of one device in 1e12 FLOP/s, for the model FLOP utilisation; none: published figure, or measured on CPU."""
    prompt: str = "\n"
    """What the sample at the end starts with."""
    sample_tokens: int = 320
    """Length of the sample at the end; 0: none."""

    def __post_init__(self):
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"run.seed is {self.seed}; it must be 0 to 2**31 - 1")
        for name in ("steps", "validate_every", "checkpoint_every", "keep_last"):
            if getattr(self, name) < 1:
                raise ValueError(f"run.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("keep_best", "sample_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"run.{name} is {getattr(self, name)}; it must be at least 0")
        if self.validation_tokens is not None and self.validation_tokens < 1:
            raise ValueError(f"run.validation_tokens is {self.validation_tokens}; it must be at least 1")
        if self.peak_tflops is not None and self.peak_tflops <= 0:
            raise ValueError(f"run.peak_tflops is {self.peak_tflops}; it must be positive")


@dataclass(frozen=True)
class Settings:
    """Everything that `--cfg` of experiments/train.py and experiments/finetune_qa.py reads, a section each."""

    model: Config
    data: DataConfig
    optim: OptimConfig
    run: RunConfig
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    questions: QuestionsConfig = field(default_factory=QuestionsConfig)

    def __post_init__(self):
        if self.questions.task is not None and self.data.documents != "rows":
            raise ValueError(
                f"data.documents is {self.data.documents!r}; every question is a row of its own: set it to 'rows'"
            )
        context, segment = self.data.context_length, self.optim.segment or self.data.context_length
        window = segment * (self.optim.bptt or max(context // segment, 1))
        if context % segment or context % window:
            raise ValueError(
                f"data.context_length is {context}; it must be a multiple of optim.segment={segment} times "
                f"optim.bptt={self.optim.bptt or 1}"
            )
        if self.finetune.method == "state" and window != context:
            raise ValueError(
                "finetune.method='state' needs the gradient of the whole row, back to its first state; leave optim.bptt out"
            )
        if self.finetune.method == "state" and self.data.carry:
            raise ValueError("finetune.method='state' starts every row from the learned state; leave data.carry out")
        if self.finetune.method == "state" and self.data.documents != "rows":
            raise ValueError(
                f"data.documents is {self.data.documents!r}; finetune.method='state' learns the state that a document starts "
                "from, and a reset goes to the zero state: set data.documents to 'rows'"
            )


Kind = TypeVar("Kind")

_SHORT = {"--init_from": "--finetune.init_from"}
"""Options that may be given without their section."""


class ConfigError(ValueError):
    """A config that cannot be used: names the file or option, the key and the way out."""


def parse(arguments: Sequence[str], program: str = "train.py") -> Settings:
    """Returns the settings of a command line: `--cfg FILE` and overrides such as `--model.num_layers 12`.

    An override beats the file wherever it stands; names are not abbreviated.

    Raises:
        ConfigError: An unknown key, a wrong type or a value out of range.
    """
    file, overrides = _take_cfg(list(arguments))
    values = read_toml(file) if file else {}
    return _parse(Settings, _sections(_architecture(file, values, overrides)), file, values, overrides, program)


def parse_as(kind: type[Kind], arguments: Sequence[str], program: str) -> Kind:
    """Returns another program's settings, a dataclass with a dataclass for every section, from a command line; as `parse`."""
    file, overrides = _take_cfg(list(arguments))
    return _parse(kind, get_type_hints(kind), file, read_toml(file) if file else {}, overrides, program)


def _parse(
    kind: type[Kind],
    sections: Mapping[str, type],
    file: str | None,
    values: Mapping[str, Any],
    overrides: list[str],
    program: str,
) -> Kind:
    parser = _parser(sections, program)
    if file:
        _check_file(file, values, sections)
        parser.set_defaults({f"{s}.{k}": v for s, keys in values.items() for k, v in keys.items()})
    options = [f"{section}.{f.name}" for section, kind in sections.items() for f in dataclasses.fields(kind)]
    for argument in overrides:
        name = argument.partition("=")[0].removeprefix("--")
        if argument.startswith("--") and name not in [*options, "help"]:
            raise ConfigError(f"command line: there is no option --{name}{_nearest(name, options, '--')}")
    try:
        parsed = parser.parse_args(overrides)
        return kind(**_settings({name: vars(parsed[name]) for name in sections}, sections))
    except ArgumentError as error:
        raise ConfigError(f"command line: {error}") from None
    except ValueError as error:
        where = f"{file} and command line" if file and overrides else file or "command line"
        raise ConfigError(f"{where}: {error}") from None


def given_fields(arguments: Sequence[str]) -> frozenset[str]:
    """Returns the names of the fields, such as model.num_layers, that a command line which `parse` takes gives a value."""
    file, overrides = _take_cfg(list(arguments))
    sections = read_toml(file) if file else {}
    in_file = {f"{section}.{key}" for section, keys in sections.items() for key in keys}
    options = {argument.partition("=")[0].removeprefix("--") for argument in overrides if argument.startswith("--")}
    return frozenset(in_file | options)


def parse_or_exit(arguments: Sequence[str], program: str) -> Settings:
    """As `parse`, but a ConfigError is printed and ends the program with status 2."""
    try:
        return parse(arguments, program)
    except ConfigError as error:
        print(f"{program}: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def from_dict(values: Mapping[str, Mapping[str, Any]], origin: str) -> Settings:
    """Returns settings from `to_dict`'s form; `origin` names the source in errors."""
    sections = _sections(_architecture(origin, values, []))
    _check_file(origin, values, sections)
    try:
        return Settings(**_settings(values, sections))
    except ValueError as error:
        raise ConfigError(f"{origin}: {error}") from None


def load(path: str | Path) -> Settings:
    """Returns the settings in a TOML file."""
    return from_dict(read_toml(str(path)), str(path))


def to_dict(settings: Settings) -> dict[str, dict[str, Any]]:
    """Returns sections of plain values without those that are None, which is every such field's default."""
    return {
        section: {key: value for key, value in values.items() if value is not None}
        for section, values in dataclasses.asdict(settings).items()
    }


def to_toml(settings: Settings) -> str:
    """Returns the settings as TOML that `load` reads back equal; fields that are None are left out, and said so."""
    lines = []
    for section, values in dataclasses.asdict(settings).items():
        lines.append(f"[{section}]")
        for key, value in values.items():
            # JSON's strings, numbers and booleans are TOML's too, but for DEL, which TOML wants escaped.
            text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
            lines.append(f"# {key}: none" if value is None else f"{key} = {text}")
        lines.append("")
    return "\n".join(lines)


def differences(old: Settings, new: Settings) -> list[str]:
    """Returns a line for every field that differs, but for the folder and the mesh: a run may be moved, to other devices too."""
    a, b = dataclasses.asdict(old), dataclasses.asdict(new)
    return [
        f"{section}.{key}: {a[section].get(key)!r} -> {b[section].get(key)!r}"
        for section in a
        for key in {**a[section], **b[section]}
        if a[section].get(key) != b[section].get(key) and section != "mesh" and (section, key) != ("run", "folder")
    ]


def read_toml(path: str) -> dict[str, Any]:
    """Returns a TOML file's content.

    Raises:
        ConfigError: There is no such file, or it is not TOML.
    """
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{path}: {error.strerror}; --cfg takes a TOML file, such as experiments/configs/quickstart.toml"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from None


def _take_cfg(arguments: list[str]) -> tuple[str | None, list[str]]:
    file, rest = None, []
    remaining = iter(arguments)
    for argument in remaining:
        if argument == "--cfg" or argument.startswith("--cfg="):
            if file is not None:
                raise ConfigError("command line: --cfg is given twice; give one file")
            file = argument.partition("=")[2] if "=" in argument else next(remaining, None)
            if not file:
                raise ConfigError("command line: --cfg needs a file")
        else:
            name, equals, value = argument.partition("=")
            rest.append(_SHORT.get(name, name) + equals + value)
    return file, rest


def _architecture(origin: str | None, values: Mapping[str, Any], overrides: list[str]) -> str:
    name, where = "rwkv4", origin
    model = values.get("model")
    if isinstance(model, Mapping):
        name = model.get("architecture", name)
    for i, argument in enumerate(overrides):
        if argument.startswith("--model.architecture"):
            name = argument.partition("=")[2] if "=" in argument else "".join(overrides[i + 1 : i + 2])
            where = "command line"
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ConfigError(f"{where}: model.architecture is {name!r}; it must be one of {', '.join(ARCHITECTURES)}")
    return name


def _sections(architecture: str) -> dict[str, type]:
    return {
        "model": ARCHITECTURES[architecture],
        "data": DataConfig,
        "optim": OptimConfig,
        "run": RunConfig,
        "finetune": FinetuneConfig,
        "mesh": MeshConfig,
        "questions": QuestionsConfig,
    }


def _parser(sections: Mapping[str, type], program: str) -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    shorts = {short: full for short, full in _SHORT.items() if full[2:].partition(".")[0] in sections}
    parser = ArgumentParser(
        prog=program,
        usage=" ".join(
            [program, "[--cfg FILE.toml]", *(f"[{short} VALUE]" for short in shorts), "[--SECTION.KEY VALUE ...]"]
        ),
        description="--cfg names a TOML file with the sections below; options given here beat it. 'null' stands for none."
        + "".join(f" {short} is short for {full}." for short, full in shorts.items()),
        exit_on_error=False,
        allow_abbrev=False,
        default_env=False,
    )
    for name, kind in sections.items():
        parser.add_class_arguments(kind, name)
    return parser


def _check_file(origin: str, values: Mapping[str, Any], sections: Mapping[str, type]) -> None:
    """Raises ConfigError for a key or a type that the sections do not have."""
    for section, keys in values.items():
        if section not in sections or not isinstance(keys, Mapping):
            raise ConfigError(f"{origin}: there is no section [{section}]{_nearest(section, sections)}")
        hints = get_type_hints(sections[section])
        for key, value in keys.items():
            if key not in hints:
                raise ConfigError(f"{origin}: there is no key {section}.{key}{_nearest(key, hints, section + '.')}")
            if not _fits(value, hints[key]):
                raise ConfigError(
                    f"{origin}: {section}.{key} is {value!r} ({type(value).__name__}); it must be {_describe(hints[key])}"
                )


def _settings(values: Mapping[str, Mapping[str, Any]], sections: Mapping[str, type]) -> dict[str, Any]:
    """The sections with these values; a whole number becomes a float where the field is one, and a list a tuple, so that files
    load equal."""

    def widen(value: Any, hint: Any) -> Any:
        if isinstance(value, list):
            return tuple(value)
        return float(value) if type(value) is int and float in (hint, *get_args(hint)) else value

    def section(name: str, kind: type) -> Any:
        hints = get_type_hints(kind)
        return kind(**{key: widen(value, hints[key]) for key, value in values.get(name, {}).items()})

    return {name: section(name, kind) for name, kind in sections.items()}


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) in (Union, types.UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if get_origin(hint) is tuple:
        return isinstance(value, list | tuple) and all(_fits(item, get_args(hint)[0]) for item in value)
    if hint is float:
        return isinstance(value, float | int) and not isinstance(value, bool) and math.isfinite(value)
    return type(value) is hint


def _describe(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(option) for option in get_args(hint))
    if get_origin(hint) in (Union, types.UnionType):
        return (
            " or ".join(_describe(option) for option in get_args(hint) if option is not types.NoneType)
            + ", or left out"
        )
    if get_origin(hint) is tuple:
        return f"a list, each {_describe(get_args(hint)[0])}"
    return {int: "a whole number", float: "a finite number", str: "a string", bool: "true or false"}[hint]


def _nearest(name: str, valid: Any, prefix: str = "") -> str:
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.0)
    return f"; the nearest is {prefix}{close[0]}" if close else ""
