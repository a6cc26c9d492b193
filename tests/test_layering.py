"""Arrows go one way, and the library needs nothing but jax, flax and numpy."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "netdeconv_jax"
FILES = sorted(PACKAGE.rglob("*.py"))

# Lower may not import higher. `nnx` and `linen` are twins that know nothing of each other.
LEVELS = {
    "ops": 0,
    "whitening": 1,
    "linen": 2,
    "nnx": 2,
    "models": 3,
    "interop": 4,
    "analysis": 4,
}
THIRD_PARTY = {
    "ops": {"jax", "numpy"},
    "whitening": {"jax", "numpy"},
    "linen": {"jax", "numpy", "flax"},
    "nnx": {"jax", "numpy", "flax"},
    "models": {"jax", "numpy", "flax"},
    "interop": {
        "jax",
        "numpy",
        "flax",
        "flatbuffers",
        "safetensors",
        "torch",
        "jax2onnx",
        "onnxruntime",
    },
    "analysis": {"jax", "numpy", "flax", "matplotlib"},
    "": {"jax", "numpy", "flax"},
}
NEVER = {"train", "configs", "tensorflow_datasets", "grain", "orbax"}


def part_of(path):
    """`ops` for netdeconv_jax/ops/roots.py, `linen` for linen.py, "" for the package's own __init__."""
    first = path.relative_to(PACKAGE).parts[0]
    return "" if first == "__init__.py" else first.removesuffix(".py")


def is_module(name):
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def imported_modules(source, package="netdeconv_jax"):
    """Absolute names of all modules that a source imports, wherever in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1]
            name = ".".join([*(base if node.level else []), *filter(None, [node.module])])
            for alias in node.names:
                inner = f"{name}.{alias.name}"
                yield inner if name.split(".")[0] == "netdeconv_jax" and is_module(inner) else name


def imports_of(path):
    package = ".".join(path.relative_to(ROOT).parent.parts)
    return list(imported_modules(path.read_text(), package))


def name_of(path):
    return str(path.relative_to(ROOT))


def test_every_file_of_the_package_belongs_to_a_layer():
    assert len(FILES) >= 10
    assert {part_of(path) for path in FILES} <= {"", *LEVELS}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_within_the_package_look_down_only(path):
    part = part_of(path)
    if part == "":
        return
    for name in imports_of(path):
        top, *inner = name.split(".")
        if top != "netdeconv_jax":
            continue
        assert inner, f"{name_of(path)} imports the package itself, which imports every layer"
        allowed = inner[0] == part or LEVELS[inner[0]] < LEVELS[part]
        assert allowed, f"{name_of(path)} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_from_outside_are_those_of_the_layer(path):
    for name in imports_of(path):
        top = name.split(".")[0]
        assert top not in NEVER, f"{name_of(path)} imports {name}"
        known = {"netdeconv_jax", *THIRD_PARTY[part_of(path)], *sys.stdlib_module_names}
        assert top in known, f"{name_of(path)} imports {name}"


def test_the_rules_see_imports_of_every_form():
    source = """
import optax.losses
from netdeconv_jax import ops, linen
from . import roots
from ..whitening import spec
def late():
    from netdeconv_jax.linen import DeconvConv
"""
    assert list(imported_modules(source, "netdeconv_jax.ops")) == [
        "optax.losses",
        "netdeconv_jax.ops",
        "netdeconv_jax.linen",
        "netdeconv_jax.ops.roots",
        "netdeconv_jax.whitening.spec",
        "netdeconv_jax.linen",
    ]


def test_importing_the_library_loads_nothing_that_jax_and_flax_do_not_load_themselves():
    # Flax itself loads optax and orbax in places: what counts is what comes on top of it.
    program = """
import sys
import jax, jax.numpy, jax.test_util, numpy, flax, flax.linen, flax.nnx
before = {name.split(".")[0] for name in sys.modules}
import netdeconv_jax
after = {name.split(".")[0] for name in sys.modules}
print(*sorted(after - before - set(sys.stdlib_module_names)))
print("matplotlib" in sys.modules, "tensorflow" in sys.modules, "torch" in sys.modules)
"""
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.split("\n")[:2] == ["netdeconv_jax", "False False False"]


def test_the_pure_functions_load_without_flax():
    # `netdeconv_jax/__init__.py` imports the layers too: give the name an empty package instead.
    program = """
import sys, types
package = types.ModuleType("netdeconv_jax")
package.__path__ = ["netdeconv_jax"]
sys.modules["netdeconv_jax"] = package
import netdeconv_jax.ops, netdeconv_jax.whitening.conv
print(any(name.split(".")[0] in ("flax", "optax", "orbax", "chex") for name in sys.modules))
"""
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "False"
