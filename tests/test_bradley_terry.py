import csv

import choix
import evalica
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unstilted.errors import UserError
from unstilted.stats.bradley_terry import (
    Battles,
    Floats,
    Strengths,
    Ties,
    battles_of,
    clustered_covariance,
    fit_bradley_terry,
    rank_intervals,
)
from unstilted.stats.votes import Votes, votes_from_rows
from vote_data import needs_vote_data, reference, vote_file

WIKIPEDIA = {"AB": (2, 3), "AD": (1, 4), "BC": (5, 3), "CD": (1, 3)}


def fit_games(games: dict[str, tuple[int, ...]], **how: object) -> Strengths:
    """Games by a pair of one-letter names: (left wins, right wins[, ties])."""
    names = sorted({name for pair in games for name in pair})
    counts = np.zeros((len(names), len(names), 3))
    for (left, right), results in games.items():
        counts[names.index(left), names.index(right), : len(results)] = results
    return fit_bradley_terry(counts, names, **how)  # type: ignore[arg-type]


def test_the_strengths_of_wikipedias_example_are_those_printed_there() -> None:
    worth = np.exp(fit_games(WIKIPEDIA).strengths)
    assert worth == pytest.approx([0.640, 1.043, 0.660, 2.270], abs=6e-4)
    assert worth.prod() == pytest.approx(1)


@needs_vote_data
@pytest.mark.parametrize("study", ["food", "simple", "llmfao"])
def test_evalicas_golden_scores_are_reproduced(study: str) -> None:
    path = vote_file("llmfao_crowd_comparisons.csv" if study == "llmfao" else f"evalica_{study}.csv")
    with path.open(encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    with vote_file(f"evalica_{study}-golden.csv").open(encoding="utf-8") as lines:
        golden = {row["item"]: float(row["score"]) for row in csv.DictReader(lines) if row["algorithm"] == "bradley_terry"}
    battles = battles_of(*([row[column] for row in rows] for column in ("left", "right", "winner")))
    fit = fit_bradley_terry(battles.counts(), battles.names)
    assert fit.shares == pytest.approx(np.array([golden[name] for name in battles.names]) / sum(golden.values()), abs=1e-6)


def test_battles_are_counted_by_sorted_name_and_an_unknown_winner_is_refused() -> None:
    battles = battles_of(["c", "a", "c"], ["a", "b", "a"], ["left", "tie", "right"])
    assert battles.names == ("a", "b", "c")
    assert {tuple(cell): battles.counts()[tuple(cell)] for cell in np.argwhere(battles.counts()).tolist()} == {
        (0, 1, 2): 1,
        (2, 0, 0): 1,
        (2, 0, 1): 1,
    }
    with pytest.raises(UserError, match="the winner is 'draw'"):
        battles_of(["a"], ["b"], ["draw"])


@needs_vote_data
def test_davidsons_pudding_table_gives_both_tie_models() -> None:
    """Davidson 1970: six brands of pudding."""
    counts = np.zeros((6, 6, 3))
    with vote_file("davidson1970_pudding.csv").open(encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            counts[int(row["i"]) - 1, int(row["j"]) - 1] = [int(row["w_ij"]), int(row["w_ji"]), int(row["t_ij"])]
    target = reference()["davidson_pudding"]
    davidson, rao_kupper = (fit_bradley_terry(counts, "abcdef", ties) for ties in ("davidson", "rao_kupper"))
    assert davidson.shares == pytest.approx(target["recomputed_davidson"]["pi"], abs=6e-5)
    assert davidson.tie_parameter == pytest.approx(target["recomputed_davidson"]["nu"], abs=6e-5)
    assert davidson.log_likelihood == pytest.approx(target["recomputed_davidson"]["loglik"], abs=1e-5)
    assert rao_kupper.shares == pytest.approx(target["recomputed_rao_kupper"]["pi"], abs=6e-5)
    assert rao_kupper.tie_parameter == pytest.approx(target["recomputed_rao_kupper"]["theta"], abs=6e-5)
    assert rao_kupper.log_likelihood == pytest.approx(target["recomputed_rao_kupper"]["loglik"], abs=1e-5)


@needs_vote_data
def test_agrestis_baseball_table_gives_abilities_home_advantage_errors_and_deviances() -> None:
    """Agresti 2002, p. 438: seven teams, 1987."""
    with vote_file("agresti_baseball1987.csv").open(encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    teams = sorted({row["home.team"] for row in rows})
    counts = np.zeros((7, 7, 3))
    for row in rows:
        counts[teams.index(row["home.team"]), teams.index(row["away.team"]), :2] = int(row["home.wins"]), int(row["away.wins"])
    target = reference()["agresti_baseball"]
    plain, home = fit_bradley_terry(counts, teams), fit_bradley_terry(counts, teams, order=True)
    baltimore = teams.index("Baltimore")
    gaps = np.delete(plain.strengths - plain.strengths[baltimore], baltimore)
    assert np.sort(gaps) == pytest.approx(target["published"]["sorted_coefs_ref_Baltimore"], abs=6e-3)
    assert np.sort(home.shares) == pytest.approx(target["published"]["sorted_ability_shares_model2"], abs=6e-4)
    assert home.order_effect == pytest.approx(target["recomputed"]["home"], abs=6e-5)
    assert np.linalg.inv(home.information)[7, 7] ** 0.5 == pytest.approx(target["recomputed"]["home_se"], abs=6e-5)
    assert [deviance(fit, counts) for fit in (plain, home)] == pytest.approx(target["recomputed"]["deviance"], abs=6e-5)


def deviance(fit: Strengths, counts: Floats) -> float:
    games = counts[:, :, :2][counts.sum(axis=2) > 0]
    shares = games / games.sum(axis=1, keepdims=True)
    best = (games[games > 0] * np.log(shares[games > 0])).sum()
    return float(2 * (best - fit.log_likelihood))


def random_counts(generator: np.random.Generator, n_arms: int = 6, n_votes: int = 600) -> Floats:
    """Votes of a Davidson model with an order effect."""
    strengths, counts = generator.normal(size=n_arms), np.zeros((n_arms, n_arms, 3))
    for left, right in generator.integers(0, n_arms, (n_votes, 2)):
        if left != right:
            d = strengths[left] - strengths[right] + 0.4
            odds = np.exp([d / 2, -d / 2, -0.3])
            counts[left, right, generator.choice(3, p=odds / odds.sum())] += 1
    return counts


def test_choix_and_evalica_find_the_same_strengths() -> None:
    counts = random_counts(np.random.default_rng(0))
    names = list("abcdef")
    fit = fit_bradley_terry(counts, names)
    winners = [(i, j) for i in range(6) for j in range(6) for _ in range(int(counts[i, j, 0] + counts[j, i, 1]))]
    no_ties = counts * np.array([1, 1, 0])
    assert fit_bradley_terry(no_ties, names).strengths == pytest.approx(choix.opt_pairwise(6, winners, tol=1e-12), abs=1e-5)
    left, right, winner = [], [], []
    marks = [evalica.Winner.X, evalica.Winner.Y, evalica.Winner.Draw]
    for i, j, outcome in np.argwhere(counts > 0):
        n = int(counts[i, j, outcome])
        left, right, winner = left + [names[i]] * n, right + [names[j]] * n, winner + [marks[outcome]] * n
    scores = evalica.bradley_terry(left, right, winner, tolerance=1e-12, limit=10_000).scores
    assert fit.shares == pytest.approx(np.array([scores[name] for name in names]) / scores.sum(), abs=1e-7)


@settings(deadline=None)
@given(st.integers(0, 1000).map(np.random.default_rng), st.sampled_from(["half", "davidson", "rao_kupper"]))
def test_swapping_all_sides_turns_the_order_effect_around_and_nothing_else(generator: np.random.Generator, ties: Ties) -> None:
    counts = random_counts(generator)
    fit = fit_bradley_terry(counts, "abcdef", ties, order=True)
    swapped = fit_bradley_terry(counts.transpose(1, 0, 2)[:, :, [1, 0, 2]], "abcdef", ties, order=True)
    assert swapped.strengths == pytest.approx(fit.strengths, abs=1e-8)
    assert swapped.order_effect == pytest.approx(-(fit.order_effect or 0), abs=1e-8)
    assert swapped.log_likelihood == pytest.approx(fit.log_likelihood)


@pytest.mark.parametrize("ties", ["half", "davidson", "rao_kupper"])
def test_the_slopes_are_those_of_the_log_likelihood(ties: Ties) -> None:
    counts = random_counts(np.random.default_rng(5))
    fit = fit_bradley_terry(counts, "abcdef", ties, order=True)
    from unstilted.stats.bradley_terry import _Model

    whole = counts.copy()
    if ties == "half":
        whole = np.stack([counts[:, :, 0] + counts[:, :, 2] / 2, counts[:, :, 1] + counts[:, :, 2] / 2, 0 * counts[:, :, 2]], 2)
    model = _Model(whole, ties, True, 0.5)
    at = fit.parameters + 0.3 * np.random.default_rng(1).normal(size=len(fit.parameters))
    steps = 1e-6 * np.eye(len(at))
    numeric = [(model.value(at + step) - model.value(at - step)) / 2e-6 for step in steps]
    assert model.gradient(at) == pytest.approx(np.array(numeric), abs=1e-4)


def test_two_arms_with_davidsons_ties_give_the_log_odds_of_the_decisive_votes() -> None:
    fit = fit_games({"AB": (30, 10, 17)}, ties="davidson")
    assert fit.strengths[0] - fit.strengths[1] == pytest.approx(np.log(3))
    assert fit.tie_parameter == pytest.approx(17 / 300**0.5)


def test_without_ties_all_models_are_one() -> None:
    plain = fit_games(WIKIPEDIA)
    for ties in ("davidson", "rao_kupper"):
        fit = fit_games(WIKIPEDIA, ties=ties)
        assert fit.strengths == pytest.approx(plain.strengths)
        assert fit.tie_parameter is None


@pytest.mark.parametrize(
    ("games", "told"),
    [
        ({"AB": (2, 3), "CD": (1, 1)}, "Bradley-Terry: no votes connect A, B | C, D. Compare arms across these groups"),
        ({"AB": (2, 3), "BC": (4, 0)}, "against the others, C never won, so no finite strength fits."),
        ({"AB": (2, 3), "BC": (0, 4), "CD": (1, 1), "AD": (0, 1), "BE": (1, 1)}, "against the others, C, D never lost"),
        ({"AB": (0, 0, 5)}, "there is no vote for either side, only ties."),
    ],
)
def test_votes_without_a_finite_fit_are_refused_with_the_reason(games: dict[str, tuple[int, ...]], told: str) -> None:
    with pytest.raises(UserError) as error:
        fit_games(games)
    assert told in str(error.value)


def test_a_ridge_makes_a_winner_of_all_finite_and_keeps_the_order() -> None:
    fit = fit_games({"AB": (2, 3), "BC": (4, 0)}, ridge=0.1)
    assert fit.strengths.argmin() == 2
    assert fit.strengths.sum() == pytest.approx(0, abs=1e-9)


def test_a_side_that_always_wins_is_refused_with_the_order_effect_and_fitted_without() -> None:
    games = {"AB": (4, 0), "BA": (4, 0)}
    assert fit_games(games).strengths == pytest.approx([0, 0])
    with pytest.raises(UserError, match="separated"):
        fit_games(games, order=True)


def test_an_order_effect_that_cannot_be_told_from_strengths_is_refused() -> None:
    """A only ever stands left of B."""
    assert fit_games({"AB": (4, 2)}).strengths == pytest.approx([np.log(2) / 2, -np.log(2) / 2])
    with pytest.raises(UserError, match="the order effect cannot be told from the strengths"):
        fit_games({"AB": (4, 2)}, order=True)


def crowd(generator: np.random.Generator, strengths: Floats, n_raters: int, n_each: int) -> tuple[Votes, Battles]:
    """Raters whose tastes differ from the common strengths by a normal with standard deviation 0.7."""
    rows = []
    for rater in range(n_raters):
        taste = strengths + 0.7 * generator.standard_normal(len(strengths))
        for ballot in range(n_each):
            left, right = generator.permutation(len(strengths))[:2]
            is_left = generator.random() < 1 / (1 + np.exp(taste[right] - taste[left]))
            rows.append({"rater": rater, "item": rater * n_each + ballot, "left": str(left), "right": str(right), "winner": "left"})
            rows[-1]["winner"] = "left" if is_left else "right"
    votes = votes_from_rows(rows)
    names = tuple(sorted(votes.left.names))
    place = np.array([names.index(name) for name in votes.left.names])
    return votes, Battles(place[votes.left.codes], place[votes.right.codes], votes.winner, names)


def test_the_clustered_error_of_two_arms_is_that_of_a_logit() -> None:
    """For two arms the strength gap is the logit of the share, so the delta method gives its error."""
    votes, battles = crowd(np.random.default_rng(7), np.array([0.5, -0.5]), 30, 20)
    fit = fit_bradley_terry(battles.counts(), battles.names)
    covariance = clustered_covariance(fit, battles, votes.rater.codes, np.arange(len(votes)))
    values = (np.where(battles.outcome == 0, battles.left, battles.right) == 0).astype(float)
    share = values.mean()
    sums = np.bincount(votes.rater.codes, values - share)
    error = ((sums**2).sum() / len(values) ** 2 * 30 / 29) ** 0.5 / (share * (1 - share))
    assert covariance.errors(np.array([[1.0, -1.0]])) == pytest.approx([error])
    by_rater = clustered_covariance(fit, battles, votes.rater.codes)
    assert by_rater.errors(np.array([[1.0, -1.0]])) == pytest.approx([error])
    assert by_rater.df == 29


def test_rank_intervals_hold_the_true_ranks_and_the_clustered_error_its_gap() -> None:
    generator, strengths = np.random.default_rng(8), np.array([0.9, 0.3, 0.2, -1.4])
    n_runs, n_joint, n_gap = 150, 0, 0
    for _ in range(n_runs):
        votes, battles = crowd(generator, strengths, 40, 15)
        fit = fit_bradley_terry(battles.counts(), battles.names)
        covariance = clustered_covariance(fit, battles, votes.rater.codes, votes.item.codes)
        best, worst = rank_intervals(fit.strengths, covariance, 0.95)
        n_joint += bool(((best <= [1, 2, 3, 4]) & (worst >= [1, 2, 3, 4])).all())
        gap = fit.strengths[0] - fit.strengths[3]
        # Tastes differ, so the population's strengths shrink: logits divided by sqrt(1 + c * variance of the taste gap)
        target = (strengths[0] - strengths[3]) / (1 + 0.346 * 2 * 0.49) ** 0.5
        error = covariance.errors(np.array([[1.0, 0.0, 0.0, -1.0]]))[0]
        n_gap += abs(gap - target) < covariance.quantile(0.95) * error
    assert n_joint / n_runs >= 0.95
    assert n_gap / n_runs >= 0.9


def test_eight_equal_arms_are_all_called_equal_in_nineteen_of_twenty_studies() -> None:
    """28 pairs at 5 % each would order some of them in most studies."""
    generator, n_wrong = np.random.default_rng(11), 0
    for _ in range(100):
        votes, battles = crowd(generator, np.zeros(8), 30, 12)
        fit = fit_bradley_terry(battles.counts(), battles.names)
        best, worst = rank_intervals(fit.strengths, clustered_covariance(fit, battles, votes.rater.codes), 0.95)
        n_wrong += not ((best == 1) & (worst == 8)).all()
    assert n_wrong <= 10


def test_far_apart_arms_have_sure_ranks_and_equal_ones_share_theirs() -> None:
    votes, battles = crowd(np.random.default_rng(10), np.array([4.0, 0.0, 0.0]), 40, 20)
    fit = fit_bradley_terry(battles.counts(), battles.names)
    best, worst = rank_intervals(fit.strengths, clustered_covariance(fit, battles, votes.rater.codes, votes.item.codes), 0.95)
    assert list(zip(best, worst, strict=True)) == [(1, 1), (2, 3), (2, 3)]
