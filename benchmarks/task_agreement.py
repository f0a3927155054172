"""Decisions of nets with their real weights on recorded data, in 8 bits against float32.

    apt-get install pocketsphinx-testdata
    pip install --no-deps facenet-pytorch scikit-image pillow silero-vad
    python benchmarks/task_agreement.py --json docs/measurements/task_agreement.json

silero-vad says of 32 ms of sound whether somebody speaks (tests/silero.py); the nets of facenet-pytorch's MTCNN say of
squares of an image whether they show a face. Quantised for Zen 4 on other recordings and images than those that are
judged (of the astronaut, the only face, the mirrored image), and run in PyTorch by the exact integers of its kernels,
on any machine. --no-deps: facenet-pytorch asks for an old PyTorch, and only its files of weights are read.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import numpy as np
import silero
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import graphwright

TARGET = "znver4"
JUDGED, CALIBRATING = (
    ("astronaut.png", "camera.png", "motorcycle_left.png"),
    ("chelsea.png", "coffee.png", "rocket.jpg"),
)
# Of convolutions (channels, kernel), of the pooling behind each (kernel, stride), of a dense layer its sizes.
NETS: dict[str, tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int] | None, ...], tuple[int, int] | None]] = {
    "pnet": (((10, 3), (16, 3), (32, 3)), ((2, 2), None, None), None),
    "rnet": (((28, 3), (48, 3), (64, 2)), ((3, 2), (3, 2), None), (576, 128)),
    "onet": (((32, 3), (64, 3), (64, 3), (128, 2)), ((3, 2), (3, 2), (2, 2), None), (1152, 256)),
}
THRESHOLDS = {"pnet": 0.6, "rnet": 0.7, "onet": 0.7}  # MTCNN's own
SIZES = {"rnet": 24, "onet": 48}


class FaceNet(nn.Module):
    """A net of MTCNN: images [n, 3, h, w] to [n, 2, ...] probabilities of none and a face; its box; landmarks."""

    def __init__(self, name: str) -> None:
        super().__init__()
        convs, self.pools, self.dense = NETS[name]
        channels = 3
        for place, (count, kernel) in enumerate(convs, 1):
            setattr(self, f"conv{place}", nn.Conv2d(channels, count, kernel))
            setattr(self, f"prelu{place}", nn.PReLU(count))
            channels = count
        behind = len(convs) + 1
        if self.dense is not None:
            setattr(self, f"dense{behind}", nn.Linear(*self.dense))
            setattr(self, f"prelu{behind}", nn.PReLU(self.dense[1]))
        stem = f"conv{behind}" if self.dense is None else f"dense{behind + 1}"
        outputs = (2, 4, 10) if name == "onet" else (2, 4)
        self.heads = [f"{stem}_{place}" for place in range(1, len(outputs) + 1)]
        for head, count in zip(self.heads, outputs, strict=True):
            setattr(
                self, head, nn.Conv2d(channels, count, 1) if self.dense is None else nn.Linear(self.dense[1], count)
            )
        weights = torch.load(_folder("facenet_pytorch") / "data" / f"{name}.pt", weights_only=True)
        self.load_state_dict(weights)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The outputs."""
        layers = dict(self.named_children())
        for place, pool in enumerate(self.pools, 1):
            x = layers[f"prelu{place}"](layers[f"conv{place}"](x))
            x = x if pool is None else F.max_pool2d(x, *pool, ceil_mode=True)
        if self.dense is not None:
            behind = len(self.pools) + 1
            x = layers[f"prelu{behind}"](layers[f"dense{behind}"](x.permute(0, 3, 2, 1).flatten(1)))
        face, *others = (layers[head](x) for head in self.heads)
        return face.softmax(1), *others


def _folder(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{package} is not installed")
    return Path(spec.origin).parent


def image(name: str) -> torch.Tensor:
    """One of scikit-image's photographs, [1, 3, h, w], from -1 to 1."""
    with Image.open(_folder("skimage") / "data" / name) as opened:
        values = torch.from_numpy(np.array(opened.convert("RGB"))).float()
    return (values.permute(2, 0, 1)[None] - 127.5) / 128.0


def inputs_of(net: str, picture: torch.Tensor) -> list[torch.Tensor]:
    """What the net looks at: 128 x 128 of two smaller images for pnet, 64 squares of four sizes for the others."""
    if net == "pnet":
        smaller = [F.interpolate(picture, scale_factor=scale, mode="area") for scale in (0.6, 0.3)]
        return [
            part[..., top : top + 128, left : left + 128]
            for part in smaller
            for top in range(0, part.shape[2] - 127, 64)
            for left in range(0, part.shape[3] - 127, 64)
        ]
    size, (height, width) = SIZES[net], picture.shape[2:]
    squares = [
        F.interpolate(picture[..., top : top + side, left : left + side], size=(size, size), mode="area")
        for side in (60, 90, 120, 160)
        for top in range(0, height - side, side // 4)
        for left in range(0, width - side, side // 4)
    ]
    return [torch.cat(squares[first : first + 64]) for first in range(0, len(squares) - 63, 64)]


def row(
    name: str,
    net: nn.Module,
    calibration: Sequence[torch.Tensor],
    judged: Sequence[torch.Tensor],
    decide: Callable[[list[Any]], torch.Tensor],
    tolerance: float | None = None,
    activation: str = "mse",
) -> dict[str, Any]:
    """The net quantised on `calibration`, and how often `decide` says the same of what it makes of `judged`."""
    made = graphwright.quantize(net, calibration, target=TARGET, tolerance=tolerance, activation=activation)
    with torch.no_grad():
        exact, rounded = decide([net(x) for x in judged]), decide([made(x) for x in judged])
    products = [c for c in made.report().precisions if "conv2d" in c.operator or "linear" in c.operator]
    found = {
        "net": name,
        "tolerance": tolerance or 0.1,
        "activation": activation,
        "products": len(products),
        "products_in_int8": sum(c.dtype == "int8" for c in products),
        "decisions": exact.numel(),
        "yes": int(exact.sum()),
        "yes_in_both": int((exact & rounded).sum()),
        "agreement": float((exact == rounded).double().mean()),
    }
    print(found, flush=True)
    return found


def rows() -> list[dict[str, Any]]:
    """One row for each net and tolerance."""
    encoder, decoder = silero.load()
    novel = silero.frames_of("librivox/*.wav").split(60)[:-1]
    others = silero.frames_of("cards/*.wav", "*.raw").split(60)[:-1]
    found = [
        row("silero-vad", encoder, others, novel, lambda made: decoder(torch.cat(made)) > 0.5, *how)
        for how in ((None,), (0.2,), (1.0,), (None, "dynamic"), (0.2, "dynamic"))
    ]
    for name, threshold in THRESHOLDS.items():
        calibration = [x for picture in CALIBRATING for x in inputs_of(name, image(picture))][::3]
        face = [x.flip(3) for x in inputs_of(name, image("astronaut.png"))][::4]
        order = np.random.default_rng(0).permutation(len(calibration) + len(face))
        mixed = [[*calibration, *face][place] for place in order]
        judged = [x for picture in JUDGED for x in inputs_of(name, image(picture))]

        def faces(made: list[Any], threshold: float = threshold) -> torch.Tensor:
            return torch.cat([probabilities[:, 1].flatten() for probabilities, *_ in made]) >= threshold

        found.append(row(f"MTCNN {name}", FaceNet(name).eval(), mixed, judged, faces))
    return found


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where rows are written")
    options = parser.parse_args()
    made = rows()
    if options.json is not None:
        options.json.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
