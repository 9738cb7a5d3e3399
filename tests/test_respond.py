import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from small_chat import write_adapter, write_small_llama
from unstilted.engines import Request
from unstilted.errors import UserError
from unstilted.lm.chat import ChatTokens
from unstilted.models.load import load_tokenizer
from unstilted.models.resolve import BaseModelFiles, resolve_model
from unstilted.recipe import STYLE_PROMPT, ModelTable, Recipe, RespondTable
from unstilted.records import ARMS, Arm, Response, read_jsonl
from unstilted.respond import Journal, _key, _request, engine_name, held_out_prompts, run, sources
from unstilted.rundir import RunDir


def prompts_file(folder: Path, *lines: str) -> Path:
    file = folder / "asked.jsonl"
    file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return file


def recipe_for(file: Path | str, **settings: Any) -> Recipe:
    return Recipe(seed=5, respond=RespondTable(prompts=str(file), **settings))


def refusal(folder: Path, *lines: str) -> str:
    with pytest.raises(UserError) as caught:
        held_out_prompts(recipe_for(prompts_file(folder, *lines)))
    return str(caught.value).removeprefix(str(folder) + "/")


# Prompts


def test_a_prompt_is_text_or_messages_and_gets_its_id_from_file_and_line(tmp_path: Path) -> None:
    file = prompts_file(
        tmp_path,
        '{"prompt": "hi there", "id": "mine", "category": "greeting", "more": 1}',
        "",
        '{"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hm"}], "id": null, "category": null}',
    )
    first, second = held_out_prompts(recipe_for(file))
    assert (first.id, first.text, first.category, first.topic) == ("mine", "hi there", "greeting", "")
    assert (second.id, second.text, second.category) == ("asked-3", "hm", "")
    assert [message.role for message in second.prompt] == ["system", "user"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "this is not JSON ("),
        ('["hi"]', "this row has no 'prompt'. Each line needs {\"prompt\": ...}."),
        ('{"text": "hi"}', "this row has no 'prompt'. Each line needs {\"prompt\": ...}."),
        ('{"prompt": 3}', "'prompt': input should be a valid tuple. A Prompt needs: id, prompt."),
        ('{"prompt": []}', "'prompt': tuple should have at least 1 item after validation, not 0. A Prompt needs: id, prompt."),
        ('{"prompt": "  "}', "the prompt doesn't end with words of the user. Let the last message be the user's."),
        (
            '{"prompt": [{"role": "assistant", "content": "hi"}]}',
            "the prompt doesn't end with words of the user. Let the last message be the user's.",
        ),
        (
            '{"prompt": [{"role": "bot", "content": "hi"}]}',
            "'prompt.0.role': input should be 'system', 'user' or 'assistant'. A Prompt needs: id, prompt.",
        ),
    ],
)
def test_a_bad_row_is_refused_with_file_and_line(tmp_path: Path, line: str, problem: str) -> None:
    assert refusal(tmp_path, '{"prompt": "fine"}', line).startswith(f"asked.jsonl line 2: {problem}")


def test_two_rows_of_one_id_are_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path, '{"prompt": "a", "id": "x"}', '{"prompt": "b", "id": "x"}') == (
        "asked.jsonl: two rows have the same 'id'. Give every prompt its own id, or none."
    )


@pytest.mark.parametrize("lines", [(), ("", "  ")])
def test_a_file_without_prompts_is_refused(tmp_path: Path, lines: tuple[str, ...]) -> None:
    assert refusal(tmp_path, *lines) == "asked.jsonl: the file holds no prompts. Put one JSON object with 'prompt' on each line."


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.jsonl: there is no such file\. Check the path\.$"):
        sources(recipe_for(tmp_path / "nothing.jsonl"))


def test_the_starter_prompts_are_all_384_unless_fewer_are_asked_for() -> None:
    prompts = held_out_prompts(Recipe())
    assert len(prompts) == 384
    assert len({prompt.id for prompt in prompts}) == 384
    assert all(prompt.category and prompt.topic for prompt in prompts)


def test_fewer_prompts_are_chosen_by_the_seed_and_keep_their_order() -> None:
    everything = [prompt.id for prompt in held_out_prompts(Recipe())]
    some = [prompt.id for prompt in held_out_prompts(recipe_for("starter", n_prompts=20))]
    assert some == [prompt.id for prompt in held_out_prompts(recipe_for("starter", n_prompts=20))]
    assert some == [id for id in everything if id in some]
    assert some != [prompt.id for prompt in held_out_prompts(Recipe(seed=6, respond=RespondTable(n_prompts=20)))]
    assert len(held_out_prompts(recipe_for("starter", n_prompts=9999))) == 384


def test_the_fingerprint_follows_the_contents_of_the_prompts_file(tmp_path: Path) -> None:
    before = sources(recipe_for(prompts_file(tmp_path, '{"prompt": "a"}', '{"prompt": "c"}')))
    assert sources(recipe_for(prompts_file(tmp_path, '{"prompt": "a"}', '{"prompt": "c"}'))) == before
    after = sources(recipe_for(prompts_file(tmp_path, '{"prompt": "b"}', '{"prompt": "c"}')))
    assert before.keys() == after.keys()
    assert before != after


# Which engine


def test_llama_cpp_is_taken_where_there_is_a_gguf(embedded_model: BaseModelFiles) -> None:
    without = replace(embedded_model, gguf=None)
    assert engine_name(RespondTable(), embedded_model) == "embedded"
    assert engine_name(RespondTable(), without) == "transformers"
    assert engine_name(RespondTable(engine="transformers"), embedded_model) == "transformers"
    with pytest.raises(UserError) as caught:
        engine_name(RespondTable(engine="embedded"), without)
    assert str(caught.value) == (
        'respond.engine: llama.cpp needs a GGUF file, and this model has none. Set respond.engine = "transformers".'
    )


# The stage, on a small random model


@pytest.fixture(scope="module")
def small_model(embedded_model: BaseModelFiles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_llama(tmp_path_factory.mktemp("small") / "model", embedded_model)


@pytest.fixture(scope="module")
def chat(small_model: Path) -> ChatTokens:
    return ChatTokens(load_tokenizer(resolve_model(ModelTable(source=str(small_model)))), "small")


@pytest.fixture
def recipe(small_model: Path, tmp_path: Path) -> Recipe:
    rows = [
        {"prompt": "hello there"},
        {"prompt": "why is the sky blue"},
        {"prompt": [{"role": "user", "content": "hm"}], "category": "odd"},
    ]
    file = prompts_file(tmp_path, *map(json.dumps, rows))
    return Recipe(model=ModelTable(source=str(small_model)), respond=RespondTable(prompts=str(file), max_new_tokens=6, temperature=0.9))


@pytest.fixture
def run_dir(small_model: Path, tmp_path: Path) -> RunDir:
    write_adapter(tmp_path / "run" / "adapter", small_model)
    return RunDir(tmp_path / "run")


def answers(run_dir: RunDir) -> list[Response]:
    return read_jsonl(run_dir.file("responses.jsonl"), Response)


def journals(run_dir: RunDir) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(run_dir.file("answers").iterdir())}


def times(run_dir: RunDir) -> dict[str, int]:
    return {file.name.split("-")[0]: file.stat().st_mtime_ns for file in run_dir.file("answers").iterdir()}


def with_respond(recipe: Recipe, **changes: Any) -> Recipe:
    return recipe.model_copy(update={"respond": recipe.respond.model_copy(update=changes)})


def test_every_arm_answers_every_prompt_with_the_same_seeds_and_says_what_it_was_asked(recipe: Recipe, run_dir: RunDir) -> None:
    facts = run(recipe, run_dir)
    rows = answers(run_dir)
    assert [(row.arm, row.id) for row in rows] == [(arm, f"asked-{line}") for arm in ARMS for line in (1, 2, 3)]
    seeds = {arm: [row.seed for row in rows if row.arm == arm] for arm in ARMS}
    assert seeds["base"] == seeds["prompted"] == seeds["tuned"]
    assert len(set(seeds["base"])) == 3
    assert [row.prompt for row in rows[:3]] == ["hello there", "why is the sky blue", "hm"]
    assert rows[2].category == "odd"
    assert all(row.n_tokens <= 6 for row in rows)
    assert facts["engine"] == "transformers"
    assert facts["n_prompts"] == 3


def test_the_arms_differ_by_prompt_and_adapter(recipe: Recipe, run_dir: RunDir) -> None:
    run(recipe, run_dir)
    texts = {arm: [row.text for row in answers(run_dir) if row.arm == arm] for arm in ARMS}
    assert texts["base"] != texts["prompted"]
    assert texts["base"] != texts["tuned"]


def test_at_strength_0_the_tuned_model_answers_as_base_does(recipe: Recipe, run_dir: RunDir) -> None:
    run(with_respond(recipe, adapter_strength=0.0), run_dir)
    texts = {arm: [row.text for row in answers(run_dir) if row.arm == arm] for arm in ARMS}
    assert texts["base"] == texts["tuned"]


def test_the_prompted_base_is_told_the_style_and_nothing_of_the_prompts_own_system_message(chat: ChatTokens, tmp_path: Path) -> None:
    file = prompts_file(tmp_path, '{"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hm"}]}')
    (prompt,) = held_out_prompts(recipe_for(file))
    told = {arm: chat.tokenizer.decode(_request(prompt, arm, chat, Recipe()).tokens) for arm in ARMS}
    assert STYLE_PROMPT in told["prompted"]
    assert "Be brief." not in told["prompted"]
    assert "Be brief." in told["base"]
    assert told["base"] == told["tuned"]


def test_a_new_adapter_leaves_the_answers_of_base_and_prompted_untouched(recipe: Recipe, run_dir: RunDir, small_model: Path) -> None:
    run(recipe, run_dir)
    before, kept = times(run_dir), journals(run_dir)
    write_adapter(run_dir.file("adapter"), small_model, seed=1)
    run(recipe, run_dir)
    after = journals(run_dir)
    assert {name for name in after if name not in kept} == {name for name in after if name.startswith("tuned")} - kept.keys()
    assert len(after) == 4
    assert kept.items() <= after.items()
    assert {arm: times(run_dir)[arm] for arm in ("base", "prompted")} == {arm: before[arm] for arm in ("base", "prompted")}


@pytest.mark.parametrize(
    ("changes", "redone"),
    [
        ({"adapter_strength": 0.5}, {"tuned"}),
        ({"system_prompt": "Be kind."}, {"prompted"}),
        ({"temperature": 0.1}, set(ARMS)),
        ({"top_p": 0.5}, set(ARMS)),
        ({"max_new_tokens": 5}, set(ARMS)),
        ({"n_parallel": 1}, set()),
        ({"engine": "transformers"}, set()),
    ],
)
def test_an_arm_answers_again_when_what_it_depends_on_changes(
    chat: ChatTokens, small_model: Path, recipe: Recipe, run_dir: RunDir, changes: dict[str, Any], redone: set[str]
) -> None:
    model, changed = resolve_model(ModelTable(source=str(small_model))), with_respond(recipe, **changes)

    def keys(recipe: Recipe) -> dict[str, str]:
        prompts = held_out_prompts(recipe)
        requests: dict[Arm, list[Request]] = {arm: [_request(prompt, arm, chat, recipe) for prompt in prompts] for arm in ARMS}
        return {arm: _key(arm, recipe.respond, requests[arm], model, run_dir.file("adapter")) for arm in ARMS}

    before, after = keys(recipe), keys(changed)
    assert {arm for arm in ARMS if before[arm] != after[arm]} == redone


def test_a_killed_stage_answers_only_what_is_missing(recipe: Recipe, run_dir: RunDir) -> None:
    run(recipe, run_dir)
    whole = run_dir.file("responses.jsonl").read_bytes()
    (journal,) = run_dir.file("answers").glob("base-*")
    lines = journal.read_bytes().splitlines(keepends=True)
    marked = json.loads(lines[0]) | {"text": "kept — as it was"}  # a mark that no model writes
    journal.write_bytes((json.dumps(marked, ensure_ascii=False) + "\n").encode() + lines[1] + lines[2][:25])
    run(recipe, run_dir)
    rows = answers(run_dir)
    assert next(row.text for row in rows if row.id == marked["id"]) == "kept — as it was"
    journal.write_bytes(b"".join(lines[:1]))
    run(recipe, run_dir)
    assert run_dir.file("responses.jsonl").read_bytes() == whole


def response(id: str, text: str) -> Response:
    return Response(id=id, arm="base", prompt="?", text=text, n_tokens=1, finish_reason="stop", seed=1)


def test_a_journal_keeps_every_whole_line_and_forgets_a_cut_one(tmp_path: Path) -> None:
    texts = {"a": "line\nend", "b": "odd \u2028 \x85 \x0b ends", "c": "caf\u00e9 🙂"}
    with Journal(tmp_path / "base-x.jsonl").writing() as journal:
        for id, text in texts.items():
            journal.add(response(id, text))
    content = (tmp_path / "base-x.jsonl").read_bytes()
    assert {id: row.text for id, row in Journal(tmp_path / "base-x.jsonl").rows.items()} == texts
    n_kept = content.rstrip(b"\n").rfind(b"\n") + 1
    for end in range(n_kept, len(content)):  # also in the middle of a character
        (tmp_path / "base-x.jsonl").write_bytes(content[:end])
        assert list(Journal(tmp_path / "base-x.jsonl").rows) == ["a", "b"], end
        assert (tmp_path / "base-x.jsonl").read_bytes() == content[:n_kept]


def test_a_journal_goes_on_behind_its_last_whole_line(tmp_path: Path) -> None:
    file = tmp_path / "base-x.jsonl"
    with Journal(file).writing() as journal:
        journal.add(response("a", "one"))
    file.write_bytes(file.read_bytes() + b'{"id": "b", "ar')
    with Journal(file).writing() as journal:
        journal.add(response("b", "two"))
    assert [row.text for row in Journal(file).rows.values()] == ["one", "two"]


def test_a_single_prompt_is_refused_before_anything_long(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"respond.n_prompts: one answer has no interval. Answer at least 2 prompts."):
        sources(recipe_for(prompts_file(tmp_path, '{"prompt": "a"}')))


def test_a_damaged_line_in_the_journal_costs_that_answer_only(tmp_path: Path) -> None:
    row = '{"id":"a","arm":"base","prompt":"hi","text":"yo","n_tokens":1,"finish_reason":"stop","seed":1}'
    journal = tmp_path / "base-key.jsonl"
    other = row.replace('"a"', '"b"', 1)
    journal.write_text("\n".join([row, "{garbage", other, ""]), encoding="utf-8")
    assert set(Journal(journal).rows) == {"a", "b"}
