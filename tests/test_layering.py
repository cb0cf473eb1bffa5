"""Who may import whom, read off the source."""

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = sorted((ROOT / "rwkv_jax").rglob("*.py"))
KERNELS = sorted((ROOT / "kernels" / "rwkv_kernels").rglob("*.py"))


def module_name(path):
    """Dotted name of a source file."""
    base = ROOT / "kernels" if path in KERNELS else ROOT
    return ".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__")


HARNESS = "rwkv_jax.harness"
PEERS = "rwkv_kernels.peers"
EXTRAS = {HARNESS: "lm_eval"}
"""Modules that are of no use without an extra, and say so when they are imported."""
MODULES = {module_name(path): path for path in LIBRARY + KERNELS}


@cache
def imports(name, *, lazy=True):
    """Dotted names that a module imports; with lazy=False only those that are imported with it."""
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(path.read_text())
    if not lazy:
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            # `from a import b` means the module a.b where there is one, else a.
            found |= {f"{base}.{a.name}" if f"{base}.{a.name}" in MODULES else base for a in node.names}
    return found


def within(name, *packages):
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def own(name):
    """What a module imports of this project."""
    return {found for found in imports(name) if within(found, "rwkv_jax", "rwkv_kernels")}


def part(package):
    return [name for name in MODULES if within(name, package)]


def test_imports_are_found_in_every_form():
    assert {"rwkv_kernels.dispatch", "rwkv_kernels.wkv4.reference", "jax.numpy"} <= imports("rwkv_kernels.wkv4.api")
    assert {"rwkv_jax.params", "rwkv_kernels", "rwkv_jax.nn.linear"} <= imports("rwkv_jax.models.rwkv4")
    assert "rwkv_jax.checkpoint" in imports("rwkv_jax.load") - imports("rwkv_jax.load", lazy=False)


@pytest.mark.parametrize("name", part("rwkv_kernels"))
def test_kernels_import_only_jax_numpy_jaxtyping_and_the_standard_library(name):
    foreign = {found.partition(".")[0] for found in imports(name)} - sys.stdlib_module_names
    optional = {"triton", "jax_triton"} if "triton" in name.rpartition(".")[2] else set()
    optional |= {"torch", "fla"} if name == PEERS else set()
    assert foreign <= {"rwkv_kernels", "jax", "numpy", "jaxtyping"} | optional


def test_only_kernels_that_nothing_imports_until_they_run_import_triton_at_their_top():
    kernels = {name for name in part("rwkv_kernels") if name.endswith(".triton")}
    assert kernels
    for name in set(MODULES) - kernels:
        assert not kernels & imports(name), name
        assert not {"triton", "jax_triton"} & {x.partition(".")[0] for x in imports(name, lazy=False)}, name


@pytest.mark.parametrize("name", part("rwkv_kernels"))
def test_a_kernels_reference_imports_nothing_of_its_siblings(name):
    if name.endswith(".reference"):
        assert own(name) == set()


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        ("rwkv_jax.params", ()),
        ("rwkv_jax.sharding", ("rwkv_jax.params",)),
        ("rwkv_jax.text", ("rwkv_jax.text",)),
        ("rwkv_jax.nn", ("rwkv_jax.nn", "rwkv_jax.params", "rwkv_jax.sharding", "rwkv_kernels")),
        ("rwkv_jax.models", ("rwkv_jax.models", "rwkv_jax.nn", "rwkv_jax.params", "rwkv_kernels")),
        ("rwkv_jax.lm", ("rwkv_jax.models", "rwkv_jax.nn", "rwkv_jax.params", "rwkv_jax.sharding")),
        ("rwkv_jax.convert", ("rwkv_jax.convert", "rwkv_jax.models", "rwkv_jax.nn", "rwkv_jax.params")),
        ("rwkv_jax.save", ("rwkv_jax.convert", "rwkv_jax.models")),
        ("rwkv_jax.loss", ("rwkv_jax.nn", "rwkv_jax.sharding")),
        ("rwkv_jax.optim", ("rwkv_jax.loss",)),
        (
            "rwkv_jax.train",
            ("rwkv_jax.lm", "rwkv_jax.loss", "rwkv_jax.models", "rwkv_jax.params", "rwkv_jax.sharding"),
        ),
        ("rwkv_jax.finetune", ("rwkv_jax.lm", "rwkv_jax.models", "rwkv_jax.params", "rwkv_jax.train")),
        ("rwkv_jax.nnx", ("rwkv_jax.lm", "rwkv_jax.models")),
        ("rwkv_jax.generate", ("rwkv_jax.lm", "rwkv_jax.models", "rwkv_jax.text")),
        ("rwkv_jax.score", ("rwkv_jax.lm", "rwkv_jax.loss", "rwkv_jax.models")),
        ("rwkv_jax.question", ("rwkv_jax.models", "rwkv_jax.score", "rwkv_jax.text")),
    ],
)
def test_a_layer_imports_only_from_those_above_it(package, allowed):
    assert part(package)
    for name in part(package):
        if not name.endswith(".__main__"):  # A command stands above all.
            assert {found for found in own(name) if not within(found, *allowed)} == set(), name


def test_models_do_not_import_each_other():
    shared = {"rwkv_jax.models", "rwkv_jax.models.base"}
    siblings = [name for name in part("rwkv_jax.models") if name not in shared]
    for name in siblings:
        assert not own(name) & {"rwkv_jax.models", *siblings} - {name}


def test_no_modules_import_each_other_in_a_circle():
    # A package's __init__ gathers its own modules, which import their siblings and not it.
    graph = {name: own(name) - {name} for name in MODULES}
    assert list(TopologicalSorter(graph).static_order())


def test_what_is_imported_at_the_top_of_a_module_is_a_base_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    base = {re.split(r"[^\w-]", requirement)[0].lower() for requirement in project["dependencies"]}
    providers = importlib.metadata.packages_distributions()
    undeclared = {}
    for name in part("rwkv_jax"):
        for found in {found.partition(".")[0] for found in imports(name, lazy=False)} - sys.stdlib_module_names:
            distributions = {distribution.lower() for distribution in providers.get(found, [found])}
            if found not in ("rwkv_jax", "rwkv_kernels", EXTRAS.get(name)) and not distributions & base:
                undeclared[name] = found
    assert undeclared == {}


def test_only_the_writer_of_pth_and_the_benchmarks_peers_import_torch_and_only_when_they_run():
    for name in MODULES:
        lazily = name not in ("rwkv_jax.convert.torch_file", PEERS)
        found = {found.partition(".")[0] for found in imports(name, lazy=lazily)}
        assert not {"torch", "tensorflow", "fla"} & found, name
    assert [name for name in MODULES if PEERS in imports(name)] == ["rwkv_kernels.benchmark"]


def test_only_the_harness_imports_lm_eval_and_nothing_imports_the_harness():
    assert [name for name in MODULES if "lm_eval" in {found.partition(".")[0] for found in imports(name)}] == [HARNESS]
    assert [name for name in MODULES if HARNESS in imports(name)] == []


def test_only_one_module_imports_flax():
    assert [name for name in MODULES if "flax" in {found.partition(".")[0] for found in imports(name)}] == [
        "rwkv_jax.nnx"
    ]


def test_importing_the_package_starts_no_device_and_loads_no_heavy_dependency():
    code = "import sys, rwkv_jax, rwkv_kernels; print(*sys.modules)"
    # With a platform that does not exist, touching a device at import would raise.
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
        "JAX_PLATFORMS": "no_such_platform",
    }
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    loaded = {name.partition(".")[0] for name in result.stdout.split()}
    assert {"jax", "rwkv_jax"} <= loaded
    heavy = {
        "orbax",
        "flax",
        "grain",
        "matplotlib",
        "tensorboardX",
        "tiktoken",
        "jsonargparse",
        "torch",
        "tensorflow",
        "tqdm",
        "lm_eval",
        "triton",
        "jax_triton",
    }
    assert not loaded & heavy
