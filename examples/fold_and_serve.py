"""A classifier behind HTTP, without whitening: train, fold to plain convolutions, compile once, serve.

  python examples/fold_and_serve.py --port=8000
  curl localhost:8000/classify -d "[$(seq -s, 64)]"      # 8x8 pixels from 0 to 16, as JSON

Handwritten digits of scikit-learn; training takes some seconds on two cores. Ctrl-C ends it.
"""

import argparse
import contextlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import jax
import numpy as np
import train_step_linen as trainer
from sklearn.datasets import load_digits

from netdeconv_jax.interop import export_stablehlo, fold


def program(images: np.ndarray, labels: np.ndarray):
    """Return a trained network as a program of plain convolutions, for any number of images."""
    variables = trainer.model.init(jax.random.key(0), images[:1], train=False)
    opt_state = trainer.optimizer.init(variables["params"])
    for step in range(100):
        batch = np.random.default_rng(step).choice(len(images), 32, replace=False)
        some = images[batch], labels[batch]
        variables, opt_state, _ = trainer.train_step(variables, opt_state, *some)
    folded = fold(trainer.model, variables, images[:1], train=False)
    return export_stablehlo(*folded, images.shape[1:], platforms=["cpu"], train=False)


def handler(classify) -> type[BaseHTTPRequestHandler]:
    """Return what answers a POST of 64 pixels with a digit and its probability."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            try:
                length = int(self.headers.get("Content-Length", 0))
                pixels = np.asarray(json.loads(self.rfile.read(length)), np.float32).reshape(
                    1, 8, 8, 1
                )
            except (ValueError, TypeError) as error:
                return self.answer(400, {"error": f"the body must be 64 numbers: {error}"})
            chances = jax.nn.softmax(classify(scaled(pixels))[0])
            digit = int(chances.argmax())
            return self.answer(200, {"digit": digit, "probability": float(chances[digit])})

        def answer(self, status: int, content: dict):
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return Handler


def scaled(pixels: np.ndarray) -> np.ndarray:
    """Return pixels as the network wants them."""
    return ((pixels - 4.9) / 6).astype(np.float32)


def main() -> None:
    """Train, fold and serve."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=8000)
    port = parser.parse_args().port
    digits = load_digits()
    trained = program(scaled(digits.images[:1198, ..., None]), digits.target[:1198])
    server = ThreadingHTTPServer(("127.0.0.1", port), handler(jax.jit(trained.call)))
    print(f"Serving on http://127.0.0.1:{server.server_port}/classify", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
    server.server_close()


if __name__ == "__main__":
    main()
