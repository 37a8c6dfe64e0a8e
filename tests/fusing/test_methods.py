"""The arithmetic of fusing on small arrays: values worked out by hand, limits, and the errors."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from coldctl.checkpoints.header import rounded
from coldctl.common.errors import ConfigError
from coldctl.fusing import methods
from coldctl.fusing.recipe import normalised, outer_step, scaled


def array(*values: Any, dtype: Any = np.float32) -> Any:
    return np.asarray(values, dtype)


# Means ----------------------------------------------------------------------------------------------------------


def test_the_mean_divides_once() -> None:
    parts = [array(1, 2), array(2, 4), array(6, 0)]
    assert methods.mean(parts).tolist() == [3.0, 2.0]
    assert methods.mean(parts).dtype == np.float64
    assert methods.mean([array(0.1)]).tolist() == [float(np.float32(0.1))]
    thirds = [array(0.1), array(0.2), array(0.7)]
    total = sum(float(part[0]) for part in thirds)
    assert methods.mean(thirds)[0] == total / 3


def test_weights_need_not_sum_to_one() -> None:
    parts = [array(1, 10), array(2, 20), array(4, 40)]
    assert methods.mean(parts, np.asarray([1.0, 2, 1])).tolist() == [9 / 4, 90 / 4]
    assert methods.mean(parts, np.asarray([0.0, 3, 1])).tolist() == [10 / 4, 100 / 4]
    assert methods.mean(parts, np.asarray([5.0, 5, 5])).tolist() == methods.mean(parts).tolist()
    assert methods.mean(parts, np.asarray([0.0, 7, 0])).tolist() == [2, 20]


def test_what_has_no_weight_is_not_read() -> None:
    assert methods.mean([array(np.nan), array(2), array(4)], np.asarray([0.0, 1, 3])).tolist() == [3.5]
    assert methods.mean([array(np.inf), array(2), array(4)], np.asarray([0.0, 2, 2])).tolist() == [3.0]


def test_equal_weights_give_copies_back_exactly() -> None:
    value = np.float32(0.1)
    for count in range(1, 12):
        weights = np.full(count, 1 / 3)
        assert methods.mean([array(value)] * count, weights)[0] == float(value)
        assert methods.mean([array(0.1, dtype=np.float64)] * count)[0] == 0.1


def test_equal_weights_are_no_weights() -> None:
    rng = np.random.default_rng(2)
    parts = [rng.standard_normal(1000).astype(np.float32) for _ in range(7)]
    assert np.array_equal(methods.mean(parts, np.full(7, 0.1)), methods.mean(parts))


def test_pieces_change_nothing() -> None:
    """More elements than are added at a time, in all three ways of adding."""
    rng = np.random.default_rng(0)
    size = (1 << 16) * 2 + 7
    parts = [rng.standard_normal(size).astype(np.float32) for _ in range(3)]
    wide = [part.astype(np.float64) for part in parts]
    plain, weighted = methods.mean(parts), methods.mean(parts, np.asarray([1.0, 2, 5]))
    assert np.array_equal(plain, (wide[0] + wide[1] + wide[2]) / 3)
    assert np.array_equal(weighted, (wide[0] + wide[1] * 2 + wide[2] * 5) / 8)
    assert methods._PIECE == 1 << 16  # as said: what stays in a core's cache


def test_doubles_are_added_in_extended_precision() -> None:
    parts = [array(1e16, dtype=np.float64), array(1, dtype=np.float64), array(-1e16, dtype=np.float64)]
    assert methods.mean(parts)[0] == 1 / 3  # in float64 alone the 1 is lost
    mixed = [parts[0], array(1), parts[2]]
    assert methods.mean(mixed)[0] == 1 / 3
    assert methods.mean(parts, np.asarray([1.0, 2, 1]))[0] == pytest.approx(2 / 4)
    assert methods.mean(parts, np.asarray([0.5, 2.5, 0.5]))[0] == pytest.approx(2.5 / 3.5)


def test_groups_of_doubles_weighted_by_their_sizes_give_the_mean_of_all() -> None:
    rng = np.random.default_rng(1)
    parts = [rng.standard_normal(500) for _ in range(5)]
    groups = [methods.mean(parts[:2]), methods.mean(parts[2:])]
    again = methods.mean(groups, np.asarray([2.0, 3.0]))
    assert np.abs(again - methods.mean(parts)).max() <= np.spacing(1.0)
    whole = [rng.integers(-(1 << 40), 1 << 40, 20_000).astype(np.float64) for _ in range(5)]  # sums without rounding
    groups = [methods.mean(whole[:2]), methods.mean(whole[2:])]
    assert np.array_equal(methods.mean(groups, np.asarray([2.0, 3.0])), methods.mean(whole))
    copies = [rng.standard_normal(500)] * 2
    assert np.array_equal(methods.mean(copies, np.asarray([2.0, 3.0])), copies[0])


def test_scaled() -> None:
    base, merged = array(1, 2), array(3, 1, dtype=np.float64)
    assert scaled(base, merged, 1.0) is merged
    assert scaled(base, merged, 0.0).tolist() == [1, 2]
    assert scaled(base, array(np.inf, 1, dtype=np.float64), 0.0).tolist() == [1, 2]
    assert scaled(base, merged, 0.5).tolist() == [2, 1.5]
    assert scaled(base, merged, -1.0).tolist() == [-1, 3]
    assert scaled(base, merged, 2.0).tolist() == [5, 0]


# One weight per contribution ------------------------------------------------------------------------------------


def gram_of(*updates: Any) -> Any:
    rows = np.asarray(updates, np.float64)
    return rows @ rows.T


def test_krum_keeps_the_closest() -> None:
    gram = gram_of([1.0, 0], [1.1, 0], [0.9, 0], [1.0, 0.05], [50, 0])
    assert methods.krum_weights(gram, 1).tolist() == [0.5, 0, 0, 0.5, 0]  # 5 - 1 - 2 = 2 are kept
    kept = methods.krum_weights(gram, 0)
    assert sorted(kept.tolist()) == [0, 0, 1 / 3, 1 / 3, 1 / 3]
    assert kept[0] > 0
    assert kept[3] > 0
    assert kept[4] == 0
    with pytest.raises(ConfigError, match="needs 7 contributions, there are 5"):
        methods.krum_weights(gram, 2)
    assert np.count_nonzero(methods.krum_weights(gram[:3, :3], 0)) == 1  # the fewest that there may be
    with pytest.raises(ConfigError, match="needs 3"):
        methods.krum_weights(gram[:2, :2], 0)


def test_krum_scores_are_sums_over_the_nearest() -> None:
    """By the paper's definition, written out with loops."""
    rng = np.random.default_rng(3)
    for count, byzantine in ((5, 1), (7, 2), (9, 2), (6, 0)):
        updates = rng.standard_normal((count, 4)) * rng.uniform(0.5, 3, (count, 1))
        near = count - byzantine - 2
        scores = [
            sum(sorted(float(((one - other) ** 2).sum()) for j, other in enumerate(updates) if j != i)[:near])
            for i, one in enumerate(updates)
        ]
        chosen = np.argsort(scores)[:near]
        expected = np.zeros(count)
        expected[chosen] = 1 / near
        assert methods.krum_weights(gram_of(*updates), byzantine).tolist() == expected.tolist()


def test_the_geometric_median_of_points_on_a_line_is_their_median() -> None:
    weights = methods.geometric_median_weights(gram_of([0.0], [1.0], [10.0]), np.ones(3))
    assert weights @ [0, 1, 10] == pytest.approx(1, abs=1e-3)
    assert weights.sum() == pytest.approx(1)
    shares = np.asarray([1.0, 1.0, 5.0])
    assert methods.geometric_median_weights(gram_of([0.0], [1.0], [10.0]), shares) @ [0, 1, 10] == pytest.approx(
        10, abs=1e-2
    )


def test_the_geometric_median_is_where_no_step_makes_the_distances_smaller() -> None:
    rng = np.random.default_rng(5)
    points, shares = rng.standard_normal((6, 3)), rng.uniform(1, 3, 6)
    weights = methods.geometric_median_weights(gram_of(*points), shares)
    assert weights.sum() == pytest.approx(1)
    found = weights @ points

    def cost(place: Any) -> float:
        return float(shares @ np.sqrt(((points - place) ** 2).sum(1)))

    for _ in range(200):
        assert cost(found) <= cost(found + 1e-3 * rng.standard_normal(3)) + 1e-9


def test_the_geometric_median_may_be_near_where_it_is_slow_to_reach() -> None:
    """Three steps pull at an update as hard as it holds: the way there becomes ever shorter, and ends after a while."""
    points = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    weights = methods.geometric_median_weights(gram_of(*points), np.ones(4))
    assert weights.sum() == pytest.approx(1)
    cost = np.sqrt(((points - weights @ points) ** 2).sum(1)).sum()
    assert 3 <= cost < 3.01


def test_the_geometric_median_of_updates_that_are_zero() -> None:
    assert methods.geometric_median_weights(np.zeros((4, 4)), np.ones(4)).tolist() == [0.25] * 4
    weights = methods.geometric_median_weights(np.zeros((2, 2)), np.asarray([1.0, 3.0]))
    assert weights.tolist() == [0.25, 0.75]


# Weights per tensor ---------------------------------------------------------------------------------------------


def test_model_stock() -> None:
    assert methods.model_stock_share(gram_of([1.0, 0])) == 1.0
    assert methods.model_stock_share(gram_of([1.0, 0], [1.0, 0])) == pytest.approx(1.0)
    assert methods.model_stock_share(gram_of([1.0, 0], [0, 1.0])) == 0.0
    half = [0.5, np.sqrt(0.75)]
    assert methods.model_stock_share(gram_of([2.0, 0], half)) == pytest.approx(2 * 0.5 / 1.5)
    three = gram_of([1.0, 0, 0], [0.5, np.sqrt(0.75), 0], [0.5, 0, np.sqrt(0.75)])
    cosine = (0.5 + 0.5 + 0.25) / 3
    assert methods.model_stock_share(three) == pytest.approx(3 * cosine / (1 + 2 * cosine))
    assert methods.model_stock_share(gram_of([1.0, 0], [-1.0, 0])) == 0.0
    assert methods.model_stock_share(gram_of([1.0, 0], [-0.5, 0.1])) == 0.0
    assert methods.model_stock_share(gram_of([0.0, 0], [1.0, 0])) == 0.0  # no direction, no agreement
    with_a_zero = gram_of([1.0, 0], [1.0, 0], [0.0, 0])  # cosines 1, 0, 0
    assert methods.model_stock_share(with_a_zero) == pytest.approx(3 * (1 / 3) / (1 + 2 / 3))
    spread = gram_of([1.0, 0], [-0.5, np.sqrt(0.75)], [-0.5, -np.sqrt(0.75)])
    assert methods.model_stock_share(spread) == 0.0  # the mean is the base


def test_slerp() -> None:
    right = gram_of([1.0, 0], [0, 1.0])
    assert methods.slerp_weights(right, 0.5) == pytest.approx([np.sqrt(0.5), np.sqrt(0.5)])
    assert methods.slerp_weights(right, 0.0) == pytest.approx([1, 0])
    assert methods.slerp_weights(right, 1.0) == pytest.approx([0, 1])
    third = methods.slerp_weights(right, 1 / 3)
    assert third == pytest.approx([np.cos(np.pi / 6), np.sin(np.pi / 6)])
    for near in (0.9996, -0.9996):
        straight = gram_of([1.0, 0], [near, np.sqrt(1 - near**2)])
        assert methods.slerp_weights(straight, 0.25) == pytest.approx([0.75, 0.25], abs=1e-12)
    bent = methods.slerp_weights(gram_of([1.0, 0], [0.99, np.sqrt(1 - 0.99**2)]), 0.25)
    assert bent.sum() > 1 + 1e-4  # a great circle, not the line below it
    assert methods.slerp_weights(gram_of([2.0, 0], [0, 5.0]), 0.5) == pytest.approx([np.sqrt(0.5)] * 2)
    assert methods.slerp_weights(gram_of([0.0, 0], [0, 5.0]), 0.25).tolist() == [0.75, 0.25]
    sixty = gram_of([2.0, 0], [2.5, 2.5 * np.sqrt(3)])  # lengths 2 and 5, 60 degrees between them
    sine = np.sin(np.pi / 3)
    for position in (0.0, 0.2, 0.5, 1.0):
        expected = [np.sin((1 - position) * np.pi / 3) / sine, np.sin(position * np.pi / 3) / sine]
        assert methods.slerp_weights(sixty, position) == pytest.approx(expected, abs=1e-12)
    obtuse = methods.slerp_weights(gram_of([1.0, 0], [-0.5, np.sqrt(0.75)]), 0.25)
    assert obtuse == pytest.approx([1 / np.sin(2 * np.pi / 3), np.sin(np.pi / 6) / np.sin(2 * np.pi / 3)])


# Element by element ---------------------------------------------------------------------------------------------


def test_median() -> None:
    assert methods.median([array(1, 9), array(5, 2), array(3, 4)]).tolist() == [3, 4]
    assert methods.median([array(1), array(2), array(4), array(100)]).tolist() == [3]
    assert methods.median([array(7)]).tolist() == [7]
    assert methods.median([array(2), array(5)]).tolist() == [3.5]


def test_trimmed_mean() -> None:
    parts = [array(value) for value in (100, 1, 2, 3, -100)]
    assert methods.trimmed_mean(parts, 0.2).tolist() == [2]
    assert methods.trimmed_mean(parts, 0.4).tolist() == [2]
    assert methods.trimmed_mean(parts, 0.0)[0] == pytest.approx(6 / 5)
    assert methods.trimmed_mean([array(1), array(2), array(6)], 0.3)[0] == 3  # less than one of three: none
    columns = [array(5, -1, 2), array(1, 7, 0), array(3, 3, 9), array(-50, 2, 1)]
    assert methods.trimmed_mean(columns, 0.25).tolist() == [2, 2.5, 1.5]
    with pytest.raises(ConfigError, match=r"--trim 0\.5 leaves nothing of 4"):
        methods.trimmed_mean([array(1)] * 4, 0.5)
    assert methods.trimmed_mean([array(1)] * 5, 0.5).tolist() == [1]  # the median


def test_ties() -> None:
    base = array(10, 10, 10, 10)
    parts = [array(11, 10.5, 12, 10), array(13, 9, 8, 10)]
    none, equal = np.zeros(2), np.asarray([0.5, 0.5])
    # Elements: both up; down outweighs; +2 and -2 cancel (positive is kept); none moves.
    assert methods.ties(parts, base, none, equal).tolist() == [12, 9, 12, 10]
    assert methods.ties(parts, base, np.asarray([0.0, 3.5]), equal).tolist() == [11, 10.5, 12, 10]
    assert methods.ties(parts, base, np.asarray([0.0, 3.0]), equal).tolist() == [12, 10.5, 12, 10]  # 3 itself is kept
    assert methods.ties(parts, base, none, np.asarray([0.75, 0.25])).tolist() == [11.5, 10.5, 12, 10]
    assert methods.ties(parts, base, none, np.asarray([0.25, 0.75])).tolist() == [12.5, 9, 8, 10]
    assert methods.ties(parts, base, np.full(2, 99.0), equal).tolist() == [10] * 4


def test_dare() -> None:
    base, part = np.zeros(20000, np.float32), np.ones(20000, np.float32)
    drawn = methods.dare([part], base, np.ones(1), 0.25, ["k"], "t", 0, 7)
    assert sorted(set(drawn.tolist())) == [0.0, 4.0]
    assert drawn.mean() == pytest.approx(1, abs=0.05)
    assert np.array_equal(methods.dare([part], base, np.ones(1), 1.0, ["k"], "t", 0, 7), part)
    for other in (("j", "t", 7), ("k", "u", 7), ("k", "t", 8)):
        key, name, seed = other
        assert not np.array_equal(drawn, methods.dare([part], base, np.ones(1), 0.25, [key], name, 0, seed))
    both = methods.dare([part, 3 * part], base + 1, np.asarray([0.5, 0.5]), 0.5, ["k", "j"], "t", 0, 7)
    assert sorted(set(both.tolist())) == [1.0, 3.0]  # 1 + nothing of the first + (3 - 1) · 0.5 / 0.5 of the second
    for start in (1, 3, 4, 6, 9):
        later = methods.dare([part[start:]], base[start:], np.ones(1), 0.25, ["k"], "t", start, 7)
        assert np.array_equal(later, drawn[start:])


def test_fisher() -> None:
    parts, information = [array(1, 1, 1), array(3, 5, 2)], [array(1, 0, 0), array(3, 2, 0)]
    equal = np.asarray([0.5, 0.5])
    assert methods.fisher(parts, information, equal).tolist() == [2.5, 5, 1.5]
    assert methods.fisher(parts, information, np.asarray([0.75, 0.25])).tolist() == [2, 5, 1.25]


# The outer step -------------------------------------------------------------------------------------------------


def test_outer_steps() -> None:
    base, merged = array(10), np.asarray([8.0])  # g = 2
    zero = [np.zeros(1)]
    after, state = outer_step("sgd", base, merged, 0.5, 0.9, zero)
    assert (after.tolist(), [item.tolist() for item in state]) == ([9.0], [[2.0]])
    after, state = outer_step("sgd", base, merged, 0.5, 0.9, [np.ones(1)])
    assert after[0] == pytest.approx(10 - 0.5 * 2.9)
    assert state[0][0] == pytest.approx(2.9)
    after, state = outer_step("nesterov", base, merged, 0.5, 0.9, [np.ones(1)])
    assert after[0] == pytest.approx(10 - 0.5 * (2 + 0.9 * 2.9))
    assert state[0][0] == pytest.approx(2.9)
    after, state = outer_step("adam", base, merged, 0.1, 0.9, [np.ones(1), np.full(1, 3.0)])
    first, second = 0.9 + 0.1 * 2, 0.99 * 3 + 0.01 * 4
    assert after[0] == pytest.approx(10 - 0.1 * first / (np.sqrt(second) + 1e-3), rel=1e-12)
    assert [item[0] for item in state] == pytest.approx([first, second])
    after, _ = outer_step("adam", base, np.asarray([7.0]), 0.1, 0.0, [np.zeros(1), np.zeros(1)])
    assert after[0] == pytest.approx(10 - 0.1 * 3 / (0.3 + 1e-3), rel=1e-12)


# Weights and rounding -------------------------------------------------------------------------------------------


def test_normalised() -> None:
    assert normalised([1, 3]).tolist() == [0.25, 0.75]
    assert normalised([0, 2]).tolist() == [0, 1]
    assert normalised([0.125, 0.125]).tolist() == [0.5, 0.5]
    for wrong in ([-1.0, 2], [0.0, 0], [np.inf, 1], [np.nan, 1]):
        with pytest.raises(ConfigError, match="finite, not negative, and not all zero"):
            normalised(wrong)


def test_normalised_below_a_largest_share() -> None:
    assert normalised([8, 1, 1], 0.5) == pytest.approx([0.5, 0.25, 0.25])
    assert normalised([8, 1, 1], 0.8).tolist() == [0.8, 0.1, 0.1]
    assert normalised([8, 1, 1], 1 / 3) == pytest.approx([1 / 3] * 3)
    assert normalised([16, 6, 1, 1], 0.4) == pytest.approx([0.4, 0.4, 0.1, 0.1])  # one cut makes another
    assert normalised([8, 2, 2, 0], 0.5) == pytest.approx([0.5, 0.25, 0.25, 0])
    assert normalised([5], 1.0).tolist() == [1]
    with pytest.raises(ConfigError, match=r"--max-share 0\.3 is less than an equal share of 3"):
        normalised([8, 1, 1], 0.3)
    with pytest.raises(ConfigError, match="equal share of 2"):
        normalised([8, 1, 0], 0.45)  # a weight of zero takes nothing over


def test_rounded_to_nearest_even() -> None:
    assert rounded(np.asarray([1 + 2.0**-24, 1 + 3 * 2.0**-24]), np.dtype(np.float32)).tolist() == [
        1,
        1 + 2.0**-22,
    ]
    assert rounded(np.asarray([1e39, -1e39]), np.dtype(np.float32)).tolist() == [np.inf, -np.inf]
    narrow = np.dtype(ml_dtypes.bfloat16)
    step = 2.0**-7
    half = [1 + step / 2, 1 + 3 * step / 2, -1 - step / 2, 1 + step / 2 + 2.0**-40, 1 + step / 2 - 2.0**-40]
    expected = [1, 1 + 2 * step, -1, 1 + step, 1]
    assert rounded(np.asarray(half), narrow).astype(np.float64).tolist() == expected
    small = [-1 - step / 2 - 2.0**-40, -1 - step / 2 + 2.0**-40, 0.0, 1e39, 3e38]
    narrowed = rounded(np.asarray(small), narrow).astype(np.float64)
    assert narrowed[:4].tolist() == [-1 - step, -1, 0, np.inf]
    for dtype in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16):
        assert rounded(np.zeros(2), np.dtype(dtype)).dtype == dtype


def test_rounding_is_the_nearest_value_everywhere() -> None:
    """Against the definition: no neighbour in bfloat16 lies nearer, and of two as near the even one is taken."""
    rng = np.random.default_rng(9)
    values = rng.standard_normal(4000) * 2.0 ** rng.integers(-120, 120, 4000)
    ties = (rng.integers(128, 256, 4000) + 0.5) * 2.0 ** rng.integers(-60, 60, 4000) * rng.choice([-1, 1], 4000)
    close = np.nextafter(ties, np.inf * rng.choice([-1, 1], 4000))
    for wide in (values, ties, close):
        found = rounded(wide, np.dtype(ml_dtypes.bfloat16))
        bits = found.view(np.uint16)
        distance = np.abs(found.astype(np.float64) - wide)
        for neighbour in (bits + 1, bits - 1):
            other = np.abs(neighbour.view(ml_dtypes.bfloat16).astype(np.float64) - wide)
            assert (distance <= other).all()
            assert (bits[distance == other] % 2 == 0).all()
