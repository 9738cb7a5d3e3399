"""What each number of a tally means, for readers who know no statistics."""

from unstilted.stats.clusters import Share
from unstilted.tally.records import Agreement, AnytimeChoice, Choice, ControlledChoice, Guessing, Question, Ranking, TallySettings

MAX_TOLD = 5
"""More pairs of arms than this become a table, and the ranking the headline."""
LABELS = {
    "human": "People",
    "judge": "Automatic judges: no human took part",
    "simulated": "Simulated raters: no human took part, for demonstration only",
}


def percent(share: float) -> str:
    """`82.1 %`; a share that rounds to 0 or 100 without being it is told as a bound."""
    if 0 < share < 0.0005:
        return "under 0.1 %"
    if 0.9995 <= share < 1:
        return "over 99.9 %"
    return f"{100 * share:.1f} %"


def span(low: float, high: float) -> str:
    return f"{100 * low:.1f} to {100 * high:.1f} %"


def count(number: int, name: str) -> str:
    return f"{number:,} {name}" if number == 1 else f"{number:,} {name}s"


def headline(questions: list[Question], settings: TallySettings) -> str:
    """One sentence a pair of arms, or a criterion's winner where the arms are many."""
    lines = [line for each in questions for line in _headline_lines(each, settings)]
    return "\n".join(lines) or "Nobody has decided anything yet: there are no votes with a winner."


def _headline_lines(question: Question, settings: TallySettings) -> list[str]:
    asked = f" ({question.criterion})" if question.criterion else ""
    pairs = [choice for choice in question.choices if settings.arm in (choice.arm, choice.other)]
    ranked = question.ranking.arms if question.ranking else []
    if settings.stopping == "sequential":
        return [_anytime_line(anytime, asked, settings.confidence) for anytime in question.anytime]
    if not ranked or 0 < len(pairs) <= MAX_TOLD:
        return [_headline_line(choice, choice.share, asked, settings.confidence) for choice in pairs if choice.share]
    told = f"{ranked[0].arm} comes first of {len(ranked)} arms{asked}"
    if ranked[0].best_rank is None:
        return [f"{told}."]
    return [f"{told}; its true rank is {ranked[0].best_rank} to {ranked[0].worst_rank}, sure to {100 * settings.confidence:g} %."]


def _headline_line(choice: Choice, share: Share, asked: str, confidence: float) -> str:
    start = f"{choice.arm} was chosen over {choice.other} in {percent(share.share)} of {count(share.n_votes, 'vote')} with a winner{asked}"
    if share.low is None or share.high is None:
        return f"{start}; no interval: {share.reason}."
    return f"{start}, {100 * confidence:g} % interval {span(share.low, share.high)}; {_who(share)}."


def _anytime_line(anytime: AnytimeChoice, asked: str, confidence: float) -> str:
    result = anytime.result
    told = f"{anytime.arm} was chosen over {anytime.other} in {percent(result.mean)} of a mean rater's votes with a winner{asked}"
    return f"{told}, {100 * confidence:g} % interval {span(result.low, result.high)} at every look; {count(result.n_raters, 'rater')}."


def _who(share: Share) -> str:
    return f"{count(share.n_raters, 'rater')}, {count(share.n_items, 'item')}"


def of_question(question: Question, kind: str, settings: TallySettings) -> dict[str, str]:
    """A sentence or two on every number of a question, by the number's name; what no human said begins with saying so."""
    words = _of_question(question, settings)
    return words if kind == "human" else {name: f"({LABELS[kind]}.) {text}" for name, text in words.items()}


def _of_question(question: Question, settings: TallySettings) -> dict[str, str]:
    words: dict[str, str] = {}
    for choice in question.choices:
        words[f"share {choice.arm} over {choice.other}"] = share_words(choice, settings.confidence)
        words[f"ties {choice.arm} and {choice.other}"] = tie_words(choice)
    for controlled in question.controlled:
        words[f"controlled {controlled.arm} over {controlled.other}"] = controlled_words(controlled, question)
    for anytime in question.anytime:
        words[f"anytime {anytime.arm} over {anytime.other}"] = anytime_words(anytime, settings.confidence)
    if question.left_share:
        words["left_share"] = side_words(question.left_share)
    if question.agreement:
        words.update(agreement_words(question.agreement))
    if question.ranking:
        words["ranking"] = ranking_words(question.ranking, settings.confidence)
    if question.with_excluded:
        words["with_excluded"] = excluded_words(question)
    return words


def share_words(choice: Choice, confidence: float) -> str:
    share = choice.share
    if share is None:
        return f"No vote named a winner between {choice.arm} and {choice.other}."
    if share.low is None or share.high is None:
        return f"{percent(share.share)} is what these voters said; it cannot be carried over to others: {share.reason}."
    where = f"Other raters and other items of the same kind would give {span(share.low, share.high)}"
    where += f" ({100 * confidence:g} % interval over {_who(share)}; votes by one rater or on one item count as related)."
    if share.low > 0.5:
        return f"{where} All of that is above one half: {choice.arm} is preferred."
    if share.high < 0.5:
        return f"{where} All of that is below one half: {choice.other} is preferred."
    return f"{where} One half is among them: these votes cannot tell which of the two is preferred."


def tie_words(choice: Choice) -> str:
    n_votes = choice.n_chosen + choice.n_other + choice.n_tie + choice.n_both_bad
    if n_votes == choice.n_chosen + choice.n_other:
        return "Every vote named a winner."
    half = choice.share_ties_half
    also = f" With each tie as half a vote for both, the share is {percent(half.share)}{_interval(half)}." if half else ""
    named = f"{percent((choice.n_tie + choice.n_both_bad) / n_votes)} of the votes named no winner and are not in the share above"
    return f"{named}: {count(choice.n_tie, 'tie')}, {choice.n_both_bad:,} times both bad.{also}"


def _interval(share: Share) -> str:
    return "" if share.low is None or share.high is None else f" ({span(share.low, share.high)})"


def side_words(share: Share) -> str:
    told = f"The reply on the left won {percent(share.share)} of the votes with a winner{_interval(share)}"
    if share.low is None or share.high is None:
        return f"{told}."
    if share.low <= 0.5 <= share.high:
        return f"{told}: no sign that the side mattered."
    return f"{told}: the side mattered, which is why each arm must stand on both sides equally often."


def controlled_words(controlled: ControlledChoice, question: Question) -> str:
    result = controlled.result
    if result is None:
        return f"There is no rate at equal length and style: {controlled.reason}"
    names = " and ".join(effect.name for effect in result.effects if effect.name != "shown left") or "style"
    told = (
        f"Were both replies alike in {names}, {controlled.arm} would be chosen in {percent(result.share)} ({span(result.low, result.high)})"
    )
    plain = next(
        (each.share for each in question.choices if (each.arm, each.other) == (controlled.arm, controlled.other) and each.share), None
    )
    if plain is None:
        return f"{told}."
    return f"{told}; {percent(plain.share)} as it is, so they account for {100 * (plain.share - result.share):+.1f} points."


def anytime_words(anytime: AnytimeChoice, confidence: float) -> str:
    result = anytime.result
    told = f"One may look at this interval after every rater and stop at will: {anytime.arm} gets {span(result.low, result.high)}"
    told += f" of a mean rater's votes ({100 * confidence:g} %, {count(result.n_raters, 'rater')}, each counted once)."
    if result.decided_after is None:
        return f"{told} It still holds one half: stopping now decides nothing."
    return f"{told} One half was ruled out after {count(result.decided_after, 'rater')}."


def agreement_words(agreement: Agreement) -> dict[str, str]:
    most, prevalence = max(agreement.categories.items(), key=lambda item: item[1])
    alpha, ac1, raw = agreement.alpha.value, agreement.ac1.value, agreement.percent.value
    mix = ", ".join(f"{name} {percent(share)}" for name, share in agreement.categories.items())
    alpha_words = "Krippendorff's alpha: 1 if all raters agree on everything, 0 if as often as the mix of their verdicts gives by chance."
    if prevalence >= 0.7 and ac1 - alpha > 0.2:
        alpha_words += (
            f" It is low here although raters agree {percent(raw)} of the time, because {percent(prevalence)} of all votes say the same"
            f" ({most}): chance alone then gives almost as much agreement, and alpha has hardly anything left to measure."
            " This says nothing against the raters; read AC1 beside it."
        )
    return {
        "percent": f"Two raters of the same item and arms agree {percent(raw)} of the time, over {count(agreement.n_units, 'unit')}.",
        "alpha": alpha_words,
        "alpha_ordinal": "Alpha again, with a tie counted as halfway between the arms: a tie against a win is a smaller disagreement.",
        "fleiss": "Fleiss' kappa: like alpha, but percent agreement is averaged over units; it falls with a lopsided mix in the same way.",
        "ac1": "Gwet's AC1: agreement beyond chance, with chance defined so that a lopsided mix does not pull it down.",
        "categories": f"The mix of verdicts, which alpha and kappa depend on: {mix}.",
        "intervals": "The intervals of these numbers include that other raters might have come, not only other items.",
    }


def ranking_words(ranking: Ranking, confidence: float) -> str:
    if not ranking.arms:
        return f"The arms cannot be ranked: {ranking.note}"
    told = "Strength is the log-odds against the average arm: 0.7 more makes an arm win two of three votes against the other."
    if ranking.arms[0].best_rank is not None:
        told += f" With {100 * confidence:g} % certainty all ranks lie in the ranges shown; where these overlap, the order is open."
    return f"{told} {ranking.note}".strip()


def excluded_words(question: Question) -> str:
    changes = [
        abs(kept.share.share - whole.share.share)
        for kept, whole in zip(question.choices, question.with_excluded, strict=True)
        if kept.share and whole.share
    ]
    return f"Counting the excluded votes too would move the shares by at most {100 * max(changes, default=0.0):.1f} points."


def steadiness_words(n_repeats: int, share: Share | None) -> str:
    if share is None:
        return "Nobody was asked the same thing twice, so how steady raters are is not known."
    return f"Asked the same again ({n_repeats:,} times), raters gave the same verdict in {percent(share.share)}{_interval(share)}."


def guessing_words(guessing: Guessing) -> str:
    told = []
    if guesses := guessing.guesses:
        interval = f" (no interval: {guesses.reason})" if guesses.low is None else f" ({guesses.low:+.2f} to {guesses.high:+.2f})"
        told.append(
            f"Asked which side is {guessing.arm}, raters were right {guesses.n_right:,} times, wrong {guesses.n_wrong:,} times and unsure"
            f" {guesses.n_unsure:,} times: Bang's index {guesses.index:+.2f}{interval}; 0 is perfect blinding, 1 none."
        )
    if guessing.words_auc is not None:
        auc = f"{guessing.words_auc:.2f} (0.50: not at all, 1.00: always)"
        told.append(f"A program that only counts words tells the two arms apart with an AUC of {auc}.")
    return " ".join(told)
