"""A feed-forward block (768 to 3072 and back, GELU) that leaves out empty tokens, against the same without a gate.

    python benchmarks/gating.py --json docs/measurements/gating.json

Medians of interleaved calls; both compiled here, float32, random weights. Empty tokens lie at random places.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import graphwright

ROUNDS = 60
WIDTH, HIDDEN = 768, 3072


class Block(nn.Module):
    """The block; without a share there is no gate."""

    def __init__(self, share: float | None) -> None:
        super().__init__()
        self.up, self.down, self.share = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH), share

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The block of [batch, tokens, WIDTH]."""
        kept = x if self.share is None else graphwright.gate(x, 1.0, share=self.share)
        return self.down(nn.functional.gelu(self.up(kept)))


def row(tokens: int, share: float) -> dict[str, Any]:
    """Milliseconds of both for `share` of the tokens empty."""
    x = torch.randn(1, tokens, WIDTH)
    x[:, torch.randperm(tokens)[: int(tokens * share)]] *= 0.01
    gated, dense = Block(max(share, 0.5)).eval(), Block(None).eval()
    dense.load_state_dict(gated.state_dict())
    models = {"dense": graphwright.compile(dense, (x,)), "gated": graphwright.compile(gated, (x,))}
    left_out = [k for k in models["gated"].report().kernels if "rows that are left" in k.algorithm]
    assert len(left_out) == 2, models["gated"].report().text()
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(ROUNDS):
        for name, model in models.items():
            started = time.perf_counter()
            model(x)
            seconds[name].append(time.perf_counter() - started)
    found = {name: 1e3 * statistics.median(values) for name, values in seconds.items()}
    return {"tokens": tokens, "empty": share, "milliseconds": found, "threads": torch.get_num_threads()}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where rows are written")
    options = parser.parse_args()
    torch.manual_seed(0)
    made = [row(tokens, share) for tokens in (128, 512) for share in (0.0, 0.5, 0.9)]
    for one in made:
        print(one)
    if options.json is not None:
        options.json.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
