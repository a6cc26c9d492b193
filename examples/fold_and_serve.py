"""A classifier behind HTTP, without whitening: train, fold to plain convolutions, compile once, serve.

  python examples/fold_and_serve.py --port=8000
  curl localhost:8000/classify -d "[$(seq -s, 64)]"      # 64 numbers as JSON; digits have 0 to 16

Handwritten digits of scikit-learn; training takes some seconds on two cores. Ctrl-C ends it.
"""

import argparse
import contextlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jax
import numpy as np
import train_step_linen as trainer
from sklearn.datasets import load_digits

from netdeconv_jax.interop import export_stablehlo, fold


def scaled(pixels: np.ndarray) -> np.ndarray:
    """Return pixels as the network wants them."""
    return ((pixels - 4.9) / 6).astype(np.float32)


def program(images: np.ndarray, labels: np.ndarray):
    """Return a trained network as a program of plain convolutions, for any number of images."""
    variables = trainer.model.init(jax.random.key(0), images[:1], train=False)
    opt_state = trainer.optimizer.init(variables["params"])
    for step in range(100):
        batch = np.random.default_rng(step).choice(len(images), 32)
        some = images[batch], labels[batch]
        variables, opt_state, _ = trainer.train_step(variables, opt_state, *some)
    folded = fold(trainer.model, variables, images[:1], train=False)
    return export_stablehlo(*folded, images.shape[1:], platforms=["cpu"], train=False)


def handler(classify) -> type[BaseHTTPRequestHandler]:
    """Return what answers a POST of 64 pixels with a digit and its probability."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            try:
                length = int(self.headers["Content-Length"] or 0)
                pixels = np.array(json.loads(self.rfile.read(max(0, length))), float)
                images = scaled(pixels.reshape(1, 8, 8, 1))
            except (ValueError, TypeError, OverflowError, RecursionError):
                return self.answer(400, {"error": "the body must be 64 numbers as JSON"})
            chances = jax.nn.softmax(classify(images)[0])
            best = int(chances.argmax())
            return self.answer(200, {"digit": best, "probability": float(chances[best])})

        def answer(self, status: int, content: dict):
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

    return Handler


def main() -> None:
    """Train, fold and serve."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=8000)
    port = parser.parse_args().port
    digits: Any = load_digits()  # the first 1198 are for training
    trained = program(scaled(digits.images[:1198, ..., None]), digits.target[:1198])
    server = ThreadingHTTPServer(("127.0.0.1", port), handler(jax.jit(trained.call)))
    print(f"Serving on http://127.0.0.1:{server.server_port}/classify", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
    server.server_close()


if __name__ == "__main__":
    main()
