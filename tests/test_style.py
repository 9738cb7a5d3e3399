import pytest
from hypothesis import given
from hypothesis import strategies as st

from unstilted.starter import starter_pairs
from unstilted.style import CONTRACTION, EMOJI, STYLE_RATES, plain_words, sentences, style_rates, words

SAMPLES = [text for pair in starter_pairs()[:12] for text in (pair.chosen_text, pair.rejected_text)]
SENTENCES = ["Well, it's late.", "Which one?", "And then you pick it up!", "It is provided that the payment was made.", "No."]


def test_words_are_lower_case_with_straight_apostrophes() -> None:
    assert words("Don\u2019t PANIC, it's 5 o\u2019clock!") == ["don't", "panic", "it's", "o'clock"]


def test_accented_latin_letters_are_part_of_their_word() -> None:
    assert words("Vilhelm Hammershøi's café, naïve 5\u00d73") == ["vilhelm", "hammershøi's", "café", "naïve"]


def test_sentences_end_at_punctuation_and_line_breaks_and_need_a_word() -> None:
    text = 'Right. "Really?" she said... Then:\n- one thing\n- 2\n\nDone'
    assert sentences(text) == ["Right.", '"Really?', "she said...", "Then:", "- one thing", "Done"]


def test_the_rates_of_a_short_text_worked_by_hand() -> None:
    text = "Well, you don't need it. And honestly, that's fine; maybe I should pick it up!"
    rates = style_rates(text)  # 15 words in two sentences of 5 and 10
    counts = {
        "contractions": 2,  # don't, that's
        "second person": 1,
        "first person": 1,
        "hedges": 1,  # maybe
        "fillers": 2,  # well, honestly
        "formal connectives": 0,
        "formal modals": 1,  # should
        "expletives": 0,
        "abstract nouns": 0,
        "adverbs": 1,  # honestly
        "particle verbs": 1,  # pick it up
        "commas": 2,
        "semicolons and colons": 1,
    }
    assert {name: rates[name] * 15 for name in counts} == pytest.approx(counts)
    assert rates["words a sentence"] == 7.5
    assert rates["sentence length spread"] == pytest.approx(2.5 / 7.5)
    assert rates["short sentences"] == 0.5
    assert rates["linked openings"] == 0.5
    assert rates["long words"] == pytest.approx(1 / 15)  # honestly
    assert rates["letters a word"] == pytest.approx((4 + 3 + 5 + 4 + 2 + 3 + 8 + 6 + 4 + 5 + 1 + 6 + 4 + 2 + 2) / 15)


def test_a_formal_text_has_the_rates_of_one() -> None:
    rates = style_rates("Furthermore, the application, which was submitted prior to the deadline, may be reviewed.")
    per_word = {"formal connectives": 2, "which clauses": 1, "passives": 2, "abstract nouns": 1, "formal modals": 1}
    assert {name: rates[name] * 13 for name in per_word} == pytest.approx(per_word)


@pytest.mark.parametrize(
    "text", ["it's", "don't", "they've", "we'd", "I'm", "gonna", "the dog's been out", "my cousin's a nurse", "who's there"]
)
def test_contractions_count(text: str) -> None:
    assert len(CONTRACTION.findall(text)) == 1


@pytest.mark.parametrize(
    "text", ["the company's policy", "Monday's meeting", "5 o'clock", "the dogs' bowls", "its", "well", "one's own view"]
)
def test_possessives_and_the_like_are_no_contractions(text: str) -> None:
    assert not CONTRACTION.findall(text)


@pytest.mark.parametrize("text", ["🌱", "👍🏽", "❤️", "🇳🇴", "⭐", "⏰ up"])
def test_emoji_are_seen(text: str) -> None:
    assert EMOJI.search(text)


@pytest.mark.parametrize("text", ["5 \u00d7 3 → 15", "© 2020 ™", "naïve — “quoted”…", ":-)", "日本語"])
def test_other_symbols_and_scripts_are_no_emoji(text: str) -> None:
    assert not EMOJI.search(text)


@pytest.mark.parametrize("text", SAMPLES[:4])
def test_curly_apostrophes_count_like_straight_ones(text: str) -> None:
    assert style_rates(text.replace("'", "\u2019")) == style_rates(text)


@given(st.lists(st.sampled_from(SAMPLES + SENTENCES), min_size=1, max_size=3))
def test_the_rates_do_not_change_when_a_text_is_doubled(parts: list[str]) -> None:
    text = " ".join(parts)
    assert style_rates(f"{text} {text}") == pytest.approx(style_rates(text))


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_has_finite_rates_or_no_words(text: str) -> None:
    if not words(text):
        with pytest.raises(ValueError, match="no words"):
            style_rates(text)
        return
    rates = style_rates(text)
    assert tuple(rates) == STYLE_RATES
    assert all(0 <= value < 1e6 for value in rates.values())


def test_a_text_in_another_script_has_no_words() -> None:
    assert words("你好\uff0c今天怎么样\uff1f Привет 🙂") == []


def test_the_plain_words_are_a_thousand_everyday_words() -> None:
    assert len(plain_words()) == 1000
    assert {"you", "don't", "what", "really"} <= plain_words()
    assert not {"furthermore", "utilize"} & plain_words()
    assert all(words(word) == [word] for word in plain_words())
