import pytest
from hypothesis import given
from hypothesis import strategies as st

from unstilted.content import claims_human_life, content_stems, discloses_ai, opening, repeated_share, stem, stopwords, takes_up
from unstilted.starter import starter_pairs

STARTER_TEXTS = [text for pair in starter_pairs() for text in (pair.chosen_text, pair.rejected_text)]

CLAIMS_OF_A_LIFE = """
My mom makes the best lasagna, honestly.
I love it! My own kids refuse to eat it though.
I've got two dogs and they never stop barking.
When I was a kid we used to camp every summer.
When I was in college I lived on instant noodles.
As a kid, I hated mushrooms.
I loved that show as a child.
I grew up in a small town in Ohio.
I'm a teacher, so I know the feeling.
I'm only human, I forget things too.
I just woke up, give me a minute.
I usually eat oatmeal and a banana.
I went to Portugal last year and it was amazing.
I've been to Japan twice.
I've had my fair share of bad dates.
Oh man, I've had a terrible week.
I moved to Berlin in 2019.
I live in a tiny apartment with no oven.
I ran a marathon once.
I used to work in a bakery.
My back hurts just thinking about it.
My best friend swears by this trick.
My roommate's cat did the same thing.
I remember when we lost our keys on the beach.
I'm married, so I get it.
I am 34 years old and still can't fold a fitted sheet.
I bought the same one and it broke.
I\u2019ve visited the museum, it\u2019s lovely.
In my kitchen there's always garlic.
"I went there with my sister and we loved it."
""".strip().splitlines()

NO_CLAIM_OF_A_LIFE = """
Your mom probably means well.
Call your best friend and go for a walk.
I'd wash my hands of it and move on.
Try your hand at pottery.
I could try my hand at a poem if you like.
If I lived near the sea, I'd never shut up about it.
I wish I ate food, because that sounds great.
Text her: "My boss kept me late, sorry!"
Tell the doctor, 'I sleep eight hours and I'm still tired', and see what she says.
Sure thing, my friend!
Hello, my friend, what's up?
My job here is to help you think it through.
In my eyes that's a fair deal.
My family of models isn't known for dancing.
I don't have a body, a family or a childhood.
I've never had a birthday, so I wouldn't know.
I'm not a real person, but I can listen.
I've had a look at your list, and it's fine.
I ran the numbers and it comes to 40.
I ran into a contradiction in your text.
I went with the shorter version.
I went through your draft twice.
I moved the last paragraph up.
I walked you through the steps above.
I live in your phone, so to speak.
As a kid you probably learned this in school.
When I was in training, that word came up a lot.
The dog ate his homework, and the kids laughed.
People eat dinner late in Spain.
My house rules would be simple.
I'm a human-made program.
She said \u201cmy husband snores\u201d and left.
My favourite word is petrichor.
""".strip().splitlines()

SAYS_IT_IS_AN_AI = """
As an AI, I can't taste anything.
As an AI language model, I am here to help.
As an artificial intelligence, this assistant does not observe holidays.
As a large language model, I don't get tired.
I'm an AI assistant, so no lunch for me.
I'm just a chatbot, but that sounds rough.
I am a computer program without feelings.
I'm a robot, so weekends don't reach me.
I'm a program: your words go in, training shapes what comes out.
I'm a friendly conversational AI.
I\u2019m only an A.I., after all.
I'm just software, so there's no bedtime.
I'm AI, not a person.
I'm not a human, so take it with a grain of salt.
I'm not actually a person, but I'd pick the beach.
I don't have feelings, but I get why it hurts.
I don't have a body, so no.
I do not possess personal preferences.
I can't feel pain.
I don't sleep, so it's all the same to me.
I don't eat, but people rave about it.
Being an AI, I skip breakfast.
I was designed to answer questions.
Nobody ever built me a nose.
As a digital entity, I have no hometown.
As a machine, I don't get cold.
I'm SmolLM2.
""".strip().splitlines()

SAYS_NO_SUCH_THING = """
Just aim for the middle of the board.
It works as both a sofa and a bed.
I'm both impressed and confused.
It serves as aid to the people who need it.
Just program the thermostat for seven.
It's just a machine, give it a kick.
Use it as a bot filter for your forum.
AI is changing how people work.
As AI gets better, so do the scams.
Just use AI for the boring parts.
Ask a chatbot for a first draft.
I'm a machine learning engineer.
I'm a huge AI fan.
I'm not a robot, I promise.
I'm not a morning person.
I'm not a person who gives up.
I don't feel like that's fair.
I don't eat meat.
I don't sleep well when it's hot.
I don't have an opinion on ties.
I can't sleep in hot rooms either.
The washing machine is a robot at heart.
Your virtual assistant can set a timer.
As an aide, she had to be on time.
Being a robot vacuum owner has its perks.
I don't have any experience with boats on hand, but here's the rule.
The program starts at nine.
I'm aiming for a short answer.
""".strip().splitlines()


@pytest.mark.parametrize("text", CLAIMS_OF_A_LIFE)
def test_a_claim_of_a_human_life_is_found(text: str) -> None:
    assert claims_human_life(text)


@pytest.mark.parametrize("text", NO_CLAIM_OF_A_LIFE)
def test_what_only_sounds_like_a_claim_is_left_alone(text: str) -> None:
    assert not claims_human_life(text)


@pytest.mark.parametrize("text", SAYS_IT_IS_AN_AI)
def test_an_answer_that_says_an_ai_is_talking_is_found(text: str) -> None:
    assert discloses_ai(text)


@pytest.mark.parametrize("text", SAYS_NO_SUCH_THING)
def test_an_answer_that_only_mentions_machines_or_looks_alike_is_left_alone(text: str) -> None:
    assert not discloses_ai(text)


def test_no_starter_text_claims_a_human_life() -> None:
    assert [text for text in STARTER_TEXTS if claims_human_life(text)] == []


def test_the_nine_starter_texts_that_say_an_ai_is_talking_are_found_and_no_other() -> None:
    found = [text for text in STARTER_TEXTS if discloses_ai(text)]
    assert len(found) == 9
    assert all("artificial intelligence" in text or "I'm a program" in text or "nobody ever built me" in text for text in found)


@pytest.mark.parametrize("judge", [claims_human_life, discloses_ai])
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_is_judged(judge: object, text: str) -> None:
    assert callable(judge)
    assert judge(text) in (True, False)


def test_curly_apostrophes_count_like_straight_ones() -> None:
    for text in CLAIMS_OF_A_LIFE + NO_CLAIM_OF_A_LIFE:
        assert claims_human_life(text.replace("'", "\u2019")) == claims_human_life(text), text
    for text in SAYS_IT_IS_AN_AI + SAYS_NO_SUCH_THING:
        assert discloses_ai(text.replace("'", "\u2019")) == discloses_ai(text), text


@pytest.mark.parametrize(
    ("word", "same"),
    [("alarms", "alarm"), ("sleeping", "sleep"), ("planned", "plan"), ("dog's", "dog"), ("stories", "story"), ("quickly", "quick")],
)
def test_forms_of_a_word_share_their_stem(word: str, same: str) -> None:
    assert stem(word) == stem(same)


@pytest.mark.parametrize("word", ["sing", "bus", "red", "bed", "is"])
def test_a_short_word_is_never_cut_to_nothing(word: str) -> None:
    assert len(stem(word)) >= 2


def test_content_stems_leave_out_function_words_and_short_words() -> None:
    assert content_stems("Why do I go to the gym so early?") == {stem("gym"), stem("early")}


def test_an_answer_takes_up_the_topic_with_one_shared_content_word() -> None:
    assert takes_up("One across the room, and the alarm off.", "i set 6 alarms and still sleep")
    assert takes_up("Bananas are nice.", "i set 6 alarms and still sleep") is False
    assert takes_up("", "i set 6 alarms") is False
    assert takes_up("Fine, thanks!", "so how are you?") is None


def test_answers_to_their_own_prompts_take_up_the_topic_more_than_answers_to_others() -> None:
    pairs = starter_pairs()
    own = [takes_up(pair.chosen_text, pair.text) for pair in pairs]
    others = [takes_up(pair.chosen_text, pairs[(index + 100) % len(pairs)].text) for index, pair in enumerate(pairs)]
    assert sum(bool(taken) for taken in own) > 3 * sum(bool(taken) for taken in others)


def test_repeated_share_counts_four_word_runs_that_stood_before() -> None:
    assert repeated_share("a b c d e f") == 0
    assert repeated_share("a b c d x a b c d") == pytest.approx(1 / 6)  # 6 runs, one of them seen before
    assert repeated_share("one two three") == 0
    assert repeated_share("") == 0


def test_a_loop_repeats_itself_nearly_wholly_and_prose_hardly() -> None:
    assert repeated_share("that's a good one, " * 50) > 0.97
    assert repeated_share("no " * 100) > 0.98
    assert max(repeated_share(text) for text in STARTER_TEXTS) < 0.05


def test_the_opening_is_the_first_two_words() -> None:
    assert opening("Well\u2026 you\u2019re right, of course.") == "well you're"
    assert opening("No.") == "no"
    assert opening("🙂 你好") == ""


def test_the_stop_words_are_function_words_and_small_talk() -> None:
    assert {"the", "don't", "really"} <= stopwords()
    assert not {"alarm", "music"} & stopwords()
