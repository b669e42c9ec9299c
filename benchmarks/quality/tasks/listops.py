# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
ListOps as in Long Range Arena (Tay et al., 2021, after Nangia and Bowman, 2018): nested lists of digits to evaluate.

    [MAX 2 9 [MIN 4 7 ] 0 ]  is  9

The grammar is the published one. A node is an operator with probability 1/4 (never at the greatest depth) and a digit
otherwise; an operator is MIN, MAX, MED (the median, rounded down) or SM (the sum modulo 10), and takes 2 to 10 arguments. Of
all trees those are kept whose number of symbols lies strictly between 500 and 2000. One token per symbol: an operator with its
bracket, a digit, a closing bracket. Trees are drawn level by level and many at once, which changes nothing in their
distribution and makes 100,000 of them a matter of seconds. The classes are not balanced, in the published data neither: MIN
and MAX favour 0 and 9.
"""

from collections.abc import Sequence

import numpy as np


OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")
SYMBOLS = ("<pad>", *OPERATORS, "]", *map(str, range(10)))
PAD = 0
MIN, MAX, MED, SM, END, DIGIT = 1, 2, 3, 4, 5, 6  # ids; digit i is DIGIT + i
VOCAB_SIZE = len(SYMBOLS)
OPERATOR_SHARE = 0.25
ROOTS_AT_ONCE = 20_000


def generate(
    count: int, seed: int | Sequence[int], min_length=500, max_length=2000, max_depth=10, max_args=10
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Random expressions: all tokens in one array (uint8), the length of every expression and its value. The same seed gives the same
    ones. The number of symbols lies strictly between `min_length` and `max_length`; `max_depth` counts nodes from the root to a
    digit.
    """
    random = np.random.default_rng(seed)
    # One tree in three has the published length
    roots = min(ROOTS_AT_ONCE, 4 * count + 20)
    parts, found = [], 0
    while found < count:
        part = draw(random, roots, min_length, max_length, max_depth, max_args)
        parts.append(part)
        found += len(part[1])
    tokens, lengths, values = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    lengths, values = lengths[:count], values[:count]
    return tokens[: lengths.sum()], lengths, values


def draw(random: np.random.Generator, roots: int, min_length: int, max_length: int, max_depth: int, max_args: int):
    """The expressions of the wanted length among so many trees; the root is an operator, or there is but one digit."""
    levels = grow(random, roots, max_length, max_depth, max_args)

    # From the leaves to the roots: how long every node is written out, and what it evaluates to
    lengths, values = [], []
    for depth in reversed(range(len(levels))):
        operators, digits, _, num_arguments = levels[depth]
        length, value = np.where(operators > 0, 2, 1), digits.copy()
        is_parent = operators > 0
        if is_parent.any():
            starts = np.cumsum(num_arguments[is_parent]) - num_arguments[is_parent]
            length[is_parent] += np.add.reduceat(lengths[-1], starts)
            value[is_parent] = reduce_arguments(operators[is_parent], num_arguments[is_parent], starts, values[-1])
        lengths.append(length)
        values.append(value)
    lengths.reverse()
    values.reverse()

    # From the roots to the leaves: where every node stands; what is left out stands nowhere
    total = lengths[0]
    is_kept = (total > min_length) & (total < max_length)
    position = np.where(is_kept, np.cumsum(total * is_kept) - total * is_kept, -1)
    tokens = np.zeros(total[is_kept].sum(), np.uint8)
    for depth, (operators, digits, _, num_arguments) in enumerate(levels):
        symbols = np.where(operators > 0, operators, DIGIT + digits)
        tokens[position[position >= 0]] = symbols[position >= 0]
        closed = (operators > 0) & (position >= 0)
        tokens[position[closed] + lengths[depth][closed] - 1] = END
        if depth + 1 < len(levels):
            parents = levels[depth + 1][2]
            written = lengths[depth + 1]
            before = np.cumsum(written) - written
            first = (np.cumsum(num_arguments) - num_arguments)[parents]
            position = np.where(position[parents] >= 0, position[parents] + 1 + before - before[first], -1)
    return tokens, total[is_kept], values[0][is_kept]


def grow(random: np.random.Generator, roots: int, max_length: int, max_depth: int, max_args: int) -> list[tuple]:
    """Trees, level by level: operators (0 at digits), digits, parents in the level above, and numbers of arguments.

    Trees that have become too long stop growing; they are longer than `max_length` already.
    """
    levels = []
    parents = np.arange(roots)
    tree = np.arange(roots)
    symbols = np.zeros(roots, np.int64)  # of every tree so far
    for depth in range(1, max_depth + 1):
        size = len(parents)
        is_operator = np.ones(size, bool) if depth == 1 else random.random(size) < OPERATOR_SHARE
        is_operator &= (depth < max_depth) & (symbols[tree] < max_length)
        operators = np.where(is_operator, random.integers(MIN, SM + 1, size), 0)
        digits = random.integers(0, 10, size)
        num_arguments = np.where(is_operator, random.integers(2, max_args + 1, size), 0)
        levels.append((operators, digits, parents, num_arguments))
        symbols += np.bincount(tree, np.where(is_operator, 2, 1), roots).astype(np.int64)
        parents = np.repeat(np.arange(size), num_arguments)
        tree = tree[parents]
        if len(parents) == 0:
            break
    return levels


def reduce_arguments(operators: np.ndarray, counts: np.ndarray, starts: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The value of every operator; its arguments are `values[start : start + count]`."""
    ordered = np.sort(np.repeat(np.arange(len(counts)), counts) * 10 + values) % 10
    median = (ordered[starts + (counts - 1) // 2] + ordered[starts + counts // 2]) // 2
    return np.select(
        [operators == MIN, operators == MAX, operators == MED],
        [ordered[starts], ordered[starts + counts - 1], median],
        np.add.reduceat(values, starts) % 10,
    )
