"""docs/models.md is what docs/models_page.py writes."""

import importlib.util
from pathlib import Path

import pytest

from netdeconv_jax import models

DOCS = Path(__file__).parent.parent / "docs"


def page_module():
    spec = importlib.util.spec_from_file_location("models_page", DOCS / "models_page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=() if n in ("mlp", "resnet18") else pytest.mark.slow)
        for n in models.list()
    ],
)
def test_the_page_holds_the_current_row_of_every_network(name):
    module = page_module()
    assert module.line(name, models.list()[name]) in module.PAGE.read_text().splitlines()


def test_the_page_starts_with_the_current_head():
    module = page_module()
    assert module.PAGE.read_text().startswith(module.HEAD)
