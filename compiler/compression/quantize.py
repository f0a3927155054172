"""`graphwright.quantize`: a model -> the same with products in 8 bits, still a PyTorch module."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from ...errors import InputError
from ...hwdb import Target, compile_target
from .. import calibration, compare
from ..build import default_passes
from ..calls import tensor_leaves
from ..capture import Model, Signature, TensorSpec, capture, export
from ..functions import parameters_of
from ..precision import Precision, check_error_bound
from ..report import Report
from ..rewriting import rewrite
from .int8_method import method_of


class Quantized(torch.nn.Module):
    """A quantised model: runs in PyTorch by exact integers, and compiles like any other (`graphwright.compile`)."""

    def __init__(self, graph: fx.GraphModule, signature: Signature, report: Report) -> None:
        super().__init__()
        self.integers = graph
        self._signature = signature
        self._report = report

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's results for arguments of the shapes it was quantised with. Raises InputError for others."""
        given = tensor_leaves(self._signature, args, kwargs, "quantised")
        for tensor, known in zip(given, self._signature.tensors, strict=True):
            if not isinstance(tensor, torch.Tensor):
                raise InputError(f"{known.name}: expected a tensor, got {type(tensor).__name__}")
            if tuple(tensor.shape) != tuple(known.shape) or tensor.dtype != known.dtype:
                raise InputError(
                    f"{known.name} is {tensor.dtype} of shape {tuple(tensor.shape)}, and the model was quantised for "
                    f"{known.dtype} of shape {tuple(known.shape)}"
                )
        results = iter(self.integers(*given))
        outputs = [next(results) if isinstance(o, TensorSpec) else o.value for o in self._signature.outputs]
        return pytree.tree_unflatten(outputs, self._signature.out_spec)

    def report(self) -> Report:
        """What is in 8 bits, what is not and why, and the damage to each product."""
        return self._report


def quantize(
    model: Model,
    calibration_data: Iterable[Any] | Mapping[str, Any],
    *,
    scheme: str = "affine",
    weight: str = "per_channel",
    activation: str = "mse",
    keep: Sequence[str] = (),
    migration: str = "none",
    weights_only: str = "int8",
    group: int = 32,
    attention: bool = False,
    tolerance: float | None = None,
    target: Target = "native",
) -> Quantized:
    """Put the products of a model into 8 bits where `target` gains by it, with ranges found on `calibration_data`.

    model: as in `graphwright.compile`.
    calibration_data: an iterable of inputs, read once, each as example_inputs of compile, all of the first one's
        shapes: a few dozen to a few hundred that look like those the model will get. The error is measured on the first
        eight. Or a mapping from input names to tensors with a leading axis of samples, as compile takes.
    scheme: "affine" values with a zero point; "symmetric": zero in the middle of values of both signs.
    weight: a scale "per_channel" of the output, or "per_tensor".
    activation: how ranges are found: "mse", "kl", "percentile", "minmax", or "dynamic": a scale for each row of a
        linear layer's input and each image of a convolution's, at run time, and "mse" for depthwise ones
        (docs/compression.md).
    keep: names of products, or of their weights, that stay float32; * and ? as in a shell.
    migration: channels that are much larger than others, scaled down into the weights that read them: "smooth" by
        calibrated maxima (for transformers), "equalise" by weights alone, "auto" whichever lowers the measured damage.
    weights_only: what linear layers whose few rows wait for weights store those in: "int8", or "int4" with a scale for
        each `group` (32, 64 or 128) inputs of an output.
    attention: whether the two products of attention are of bytes too, where that is predicted to pay: q and k rounded
        row by row, v by the channels of a head, weights of keys to 255 steps (docs/compression.md).
    tolerance: the relative L2 error at the outputs against float64 that is allowed, 1e-1 unless given; what costs the
        most goes back to float32 until it is kept.

    Raises InputError for options and data that do not fit, CaptureError for a model that cannot be traced.
    """
    started = time.perf_counter()
    method = method_of(scheme, weight, activation, keep, migration, weights_only, group, attention)
    hw = compile_target(target)
    check_error_bound(tolerance)
    data = calibration.listed({} if calibration_data is None else calibration_data)
    calibration.check_options("int8", None, data, True)
    with calibration.naming_float64(data):
        program = export(model, *calibration.first_arguments(model, data))
        captured = capture(program, parameters_of(model) if isinstance(model, torch.nn.Module) else ())
        inputs = calibration.inputs_of(None, data, captured.signature)
        measured = () if compare.is_random(captured.graph) else inputs.calibration[: calibration.MEASURED]
        samples = calibration.with_references(captured, measured)
    precision = Precision("int8", tolerance, samples, observed=inputs.calibration, method=method)
    made = rewrite(captured.graph, hw, default_passes(hw), precision)
    report = Report(
        *(hw.id, "int8", torch.get_num_threads(), made.runs),
        precisions=made.precisions,
        notes=made.notes,
        compile_seconds=time.perf_counter() - started,
    )
    made.graph.recompile()
    return Quantized(made.graph, captured.signature, report)
