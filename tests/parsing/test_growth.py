"""Parsers of callers' text take linear time up to their limit, and almost none above it.

The tests compare CPU times of inputs of ten times the size: a ratio of about ten is linear, a hundred is quadratic.
"""

from __future__ import annotations

import pytest
from caller_text import (
    NEVER_CALLERS,
    PARSERS,
    SHAPES,
    Expression,
    Parser,
    calls_of_re,
    expressions,
    opened,
    repeated,
    seconds_of,
)

pytestmark = pytest.mark.slow

# Between 10 (linear) and 100 (quadratic), to allow for steps of caches and allocators.
MOST_GROWTH = 40.0
# Times below this many seconds are not significant.
FLOOR = 20e-6


def growth(smaller: float, larger: float) -> float:
    return max(larger, FLOOR) / max(smaller, FLOOR)


@pytest.mark.fault(120)
def test_every_regular_expression_is_measured_or_sees_no_callers_text() -> None:
    """Each is a module constant that the next test measures, or is on the list with a reason."""
    nameless = [
        (module, call.lineno) for module, call, name in calls_of_re() if module not in NEVER_CALLERS and not name
    ]
    assert nameless == []
    assert all(expression.methods for expression in expressions())
    assert set(NEVER_CALLERS) <= {module for module, _, _ in calls_of_re()}
    assert len(expressions()) > 15


@pytest.mark.fault(120)
@pytest.mark.parametrize("expression", expressions(), ids=lambda one: f"{one.module}:{one.name}")
def test_no_regular_expression_over_callers_text_grows_with_the_square(expression: Expression) -> None:
    """1,000, 10,000 and 100,000 characters of every pattern, regardless of the limit in front of it."""
    for name, shape in SHAPES.items():
        for make in (repeated, opened):
            took = 0.0
            for size in (1_000, 10_000, 100_000):
                text = make(shape, size)
                before, took = took, seconds_of(lambda: expression.read(text))  # noqa: B023  # run at once
                assert not before or growth(before, took) < MOST_GROWTH, (name, size, before, took)


@pytest.mark.fault(120)
@pytest.mark.parametrize("parser", PARSERS, ids=lambda one: one.name)
def test_no_parser_of_callers_text_grows_with_the_square(parser: Parser) -> None:
    """At 1/100, 1/10 and 1 × of its limit, for every pattern."""
    for name in parser.shapes:
        took = 0.0
        for part in (100, 10, 1):
            before, took = took, parser.seconds(name, parser.limit // part)
            assert not before or growth(before, took) < MOST_GROWTH, (name, part, before, took)


@pytest.mark.fault(121)
@pytest.mark.parametrize("parser", [one for one in PARSERS if one.refuses], ids=lambda one: one.name)
def test_what_is_beyond_a_limit_costs_no_more_than_what_is_at_it(parser: Parser) -> None:
    """Ten times longer input is refused in the same time: the time does not depend on the excess."""
    for name in list(parser.shapes)[:: 1 if parser.limit < 100_000 else 6]:
        near, far = (parser.seconds(name, parser.limit * times) for times in (2, 20))
        assert growth(near, far) < 4 or far < 0.001, (name, near, far)
