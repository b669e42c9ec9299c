# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
The memory of a layer: what the layer remembers, and how it reads. Native layers and converted layers share this module.

    without a window    o_i = read of the mixture after token i
    with a window       o_i = softmax over the W nearest tokens, the sink tokens and the memory, see `memory_parts.py`

A layer computes queries, keys, values, write weights and decays of its tokens. [`GMAMemory`] writes the tokens, reads for
every query, and returns a [`MemoryState`] for the next call.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import is_tracing

from ..ops.attention.functional import without_autocast
from ..ops.window.functional import EMPTY, accumulation_dtype
from ..ops.window.plan import WindowPlan, first_tokens, last_tokens, padding_first, plan_window, take_tokens, token_dim
from .layout import Layout
from .memory_parts import GMAWindow
from .memory_state import (
    KeptValues,
    MemoryState,
    Tokens,
    is_step,
    join_history,
    leave_window,
    new_history,
    rows,
    shifted,
    sink_tokens_of,
    take_queries,
)


NO_AFFINITY_BEHIND_CACHE = (
    "`output_attentions=True` needs all tokens at once: a GMA state does not know the single tokens that built it. Run "
    "without a cache (`use_cache=False`)."
)


class GMAMemory(nn.Module):
    """
    Write and read. This module has no parameters: the layer passes its mixture and its window. A forward pre-hook sees the
    queries and keys of all tokens of a call.
    """

    def forward(
        self,
        mixture: nn.Module,
        window: GMAWindow | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        layout: Layout | None = None,
        causal: bool = True,
        normalize: bool = True,
        scaling: float | None = None,
        routing_query: Tensor | None = None,
        routing_key: Tensor | None = None,
        weigh_by_routing: bool = False,
        write_weight: Tensor | None = None,
        log_decay: Tensor | None = None,
        decay_rate: Tensor | None = None,
        delta_strength: Tensor | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        history: MemoryState | None = None,
        output_history: bool = False,
        output_affinity: bool = False,
        kept: KeptValues | None = None,
    ) -> tuple[Tensor, Tensor | None, MemoryState | None]:
        """
        Write the tokens of a call, and read for each query.

        Args:
            mixture (`GMAMixture`): routes and remembers.
            window (`GMAWindow`, *optional*): sees the nearest tokens by softmax. Window and memory share one normaliser,
                whatever `normalize` says.
            query (`torch.Tensor` of shape `(batch, num_heads, length, head_dim)`): queries.
            key (`torch.Tensor` of shape `(batch, key_value_heads, length, head_dim)`): keys.
            value (`torch.Tensor` of shape `(batch, key_value_heads, length, value_dim)`): values.
            layout ([`Layout`], *optional*): padding and packed sequences. A history belongs to the first sequence of its
                row.
            causal (`bool`, *optional*, defaults to `True`): whether a token sees the tokens before it only.
            normalize (`bool`, *optional*, defaults to `True`): whether the read is divided by the accumulated weight.
            scaling (`float`, *optional*): factor of the logits of the window, by default `head_dim ** -0.5`.
            routing_query, routing_key (`torch.Tensor`, *optional*): queries and keys for the mixture, of its own dimension;
            by default `query` and `key`.
            weigh_by_routing (`bool`, *optional*, defaults to `False`): whether u . q_i of the routing query weighs the
                memory behind a window.
            write_weight, log_decay (`torch.Tensor` of shape `(batch, h, length)`, *optional*): see
            [`gaussian_mixture_attention`]. Values at padding do not count.
            decay_rate (`torch.Tensor` of shape `(h, 1)`, *optional*): log a / w, instead of `log_decay`.
            delta_strength (`torch.Tensor` of shape `(batch, h, length)`, *optional*): see [`gaussian_mixture_attention`];
                without a window only.
            softcap (`float`, *optional*): c: the logits s of the window become c tanh(s / c).
            sinks (`torch.Tensor` of shape `(num_heads,)`, *optional*): logits that join the normaliser of the window only.
            history ([`MemoryState`], *optional*): the state that an earlier call returned; causal only.
            output_history (`bool`, *optional*, defaults to `False`): whether to return the new state; causal only.
            output_affinity (`bool`, *optional*, defaults to `False`): whether to return the matrix that the attention
                implies.
            kept ([`KeptValues`], *optional*): values that depend on parameters alone.

        Returns:
            `tuple`: the output `(batch, num_heads, length, value_dim)` in the dtype of `value`; the matrix `(batch,
            num_heads, length, length)` in float32 or `None`; the new [`MemoryState`] or `None`.

        Raises:
            ValueError: if the arguments do not fit each other.
        """
        layout = Layout(query.shape[0], query.shape[2]) if layout is None else layout
        self._check(window, query, causal, log_decay, history, output_history)
        value_dim, dtype = value.shape[3], value.dtype
        if output_affinity:
            # The matrix is the output of the attention for the identity as values
            identity = torch.eye(key.shape[2], dtype=torch.promote_types(dtype, torch.float32), device=key.device)
            value = torch.cat([value.to(identity.dtype), identity.expand(*value.shape[:2], -1, -1)], dim=-1)
        if window is None:
            output, history = self._read(
                mixture, query if routing_query is None else routing_query,
                Tokens(key, value, routing_key, write_weight, log_decay), layout, causal, normalize, history, output_history,
                kept, decay_rate, delta_strength,
            )  # fmt: skip
        else:
            scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
            output, history = self._read_behind_window(
                mixture, window, query, query if routing_query is None else routing_query,
                Tokens(key, value, routing_key, write_weight, log_decay), layout, causal, history, output_history, kept,
                decay_rate, weigh_by_routing=weigh_by_routing, scaling=scaling, softcap=softcap, sinks=sinks,
            )  # fmt: skip
        if not output_affinity:
            return output, None, history
        if output_history:
            history = history._replace(state=history.state[..., :value_dim])
            if window is not None:
                kept_values = {"values": history.values, "sink_values": history.sink_values}
                kept_values = {name: None if x is None else x[..., :value_dim] for name, x in kept_values.items()}
                history = history._replace(**kept_values)
        return output[..., :value_dim].to(dtype), output[..., value_dim:], history

    def affinity(self, mixture: nn.Module, window: GMAWindow | None, query: Tensor, key: Tensor, **kwargs) -> Tensor:
        """
        The matrix `(batch, num_heads, length, length)` that the attention implies, for analysis: its cost is quadratic.
        Behind a window its rows sum to 1 (to less with `sinks`, to 0 at padding). See `forward` for the arguments.
        """
        return self.forward(mixture, window, query, key, key[..., :0], output_affinity=True, **kwargs)[1]

    def _read(
        self, mixture: nn.Module, routing_query: Tensor, tokens: Tokens, layout: Layout, causal: bool, normalize: bool,
        history: MemoryState | None, output_history: bool, kept: KeptValues | None, decay_rate: Tensor | None,
        delta_strength: Tensor | None,
    ) -> tuple[Tensor, MemoryState | None]:  # fmt: skip
        """Read without a window."""
        if delta_strength is not None and layout.row is not None:
            raise ValueError(
                "Processes cannot share a sequence of a model with `use_delta_rule=True`: what a token writes depends on the "
                "memory before it. Leave `context_parallel`, or train with data parallelism."
            )
        write_weight, log_decay = tokens.write_weight, tokens.log_decay
        if layout.padding_mask is not None:
            if write_weight is None:
                write_weight = layout.write_weight
            else:
                write_weight = write_weight.masked_fill(layout.is_missing(1), 0.0)
            if log_decay is not None:
                log_decay = log_decay.masked_fill(layout.is_missing(1), 0.0)
        if decay_rate is not None:
            log_decay = decay_rate * write_weight
        routing_keys = tokens.keys if tokens.routing_keys is None else tokens.routing_keys
        if layout.row is not None and not causal:
            values = tokens.values
            return layout.row.read_both_sides(
                mixture, routing_query, routing_keys, values, write_weight, normalize=normalize
            ), None
        initial_state = None if history is None else history[:2]
        if layout.row is not None:
            initial_state = layout.row.state_before(
                mixture, routing_keys, tokens.values, write_weight, log_decay, layout.sequence_ids, causal=causal
            )
        result = mixture(
            routing_query, routing_keys, tokens.values, causal=causal, write_weight=write_weight, log_decay=log_decay,
            sequence_ids=layout.sequence_ids if layout.sequences is None else layout.sequences, normalize=normalize,
            initial_state=initial_state, slots=None if history is None else history.slots,
            output_final_state=output_history, kept=kept, writes_all=layout.padding_mask is None,
            delta_strength=delta_strength,
        )  # fmt: skip
        return (result[0], MemoryState(*result[1])) if output_history else (result, None)

    def _read_behind_window(
        self, mixture: nn.Module, window: GMAWindow, query: Tensor, routing_query: Tensor, tokens: Tokens, layout: Layout,
        causal: bool, history: MemoryState | None, output_history: bool, kept: KeptValues | None, decay_rate: Tensor | None,
        *, weigh_by_routing: bool, scaling: float, softcap: float | None, sinks: Tensor | None,
    ) -> tuple[Tensor, MemoryState | None]:  # fmt: skip
        """Read with a window."""
        (batch_size, _, length, _), device = query.shape, query.device
        if is_step(tokens, layout, history):
            return self._step(
                mixture, window, query, routing_query, tokens, history, kept, decay_rate, weigh_by_routing, scaling, softcap,
                sinks,
            )  # fmt: skip
        if layout.row is not None and not causal:
            output = layout.row.read_around_window(
                mixture, window, query, routing_query, tokens, weigh_by_routing=weigh_by_routing, scaling=scaling,
                softcap=softcap, sinks=sinks,
            )  # fmt: skip
            return output, None
        num_sinks = window.num_sink_tokens if causal else 0
        size = window.window_size
        dtype = accumulation_dtype(query, tokens.values)
        order, near, link = None, tokens, None
        if layout.row is not None:
            history, link = layout.row.window_before(tokens, size, num_sinks)
        # A symbolic length (torch.export) is no int, and the graph must not depend on its value
        if causal and (history is not None or not isinstance(length, int) or length == 0):
            tokens, valid, runs = join_history(tokens, layout, history, size + num_sinks)
            num_tokens = tokens.keys.shape[2]
            if layout.padding_mask is not None:
                order, inverse = padding_first(valid)
                valid, runs = (None if x is None else x.gather(1, order) for x in (valid, runs))
                tokens = tokens.map(lambda x: take_tokens(x, order))
                query, routing_query = (take_queries(x, order) for x in (query, routing_query))
            before = None if history is None else history.count
            plan = plan_window(
                batch_size, num_tokens, valid, runs, size, size, num_sinks, causal, dtype, device, length=length,
                before=max(before, 0) if isinstance(before, int) else before,
            )  # fmt: skip
            near = tokens.map(lambda x: last_tokens(x, size + length))
            near_valid, near_runs = (None if x is None else last_tokens(x, size + length) for x in plan[:2])
        else:
            plan = layout.window(size, num_sinks, causal, dtype, device, output_history)
            if layout.order is not None:
                is_same = routing_query is query
                query = layout.sort(query, 2)
                routing_query = query if is_same else layout.sort(routing_query, 2)
                near = tokens = tokens.map(lambda x: layout.sort(x, token_dim(x)))
            near_valid, near_runs = plan[:2]

        with without_autocast(device.type):
            read, log_weight, state = self._read_memory(
                mixture, routing_query, tokens, plan, causal, history, output_history, decay_rate, layout.row, link
            )
            output = window(
                query, near.keys, near.values, near_valid, near_runs, read, log_weight, plan.growth,
                weighing_query=routing_query if weigh_by_routing else None, sinks=sinks,
                sink_tokens=None if plan.sink_places is None else sink_tokens_of(tokens, plan), num_leading=plan.num_leading,
                size=plan.size, causal=causal, scaling=scaling, softcap=softcap,
            )  # fmt: skip
        if order is not None:
            back = inverse[:, -length:] - (order.shape[1] - length)
            output = take_tokens(output, back.clamp(min=0))
        elif layout.order is not None:
            output = layout.unsort(output, 2)
        if layout.padding_mask is not None:
            output = output.masked_fill(layout.is_missing(1)[..., None], 0)
        if not output_history:
            return output, None
        count = rows(plan.count, batch_size)
        if layout.is_plain and isinstance(length, int) and not is_tracing(query):
            if history is None:
                count = length - size - num_sinks
            elif isinstance(history.count, int):
                count = history.count + length
        return output, new_history(layout, tokens, plan, size, num_sinks, state, count)

    def _read_memory(
        self, mixture: nn.Module, routing_query: Tensor, tokens: Tokens, plan: WindowPlan, causal: bool,
        history: MemoryState | None, output_history: bool, decay_rate: Tensor | None, row: Any, link: Tensor | None,
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:  # fmt: skip
        """
        The read r `(batch, num_heads, asked, value_dim)` and log D `(batch, num_heads, asked)` of the last `asked` queries,
        which have a memory, and the last S and z.
        """
        batch_size, asked = routing_query.shape[0], plan.asked
        routing_keys = tokens.keys if tokens.routing_keys is None else tokens.routing_keys
        given = tokens._replace(keys=routing_keys, routing_keys=None)
        given = given.map(lambda x: x.narrow(token_dim(x), plan.first, asked))
        write_weight, log_decay = given.write_weight, given.log_decay
        if plan.left_out is not None:
            if write_weight is None:
                write_weight = plan.write_weight.expand(batch_size, -1, -1)
            else:
                write_weight = write_weight.masked_fill(plan.left_out, 0.0)
            if log_decay is not None:
                log_decay = log_decay.masked_fill(plan.left_out, 0.0)
        if decay_rate is not None:
            log_decay = decay_rate * write_weight
        recurrence = {"write_weight": write_weight, "sequence_ids": plan.written_runs}
        if causal:
            initial_state = None if history is None else history[:2]
            if row is not None:
                initial_state = row.state_before(
                    mixture, given.keys, given.values, write_weight, log_decay, plan.written_runs,
                    causal=True, is_last=plan.is_last, link=link,
                )  # fmt: skip
            slots = None if history is None else history.slots
            recurrence.update(
                log_decay=log_decay, initial_state=initial_state, slots=slots, output_final_state=output_history
            )
        read, normalizer, *state = mixture(
            routing_query.narrow(2, routing_query.shape[2] - asked, asked), given.keys, given.values, causal=causal,
            eps=EMPTY, output_normalizer=True, **recurrence,
        )  # fmt: skip
        log_weight = normalizer.log()
        if plan.is_other is not None:
            log_weight = log_weight.masked_fill(plan.is_other, float("-inf"))
        if not output_history:
            return read, log_weight, None
        S, z = state[0]
        if plan.is_last is not None:
            S, z = S * plan.is_last[:, None, None, None], z * plan.is_last[:, None, None]
        return read, log_weight, (S, z)

    def _step(
        self, mixture: nn.Module, window: GMAWindow, query: Tensor, routing_query: Tensor, token: Tokens,
        history: MemoryState, kept: KeptValues | None, decay_rate: Tensor | None, weigh_by_routing: bool, scaling: float,
        softcap: float | None, sinks: Tensor | None,
    ) -> tuple[Tensor, MemoryState]:  # fmt: skip
        """
        One decoding step with a window. A step has one query and no padding, so it needs a few operations instead of
        hundreds, most of which would move tokens.

        The oldest token leaves the window. If there is room, the token becomes a sink token; otherwise it is written into
        the memory. The query sees the tokens that stay, itself, the sink tokens and the memory.
        """
        is_written, sink_tokens = leave_window(history)
        oldest = (history.keys if history.routing_keys is None else history.routing_keys, history.values)
        write_weight, log_decay = history.write_weight, history.log_decay
        oldest = [first_tokens(x, 1) for x in oldest]
        write_weight, log_decay = (None if x is None else first_tokens(x, 1) for x in (write_weight, log_decay))
        count = history.count
        if is_written is None:
            count = None if count is None else count + 1
        else:
            is_there = is_written[:, None].to(history.normalizer.dtype)
            write_weight = is_there if write_weight is None else is_there * write_weight
            if log_decay is not None:
                log_decay = log_decay.masked_fill(~is_written[:, None], 0.0)
            if isinstance(count, Tensor):
                count = count + is_written[:, 0].long()
            elif count is not None:
                count = count + 1
        if decay_rate is not None:
            log_decay = decay_rate * write_weight
        with without_autocast(query.device.type):
            read, normalizer, state = mixture(
                routing_query, oldest[0].to(routing_query.dtype), oldest[1], causal=True, write_weight=write_weight,
                log_decay=log_decay, initial_state=history[:2], slots=history.slots, output_final_state=True, eps=EMPTY,
                output_normalizer=True, kept=kept, writes_all=is_written is None,
            )  # fmt: skip
            keys, values = (
                shifted(old, new, in_front)
                for old, new, in_front in (
                    (history.keys, token.keys, sink_tokens[0]),
                    (history.values, token.values, sink_tokens[1]),
                )
            )
            valid = None
            if history.valid is not None:
                valid = shifted(history.valid, torch.ones_like(is_written), sink_tokens[2])
            output = window(
                query, keys, values, valid, None, read, normalizer, None, count=count, kept=kept,
                weighing_query=routing_query if weigh_by_routing else None, sinks=sinks, scaling=scaling, softcap=softcap,
            )  # fmt: skip
        # The window behind its sinks is seen at once; they are kept apart
        size = history.keys.shape[2]
        if sink_tokens[0] is not None:
            keys, values, valid = (None if x is None else last_tokens(x, size) for x in (keys, values, valid))
        others = [
            None if new is None else shifted(old, new)
            for old, new in (
                (history.routing_keys, token.routing_keys),
                (history.write_weight, token.write_weight),
                (history.log_decay, token.log_decay),
            )
        ]
        return output, MemoryState(*state, keys, values, valid, *others, *sink_tokens, count)

    def _check(self, window: GMAWindow | None, query: Tensor, causal: bool, log_decay, history, output_history):
        if not causal and (log_decay is not None or history is not None or output_history):
            raise ValueError(
                "log_decay, history or output_history is given with causal=False, but forgetting and continuing have a "
                "direction; use causal=True."
            )
        if window is not None:
            window.check(query, history)
        elif history is not None and history.keys is not None:
            raise ValueError(
                "The history holds a window, but the layer has none. Was it written by another model? Pass a history of this layer."
            )
