"""The README's code runs as it stands, and its table tells the truth."""

import dataclasses
import re
from pathlib import Path

import numpy as np

from netdeconv_jax import ChannelDeconv, DeconvConv, DeconvDense, WhiteningSpec
from netdeconv_jax.whitening import NewtonSchulz, Stride

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_code_of_the_readme_runs():
    scope = {}
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(compile(block, "README.md", "exec"), scope)
    assert scope["logits"].shape == (8, 10)
    assert np.isfinite(scope["loss"])


def test_the_table_gives_the_defaults():
    spec, rows = WhiteningSpec(), dict(re.findall(r"^\| `(\w+)`[^|]*\| ([^|]*) \|", README, re.M))
    assert rows["block_size"] == (
        f"{spec.grouping.block_size} (`DeconvDense` {DeconvDense(1).resolved_spec().grouping.block_size})"
    )
    assert NewtonSchulz(int(rows["num_iters"])) == spec.root
    assert float(rows["eps"].split()[0]) == spec.eps
    assert "1e-2" in rows["eps"]
    assert ChannelDeconv(block_size=1).resolved_spec().eps == 1e-2
    assert float(rows["momentum"]) == spec.momentum
    assert Stride(int(rows["sampling_stride"])) == spec.sampling
    assert rows["whiten"].strip('`"') == spec.whiten
    assert rows["grouping"].strip('`"') == spec.grouping.kind
    assert rows["shared_whitener"] == str(spec.grouping.shared)


def test_every_option_of_the_layer_is_in_the_readme():
    names = {field.name for field in dataclasses.fields(DeconvConv)} - {"name", "parent"}
    assert len(names) > 25
    for name in names:
        assert f"`{name}`" in README, name
