# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The value of a ListOps expression by its definition, which the generated labels are compared with."""

from collections.abc import Sequence

import numpy as np

from benchmarks.quality.tasks.listops import DIGIT, END, MAX, MIN, SM, SYMBOLS


def encode(expression: str) -> np.ndarray:
    """The tokens of an expression whose symbols are parted by blanks."""
    return np.array([SYMBOLS.index(symbol) for symbol in expression.split()], np.uint8)


def decode(tokens: Sequence[int]) -> str:
    """The expression that tokens spell."""
    return " ".join(SYMBOLS[token] for token in tokens)


def evaluate(tokens: Sequence[int]) -> int:
    """The value of an expression, by the definition: one stack, symbol after symbol.

    Raises:
        ValueError: if the tokens are no complete expression.
    """
    stack: list[tuple[int, list[int]]] = [(0, [])]
    for token in map(int, tokens):
        if MIN <= token <= SM:
            stack.append((token, []))
        elif token >= DIGIT:
            stack[-1][1].append(token - DIGIT)
        elif token == END and len(stack) > 1 and stack[-1][1]:
            operator, arguments = stack.pop()
            stack[-1][1].append(apply(operator, arguments))
        else:
            raise ValueError(f"Unexpected {SYMBOLS[token]!r} in {decode(tokens)!r}.")
    if len(stack) != 1 or len(stack[0][1]) != 1:
        raise ValueError(f"{decode(tokens)!r} is not one complete expression.")
    return stack[0][1][0]


def apply(operator: int, arguments: list[int]) -> int:
    """The value of one operator; a median between two digits is rounded down."""
    if operator == MIN:
        return min(arguments)
    if operator == MAX:
        return max(arguments)
    if operator == SM:
        return sum(arguments) % 10
    ordered = sorted(arguments)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) // 2
