import numpy as np
import pytest

from unstilted.records import Pair
from unstilted.starter import starter_pairs
from unstilted.voice import VoiceAxis, fit_voice_axis

PAIRS = starter_pairs()


@pytest.fixture(scope="module")
def axis() -> VoiceAxis:
    return fit_voice_axis([pair.chosen_text for pair in PAIRS], [pair.rejected_text for pair in PAIRS])


def test_the_sides_of_the_pairs_it_was_fitted_on_lie_at_one_and_zero(axis: VoiceAxis) -> None:
    assert axis.score([pair.chosen_text for pair in PAIRS]).mean() == pytest.approx(1)
    assert axis.score([pair.rejected_text for pair in PAIRS]).mean() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("seen", "unseen"), [(PAIRS[:256], PAIRS[256:]), (PAIRS[256:], PAIRS[:256])])
def test_pairs_on_topics_it_has_not_seen_are_told_apart(seen: tuple[Pair, ...], unseen: tuple[Pair, ...]) -> None:
    axis = fit_voice_axis([pair.chosen_text for pair in seen], [pair.rejected_text for pair in seen])
    chosen, rejected = (axis.score([getattr(pair, side) for pair in unseen]) for side in ("chosen_text", "rejected_text"))
    assert (chosen > rejected).mean() >= 0.97
    assert ((chosen > 0.5).mean() + (rejected < 0.5).mean()) / 2 >= 0.97


def test_swapping_the_sides_mirrors_the_axis(axis: VoiceAxis) -> None:
    mirrored = fit_voice_axis([pair.rejected_text for pair in PAIRS], [pair.chosen_text for pair in PAIRS])
    texts = [pair.chosen_text for pair in PAIRS[:20]]
    assert mirrored.score(texts) == pytest.approx(1 - axis.score(texts), abs=1e-3)


def test_the_same_content_scores_by_how_it_is_said(axis: VoiceAxis) -> None:
    casual, formal = axis.score(
        [
            "Yeah, that's normal. Give it a day or two, and if it's still leaking, call someone. Don't poke at it.",
            "Such behaviour is considered normal. It is recommended that a period of one to two days be allowed; should the leakage "
            "persist, a professional ought to be contacted. Manipulation of the component is not advisable.",
        ]
    )
    assert casual > 0.8
    assert formal < 0.2


def test_a_score_does_not_depend_on_the_other_texts_or_on_doubling(axis: VoiceAxis) -> None:
    texts = [pair.chosen_text for pair in PAIRS[:5]]
    assert axis.score(texts) == pytest.approx([axis.score([text])[0] for text in texts])
    assert axis.score([f"{text} {text}" for text in texts]) == pytest.approx(axis.score(texts))


def test_a_freak_rate_in_a_short_text_is_held_in_bounds(axis: VoiceAxis) -> None:
    scores = axis.score(["Well,,,,,,,,,,,,,,,,,,,,,,,,,,,,,,", ";;;;;;;;;;;;;;;;;;;;;;;;;;;;;;;;;;;;;; hence"])
    assert np.isfinite(scores).all()
    assert np.abs(scores).max() <= np.abs(axis.weights).sum() * 4 + abs(axis.offset)


def test_rates_that_never_vary_get_no_weight_and_no_division_by_zero() -> None:
    axis = fit_voice_axis(["Yeah, it's fine. Don't worry."] * 5, ["It is acceptable. Concern is not required."] * 5)
    assert axis.score(["Yeah, it's fine. Don't worry.", "It is acceptable. Concern is not required."]) == pytest.approx([1, 0], abs=1e-9)
