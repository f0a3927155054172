"""What 8 bits, zeros and training for them cost in accuracy, in per cent of test images.

    python benchmarks/compression_accuracy.py --json docs/measurements/compression_accuracy.json
    python benchmarks/compression_accuracy.py --minilm

scikit-learn's digits, the network and data of tests/digits.py, trained here; models are quantised for Zen 4 and run in
PyTorch by the exact integers of its kernels, on any machine. `--minilm`: the cosines of MiniLM's embeddings of 200
sentences (tests/minilm.py) to those of float32 instead, by "mse" and "dynamic" within the default tolerance, and by
each way to find ranges with all products in 8 bits.
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
from minilm import MiniLM

import graphwright

TARGET = "znver4"
UNBOUNDED = 1.0  # a tolerance that sends no product of MiniLM back to float32


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


def cosines() -> list[dict[str, Any]]:
    """One row for each way to find ranges and each tolerance."""
    minilm = MiniLM.load()
    exact = minilm.embedded(minilm.model)
    found = []
    for tolerance, ways in ((None, ("mse", "dynamic")), (UNBOUNDED, ("mse", "dynamic", "minmax", "percentile", "kl"))):
        for activation in ways:
            made = graphwright.quantize(
                minilm.model, minilm.batches[:2], activation=activation, tolerance=tolerance, target=TARGET
            )
            products = [c for c in made.report().precisions if "linear" in c.operator]
            rounded = minilm.embedded(made)
            found.append(
                {
                    "way": f"MiniLM int8, {activation}",
                    "tolerance": tolerance or 0.1,
                    "products": len(products),
                    "products_in_int8": sum(c.dtype == "int8" for c in products),
                    "least_cosine": float((exact * rounded).sum(1).min()),
                    "relative_l2": float((rounded - exact).norm() / exact.norm()),
                }
            )
            print(found[-1], flush=True)
    return found


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where rows are written")
    parser.add_argument("--minilm", action="store_true", help="cosines of MiniLM's embeddings instead of digits")
    options = parser.parse_args()
    made = cosines() if options.minilm else rows()
    if options.json is not None:
        options.json.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
