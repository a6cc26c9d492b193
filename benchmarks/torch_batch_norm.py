"""CIFAR-10 with batch norm in PyTorch, by the recipe of the original code: is our batch norm at fault?

  python benchmarks/torch_batch_norm.py CIFAR10.npz WIDTH EPOCHS SEED

Needs torch and numpy, and nothing of this project. CIFAR10.npz holds `x_train`, `y_train`, `x_test` and
`y_test`, images in bytes [n, 32, 32, 3]. ResNet-18, first layer of WIDTH channels (64 is the full width), SGD
with momentum 0.9, weight decay 1e-3 on all parameters, batches of 128, a learning rate of 0.1 that falls as a
cosine, step by step, to 0, crops of 4 and flips. One thread. Adds a run to
benchmarks/results/torch_batch_norm.json.
"""

import datetime
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

torch: Any = importlib.import_module("torch")  # no part of the project's environments
nn = torch.nn

RESULT = Path(__file__).parent / "results" / "torch_batch_norm.json"
MEAN = np.array([0.4914, 0.4822, 0.4465], np.float32)
DEVIATION = np.array([0.2023, 0.1994, 0.2010], np.float32)
BATCH = 128


def standardized(images: np.ndarray) -> Any:
    """Return images [n, 32, 32, 3] as a tensor [n, 3, 32, 32]."""
    return torch.tensor(
        ((images.astype(np.float32) / 255 - MEAN) / DEVIATION).transpose(0, 3, 1, 2)
    )


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, channels: int, features: int, stride: int):
        super().__init__()
        self.c1 = nn.Conv2d(channels, features, 3, stride, 1, bias=False)
        self.b1 = nn.BatchNorm2d(features)
        self.c2 = nn.Conv2d(features, features, 3, 1, 1, bias=False)
        self.b2 = nn.BatchNorm2d(features)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels != features:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, features, 1, stride, bias=False), nn.BatchNorm2d(features)
            )

    def forward(self, x: Any) -> Any:
        """Return the sum of both, rectified."""
        y = self.b2(self.c2(nn.functional.relu(self.b1(self.c1(x)))))
        return nn.functional.relu(y + self.shortcut(x))


def resnet18(width: int) -> Any:
    """Return the network for images of 32x32."""
    layers = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    channels = width
    for features, stride in ((width, 1), (2 * width, 2), (4 * width, 2), (8 * width, 2)):
        for first in (stride, 1):
            layers.append(Block(channels, features, first))
            channels = features
    layers += [nn.AvgPool2d(4), nn.Flatten(), nn.Linear(8 * width, 10)]
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def augmented(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return crops of the padded images, half of them mirrored."""
    padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
    tops, lefts = rng.integers(0, 9, BATCH), rng.integers(0, 9, BATCH)
    mirrored = rng.integers(0, 2, BATCH)
    crops = [
        image[top : top + 32, left : left + 32]
        for image, top, left in zip(padded, tops, lefts, strict=True)
    ]
    return np.stack([c[:, ::-1] if m else c for c, m in zip(crops, mirrored, strict=True)])


def main(data: str, width: int, epochs: int, seed: int) -> None:
    """Train and add the run to the record."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    arrays = np.load(data)
    images, labels = arrays["x_train"], arrays["y_train"].ravel().astype(np.int64)
    network = resnet18(width)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    steps = len(images) // BATCH
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps * epochs)
    start, found = time.time(), []
    for epoch in range(1, epochs + 1):
        network.train()
        order, losses = rng.permutation(len(images)), []
        for step in range(steps):
            chosen = order[step * BATCH : (step + 1) * BATCH]
            logits = network(standardized(augmented(images[chosen], rng)))
            loss = nn.functional.cross_entropy(logits, torch.tensor(labels[chosen]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        accuracy = tested(network, arrays["x_test"], arrays["y_test"].ravel())
        figures = {"epoch": epoch, "train_loss": float(np.mean(losses)), "test_accuracy": accuracy}
        print(figures, f"{time.time() - start:.0f} s", flush=True)
        found.append(figures)
    runs = json.loads(RESULT.read_text()) if RESULT.exists() else []
    runs.append(
        {
            "command": f"python benchmarks/torch_batch_norm.py CIFAR10.npz {width} {epochs} {seed}",
            "width": width,
            "seed": seed,
            "epochs": found,
            "seconds": time.time() - start,
            "date": datetime.date.today().isoformat(),
            "torch": torch.__version__,
            "device": "cpu, 1 thread",
        }
    )
    RESULT.write_text(json.dumps(runs, indent=1) + "\n")


def tested(network: Any, images: np.ndarray, labels: np.ndarray) -> float:
    """Return the share of test images that are told right."""
    network.eval()
    right = 0
    with torch.no_grad():
        for first in range(0, len(images), 500):
            logits = network(standardized(images[first : first + 500]))
            right += (logits.argmax(1).numpy() == labels[first : first + 500]).sum()
    return float(right / len(images))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
