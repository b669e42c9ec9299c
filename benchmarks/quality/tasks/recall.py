# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
Two tasks in which a model has to find again what it has read, drawn anew for every batch.

Both come as `tokens` and `labels`, `[rows, length]`, in the convention of language models: the label of a position is the token
that should be predicted from the positions before it, -100 where nothing is asked.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info


IGNORE_INDEX = -100
RECALL_VOCAB_SIZE = 1024  # Zoology's is 8,192, which takes a training many times as long
# The needle's vocabulary: keys, values, and what the haystack consists of
NUM_KEYS = NUM_VALUES = 128
FIRST_VALUE = NUM_KEYS
FIRST_HAY = FIRST_VALUE + NUM_VALUES
NEEDLE_VOCAB_SIZE = 512
TOKENS_PER_FACT = 8  # in training


def multi_query_recall(
    rows: int, length: int, pairs: int, generator: torch.Generator, vocab_size=RECALL_VOCAB_SIZE, power=0.01
) -> tuple[Tensor, Tensor]:
    """
    Multi-query associative recall as in Zoology (Arora et al., 2024, arXiv:2312.04927).

        k1 v1 k2 v2 ... kn vn  x x k2 x x x k1 x ...        labels: v2 behind k2, v1 behind k1

    Different keys with different values come first. Every key follows once more, at an even position behind them; the gap to the
    pairs follows a power law, so that most questions come early. All else (x) is random.

    Args:
        rows, length, generator: of the tokens and of the draw; `length` is even.
        pairs: number of keys, at most a quarter of `length`.
        vocab_size: the first half of the vocabulary are keys, the second values.
        power: of the law of the gaps; 1 is uniform.
    """
    half, slots, device = vocab_size // 2, length // 2 - pairs, generator.device
    if length % 2 or pairs > slots or pairs > half - 1:
        raise ValueError(
            f"{pairs} pairs and their questions do not fit into {length} tokens of {vocab_size}: give an even length of at "
            "least four times the pairs, and a vocabulary of more than twice as many tokens."
        )

    def distinct(first: int, count: int) -> Tensor:
        return first + torch.rand(rows, count, generator=generator, device=device).topk(pairs, dim=1).indices

    keys, values = distinct(1, half - 1), distinct(half, vocab_size - half)
    # The Gumbel trick: the largest of noisy log-probabilities are a draw without replacement
    log_probabilities = (power - 1) * torch.arange(1, slots + 1, device=device).log()
    uniform = torch.rand(rows, slots, generator=generator, device=device).clamp(1e-10, 1 - 1e-7)
    chosen = (log_probabilities - (-uniform.log()).log()).topk(pairs, dim=1).indices
    asked = 2 * pairs + 2 * chosen

    tokens = torch.randint(vocab_size, (rows, length), generator=generator, device=device)
    tokens[:, : 2 * pairs] = torch.stack([keys, values], dim=-1).flatten(1)
    tokens.scatter_(1, asked, keys)
    labels = torch.full_like(tokens, IGNORE_INDEX).scatter_(1, asked + 1, values)
    return tokens, labels


def needle(
    rows: int, length: int, generator: torch.Generator, facts: int = 4, depth: float | None = None
) -> tuple[Tensor, Tensor]:
    """
    Facts in a haystack of random tokens, and questions at its end.

        x x k2 v2 x x x x x k1 v1 x x x  k1 v1        label: v1 at the end

    To train, `depth` is None: the facts stand anywhere and each of them is asked for, in random order. To test, one fact stands
    at the given depth and it alone is asked for; the others are there to be confused with it.

    Args:
        rows, length, generator: of the tokens and of the draw.
        facts: number of facts, with different keys.
        depth: where the needle stands, 0 at the beginning of the haystack and 1 at its end.
    """
    questions = facts if depth is None else 1
    slots = length // 2 - questions  # a fact and a question take two tokens each
    if slots < facts or facts > NUM_KEYS:
        raise ValueError(f"{facts} facts and {questions} questions do not fit into {length} tokens.")
    device = generator.device
    keys = torch.rand(rows, NUM_KEYS, generator=generator, device=device).topk(facts, dim=1).indices
    values = torch.randint(FIRST_VALUE, FIRST_HAY, (rows, facts), generator=generator, device=device)
    order = torch.rand(rows, slots, generator=generator, device=device)
    if depth is not None:
        order[:, round(depth * (slots - 1))] = 2.0  # the first fact gets this slot
    chosen = order.topk(facts, dim=1).indices

    hay_shape = (rows, length - 2 * questions)
    hay = torch.randint(FIRST_HAY, NEEDLE_VOCAB_SIZE, hay_shape, generator=generator, device=device)
    hay.scatter_(1, 2 * chosen, keys).scatter_(1, 2 * chosen + 1, values)
    # Facts already stand in random places, so asking in their order asks in random order
    asked = torch.stack([keys, values], dim=-1)[:, :questions].flatten(1)
    tokens = torch.cat([hay, asked], dim=1)
    labels = torch.full_like(tokens, IGNORE_INDEX)
    labels[:, hay.shape[1] + 1 :: 2] = values[:, :questions]
    return tokens, labels


class Stream(IterableDataset):
    """Endless batches, tokens and labels that `draw` makes from a generator; every worker of a data loader draws its own."""

    def __init__(self, draw: Callable[[torch.Generator], tuple[Tensor, Tensor]], seed: int):
        self.draw, self.seed = draw, seed

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        worker = get_worker_info()
        generator = torch.Generator().manual_seed(1000 * self.seed + (0 if worker is None else worker.id))
        while True:
            tokens, labels = self.draw(generator)
            yield {"input_ids": tokens, "labels": labels}


def draw_recall(
    generator: torch.Generator, segments: list[tuple[int, int]], tokens_per_batch: int, vocab_size=RECALL_VOCAB_SIZE
):
    """A batch of one of the segments (length, pairs), as large as all others in tokens."""
    length, pairs = segments[torch.randint(len(segments), (), generator=generator)]
    return multi_query_recall(max(1, tokens_per_batch // length), length, pairs, generator, vocab_size)


def draw_needle(generator: torch.Generator, lengths: list[int], tokens_per_batch: int):
    """A batch of one of the lengths, to train on."""
    length = lengths[torch.randint(len(lengths), (), generator=generator)]
    return needle(max(1, tokens_per_batch // length), length, generator, facts=length // TOKENS_PER_FACT)
