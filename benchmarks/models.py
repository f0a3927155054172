"""`make bench`: the models of the zoo against the peers; each row goes to docs/measurements/ as soon as it is measured.

Machines of another instruction set or vector width have a file of their own there.

python benchmarks/models.py                              all rows
python benchmarks/models.py --resume                     those that the file does not have yet
python benchmarks/models.py --only resnet50 --batch 4    measure again
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from pathlib import Path

from graphwright.compiler.benchmarking import models as bench_models
from graphwright.compiler.benchmarking.worker import Subject
from graphwright.hwdb import detect

MEASUREMENTS = Path(__file__).parent.parent / "docs" / "measurements"

# The ratio to the best peer aimed at, batch 1.
FP32 = {
    "resnet18": 0.65,
    "resnet50": 0.80,
    "mobilenetv2": 0.80,
    "efficientnet": 0.85,
    "convnext": 0.90,
    "bert": 0.93,
    "gpt2": 0.93,
    "vit": 0.93,
    "wav2vec2": 0.90,
    "llama-decode": 0.95,
}
BF16 = {"resnet50": 0.90, "bert": 0.95}
BATCHES = (1, 4, 16)


def results() -> Path:
    """The file of machines like this one."""
    hw = detect()
    return MEASUREMENTS / f"models-{hw.isa}-{hw.vector_bits}.json"


def rows() -> dict[tuple[str, int, str], float]:
    """Every row of the table and its bar."""
    table = {(name, batch, "fp32"): bar if batch == 1 else 1.0 for batch in BATCHES for name, bar in FP32.items()}
    if detect().dot_product("bfloat16") is not None:
        table |= {(name, 1, "bf16"): bar for name, bar in BF16.items()}
    table["llama-decode", 1, "bf16"] = 1.0  # bound by memory: half the bytes, with or without bfloat16 arithmetic
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--only", choices=sorted(FP32), action="append")
    parser.add_argument("--batch", type=int, choices=BATCHES, action="append")
    parser.add_argument("--precision", choices=("fp32", "bf16"), action="append")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, default=results())
    given = parser.parse_args()
    chosen = (given.only, given.batch, given.precision)
    known = {row.key for row in bench_models.read(given.json)["rows"]} if given.resume else set()
    table = rows()
    wanted = [
        Subject(*key)
        for key in table
        if key not in known and all(not some or part in some for part, some in zip(key, chosen, strict=True))
    ]
    bench_models.bench_models(wanted, rounds=given.rounds, json_path=given.json, bars=table)
    bench_models.print_rows(bench_models.read(given.json)["rows"], bench_models.PEERS)


if __name__ == "__main__":
    main()
