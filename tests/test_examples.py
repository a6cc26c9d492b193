"""The examples run as they stand, each as a process of its own, and do what they say."""

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits
from trainer_process import interruptible

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def process(name, *arguments):
    # Most of the time of programs as small as these is the compiler's.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return subprocess.Popen(
        interruptible([sys.executable, "-W", "error", f"examples/{name}.py", *arguments]),
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(name):
    example = process(name)
    out, err = example.communicate(timeout=300)
    assert example.returncode == 0, err
    return out


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_can_be_read_in_one_sitting(path):
    lines = path.read_text().splitlines()
    assert len(lines) < 80
    assert f"  python examples/{path.name}" in "\n".join(lines[:8])


# The server trains by the Linen step too.
@pytest.mark.parametrize(
    "name", [pytest.param("train_step_linen", marks=pytest.mark.slow), "train_step_nnx"]
)
def test_a_training_step_learns_digits(name):
    rows = re.findall(r"epoch (\d): loss ([\d.]+), test accuracy ([\d.]+)%", run(name))
    assert [int(epoch) for epoch, _, _ in rows] == [1, 2, 3]
    assert float(rows[-1][2]) > 90 > 80 > 100 * float(rows[-1][1])


def test_gradients_differ_where_the_whitener_is_held_constant():
    found = dict(re.findall(r"^(.*?) {2,}([-+\d.e]+)$", run("gradients_through_whitening"), re.M))
    assert float(found["norm of the gradient, through D"]) > 0
    assert 0 < float(found["cosine between them"]) < 0.99
    assert float(found["jvp along the input's scale, D followed"]) < 1e-10
    assert float(found["jvp along the input's scale, D constant"]) > 1
    assert float(found["Hessian-vector product, against finite differences"]) < 1e-6
    measured = float(found["slope along a direction, measured"])
    assert abs(float(found["slope along a direction, by the gradient"]) / measured - 1) < 1e-4
    assert abs(float(found["slope along a direction, D constant"]) / measured - 1) > 0.1


def test_a_folded_classifier_answers_over_http():
    digits: Any = load_digits()
    server: Any = process("fold_and_serve", "--port=0")
    try:
        line = server.stdout.readline()
        assert line.startswith("Serving on http://127.0.0.1:"), line + server.stderr.read()
        address = line.split()[-1]

        def ask(content):
            with urllib.request.urlopen(address, content, timeout=60) as answer:
                return json.load(answer)

        found = [ask(json.dumps(digits.data[i].tolist()).encode()) for i in range(1198, 1218)]
        right = [a["digit"] == digits.target[1198 + i] for i, a in enumerate(found)]
        assert sum(right) >= 15
        assert all(0.1 <= a["probability"] <= 1 for a in found)
        with pytest.raises(urllib.error.HTTPError, match="400") as refused:
            ask(b"[1, 2]")
        assert "64 numbers" in json.load(refused.value)["error"]
        refused.value.close()
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.communicate(timeout=60)
        finally:
            server.kill()
            server.communicate()
    assert server.returncode == 0


def test_an_existing_model_is_converted_and_goes_on_from_where_it_was(capsys):
    run = runpy.run_path(str(ROOT / "examples" / "convert_existing_model.py"))
    logits, right = run["main"]()
    np.testing.assert_allclose(logits["converted"], logits["trained"], rtol=0, atol=1e-4)
    assert right["converted"] == right["trained"] > 0.8
    assert right["tuned"] > right["converted"]
    assert "2 replaced, 2 dropped, 1 kept" in capsys.readouterr().out
