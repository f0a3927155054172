"""Pruning: where the zeros lie, that the least important weights go, that training keeps them, and what is refused."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

import graphwright
from graphwright.compiler.compression import importance
from graphwright.compiler.compression.sparsity_patterns import PATTERNS, as_matrix, from_matrix
from graphwright.errors import InputError


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 48, 3, stride=2), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(48 * 9, 64), nn.ReLU(), nn.Linear(64, 10)),
    ).eval()


def images(count: int = 4) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(2, 3, 8, 8) for _ in range(count)]


def share(weight: torch.Tensor) -> float:
    return float((weight == 0).double().mean())


@pytest.mark.parametrize("how", ["magnitude", "wanda", "hessian"])
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
def test_so_many_of_neighbouring_inputs_are_kept(pattern: str, how: str) -> None:
    before = model()
    after = graphwright.prune(before, pattern, importance=how, calibration=images() if how != "magnitude" else None)
    kept, group = map(int, pattern.split(":"))
    for layer in (after[2], after[5], after[7]):
        counts = as_matrix(layer.weight).view(len(layer.weight), -1, group).ne(0).sum(2)
        assert counts.unique().tolist() == [kept]
    assert torch.equal(before[0].weight, after[0].weight)  # three input channels are no group
    assert share(before[2].weight) == 0.0  # the model itself stays


@pytest.mark.parametrize("how", ["magnitude", "wanda", "hessian"])
@pytest.mark.parametrize("pattern", ["1x16", "4x16", "16x16"])
def test_blocks_are_zero_or_kept_as_a_whole(pattern: str, how: str) -> None:
    given = images() if how != "magnitude" else None
    after = graphwright.prune(model(), pattern, 0.5, how, calibration=given, keep=["7"])
    inputs, outputs = map(int, pattern.split("x"))
    matrix = as_matrix(after[2].weight)
    blocks = matrix.view(-1, outputs, matrix.shape[1] // inputs, inputs).ne(0).sum((1, 3))
    assert set(blocks.unique().tolist()) == {0, inputs * outputs}
    assert share(after[2].weight) == pytest.approx(0.5, abs=0.02)
    assert share(after[7].weight) == 0.0


def test_a_last_block_may_have_fewer_outputs() -> None:
    after = graphwright.prune(nn.Linear(32, 20), "16x16", 0.5)
    assert after.weight.view(20, 2, 16).ne(0).any(2).sum().item() in (16 + 4, 32, 8)  # two of the four blocks


def test_the_smallest_go() -> None:
    layer = nn.Linear(4, 1, bias=False)
    layer.weight.data = torch.tensor([[0.1, -3.0, 2.0, 0.2]])
    assert graphwright.prune(layer, "2:4").weight.tolist() == [[0.0, -3.0, 2.0, 0.0]]
    # Inputs ten times as large make a small weight matter more: 0.2 * 100 > 3.
    data = [torch.tensor([[1.0, 1.0, 1.0, 100.0]])]
    assert graphwright.prune(layer, "1:4", importance="wanda", calibration=data).weight[0, 3] != 0.0


def test_a_global_budget_takes_from_whoever_needs_least() -> None:
    torch.manual_seed(0)
    even, uneven = nn.Linear(64, 64), nn.Linear(64, 64)
    uneven.weight.data[16:] *= 0.01  # all that matters is in a quarter of its blocks
    after = graphwright.prune(nn.Sequential(even, uneven), "16x16", 0.5, budget="global")
    assert share(after[1].weight) > 0.6 > 0.4 > share(after[0].weight)
    assert share(after[0].weight) + share(after[1].weight) == pytest.approx(1.0)


def test_layers_of_other_scales_are_treated_alike() -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    layers[1].weight.data = layers[0].weight.data * 1000
    after = graphwright.prune(layers, "16x16", 0.5, budget="global")
    assert share(after[0].weight) == pytest.approx(share(after[1].weight), abs=0.07)


@pytest.mark.parametrize("pattern", ["2:4", "4x16"])
def test_the_correction_errs_less_than_the_mask_alone(pattern: str) -> None:
    """At the outputs of the layer, on correlated inputs; against wanda, which keeps the weights as they are."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 32, bias=False)
    mixed = torch.randn(16, 64)
    data = [torch.randn(64, 16) @ mixed + 0.3 * torch.randn(64, 64) for _ in range(4)]
    exact = layer(torch.cat(data)).detach()
    errors = {}
    for how in ("wanda", "hessian"):
        pruned = graphwright.prune(layer, pattern, 0.5 if "x" in pattern else None, how, calibration=data)
        errors[how] = float((pruned(torch.cat(data)).detach() - exact).norm() / exact.norm())
    assert errors["hessian"] < 0.8 * errors["wanda"]


def test_the_correction_is_the_least_squares_solution() -> None:
    """Of one output, with the damping that H has, for the last of its inputs taken away."""
    torch.manual_seed(0)
    h = torch.randn(40, 6)
    h = h.T @ h / 40
    w = torch.randn(1, 6)
    mask = torch.tensor([[True] * 5 + [False]])
    # Inputs are taken in order: the first is the one the others make up for.
    flipped, rows = h.flip(0).flip(1), w.flip(1)
    got = importance.corrected(rows, mask.flip(1), importance.inverse_factor(flipped)).flip(1)
    damped = h.double() + importance.DAMPING * h.double().diagonal().mean() * torch.eye(6)
    want = w.double()[:, :5] + w.double()[:, 5:] @ torch.linalg.solve(damped[:5, :5], damped[:5, 5:]).T
    torch.testing.assert_close(got[:, :5].double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(8, 12, 3, stride=2, padding=1, dilation=2, groups=2, bias=False),
        nn.Conv1d(8, 12, 5, padding="same", padding_mode="circular", bias=False),
        nn.Linear(8, 12, bias=False),
    ],
)
def test_the_rows_of_inputs_are_what_weights_multiply(layer: nn.Module) -> None:
    x = {nn.Conv2d: torch.randn(2, 8, 9, 7), nn.Conv1d: torch.randn(2, 8, 9)}.get(type(layer), torch.randn(2, 8))
    rows = importance.inputs_of(layer, x)
    groups = rows.shape[0]
    weights = as_matrix(layer.weight).view(groups, -1, rows.shape[2])
    y = torch.einsum("grk,gok->rgo", rows, weights).flatten(1)
    want = layer(x).movedim(1, -1).reshape(-1, 12)
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(from_matrix(as_matrix(layer.weight), layer.weight), layer.weight)


def test_training_keeps_the_zeros_until_it_is_told_otherwise() -> None:
    pruned = graphwright.prune(model(), "2:4").train()
    optimizer = torch.optim.Adam(pruned.parameters(), 1e-2)  # whose momentum would move them

    def step() -> None:
        optimizer.zero_grad()
        pruned(torch.randn(2, 3, 8, 8)).square().sum().backward()
        optimizer.step()

    before = pruned[5].weight.detach().clone()
    with graphwright.keep_zeros(pruned, optimizer) as kept:
        assert kept.names == ("2.weight", "5.weight", "7.weight")
        step()
        step()
        assert torch.equal(pruned[5].weight == 0, before == 0)
        assert not torch.equal(pruned[5].weight, before)
    step()
    assert share(pruned[5].weight) < 0.3


def test_what_is_left_alone_is_said(caplog: pytest.LogCaptureFixture) -> None:
    tied = nn.Sequential(nn.Embedding(32, 16), nn.Linear(16, 32, bias=False), nn.Linear(32, 16))
    tied[1].weight = tied[0].weight
    with caplog.at_level(logging.INFO):
        after = graphwright.prune(tied, "2:4")
    assert share(after[1].weight) == 0.0
    assert share(after[2].weight) == 0.5
    assert "1 is not pruned: another module reads its weight too" in caplog.text

    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.first(x)

    for how in ("wanda", "hessian"):
        with caplog.at_level(logging.INFO):
            after = graphwright.prune(Partly(), "2:4", importance=how, calibration=[torch.randn(2, 16)])
        assert "second is not pruned: calibration never ran it" in caplog.text
        assert (share(after.first.weight), share(after.second.weight)) == (0.5, 0.0)
        caplog.clear()


REFUSED = [
    ({"pattern": "2-4"}, "pattern='2-4'; did you mean '2:4'"),
    ({"pattern": "16x16", "sparsity": 1.0}, "sparsity=1.0: the share of blocks"),
    ({"pattern": "16x16", "sparsity": 75}, "between 0 and 1"),
    ({"pattern": "16x16", "sparsity": True}, "between 0 and 1"),
    ({"sparsity": 0.75}, "'2:4' makes 0.5 of the weights zero"),
    ({"importance": "wander"}, "did you mean 'wanda'"),
    ({"budget": "local"}, "there are 'per_layer', 'global'"),
    ({"budget": "global"}, "take a pattern of blocks"),
    ({"importance": "wanda"}, "pass calibration=[inputs, ...]"),
    ({"importance": "hessian", "calibration": []}, "calibration is empty"),
    ({"keep": "2"}, "keep is a list"),
    ({"keep": ["head*"]}, "no layer is called 'head*'"),
    ({"keep": ["*"]}, "no layer can be pruned to '2:4': 0: keep names it"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[str(o) for o, _ in REFUSED])
def test_refusals(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as error:
        graphwright.prune(model(), **options)
    assert message in str(error.value)


def test_nothing_to_prune_or_to_keep() -> None:
    with pytest.raises(InputError, match=r"no nn.Linear"):
        graphwright.prune(nn.ReLU())
    with pytest.raises(InputError, match=r"its 3 inputs are no multiple of 4"):
        graphwright.prune(nn.Linear(3, 8))
    dense = model()
    with pytest.raises(InputError, match="prune the model first"):
        graphwright.keep_zeros(dense, torch.optim.SGD(dense.parameters(), 0.1))
    with pytest.raises(InputError, match="trains none of the weights with zeros"):
        graphwright.keep_zeros(graphwright.prune(dense), torch.optim.SGD(dense.parameters(), 0.1))


class Keyword(nn.Module):
    """Calls its layer by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(input=x)


def test_layers_called_by_keyword_are_calibrated_and_bad_inputs_have_a_number() -> None:
    x = torch.randn(4, 16)
    pruned = graphwright.prune(Keyword(), importance="wanda", calibration=[x])
    assert share(pruned.layer.weight) == 0.5
    assert bool(graphwright.prepare_qat(Keyword(), [x]).layer.value_step.seen)
    with pytest.raises(InputError, match="calibration set 1: the model does not run on it: "):
        graphwright.prune(Keyword(), importance="wanda", calibration=[x, torch.randn(4, 5)])


@pytest.mark.parametrize("importance", ["wanda", "hessian"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_calibration_that_is_not_finite_is_refused(importance: str, bad: float) -> None:
    layer = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(InputError, match="calibration: 0 reads infinities or NaN"):
        graphwright.prune(layer, "2:4", importance=importance, calibration=[torch.full((2, 8), bad)])


def test_groups_and_parametrizations() -> None:
    grouped = nn.Conv2d(32, 24, 1, groups=2)
    with pytest.raises(InputError, match="groups of 12 outputs"):
        graphwright.prune(grouped, "16x16")
    pruned = graphwright.prune(grouped, "2:4", importance="hessian", calibration=[torch.randn(2, 32, 4, 4)])
    assert share(pruned.weight) == 0.5
    with pytest.raises(InputError, match="computed by a parametrization"):
        graphwright.prune(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)))


def test_every_pattern_is_described() -> None:
    assert graphwright.prune.__doc__ is not None
    for name in PATTERNS:
        assert f'"{name}"' in graphwright.prune.__doc__


def test_a_single_zero_is_kept_too() -> None:
    layers = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    with torch.no_grad():
        layers[0].weight[3, 5] = 0.0
        layers[1].weight.zero_()  # as a whole: a layer that begins so, and is trained
    optimizer = torch.optim.SGD(layers.parameters(), 0.1, momentum=0.9)
    with graphwright.keep_zeros(layers, optimizer) as kept:
        assert kept.names == ("0.weight",)
        for _ in range(3):
            optimizer.zero_grad()
            (layers(torch.randn(4, 16)) - 1.0).square().mean().backward()
            optimizer.step()
    assert int((layers[0].weight == 0).sum()) == 1
    assert float(layers[0].weight[3, 5].detach()) == 0.0
    assert bool(layers[1].weight.any())
