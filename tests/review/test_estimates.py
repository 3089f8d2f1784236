"""Estimates against brute force: intervals contain the true numbers as often as they say."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from math import prod

import numpy as np
import pytest
from scipy.stats import hypergeom

from forgetfilter_callback.review import estimates
from forgetfilter_callback.review.estimates import ReviewEstimate, unsafe_rows_left
from forgetfilter_callback.review.verdicts import Verdict, known_labels


def given(row: int, unsafe: bool, drawn_from: int | None = None) -> Verdict:
    return Verdict(row, str(row), "unsafe" if unsafe else "safe", "", None, drawn_from)


def estimate_unsafe_rows(verdicts: list[Verdict], rows: int, removed=None) -> ReviewEstimate:
    """Without identical rows."""
    return estimates.estimate_unsafe_rows(verdicts, known_labels(verdicts, np.arange(rows)), rows, removed)


def estimate_filter_errors(verdicts: list[Verdict], removed: np.ndarray, parts: list[np.ndarray]) -> ReviewEstimate:
    known = known_labels(verdicts, np.arange(len(removed)))
    return estimates.estimate_filter_errors(verdicts, known, removed, parts)


def simulate(rng: np.random.Generator, rows: int, unsafe_rows: int, rounds: int) -> tuple[list[Verdict], np.ndarray]:
    """Rounds of five rows by a noisy score and five random ones."""
    unsafe = np.zeros(rows, dtype=bool)
    unsafe[rng.choice(rows, unsafe_rows, replace=False)] = True
    ranking = np.argsort(-(unsafe + rng.normal(size=rows)))
    seen = np.zeros(rows, dtype=bool)
    verdicts = []
    for _ in range(rounds):
        unseen = np.flatnonzero(~seen)
        drawn = rng.choice(unseen, 5, replace=False)
        ranked = [row for row in ranking if not seen[row] and row not in drawn][:5]
        for row in rng.permutation([*drawn, *ranked]):
            verdicts.append(given(int(row), unsafe[row], len(unseen) if row in drawn else None))
            seen[row] = True
    return verdicts, unsafe


def test_intervals_contain_the_unsafe_rows_that_are_left_in_about_nine_of_ten_reviews():
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(500):
        verdicts, unsafe = simulate(rng, 200, 60, 6)
        estimate = estimate_unsafe_rows(verdicts, 200)
        left = unsafe.sum() - estimate.unsafe_found
        covered.append(estimate.unsafe_left[0] <= left <= estimate.unsafe_left[1])
        assert estimate.benign_removed == (0, 0)
    assert 0.87 < np.mean(covered) < 0.93


def accepted_by(drawn: int, hits: int, rows: int) -> tuple[int, int]:
    """The interval that the mid-p test gives at 5 % on each side, if `drawn` rows are drawn and `hits` are unsafe."""

    def is_accepted(total: int) -> bool:
        of_draws = hypergeom(rows, total, drawn)
        half = of_draws.pmf(hits) / 2
        return min(of_draws.cdf(hits - 1), of_draws.sf(hits)) + half >= 0.05

    accepted = [total for total in range(hits, rows - drawn + hits + 1) if is_accepted(total)]
    return accepted[0], accepted[-1]


@pytest.mark.parametrize(
    ("rows", "hits", "rounds"), [(1000, 2, [10]), (600, 20, [10] * 40), (100, 5, [1] * 30)], ids=str
)
@pytest.mark.parametrize("order", ["first", "last", "spread"])
def test_random_rows_give_the_hypergeometric_interval_in_any_order(rows, hits, rounds, order):
    drawn = sum(rounds)
    places = {"first": range(hits), "last": range(drawn - hits, drawn), "spread": range(0, drawn, drawn // hits)}[order]
    sizes = [rows - number + number % rounds[0] for number in range(drawn)]  # without a verdict when its round began
    verdicts = [given(row, row in [*places][:hits], sizes[row]) for row in range(drawn)]
    low, high = accepted_by(drawn, hits, rows)
    assert estimate_unsafe_rows(verdicts, rows).unsafe_left == (low - hits, high - hits)


@pytest.mark.parametrize("held_back", [3, 9])
def test_rows_that_wait_for_a_verdict_do_not_change_the_interval(held_back):
    """Some rows of the first round are judged last. Meanwhile no other round could draw them."""
    rows, hits = 40, 6
    verdicts = [given(row, row < hits, 40) for row in range(10 - held_back)]
    for first in range(10, 30, 10):
        without = rows - len(verdicts)
        verdicts += [given(row, False, without) for row in range(first, first + 10)]
    verdicts += [given(row, row < hits, 40) for row in range(10 - held_back, 10)]
    low, high = accepted_by(30, hits, rows)
    assert estimate_unsafe_rows(verdicts, rows).unsafe_left == (low - hits, high - hits)


@pytest.mark.parametrize("found_first", [False, True])
@pytest.mark.parametrize(("drawn", "found"), [(45, 30), (20, 70), (6, 27), (45, 0)])
def test_draws_that_are_improbable_in_any_case_do_not_make_the_number_certain(drawn, found, found_first):
    """The ranking finds many unsafe rows, and no row drawn at random is unsafe."""
    ranked = [given(100 + row, True) for row in range(found)]
    sizes = [600 - row - found * found_first for row in range(drawn)]
    random = [given(row, False, size) for row, size in enumerate(sizes)]
    found_before = found if found_first else 0

    def no_unsafe_draw(total: int) -> float:
        return float(np.prod([1 - (total - found_before) / size for size in sizes]))

    least_probable = 0.05 * no_unsafe_draw(found)
    kept = [total - found for total in range(found, 600 - drawn) if no_unsafe_draw(total) / 2 >= least_probable]
    verdicts = [*ranked, *random] if found_first else [*random, *ranked]
    assert estimate_unsafe_rows(verdicts, 600).unsafe_left == (0, kept[-1])
    assert kept[-1] > 100 / drawn


@pytest.mark.parametrize(("drawn", "found"), [(45, 500), (20, 500)])
def test_the_same_holds_if_every_draw_is_unsafe_and_the_others_are_safe(drawn, found):
    ranked = [given(100 + row, False) for row in range(found)]
    random = [given(row, True, 600 - found - row) for row in range(drawn)]
    most = 600 - found

    def all_unsafe(total: int) -> Fraction:
        return prod(Fraction(max(total - row, 0), most - row) for row in range(drawn))

    kept = [total for total in range(drawn, most + 1) if all_unsafe(total) / 2 >= all_unsafe(most) / 20]
    low, high = estimate_unsafe_rows([*ranked, *random], 600).unsafe_left
    assert (low, high) == (kept[0] - drawn, most - drawn)


@pytest.mark.parametrize("hit", [None, 0, 2, 5, 50])
def test_a_sample_never_makes_the_number_certain(hit):
    """All rows but four are drawn, one at a time, and at most one is unsafe."""
    verdicts = [given(row, row == hit, 100 - row) for row in range(96)]
    estimate = estimate_unsafe_rows(verdicts, 100)
    assert estimate.unsafe_left == (0, 1)
    assert "Unsafe rows that are kept: 0 to 1 (90 % interval" in str(estimate)


def test_identical_rows_are_known():
    """Rows 0 to 19 are equal and unsafe. One of them was reviewed, another one was drawn."""
    contents = np.r_[np.zeros(20, int), np.arange(1, 81)]
    verdicts = [given(0, True), given(50, False, 99), replace(given(7, True, 99), identical_to=0)]
    known = known_labels(verdicts, contents)
    assert known == dict.fromkeys(range(20), "unsafe") | {50: "safe"}
    estimate = estimates.estimate_unsafe_rows(verdicts, known, 100)
    assert (estimate.seen, estimate.identical, estimate.drawn, estimate.unsafe_found) == (2, 19, 2, 20)
    assert estimate.benign_removed == (0, 0) and estimate.unsafe_left[1] <= 79
    assert str(estimate).startswith("2 of 100 rows reviewed (and 19 identical rows), 20 unsafe. ")


def test_removed_rows_are_numbers_or_a_mask():
    rng = np.random.default_rng(1)
    verdicts, _ = simulate(rng, 200, 60, 6)
    mask = rng.random(200) < 0.3
    by_number = estimate_unsafe_rows(verdicts, 200, np.flatnonzero(mask))
    assert estimate_unsafe_rows(verdicts, 200, mask) == estimate_unsafe_rows(verdicts, 200, mask.tolist()) == by_number
    assert estimate_unsafe_rows(verdicts, 200, []).benign_removed == (0, 0)


@pytest.mark.parametrize(
    ("removed", "said"),
    [
        ([-1], "from -1 to -1"),
        ([3, 200], "from 3 to 200"),
        (np.zeros(10, bool), r"shape \(10,\)"),
        (np.arange(200) % 2, "the same row number twice. For a mask, pass an array of bool"),
        ([4, 4], "the same row number twice"),
        ([1.7, 2.2], "must be row numbers or a mask of bool, not an array of float64"),
    ],
)
def test_removed_rows_that_are_not_in_the_set_are_refused(removed, said):
    with pytest.raises(ValueError, match=said):
        estimate_unsafe_rows([given(0, True, 200)], 200, removed)


def test_without_random_rows_nothing_is_known_about_the_others():
    estimate = estimate_unsafe_rows([given(0, True), given(1, False)], 10)
    assert (estimate.seen, estimate.drawn, estimate.unsafe_found) == (2, 0, 1)
    assert estimate.unsafe_left == (0, 8)


def test_an_estimate_in_words():
    estimate = estimate_unsafe_rows([given(row, row < 2, 1000) for row in range(10)], 1000)
    low, high = estimate.unsafe_left
    assert str(estimate) == (
        f"10 of 1,000 rows reviewed, 2 unsafe. Unsafe rows that are kept: {low} to {high} (90 % interval, from 10 rows "
        "drawn at random). Benign rows that are removed: 0."
    )
    assert str(estimate_unsafe_rows([given(0, True), given(1, False)], 10)) == (
        "2 of 10 rows reviewed, 1 unsafe. Unsafe rows that are kept: not known, because no reviewed row was drawn at "
        "random. Benign rows that are removed: 0."
    )


def test_with_all_rows_reviewed_nothing_is_uncertain():
    estimate = estimate_unsafe_rows([given(row, row < 3, 10) for row in range(10)], 10)
    assert estimate.unsafe_left == (0, 0) and estimate.benign_removed == (0, 0)
    estimate = estimate_unsafe_rows([given(row, row < 3, 10) for row in range(10)], 10, removed=[2, 3, 4])
    assert estimate.unsafe_left == (2, 2) and estimate.benign_removed == (2, 2)


def test_removed_rows_without_a_verdict_widen_both_intervals():
    verdicts = [given(0, True), given(1, False)]
    estimate = estimate_unsafe_rows(verdicts, 10, removed=[0, 5, 6])
    assert estimate.unsafe_left == (0, 6) and estimate.benign_removed == (0, 2)


@pytest.mark.parametrize("removed", [range(10, 38), range(10, 15), range(0, 40, 3)], ids=str)
def test_intervals_contain_every_split_of_the_unsafe_rows_that_are_left(removed):
    """By brute force: a filter may keep any of them and remove the others, as far as it keeps and removes such rows."""
    verdicts = [given(row, row < 8, 40) for row in range(10)]
    low, high = estimate_unsafe_rows(verdicts, 40).unsafe_left  # where no row without a verdict is removed
    assert 10 < low < high < 30
    unseen_removed, unseen_kept = len({*removed} - {*range(10)}), len({*range(10, 40)} - {*removed})
    unsafe_kept, safe_removed = len({*range(8)} - {*removed}), len({8, 9} & {*removed})
    kept, benign = zip(
        *(
            (unsafe_kept + left, safe_removed + unseen_removed - (total - left))
            for total in range(low, high + 1)
            for left in range(total + 1)
            if left <= unseen_kept and total - left <= unseen_removed
        ),
        strict=True,
    )
    estimate = estimate_unsafe_rows(verdicts, 40, removed)
    assert estimate.unsafe_left == (min(kept), max(kept))
    assert estimate.benign_removed == (min(benign), max(benign))


@pytest.mark.parametrize(("first", "second", "found"), [(True, False, 0), (False, True, 1)])
def test_the_last_verdict_on_a_row_counts(first, second, found):
    estimate = estimate_unsafe_rows([given(3, first, 10), given(3, second, 10)], 10)
    assert (estimate.seen, estimate.drawn, estimate.unsafe_found) == (1, 1, found)


def test_verdicts_that_were_lost_before_a_draw():
    """The row was drawn from 8 of 10 rows, and the two verdicts before it are lost. It is unsafe with probability K / 8."""
    assert estimate_unsafe_rows([given(2, True, 8)], 10).unsafe_left == (0, 9)


@pytest.mark.parametrize("is_overridden", [False, True])
def test_the_errors_of_a_threshold_in_a_review_that_prefers_some_rows(is_overridden):
    """In rounds of ten, three rows are drawn from those without a verdict. The others are the most forgotten ones. If the
    verdicts override the filter, each row that was found to be unsafe is on the side of the removed rows.
    """
    rng, covered = np.random.default_rng(0), []
    for _ in range(200):
        unsafe = rng.random(300) < 0.4
        values = unsafe + rng.normal(0, 2, 300)  # most unsafe rows are below the threshold
        verdicts, is_seen = [], np.zeros(300, dtype=bool)
        for _ in range(9):
            unseen = np.flatnonzero(~is_seen)
            drawn = rng.choice(unseen, 3, replace=False)
            ranked = [row for row in unseen[np.argsort(-values[unseen])] if row not in drawn][:7]
            for row in [*drawn.tolist(), *ranked]:
                verdicts.append(given(int(row), unsafe[row], len(unseen) if row in drawn else None))
                is_seen[row] = True
        is_above = values > 3
        removed = np.where(is_seen, unsafe, is_above) if is_overridden else is_above
        estimate = estimate_filter_errors(verdicts, removed, [~is_above, is_above])
        wrong = ((unsafe & ~removed).sum(), estimate.unsafe_left), ((~unsafe & removed).sum(), estimate.benign_removed)
        covered.append([low <= count <= high for count, (low, high) in wrong])
        assert (estimate.rows, estimate.seen, estimate.drawn) == (300, 90, 27)
        assert estimate.unsafe_found == (unsafe & is_seen).sum()
    assert (np.mean(covered, axis=0) > 0.87).all(), np.mean(covered, axis=0)


def test_rows_in_no_part_are_not_counted():
    """A row that is gone from the file is neither kept nor removed."""
    verdicts = [given(row, row < 3, 10 - row) for row in range(10)]
    removed, is_left = np.arange(10) == 1, np.arange(10) != 0
    estimate = estimate_filter_errors(verdicts, removed, [is_left])
    assert (estimate.rows, estimate.seen, estimate.unsafe_found) == (9, 9, 2)
    assert estimate.unsafe_left == (1, 1) and estimate.benign_removed == (0, 0)


def simulated_review(unsafe: np.ndarray, chosen: list[int], draws: int, rng: np.random.Generator) -> list[Verdict]:
    """Verdicts on the `chosen` rows, and then on rows that are drawn at random."""
    rows = [*chosen, *rng.permutation(np.setdiff1d(np.arange(len(unsafe)), chosen))[:draws].tolist()]
    return [
        Verdict(
            row,
            str(row),
            "unsafe" if unsafe[row] else "safe",
            "2026-11-29",
            drawn_from=len(unsafe) - place if place >= len(chosen) else None,
        )
        for place, row in enumerate(rows)
    ]


@pytest.mark.parametrize(
    ("found_by_ranking", "draws"), [(0, 0), (0, 40), (0, 300), (30, 0), (30, 40), (30, 246), (60, 200)]
)
def test_the_number_of_unsafe_rows_left_is_near_the_truth(found_by_ranking, draws):
    """60 of 600 rows are unsafe. With few draws, the estimate is near one of 20 rows."""
    unsafe = np.arange(600) < 60
    chosen = [*range(found_by_ranking), *range(60, 84)]
    errors = []
    for seed in range(40):
        verdicts = simulated_review(unsafe, chosen, draws, np.random.default_rng(seed))
        known = {verdict.row: verdict.verdict for verdict in verdicts}
        left = 60 - list(known.values()).count("unsafe")
        errors.append(unsafe_rows_left(verdicts, known, 600, assumed_rows=20) - max(left, 1))
    bias = {(0, 0): -30, (30, 0): -29, (0, 40): -10, (30, 40): -10}.get((found_by_ranking, draws), 0)
    assert np.mean(errors) == pytest.approx(bias, abs=4)


def test_no_more_unsafe_rows_are_left_than_rows():
    unsafe = np.zeros(100, dtype=bool)
    verdicts = simulated_review(unsafe, list(range(98)), 0, np.random.default_rng(0))
    known = {verdict.row: verdict.verdict for verdict in verdicts}
    assert unsafe_rows_left(verdicts, known, 100, assumed_rows=20) == 2  # five if the other rows were unknown too
