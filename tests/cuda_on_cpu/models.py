"""Small models that together reach every rule of backends/gpu/schedule.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """A transformer block: layer norm, attention in heads, a residual, a feed-forward part."""

    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, width] to the same."""
        batch, tokens, width = x.shape
        shape = (batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = self.qkv(self.norm(x)).reshape(shape).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(batch, tokens, width)
        x = x + self.out(mixed)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Several(nn.Module):
    """Operators that rows, loops in an order of their own and reductions with NaN are made of; two results."""

    def forward(self, x: Tensor, index: Tensor) -> dict[str, Tensor]:
        """x [rows, columns], index of rows."""
        ordered = torch.sort(x, dim=-1).values
        gathered = x[index] * torch.softmax(x, -1)[index]
        return {"sums": ordered.cumsum(-1) + gathered.amax(-1, keepdim=True), "means": x.mean(0), "same": x}


def build(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The model in eval mode and its inputs; names that are not here are those of graphwright's zoo, shrunk."""
    torch.manual_seed(0)
    if name == "block":
        return Block().eval(), (torch.randn(2, 24, 64),)
    if name == "several":
        return Several().eval(), (torch.randn(5, 70), torch.tensor([4, 0, 3, 3, 1]))
    from graphwright.compiler.benchmarking import zoo

    return zoo.build(name, small=True)
