import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unstilted.errors import UserError
from unstilted.recipe import Recipe, load_recipe, recipe_from, recipe_toml


def refusal(tmp_path: Path, text: str | bytes) -> str:
    file = tmp_path / "recipe.toml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(UserError) as caught:
        load_recipe(file)
    return str(caught.value).removeprefix(str(tmp_path) + "/")


def test_what_a_recipe_leaves_out_keeps_its_default(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text("seed = 7\n[train]\nbeta = 0.2\n")
    recipe = load_recipe(file)
    assert (recipe.seed, recipe.train.beta) == (7, 0.2)
    assert recipe.train.model_copy(update={"beta": 0.1}) == Recipe().train
    assert recipe.pairs == Recipe().pairs


def test_an_unknown_setting_is_refused_with_its_line_and_the_nearest_known_one(tmp_path: Path) -> None:
    assert refusal(tmp_path, "seed = 1\n\n[train]\n# more\nlearning_rte = 1.0\n") == (
        "recipe.toml line 5: 'train.learning_rte' is not a setting. Did you mean 'learning_rate'?"
    )


def test_an_unknown_setting_like_no_other_is_answered_with_all_known_ones(tmp_path: Path) -> None:
    assert refusal(tmp_path, "[report]\nxyz = 1\n") == (
        "recipe.toml line 2: 'report.xyz' is not a setting. Known here: title, n_examples, picture."
    )


def test_an_unknown_table_is_refused_with_its_line(tmp_path: Path) -> None:
    assert refusal(tmp_path, "seed = 1\n\n[ trian ] # typo\nbeta = 1.0\n") == (
        "recipe.toml line 3: 'trian' is not a setting. Did you mean 'train'?"
    )


def test_an_unknown_setting_at_the_top_is_refused_with_its_line(tmp_path: Path) -> None:
    assert refusal(tmp_path, "sed = 1\n") == "recipe.toml line 1: 'sed' is not a setting. Did you mean 'seed'?"


def test_the_line_is_that_of_the_right_table_although_another_has_the_same_key(tmp_path: Path) -> None:
    text = "[pairs]\nsource = 'x'\n[model]  # which\nsource = 3\n"
    assert refusal(tmp_path, text) == "recipe.toml line 4: 'model.source' is 3: input should be a valid string. Change the value."


def test_the_line_of_a_dotted_key_is_found(tmp_path: Path) -> None:
    assert refusal(tmp_path, "seed = 1\ntrain.beta = -1.0\n") == (
        "recipe.toml line 2: 'train.beta' is -1.0: input should be greater than 0. Change the value."
    )


def test_characters_that_only_look_like_line_ends_do_not_shift_the_line(tmp_path: Path) -> None:
    assert refusal(tmp_path, "# a\u2028b\u0085c\nsed = 1\n").startswith("recipe.toml line 2: 'sed' is not a setting.")


def test_a_value_out_of_range_is_refused_with_the_range(tmp_path: Path) -> None:
    assert refusal(tmp_path, "[measure]\nconfidence = 1.0\n") == (
        "recipe.toml line 2: 'measure.confidence' is 1.0: input should be less than 1. Change the value."
    )


def test_a_choice_that_is_none_of_the_choices_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path, "[pairs]\nbad_rows = 'ignore'\n") == (
        "recipe.toml line 2: 'pairs.bad_rows' is 'ignore': input should be 'refuse' or 'drop'. Change the value."
    )


@pytest.mark.parametrize(
    ("table", "key", "value"),
    [
        ("train", "beta", True),
        ("train", "beta", "0.1"),
        ("train", "beta", float("inf")),
        ("train", "beta", float("nan")),
        ("train", "rank", 8.0),
        ("train", "target_modules", []),
        ("train", "target_modules", ["q_proj", 3]),
        ("respond", "n_prompts", True),
    ],
)
def test_a_value_of_another_type_is_refused_and_never_converted(table: str, key: str, value: object) -> None:
    with pytest.raises(UserError, match=rf"^recipe: '{table}\.{key}' is .*: .* Change the value\.$"):
        recipe_from({table: {key: value}})


def test_a_whole_number_will_do_where_a_fraction_may_stand() -> None:
    assert recipe_from({"train": {"beta": 1}}).train.beta == 1.0


def test_a_value_where_a_table_belongs_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path, "train = 3\n") == "recipe.toml line 1: 'train' is 3, but it is a table. Write [train] and its settings below."


def test_text_that_is_no_toml_is_refused_with_its_line(tmp_path: Path) -> None:
    message = refusal(tmp_path, "seed = 1\nbeta =\n")
    assert message.startswith("recipe.toml: this is not TOML: ")
    assert "line 2" in message
    assert message.endswith("Mend that line.")


def test_bytes_that_are_no_utf8_are_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path, b"# \xff\n") == "recipe.toml: this is not UTF-8 text (invalid start byte). Save it as UTF-8."


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_bytes(b"\xef\xbb\xbfseed = 3\n")
    assert load_recipe(file).seed == 3


def test_a_missing_recipe_is_answered_with_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.toml: there is no such recipe\. `unstilted recipe` prints one to start from\.$"):
        load_recipe(tmp_path / "nothing.toml")


def test_the_printed_default_recipe_is_the_default_recipe() -> None:
    values = tomllib.loads(recipe_toml(Recipe()))
    assert recipe_from(values) == Recipe()
    assert set(values) == set(Recipe.model_fields)


def test_every_setting_is_printed_under_what_it_means() -> None:
    lines = recipe_toml(Recipe()).splitlines()
    settings = [number for number, line in enumerate(lines) if " = " in line and not line.startswith("#")]
    assert len(settings) == sum(len(getattr(value, "__pydantic_fields__", [0])) for _, value in Recipe())
    assert all(len(lines[number - 1]) > 20 and lines[number - 1].startswith("# ") for number in settings)


def fractions(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, exclude_min=True, exclude_max=True)


recipes = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**31 - 1),
        "report": st.fixed_dictionaries({"title": st.text(st.characters(exclude_categories=["Cs"]))}),
        "train": st.fixed_dictionaries(
            {
                "beta": fractions(0, 1e300),
                "dropout": fractions(0, 1),
                "target_modules": st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=4),
            }
        ),
        "pairs": st.fixed_dictionaries({"bad_rows": st.sampled_from(["refuse", "drop"])}),
    }
)


@given(recipes)
def test_any_recipe_survives_printing_and_reading(values: dict[str, Any]) -> None:
    recipe = recipe_from(values)
    assert recipe_from(tomllib.loads(recipe_toml(recipe))) == recipe


def test_quotes_backslashes_line_ends_and_control_characters_survive_printing() -> None:
    title = '"it\'s" C:\\new\\u0041 \r\n\t\x00\x1b\x7f\u2028 ünï 🙂 ]\n[train]\nbeta = 9 # no'
    recipe = recipe_from({"report": {"title": title}})
    assert recipe_from(tomllib.loads(recipe_toml(recipe))) == recipe
