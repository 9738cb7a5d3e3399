import csv
import json
from typing import Any

import krippendorff
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t as student
from statsmodels.stats.inter_rater import fleiss_kappa

from unstilted.stats.agreement import (
    COEFFICIENTS,
    Floats,
    Ratings,
    agreeing_pairs,
    agreement,
    coefficients,
    count_categories,
    item_errors,
    krippendorff_alpha,
    rater_errors,
)
from vote_data import needs_vote_data, reference, vote_file


def counted(table: list[list[Any]]) -> tuple[Floats, Floats, Ratings]:
    """Ratings of units (rows) by raters (columns), None where missing: counts, sorted values and single ratings."""
    values = sorted({rating for unit in table for rating in unit if rating is not None})
    cells = [(u, values.index(x), r) for u, unit in enumerate(table) for r, x in enumerate(unit) if x is not None]
    ratings = Ratings(*np.array(cells).T, n_categories=len(values))
    counts, _ = count_categories(ratings.unit, ratings.category, len(values))
    numbers = values if isinstance(values[0], int | float) else range(len(values))
    return counts, np.array(numbers, dtype=np.float64), ratings


def codings(name: str) -> list[list[Any]]:
    """A file of rater rows as a table of unit rows."""
    with vote_file(name).open(encoding="utf-8") as lines:
        rows = [[cell or None for cell in row] for row in csv.reader(lines)]
    as_number = {cell: int(cell) for row in rows for cell in row if cell and cell.isdigit()}
    return [[as_number.get(cell, cell) for cell in unit] for unit in zip(*rows, strict=True)]


@needs_vote_data
def test_alpha_is_that_of_krippendorff_2011_for_every_metric() -> None:
    counts, values, _ = counted(codings("evalica_codings.csv"))
    target = reference()["krippendorff_2011_4x12"]
    for metric in ("nominal", "ordinal", "interval", "ratio"):
        assert krippendorff_alpha(counts, values, metric) == pytest.approx(target["recomputed"][metric], abs=6e-5)
        assert krippendorff_alpha(counts, values, metric) == pytest.approx(target["published"][metric], abs=6e-4)
    assert krippendorff_alpha(counts, values, "nominal") == pytest.approx(904 / 1216)
    assert (coefficients(counts) or {})["alpha"] == pytest.approx(904 / 1216)


@needs_vote_data
def test_alpha_is_that_of_wikipedias_example_and_of_the_textbook_tagging() -> None:
    target = reference()["krippendorff_wikipedia_3x15"]
    rows = [[None if cell == "*" else int(cell) for cell in row.split()] for row in target["ratings"]]
    counts, values, _ = counted([list(unit) for unit in zip(*rows, strict=True)])
    for metric in ("nominal", "ordinal", "interval", "ratio"):
        assert krippendorff_alpha(counts, values, metric) == pytest.approx(target["recomputed"][metric], abs=6e-5)
    assert (coefficients(counts) or {})["alpha"] == pytest.approx(target["published"]["nominal"], abs=6e-4)
    counts, _, _ = counted(codings("evalica_gcl.csv"))
    assert (coefficients(counts) or {})["alpha"] == pytest.approx(1 / 12, abs=1e-6)


@needs_vote_data
@pytest.mark.parametrize("study", ["raw_4raters", "raw_5observers", "raw_g1g2", "raw_gender", "raw_ben_gerry"])
def test_values_and_errors_are_those_of_gwets_tables(study: str) -> None:
    table = json.loads(vote_file("irrcac_reference.json").read_text(encoding="utf-8"))[study]
    counts, _, _ = counted(table["ratings"])
    values, errors = coefficients(counts), item_errors(counts)
    assert values is not None
    for ours, theirs in (("alpha", "krippendorff"), ("fleiss", "fleiss"), ("ac1", "gwet")):
        target = table["coefficients"][theirs]
        assert values[ours] == pytest.approx(target["coefficient_value"], abs=6e-6 if ours != "alpha" else 2e-5)
        assert errors[ours] == pytest.approx(target["se"], abs=2e-6)
    assert values["percent"] == pytest.approx(table["coefficients"]["gwet"]["pa"], abs=1e-6)


@needs_vote_data
def test_fleiss_kappa_is_that_of_wikipedias_example() -> None:
    counts = np.array(reference()["fleiss_wikipedia"]["table"], dtype=np.float64)
    assert (coefficients(counts) or {})["fleiss"] == pytest.approx(0.20993, abs=6e-6)


ratings_tables = st.integers(0, 10_000).map(lambda seed: random_table(np.random.default_rng(seed)))


def random_table(generator: np.random.Generator) -> list[list[int | None]]:
    """12 units by 6 raters who follow the unit's true category 60 % of the time; a quarter is missing."""
    truth = generator.integers(0, 3, (12, 1))
    table = np.where(generator.random((12, 6)) < 0.6, truth, generator.integers(0, 3, (12, 6)))
    missing = generator.random((12, 6)) < 0.25
    return [[None if gap else int(value) for value, gap in zip(*unit, strict=True)] for unit in zip(table, missing, strict=True)]


@settings(deadline=None)
@given(ratings_tables)
def test_alpha_equals_the_krippendorff_packages(table: list[list[int | None]]) -> None:
    counts, values, _ = counted(table)
    matrix = np.array([[np.nan if cell is None else cell for cell in unit] for unit in table]).T
    for metric in ("nominal", "ordinal", "interval"):
        assert krippendorff_alpha(counts, values, metric) == pytest.approx(krippendorff.alpha(matrix, level_of_measurement=metric))
    assert (coefficients(counts) or {})["alpha"] == pytest.approx(krippendorff.alpha(matrix, level_of_measurement="nominal"))


@settings(deadline=None)
@given(st.integers(0, 10_000).map(np.random.default_rng))
def test_kappa_equals_statsmodels_where_nothing_is_missing(generator: np.random.Generator) -> None:
    counts = generator.multinomial(5, [0.5, 0.3, 0.2], 20).astype(np.float64)
    assert (coefficients(counts) or {})["fleiss"] == pytest.approx(fleiss_kappa(counts))


@settings(deadline=None)
@given(ratings_tables)
def test_leaving_out_raters_at_once_equals_doing_it_one_by_one(table: list[list[int | None]]) -> None:
    counts, _, ratings = counted(table)
    _, row = count_categories(ratings.unit, ratings.category, ratings.n_categories)
    errors = rater_errors(counts, row, ratings.category, ratings.rater)
    left_out = []
    for rater in np.unique(ratings.rater):
        rest = ratings.rater != rater
        counts_rest, _ = count_categories(ratings.unit[rest], ratings.category[rest], ratings.n_categories)
        left_out.append(list((coefficients(counts_rest) or {}).values()))
    slow = np.var(left_out, axis=0) * (len(left_out) - 1)
    assert list(errors.values()) == pytest.approx(list(slow**0.5))


@settings(deadline=None)
@given(ratings_tables, st.randoms(use_true_random=False))
def test_agreement_ignores_the_names_of_raters_units_and_categories(table: list[list[int | None]], shuffle: Any) -> None:
    _, _, ratings = counted(table)
    shuffle.shuffle(table)
    columns = list(zip(*table, strict=True))
    shuffle.shuffle(columns)
    renamed = [[None if cell is None else 9 - cell for cell in unit] for unit in zip(*columns, strict=True)]
    before, after = agreement(ratings, 0.95), agreement(counted(renamed)[2], 0.95)
    assert before is not None
    assert after is not None
    for name in COEFFICIENTS:
        assert after[name].value == pytest.approx(before[name].value)
        assert after[name].low == pytest.approx(before[name].low)


def test_perfect_raters_at_a_rate_of_ninety_percent_and_slight_noise_have_low_alpha_and_high_ac1() -> None:
    """Every rater errs on 10 % of items, all of which favour the same arm: 82 % agree, alpha about 0, AC1 about 0.78."""
    generator = np.random.default_rng(0)
    errs = (generator.random((500, 5)) < 0.1).astype(int).tolist()
    values = agreement(counted(errs)[2], 0.95)
    assert values is not None
    assert values["percent"].value == pytest.approx(0.82, abs=0.015)
    assert values["alpha"].value == pytest.approx(0, abs=0.03)
    assert values["ac1"].value == pytest.approx(0.78, abs=0.02)


def test_intervals_that_include_raters_are_wider_when_raters_differ() -> None:
    generator = np.random.default_rng(1)
    care = np.array([0.95, 0.95, 0.9, 0.2, 0.1])
    truth = generator.integers(0, 2, (300, 1))
    table = np.where(generator.random((300, 5)) < care, truth, generator.integers(0, 2, (300, 5))).tolist()
    values = agreement(counted(table)[2], 0.95)
    assert values is not None
    alpha = values["alpha"]
    assert alpha.error_raters is not None
    assert alpha.error_raters > 3 * alpha.error_items
    assert alpha.low == pytest.approx(alpha.value - student.ppf(0.975, 4) * np.hypot(alpha.error_items, alpha.error_raters))


def test_one_category_is_perfect_agreement_and_single_ratings_are_none() -> None:
    values = agreement(Ratings(np.repeat(np.arange(4), 4), np.zeros(16, int), np.tile(np.arange(4), 4), 2), 0.95)
    assert values is not None
    assert [values[name].value for name in COEFFICIENTS] == [1, 1, 1, 1]
    assert (values["ac1"].low, values["ac1"].reason) == (None, "no two units differ")
    assert agreement(Ratings(np.arange(4), np.zeros(4, int), np.arange(4), 2), 0.95) is None


def test_two_raters_give_no_interval() -> None:
    values = agreement(Ratings(np.repeat(np.arange(9), 2), np.arange(18) % 5 % 2, np.tile(np.arange(2), 9), 2), 0.95)
    assert values is not None
    assert (values["alpha"].low, values["alpha"].error_raters) == (None, None)


def test_agreeing_pairs_are_counted_over_all_pairs() -> None:
    assert agreeing_pairs(np.array([[2.0, 1.0], [2.0, 0.0], [1.0, 0.0]])) == (2 / 4, 4)
