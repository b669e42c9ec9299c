# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""ListOps: the published grammar, the right values, and the same data from the same seed."""

import numpy as np
import pytest

from benchmarks.quality.tasks import listops
from tests.benchmarks.expressions import decode, encode, evaluate


def split(tokens: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    return np.split(tokens, np.cumsum(lengths)[:-1])


@pytest.mark.quick
@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("7", 7),
        ("[MAX 2 9 [MIN 4 7 ] 0 ]", 9),
        ("[MIN 5 3 8 ]", 3),
        ("[SM 9 8 7 ]", 4),
        ("[SM 5 5 ]", 0),
        ("[MED 9 1 4 ]", 4),
        ("[MED 3 8 ]", 5),  # 5.5, rounded down as in the published generator
        ("[MED 1 2 9 9 ]", 5),
        ("[SM [MAX 1 [MIN 6 7 8 ] ] [MED 4 4 0 ] 5 ]", 5),
    ],
)
def test_expressions_written_by_hand_have_their_value(expression, value):
    assert evaluate(encode(expression)) == value
    assert decode(encode(expression)) == expression


@pytest.mark.parametrize("expression", ["[MAX 1 2", "1 2", "]", "[MAX ]", "[MIN 1 ] ]", ""])
def test_incomplete_expressions_are_refused(expression):
    with pytest.raises(ValueError, match=r"Unexpected|not one complete"):
        evaluate(encode(expression))


@pytest.mark.quick
def test_generated_expressions_evaluate_to_their_label():
    tokens, lengths, values = listops.generate(60, seed=3)
    assert len(lengths) == len(values) == 60 and len(tokens) == lengths.sum()
    for expression, value in zip(split(tokens, lengths), values, strict=True):
        assert evaluate(expression) == value
    # Strictly between 500 and 2,000 symbols, as published
    assert lengths.min() > 500 and lengths.max() < 2000


def test_generated_trees_keep_to_depth_and_number_of_arguments():
    tokens, lengths, _ = listops.generate(300, seed=0, min_length=5, max_length=200, max_depth=5, max_args=4)
    deepest = most = 0
    for expression in split(tokens, lengths):
        arguments = []  # of the open operators
        for token in expression:
            if token == listops.END:
                number = arguments.pop()
                assert 2 <= number <= 4
                most = max(most, number)
            elif arguments:
                arguments[-1] += 1
            if listops.MIN <= token <= listops.SM:
                arguments.append(0)
            deepest = max(deepest, len(arguments) + 1)  # digits below the innermost open operator
    assert deepest == 5 and most == 4


def test_operators_are_drawn_as_published():
    """Without bounds on the length, a child is an operator with probability 1/4 and every operator is as likely."""
    tokens, lengths, _ = listops.generate(4000, seed=1, min_length=0, max_length=10**6, max_depth=3, max_args=10)
    operators = np.bincount(tokens, minlength=listops.VOCAB_SIZE)[listops.MIN : listops.SM + 1]
    below_the_root = operators.sum() - len(lengths)
    # 4,000 roots have 6 children each in the mean: 24,000 children, of which a quarter with a standard error of 0.28%
    children = 6 * len(lengths)
    assert abs(below_the_root / children - 0.25) < 0.015
    # Some 10,000 operators of four kinds: a standard error of 0.43%
    np.testing.assert_allclose(operators / operators.sum(), 0.25, atol=0.02)


@pytest.mark.quick
def test_the_seed_determines_the_data_and_splits_differ():
    first, again, other = (listops.generate(20, seed) for seed in ([0, 0], [0, 0], [0, 1]))
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    expressions = {tuple(row) for row in split(*first[:2])} | {tuple(row) for row in split(*other[:2])}
    assert len(expressions) == 40
