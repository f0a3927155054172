"""Training for 8 bits: gradients, steps, what convert gives against the model that was trained, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphwright
from graphwright.compiler.compression.learned_steps import HIGHEST, MIDDLE, ValueStep, WeightSteps
from graphwright.errors import InputError
from graphwright.hwdb import detect, lookup

VNNI = lookup("znver4")


def test_values_are_rounded_to_codes_and_weights_to_steps() -> None:
    step = ValueStep()
    x = torch.randn(4, 100)
    y = step(x)
    codes = y.detach() / step.step.detach() + int(step.zero)
    assert int(step.zero) == MIDDLE
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)
    assert codes.min() >= -1e-4
    assert codes.max() <= HIGHEST + 1e-4
    w = torch.randn(6, 5, 3, 3)
    weights = WeightSteps(w)
    codes = weights(w).detach() / weights.step.detach()
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)
    assert weights.step.shape == (6, 1, 1, 1)


def test_gradients_are_those_of_the_paper() -> None:
    """Equations 3 and 5, and the factor of section 2.2."""
    step = ValueStep()
    step.seen.fill_(True)
    step.zero.fill_(MIDDLE)
    step.step.data.fill_(0.1)
    x = torch.tensor([[0.234, -0.87, 50.0, -50.0]], requires_grad=True)
    step(x).backward(torch.ones(1, 4))
    assert x.grad.tolist() == [[1.0, 1.0, 0.0, 0.0]]
    inside = (2 - 2.34) + (-9 + 8.7)
    factor = (4 * (HIGHEST - MIDDLE)) ** -0.5
    assert float(step.step.grad) == pytest.approx(factor * (inside + HIGHEST - MIDDLE - MIDDLE), rel=1e-5)


def test_a_negative_value_that_comes_later_finds_codes() -> None:
    step = ValueStep()
    step(torch.rand(8, 8))
    assert int(step.zero) == 0
    step(torch.tensor([[-0.5, 0.5]]))
    assert int(step.zero) == MIDDLE
    assert step(torch.tensor([[-0.5]])).item() < 0
    step.eval()
    before = step.step.detach().clone()
    step(torch.tensor([[-50.0]]))
    assert torch.equal(step.step, before)


def test_a_layer_that_is_called_twice_may_move_its_step() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 16)

        def forward(self, x):
            return self.layer(self.layer(F.relu(x)))

    prepared = graphwright.prepare_qat(Twice())
    prepared(torch.randn(8, 16)).square().mean().backward()
    step = prepared.layer.value_step
    assert int(step.zero) == MIDDLE
    assert step.step.grad.isfinite()
    assert step.step.grad != 0


class Net(nn.Module):
    """Batch norms to fold, a residual, a branch that two products read, bounds of the model's own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(8, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.inner = nn.Sequential(
            nn.Conv2d(32, 32, 1), nn.BatchNorm2d(32), nn.ReLU6(), nn.Conv2d(32, 32, 3, padding=1)
        )
        self.left, self.right = nn.Linear(32, 48), nn.Linear(32, 48)
        self.last = nn.Linear(48, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x = F.relu(x + self.inner(x))
        x = F.max_pool2d(x, 2).flatten(2).transpose(1, 2)
        return self.last(self.left(x) * torch.sigmoid(self.right(x)))


def trained(steps: int = 6) -> nn.Module:
    torch.manual_seed(0)
    model = graphwright.prepare_qat(Net().train())
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(4, 8, 16, 16)
        (model(x) - x.mean()).square().mean().backward()
        optimizer.step()
    return model.eval()


def test_the_integers_are_those_that_were_trained() -> None:
    """Within one step of what the last layer reads, at its outputs, and equal but for values on the edge of a code."""
    model, x = trained(), torch.randn(4, 8, 16, 16)
    converted = graphwright.convert(model, x, target=VNNI)
    products = [c for c in converted.report().precisions if "conv2d" in c.operator or "linear" in c.operator]
    assert [c.dtype for c in products] == ["int8"] * len(products), converted.report().text()
    assert len(products) >= 5
    with torch.no_grad():
        want, got = model(x), converted(x)
    last = model.last
    step = float((last.value_step.step * last.weight_steps(last.weight).abs().sum(1).max()).detach())
    assert float((got - want).abs().max()) <= step
    assert float((got - want).norm() / want.norm()) < 1e-2


@pytest.mark.skipif(detect().vector_dot_product("int8") is None, reason="no dot product of bytes on this machine")
def test_machine_code_gives_what_was_trained() -> None:
    model, x = trained(), torch.randn(4, 8, 16, 16)
    converted = graphwright.convert(model, x)
    compiled = graphwright.compile(converted, x)
    with torch.no_grad():
        want, exact = model(x), converted(x)
    torch.testing.assert_close(compiled(x), exact, rtol=1e-4, atol=1e-5)  # the sigmoid is a polynomial
    last = model.last
    step = float((last.value_step.step * last.weight_steps(last.weight).abs().sum(1).max()).detach())
    assert float((compiled(x) - want).abs().max()) <= step


def test_pruned_weights_stay_zero_through_training_and_conversion() -> None:
    torch.manual_seed(0)
    pruned = graphwright.prune(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32)), "16x16", 0.5)
    model = graphwright.prepare_qat(pruned.train())
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    with graphwright.keep_zeros(model, optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(32, 64)).square().mean().backward()
            optimizer.step()
    converted = graphwright.convert(model, torch.randn(256, 64), target=VNNI)
    stored = [t for t in converted.buffers() if t.dtype == torch.int8]
    assert stored, converted.report().text()
    assert all(float((t == 0).float().mean()) >= 0.5 for t in stored)


def test_what_is_kept_stays_float32() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU6(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32)).eval()
    x = torch.randn(256, 64)
    prepared = graphwright.prepare_qat(model, [x], keep=["2"])
    assert type(prepared[2]) is nn.Linear
    converted = graphwright.convert(prepared, x, target=VNNI)
    found = [(c.dtype, c.reason) for c in converted.report().precisions if "linear" in c.operator]
    assert [dtype for dtype, _ in found] == ["int8", "float32", "int8"]
    assert "training did not round" in found[1][1]
    assert "steps as training learned them" in converted.report().text()


def test_the_model_itself_stays_and_the_copy_trains_in_its_mode() -> None:
    model = nn.Sequential(nn.Linear(8, 8)).train()
    before = copy.deepcopy(model.state_dict())
    prepared = graphwright.prepare_qat(model, [torch.randn(2, 8)])
    assert prepared.training
    assert prepared[0].value_step.training
    assert type(model[0]) is nn.Linear
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert set(prepared.state_dict()) >= {"0.value_step.step", "0.value_step.zero", "0.weight_steps.step"}


@pytest.mark.parametrize("padded", [False, True])
def test_an_encoder_layer_rounds_in_evaluation_too(padded: bool) -> None:
    """PyTorch's fused forward, and the packing of padded inputs for it, read weights without calling the layers."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    x = torch.randn(2, 5, 16)
    model = nn.TransformerEncoder(layer, 2).eval()
    given = (x, None, torch.arange(5).expand(2, 5) >= torch.tensor([[5], [3]])) if padded else (x,)
    prepared = graphwright.prepare_qat(model, [given])
    assert all(bool(m.seen) for m in prepared.modules() if isinstance(m, ValueStep))
    rounded = prepared(*given)  # gradients keep PyTorch from the fused forward
    with torch.no_grad():
        quiet = prepared(*given)
    # Attention of another order of sums moves a value to the next code now and then.
    assert (quiet - rounded)[:, :3].norm() < 0.3 * (model(*given) - rounded)[:, :3].norm()


def test_refusals() -> None:
    with pytest.raises(InputError, match="no layers to convert"):
        graphwright.convert(nn.Linear(4, 4), torch.randn(2, 4))
    with pytest.raises(InputError, match="has seen no input"):
        graphwright.convert(graphwright.prepare_qat(nn.Sequential(nn.Linear(4, 4))), torch.randn(2, 4))
    with pytest.raises(InputError, match=r"no nn.Linear or nn.Conv2d"):
        graphwright.prepare_qat(nn.Conv2d(8, 8, 3, groups=8))
    with pytest.raises(InputError, match="no layer is called 'frist'; did you mean 'first"):
        graphwright.prepare_qat(Net(), keep=["frist"])
    with pytest.raises(InputError, match="keep is a list"):
        graphwright.prepare_qat(Net(), keep="last")
    with pytest.raises(InputError, match=r"0.weight is torch.bfloat16.*call model.float\(\) first"):
        graphwright.prepare_qat(nn.Sequential(nn.Linear(4, 4)).bfloat16())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_calibration_that_is_not_finite_is_refused(bad: float) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    with pytest.raises(InputError, match="calibration: 0 reads infinities or NaN"):
        graphwright.prepare_qat(model, [torch.randn(2, 4), torch.full((2, 4), bad)])
    with torch.no_grad():
        model[0].bias.fill_(bad)
    with pytest.raises(InputError, match="calibration: 2 reads infinities or NaN"):
        graphwright.prepare_qat(model, [torch.ones(2, 4)])


def test_momentum_does_not_carry_a_step_away() -> None:
    """Unbounded, this optimizer leaves rows of weights a single code: 1 of 127."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
    x = torch.randn(64, 32)
    wanted = x @ torch.randn(32, 8) / 6.0
    prepared = graphwright.prepare_qat(model, [x])
    optimizer = torch.optim.SGD(prepared.parameters(), 0.1, momentum=0.95)
    for _ in range(60):
        optimizer.zero_grad()
        F.mse_loss(prepared(x), wanted).backward()
        optimizer.step()
    prepared.eval().requires_grad_(False)
    assert float(F.mse_loss(prepared(x), wanted)) < 0.25 * float(wanted.square().mean())
    for layer in (prepared[0], prepared[2]):
        codes = layer.weight_steps(layer.weight) / layer.weight_steps.step
        assert float(codes.abs().amax(1).min()) > 100.0  # of 127: none is so coarse that codes are left unused


def test_a_step_thrown_anywhere_comes_back() -> None:
    for thrown in (1e6, -3.0, 0.0, float("nan"), float("inf")):
        step, weight = ValueStep(), torch.randn(4, 6)
        x = torch.randn(8, 6)
        step(x)
        weights = WeightSteps(weight)
        for one in (step.step, weights.step):
            one.data.fill_(thrown)
        assert float((step(x) - x).abs().max()) <= float(x.abs().max())
        assert bool(step(x).any())
        assert bool(weights(weight).abs().amax(1).gt(0.0).all())
        assert step.bounds()[1] > 0.0


def test_values_that_are_not_finite_set_no_step() -> None:
    step = ValueStep()
    step(torch.full((2, 3), float("nan")))
    assert not bool(step.seen)
    given = torch.tensor([[1.0, float("inf"), float("nan"), -2.0]])
    made = step(given)
    assert float(step.step.detach()) == pytest.approx(2.0 / (HIGHEST - MIDDLE))
    assert bool(made[0, 2].isnan())
    step(torch.tensor([[1.0, -2.0]])).sum().backward()
    assert bool(step.step.grad.isfinite())
