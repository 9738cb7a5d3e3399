"""Bradley-Terry strengths of K arms from votes on pairs, with ties and an order effect.

Each vote's log-odds for the arm on the left is d = strength of left - strength of right + order effect.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components
from scipy.special import expit

from unstilted.errors import UserError
from unstilted.stats.clusters import Sandwich, sandwich
from unstilted.stats.multiplicity import holm

Floats = NDArray[np.float64]
Ints = NDArray[np.integer]
Ties = Literal["half", "davidson", "rao_kupper"]

MAX_STEPS = 200
MAX_LOGIT = 25.0
MAX_CONDITION = 1e11


@dataclass(frozen=True)
class Battles:
    """N votes on pairs of K arms."""

    left: Ints
    right: Ints
    """Arm codes, 0 to K - 1, shape (N,)."""
    outcome: Ints
    """0: left, 1: right, 2: tie; shape (N,)."""
    names: tuple[str, ...]
    """The K arms."""

    def counts(self) -> Floats:
        """How often left won, right won and neither, by (left, right): shape (K, K, 3)."""
        k = len(self.names)
        cell = (self.left.astype(np.int64) * k + self.right) * 3 + self.outcome
        return np.bincount(cell, minlength=3 * k * k).reshape(k, k, 3).astype(np.float64)


def battles_of(left: Sequence[str], right: Sequence[str], winner: Sequence[str]) -> Battles:
    """Battles from names, with winner `left`, `right` or `tie`; raises UserError for any other winner. Arms are sorted by name."""
    codes: defaultdict[str, int] = defaultdict()
    codes.default_factory = codes.__len__
    sides = [np.fromiter(map(codes.__getitem__, side), np.int64, len(side)) for side in (left, right)]
    names = tuple(sorted(codes))
    place = np.empty(len(names), dtype=np.int64)
    place[[codes[name] for name in names]] = np.arange(len(names))
    outcomes = {"left": 0, "right": 1, "tie": 2}
    try:
        outcome = np.fromiter(map(outcomes.__getitem__, winner), np.int64, len(winner))
    except KeyError as error:
        raise UserError(f"the winner is '{error.args[0]}'.", where="Bradley-Terry", do="It must be left, right or tie.") from None
    return Battles(place[sides[0]], place[sides[1]], outcome, names)


@dataclass(frozen=True)
class Strengths:
    """A fit: `parameters` are the K strengths in logits, which sum to 0, then the order effect and the tie parameter where fitted."""

    names: tuple[str, ...]
    parameters: Floats
    information: Floats
    """Expected information with the constraint's rank added, shape (P, P)."""
    log_likelihood: float
    ties: Ties
    has_order: bool
    ridge: float

    @property
    def strengths(self) -> Floats:
        return self.parameters[: len(self.names)]

    @property
    def shares(self) -> Floats:
        """exp(strength), scaled to sum 1: pi of Bradley & Terry 1952."""
        worth = np.exp(self.strengths - self.strengths.max())
        shares: Floats = worth / worth.sum()
        return shares

    @property
    def order_effect(self) -> float | None:
        """Log-odds that the left side gains by being left."""
        return float(self.parameters[len(self.names)]) if self.has_order else None

    @property
    def tie_parameter(self) -> float | None:
        """Davidson's nu, or Rao & Kupper's theta; None where ties count as halves."""
        if self.ties == "half":
            return None
        raw = float(np.exp(self.parameters[-1]))
        return raw if self.ties == "davidson" else 1 + raw


def fit_bradley_terry(counts: Floats, names: Sequence[str], ties: Ties = "half", order: bool = False, ridge: float = 0.0) -> Strengths:
    """Maximum-likelihood strengths from `Battles.counts`, shape (K, K, 3), by Fisher scoring.

    ties: `half` counts a tie as half a win each way (Bradley & Terry 1952); `davidson` gives it the odds nu * sqrt(pi_i pi_j)
    (Davidson 1970; with order as Davidson & Beaver 1977, nu scaled to treat both sides alike); `rao_kupper` a threshold
    theta (Rao & Kupper 1967). Without any tie all three are the same model. ridge: the precision of a normal prior on strengths.
    Raises UserError where no finite fit exists: unconnected arms, arms that only win or only lose, and nothing but ties.
    """
    counts = counts.copy()
    n_ties = counts[:, :, 2].sum()
    if n_ties == counts.sum():
        raise UserError("there is no vote for either side, only ties.", where="Bradley-Terry", do="Strengths need votes with a winner.")
    _refuse_unconnected(counts, names, finite=ridge > 0)
    if ties == "half" or not n_ties:
        ties = "half"
        counts[:, :, :2] += counts[:, :, 2:] / 2
        counts[:, :, 2] = 0
    model = _Model(counts, ties, order, ridge)
    parameters = model.fit()
    probabilities, _ = model.outcomes(parameters)
    seen = model.counts > 0
    log_likelihood = float((model.counts[seen] * np.log(probabilities[seen])).sum())
    return Strengths(tuple(names), parameters, model.information(parameters), log_likelihood, ties, order, ridge)


class _Model:
    """The likelihood over the M pairs of sides that occur."""

    def __init__(self, counts: Floats, ties: Ties, order: bool, ridge: float) -> None:
        self.k = len(counts)
        self.left, self.right = np.nonzero(counts.sum(axis=2))
        self.counts = counts[self.left, self.right]
        self.ties, self.order, self.ridge = ties, order, ridge
        self.n_parameters = self.k + order + (ties != "half")

    def outcomes(self, parameters: Floats) -> tuple[Floats, Floats]:
        """Probabilities of left, right and tie, shape (M, 3), and their log's slopes by d and by the tie parameter, (M, 3, 2)."""
        d = parameters[self.left] - parameters[self.right]
        if self.order:
            d = d + parameters[self.k]
        return outcome_probabilities(d, self.ties, float(parameters[-1]))

    def value(self, parameters: Floats) -> float:
        probabilities, _ = self.outcomes(parameters)
        penalty = self.ridge / 2 * float((parameters[: self.k] ** 2).sum())
        return float((self.counts * np.log(np.maximum(probabilities, 1e-300))).sum()) - penalty

    def gradient(self, parameters: Floats) -> Floats:
        _, slopes = self.outcomes(parameters)
        by_d, by_tie = (self.counts[:, :, None] * slopes).sum(axis=1).T
        parts = [self._net(by_d) - self.ridge * parameters[: self.k]]
        if self.order:
            parts.append(np.array([by_d.sum()]))
        if self.ties != "half":
            parts.append(np.array([by_tie.sum()]))
        return np.concatenate(parts)

    def information(self, parameters: Floats) -> Floats:
        probabilities, slopes = self.outcomes(parameters)
        per_pair = np.einsum("m,mo,moa,mob->mab", self.counts.sum(axis=1), probabilities, slopes, slopes)
        matrix = np.zeros((self.n_parameters, self.n_parameters))
        weights = np.bincount(self.left * self.k + self.right, per_pair[:, 0, 0], self.k**2).reshape(self.k, self.k)
        weights = weights + weights.T
        matrix[: self.k, : self.k] = np.diag(weights.sum(axis=0) + self.ridge) - weights + weights.max() / self.k
        at = self.k
        if self.order:
            matrix[: self.k, at] = matrix[at, : self.k] = self._net(per_pair[:, 0, 0])
            matrix[at, at] = per_pair[:, 0, 0].sum()
            at += 1
        if self.ties != "half":
            matrix[: self.k, at] = matrix[at, : self.k] = self._net(per_pair[:, 0, 1])
            matrix[at, at] = per_pair[:, 1, 1].sum()
            if self.order:
                matrix[at - 1, at] = matrix[at, at - 1] = per_pair[:, 0, 1].sum()
        return matrix

    def _net(self, flow: Floats) -> Floats:
        """What flows to each arm when pair m moves `flow[m]` from its right to its left side: shape (K,)."""
        return np.bincount(self.left, flow, self.k).astype(np.float64) - np.bincount(self.right, flow, self.k)

    def fit(self) -> Floats:
        parameters = np.zeros(self.n_parameters)
        if np.linalg.cond(self.information(parameters)) > MAX_CONDITION:
            what = "the order effect cannot be told from the strengths: arms stood on fixed sides."
            raise UserError(what, where="Bradley-Terry", do="Show each arm on both sides, or leave out the order effect.")
        tolerance = 1e-11 * self.counts.sum()
        for _ in range(MAX_STEPS):
            gradient = self.gradient(parameters)
            if np.abs(gradient).max() < tolerance or np.abs(parameters).max() > MAX_LOGIT:
                break
            step = np.linalg.solve(self.information(parameters), gradient)
            step = step * min(1.0, 4 / np.abs(step).max())
            value = self.value(parameters)
            while self.value(parameters + step) < value - 1e-12 * abs(value) and np.abs(step).max() > 1e-14:
                step = step / 2
            parameters = parameters + step
            if np.abs(step).max() < 1e-13:
                break
        if not np.abs(parameters).max() < MAX_LOGIT or np.abs(self.gradient(parameters)).max() > 1e-6 * self.counts.sum():
            what = "the votes are separated: some combination of arm and side never loses, so no finite fit exists."
            raise UserError(what, where="Bradley-Terry", do="Collect more votes, leave out the order effect, or give a ridge.")
        return parameters


def outcome_probabilities(d: Floats, ties: Ties, tie: float) -> tuple[Floats, Floats]:
    """Probabilities of left, right and tie at log-odds d, shape (M, 3), and the slopes of their logs, (M, 3, 2): by d, by `tie`.

    tie: log nu (Davidson) or log(theta - 1) (Rao & Kupper).
    """
    zero = np.zeros_like(d)
    if ties == "half":
        left = expit(d)
        return np.stack([left, 1 - left, zero], 1), np.stack([np.stack([1 - left, -left, 0.5 - left], 1), np.zeros((len(d), 3))], 2)
    if ties == "davidson":
        logs = np.stack([d / 2, -d / 2, np.full_like(d, tie)], 1)
        weights = np.exp(logs - logs.max(axis=1, keepdims=True))
        p = weights / weights.sum(axis=1, keepdims=True)
        mean = (p[:, 0] - p[:, 1]) / 2
        return p, np.stack([np.array([0.5, -0.5, 0.0]) - mean[:, None], np.array([0.0, 0.0, 1.0]) - p[:, 2:]], 2)
    theta = 1 + np.exp(tie)
    left, right = expit(d - np.log(theta)), expit(-d - np.log(theta))
    p = np.stack([left, right, left * right * (theta**2 - 1)], 1)
    by_d = np.stack([1 - left, right - 1, right - left], 1)
    by_log_theta = np.stack([left - 1, right - 1, left + right - 2 + 2 * theta**2 / (theta**2 - 1)], 1)
    return p, np.stack([by_d, by_log_theta * (theta - 1) / theta], 2)


def clustered_covariance(fit: Strengths, battles: Battles, rater: Ints, item: Ints | None = None) -> Sandwich:
    """Covariance of the parameters that holds for other raters and, where given, other items; rater, item: shape (N,)."""
    k = len(fit.names)
    d = fit.strengths[battles.left] - fit.strengths[battles.right] + (fit.order_effect or 0.0)
    _, slopes = outcome_probabilities(d, fit.ties, float(fit.parameters[-1]))
    n = len(d)
    rows = np.arange(n)
    by_d, by_tie = slopes[rows, battles.outcome].T
    parts = [(battles.left, by_d), (battles.right, -by_d)]
    if fit.has_order:
        parts.append((np.full(n, k), by_d))
    if fit.ties != "half":
        parts.append((np.full(n, len(fit.parameters) - 1), by_tie))
    columns, values = np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])
    scores = csr_array(coo_array((values, (np.tile(rows, len(parts)), columns)), shape=(n, len(fit.parameters))))
    inverse: Floats = np.linalg.inv(fit.information).astype(np.float64)
    return sandwich(scores, inverse, rater, item)


def rank_intervals(strengths: Floats, covariance: Sandwich, confidence: float) -> tuple[Ints, Ints]:
    """Best and worst rank of each of K arms, both shape (K,), jointly covering all true ranks.

    From all pairwise differences with Holm's correction: Mogstad, Romano, Shaikh & Wilhelm 2024.
    """
    k = len(strengths)
    first, second = np.triu_indices(k, 1)
    gaps = strengths[first] - strengths[second]
    contrast = np.zeros((len(gaps), covariance.covariances.shape[1]))
    contrast[np.arange(len(gaps)), first] = 1
    contrast[np.arange(len(gaps)), second] = -1
    is_sure = holm(covariance.p_values(gaps, contrast)) < 1 - confidence
    ahead = np.zeros((k, k), dtype=np.bool_)
    ahead[first, second], ahead[second, first] = is_sure & (gaps > 0), is_sure & (gaps < 0)
    return 1 + ahead.sum(axis=0), k - ahead.sum(axis=1)


def _refuse_unconnected(counts: Floats, names: Sequence[str], finite: bool) -> None:
    """A fit exists only if one can walk from any arm to any other along wins and ties: Ford 1957; `finite`: only connected."""
    took = counts[:, :, 0] + counts[:, :, 1].T + counts[:, :, 2] + counts[:, :, 2].T
    n_parts, part = connected_components(csr_array(took), directed=True, connection="weak")
    if n_parts > 1:
        groups = [", ".join(name for name, of in zip(names, part, strict=True) if of == group) for group in range(n_parts)]
        what = f"no votes connect {' | '.join(groups)}."
        raise UserError(what, where="Bradley-Terry", do="Compare arms across these groups, or rank each group alone.")
    n_parts, part = connected_components(csr_array(took), directed=True, connection="strong")
    if n_parts > 1 and not finite:
        smallest = np.bincount(part).argmin()
        group = ", ".join(name for name, of in zip(names, part, strict=True) if of == smallest)
        wins = took[part == smallest][:, part != smallest].sum() > 0
        what = f"against the others, {group} {'never lost' if wins else 'never won'}, so no finite strength fits."
        raise UserError(what, where="Bradley-Terry", do="Collect more votes, or give a ridge to keep strengths finite.")
