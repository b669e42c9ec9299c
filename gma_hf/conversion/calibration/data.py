# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The batches that calibration reads, and a sample of bounded size that it keeps."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...compat import execution_device


class Reservoir:
    """
    A uniform sample of the tokens of one layer, in bounded memory: the tokens with the largest of independent random
    numbers.
    """

    def __init__(self, size: int, generator: torch.Generator):
        self.size = size
        self.generator = generator
        self.priorities = torch.empty(0)
        self.num_seen = 0
        self.query = self.key = None  # [heads, tokens, dim]

    def add(self, query: Tensor, key: Tensor, real: Tensor | None) -> None:
        """
        Add queries and keys `(batch, heads, length, dim)` of the same tokens. `real` `(batch, length)` is `False` at
        padding.
        """
        rows = torch.arange(query.shape[0] * query.shape[2])
        if real is not None:
            rows = rows[real.flatten().cpu()]
        self.num_seen += len(rows)
        priorities = torch.cat([self.priorities, torch.rand(len(rows), generator=self.generator)])
        kept = priorities.topk(min(self.size, len(priorities))).indices.sort().values
        num_old = len(self.priorities)
        old, new = kept[kept < num_old], rows[kept[kept >= num_old] - num_old]
        self.priorities = priorities[kept]
        self.query, self.key = (
            self._select(held, states, old, new) for held, states in ((self.query, query), (self.key, key))
        )

    @staticmethod
    def _select(held: Tensor | None, states: Tensor, old: Tensor, new: Tensor) -> Tensor:
        added = states.transpose(0, 1).flatten(1, 2)[:, new.to(states.device)]
        if held is None or len(old) == 0:
            return added
        return torch.cat([held[:, old.to(held.device)], added], dim=1)

    def samples(self, num_heads: int) -> Tensor:
        """As many queries as keys, `(num_heads, samples, dim)`: the queries of each head, and the keys of its group."""
        return torch.cat([self.query, self.key.repeat_interleave(num_heads // self.key.shape[0], dim=0)], dim=1)


def model_batches(model: PreTrainedModel, data: Iterable, batch_size: int) -> Iterator[dict[str, Any]]:
    """
    Batches on the device where the model computes, from batches or from examples.

    Raises:
        ValueError: for data that the model cannot read, such as texts that were not tokenized.
    """
    device = execution_device(model)
    if isinstance(data, str | Mapping):
        advice = "tokenize the text first" if isinstance(data, str) else "put a single batch into a list, `[batch]`"
        raise ValueError(f"The data must be batches or examples, got a {type(data).__name__}: {advice}.")
    try:
        items = iter(data)
    except TypeError as error:
        raise ValueError(
            f"The data must be batches or examples, got {data!r}. Give a list, a data set or a data loader."
        ) from error
    examples: list[Mapping] = []
    for item in items:
        if isinstance(item, Tensor):
            item = {model.main_input_name: item if item.ndim > 1 else item[None]}
        if not isinstance(item, Mapping):
            advice = f"Tokenize the texts first: `[tokenizer(text) for text in texts]` has {model.main_input_name!r}."
            raise ValueError(
                f"An item of the data is {f'a {type(item).__name__}' if item is not None else 'None'}, "
                f"{str(item)[:40]!r}, where a tensor of token ids or a dictionary is expected. {advice}"
            )
        main = item.get(model.main_input_name)
        if main is None:
            raise ValueError(
                f"An item of the data has no {model.main_input_name!r}, which {type(model).__name__} takes; it has "
                f"{sorted(item)}. Tokenize the data first."
            )
        if isinstance(main, Tensor) and main.ndim > 1:
            check_tokens(model, main)
            yield {name: value.to(device) if isinstance(value, Tensor) else value for name, value in item.items()}
            continue
        examples.append(item)
        if len(examples) == batch_size:
            yield padded(model, examples)
            examples = []
    if examples:
        yield padded(model, examples)


def padded(model: PreTrainedModel, examples: list[Mapping]) -> dict[str, Tensor]:
    """One batch of token lists, padded on the right."""
    rows = [torch.as_tensor(example[model.main_input_name]) for example in examples]
    for row in rows:
        if row.ndim != 1 or len(row) == 0 or row.is_floating_point() or row.is_complex() or row.dtype == torch.bool:
            raise ValueError(
                f"An example of the data has {model.main_input_name!r} of shape {tuple(row.shape)} and type {row.dtype}; "
                "expected a list of at least one token id. Tokenize the texts first, and leave out empty ones."
            )
    rows = [row.long() for row in rows]
    lengths = torch.tensor([len(row) for row in rows])
    tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).long()
    check_tokens(model, tokens)
    device = execution_device(model)
    return {model.main_input_name: tokens.to(device), "attention_mask": mask.to(device)}


def check_tokens(model: PreTrainedModel, tokens: Tensor) -> None:
    """
    Check that the model has all token ids.

    Raises:
        ValueError: if it has not.
    """
    embeddings = model.get_input_embeddings() if model.main_input_name == "input_ids" else None
    size = getattr(embeddings, "num_embeddings", None)
    if size is not None and tokens.numel() > 0 and not 0 <= int(tokens.min()) <= int(tokens.max()) < size:
        raise ValueError(
            f"The data hold token ids from {int(tokens.min())} to {int(tokens.max())}, but {type(model).__name__} knows 0 to "
            f"{size - 1}. Tokenize the data with the tokenizer of the model."
        )


def join_batches(batches: list[dict[str, Any]], fraction: float) -> dict[str, Any]:
    """One batch with about this fraction of the rows: the longest batch, and the batches of the same shape."""

    def shapes(batch: dict[str, Any]) -> dict[str, torch.Size]:
        return {name: value.shape[1:] for name, value in batch.items() if isinstance(value, Tensor)}

    longest = max(batches, key=lambda batch: max(shape.numel() for shape in shapes(batch).values()))
    alike = [batch for batch in batches if shapes(batch) == shapes(longest)]
    num_rows = sum(len(next(iter(batch.values()))) for batch in batches)
    return {
        name: torch.cat([batch[name] for batch in alike])[: max(1, round(num_rows * fraction))]
        if isinstance(value, Tensor)
        else value
        for name, value in longest.items()
    }


def no_cache(model: PreTrainedModel, batch: dict[str, Any]) -> dict[str, Any]:
    """The arguments for a forward pass without a cache, and without labels unless the decoder reads them."""
    labels_are_read = model.config.is_encoder_decoder and "decoder_input_ids" not in batch
    inputs = {name: value for name, value in batch.items() if name != "labels" or labels_are_read}
    return {**inputs, "use_cache": False} if hasattr(model.config, "use_cache") else inputs


@contextmanager
def as_it_is(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within this context. Afterwards every module is in its old mode."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was_training in training.items():
            module.training = was_training
