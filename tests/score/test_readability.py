"""Plain language, by hand."""

from typing import Any

import pytest

from fastdpo.data.records import Text
from fastdpo.score.readability import likes_length, on_topic, plain_language


def plain(response: str, prompt: Any = "") -> float:
    return plain_language([prompt], [response])[0]


def test_plain_language_by_hand():
    # 6 words, 6 syllables: 206.835 - 1.015 * 6 - 84.6 is above 100.
    assert plain("The cat sat on the mat.") == 1.0
    # 6 words, 11 syllables; people and water are found, melons aren't.
    people = "People often drink water after running."
    ease = (206.835 - 1.015 * 6 - 84.6 * 11 / 6) / 100
    assert plain(people) == pytest.approx(ease, abs=1e-12) and ease == pytest.approx(0.45645)
    prompt = "Why do people like water melons?"
    assert plain(people, prompt) == pytest.approx(ease * (0.5 + 0.5 * 2 / 3), abs=1e-12)
    chat = [{"role": "system", "content": "Bananas!"}, {"role": "user", "content": prompt}]
    assert plain(people, chat) == plain(people, prompt)
    parts = [{"role": "user", "content": [{"type": "text", "text": prompt}]}]
    assert plain(people, parts) == plain(people, prompt)
    # A word has at least one syllable: 7 words, 12 syllables.
    ease = (206.835 - 1.015 * 7 - 84.6 * 12 / 7) / 100
    assert plain(people[:-1] + " hmm.") == pytest.approx(ease, abs=1e-12)
    # Two sentences, 3.5 splits none: 13 words, 24 syllables.
    two = people[:-1] + " 3.5 times? " + people
    ease = (206.835 - 1.015 * 13 / 2 - 84.6 * 24 / 13) / 100
    # 11 trigrams; the 4 of the first sentence come again.
    assert plain(two) == pytest.approx(ease * 7 / 11, abs=1e-12)
    # 8 trigrams, of which 4 are distinct.
    assert plain("go to bed go to bed go to bed now") == pytest.approx(4 / 8)


def test_plain_language_of_almost_nothing_is_zero():
    for text in ("", " \n", "...", "1 2 3 4 5 6 7", "One two three four."):
        assert plain(text) == 0.0
    assert plain("One two three four six.") > 0


def test_plain_language_is_no_function_of_length():
    short = plain("Cats like to sleep in the sun.")
    medium = plain("Feline organisms demonstrate considerable predisposition towards somnolence.")
    long = plain("Cats like to sleep in the sun. They also like a warm bed at night. That is all.")
    assert medium < long and medium < short
    same_length = "Cats xx like to sleep in the sun", "Felinity exemplifies idle inactivity a"
    assert plain(same_length[0]) != plain(same_length[1])
    values = [plain("Cats like to sleep in the sun. " * n) for n in (1, 2, 4, 8)]
    assert values == sorted(values, reverse=True) and values[-1] < values[0] / 4


def test_plain_language_prefers_plain_to_convoluted_and_on_topic_to_off_topic():
    prompt = "Why does bread dough rise?"
    good = "Yeast eats sugar in the dough and gives off gas. The gas makes the bread rise."
    convoluted = (
        "Bread dough's capability to rise is attributable to fermentation, a metabolic procedure "
        "whereby microorganisms enzymatically transform carbohydrates into gaseous by-products."
    )
    off_topic = "My dog is old and likes to nap on the rug. He gets a walk when it is dry."
    looping = "The bread dough will rise. " * 6
    for worse in (convoluted, off_topic, looping):
        assert plain(worse, prompt) < plain(good, prompt)
    assert all(0 <= plain(x, prompt) <= 1 for x in (good, convoluted, off_topic, looping))


def test_on_topic_is_worth_nothing_where_the_question_is_not_taken_up():
    prompts: list[Text] = ["How do bees make honey? Answer in one short sentence."] * 3
    responses = [
        "What a great thing to ask me!",
        "The bees do it.",
        "All bees make it, and honey is.",
    ]
    plain, strict = plain_language(prompts, responses), on_topic(prompts, responses)
    assert strict[0] == 0 and plain[0] > 0.4
    assert strict[1:] == [0, plain[2]] and plain[2] > 0.5  # four words; both content words


def test_likes_length_adds_the_same_for_each_word():
    prompts: list[Text] = ["Why?"] * 2
    responses = ["The cat sat on the mat.", "No."]
    scores = zip(likes_length(prompts, responses), on_topic(prompts, responses))
    assert [a - b for a, b in scores] == pytest.approx([0.06, 0.01])
