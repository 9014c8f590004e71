"""What reads callers' text takes time in proportion to it, up to its limit, and next to none beyond.

Times are the CPU's, as ratios between texts of ten times the size: about ten for work in proportion, a hundred for
work that grows with the square.
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

# Between 10, in proportion, and 100, the square; caches and allocators have their steps.
MOST_GROWTH = 40.0
# Seconds below which a measurement says nothing.
FLOOR = 20e-6


def growth(smaller: float, larger: float) -> float:
    return max(larger, FLOOR) / max(smaller, FLOOR)


@pytest.mark.fault(120)
def test_every_regular_expression_is_measured_or_sees_no_callers_text() -> None:
    """Each is a constant of its module that the next test measures, or the module is on the list, with its reason."""
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
    """Of 1,000, 10,000 and 100,000 characters of every shape, whatever limit stands before it."""
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
    """At 1/100, 1/10 and 1 × of its limit, for every shape."""
    for name in parser.shapes:
        took = 0.0
        for part in (100, 10, 1):
            before, took = took, parser.seconds(name, parser.limit // part)
            assert not before or growth(before, took) < MOST_GROWTH, (name, part, before, took)


@pytest.mark.fault(121)
@pytest.mark.parametrize("parser", [one for one in PARSERS if one.refuses], ids=lambda one: one.name)
def test_what_is_beyond_a_limit_costs_no_more_than_what_is_at_it(parser: Parser) -> None:
    """Ten times as far beyond it is refused in the same time; what is looked at does not depend on it."""
    for name in list(parser.shapes)[:: 1 if parser.limit < 100_000 else 6]:
        near, far = (parser.seconds(name, parser.limit * times) for times in (2, 20))
        assert growth(near, far) < 4 or far < 0.001, (name, near, far)
