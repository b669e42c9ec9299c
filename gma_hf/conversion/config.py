# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The options of a conversion. They are checked when a model is converted, and when a saved folder is loaded."""

import dataclasses
import difflib
import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..compat import LARGEST_INTEGER


# Named choices of options, from high quality to a small cache. The comments give the perplexity of SmolLM2-135M on
# WikiText-103, relative to the 24.18 of the original, and the time of the whole distillation on one H200 (docs/results.md).
RECIPES: dict[str, dict[str, Any]] = {
    # 1.019 times the perplexity of the original, 2.5 minutes. `rank_layers` chose the 7 of 30 softmax layers. The cache of
    # every fourth layer still grows with the text.
    "hybrid": {"keep_every": 4, "window_size": 128, "num_sink_tokens": 1, "use_routing_projections": True},
    # 1.146 times, 10 minutes. No cache grows, and the nearest 128 tokens are still seen exactly.
    "window": {"window_size": 128, "num_sink_tokens": 1, "use_routing_projections": True},
    # 2.450 times, 6 minutes. No softmax at all.
    "linear": {"use_forgetting": True, "use_routing_projections": True},
}


@dataclass
class GMAConversionConfig:
    """
    The options of a conversion: the entry `gma` in the configuration of a converted model.

    Args:
        layers (`dict[str, dict]`, *optional*): from the names of the converted attention modules, relative to the base
            model, to the sizes that the model decides for each of them: `num_heads`, `num_key_value_heads`, `routing_dim`,
            `value_dim`, `is_causal`, `rotary_dim` and `undone_columns`, see [`GMAConversion`].
        softmax_layers (`list[str]`, *optional*): the names of the attention modules that were not converted.
        num_components (`int`, *optional*, defaults to `64`): Gaussian components per head, the slots of the memory.
        window_size (`int`, *optional*, defaults to `0`): number of nearest tokens that are seen exactly, by softmax; 0 for
            none.
        num_sink_tokens (`int`, *optional*, defaults to `0`): number of first tokens of each sequence that stay exactly
            visible in causal layers. Needs a window.
        use_routing_projections (`bool`, *optional*, defaults to `False`): whether queries and keys pass a learned map per
            head before the routing.
        use_forgetting (`bool`, *optional*, defaults to `False`): whether the memory of causal layers forgets, by a learned
            gate.
        variance_floor (`float`, *optional*, defaults to `1e-4`): smallest variance, in squared units of queries and keys.
        read_eps (`float`, *optional*, defaults to `1e-6`): constant added to the normaliser of the read.
        mean_init_std (`float`, *optional*, defaults to `1.0`): standard deviation of the means before calibration or
            training.
        variance_init (`float`, *optional*, defaults to `1.0`): variance of the components before calibration or training.
            Must exceed `variance_floor`.

    Raises:
        ValueError: for impossible values and combinations. The message names the field, its value and the expected values.
    """

    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    softmax_layers: list[str] = field(default_factory=list)
    num_components: int = 64
    window_size: int = 0
    num_sink_tokens: int = 0
    use_routing_projections: bool = False
    use_forgetting: bool = False
    variance_floor: float = 1e-4
    read_eps: float = 1e-6
    mean_init_std: float = 1.0
    variance_init: float = 1.0

    def __post_init__(self):
        self.num_components = whole_number("num_components", self.num_components, 1)
        self.window_size = whole_number("window_size", self.window_size, 0, "0 means no window")
        self.num_sink_tokens = whole_number("num_sink_tokens", self.num_sink_tokens, 0, "0 means none")
        for name in ("use_routing_projections", "use_forgetting"):
            expect_bool(name, getattr(self, name))
        for name in ("variance_floor", "read_eps", "variance_init"):
            setattr(self, name, number(name, getattr(self, name), is_positive=True))
        self.mean_init_std = number("mean_init_std", self.mean_init_std, is_positive=False)
        if self.num_sink_tokens > 0 and self.window_size == 0:
            raise ValueError(
                f"`num_sink_tokens` is {self.num_sink_tokens} and `window_size` is 0, but sink tokens need a window: its softmax keeps them "
                "visible. Give a `window_size`, or leave `num_sink_tokens` out."
            )
        if not self.variance_init > self.variance_floor:
            raise ValueError(
                f"`variance_init` ({self.variance_init}) must exceed `variance_floor` ({self.variance_floor})."
            )
        self._check_layers()

    def _check_layers(self):
        if not isinstance(self.layers, Mapping) or not all(
            isinstance(shape, Mapping) for shape in self.layers.values()
        ):
            raise ValueError(
                f"`layers` must map names of attention modules to their shapes, got {self.layers!r}. A configuration that "
                "`save_pretrained` wrote holds them."
            )
        if not isinstance(self.softmax_layers, list) or not all(isinstance(name, str) for name in self.softmax_layers):
            raise ValueError(
                f"`softmax_layers` must be a list of names of attention modules, got {self.softmax_layers!r}."
            )
        for name, shapes in self.layers.items():
            check_shapes(name, shapes)
        if not self.layers or any(shapes["is_causal"] for shapes in self.layers.values()):
            return
        if self.use_forgetting:
            raise ValueError(
                "`use_forgetting=True` needs causal layers: a bidirectional layer has no order in which to forget. "
                "Leave `use_forgetting` out for an encoder."
            )
        if self.num_sink_tokens > 0:
            raise ValueError(
                "`num_sink_tokens` needs causal layers: a bidirectional layer sums up the whole sequence. Leave it out for an "
                f"encoder, got {self.num_sink_tokens}."
            )

    @classmethod
    def from_dict(cls, values: Any) -> "GMAConversionConfig":
        """
        Read the options of a saved conversion.

        Args:
            values (`dict`): the entry `gma` of the configuration of a converted model.

        Returns:
            [`GMAConversionConfig`]: the options.

        Raises:
            ValueError: for unknown fields, missing fields, and impossible values.
        """
        if not isinstance(values, Mapping):
            raise ValueError(
                f"The entry `gma` of a converted model's configuration must be a dictionary, got {values!r}. It tells which "
                "layers were converted, and how: `convert_to_gma` makes it. Load the folder that the converted model was "
                "saved to."
            )
        known = [option.name for option in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise ValueError(unknown_field(name, values[name], known))
        # The fields that every version has written
        missing = [name for name in known if name not in values and name != "num_sink_tokens"]
        if missing:
            raise ValueError(
                f"The entry `gma` of the configuration lacks {', '.join(f'`{name}`' for name in missing)}. "
                "`save_pretrained` writes all of them: restore the config.json that it wrote."
            )
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """
        The options as a dictionary, as they are saved.

        Returns:
            `dict`: the fields by name.
        """
        return {option.name: getattr(self, option.name) for option in dataclasses.fields(self)}

    def layer_arguments(self, name: str) -> dict[str, Any]:
        """
        The arguments of [`GMAConversion`] for one layer.

        Args:
            name (`str`): name of the attention module, relative to the base model.

        Returns:
            `dict`: the arguments by name.
        """
        options = self.to_dict()
        return {**options.pop("layers")[name], **{k: v for k, v in options.items() if k != "softmax_layers"}}


def with_recipe(recipe: str | None, chooses_layers: bool, given: dict[str, Any]) -> dict[str, Any]:
    """
    Combine the options of a recipe with the options of the user.

    Args:
        recipe (`str`, *optional*): the name of a recipe.
        chooses_layers (`bool`): whether the user chooses the layers. The recipe then does not choose them.
        given (`dict`): the options of the user, `None` for options that the user does not set. They override the recipe.

    Returns:
        `dict`: the options that the recipe or the user sets.

    Raises:
        ValueError: if there is no such recipe.
    """
    given = {name: value for name, value in given.items() if value is not None}
    if recipe is None:
        return given
    if not isinstance(recipe, str) or recipe not in RECIPES:
        raise ValueError(f"There is no recipe {recipe!r}. Choose one of {', '.join(map(repr, RECIPES))}.")
    options = dict(RECIPES[recipe])
    if chooses_layers:
        options.pop("keep_every", None)
    if given.get("window_size") == 0:
        options.pop("num_sink_tokens", None)  # of a window
    return {**options, **given}


# What a model decides for each of its layers, and the smallest value of each size
SHAPES = {
    "num_heads": 1,
    "num_key_value_heads": 1,
    "routing_dim": 1,
    "value_dim": 1,
    "is_causal": None,
    "rotary_dim": 0,
}


def check_shapes(layer: str, shapes: Mapping[str, Any]) -> None:
    """
    Check that the sizes of a layer are possible.

    Raises:
        ValueError: if they are not.
    """
    where = f"layers[{layer!r}]"
    known = [*SHAPES, "undone_columns"]
    for name in shapes:
        if name not in known:
            raise ValueError(unknown_field(name, shapes[name], known, f" of `{where}`"))
    for name, smallest in SHAPES.items():
        if name not in shapes:
            if name != "rotary_dim":  # older versions did not write it
                raise ValueError(f"`{where}` lacks `{name}`.")
        elif smallest is None:
            expect_bool(f"{where}.{name}", shapes[name])
        else:
            whole_number(f"{where}.{name}", shapes[name], smallest)
    if shapes["num_heads"] % shapes["num_key_value_heads"] != 0:
        raise ValueError(
            f"`{where}.num_key_value_heads` ({shapes['num_key_value_heads']}) must divide `num_heads` "
            f"({shapes['num_heads']})."
        )
    if shapes.get("rotary_dim", 0) > shapes["routing_dim"]:
        raise ValueError(
            f"`{where}.rotary_dim` ({shapes['rotary_dim']}) must not exceed `routing_dim` ({shapes['routing_dim']})."
        )
    for columns in shapes.get("undone_columns") or ():
        is_range = isinstance(columns, list | tuple) and len(columns) == 2 and all(type(x) is int for x in columns)
        if not is_range or not 0 <= columns[0] < columns[1]:
            raise ValueError(
                f"`{where}.undone_columns` must hold ranges of columns, each a pair of a first column and one more than the "
                f"last column, got {columns!r}."
            )


def whole_number(name: str, value: Any, smallest: int, note: str = "") -> int:
    """
    The value as an `int`.

    Raises:
        ValueError: if the value is no whole number, or too small.
    """
    try:
        whole = operator.index(value)
    except TypeError:
        whole = None
    if whole is None or isinstance(value, bool):
        raise ValueError(f"`{name}` must be a whole number, got {value!r}.")
    if whole < smallest:
        expected = "be positive" if smallest == 1 else "not be negative"
        raise ValueError(f"`{name}` must {expected}, got {value!r}.{f' {note}.' if note else ''}")
    if whole > LARGEST_INTEGER:
        raise ValueError(f"`{name}` must be at most {LARGEST_INTEGER}, got {value!r}.")
    return whole


def number(name: str, value: Any, is_positive: bool) -> float:
    """
    The value as a `float`.

    Raises:
        ValueError: if the value is no finite number, is negative, or is 0 and must be positive.
    """
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"`{name}` must be a finite number, got {value!r}.")
    if value < 0 or (is_positive and value == 0):
        raise ValueError(f"`{name}` must {'be positive' if is_positive else 'not be negative'}, got {value!r}.")
    return float(value)


def expect_bool(name: str, value: Any) -> None:
    """
    Check that a value is `True` or `False`.

    Raises:
        ValueError: if it is not.
    """
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` must be True or False, got {value!r}.")


def unknown_field(name: str, value: Any, known: list[str], where: str = "") -> str:
    """The message for a field that does not exist, with the most similar name."""
    similar = difflib.get_close_matches(str(name), known, n=1)
    meant = f" Did you mean `{similar[0]}`?" if similar else ""
    return (
        f"`{name}` (with the value {value!r}) is no option of a conversion{where}.{meant} Known are: {', '.join(known)}. A "
        "folder that a newer version of gma_hf saved needs that version."
    )
