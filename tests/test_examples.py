"""Every example runs, and does what it says."""

import runpy
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_short(path):
    assert len(path.read_text().splitlines()) < 80


def test_an_existing_model_is_converted_and_goes_on_from_where_it_was(capsys):
    run = runpy.run_path(str(EXAMPLES / "convert_existing_model.py"))
    logits, right = run["main"]()
    np.testing.assert_allclose(logits["converted"], logits["trained"], rtol=0, atol=1e-4)
    assert right["converted"] == right["trained"] > 0.8
    assert right["tuned"] > right["converted"]
    assert "2 replaced, 2 dropped, 1 kept" in capsys.readouterr().out
