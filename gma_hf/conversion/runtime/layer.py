# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The child `gma` of a converted attention module: its mixtures, and how they replace softmax."""

import math

import torch
from torch import Tensor, nn
from transformers import initialization as init

from ...modeling.cache_gma import GMACacheLayer
from ...modeling.layout import Layout
from ...modeling.memory import NO_AFFINITY_BEHIND_CACHE, GMAMemory
from ...modeling.memory_parts import GMAMixture, GMAWindow
from ...ops.rotation.functional import Columns, Rotation, each_time


# Time scales of the forgetting gate at the beginning, in tokens, spread over the heads: next to nothing is forgotten
FORGETTING_HORIZONS = (1e3, 1e5)


def autocast_as_softmax(*states: Tensor) -> tuple[Tensor, ...]:
    """
    Queries, keys or values in the dtype of autocast, as autocast casts them for `scaled_dot_product_attention`. Linear maps
    return 16 bits, but rotary positions return float32 if hidden states are float32.
    """
    device_type = states[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return states
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in states)


class GMARouting(nn.Module):
    """
    A linear map per head, from a query or key to the point that the mixture routes: x + x W. W starts at 0, and a weight
    decay pulls W to 0. With W = 0, the point is the vector itself.
    """

    def __init__(self, num_heads: int, routing_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads, routing_dim, routing_dim))

    def reset_parameters(self):
        init.zeros_(self.weight)

    def forward(self, states: Tensor) -> Tensor:
        """`(batch, num_heads, length, routing_dim)` to the same shape."""
        weight = self.weight.to(states.dtype)
        if states.shape[0] == 1:  # product and sum in one call; more rows would need more copies of the weight
            return torch.baddbmm(states[0], states[0], weight)[None]
        return states + states @ weight

    def extra_repr(self) -> str:
        return f"num_heads={self.weight.shape[0]}, routing_dim={self.weight.shape[1]}"


class GMAForgetting(nn.Module):
    """
    How much of the past each head keeps: log a_t = -softplus(u_h . v_t + b_h). The gate reads the values, because no model
    rotates values. So the gate does not depend on the position.
    """

    def __init__(self, num_heads: int, value_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads, value_dim))
        self.bias = nn.Parameter(torch.empty(num_heads))

    def reset_parameters(self):
        init.zeros_(self.weight)
        low, high = (math.log(horizon) for horizon in FORGETTING_HORIZONS)
        rate = torch.linspace(-low, -high, self.bias.numel(), device=self.bias.device).exp()
        init.copy_(self.bias, rate.expm1().log())

    def forward(self, value: Tensor) -> Tensor:
        """Values `(batch, key_value_heads, length, value_dim)` to log decays `(batch, num_heads, length)`, in float32."""
        num_key_value_heads = value.shape[1]
        # Query head h reads key/value head h // group
        weight = self.weight.float().unflatten(0, (num_key_value_heads, -1))
        gate = (value.float() @ weight.transpose(1, 2)).permute(0, 1, 3, 2).flatten(1, 2)
        return -nn.functional.softplus(gate + self.bias.float()[:, None])

    def extra_repr(self) -> str:
        return f"num_heads={self.weight.shape[0]}, value_dim={self.weight.shape[1]}"


class GMAConversion(nn.Module):
    """
    Gaussian Mixture Attention in place of the softmax of one attention module: the child `gma` of this module.

    Args:
        num_heads (`int`): number of query heads. Each has its own mixture.
        num_key_value_heads (`int`): number of key and value heads; divides `num_heads`.
        routing_dim (`int`): dimension of queries and keys.
        value_dim (`int`): dimension of values.
        is_causal (`bool`): whether a token sees the tokens before it only.
        rotary_dim (`int`, *optional*, defaults to `0`): how many of the first dimensions of queries and keys have rotary
            positions that are undone, fully or partly, before the routing.
        undone_columns (`list[tuple[int, int]]`, *optional*): ranges of the columns of cosines and sines, first and last + 1,
            whose rotations are undone; by default all columns.
        num_components (`int`): components per mixture.
        window_size (`int`): number of nearest tokens that are seen exactly, by softmax; 0 for none.
        num_sink_tokens (`int`, *optional*, defaults to `0`): number of first tokens of a sequence that stay exactly visible
            behind the window; causal modules only.
        use_routing_projections (`bool`): whether queries and keys pass a learned map before the routing.
        use_forgetting (`bool`): whether the memory forgets; causal modules only.
        variance_floor (`float`): smallest variance.
        read_eps (`float`): constant added to the normaliser of the read.
        mean_init_std (`float`): standard deviation of the means before calibration.
        variance_init (`float`): variance of the components before calibration.

    Attributes:
        mixture_norm (`GMAMixture`): the mixtures. A forward pre-hook on this module sees queries and keys as they are
            routed.
        q_routing (`GMARouting` or `None`): the maps of the queries, one per query head.
        k_routing (`GMARouting` or `None`): the maps of the keys, one per key head.
        forgetting (`GMAForgetting` or `None`): the forgetting gate.
        window_norm (`GMAWindow` or `None`): the softmax window.
    """

    def __init__(
        self,
        num_heads: int,
        num_key_value_heads: int,
        routing_dim: int,
        value_dim: int,
        is_causal: bool,
        rotary_dim: int = 0,  # as in configurations from before it
        undone_columns: Columns | None = None,  # likewise
        *,
        num_components: int,
        window_size: int,
        num_sink_tokens: int = 0,  # as in configurations from before it
        use_routing_projections: bool,
        use_forgetting: bool,
        variance_floor: float,
        read_eps: float,
        mean_init_std: float,
        variance_init: float,
    ):
        super().__init__()
        self.num_heads = num_heads
        self.num_key_value_heads = num_key_value_heads
        self.routing_dim = routing_dim
        self.value_dim = value_dim
        self.is_causal = is_causal
        self.rotary_dim = rotary_dim
        self.undone_columns = undone_columns
        self.mean_init_std = mean_init_std
        self.variance_init = variance_init

        self.memory = GMAMemory()
        self.mixture_norm = GMAMixture(num_heads, num_components, routing_dim, variance_floor, read_eps)
        self.q_routing = self.k_routing = self.forgetting = self.window_norm = None
        if use_routing_projections:
            self.q_routing = GMARouting(num_heads, routing_dim)
            self.k_routing = GMARouting(num_key_value_heads, routing_dim)
        if use_forgetting and is_causal:
            self.forgetting = GMAForgetting(num_heads, value_dim)
        if window_size > 0:
            self.window_norm = GMAWindow(num_heads, routing_dim, window_size, num_sink_tokens if is_causal else 0)

    def reset_parameters(self):
        """Initialise all parameters. Parameters that were loaded from a checkpoint keep their values."""
        self.mixture_norm.reset_parameters(self.mean_init_std, self.variance_init, balanced_priors=True)
        for module in (self.q_routing, self.k_routing, self.forgetting, self.window_norm):
            if module is not None:
                module.reset_parameters()

    def route(
        self, query: Tensor, key: Tensor, rotation: Rotation | None = None, layout: Layout | None = None
    ) -> tuple[Tensor, Tensor]:
        """
        The points that the mixtures route.

        Args:
            query (`torch.Tensor` of shape `(batch, num_heads, length, routing_dim)`): queries as softmax would get them.
            key (`torch.Tensor` of shape `(batch, num_key_value_heads, length, routing_dim)`): keys as softmax would get
                them.
            rotation (`Rotation`, *optional*): the rotation of queries and keys. Needed if `rotary_dim` is not 0.
            layout (`Layout`, *optional*): the layout of the tokens. It keeps the inverse of the rotation for the other
                layers.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: queries and keys, in their shapes.

        Raises:
            ValueError: if the rotation is missing.
        """
        if self.rotary_dim > 0:
            if rotation is None:
                raise ValueError(
                    f"The layer undoes the rotary positions of {self.rotary_dim} dimensions, but its attention module was "
                    "called without `position_embeddings=(cos, sin)`. Pass them, or convert with `undo_rotation=False`."
                )
            once = each_time if layout is None else layout.once
            query, key = rotation.undo(query, key, self.rotary_dim, self.undone_columns, once)
        if self.q_routing is not None:
            query, key = self.q_routing(query), self.k_routing(key)
        return query, key

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: Layout | None = None,
        *,
        scaling: float | None = None,
        is_causal: bool | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        rotation: Rotation | None = None,
        cache_layer: GMACacheLayer | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """
        Compute the attention of the module.

        Args:
            query (`torch.Tensor` of shape `(batch, num_heads, length, routing_dim)`): queries as softmax would get them.
            key (`torch.Tensor` of shape `(batch, num_key_value_heads, length, routing_dim)`): keys of the current tokens.
            value (`torch.Tensor` of shape `(batch, num_key_value_heads, length, value_dim)`): values of the current tokens.
            layout (`Layout`, *optional*): padding and packed sequences.
            scaling (`float`, *optional*): factor of the logits of the window; by default `routing_dim ** -0.5`.
            is_causal (`bool`, *optional*): overrides `is_causal` of the module.
            softcap (`float`, *optional*): soft cap of the logits of the window.
            sinks (`torch.Tensor` of shape `(num_heads,)`, *optional*): learned logits that join the normaliser of the
                window.
            rotation (`Rotation`, *optional*): the rotation of queries and keys. Needed if `rotary_dim` is not 0.
            cache_layer (`GMACacheLayer`, *optional*): the state to continue from. The call updates it.
            output_attentions (`bool`, *optional*, defaults to `False`): whether to return the implied affinity.

        Returns:
            `tuple[torch.Tensor, torch.Tensor or None]`: the output `(batch, num_heads, length, value_dim)`, and the implied
            affinity `(batch, num_heads, length, length)` or `None`.

        Raises:
            ValueError: if the numbers of queries and keys differ, if a bidirectional layer gets a cache, or if the affinity
                is requested with a cache that has seen tokens.
        """
        length = query.shape[2]
        causal = self.is_causal if is_causal is None else is_causal
        if key.shape[2] != length:
            raise ValueError(
                f"A GMA layer got {length} queries and {key.shape[2]} keys; it needs as many keys as queries. Pass the "
                "cache to the model, and keep attention to other tokens (cross-attention) softmax."
            )
        if cache_layer is not None and not causal:
            raise ValueError("A bidirectional layer has no state to continue from: do not pass a cache.")
        history = None if cache_layer is None else cache_layer.history
        if output_attentions and history is not None:
            raise ValueError(NO_AFFINITY_BEHIND_CACHE)

        log_decay = self.forgetting(value) if self.forgetting is not None and causal else None
        routing_query, routing_key = self.route(query, key, rotation, layout)
        is_routed_as_is = routing_key is key
        query, key, value, routing_query, routing_key = autocast_as_softmax(
            query, key, value, routing_query, routing_key
        )
        routed = {}
        if self.window_norm is None:
            query, key = routing_query, routing_key
        elif not is_routed_as_is:
            routed = {"routing_query": routing_query, "routing_key": routing_key}
            routed["weigh_by_routing"] = self.rotary_dim > 0
        output, weights, history = self.memory(
            self.mixture_norm,
            self.window_norm,
            query,
            key,
            value,
            layout=layout,
            causal=causal,
            scaling=self.routing_dim**-0.5 if scaling is None else scaling,
            log_decay=log_decay,
            softcap=softcap,
            sinks=sinks,
            history=history,
            output_history=cache_layer is not None,
            output_affinity=output_attentions,
            kept=None if cache_layer is None else cache_layer.kept,
            **routed,
        )
        if cache_layer is not None:
            is_plain = layout is None or layout.is_plain
            if layout is not None and layout.row is not None:
                history, length, is_plain = layout.row.last_history(history)
            cache_layer.advance(history, length, is_plain)
        return output, weights

    def extra_repr(self) -> str:
        """The sizes of the layer."""
        heads = f"num_heads={self.num_heads}, num_key_value_heads={self.num_key_value_heads}"
        rotary_dim = f", rotary_dim={self.rotary_dim}" if self.rotary_dim > 0 else ""
        return f"{heads}, is_causal={self.is_causal}{rotary_dim}"
