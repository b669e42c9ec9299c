# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
The sequence mixers that the benchmarks compare, each in the same model: embeddings, pre-norm residual blocks, SwiGLU MLP,
final norm and head are those of the package.

Softmax attention has RoPE. Linear attention and the Performer stand in the block of the GMA paper, with learned absolute
positions, as that paper compares them. Mamba-2 is a block without MLP, twice as many of them, as it was published.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from benchmarks.rivals.linear_attention import (
    EluAttention,
    LinearAttention,
    PerformerAttention,
    RedrawnPerformerAttention,
)
from benchmarks.rivals.mamba2 import Mamba2Layer, Mamba2Mixer
from gma_hf import GMAConfig, GMAForCausalLM


REDRAW_INTERVAL = 1000  # forward passes in training, as in the original code of the Performer


@dataclass(frozen=True)
class Mixer:
    """One mixer.

    Attributes:
        title: its name in tables.
        preset: of `GMAConfig.from_preset`.
        overrides: what else the configuration of so many layers needs.
        attention: the module that takes the place of the GMA in every block; None for the package's own.
        layer: the module that takes the place of whole blocks; None for the package's own.
        layer_factor: how many layers there are for one layer of the other models.
        causal_only: whether it cannot be bidirectional.
    """

    title: str
    preset: str
    overrides: Callable[[int], dict] = lambda num_layers: {}
    attention: type[nn.Module] | None = None
    layer: type[nn.Module] | None = None
    layer_factor: int = 1
    causal_only: bool = False


def hybrid_layers(num_layers: int) -> list[str]:
    """One softmax layer in four, the last of each four; of fewer than four layers the last."""
    period = min(4, num_layers)
    return ["full_attention" if i % period == period - 1 else "linear_attention" for i in range(num_layers)]


MIXERS: dict[str, Mixer] = {
    "softmax": Mixer("softmax + RoPE", "gated", lambda n: {"layer_types": ["full_attention"] * n}),
    "gma_paper": Mixer("GMA, paper block", "paper"),
    # In the paper's initialisation one component takes nearly everything at first
    "gma_paper_wide": Mixer("GMA, paper block, variance_init 16", "paper", lambda n: {"variance_init": 16.0}),
    "gma_gated": Mixer("GMA, gated block", "gated"),
    "elu": Mixer("linear attention, elu + 1", "paper", attention=EluAttention),
    "performer": Mixer("Performer, fixed features", "paper", attention=PerformerAttention),
    "performer_redrawn": Mixer("Performer, redrawn features", "paper", attention=RedrawnPerformerAttention),
    "mamba2": Mixer(
        "Mamba-2",
        "paper",
        lambda n: {"position_embedding_type": "none"},
        layer=Mamba2Layer,
        layer_factor=2,
        causal_only=True,
    ),
    "hybrid": Mixer(
        "hybrid: 1 softmax layer in 4, others GMA gated", "gated", lambda n: {"layer_types": hybrid_layers(n)}
    ),
}


def make_config(mixer: str, *, is_causal: bool = True, **sizes) -> GMAConfig:
    """
    The configuration of a model with that mixer.

    Args:
        mixer: a key of `MIXERS`.
        is_causal: a language model or an encoder.
        sizes: fields of `GMAConfig`; they win over what the mixer needs. Mamba-2 gets twice the `num_hidden_layers`, has no
            use for `intermediate_size`, and its heads and state have the published sizes.

    Returns:
        The configuration.

    Raises:
        ValueError: for an unknown mixer, or a bidirectional one that is causal only.
    """
    if mixer not in MIXERS:
        raise ValueError(f"There is no mixer {mixer!r}. Choose one of {list(MIXERS)}.")
    chosen = MIXERS[mixer]
    if chosen.causal_only and not is_causal:
        raise ValueError(f"{chosen.title} is causal only: leave it out of a comparison of encoders.")
    num_layers = chosen.layer_factor * sizes.pop("num_hidden_layers", GMAConfig.num_hidden_layers)
    fields = {**chosen.overrides(num_layers), "num_hidden_layers": num_layers, "is_causal": is_causal}
    if chosen.attention or chosen.layer:
        fields["use_cache"] = False
    return GMAConfig.from_preset(chosen.preset, **{**fields, **sizes})


def make_model(
    mixer: str,
    config: GMAConfig,
    model_class: type[PreTrainedModel] = GMAForCausalLM,
    redraw_interval: int = REDRAW_INTERVAL,
) -> PreTrainedModel:
    """
    A model with that mixer and random weights, on the default device.

    Args:
        mixer: a key of `MIXERS`.
        config: from `make_config` of the same mixer.
        model_class: any of the package's models.
        redraw_interval: after how many forward passes in training "performer_redrawn" draws new features.

    Returns:
        The model.
    """
    model = model_class(config)
    chosen = MIXERS[mixer]
    layers = model.base_model.layers
    for index, layer in enumerate(layers):
        if chosen.layer is not None:
            layers[index] = initialize(chosen.layer(config, index), model)
        elif chosen.attention is not None:
            layer.self_attn = initialize(chosen.attention(config, index), model)
    if chosen.attention is RedrawnPerformerAttention:
        # On the whole model, which is not compiled where blocks are compiled one by one
        model.base_model.register_forward_pre_hook(RedrawFeatures(redraw_interval))
    return model


def initialize(module: nn.Module, model: PreTrainedModel) -> nn.Module:
    """Linear maps and norms as in the package, the rest as its class says."""
    for part in module.modules():
        model._init_weights(part)
        if isinstance(part, (LinearAttention, Mamba2Mixer)):
            part.reset_parameters()
    return module


class RedrawFeatures:
    """A forward pre-hook that draws the random features of all layers anew every so many forward passes in training."""

    def __init__(self, interval: int):
        self.interval = interval
        self.passes = 0

    def __call__(self, model: nn.Module, inputs: tuple) -> None:
        if not model.training:
            return
        if self.passes > 0 and self.passes % self.interval == 0:
            for layer in model.layers:
                layer.self_attn.reset_parameters()
        self.passes += 1


def number_of_parameters(mixer: str, model_class: type[PreTrainedModel] = GMAForCausalLM, **sizes) -> int:
    """Parameters of the model, embeddings included; nothing is allocated."""
    with torch.device("meta"):
        return make_model(mixer, make_config(mixer, **sizes), model_class).num_parameters()


def equal_intermediate_size(
    mixer: str, *, reference: str = "softmax", model_class: type[PreTrainedModel] = GMAForCausalLM, **sizes
) -> int:
    """
    The width of the MLP that makes a model as large as that of the reference.

    Mamba-2 has no MLP whose width could be chosen: where it takes part, make it the reference of all others.

    Args:
        mixer: a key of `MIXERS`.
        reference: the mixer whose size is the target.
        model_class: any of the package's models.
        sizes: as for `make_config`; `intermediate_size` is that of the reference.

    Returns:
        The width: a multiple of 64 if that brings the sizes within 1% of each other, otherwise of 8.

    Raises:
        ValueError: if the sizes would differ by more than 3%.
    """
    target = number_of_parameters(reference, model_class, **sizes)
    smallest, next_smallest = (
        number_of_parameters(mixer, model_class, **{**sizes, "intermediate_size": size}) for size in (8, 16)
    )
    if next_smallest == smallest:  # no MLP
        size, difference = sizes.get("intermediate_size", GMAConfig.intermediate_size), smallest - target
    else:
        per_unit = (next_smallest - smallest) / 8
        for step in (64, 8):
            size = step * max(1, round((8 + (target - smallest) / per_unit) / step))
            difference = smallest + per_unit * (size - 8) - target
            if abs(difference) <= 0.01 * target:
                break
    if abs(difference) > 0.03 * target:
        raise ValueError(
            f"{MIXERS[mixer].title} differs from {MIXERS[reference].title} by {difference / target:+.1%} in parameters, more "
            f"than 3%, whatever the width of its MLP. Choose another reference (Mamba-2 and the like can only be the "
            "reference), or other sizes."
        )
    return size
