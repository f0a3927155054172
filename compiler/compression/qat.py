"""Training for 8 bits: `prepare_qat` rounds what products read while a model is trained, `convert` gives the integers.

    model = prepare_qat(model)                  linear(x, w) -> linear(round(x), round(w)), steps learned
    ... any training loop ...
    quantised = convert(model, x)               the very codes in 8 bits, by the passes that `quantize` uses

What training found goes through the passes in plain operators: a layer becomes linear(clamp(x, low, high), w), w a
whole number of steps. A clamp's bounds are the ends of 256 codes (passes/precision/learned_codes.py), and weights that
lie on a grid keep it (passes/precision/weight_grid.py), through folded batch norms and merged products too.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import InputError
from ...hwdb import Target, compile_target
from ..build import default_passes
from ..calibration import finite_inputs, run_in_evaluation
from ..capture import arguments, capture, export
from ..functions import parameters_of
from ..precision import Precision
from ..report import Report
from ..rewriting import rewrite
from .int8_method import LEARNED, Method
from .learned_steps import ValueStep, WeightSteps
from .modules import check_keep, check_module, is_prepared
from .quantize import Quantized

log = logging.getLogger(__name__)


class QatLinear(nn.Linear):
    """A linear layer that computes with rounded inputs and weights."""

    value_step: ValueStep
    weight_steps: WeightSteps

    def forward(self, input: Tensor) -> Tensor:
        """The layer's result."""
        return F.linear(self.value_step(input), self.weight_steps(self.weight), self.bias)


class QatConv2d(nn.Conv2d):
    """A convolution that computes with rounded inputs and weights."""

    value_step: ValueStep
    weight_steps: WeightSteps

    def forward(self, input: Tensor) -> Tensor:
        """The layer's result."""
        result: Tensor = self._conv_forward(self.value_step(input), self.weight_steps(self.weight), self.bias)
        return result


class _BoundedLinear(nn.Linear):
    bounds: tuple[float, float]

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input.clamp(*self.bounds), self.weight, self.bias)


class _BoundedConv2d(nn.Conv2d):
    bounds: tuple[float, float]

    def forward(self, input: Tensor) -> Tensor:
        result: Tensor = self._conv_forward(input.clamp(*self.bounds), self.weight, self.bias)
        return result


_QAT: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: QatLinear, nn.Conv2d: QatConv2d}
_BOUNDED: dict[type[nn.Module], type[nn.Module]] = {QatLinear: _BoundedLinear, QatConv2d: _BoundedConv2d}


def prepare_qat(model: nn.Module, calibration: Iterable[Any] = (), *, keep: Sequence[str] = ()) -> nn.Module:
    """A copy of `model` whose linear layers and 2d convolutions round inputs and weights to 8 bits, to be trained.

    Steps are parameters, learned with the others (LSQ, Esser et al., 2020); gradients pass the rounding unchanged. A
    layer's first input sets its step: one of `calibration`, else the first one it is trained on.

    calibration: inputs, each as example_inputs of compile; run once, in evaluation mode.
    keep: names of modules that stay as they are; * and ? as in a shell.

    Encoder layers of transformers compute step by step: PyTorch's fused one for evaluation would skip the rounding.

    Raises InputError where no layer is left, `keep` names none, weights are in half precision, calibration brings a
    layer infinities or NaN, or the model is prepared already.
    """
    check_module(model, "prepare_qat", "train")
    if is_prepared(model):
        raise InputError(
            "prepare_qat: the model is prepared already: train it, then graphwright.convert(model, example_inputs), or "
            "prepare the model that it was made of"
        )
    prepared = copy.deepcopy(model)
    candidates = {name: m for name, m in prepared.named_modules() if type(m) in _QAT}
    check_keep(keep, "stay float32", candidates)
    chosen = {}
    for name, module in candidates.items():
        groups = getattr(module, "groups", 1)
        if any(fnmatchcase(name, one) for one in keep):
            continue
        if groups != 1:
            log.info("%s stays as it is: %d groups of channels have no product of bytes", name, groups)
            continue
        chosen[name] = module
    if not chosen:
        raise InputError(f"{type(model).__name__} has no nn.Linear or nn.Conv2d without groups to train for 8 bits")
    for name, module in chosen.items():
        if module.weight.dtype in (torch.bfloat16, torch.float16):
            raise InputError(
                f"{name}.weight is {module.weight.dtype}, which holds no products of 8-bit codes: call model.float() "
                "first, or name the module in keep"
            )
        module.__class__ = _QAT[type(module)]
        module.value_step, module.weight_steps = ValueStep(), WeightSteps(module.weight)
        module.train(module.training)
    _stay_unfused(prepared, set(chosen.values()))
    hooks = [layer.register_forward_pre_hook(finite_inputs(name), with_kwargs=True) for name, layer in chosen.items()]
    try:
        run_in_evaluation(prepared, calibration)
    finally:
        for hook in hooks:
            hook.remove()
    return prepared


def _stay_unfused(model: nn.Module, chosen: set[nn.Module]) -> None:
    """Turn off what reads the weights of `chosen` without calling them: nn.TransformerEncoderLayer's fused forward.

    It asks for this attribute of its layer, and nn.TransformerEncoder for the other before it packs padded inputs for
    fused layers (torch/nn/modules/transformer.py); nothing else reads them.
    """
    for module in model.modules():
        if chosen.isdisjoint(module.modules()):
            continue
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


def convert(model: nn.Module, example_inputs: Any, *, target: Target = "native") -> Quantized:
    """What `prepare_qat` made and training changed, in 8 bits: exact integers in PyTorch, and compiled like any model.

    example_inputs: as of `graphwright.compile`; the result is for these shapes.
    Results differ from those of the trained model in evaluation by float32's rounding, which moves a value to the next
    code now and then, where every prepared layer gains by 8 bits on `target`; the report names those that do not, whose
    inputs are clipped and not rounded. Bounds of the model's own (ReLU6) in front of a layer that are narrower than
    what was learned become the ends of its codes.

    Raises InputError for a model without prepared layers, or whose layers have seen no input; CaptureError for one that
    cannot be traced.
    """
    started = time.perf_counter()
    check_module(model, "convert", "prepare and train")
    hw = compile_target(target)
    plain = _bounded(model)
    program = export(plain, *arguments(example_inputs))
    captured = capture(program, parameters_of(plain))
    made = rewrite(captured.graph, hw, default_passes(hw), Precision("int8", method=Method(activation=LEARNED)))
    report = Report(
        *(hw.id, "int8", torch.get_num_threads(), made.runs),
        precisions=made.precisions,
        notes=made.notes,
        compile_seconds=time.perf_counter() - started,
    )
    made.graph.recompile()
    return Quantized(made.graph, captured.signature, report)


def _bounded(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode, each prepared layer a plain one behind a clamp, its weights rounded."""
    plain = copy.deepcopy(model).eval()
    layers = {name: m for name, m in plain.named_modules() if type(m) in _BOUNDED}
    if not layers:
        raise InputError(f"{type(model).__name__} has no layers to convert: train what graphwright.prepare_qat returns")
    for name, layer in layers.items():
        steps, weights = layer.value_step, layer.weight_steps
        assert isinstance(steps, ValueStep)
        assert isinstance(weights, WeightSteps)
        if not bool(steps.seen):
            raise InputError(f"{name} has seen no input: train the model, or give prepare_qat inputs to calibrate with")
        with torch.no_grad():
            layer.weight = nn.Parameter(weights(layer.weight))
        layer.bounds = steps.bounds()
        del layer.value_step, layer.weight_steps
        layer.__class__ = _BOUNDED[type(layer)]
    return plain
