"""Whether an attention's two products are computed in bytes on a machine, and why not.

Predicted by the plans of both kernels (backends/kernels/attention_plan.py): products of bytes against rounding and
packing q, k and v, which few queries, or short rows, do not pay for.

Refused: machines without products of unsigned and signed bytes (`vpdpbusd`; others have not been measured), what no
kernel computes, sums that 32 bits do not hold, and what gains nothing.
"""

from __future__ import annotations

from torch import fx

from ...hwdb import Hardware
from ...passes.assign_precision import Choice
from ...passes.dialect_attention import IN_BYTES
from ...passes.precision.int8_forms import GAIN, Int8Form

ATTENTION = "int8 attention"  # its Choice.form


def is_attention(node: fx.Node) -> bool:
    """Whether the node is an attention that has a form in bytes."""
    return node.op == "call_function" and node.target in IN_BYTES


def attention_form(node: fx.Node, hw: Hardware) -> Int8Form:
    """What products of bytes are for one attention of the dialect, in predicted seconds."""
    from ...backends.kernels.attention_plan import predicted_seconds
    from ...backends.lowering.kernels_attention import described_in_bytes
    from ...backends.lowering.registry import Refusal

    if hw.isa != "x86_64" or hw.vector_dot_product("int8") != "vnni":
        return Int8Form(False, f"{hw.id} has no products of unsigned and signed bytes that attention was measured with")
    found = described_in_bytes(node)
    if isinstance(found, Refusal):
        return Int8Form(False, f"no kernel in bytes: {found.reason}")
    wide, narrow = (predicted_seconds(hw, found.plan(hw, in_bytes)) for in_bytes in (False, True))
    if wide is None or narrow is None:
        return Int8Form(False, f"the clock of {hw.id} is unknown, and so whether bytes are faster")
    if narrow > GAIN * wide:
        reason = f"gains nothing: rounding and packing q, k and v and 8 bits take {narrow / wide:.2f} of float32"
        return Int8Form(True, reason, wide, narrow, ATTENTION)
    reason = "dot products of bytes (vnni), exact sums; q and k by a scale for each row, v for each channel of a head"
    return Int8Form(True, reason, wide, narrow, ATTENTION)


def attention_choice(node: fx.Node, form: Int8Form, kept: str | None, named: bool) -> Choice:
    """In bytes where that pays, unless `kept` says why not, or it is not among those `named` before."""
    operator = str(node.target).removesuffix(".default")
    if kept is None and form.pays and named:
        return Choice(node.name, operator, "int8", form.reason, form=form.name)
    reason = form.reason if not form.pays else "it was decided so when the model was compiled"
    return Choice(node.name, operator, "float32", kept or reason)
