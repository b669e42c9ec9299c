# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""`convert_to_gma` and `revert_to_softmax`."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..compat import has_adapters, parameters_without_values, register_recorded_outputs
from .architectures import check_architecture, supported_list
from .checkpoints.classes import ConvertedModelMixin, converted_model_class, initialize_layers, register_converted_type
from .checkpoints.install import (
    attach_layers,
    build_layers,
    copied_configs,
    gma_layers,
    held_configs,
    remove_layers,
    restore_softmax_implementations,
    unchanged_on_error,
    use_linear_masks,
)
from .config import GMAConversionConfig, expect_bool, number, whole_number, with_recipe
from .discovery import AttentionLayer, find_attention_layers


SLOWEST_KEPT = 1024  # tokens per full turn of the slowest rotation that is kept behind a window


def convert_to_gma(
    model: PreTrainedModel,
    layers: Sequence[int | str] | float | str | None = None,
    *,
    recipe: str | None = None,
    keep_every: int | None = None,
    num_components: int = 64,
    window_size: int | None = None,
    num_sink_tokens: int | None = None,
    use_routing_projections: bool | None = None,
    use_forgetting: bool | None = None,
    undo_rotation: bool | None = None,
    undo_rotation_beyond: float | None = None,
    variance_floor: float = 1e-4,
    read_eps: float = 1e-6,
    mean_init_std: float = 1.0,
    variance_init: float = 1.0,
    example_inputs: dict[str, Any] | None = None,
) -> PreTrainedModel:
    """
    Replace the softmax of the self-attention of a model by Gaussian Mixture Attention (Huang and Raza, arXiv:2606.18283), in
    place. Projections, norms, positions and the names of all weights stay. Each converted module gets a child `gma`.

    Args:
        model (`PreTrainedModel`): a loaded model of Transformers.
        layers (`list[int | str]`, `float` or `str`, *optional*): which self-attention layers to convert; by default all. A
            list of indices counts the self-attention layers in the order of the model: the layers of an encoder come before
            the layers of its decoder, and negative indices count from the end. A list of strings gives names of modules, or
            their beginnings, such as `["encoder"]`. A fraction between 0 and 1 chooses layers that are evenly spread.
        recipe (`str`, *optional*): a named choice of options. `"hybrid"`: every fourth layer stays softmax, and the other
            layers see the nearest 128 tokens and the first token exactly. `"window"`: all layers see the nearest 128 tokens
            and the first token exactly. `"linear"`: no softmax, and the memory forgets. After distillation, SmolLM2-135M has
            1.02, 1.15 and 2.45 times the perplexity of the original. Options that you pass override the options of the
            recipe, and `layers` overrides its choice of layers. Options for causal layers are left out for an encoder.
        keep_every (`int`, *optional*): of the chosen layers, every n-th (the n-th, the 2n-th, ...) stays softmax.
        num_components (`int`, *optional*, defaults to `64`): Gaussian components per head, the slots of the memory.
        window_size (`int`, *optional*): number of nearest tokens that are seen exactly, by softmax; by default 0 (none) or
            the value of the recipe.
        num_sink_tokens (`int`, *optional*): number of first tokens of each sequence that stay exactly visible in causal
            layers when they have left the window; the memory does not hold these tokens. Pretrained models pay much
            attention to the very first token: 1 or 4 are good choices. By default 0 or the value of the recipe.
        use_routing_projections (`bool`, *optional*): whether queries and keys pass a learned map per head before the
            routing; by default `False` or the value of the recipe.
        use_forgetting (`bool`, *optional*): whether the memory of causal layers forgets, by a learned gate; by default
            `False` or the value of the recipe.
        undo_rotation (`bool`, *optional*): whether the slow rotations of rotary positions are removed from queries and keys
            before the routing, so that the memory works at positions that calibration did not see. By default in every layer
            whose rotation can be undone, except bidirectional layers without a window, which would see little of the order.
        undo_rotation_beyond (`float`, *optional*): which rotations are slow: the rotations that need more than this number
            of tokens for a full turn; 0 for all rotations. Choose at most the length of the texts for calibration and
            training. By default 1,024 behind a window, and 0 without a window.
        variance_floor (`float`, *optional*, defaults to `1e-4`): smallest variance, in squared units of queries and keys.
        read_eps (`float`, *optional*, defaults to `1e-6`): constant added to the normaliser of the read.
        mean_init_std (`float`, *optional*, defaults to `1.0`): standard deviation of the means before calibration or
            training.
        variance_init (`float`, *optional*, defaults to `1.0`): variance of the components before calibration or training.
        example_inputs (`dict`, *optional*): arguments for one forward pass of the base model, which finds its attention
            modules. Needed if made-up tokens, pixels or audio features do not work.

    Returns:
        `PreTrainedModel`: the same object. It now has a class such as `GMALlamaForCausalLM`, and its own configuration with
        a model type such as "gma_llama".

    Raises:
        ValueError: if the model or a layer cannot be converted; the message says why. After this and any other error the
            model is unchanged.

    ```python
    >>> from gma_hf import convert_to_gma
    >>> from transformers import AutoModelForCausalLM

    >>> model = AutoModelForCausalLM.from_pretrained(folder)
    >>> convert_to_gma(model, recipe="hybrid")
    >>> model.save_pretrained(another_folder)
    ```
    """
    check_model(model)
    causal_only = {"num_sink_tokens": num_sink_tokens, "use_forgetting": use_forgetting}
    given = {"window_size": window_size, "use_routing_projections": use_routing_projections, **causal_only}
    options = with_recipe(recipe, layers is not None, {"keep_every": keep_every, **given})
    keep_every = options.pop("keep_every", None)
    check_selection(keep_every, undo_rotation, undo_rotation_beyond)
    if example_inputs is not None and not isinstance(example_inputs, Mapping):
        raise ValueError(f"`example_inputs` must map arguments of the base model to values, got {example_inputs!r}.")
    conversion = GMAConversionConfig(
        num_components=num_components,
        variance_floor=variance_floor,
        read_eps=read_eps,
        mean_init_std=mean_init_std,
        variance_init=variance_init,
        **options,
    )
    if undo_rotation_beyond is None:
        undo_rotation_beyond = SLOWEST_KEPT if conversion.window_size > 0 else 0
    attention_layers = find_attention_layers(model, example_inputs)
    if not attention_layers:
        raise ValueError(
            f"{type(model).__name__} does not compute its attention through Transformers' attention interface, so its "
            f"attention cannot be replaced. {supported_list()}"
        )
    chosen = select_layers(attention_layers, layers, keep_every)
    if not any(layer.is_causal for layer in chosen):
        # Options of a recipe are dropped; options of the user are refused below
        unused = {name: getattr(GMAConversionConfig, name) for name, value in causal_only.items() if value is None}
        conversion = dataclasses.replace(conversion, **unused)
    choose_rotations(chosen, undo_rotation, undo_rotation_beyond, conversion.window_size > 0)
    conversion = dataclasses.replace(
        conversion,
        layers={layer.name: layer.shapes() for layer in chosen},
        softmax_layers=[layer.name for layer in attention_layers if layer not in chosen],
    )

    # All steps that can fail or take long come before the first change of the model
    model_class = converted_model_class(type(model), type(model.config))
    register_converted_type(model.config.model_type)
    new_layers = build_layers(model, conversion)
    initialize_layers(new_layers.values())
    with unchanged_on_error(model):
        exchange_config(model, model_class.config_class).gma = conversion.to_dict()
        exchange_class(model, model_class)
        attach_layers(model, new_layers)
        use_linear_masks(model)
    return model


def revert_to_softmax(model: PreTrainedModel) -> PreTrainedModel:
    """
    Undo [`convert_to_gma`] in place: restore the original class, configuration and attention. The mixtures are lost.

    Args:
        model (`PreTrainedModel`): a converted model, from [`convert_to_gma`] or loaded from a folder.

    Returns:
        `PreTrainedModel`: the same object.

    Raises:
        ValueError: if the model is not converted. After this and any other error the model is unchanged.
    """
    if not isinstance(model, ConvertedModelMixin):
        raise ValueError(why_not_reverted(model))
    with unchanged_on_error(model):
        restore_softmax_implementations(model)
        vars(model).pop("_softmax_implementations", None)
        remove_layers(model)
        config = exchange_config(model, type(model.config).softmax_class)
        for name in ("gma", "auto_map"):
            config.__dict__.pop(name, None)
        config.architectures = [model.softmax_class.__name__]
        exchange_class(model, model.softmax_class)
    return model


def why_not_reverted(model: Any) -> str:
    """The message for an object that [`revert_to_softmax`] does not take."""
    name = type(model).__name__
    inside = (
        [part for part in model.modules() if isinstance(part, ConvertedModelMixin)]
        if isinstance(model, nn.Module)
        else []
    )
    if inside:
        return (
            f"{name} is a wrapper around a converted {type(inside[0]).__name__}. Take the model out of it first, for example "
            "by `merge_and_unload()` of a model with adapters, and revert this model."
        )
    if isinstance(model, nn.Module) and gma_layers(model):
        return (
            f"{name} is a part of a converted model, and cannot be reverted alone. Call `revert_to_softmax` on the model "
            "that was converted."
        )
    return f"{name} was not converted to GMA; there is nothing to revert."


def check_model(model: Any) -> None:
    """
    Check that an object is a model whose architecture can be converted.

    Raises:
        ValueError: if it is not.
    """
    if not isinstance(model, PreTrainedModel):
        wrapped = " Convert the model first, then wrap it or add adapters." if isinstance(model, nn.Module) else ""
        raise ValueError(f"`convert_to_gma` takes a model of Transformers, got {type(model).__name__}.{wrapped}")
    if isinstance(model, ConvertedModelMixin):
        raise ValueError(
            f"{type(model).__name__} is converted already. To convert other layers, call `revert_to_softmax(model)` first."
        )
    parts = gma_layers(model)
    if parts:
        raise ValueError(
            f"{type(model).__name__} holds layers that are converted already ({', '.join(parts)}): it is a part of a converted "
            "model, or has a converted model inside. Call `revert_to_softmax` on the model that was converted first."
        )
    if has_adapters(model):
        raise ValueError(
            f"{type(model).__name__} has adapters (`add_adapter`), so `save_pretrained` would save them alone, without the "
            "mixtures. Convert the model first and add adapters to the converted model, or merge the adapters before."
        )
    missing = parameters_without_values(model)
    if missing:
        raise ValueError(
            f"{len(missing)} parameters of {type(model).__name__} have no values (meta device), such as {missing[0]}. Load "
            "the model with its weights, and convert it then."
        )
    check_architecture(model)


def check_selection(keep_every: Any, undo_rotation: Any, undo_rotation_beyond: Any) -> None:
    """
    Check the options that choose layers and rotations.

    Raises:
        ValueError: for impossible values.
    """
    if keep_every is not None and whole_number("keep_every", keep_every, 0) < 2:
        raise ValueError(f"`keep_every` must be at least 2, got {keep_every}: with 1, every layer would be kept.")
    if undo_rotation is not None:
        expect_bool("undo_rotation", undo_rotation)
    if undo_rotation_beyond is not None:
        number("undo_rotation_beyond", undo_rotation_beyond, is_positive=False)


def choose_rotations(
    chosen: list[AttentionLayer], undo_rotation: bool | None, beyond: float, has_window: bool
) -> None:
    """
    Decide for each layer which rotations are undone, see [`convert_to_gma`].

    Raises:
        ValueError: if rotations are requested to be undone, and there are none.
    """
    if undo_rotation and not any(layer.rotary_dim > 0 for layer in chosen):
        raise ValueError(
            "`undo_rotation=True` needs layers with rotary positions, passed to them as `position_embeddings=(cos, sin)` and "
            "applied by an `apply_rotary_pos_emb` to the first dimensions of queries and keys. None was found; leave it out."
        )
    for layer in chosen:
        if not (layer.is_causal or has_window if undo_rotation is None else undo_rotation):
            layer.rotary_dim = 0
        layer.choose_rotations(beyond)
    if undo_rotation and not any(layer.rotary_dim > 0 for layer in chosen):
        raise ValueError(
            f"`undo_rotation=True`, but no rotation of the model takes more than `undo_rotation_beyond={beyond}` "
            "tokens for a full turn. Give a smaller number, or leave `undo_rotation` out."
        )


def exchange_config(model: PreTrainedModel, config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    """Give a model a copy of its configuration, of another class. Other models that share the old configuration keep it."""
    held = [(model, "config", model.config)]
    held += [(module, name, config) for module in model.modules() for name, config in held_configs(module)]
    for module, name, config in copied_configs(held):
        vars(module)[name] = config
    model.config.__class__ = config_class
    return model.config


def exchange_class(model: PreTrainedModel, model_class: type[PreTrainedModel]) -> None:
    """Make a model an instance of another class with the same modules."""
    model.__class__ = model_class
    register_recorded_outputs(model)


def select_layers(
    attention_layers: Sequence[AttentionLayer],
    layers: Sequence[int | str] | float | str | None,
    keep_every: int | None,
) -> list[AttentionLayer]:
    """
    Choose the self-attention layers to convert.

    Args:
        attention_layers (`Sequence[AttentionLayer]`): all attention layers of the model, in order.
        layers (`list[int | str]`, `float` or `str`, *optional*): see [`convert_to_gma`].
        keep_every (`int`, *optional*): see [`convert_to_gma`].

    Returns:
        `list[AttentionLayer]`: the layers to convert, in the order of the model.

    Raises:
        ValueError: if there is no such layer, or one of them cannot be converted.
    """
    candidates = [layer for layer in attention_layers if layer.is_self_attention]
    if layers is None:
        chosen = candidates
    elif isinstance(layers, float):
        chosen = spread_evenly(candidates, layers)
    elif isinstance(layers, int):
        raise ValueError(
            f"`layers={layers}` does not choose layers. Give a list of indices, `[{layers}]`, or a fraction."
        )
    else:
        entries = [layers] if isinstance(layers, str) else list(layers)
        indices = {index for entry in entries for index in find_entry(candidates, entry)}
        chosen = [candidates[index] for index in sorted(indices)]
    if keep_every is not None:
        chosen = [layer for number, layer in enumerate(chosen, 1) if number % keep_every != 0]
    if not chosen:
        raise ValueError(
            f"No layer is left to convert: `layers={layers!r}`, `keep_every={keep_every!r}`, and the model has "
            f"{len(candidates)} self-attention layers."
        )
    for layer in chosen:
        if layer.obstacles:
            raise ValueError(
                f"{layer.name} ({type(layer.module).__name__}) cannot be converted: {layer.obstacles[0]}. Choose other "
                "layers with `layers`."
            )
    return chosen


def spread_evenly(candidates: list[AttentionLayer], fraction: float) -> list[AttentionLayer]:
    """This fraction of the layers, at least one layer, evenly spread."""
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"A fraction of layers must lie in (0, 1], got {fraction}.")
    number = len(candidates)
    count = max(1, round(fraction * number))
    return [candidates[i] for i in range(number) if (i + 1) * count // number > i * count // number]


def find_entry(candidates: list[AttentionLayer], entry: int | str) -> list[int]:
    """The candidates that an entry of `layers` selects, as positions."""
    number = len(candidates)
    if isinstance(entry, str):
        beginning = f"{entry.rstrip('.')}."
        found = [
            i
            for i, layer in enumerate(candidates)
            if any(f"{name}.".startswith(beginning) for name in (layer.name, layer.full_name))
        ]
        if not found:
            names = ", ".join(layer.name for layer in candidates)
            raise ValueError(
                f"No self-attention layer has a name that begins with {entry!r}. Their names are: {names}."
            )
        return found
    if isinstance(entry, bool) or not isinstance(entry, int) or not -number <= entry < number:
        raise ValueError(
            f"`layers` holds {entry!r}, but the model has {number} self-attention layers. Give indices from {-number} to "
            f"{number - 1}, or names of modules."
        )
    return [entry % number]
