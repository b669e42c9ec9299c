# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
An exact softmax window in front of the mixture's memory: every token sees the W nearest tokens by softmax, and everything
older through Gaussian Mixture Attention. Causal, with the state S, z of the operator delayed by W tokens:

    s_ij = scaling * q_i . k_j                  i - W < j <= i, optionally soft-capped
    n_i                                         how many tokens the memory holds
    m_i  = a_h + u_h . q_i - b_h log(1 + n_i/W) how much the memory weighs, learned per head
    D_i  = gamma^Q_i z_{i-W}                    how much the memory holds for a query
    r_i  = gamma^Q_i S_{i-W} / D_i              what it holds, the normalised read
    o_i  = (sum_j e^{s_ij} v_j + e^{m_i} D_i r_i) / (sum_j e^{s_ij} + e^{m_i} D_i)

The memory is one more thing to attend to, of value r_i and logit m_i + log D_i. One normaliser for all, so that a query
decides between near and far as softmax decides between tokens. Bidirectional,
near are the tokens with |i - j| <= W, and the memory holds the whole sequence: it is a sum over all tokens, from which no
query can leave out its neighbours; m_i balances the two. A window in front of a linear memory is known from LoLCATs
(Zhang et al., arXiv:2410.10254); the one in front of a mixture is ours.

D_i grows in proportion to n_i, as long as nothing is forgotten. So does the share of attention that softmax pays to far tokens
while few have left the window; later it grows more slowly, for most are of no interest, however many they are. So b_h says how
much of the growth is taken back when the memory holds more than a window: with 0 it stays a sum over its tokens, with 1 it
becomes a mean, which weighs the same however long the text is. n_i is a plain count of real tokens of the query's own sequence,
whatever they weigh and however much of them is forgotten.

Pretrained softmax pays much attention to the first tokens of a sequence, whatever they are (attention sinks, Xiao et al.,
arXiv:2309.17453); in a memory they would thin out as the text grows. The first s tokens can stay visible, causal only:

    near: i - W < j <= i        sinks: j < s and j <= i - W        memory: s <= j <= i - W

    o_i = (sum_{near, sinks} e^{s_ij} v_j + e^{m_i} D_i r_i) / (sum_{near, sinks} e^{s_ij} + e^{m_i} D_i)
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import initialization as init

from ..ops.attention.functional import run_starts, without_autocast
from ..ops.window.blocks import EMPTY, LOG_NOTHING
from ..ops.window.softmax import window_softmax
from ..ops.window.step import is_step, step
from ..ops.window.tokens import (
    GMAWindowHistory,
    WindowTokens,
    join_history,
    kept_sinks,
    last_tokens,
    num_written,
    sequence_starts,
    take_queries,
    take_tokens,
    token_dim,
    visible_sinks,
    without_sinks,
)


# Of checkpoints from before there was a `memory_dilution`, which lack it: it starts at the 0 that they mean
LACKING_BEFORE = r"\.window_norm\.memory_dilution$"


class GMAWindow(nn.Module):
    """
    Softmax over the nearest tokens, merged with the memory of a [`GMAMixture`].

    Name the attribute that holds it `window_norm`, for the reason that [`GMAMixture`] gives: no weight decay.

    Args:
        num_heads (`int`): number of query heads.
        head_dim (`int`): dimension of queries and keys.
        window_size (`int`): W, how many tokens a query sees exactly: itself and the W - 1 before it. Bidirectional, W to
            each side.
        num_sink_tokens (`int`): s, how many of the first tokens of a sequence every later query sees exactly too, instead
            of through the memory; causal calls only.

    Attributes:
        memory_bias (`torch.Tensor` of shape `(num_heads,)`): a.
        memory_query (`torch.Tensor` of shape `(num_heads, head_dim)`): u.
        memory_dilution (`torch.Tensor` of shape `(num_heads,)`): b; 0 for a sum over the tokens of the memory, however many
            they are, 1 for one that becomes a mean. Bidirectional, these are all of the sequence.

    Raises:
        ValueError: for a window without tokens, or a negative number of sink tokens.
    """

    def __init__(self, num_heads: int, head_dim: int, window_size: int, num_sink_tokens: int = 0):
        super().__init__()
        if window_size < 1:
            raise ValueError(
                f"`window_size` must be at least 1, got {window_size}. Without a window use the mixture alone."
            )
        if num_sink_tokens < 0:
            raise ValueError(f"`num_sink_tokens` must not be negative, got {num_sink_tokens}. 0 means none.")
        self.window_size = window_size
        self.num_sink_tokens = num_sink_tokens
        self.memory_bias = nn.Parameter(torch.zeros(num_heads))
        self.memory_query = nn.Parameter(torch.zeros(num_heads, head_dim))
        self.memory_dilution = nn.Parameter(torch.zeros(num_heads))

    def reset_parameters(self):
        """The memory weighs as much as tokens whose logits are zero."""
        init.zeros_(self.memory_bias)
        init.zeros_(self.memory_query)
        init.zeros_(self.memory_dilution)

    def forward(
        self,
        mixture: Callable[..., Tensor],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float,
        causal: bool = True,
        routing_query: Tensor | None = None,
        routing_key: Tensor | None = None,
        weigh_by_routing: bool = False,
        write_weight: Tensor | None = None,
        log_decay: Tensor | None = None,
        sequence_ids: Tensor | None = None,
        padding_mask: Tensor | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        history: GMAWindowHistory | None = None,
        output_history: bool = False,
    ) -> Tensor | tuple[Tensor, GMAWindowHistory]:
        """
        Attention by the equations of this file's opening.

        Args:
            mixture (`GMAMixture`, or a function that calls it): the memory.
            query (`torch.Tensor` of shape `(batch, num_heads, length, head_dim)`): queries of the softmax.
            key (`torch.Tensor` of shape `(batch, key_value_heads, length, head_dim)`): its keys.
            value (`torch.Tensor` of shape `(batch, key_value_heads, length, value_dim)`): values.
            scaling (`float`): factor of the softmax logits.
            causal (`bool`): look back only, or to both sides.
            routing_query, routing_key (`torch.Tensor`, *optional*): what the mixture routes, of its own dimension; by
                default `query` and `key`.
            weigh_by_routing (`bool`): u . q_i with the routing query, of the same dimension, for q_i: where the softmax's
                queries are rotated by their positions, on which the memory shall not depend.
            write_weight, log_decay (`torch.Tensor` of shape `(batch, h, length)`, *optional*): of the memory, see
                [`gaussian_mixture_attention`]. Softmax knows neither.
            sequence_ids (`torch.Tensor` of shape `(batch, length)`, *optional*): packed sequences, as runs of equal
                numbers over the real tokens. A history belongs to the first sequence of its row.
            padding_mask (`torch.BoolTensor` of shape `(batch, length)`, *optional*): `True` at real tokens. Padding may
                stand anywhere; nearness is counted in real tokens.
            softcap (`float`, *optional*): c, where softmax logits become c tanh(s / c).
            sinks (`torch.Tensor` of shape `(num_heads,)`, *optional*): a logit per head that joins the normaliser alone;
                no token, and nothing to do with `num_sink_tokens`.
            history (`GMAWindowHistory`, *optional*): as returned by an earlier call; causal only.
            output_history (`bool`): also return the history after the last token; causal only.

        Returns:
            `torch.Tensor` of shape `(batch, num_heads, length, value_dim)` in the dtype of `value`, zero at padding; with
            `output_history` the pair of it and the new [`GMAWindowHistory`].

        Raises:
            ValueError: if the arguments do not fit each other.
        """
        self._check(query, causal, log_decay, history, output_history)
        routing_query = query if routing_query is None else routing_query
        length = query.shape[2]
        size = self._reach(length, history, output_history)
        num_sinks = self.num_sink_tokens if causal else 0
        tokens = WindowTokens(key, value, padding_mask, routing_key, write_weight, log_decay, sequence_ids)
        if is_step(tokens, history):
            output, history = self._step(
                mixture, query, routing_query, weigh_by_routing, tokens, history, scaling, softcap, sinks
            )
            return (output, history) if output_history else output
        # Nothing before the call and nothing to leave out: views will do. A length that is still open (torch.export) is no
        # int; which queries have a memory must not be decided on then
        is_whole = history is None and padding_mask is None
        is_whole = is_whole and (not causal or (isinstance(length, int) and length > 0))
        if not is_whole:
            tokens = join_history(tokens, history, size + num_sinks if causal else 0)
        order = None
        if padding_mask is not None:
            order = torch.argsort(tokens.valid.to(torch.uint8), dim=1, stable=True)
            query, routing_query = take_queries(query, order), take_queries(routing_query, order)
            tokens = tokens.map(lambda x: take_tokens(x, order))
        if sequence_ids is not None:
            tokens = tokens._replace(runs=run_starts(tokens.runs).cumsum(dim=1))
        near, written, starts, sink_tokens, num_leading = tokens, tokens, None, None, 0
        if num_sinks > 0:
            starts = sequence_starts(tokens)
            if not is_whole:
                sink_tokens = visible_sinks(tokens, starts, num_sinks, size, length)
                near, written = (
                    x.map(lambda y: last_tokens(y, size + length))
                    for x in (tokens, without_sinks(tokens, starts, num_sinks))
                )
            elif length > size and sequence_ids is None:
                num_leading = min(num_sinks, length - size)
            elif length > size:
                sink_tokens = visible_sinks(tokens, starts, min(num_sinks, length - size), size, length - size)
                written = without_sinks(tokens, starts, num_sinks)

        with without_autocast(query.device.type):
            read, log_weight, count, state = self._read_memory(
                mixture, routing_query, written, causal, is_whole, history, output_history
            )
            output = window_softmax(
                query,
                near.keys,
                near.values,
                near.valid,
                near.runs,
                read,
                self._diluted(log_weight, count),
                self.memory_bias,
                self.memory_query,
                routing_query if weigh_by_routing else None,
                sinks,
                sink_tokens,
                num_sinks=num_leading,
                size=size,
                causal=causal,
                scaling=scaling,
                softcap=softcap,
            )

        if order is not None:
            back = order.argsort(dim=1)[:, -query.shape[2] :] - (order.shape[1] - query.shape[2])
            output = take_tokens(output, back.clamp(min=0)).masked_fill(~padding_mask[:, None, :, None], 0)
        if not output_history:
            return output
        return output, self._new_history(tokens, starts, state, query.shape[0])

    def affinity(
        self, mixture: nn.Module, query: Tensor, key: Tensor, routing_key: Tensor | None = None, **kwargs
    ) -> Tensor:
        """
        The matrix that the attention implies, `(batch, num_heads, length, length)`: quadratic, to look at. It is what the
        attention makes of the identity matrix. Its rows sum to one (to less beside sinks, to zero at padding).
        """
        batch_size, num_key_value_heads, length = key.shape[:3]
        identity = torch.eye(length, dtype=torch.promote_types(key.dtype, torch.float32), device=key.device)
        identity = identity.expand(batch_size, num_key_value_heads, -1, -1)
        # Not through `__call__`, whose hooks are there for what the model computes
        return self.forward(mixture.forward, query, key, identity, routing_key=routing_key, **kwargs)

    def _reach(self, length: int, history: GMAWindowHistory | None, output_history: bool) -> int:
        """The window, or the sequence where that is shorter."""
        # A length that is still open (torch.export) is no int, and must not be decided on
        if history is None and not output_history and isinstance(length, int) and length < self.window_size:
            return max(length, 1)
        return self.window_size

    def _step(
        self,
        mixture: Callable[..., Tensor],
        query: Tensor,
        routing_query: Tensor,
        weigh_by_routing: bool,
        tokens: WindowTokens,
        history: GMAWindowHistory,
        scaling: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> tuple[Tensor, GMAWindowHistory]:
        """The attention of one further token, and the history with it."""

        def read_memory(key: Tensor, value: Tensor, **recurrence) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
            options = {"causal": True, "eps": EMPTY, "output_normalizer": True, "output_final_state": True}
            return mixture(routing_query, key, value, **options, **recurrence)

        def weigh(normalizer: Tensor, count: Tensor) -> Tensor:
            # Of an empty memory log 0 = -inf, whatever is added
            log_weight = torch.threshold(normalizer, 2 * EMPTY, 0.0).log()
            weighing_query = routing_query if weigh_by_routing else query
            slope = (weighing_query.to(log_weight.dtype) * self.memory_query[:, None]).sum(dim=-1)
            return slope + self.memory_bias[:, None] + self._without_growth(log_weight, count)

        with without_autocast(query.device.type):
            return step(read_memory, weigh, query, tokens, history, scaling, softcap, sinks)

    def _read_memory(
        self,
        mixture: Callable[..., Tensor],
        routing_query: Tensor,
        tokens: WindowTokens,
        causal: bool,
        is_whole: bool,
        history: GMAWindowHistory | None,
        output_history: bool,
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor, Tensor] | None]:
        """
        r `(batch, num_heads, asked, value_dim)`, log D `(batch, num_heads, asked)` and n `(batch or 1, asked or 1)` of the
        queries that have a memory, the last `asked` ones, and the last S, z and n.
        """
        batch_size, length = routing_query.shape[0], routing_query.shape[2]
        asked, skipped = length, 0
        if causal and is_whole:
            # Views leave out the sinks of a single sequence; those of several are invalid
            skipped = self.num_sink_tokens if tokens.runs is None else 0
            asked = length - self.window_size - skipped
            if asked <= 0:
                # Nobody has one. It is called all the same, with a token that does not exist: it gives the state, hooks see
                # the call, and no parameter is without a gradient
                asked, skipped, nothing = 1, 0, torch.zeros(1, length, dtype=torch.bool, device=routing_query.device)
                tokens = tokens._replace(valid=nothing)
        routing_keys = tokens.keys if tokens.routing_keys is None else tokens.routing_keys
        written = tokens._replace(keys=routing_keys).map(lambda x: x.narrow(token_dim(x), skipped, asked))
        write_weight, log_decay = written.write_weight, written.log_decay
        if written.valid is not None:
            is_missing = ~written.valid[:, None]
            if write_weight is None:
                write_weight = written.valid[:, None].to(torch.float32).expand(batch_size, -1, -1)
            else:
                write_weight = write_weight.masked_fill(is_missing, 0.0)
            if log_decay is not None:
                log_decay = log_decay.masked_fill(is_missing, 0.0)
        recurrence = {"write_weight": write_weight, "sequence_ids": written.runs}
        if causal:
            initial_state = None if history is None else (history.state, history.normalizer)
            recurrence.update(log_decay=log_decay, initial_state=initial_state, output_final_state=output_history)
        read, normalizer, *state = mixture(
            routing_query.narrow(2, length - asked, asked),
            written.keys,
            written.values,
            causal=causal,
            eps=EMPTY,
            output_normalizer=True,
            **recurrence,
        )
        log_weight = normalizer.log()
        count = num_written(written, causal, None if history is None else history.count)
        if causal and tokens.runs is not None:
            # The newest token that the memory knows is of another sequence: so is all of the memory
            is_same = written.runs == last_tokens(tokens.runs, asked)
            log_weight = log_weight.masked_fill(~is_same[:, None], float("-inf"))
        if not output_history:
            return read, log_weight, count, None
        (S, z), num_tokens = state[0], count[:, -1]
        if tokens.runs is not None:
            is_last = written.runs[:, -1] == tokens.runs[:, -1]
            S, z, num_tokens = S * is_last[:, None, None, None], z * is_last[:, None, None], num_tokens * is_last
        return read, log_weight, count, (S, z, num_tokens)

    def _without_growth(self, log_weight: Tensor, count: Tensor) -> Tensor:
        """log D - b log(1 + n / W)"""
        growth = (count.to(log_weight.dtype) / self.window_size).log1p()
        return torch.addcmul(log_weight, self.memory_dilution[:, None], growth[:, None], value=-1)

    def _diluted(self, log_weight: Tensor, count: Tensor) -> Tensor:
        """The same, but an empty memory stays empty."""
        return torch.where(log_weight > LOG_NOTHING, self._without_growth(log_weight, count), log_weight)

    def _new_history(
        self, tokens: WindowTokens, starts: Tensor | None, state: tuple[Tensor, Tensor, Tensor], batch_size: int
    ) -> GMAWindowHistory:
        size, length = self.window_size, tokens.keys.shape[2]
        sinks = () if starts is None else kept_sinks(tokens, starts, self.num_sink_tokens, size)
        if tokens.valid is None:
            tokens = tokens.map(lambda x: last_tokens(x, min(size, length)))
            tokens = join_history(tokens, None, max(0, size - length))
        if tokens.runs is not None:
            tokens = tokens._replace(valid=tokens.valid & (tokens.runs == tokens.runs[:, -1:]))
        last = tokens.map(lambda x: last_tokens(x, size))
        S, z, count = state
        valid, count = last.valid.expand(batch_size, -1), count.expand(batch_size)
        others = (last.routing_keys, last.write_weight, last.log_decay, *sinks)
        return GMAWindowHistory(S, z, last.keys, last.values, valid, *others, count=count)

    def _check(self, query, causal, log_decay, history, output_history):
        num_heads, head_dim = self.memory_query.shape
        if query.ndim != 4 or query.shape[1] != num_heads or query.shape[3] != head_dim:
            raise ValueError(
                f"query has shape {list(query.shape)}, expected [batch, heads, length, dim] with {num_heads} heads of "
                f"dimension {head_dim}, as the window was built for."
            )
        if not causal and (log_decay is not None or history is not None or output_history):
            raise ValueError(
                "log_decay, history or output_history is given with causal=False, but forgetting and going on have a "
                "direction; use causal=True."
            )
        if history is None:
            return
        window, sinks = (0 if x is None else x.shape[2] for x in (history.keys, history.sink_keys))
        if window != self.window_size:
            raise ValueError(
                f"The history holds a window of {window} tokens, but `window_size` is {self.window_size}. Was it "
                "written by another model?"
            )
        if sinks != self.num_sink_tokens:
            raise ValueError(
                f"The history has room for {sinks} sink tokens, but `num_sink_tokens` is {self.num_sink_tokens}. Was it "
                "written by another model?"
            )

    def extra_repr(self) -> str:
        num_heads, head_dim = self.memory_query.shape
        sinks = f", num_sink_tokens={self.num_sink_tokens}" if self.num_sink_tokens > 0 else ""
        return f"num_heads={num_heads}, head_dim={head_dim}, window_size={self.window_size}{sinks}"
