# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""`convert_to_gma` and `revert_to_softmax`."""

import dataclasses
from collections.abc import Sequence
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


SLOWEST_KEPT = 1024  # tokens that the slowest rotation takes for a turn that is not undone, behind a window


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
    Replace the softmax of a model's self-attention by Gaussian Mixture Attention (Huang and Raza, arXiv:2606.18283), in
    place. Projections, norms, positions and the names of all weights stay; each converted module gains a child `gma`.

    Args:
        model (`PreTrainedModel`):
            A loaded model of Transformers.
        layers (`list` of `int` or `str`, `float` or `str`, *optional*):
            Which self-attention layers to convert. All by default. A list of indices, counted over the self-attention layers
            in the order of the model: those of an encoder come before those of its decoder, negative ones count from the end.
            A list of module names, or of their beginnings, such as `["encoder"]`. Or a fraction between 0 and 1, spread
            evenly.
        recipe (`str`, *optional*):
            A named choice of options: `"hybrid"` keeps every fourth layer softmax, and the others see the nearest 128 tokens
            and the first one exactly; `"window"` does the latter in all layers; `"linear"` keeps no softmax, and the memory
            forgets. After distillation SmolLM2-135M has 1.02, 1.15 and 2.45 times the perplexity of the original with them.
            Options that are given override those of the recipe; `layers` override its choice of layers. What needs causal
            layers is left out for an encoder.
        keep_every (`int`, *optional*):
            Of the layers above, every n-th (the n-th, the 2n-th, ...) stays softmax.
        num_components (`int`, *optional*, defaults to 64):
            Gaussian components per head, the slots of the memory.
        window_size (`int`, *optional*, defaults to 0):
            How many of the nearest tokens are seen exactly, by softmax, in front of the memory; 0 for none.
        num_sink_tokens (`int`, *optional*, defaults to 0):
            How many of the first tokens of each sequence stay exactly visible in causal layers when they have left the
            window, instead of passing into the memory. Pretrained models pay much attention to the very first token: 1 or 4
            are good choices.
        use_routing_projections (`bool`, *optional*, defaults to `False`):
            Whether queries and keys pass a learned map per head before they are routed.
        use_forgetting (`bool`, *optional*, defaults to `False`):
            Whether the memory of causal layers forgets, by a learned gate.
        undo_rotation (`bool`, *optional*):
            Whether queries and keys are routed without the slow ones of their rotary positions, so that the memory is as good
            at positions that it was not fitted to. By default in every layer whose rotation can be undone, except
            bidirectional layers without a window, which would see little of the order.
        undo_rotation_beyond (`float`, *optional*):
            Which rotations are slow: those that take more than so many tokens for a turn. Not more than the length of the
            texts that the model is calibrated and trained on; 0 for all rotations. By default 1,024 behind a window, and 0
            where there is none.
        variance_floor (`float`, *optional*, defaults to 1e-4):
            Smallest variance, in squared units of queries and keys.
        read_eps (`float`, *optional*, defaults to 1e-6):
            Constant added to the normaliser of the read.
        mean_init_std (`float`, *optional*, defaults to 1.0):
            Standard deviation of the means before they are calibrated or trained.
        variance_init (`float`, *optional*, defaults to 1.0):
            Variance of the components before they are calibrated or trained.
        example_inputs (`dict`, *optional*):
            Arguments for one forward pass of the base model, by which its attention is found. Needed where tokens, pixels or
            audio features made up from the configuration do not do.

    Returns:
        `PreTrainedModel`: the same object, now of a class such as `GMALlamaForCausalLM` and with a configuration of its own,
        whose model type is "gma_llama".

    Raises:
        ValueError: for a model or layer that cannot be converted, with the reason. The model is unchanged then, and after any
            other error.

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
            f"{type(model).__name__} does not compute its attention through Transformers' attention interface, so that it "
            f"cannot be replaced. {supported_list()}"
        )
    chosen = select_layers(attention_layers, layers, keep_every)
    if not any(layer.is_causal for layer in chosen):
        # Of a recipe; what the user gives is refused below
        unused = {name: getattr(GMAConversionConfig, name) for name, value in causal_only.items() if value is None}
        conversion = dataclasses.replace(conversion, **unused)
    choose_rotations(chosen, undo_rotation, undo_rotation_beyond, conversion.window_size > 0)
    conversion = dataclasses.replace(
        conversion,
        layers={layer.name: layer.shapes() for layer in chosen},
        softmax_layers=[layer.name for layer in attention_layers if layer not in chosen],
    )

    # Everything that can fail or takes long is done before the first change to the model
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
    Undo [`convert_to_gma`]: the original class, configuration and attention, in place. The mixtures are lost.

    Args:
        model (`PreTrainedModel`): a converted model, or one that was loaded as such.

    Returns:
        `PreTrainedModel`: the same object.

    Raises:
        ValueError: if the model is not a converted one. The model is unchanged then, and after any other error.
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
    """The message for what [`revert_to_softmax`] does not take."""
    name = type(model).__name__
    inside = (
        [part for part in model.modules() if isinstance(part, ConvertedModelMixin)]
        if isinstance(model, nn.Module)
        else []
    )
    if inside:
        return (
            f"{name} is a wrapper around a converted {type(inside[0]).__name__}. Take the model out of it first, for example "
            "by `merge_and_unload()` of a model with adapters, and revert that."
        )
    if isinstance(model, nn.Module) and gma_layers(model):
        return (
            f"{name} is a part of a converted model, and cannot be reverted alone. Call `revert_to_softmax` on the model "
            "that was converted."
        )
    return f"{name} was not converted to GMA; there is nothing to revert."


def check_model(model: Any) -> None:
    """
    Raises:
        ValueError: unless it is a model of Transformers whose architecture can be converted.
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
    Raises:
        ValueError: for impossible values of the options that choose layers and rotations.
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
        ValueError: if rotations are to be undone, and there are none.
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
            "tokens for a turn. Give a smaller number, or leave `undo_rotation` out."
        )


def exchange_config(model: PreTrainedModel, config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    """
    Give a model a copy of its configuration, of another class. Another model that shares the old one keeps it as it is.
    """
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
    Args:
        attention_layers (`Sequence[AttentionLayer]`): all of the model, in its order.
        layers, keep_every: as in [`convert_to_gma`].

    Returns:
        `list[AttentionLayer]`: the self-attention layers to convert, in the order of the model.

    Raises:
        ValueError: if there is none, or one of them cannot be converted.
    """
    candidates = [layer for layer in attention_layers if layer.is_self_attention]
    if layers is None:
        chosen = candidates
    elif isinstance(layers, float):
        chosen = spread_evenly(candidates, layers)
    elif isinstance(layers, int):
        raise ValueError(
            f"`layers={layers}` is no choice of layers. Give a list of indices, `[{layers}]`, or a fraction."
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
                f"{layer.name} ({type(layer.module).__name__}) cannot be converted: {layer.obstacles[0]}."
            )
    return chosen


def spread_evenly(candidates: list[AttentionLayer], fraction: float) -> list[AttentionLayer]:
    """That fraction of the layers, at least one, evenly spread."""
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"A fraction of layers must lie in (0, 1], got {fraction}.")
    number = len(candidates)
    count = max(1, round(fraction * number))
    return [candidates[i] for i in range(number) if (i + 1) * count // number > i * count // number]


def find_entry(candidates: list[AttentionLayer], entry: int | str) -> list[int]:
    """The positions among the candidates that an entry of `layers` means."""
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
