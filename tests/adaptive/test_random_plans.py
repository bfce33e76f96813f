"""10,000 random settings through the planner: a plan that can be run, or an error that names what is wrong."""

from __future__ import annotations

import random

from adabatch import Constant, Limits, NormTest
from adabatch.adaptive.validation import limits_and_grid
from adabatch.batch.plan import Progress, micro_batch_sizes

CLEAR = ("use", "move", "must", "is below", "is above", "cannot")


def test_random_settings_make_a_plan_or_a_clear_error() -> None:
    rng = random.Random(0)
    made = refused = 0
    unclear: list[str] = []
    for _ in range(10_000):
        dp_size, micro = rng.randint(1, 16), rng.choice([0, 1, 2, 3, 8, 24, 64])
        largest = rng.choice([micro, micro * rng.randint(1, 9), rng.randint(0, 300)])
        low, high = dp_size * rng.randint(1, 200), rng.randint(1, 6000)
        criterion = rng.choice([NormTest(eta=0.5), Constant(rng.randint(1, 3000))])
        try:
            limits, grid = limits_and_grid(
                Limits(min=low, max=high),
                criterion,
                dp_size=dp_size,
                num_compared=dp_size,
                micro_sizes=micro_batch_sizes(micro, largest),
                in_parts=rng.random() < 0.5,
            )
            least, most = limits.at(Progress())
            plan = grid.nearest(rng.uniform(0, 8000), min_size=least, max_size=most)
        except ValueError as error:
            refused += 1
            unclear += [str(error)] * (not any(word in str(error) for word in CLEAR))
            continue
        made += 1
        assert least <= plan.global_batch_size <= most
        assert plan.dp_size == dp_size
        assert micro <= plan.micro_batch_size <= largest
        assert plan.accumulation_steps >= grid.min_accumulation
    assert not unclear
    assert made > 500
    assert refused > 500
