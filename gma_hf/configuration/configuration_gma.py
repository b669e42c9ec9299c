# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Configuration of the GMA models."""

import os
from dataclasses import fields
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from ..cache_argument import CACHE_NAME
from ..compat import LARGEST_INTEGER, share_adapter_defaults
from ..remote_code import add_remote_code, write_whole
from .validation import expect_positive, expect_possible, raises_value_errors, refuse_misspelt


# Short convolution instead of positions, learned forgetting and write weight, un-normalised read, a norm per head and a gate.
# RoPE serves the softmax layers of hybrids only.
GATED_BLOCK: dict[str, Any] = {
    "position_embedding_type": "rope",
    "rope_on_routing": False,
    "normalize_read": False,
    "conv_kernel_size": 4,
    "use_write_weight": True,
    "use_decay": True,
    "use_output_gate": True,
    "mean_init_std": 0.5,
    "prior_init": "balanced",
}

# Correlated routes. With wide variances, the gradient of the responsibilities does not vanish. Orthogonal means compare routes
# as the cosine compares tokens at first. With small first outputs, the mixer does not drown the embeddings.
CORRELATED_BLOCK: dict[str, Any] = {
    **GATED_BLOCK,
    "correlate": True,
    "use_qk_norm": True,
    "variance_init": 10.0,
    "mean_init": "orthogonal",
    "head_norm_eps": 1e-4,
    "tie_qk_init": True,
    "scale_output_init": True,
}

# The documented blocks. Options that a preset does not set keep the default of `GMAConfig`.
GMA_PRESETS: dict[str, dict[str, Any]] = {
    # The block of the paper: normalised read, every token writes with weight one, nothing is forgotten, learned
    # absolute positions. These are the defaults of `GMAConfig`, so the entry is empty.
    "paper": {},
    # The block that takes windows.
    "gated": GATED_BLOCK,
    # The gated block with correlated routes: the same speed, lower perplexity, and recall.
    "correlated": CORRELATED_BLOCK,
    # Tokens write only what the memory does not say yet: the most recall, at a slower training.
    "delta": {**CORRELATED_BLOCK, "use_delta_rule": True, "use_write_weight": False},
}


@raises_value_errors
@strict
class GMAConfig(PreTrainedConfig):
    """
    Configuration of a Gaussian Mixture Attention model (Huang and Raza, arXiv:2606.18283). `GMAConfig()` is the paper's
    block. `GMAConfig.from_preset("correlated")` is the block for language models, `GMAConfig.from_preset("delta")` the block for
    recall, and `GMAConfig.from_preset("gated")` the block that takes windows.

    Args:
        vocab_size (`int`, *optional*, defaults to `32000`): size of the vocabulary.
        hidden_size (`int`, *optional*, defaults to `768`): width of the residual stream.
        intermediate_size (`int`, *optional*, defaults to `2048`): width of the SwiGLU MLP.
        num_hidden_layers (`int`, *optional*, defaults to `12`): number of layers.
        num_attention_heads (`int`, *optional*, defaults to `12`): number of heads. Every head of a GMA layer has its own
            mixture.
        num_key_value_heads (`int`, *optional*): number of key and value heads (grouped-query attention); divides
            `num_attention_heads`, which is the default.
        head_dim (`int`, *optional*): dimension of a value (and, in softmax layers, of a query and a key); by default
            `hidden_size // num_attention_heads`.
        routing_dim (`int`, *optional*): dimension of the queries and keys of GMA layers, the space of the mixture; by
            default `head_dim`.
        num_components (`int`, *optional*, defaults to `64`): number of Gaussian components per head (the paper's K), which
            are the slots of the memory.
        layer_types (`list[str]`, *optional*): one entry per layer: `"linear_attention"` is GMA, `"full_attention"` is
            softmax. By default all layers are GMA.
        is_causal (`bool`, *optional*, defaults to `True`): `True` for language models, `False` for bidirectional encoders.
        position_embedding_type (`str`, *optional*, defaults to `"learned"`): `"learned"` adds learned absolute positions to
            the embeddings, `"rope"` rotates queries and keys, `"none"` gives no positions.
        rope_on_routing (`bool`, *optional*, defaults to `True`): with `position_embedding_type="rope"`, whether GMA layers
            rotate their queries and keys as the softmax layers do.
        rope_parameters (`RopeParameters`, *optional*): RoPE in the form of Transformers: `rope_theta`, `rope_type` and the
            parameters of this type.
        max_position_embeddings (`int`, *optional*, defaults to `2048`): number of learned positions. Only learned positions
            limit the length of a sequence.
        normalize_read (`bool`, *optional*, defaults to `True`): whether to divide the read by the accumulated responsibility
            (the paper). Otherwise a norm per head follows the read.
        correlate (`bool`, *optional*, defaults to `False`): whether tokens write and read by the correlation of their routes
            instead of by responsibilities, see [`gaussian_mixture_attention`]. Needs `normalize_read=False`, at least two
            components, and no window.
        use_delta_rule (`bool`, *optional*, defaults to `False`): whether a token writes only what the memory does not say yet
            for its key, with a learned strength per token and head (the delta rule), see [`gaussian_mixture_attention`].
            Needs `is_causal`, `normalize_read=False`, `use_write_weight=False`, and no window.
        use_qk_norm (`bool`, *optional*, defaults to `False`): RMS norms on the queries and keys of GMA layers, after the
            short convolution.
        conv_kernel_size (`int`, *optional*, defaults to `0`): width of the depthwise short convolution (with SiLU) on
            queries, keys and values of GMA layers; 0 for none.
        window_size (`int`, *optional*, defaults to `0`): number of nearest tokens that GMA layers see exactly, by softmax: a
            token itself and the `window_size - 1` tokens before it, or `window_size` tokens to each side if not `is_causal`.
            The mixture holds older tokens. Softmax and mixture share one normaliser, also with `normalize_read=False`. 0 for
            no window.
        num_sink_tokens (`int`, *optional*, defaults to `0`): number of first tokens of each sequence that later tokens see
            exactly when they have left the window (attention sinks, arXiv:2309.17453). The mixture does not hold these
            tokens. Needs `is_causal` and a window.
        use_write_weight (`bool`, *optional*, defaults to `False`): a learned write weight `w_t = softplus(...)` per token
            and head. Otherwise 1.
        use_decay (`bool`, *optional*, defaults to `False`): a learned forgetting factor `a_t = exp(-A * softplus(...))` per
            token and head. Otherwise 1. Needs `is_causal`.
        use_output_gate (`bool`, *optional*, defaults to `False`): a norm per head and a SiLU gate on the reads of the heads.
        head_norm_eps (`float`, *optional*): epsilon of the norm per head. Reads below its square root stay small. By default
            `rms_norm_eps`.
        read_eps (`float`, *optional*, defaults to `1e-06`): constant that keeps the normaliser of the read away from zero.
        variance_floor (`float`, *optional*, defaults to `0.0001`): smallest variance of a component in any dimension.
        mean_init (`str`, *optional*, defaults to `"normal"`): initial means of the components: `"normal"`, or `"orthogonal"`,
            vectors of the same typical length in orthogonal directions. With wide variances, the correlation of two routes
            then is nearly the cosine between the two tokens at first.
        mean_init_std (`float`, *optional*, defaults to `1.0`): standard deviation of the initial means of the components.
        variance_init (`float`, *optional*, defaults to `0.6931472`): initial variance of the components; must exceed
            `variance_floor`. The default is softplus(0), as in the paper. With it, one component is responsible for nearly
            all of a token in 64 dimensions; 16 is much better for the paper's block (docs/results.md).
        prior_init (`str`, *optional*, defaults to `"uniform"`): initial priors: `"uniform"`, or `"balanced"`, which makes
            all components equally responsible for x = 0.
        tie_qk_init (`bool`, *optional*, defaults to `False`): initialise the query projection of GMA layers as a copy of the
            key projection, so that a token starts with the same route as a query and as a key.
        scale_output_init (`bool`, *optional*, defaults to `False`): initialise the output projections of GMA layers with
            `initializer_range / sqrt(2 * num_hidden_layers)`, as GPT-2 does.
        time_step_min (`float`, *optional*, defaults to `0.001`): smallest initial step. The initial steps of write weights
            and decays are drawn log-uniformly from [`time_step_min`, `time_step_max`], as in Mamba-2.
        time_step_max (`float`, *optional*, defaults to `0.1`): largest initial step.
        decay_rate_range (`tuple[float, float]`, *optional*, defaults to `(1.0, 16.0)`): range of the initial decay rates A.
        hidden_act (`str`, *optional*, defaults to `"silu"`): activation of the MLP.
        hidden_dropout (`float`, *optional*, defaults to `0.0`): dropout on the embeddings and on the output of every
            attention and MLP block.
        attention_dropout (`float`, *optional*, defaults to `0.0`): dropout on the attention weights of the softmax layers.
        classifier_dropout (`float`, *optional*, defaults to `0.0`): dropout before the classification heads.
        attention_bias (`bool`, *optional*, defaults to `False`): biases in the query, key, value and output projections.
        mlp_bias (`bool`, *optional*, defaults to `False`): biases in the MLP.
        rms_norm_eps (`float`, *optional*, defaults to `1e-06`): epsilon of the RMS norms.
        initializer_range (`float`, *optional*, defaults to `0.02`): standard deviation of the initial projections and
            embeddings.
        use_cache (`bool`, *optional*, defaults to `True`): whether the model returns its state, for generation.
        pad_token_id (`int`, *optional*): id of the padding token.
        bos_token_id (`int`, *optional*): id of the token at the beginning of a text.
        eos_token_id (`int` or `list[int]`, *optional*): id of the token at the end of a text, or several such ids.
        tie_word_embeddings (`bool`, *optional*, defaults to `True`): whether input and output embeddings share their
            weights.

    Raises:
        ValueError: for every impossible value or combination. The message gives the valid choice.

    ```python
    >>> from gma_hf import GMAConfig, GMAForCausalLM

    >>> config = GMAConfig.from_preset("gated", hidden_size=256, num_hidden_layers=4, num_attention_heads=4)
    >>> model = GMAForCausalLM(config)
    ```
    """

    model_type = "gma"
    keys_to_ignore_at_inference = [CACHE_NAME]
    # The parameters of a mixture, of the convolution and of the forgetting belong to whole heads; attention itself is
    # cheap. So the projections are computed in shards and gathered, and every rank runs the attention.
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise_gather_output",
        "layers.*.self_attn.k_proj": "colwise_gather_output",
        "layers.*.self_attn.v_proj": "colwise_gather_output",
        "layers.*.self_attn.o_proj": "rowwise_split_input",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 32000
    hidden_size: int = 768
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    routing_dim: int | None = None
    num_components: int = 64
    layer_types: list[str] | None = None
    is_causal: bool = True
    position_embedding_type: str = "learned"
    rope_on_routing: bool = True
    rope_parameters: dict | None = None
    max_position_embeddings: int = 2048
    normalize_read: bool = True
    correlate: bool = False
    use_delta_rule: bool = False
    use_qk_norm: bool = False
    conv_kernel_size: int = 0
    window_size: int = 0
    num_sink_tokens: int = 0
    use_write_weight: bool = False
    use_decay: bool = False
    use_output_gate: bool = False
    head_norm_eps: float | int | None = None
    read_eps: float | int = 1e-6
    variance_floor: float | int = 1e-4
    mean_init: str = "normal"
    mean_init_std: float | int = 1.0
    variance_init: float | int = 0.6931472
    prior_init: str = "uniform"
    tie_qk_init: bool = False
    scale_output_init: bool = False
    time_step_min: float | int = 1e-3
    time_step_max: float | int = 1e-1
    decay_rate_range: list[float | int] | tuple[float | int, ...] = (1.0, 16.0)
    hidden_act: str = "silu"
    hidden_dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    classifier_dropout: float | int = 0.0
    attention_bias: bool = False
    mlp_bias: bool = False
    rms_norm_eps: float | int = 1e-6
    initializer_range: float | int = 0.02
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        refuse_misspelt(type(self), kwargs)
        for field in fields(type(self)):
            # An integer for a float field, such as 16, means 16.0, from Python and from a JSON file
            value = getattr(self, field.name)
            if type(value) is bool and field.type in (int, int | None, float | int, float | int | None):
                # Older versions of huggingface_hub take True for 1
                raise ValueError(f"`{field.name}` must be a number, got {value}.")
            if field.type in (float | int, float | int | None) and type(value) is int:
                setattr(self, field.name, float(value))
            elif type(value) is int and value > LARGEST_INTEGER:
                raise ValueError(f"`{field.name}` must be at most {LARGEST_INTEGER}, got {value}.")
        # Checked first, because the derived values below divide by them
        for name in ("hidden_size", "num_attention_heads", "num_hidden_layers"):
            expect_positive(self, name)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads != 0:
                raise ValueError(
                    f"`hidden_size` ({self.hidden_size}) is not a multiple of `num_attention_heads` "
                    f"({self.num_attention_heads}). Choose a multiple, or set `head_dim` yourself."
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.routing_dim is None:
            self.routing_dim = self.head_dim
        if self.layer_types is None:
            self.layer_types = ["linear_attention"] * self.num_hidden_layers
        super().__post_init__(**kwargs)

    @classmethod
    def from_preset(cls, preset: str, **overrides) -> "GMAConfig":
        """
        The configuration of one of the documented blocks.

        Args:
            preset (`str`): `"paper"`, `"gated"`, `"correlated"` or `"delta"`. Bidirectional, the presets do without
                decay and delta rule, which need an order, and `"delta"` is `"correlated"`.
            overrides (`Any`, *optional*): fields of the configuration. They override the preset.

        Returns:
            [`GMAConfig`]: the configuration.

        Raises:
            ValueError: if there is no such preset, or the overrides are impossible.
        """
        if preset not in GMA_PRESETS:
            raise ValueError(f"There is no preset {preset!r}. Choose one of {sorted(GMA_PRESETS)}.")
        is_causal = overrides.get("is_causal", True)
        values = dict(GMA_PRESETS["correlated" if preset == "delta" and not is_causal else preset])
        if not is_causal:
            values.pop("use_decay", None)
        return cls(**{**values, **overrides})

    def validate_architecture(self):
        """
        Check for impossible values and combinations, as part of the `@strict` validation. The messages give the valid
        choice.
        """
        expect_possible(self)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """
        The configuration from a dictionary. Keywords override single values, and all values are checked together. See
        [`PreTrainedConfig.from_dict`] for the arguments.
        """
        refuse_misspelt(cls, kwargs)
        config = super().from_dict(config_dict, **kwargs)
        (config[0] if isinstance(config, tuple) else config).validate()
        return config

    def update_from_string(self, update_str: str):
        """
        Change fields by `"name=value,name=value"`, and check the result. See [`PreTrainedConfig.update_from_string`] for the
        arguments.
        """
        super().update_from_string(update_str)
        self.validate()

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoConfig"):
        """Do nothing: every folder that [`save_pretrained`] writes already loads with `trust_remote_code=True`."""

    def to_dict(self) -> dict[str, Any]:
        """The configuration as a dictionary. PEFT reads from it which modules to adapt."""
        share_adapter_defaults()
        return super().to_dict()

    def to_json_file(self, json_file_path: str | os.PathLike, use_diff: bool = True):
        """Write the configuration in one step. See [`PreTrainedConfig.to_json_file`] for the arguments."""
        write_whole(json_file_path, self.to_json_string(use_diff=use_diff))

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs):
        """
        Save the configuration, and a small file with which programs that do not import gma_hf load the folder by
        `trust_remote_code=True`. See [`PreTrainedConfig.save_pretrained`] for the arguments.
        """
        add_remote_code(self, save_directory)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)


__all__ = ["GMA_PRESETS", "GMAConfig"]
