# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
The module of the short convolution in front of the mixture. It holds the weights, and makes sure that the convolution reads
the real tokens of one sequence only, and no padding or other packed sequences.
"""

from functools import partial

import torch
from torch import nn

from ..ops.convolution.functional import rows_of, short_convolution
from ..ops.window.plan import padding_first
from .layout import Layout
from .memory_state import KeptValues


class GMAShortConvolution(nn.Conv1d):
    """
    Depthwise convolution of width `kernel_size` with SiLU, causal or centred.

    Args:
        num_channels (`int`): number of channels.
        kernel_size (`int`): number of tokens that one output sees.
    """

    def __init__(self, num_channels: int, kernel_size: int):
        super().__init__(num_channels, num_channels, kernel_size, groups=num_channels, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        causal: bool = True,
        layout: Layout | None = None,
        history: torch.Tensor | None = None,
        output_history: bool = True,
        kept: KeptValues | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Convolve along the sequence.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch, length, channels)`): one row per token.
            causal (`bool`, *optional*, defaults to `True`): whether an output sees the tokens before it only.
            layout ([`Layout`], *optional*): padding and packed sequences.
            history (`torch.Tensor` of shape `(batch, kernel_size - 1, channels)`, *optional*): the last real inputs before
                these, as an earlier call returned them; causal only. They belong to the first sequence of the row.
            output_history (`bool`, *optional*, defaults to `True`): whether to return the new history.
            kept ([`KeptValues`], *optional*): values that depend on parameters alone.

        Returns:
            `tuple[torch.Tensor, torch.Tensor or None]`: the outputs `(batch, length, channels)`, zero at padding, and the
            new history.
        """
        if layout is not None and layout.sequences is not None:
            return self._continue_packed(hidden_states, layout, history, kept)
        batch_size, _, num_channels = hidden_states.shape
        width = self.kernel_size[0]
        before = width - 1 if causal else width // 2
        padding_mask = sequence_ids = None
        if layout is not None:
            padding_mask, sequence_ids = layout.padding_mask, layout.sequence_ids
        if layout is not None and layout.row is not None and not causal:
            (wide,), layout = layout.row.around([hidden_states], [1], before, width - 1 - before)
            length = hidden_states.shape[1]
            return self(wide, False, layout, output_history=False, kept=kept)[0][:, before : before + length], None
        if layout is not None and layout.row is not None:
            history = layout.row.convolution_before(hidden_states, width - 1)
        past = history
        if past is None:
            past = hidden_states.new_zeros(batch_size, width - 1, num_channels)
        if padding_mask is not None:
            hidden_states = hidden_states.masked_fill(layout.is_missing(2), 0)

        order = None
        if padding_mask is not None and history is not None:
            # Padding moves in front of the history, so that neighbouring inputs are neighbouring real tokens. The history
            # counts as real: in shorter rows it holds zeros, as before any sequence.
            is_real = torch.cat([padding_mask.new_ones(batch_size, before), padding_mask], dim=1)
            order, _ = padding_first(is_real)
            gather_index = order[..., None].expand(-1, -1, num_channels)
        elif padding_mask is not None:
            # Without a history, only padding between real tokens has to move
            hidden_states, sequence_ids = layout.sort(hidden_states, 1), layout.sorted_sequence_ids
        past = past if before == width - 1 else past[:, width - 1 - before :]
        inputs = torch.cat([past.to(hidden_states.dtype), hidden_states], dim=1)
        if sequence_ids is not None:
            sequence_ids = torch.cat([sequence_ids[:, :1].expand(-1, before), sequence_ids], dim=1)
        if order is not None:
            inputs = inputs.gather(1, gather_index)
            if sequence_ids is not None:
                sequence_ids = sequence_ids.gather(1, order)

        new_history = None
        if not output_history:
            pass
        elif padding_mask is not None and history is None and not layout.ends_at_last:
            new_history = layout.take_last(hidden_states, width - 1)
            if sequence_ids is not None:
                taken = layout.take_last(sequence_ids[:, before:, None], width - 1)
                new_history = new_history * (taken == taken[:, -1:])
        else:
            new_history = inputs[:, inputs.shape[1] - (width - 1) :]
            if sequence_ids is not None:
                is_last = sequence_ids == sequence_ids[:, -1:]
                new_history = new_history * is_last[:, inputs.shape[1] - (width - 1) :, None]

        # If padding moved in front of the history, the history is among the tokens, and its outputs are cut off below
        taps = None if kept is None else partial(kept.get, "convolution", (self.weight,), rows_of)
        outputs = short_convolution(inputs, self.weight, sequence_ids, before, before if order is None else 0, taps)

        if order is not None:
            outputs = outputs.new_zeros(inputs.shape).scatter(1, gather_index, outputs)[:, before:]
        elif padding_mask is not None:
            outputs = layout.unsort(outputs, 1)
        if padding_mask is not None:
            outputs = outputs.masked_fill(layout.is_missing(2), 0)
        return outputs, new_history

    def _continue_packed(
        self, hidden_states: torch.Tensor, layout: Layout, history: torch.Tensor, kept: KeptValues | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Convolve packed sequences, each behind its history, `(sequences, kernel_size - 1, channels)` in total."""
        before = self.kernel_size[0] - 1
        places = layout.sequences.behind_histories(before)
        inputs = torch.cat([history.flatten(0, 1).to(hidden_states.dtype), hidden_states[0]])[places.joined]
        taps = None if kept is None else partial(kept.get, "convolution", (self.weight,), rows_of)
        # Outputs at the history read two sequences, and nobody reads them
        outputs = short_convolution(inputs[None], self.weight, None, before, before, taps)
        return outputs[:, places.tokens - before], inputs[places.last]
