"""Parsers of callers' text take linear time up to their limit, and almost none above it.

The tests compare CPU times of inputs of ten times the size: a ratio of about ten is linear, a hundred is quadratic.
CPU time includes what a hypervisor or a neighbour on the same core takes. So a ratio that is too large is measured
again, and the minimum of each size counts: a quadratic parser still grows a hundredfold, and a disturbance passes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

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


# So often is a suspicious ratio measured; twice if that takes seconds, which no disturbance explains.
ROUNDS, PATIENCE = 8, 2.0


def growth_beyond(most: float, measures: Sequence[Callable[[], float]]) -> list[float]:
    """CPU seconds of the first two sizes in a row of which the larger takes `most` times as long; else nothing."""
    after = measures[0]()
    for smaller, larger in pairwise(measures):
        before, after = after, larger()
        for number in range(ROUNDS if after < PATIENCE else 2):
            if max(after, FLOOR) / max(before, FLOOR) < most:
                break
            time.sleep(0.05 * number)  # a disturbance passes
            before, after = min(before, smaller()), min(after, larger())
        else:
            return [before, after]
    return []


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
            texts = [make(shape, size) for size in (1_000, 10_000, 100_000)]
            measures = [partial(seconds_of, partial(expression.read, text)) for text in texts]
            times = growth_beyond(MOST_GROWTH, measures)
            assert not times, (name, make, times)


@pytest.mark.fault(120)
@pytest.mark.parametrize("parser", PARSERS, ids=lambda one: one.name)
def test_no_parser_of_callers_text_grows_with_the_square(parser: Parser) -> None:
    """At 1/100, 1/10 and 1 × of its limit, for every pattern."""
    for name in parser.shapes:
        sizes = [parser.limit // part for part in (100, 10, 1)]
        times = growth_beyond(MOST_GROWTH, [partial(parser.seconds, name, size) for size in sizes])
        assert not times, (name, sizes, times)


@pytest.mark.fault(121)
@pytest.mark.parametrize("parser", [one for one in PARSERS if one.refuses], ids=lambda one: one.name)
def test_what_is_beyond_a_limit_costs_no_more_than_what_is_at_it(parser: Parser) -> None:
    """Ten times longer input is refused in the same time: the time does not depend on the excess."""
    for name in list(parser.shapes)[:: 1 if parser.limit < 100_000 else 6]:
        sizes = [parser.limit * times for times in (2, 20)]
        times = growth_beyond(4, [partial(parser.seconds, name, size) for size in sizes])
        assert not times or times[-1] < 0.001, (name, sizes, times)
