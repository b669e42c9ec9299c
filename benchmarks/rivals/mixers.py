# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
The registry of sequence mixers that the quality benchmarks compare, each in the same model: embeddings, pre-norm residual blocks,
SwiGLU MLP, final norm and head are those of the package.

Softmax attention has RoPE. Linear attention (elu + 1), Performer and Linformer stand in the block of the GMA paper, with learned
absolute positions, as that paper compares them. The others stand in the gated block, with everything that GMA has there. Mamba-2
is a block without MLP, twice as many of them, as it was published.

To add a mixer, add an entry to `MIXERS`; a new operator in the gated block is one method of a subclass of `gated.GatedMixer`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from benchmarks.rivals.gated import GatedDeltaNet, GatedSoftmaxAttention, StepLinearAttention, UnitLinearAttention
from benchmarks.rivals.linear_attention import EluAttention, PerformerAttention
from benchmarks.rivals.linformer import LinformerAttention
from benchmarks.rivals.mamba2 import EXPAND, STATE_SIZE, Mamba2Layer
from gma_hf import GMAConfig, GMAForCausalLM


def state_by_components(config: GMAConfig) -> int:
    """A row of values, and the normaliser, for every component or feature of a head."""
    return config.num_attention_heads * config.num_components * (config.head_dim + 1)


def state_by_dimension(config: GMAConfig) -> int:
    """A matrix from keys to values in every head."""
    return config.num_attention_heads * config.head_dim**2


@dataclass(frozen=True)
class Mixer:
    """One mixer.

    Attributes:
        name: its name in tables.
        preset: of `GMAConfig.from_preset`.
        overrides: what else the configuration of so many layers needs.
        attention: the module that takes the place of the GMA in every block; None for the package's own.
        layer: the module that takes the place of whole blocks; None for the package's own.
        layer_factor: how many layers there are for one layer of the other models.
        state: how many numbers a layer keeps of what it has read, given the configuration; None if they grow with the text.
        only: "causal" or "bidirectional" for a mixer that cannot be both.
        program: what computes it, where that is neither the package nor PyTorch's own attention.
    """

    name: str
    preset: str
    overrides: Callable[[int], dict] = lambda num_layers: {}
    attention: type[nn.Module] | None = None
    layer: type[nn.Module] | None = None
    layer_factor: int = 1
    state: Callable[[GMAConfig], int] | None = None
    only: str | None = None
    program: str | None = None

    @property
    def title(self) -> str:
        return self.name if self.program is None else f"{self.name} ({self.program})"


def hybrid_layers(num_layers: int) -> list[str]:
    """One softmax layer in four, the last of each four; of fewer than four layers the last."""
    period = min(4, num_layers)
    return ["full_attention" if i % period == period - 1 else "linear_attention" for i in range(num_layers)]


PLAIN = "plain PyTorch"
MIXERS: dict[str, Mixer] = {
    "softmax": Mixer("softmax + RoPE", "gated", lambda n: {"layer_types": ["full_attention"] * n}),
    "softmax_gated": Mixer("softmax + RoPE, short convolution, output gate", "gated", attention=GatedSoftmaxAttention),
    "gma_paper": Mixer("GMA, paper block", "paper", state=state_by_components),
    # In the paper's initialisation one component takes nearly everything at first
    "gma_paper_wide": Mixer(
        "GMA, paper block, variance_init 16", "paper", lambda n: {"variance_init": 16.0}, state=state_by_components
    ),
    "gma_gated": Mixer("GMA, gated block", "gated", state=state_by_components),
    "elu": Mixer(
        "linear attention, elu + 1",
        "paper",
        attention=EluAttention,
        state=lambda config: config.num_attention_heads * config.head_dim * (config.head_dim + 1),
        program=PLAIN,
    ),
    "performer": Mixer(
        "Performer, fixed features", "paper", attention=PerformerAttention, state=state_by_components, program=PLAIN
    ),
    "linformer": Mixer("Linformer", "paper", attention=LinformerAttention, only="bidirectional", program=PLAIN),
    "linear_gated": Mixer(
        "linear attention, q and k of unit length, decay, gated block",
        "gated",
        attention=UnitLinearAttention,
        state=state_by_dimension,
        program=PLAIN,
    ),
    "step_gated": Mixer(
        "recurrence of Mamba-2, gated block",
        "gated",
        attention=StepLinearAttention,
        state=state_by_dimension,
        program=PLAIN,
    ),
    "gated_delta_net": Mixer(
        "Gated DeltaNet",
        "gated",
        attention=GatedDeltaNet,
        state=state_by_dimension,
        only="causal",
        program="Transformers, plain PyTorch",
    ),
    "mamba2": Mixer(
        "Mamba-2",
        "paper",
        lambda n: {"position_embedding_type": "none"},
        layer=Mamba2Layer,
        layer_factor=2,
        state=lambda config: EXPAND * config.hidden_size * STATE_SIZE,
        only="causal",
        program=PLAIN,
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

    Raises:
        ValueError: for an unknown mixer, or one that cannot be what is asked for.
    """
    if mixer not in MIXERS:
        raise ValueError(f"There is no mixer {mixer!r}. Choose one of {list(MIXERS)}.")
    chosen = MIXERS[mixer]
    if chosen.only == "causal" and not is_causal:
        raise ValueError(f"{chosen.title} is causal only: leave it out of a comparison of encoders.")
    if chosen.only == "bidirectional" and is_causal:
        raise ValueError(f"{chosen.title} is bidirectional only: leave it out of a comparison of language models.")
    num_layers = chosen.layer_factor * sizes.pop("num_hidden_layers", GMAConfig.num_hidden_layers)
    fields = {**chosen.overrides(num_layers), "num_hidden_layers": num_layers, "is_causal": is_causal}
    if chosen.attention or chosen.layer:
        fields["use_cache"] = False
    return GMAConfig.from_preset(chosen.preset, **{**fields, **sizes})


def make_model(mixer: str, config: GMAConfig, model_class: type[PreTrainedModel] = GMAForCausalLM) -> PreTrainedModel:
    """
    A model with that mixer and random weights, on the default device.

    Args:
        mixer: a key of `MIXERS`.
        config: from `make_config` of the same mixer.
        model_class: any of the package's models.
    """
    model, chosen = model_class(config), MIXERS[mixer]
    layers = model.base_model.layers
    for index, layer in enumerate(layers):
        if chosen.layer is not None:
            layers[index] = initialize(chosen.layer(config, index), model)
        elif chosen.attention is not None:
            layer.self_attn = initialize(chosen.attention(config, index), model)
    return model


def initialize(module: nn.Module, model: PreTrainedModel) -> nn.Module:
    """Linear maps and norms as in the package, the rest as its class says."""
    for part in module.modules():
        model._init_weights(part)
        if hasattr(part, "reset_parameters") and not type(part).__module__.startswith("torch."):
            part.reset_parameters()
    return module


def number_of_parameters(mixer: str, model_class: type[PreTrainedModel] = GMAForCausalLM, **sizes) -> int:
    """Parameters of the model, embeddings included; nothing is allocated."""
    with torch.device("meta"):
        return make_model(mixer, make_config(mixer, **sizes), model_class).num_parameters()


def equal_width(
    mixer: str,
    sizes: dict,
    reference: str,
    reference_sizes: dict,
    model_class: type[PreTrainedModel] = GMAForCausalLM,
    multiples: tuple[int, ...] = (64, 8),
) -> int:
    """
    The width of the MLP that makes a model as large as another one.

    Mamba-2 has no MLP whose width could be chosen: where it takes part, make it the reference of all others.

    Args:
        mixer, sizes: as `make_config` takes them; `intermediate_size` is not looked at.
        reference, reference_sizes: the model whose number of parameters is the target.
        model_class: of both.
        multiples: the width is a multiple of the first of them that brings the sizes within 1% of each other, or of the last.

    Returns:
        `int`: the width.

    Raises:
        ValueError: the sizes would differ by more than 3%, whatever the width.
    """
    target = number_of_parameters(reference, model_class, **reference_sizes)
    smallest, next_smallest = (
        number_of_parameters(mixer, model_class, **{**sizes, "intermediate_size": width}) for width in (8, 16)
    )
    if next_smallest == smallest:  # no MLP
        width, difference = sizes.get("intermediate_size", GMAConfig.intermediate_size), smallest - target
    else:
        per_unit = (next_smallest - smallest) / 8
        for step in multiples:
            width = step * max(1, round((8 + (target - smallest) / per_unit) / step))
            difference = smallest + per_unit * (width - 8) - target
            if abs(difference) <= 0.01 * target:
                break
    if abs(difference) > 0.03 * target:
        raise ValueError(
            f"{MIXERS[mixer].title} differs from {MIXERS[reference].title} by {difference / target:+.1%} in parameters, more "
            f"than 3%, whatever the width of its MLP. Choose another reference (Mamba-2 and the like can only be the "
            "reference), or other sizes."
        )
    return width


def state_per_layer(mixer: str, config: GMAConfig) -> int | None:
    """
    Numbers that a layer keeps of what it has read, the convolution's few tokens left out; None if they grow with the text.
    A block of Mamba-2 counts as often as it stands for one layer of the others.
    """
    chosen = MIXERS[mixer]
    if chosen.state is None or "full_attention" in config.layer_types:
        return None
    return chosen.layer_factor * chosen.state(config)
