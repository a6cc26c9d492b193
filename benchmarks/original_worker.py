"""Steps of the original's PyTorch ResNet-18, for `benchmarks.original_step`; needs torch and nothing else.

  python benchmarks/original_worker.py ORIGINAL BATCH THREADS

ORIGINAL is a clone of the original repository. Reads a norm, `batch` or `deconv`, from each line of standard
input, takes a training step and answers with its seconds and its processor seconds, all threads together.
"""

import functools
import importlib
import sys
import time
from typing import Any

torch: Any = importlib.import_module("torch")  # no part of the project's environments


def main(original: str, batch: str, threads: str) -> None:
    """Answer each line until there are no more."""
    sys.path.insert(0, original)
    deconv: Any = importlib.import_module("models.deconv")
    resnet: Any = importlib.import_module("models.resnet")
    torch.set_num_threads(int(threads))
    torch.manual_seed(0)
    # The options of the published runs: blocks of 64 and 512, every third patch, five iterations.
    layers = functools.partial(deconv.FastDeconv, bias=True, eps=1e-5, n_iter=5, block=64)
    head = functools.partial(deconv.Delinear, eps=1e-5, n_iter=5, block=512)
    networks = {
        "batch": resnet.ResNet18(10, None, None, None),
        "deconv": resnet.ResNet18(10, layers, head, None),
    }
    images = torch.randn(int(batch), 3, 32, 32)
    labels = torch.randint(0, 10, (int(batch),))
    optimizers = {
        norm: torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)
        for norm, network in networks.items()
    }
    print(torch.__version__, flush=True)
    for line in sys.stdin:
        norm = line.strip()
        start, processor = time.perf_counter(), time.process_time()
        optimizers[norm].zero_grad()
        loss = torch.nn.functional.cross_entropy(networks[norm].train()(images), labels)
        loss.backward()
        optimizers[norm].step()
        if not torch.isfinite(loss):
            raise FloatingPointError(f"The loss is {loss}.")
        print(time.perf_counter() - start, time.process_time() - processor, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
