# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
The registry of sequence mixers that the quality benchmarks compare, each in the same model: embeddings, pre-norm residual blocks,
SwiGLU MLP, final norm and head are those of the package.

Softmax attention has RoPE. Linear attention (elu + 1), Performer and Linformer stand in the block of the GMA paper, with learned
absolute positions, as that paper compares them. The others stand in the gated block, with everything that GMA has there. Mamba-2
is a block without MLP, twice as many of them, as it was published.

To add a mixer, add an entry to `MIXERS`; a new operator is one method of a subclass of `memories.Memory`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedModel

from benchmarks.rivals import memories
from benchmarks.rivals.mamba2 import EXPAND, STATE_SIZE, Mamba2Layer
from benchmarks.rivals.recurrences import PLAIN, program
from gma_hf import GMAConfig, GMAForCausalLM


def state_by_components(config: GMAConfig) -> int:
    """A row of values, and the normaliser, for every component or feature of a head."""
    return config.num_attention_heads * config.num_components * (config.head_dim + 1)


def state_by_dimension(config: GMAConfig) -> int:
    """A matrix from keys to values in every head."""
    return config.num_attention_heads * config.head_dim**2


@dataclass(frozen=True)
class Mixer:
    """
    One mixer.

    Attributes:
        name: its name in tables.
        preset: of `GMAConfig.from_preset`.
        overrides: what else the configuration of so many layers needs.
        memory, attention, layer: what takes the place of the memory in every GMA layer, of all of the layer, or of whole blocks;
            None for the package's.
        layer_factor: how many layers there are for one layer of the other models.
        state: how many numbers a layer keeps of what it has read, given the configuration; None if they grow with the text.
        only: "causal" or "bidirectional" for a mixer that cannot be both.
        program: what computed it where a row does not say it, if that is neither the package nor PyTorch's own attention.
        is_variant: a step of the search for a block (docs/block-search.md): trained only when it is asked for by name.
    """

    name: str
    preset: str
    overrides: Callable[[int], dict] = lambda num_layers: {}
    memory: type[memories.Memory] | None = None
    attention: type[nn.Module] | None = None
    layer: type[nn.Module] | None = None
    layer_factor: int = 1
    state: Callable[[GMAConfig], int] | None = None
    only: str | None = None
    program: str | None = None
    is_variant: bool = False

    @property
    def is_rival(self) -> bool:
        """Whether the package cannot load such a model."""
        return (self.memory or self.attention or self.layer) is not None

    @property
    def title(self) -> str:
        return self.name if self.program is None else f"{self.name} ({self.program})"

    def title_of(self, row: dict) -> str:
        """The title of a row, with the program that computed it."""
        return replace(self, program=row.get("program", self.program)).title


def hybrid_layers(num_layers: int) -> list[str]:
    """One softmax layer in four, the last of each four; of fewer than four layers the last."""
    period = min(4, num_layers)
    return ["full_attention" if i % period == period - 1 else "linear_attention" for i in range(num_layers)]


SOFTMAX = Mixer("softmax + RoPE", "gated", lambda n: {"layer_types": ["full_attention"] * n})
GMA_PAPER = Mixer("GMA, paper block", "paper", state=state_by_components)
GMA_GATED = Mixer("GMA, gated block", "gated", state=state_by_components)
GMA_CORRELATED = Mixer("GMA, correlated block", "correlated", state=state_by_components)
GMA_DELTA = Mixer("GMA, delta block", "delta", state=state_by_components, only="causal")
UNIT_LINEAR = Mixer(
    "linear attention, q and k of unit length, decay, gated block",
    "gated", memory=memories.UnitLinearMemory, state=state_by_dimension, program=PLAIN,
)  # fmt: skip
STEP_LINEAR = Mixer(
    "recurrence of Mamba-2, gated block",
    "gated", memory=memories.StepLinearMemory, state=state_by_dimension, program=PLAIN,
)  # fmt: skip
DELTA = Mixer(
    "Gated DeltaNet", "gated", attention=memories.GatedDeltaNet, state=state_by_dimension, only="causal",
    program="Transformers, plain PyTorch",
)  # fmt: skip
GATED_SOFTMAX = Mixer(
    "softmax + RoPE, short convolution, output gate", "gated", memory=memories.SoftmaxMemory,
    overrides=lambda n: {"rope_on_routing": True, "use_write_weight": False, "use_decay": False},
)  # fmt: skip
MAMBA2 = Mixer(
    "Mamba-2", "paper", lambda n: {"position_embedding_type": "none"}, layer=Mamba2Layer, layer_factor=2,
    state=lambda config: EXPAND * config.hidden_size * STATE_SIZE, only="causal", program=PLAIN,
)  # fmt: skip
ALTERNATING = Mixer(
    "GMA, gated and correlated layers in turn",
    "correlated",
    attention=memories.AlternatingGMA,
    state=state_by_components,
)
QUIET = {"scale_output_init": True}


def variant(mixer: Mixer, name: str, **overrides) -> Mixer:
    """The mixer with other fields of the configuration."""
    return replace(
        mixer, name=f"{mixer.name}, {name}", overrides=lambda n: {**mixer.overrides(n), **overrides}, is_variant=True
    )


# The preset before its means were orthogonal
CORRELATED_NORMAL = variant(GMA_CORRELATED, "means drawn independently", mean_init="normal")

MIXERS: dict[str, Mixer] = {
    "softmax": SOFTMAX,
    "softmax_gated": GATED_SOFTMAX,
    "gma_paper": GMA_PAPER,
    # In the paper's initialisation one component takes nearly everything at first
    "gma_paper_wide": replace(
        GMA_PAPER, name="GMA, paper block, variance_init 16", overrides=lambda n: {"variance_init": 16.0}
    ),
    "gma_gated": GMA_GATED,
    "gma_correlated": GMA_CORRELATED,
    "gma_delta": GMA_DELTA,
    "elu": Mixer(
        "linear attention, elu + 1", "paper", memory=memories.EluMemory, program=PLAIN,
        state=lambda config: config.num_attention_heads * config.head_dim * (config.head_dim + 1),
    ),
    "performer": Mixer(
        "Performer, fixed features", "paper", memory=memories.PerformerMemory, state=state_by_components, program=PLAIN
    ),
    "linformer": Mixer("Linformer", "paper", memory=memories.LinformerMemory, only="bidirectional", program=PLAIN),
    "linear_gated": UNIT_LINEAR,
    "step_gated": STEP_LINEAR,
    "gated_delta_net": DELTA,
    "mamba2": MAMBA2,
    "hybrid": Mixer(
        "hybrid: 1 softmax layer in 4, others GMA gated", "gated", lambda n: {"layer_types": hybrid_layers(n)}
    ),
    "correlated_normal": CORRELATED_NORMAL,
    "delta_normal": variant(GMA_DELTA, "means drawn independently", mean_init="normal"),
    "correlated_weight_one": variant(GMA_CORRELATED, "write weight one", use_write_weight=False),
    "correlated_loud": variant(CORRELATED_NORMAL, "output not scaled", scale_output_init=False),
    "correlated_untied": variant(CORRELATED_NORMAL, "q and k not tied", tie_qk_init=False),
    "correlated_raw": variant(CORRELATED_NORMAL, "without qk-norm", use_qk_norm=False),
    "correlated_narrow": variant(CORRELATED_NORMAL, "variance 3", variance_init=3.0),
    "gated_eps": variant(GMA_GATED, "norm per head with epsilon 1e-5", head_norm_eps=1e-5),
    "gated_quiet": variant(GMA_GATED, "output scaled", **QUIET),
    "linear_quiet": variant(UNIT_LINEAR, "output scaled, q and k tied", head_norm_eps=1e-4, tie_qk_init=True, **QUIET),
    "alternating": replace(ALTERNATING, is_variant=True),
    "softmax_quiet": variant(GATED_SOFTMAX, "output scaled", **QUIET),
    "mamba2_quiet": variant(MAMBA2, "output scaled", **QUIET),
    "delta_quiet": variant(DELTA, "output scaled", **QUIET),
    "step_quiet": variant(STEP_LINEAR, "output scaled", head_norm_eps=1e-4, **QUIET),
}  # fmt: skip
COMPARED = [name for name, mixer in MIXERS.items() if not mixer.is_variant]


def program_of(mixer: str) -> dict:
    """What a row tells of the program that computes a rival on this machine."""
    chosen = MIXERS[mixer]
    recurrent = mixer.startswith("mamba2") or chosen.memory in (memories.UnitLinearMemory, memories.StepLinearMemory)
    return {} if chosen.program is None else {"program": program() if recurrent else chosen.program}


def make_config(mixer: str, *, is_causal: bool = True, **sizes) -> GMAConfig:
    """
    The configuration of a language model or an encoder with that mixer. `sizes` are fields of `GMAConfig`, and win over what the
    mixer needs. Mamba-2 gets twice the `num_hidden_layers`; its heads and its state have the published sizes.
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
    if chosen.is_rival:
        fields["use_cache"] = False
    return GMAConfig.from_preset(chosen.preset, **{**fields, **sizes})


def make_model(mixer: str, config: GMAConfig, model_class: type[PreTrainedModel] = GMAForCausalLM) -> PreTrainedModel:
    """A model of some class of the package with that mixer and random weights, on the default device; `config` is from `make_config`."""
    model, chosen = model_class(config), MIXERS[mixer]
    layers = model.base_model.layers
    for index, layer in enumerate(layers):
        if chosen.memory is not None:
            layer.self_attn.memory, layer.self_attn.mixture_norm = chosen.memory(config), None
        elif chosen.attention is not None:
            layer.self_attn = initialize(chosen.attention(config, index), model)
        elif chosen.layer is not None:
            layers[index] = initialize(chosen.layer(config, index), model)
    return model


def initialize(module: nn.Module, model: PreTrainedModel) -> nn.Module:
    """Linear maps and norms as in the package; then what holds them, as its class says."""

    def draw(part: nn.Module) -> None:
        model._init_weights(part)
        if hasattr(part, "reset_parameters") and type(part).__module__.startswith("benchmarks."):
            part.reset_parameters()

    return module.apply(draw)


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
    The width of the MLP that makes a model as large as the reference, or a ValueError if both would differ by more than 3%. It is
    a multiple of the first of `multiples` that brings the sizes within 1% of each other, or of the last. Mamba-2 has no MLP: where
    it takes part, make it the reference of all others.
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
