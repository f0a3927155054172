"""What 8 bits, zeros and training for them cost in accuracy, in per cent of test images.

    python benchmarks/compression_accuracy.py --json docs/measurements/compression_accuracy.json

scikit-learn's digits, the network and data of tests/digits.py, trained here; models are quantised for Zen 4 and run in
PyTorch by the exact integers of its kernels, on any machine.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import torch
from digits import Digits, network

import graphwright

TARGET = "znver4"


def rows() -> list[dict[str, Any]]:
    """One row for each way."""
    digits = Digits.load()
    model = digits.train(network(), 20)
    exact = digits.points(model)
    found = [{"way": "float32", "points": exact}]

    def add(way: str, made: torch.nn.Module) -> None:
        found.append({"way": way, "points": digits.points(made), "lost": exact - digits.points(made)})
        print(found[-1], flush=True)

    for activation in ("mse", "kl", "percentile", "minmax"):
        add(
            f"int8, {activation}", graphwright.quantize(model, digits.calibration, activation=activation, target=TARGET)
        )
    add("int8, migration auto", graphwright.quantize(model, digits.calibration, migration="auto", target=TARGET))
    add("float32, 2 epochs more", digits.train(copy.deepcopy(model), 2, 3e-4))
    prepared = graphwright.prepare_qat(model, digits.calibration)
    digits.train(prepared, 2, 3e-4)
    add("int8, trained for it", graphwright.convert(prepared, digits.test, target=TARGET))
    pruned = graphwright.prune(model, "2:4", importance="wanda", calibration=digits.calibration)
    digits.train(pruned, 2, 1e-3, graphwright.keep_zeros)
    add("2:4 by Wanda, 2 epochs", pruned)
    blocks = graphwright.prune(model, "16x16", 0.75, keep=["11"])
    digits.train(blocks, 4, 3e-3, graphwright.keep_zeros)
    add("75 % of 16x16 blocks, 4 epochs, int8", graphwright.quantize(blocks, digits.calibration, target=TARGET))
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
