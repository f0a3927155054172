"""How a model is quantised, as users ask for it: the options of `graphwright.quantize`, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ...errors import InputError, suggest
from ...passes.precision.int4_groups import GROUPS
from .ranges import METHODS

SCHEMES = ("affine", "symmetric")
LEARNED = "learned"  # ranges that training found: `convert` alone asks for it
DYNAMIC = "dynamic"  # found at run time for each row (token) of a linear layer's input, each image of a convolution's
WEIGHTS = ("per_channel", "per_tensor")
WEIGHTS_ONLY = ("int8", "int4")  # of products that wait for their weights
SWITCH = {"true": True, "false": False}
MIGRATIONS = ("none", "smooth", "equalise", "auto")  # of large channels into the weights: migrate.py


@dataclass(frozen=True)
class Method:
    """The scheme of activations, the granularity of weights, how ranges are found, what stays float32, what is scaled.

    `keep` holds patterns (as of a shell: *, ?) of names: of a product's node, or of its weights in the model.
    """

    scheme: str = "affine"
    weight: str = "per_channel"
    activation: str = "mse"
    keep: tuple[str, ...] = ()
    migration: str = "none"
    weights_only: str = "int8"
    group: int = 32  # inputs that share a scale of 4-bit weights
    attention: bool = False  # whether its two products may be of bytes

    @property
    def dynamic(self) -> bool:
        """Whether linear layers and convolutions find the ranges of their inputs at run time."""
        return self.activation == DYNAMIC

    @property
    def ranges(self) -> str:
        """How ranges are found on calibration inputs: of METHODS."""
        return "mse" if self.dynamic else self.activation

    @property
    def calibrates(self) -> bool:
        """Whether nothing can be decided without calibration inputs."""
        return not self.dynamic or self.migration in ("smooth", "auto")


DEFAULT = Method()


def int8_method(precision: str, options: Mapping[str, Any] | None) -> Method:
    """The Method of compile(int8={...}). Raises InputError for options there are not, or that nothing reads."""
    if options is None:
        return DEFAULT
    if precision != "int8":
        raise InputError(f"int8= says how to quantise, and precision={precision!r} does not: pass precision='int8'")
    defaults = {field.name: field.default for field in fields(Method)}
    there = tuple(defaults)
    if not isinstance(options, Mapping) or (unknown := sorted(set(map(str, options)) - set(there))):
        wrong = "" if not isinstance(options, Mapping) else f"; {unknown[0]!r}{suggest(unknown[0], there)} is none"
        raise InputError(f"int8= is a mapping of the options {', '.join(there)}{wrong}")
    return method_of(**{**defaults, **options})


def options_of(texts: Sequence[str]) -> dict[str, Any]:
    """The options of compile(int8={...}) that are written NAME=VALUE; keep may come several times.

    Raises InputError for what is not written so; values are looked at by `int8_method`.
    """
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"--int8 {text}: write NAME=VALUE, as in --int8 activation=kl --int8 'keep=*head*'")
        if name == "keep":
            found.setdefault(name, []).append(value)
        else:
            found[name] = int(value) if value.isdecimal() else SWITCH.get(value, value)
    return found


def method_of(
    scheme: Any,
    weight: Any,
    activation: Any,
    keep: Any,
    migration: Any,
    weights_only: Any,
    group: Any,
    attention: Any = False,
) -> Method:
    """The options as a Method. Raises InputError for a value that there is not, saying what there is."""
    if not isinstance(attention, bool):
        raise InputError(f"attention={attention!r}: it has to be True or False")
    if not isinstance(group, int) or isinstance(group, bool):
        raise InputError(f"group={group!r}: it has to be an int, one of {', '.join(map(str, GROUPS))}")
    for option, value, allowed in (
        ("scheme", scheme, SCHEMES),
        ("weight", weight, WEIGHTS),
        ("activation", activation, (*METHODS, DYNAMIC)),
        ("migration", migration, MIGRATIONS),
        ("weights_only", weights_only, WEIGHTS_ONLY),
        ("group", group, GROUPS),
    ):
        if not isinstance(value, (str, int)) or value not in allowed:
            there = ", ".join(repr(a) for a in allowed)
            near = suggest(str(value), [str(a) for a in allowed])
            raise InputError(f"{option}={value!r}{near}: there are {there}")
    if isinstance(keep, str) or not isinstance(keep, Sequence) or not all(isinstance(k, str) for k in keep):
        raise InputError(f"keep is a list of names or patterns of products that stay float32, got {keep!r}")
    return Method(scheme, weight, activation, tuple(keep), migration, weights_only, group, attention)
