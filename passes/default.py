"""The passes `compile` runs, in order, and the families of fusions that `compile(kernel_fusion=[...])` names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import fx

from ..hwdb import Hardware
from .assign_layout import assign_layout
from .canonicalise import canonicalise
from .flatten_conv3d import flatten_conv3d
from .fold_batch_norm import fold_batch_norm
from .fold_constants import fold_constants
from .fold_scale import fold_scale
from .fuse_attention import fuse_attention
from .fuse_conv_activation import fuse_conv_activation
from .fuse_conv_depthwise import fuse_conv_depthwise
from .fuse_conv_transpose import fuse_conv_transpose
from .fuse_head_moves import fuse_head_moves
from .fuse_matmul_bias import fuse_matmul_bias
from .fuse_reshape_transpose import fuse_reshape_transpose
from .gather_rows import gather_rows
from .give_bytes import give_bytes
from .hoist_quantise import hoist_quantise
from .join_slices import join_slices
from .merge_duplicates import merge_duplicates
from .merge_pads import merge_pads
from .merge_products import merge_products
from .read_planar_images import read_planar_images
from .recognise_activations import recognise_activations
from .recognise_attention import recognise_attention
from .recognise_channel_moves import recognise_channel_moves
from .recognise_norms import recognise_norms
from .recognise_quantised import recognise_quantised
from .remove_dead import remove_dead
from .route_channels import route_channels
from .simplify import simplify
from .sink_moves import sink_moves
from .sink_row_moves import sink_row_moves
from .skip_gated_rows import skip_gated_rows
from .skip_zero_blocks import skip_zero_blocks
from .split_batch_norm import split_batch_norm

Pass = Callable[[fx.GraphModule, Hardware], int]

PASSES: tuple[Pass, ...] = (
    canonicalise,  # first: the others know one spelling of each operation
    remove_dead,  # before every pattern: a dropout or a copy in the middle of one hides it
    merge_duplicates,  # before fold_constants: what is computed from one weight twice is stored once
    fold_constants,  # before fold_batch_norm: weights may be computed from parameters
    simplify,  # after fold_constants: masks that are True everywhere, factors that are 1; before every pattern
    fold_batch_norm,
    fold_scale,  # after fold_constants, like fold_batch_norm; before the fusions, which it lets reach what follows
    split_batch_norm,  # after fold_batch_norm: what is left has no product to go into
    flatten_conv3d,  # after fold_batch_norm, which looks for the convolution itself
    recognise_activations,  # before the fusions, which take up single operators
    recognise_norms,  # likewise; a layout is assigned to the operator, not to its parts
    recognise_attention,  # before fuse_attention, which simplifies masks; before fuse_matmul_bias takes its products
    fuse_attention,  # before fuse_reshape_transpose, which would merge the repeats of grouped heads
    merge_products,  # after fuse_attention, whose operands read slices; before the fusions, which change readers
    merge_pads,  # before fuse_conv_activation, which takes up a padding, even or not
    fuse_conv_activation,  # after fold_batch_norm: a batch norm in between stops it
    fuse_conv_transpose,  # likewise
    fuse_matmul_bias,  # before fuse_reshape_transpose: it takes up transposes and lifts reshapes
    join_slices,  # before fuse_reshape_transpose: what it makes is a move like others
    recognise_channel_moves,  # before assign_layout, which knows images of rank 4
    assign_layout,  # after fuse_conv_activation: what is fused needs no permutes of its own
    route_channels,  # after assign_layout: channels are the last dim; before fuse_conv_depthwise, which hides products
    fuse_conv_depthwise,  # after assign_layout, and before its permutes are merged: it takes up the one at the input
    fuse_reshape_transpose,  # after assign_layout and the fusions, whose moves meet the model's own
    remove_dead,  # before fuse_matmul_bias: a move that layouts left unread counts as a reader of the product
    read_planar_images,  # after assign_layout, and fuse_conv_depthwise, which does it for pairs
    sink_moves,  # after fuse_reshape_transpose: equal moves are spelt alike; what meets is merged in the next round
    gather_rows,  # after fuse_reshape_transpose, which has a form for chains without wrap-around
    fuse_matmul_bias,  # again: operands that became plain transposes, values whose reshapes are gone
    sink_row_moves,  # before fuse_head_moves, which takes up what reaches attention
    fuse_head_moves,  # after fuse_reshape_transpose: one permute an operand; what is left over, merge_duplicates merges
    recognise_quantised,  # after the fusions and the layouts: what is an integer takes up nothing any more
    hoist_quantise,  # after recognise_quantised, whose products read what is rounded; before give_bytes
    give_bytes,
    merge_duplicates,  # again: moves of one head, or roundings, may have become equal
    fold_constants,  # again: fusions transpose weights and flatten biases by operators on constants
    skip_gated_rows,  # behind the fusions, whose epilogues it takes up; before skip_zero_blocks, which hides products
    skip_zero_blocks,  # behind the fusions, which know the products it hides, and the folding of weights it looks at
    remove_dead,  # last: constants that nobody reads must not reach the artifact
)

# Left out for GPUs, where loops are tensor expressions that TVM's rules schedule (backends/gpu).
_FOR_CPUS: Mapping[Pass, str] = {
    route_channels: "it serves kernels for CPUs that read channels by runs",
    read_planar_images: "a permute is a kernel of its own there",
    fuse_conv_depthwise: "its operator has a kernel for CPUs and no definition",
    skip_gated_rows: "its operators have kernels for CPUs alone",
    skip_zero_blocks: "its operator has a kernel for CPUs, and multiplies the zeros elsewhere",
    sink_row_moves: "operands gathered by rows are no product that a rule would recognise",
    fuse_head_moves: "likewise: attention with strides has one thread an element",
}


def passes_for(hw: Hardware) -> tuple[Pass, ...]:
    """The passes that `compile` runs for a machine, in their order."""
    return PASSES if hw.kind != "gpu" else tuple(rewrite for rewrite in PASSES if rewrite not in _FOR_CPUS)


@dataclass(frozen=True)
class Family:
    """Fusions that are chosen together: passes left out without them, or what passes ask `families.fuses` about."""

    meaning: str
    passes: tuple[Pass, ...] = ()


# Passes that bring the operators of a model to those that have kernels belong to no family: they always run.
FAMILIES: Mapping[str, Family] = {
    "conv+bn": Family("stored statistics of batch norms into the weights in front of them", (fold_batch_norm,)),
    "conv+pad": Family("zeros around an image into the convolution"),
    "conv+bias": Family("one number a channel, added behind a convolution"),
    "conv+add": Family("an image added behind a convolution: a residual"),
    "conv+relu": Family("an activation behind a convolution, of whatever kind the dialect has"),
    "conv+depthwise": Family("a convolution and the depthwise one behind it as one kernel", (fuse_conv_depthwise,)),
    "matmul+transpose": Family("transposes of operands into the product"),
    "matmul+bias": Family("one number a column, added behind a product"),
    "matmul+add": Family("a matrix added behind a product: a residual"),
    "matmul+relu": Family("an activation behind a product, of whatever kind the dialect has"),
    "scale": Family("constant factors of channels into the weights in front of them", (fold_scale,)),
    "activation": Family("activations that are written out, as one operator", (recognise_activations,)),
    "norm": Family("layer and RMS norms that are written out, as one operator", (recognise_norms,)),
    "attention": Family("attention that is written out, as one operator", (recognise_attention,)),
    "qkv": Family("products of one input, as one product of all their weights", (merge_products,)),
    "sparsity": Family(
        "products that skip blocks of zeros in their weights, or rows that a gate emptied",
        (skip_gated_rows, skip_zero_blocks),
    ),
    "layout": Family("images in NHWC where that costs less", (assign_layout,)),
    "moves": Family(
        "chains of reshapes, transposes and rolls merged, dropped, or done by what reads them",
        (
            *(join_slices, recognise_channel_moves, route_channels, fuse_reshape_transpose, read_planar_images),
            *(sink_moves, gather_rows, sink_row_moves, fuse_head_moves),
        ),
    ),
}
