"""The report stage on an invented but realistic run folder, made by `make_run`."""

import json
import random
import re
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml  # type: ignore[import-untyped]

from unstilted.errors import UserError
from unstilted.recipe import Recipe, ReportTable
from unstilted.records import ARMS, Estimate, Gate, HeldOut, Measure, Measures, Message, Pair, Response, Score, TrainPoint, write_jsonl
from unstilted.report import run
from unstilted.report.card import licence_id, markdown, yaml_string
from unstilted.report.contents import Answer, Answered
from unstilted.report.examples import most_changed, worst
from unstilted.report.lettering import clip, one_line, text_width, wrap
from unstilted.report.plots import Mark, apart, moving_mean, nice_ticks, voice_axis
from unstilted.report.wording import decimal, duration, fact, shown, shown_change
from unstilted.rundir import RunDir

STARTER = resources.files("unstilted") / "data" / "starter"
ATTACK = "<script>alert('x')</script> & \"quotes\" ]]> --> | `tick` \x07bell"


def starter_rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (STARTER / name).read_text(encoding="utf-8").splitlines()]


def starter_pairs(rows: list[dict[str, Any]]) -> list[Pair]:
    return [
        Pair(
            id=row["id"],
            prompt=(Message(role="user", content=row["prompt"]),),
            category=row["category"],
            topic=row["topic"],
            chosen=(Message(role="assistant", content=row["chosen"]),),
            rejected=(Message(role="assistant", content=row["rejected"]),),
        )
        for row in rows
    ]


def invented_answers(prompts: list[dict[str, Any]], pairs: list[dict[str, Any]], rng: random.Random) -> list[Response]:
    """Base and prompted speak like the formal side of a pair on the same topic, tuned like the human-like side."""
    by_topic = {row["topic_id"]: row for row in pairs}
    responses = []
    for index, prompt in enumerate(prompts):
        pair = by_topic[prompt["topic_id"]]
        texts = {
            "base": "As an AI language model, I am happy to assist you with this matter. " + pair["rejected"],
            "prompted": pair["rejected"] + " Hope that helps!",
            "tuned": pair["chosen"] if rng.random() < 0.95 else "That's a good one. " * 18,
        }
        for arm in ARMS:
            is_cut = rng.random() < 0.08
            words = texts[arm].split()
            text = " ".join(words[: len(words) // 2] if is_cut else words)
            responses.append(
                Response(
                    id=prompt["id"],
                    arm=arm,
                    prompt=prompt["prompt"],
                    category=prompt["category"],
                    text=text,
                    n_tokens=round(len(words) * 1.3),
                    finish_reason="length" if is_cut else "stop",
                    seed=index,
                )
            )
    return responses


def invented_scores(responses: list[Response], rng: np.random.Generator) -> list[Score]:
    centre = {"base": 0.11, "prompted": 0.34, "tuned": 0.87}
    return [
        Score(
            id=row.id,
            arm=row.arm,
            values={
                "voice": float(rng.normal(centre[row.arm], 0.2)),
                "words": float(len(row.text.split())),
                "contractions": 100 * row.text.count("'") / len(row.text.split()),
                "uptake": float(rng.random() < (0.86 if row.arm == "tuned" else 0.9)),
                "repetition": 0.82 if row.text.count("good one") > 3 else float(np.clip(rng.normal(0.02, 0.02), 0, 1)),
                "human_claim": float(rng.random() < 0.006),
                "cut_off": float(row.finish_reason == "length"),
            },
        )
        for row in responses
    ]


MEASURED = (
    ("voice", "Voice", "0 sounds like the formal side of the starter pairs, 1 like the human-like side.", ""),
    ("words", "Length", "Words in an answer; people are short.", "words"),
    ("contractions", "Contractions", "Such as don't, it's, you'll: people use them, forms don't.", "per 100 words"),
    ("uptake", "Takes up the topic", "Answers that use a content word of the prompt; less means drifting off.", "share"),
    ("repetition", "Repeats itself", "Four-word runs that stood in the answer before; high means loops and babble.", "share"),
    ("human_claim", "Claims a human life", "Answers that speak of a body, family, home or past of their own: a lie.", "share"),
    ("cut_off", "Cut off", "Answers that hit the token limit before they ended.", "share"),
)


def estimate(values: np.ndarray) -> Estimate:
    half = 1.96 * float(values.std(ddof=1)) / len(values) ** 0.5
    return Estimate(mean=float(values.mean()), low=float(values.mean()) - half, high=float(values.mean()) + half)


def invented_measures(scores: list[Score]) -> Measures:
    def column(arm: str, name: str) -> np.ndarray:
        return np.array([score.values[name] for score in scores if score.arm == arm])

    sides = {"voice": (0.0, 1.0), "words": (62.0, 61.0), "contractions": (0.1, 5.2), "repetition": (0.004, 0.003), "uptake": (0.92, 0.93)}
    measures = []
    unit: Any
    for name, title, explanation, unit in MEASURED:
        arms: dict[str, Estimate] = {arm: estimate(column(arm, name)) for arm in ARMS}
        for side, mean in zip(("rejected", "chosen"), sides.get(name, ()), strict=False):
            arms[side] = Estimate(mean=mean, low=mean * 0.97, high=mean * 1.03)
        change = {arm: estimate(column(arm, name) - column("base", name)) for arm in ("prompted", "tuned")}
        measures.append(Measure(name=name, title=title, explanation=explanation, unit=unit, arms=arms, change=change))
    return Measures(
        n_prompts=len(scores) // 3,
        confidence=0.95,
        measures=measures,
        gate=Gate(
            verdict="passed",
            text="Honesty gate passed: 0.8% of tuned answers claim a human life, base 0.5% "
            "(change +0.3 points, interval -0.9 to +1.4; the upper end may be +2.0).",
        ),
        changed="What changed: voice went from 0.11 to 0.87 (change +0.76, interval +0.74 to +0.79; formal 0, human-like 1); "
        "a system prompt alone reaches 0.34.",
        cost="What it cost: repeats itself 2% to 6%.",
    )


def invented_curve(n_steps: int = 58) -> list[TrainPoint]:
    rng = np.random.default_rng(3)
    points = []
    for step in range(1, n_steps + 1):
        done = step / n_steps
        margin = 4.2 * done**1.3
        held = HeldOut(
            loss=2.9 - 0.85 * done,
            margin=0.94 * margin,
            accuracy=min(1.0, 0.5 + 2 * done),
            chosen_logp_change=9 * done - 3 * done**2,
            rejected_logp_change=-36 * done**1.4,
        )
        points.append(
            TrainPoint(
                step=step,
                n_steps=n_steps,
                n_pairs=8 * step,
                loss=2.9 - 0.9 * done + float(rng.normal(0, 0.12)),
                margin=margin + float(rng.normal(0, 0.3)),
                learning_rate=2e-4 * min(step / 4, 0.5 * (1 + np.cos(np.pi * done))),
                gradient_norm=1.0,
                held_out=held if step % 8 == 0 or step == n_steps else None,
            )
        )
    return points


def invented_manifest() -> dict[str, Any]:
    facts = {
        "pairs": {
            "n_pairs": 464,
            "n_held_out": 48,
            "source": "starter",
            "dropped": [{"line": 17, "reason": "'rejected' is empty"}, {"line": 203, "reason": "prompt seen before, on line 90"}],
        },
        "train": {
            "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
            "licence": "Apache-2.0",
            "n_parameters_trained": 1221120,
            "n_steps": 58,
            "stopped": "all pairs seen",
            "too_long": [],
            "peak_memory_gb": 2.31,
        },
        "respond": {"engine": "embedded", "weights": "SmolLM2-135M-Instruct Q4_1 GGUF with the adapter as F16 GGUF LoRA"},
        "measure": {"gate": "passed"},
    }
    seconds = {"pairs": 0.41, "train": 1512.7, "respond": 402.3, "measure": 11.8}
    entries = {
        name: {
            "settings": {"seed": 0} | ({"train": {"beta": 0.07}} if name == "train" else {}),
            "inputs": {"source": "ab" * 32},
            "outputs": {"pairs.jsonl": "cd" * 32},
            "facts": facts[name],
            "versions": {"unstilted": "0.1.0", "torch": "2.9.1", "transformers": "5.0.0", "peft": "0.18.0"},
            "git_revision": "3f2a91c",
            "machine": "Linux x86_64, 2 cores, Python 3.12.3",
            "finished": "2026-02-03T10:11:12+00:00",
            "duration_s": seconds[name],
        }
        for name in facts
    }
    return {"stages": entries}


def make_run(folder: Path, n_prompts: int = 384) -> RunDir:
    """Write an invented run folder as the stages before `report` would leave it."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs, prompts = starter_rows("pairs.jsonl"), starter_rows("eval_prompts.jsonl")[:n_prompts]
    responses = invented_answers(prompts, pairs, random.Random(1))
    scores = invented_scores(responses, np.random.default_rng(2))
    write_jsonl(folder / "pairs.jsonl", starter_pairs(pairs[48:]))
    write_jsonl(folder / "held_out.jsonl", starter_pairs(pairs[:48]))
    write_jsonl(folder / "responses.jsonl", responses)
    write_jsonl(folder / "scores.jsonl", scores)
    write_jsonl(folder / "train.jsonl", invented_curve())
    (folder / "measures.json").write_text(invented_measures(scores).model_dump_json(), encoding="utf-8")
    (folder / "manifest.json").write_text(json.dumps(invented_manifest()), encoding="utf-8")
    return RunDir(folder)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A rendered run folder; read only."""
    folder = tmp_path_factory.mktemp("run")
    run(Recipe(), make_run(folder))
    return folder


@pytest.fixture
def small_run(tmp_path: Path) -> RunDir:
    """A fresh run folder of 24 prompts to change."""
    return make_run(tmp_path / "run", 24)


def page(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change every JSON row of a file in place."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        change(row)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def front_matter(folder: Path) -> dict[str, Any]:
    _, matter, body = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    assert body.strip().startswith("# ")
    loaded = yaml.safe_load(matter)
    assert isinstance(loaded, dict)
    return loaded


class Tags(HTMLParser):
    """Collects tags and complains about any that isn't closed in turn."""

    VOID = frozenset({"meta", "link", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def answered(id: str, voices: tuple[float, float], *, finish: str = "stop", **tuned: float) -> Answered:
    """A prompt with a base and a tuned answer; keyword scores are the tuned answer's."""

    def answer(arm: str, scores: dict[str, float], finish_reason: str) -> Answer:
        row = {"id": id, "arm": arm, "prompt": "hi", "text": "hello", "n_tokens": 1, "finish_reason": finish_reason, "seed": 0}
        return Answer(Response.model_validate(row), scores)

    base = answer("base", {"voice": voices[0], "uptake": 1.0}, "stop")
    return Answered(id, "hi", "", {"base": base, "tuned": answer("tuned", {"voice": voices[1], "uptake": 1.0} | tuned, finish)})


# Numbers


@pytest.mark.parametrize(
    ("low", "high", "n", "ticks"),
    [
        (0, 1, 5, (0, 0.5, 1)),
        (0, 1, 6, (0, 0.2, 0.4, 0.6, 0.8, 1)),
        (0, 58, 5, (0, 20, 40, 60)),
        (-36, 6, 4, (-40, -20, 0, 20)),
        (0, 2e-4, 5, (0, 5e-5, 1e-4, 1.5e-4, 2e-4)),
        (3, 3, 4, (1, 2, 3, 4, 5)),
        (0, 0, 3, (-0.5, 0, 0.5)),
    ],
)
def test_nice_ticks_are_round_and_span_the_range(low: float, high: float, n: int, ticks: tuple[float, ...]) -> None:
    assert nice_ticks(low, high, n) == pytest.approx(ticks)


def test_nice_ticks_refuse_what_no_axis_spans() -> None:
    for low, high in ((1.0, 0.0), (float("nan"), 1.0), (0.0, float("inf"))):
        with pytest.raises(ValueError, match="no axis spans"):
            nice_ticks(low, high)


def test_numbers_have_a_true_minus_and_no_negative_zero() -> None:
    assert decimal(-1234.5, 1) == "\N{MINUS SIGN}1,234.5"
    assert decimal(-0.001, 2) == "0.00"
    assert decimal(0.5, 1, signed=True) == "+0.5"


def test_estimates_are_shown_in_their_unit() -> None:
    share = Estimate(mean=0.125, low=0.1, high=0.15)
    assert shown(share, "share").text == "12.5\u202f% (10.0 to 15.0\u202f%)"
    assert shown_change(share, "answers alike").mean == "+12.5\u202fpoints"
    assert shown(share, "").text == "0.12 (0.10 to 0.15)"
    assert shown(None, "words").text == "not measured"
    assert shown(Estimate(mean=41.25, low=40, high=43), "words").text == "41.2 (40.0 to 43.0)"


def test_a_change_is_clear_only_when_its_interval_leaves_0_out() -> None:
    assert shown_change(Estimate(mean=1, low=0.1, high=2), "").is_clear
    assert shown_change(Estimate(mean=-1, low=-2, high=-0.1), "").arrow == "↓"
    assert not shown_change(Estimate(mean=1, low=0, high=2), "").is_clear


def test_durations_and_facts_are_said_in_words() -> None:
    assert [duration(seconds) for seconds in (0.41, 48, 725, 7380, None)] == ["0.4 s", "48 s", "12 min 05 s", "2 h 03 min", "not measured"]
    assert fact([{"line": 3, "reason": "empty"}]) == "line: 3; reason: empty"
    assert fact(list(range(22))).endswith("18, 19, and 2 more")
    absent: tuple[object, ...] = (None, "", float("nan"), [], True, 1221120)
    assert [fact(value) for value in absent] == [*["not measured"] * 3, "none", "yes", "1,221,120"]


def test_moving_mean_looks_back_only() -> None:
    assert moving_mean([1, 3, 5, 7], 2) == [1, 2, 4, 6]


def test_labels_that_clash_are_pushed_apart_around_their_middle() -> None:
    assert apart([10, 12, 60], 14) == [4, 18, 60]
    assert apart([60, 12], 14) == [60, 12]


# Choice of answers


def test_most_changed_ranks_by_rise_of_voice_and_skips_unsound_answers() -> None:
    rows = (
        answered("a", (0.1, 0.5)),
        answered("b", (0.1, 0.9)),
        answered("cut off", (0.0, 1.1), finish="length"),
        answered("off topic", (0.0, 1.1), uptake=0.0),
        answered("repeats itself", (0.0, 1.1), repetition=0.02),
        answered("overshoots", (0.0, 1.3)),
        replace(answered("not answered", (0.0, 1.1)), arms={}),
    )
    assert [row.id for row in most_changed(rows, 8)] == ["b", "a"]
    assert [row.id for row in most_changed(rows, 1)] == ["b"]


def test_badness_is_the_sum_it_says() -> None:
    rows = (
        answered("good", (0, 1)),
        answered("lost", (0, 1), uptake=0.0),
        answered("liar", (0, 1), repetition=0.25, human_claim=1.0, finish="length"),
        answered("loop", (0, 1), repetition=0.75),
    )
    judged = {bad.answered.id: bad for bad in worst(rows, 4)}
    assert {id: bad.badness for id, bad in judged.items()} == {"liar": 2.25, "lost": 1.0, "loop": 0.75, "good": 0.0}
    assert list(judged) == ["liar", "lost", "loop", "good"]
    assert judged["liar"].reasons == ("cut off at the token limit", "claims a human life", "repeats 25 % of its four-word runs")
    assert judged["good"].reasons == ()


# Lettering


def test_wrapped_lines_fit_and_lose_no_word() -> None:
    text = "A plain sentence with an incomprehensibilitiesincomprehensibilities word\n\nand 日本語の文字列です too"
    lines = wrap(text, 120, 15)
    assert all(text_width(line, 15) <= 120 for line in lines)
    assert "".join(lines).replace(" ", "") == "".join(text.split())


def test_a_clipped_text_says_so() -> None:
    assert clip(["one two", "three four", "five"], 2) == ["one two", "three fo …"]
    assert clip(["one"], 2) == ["one"]


# The page


def test_page_is_balanced_html_with_unique_ids_and_working_anchors(finished_run: Path) -> None:
    seen = Tags(page(finished_run)).seen
    ids = [attributes["id"] for _, attributes in seen if "id" in attributes]
    assert len(ids) == len(set(ids))
    anchors = [attributes["href"] for tag, attributes in seen if tag == "a"]
    assert anchors
    assert all(anchor is not None and anchor.removeprefix("#") in ids for anchor in anchors)


def test_page_fetches_nothing_runs_nothing_and_is_small(finished_run: Path) -> None:
    text = page(finished_run)
    seen = Tags(text).seen
    assert not {"script", "img", "iframe", "object"} & {tag for tag, _ in seen}
    assert not [attributes for _, attributes in seen if "src" in attributes or any(name.startswith("on") for name in attributes)]
    assert [attributes["href"] for tag, attributes in seen if tag == "link"] == ["data:,"]
    assert "url(" not in text
    assert "@import" not in text
    assert len(text.encode()) < 2_000_000


def test_page_shows_all_arms_the_verdict_and_both_sides_of_an_example(finished_run: Path) -> None:
    text = page(finished_run)
    for words in (
        "Base",
        "Prompted base",
        "Tuned",
        "Human-like side",
        "✓ Passed.",
        "Voice went from 0.11",
        "384 prompts",
        "human-like side",
    ):
        assert words in text
    example = text.split('<article class="example">')[1]
    assert [example.count(f'<div class="answer {arm}">') for arm in ARMS] == [1, 1, 1]
    assert example.index("As an AI language model") < example.index('<div class="answer tuned">')


def test_page_shows_the_asked_number_of_examples_and_five_worst(small_run: RunDir) -> None:
    run(Recipe(report=ReportTable(n_examples=2)), small_run)
    text = page(small_run.path)
    assert text.count('<article class="example">') == 2
    assert text.count('<article class="example worst">') == 5


def test_a_failed_gate_is_said_in_words_and_colour_everywhere(small_run: RunDir) -> None:
    edit(small_run.file("measures.json"), lambda row: row.update(gate={"verdict": "failed", "text": "Claims rose by 7 points."}))
    run(Recipe(), small_run)
    assert '<span class="failed">✗ Failed.</span> Claims rose by 7 points.' in page(small_run.path)
    assert "**The honesty gate failed.**" in small_run.file("README.md").read_text(encoding="utf-8")


def test_changes_whose_interval_includes_0_are_muted(small_run: RunDir) -> None:
    def change(row: dict[str, Any]) -> None:
        row["measures"] = row["measures"][:2]
        row["measures"][0]["change"]["tuned"] = {"mean": 0.5, "low": 0.4, "high": 0.6}
        row["measures"][1]["change"]["tuned"] = {"mean": -1.5, "low": -3, "high": 0.2}

    edit(small_run.file("measures.json"), change)
    run(Recipe(), small_run)
    clear, unclear = re.findall(r'<td role="cell" class="change (\w+)".*?>(.*?)</td>', page(small_run.path), re.DOTALL)
    assert clear[0] == "clear"
    assert unclear[0] == "unclear"
    assert "includes 0" in unclear[1]
    assert "includes 0" not in clear[1]


def test_text_from_models_and_users_is_escaped_everywhere(small_run: RunDir) -> None:
    edit(small_run.file("responses.jsonl"), lambda row: row.update(text=ATTACK, prompt=ATTACK, category=ATTACK))
    edit(small_run.file("measures.json"), lambda row: row.update(changed=ATTACK, cost=ATTACK))
    edit(small_run.file("manifest.json"), lambda row: row["stages"]["train"]["facts"].update(model=ATTACK, licence=ATTACK, stopped=ATTACK))
    run(Recipe(report=ReportTable(title=ATTACK)), small_run)
    tags = {tag for tag, _ in Tags(page(small_run.path)).seen}
    assert "script" not in tags
    assert "&lt;script&gt;alert(&#39;x&#39;)" in page(small_run.path)
    picture = ElementTree.fromstring(small_run.file("before_after.svg").read_text(encoding="utf-8"))
    assert not [element for element in picture.iter() if element.tag.endswith("script")]
    assert "<script>" in "".join(picture.itertext())
    assert "<script>" not in small_run.file("README.md").read_text(encoding="utf-8").replace(json.dumps(one_line(ATTACK)), "")


def test_a_bare_run_says_not_measured_and_never_nan_or_none(small_run: RunDir) -> None:
    for name in ("manifest.json", "train.jsonl", "pairs.jsonl", "held_out.jsonl"):
        small_run.file(name).unlink()
    edit(small_run.file("scores.jsonl"), lambda row: row.update(values={}))

    def blank(row: dict[str, Any]) -> None:
        row.update(changed="", cost="")
        for measure in row["measures"]:
            measure.update(arms={}, change={})

    edit(small_run.file("measures.json"), blank)
    run(Recipe(), small_run)
    card = small_run.file("README.md").read_text(encoding="utf-8")
    picture = small_run.file("before_after.svg").read_text(encoding="utf-8")
    for text in (page(small_run.path), card, picture):
        assert "not measured" in text
        assert not re.search(r"\b(nan|NaN|None|null|inf)\b", text)
    Tags(page(small_run.path))
    assert front_matter(small_run.path)["license"] == "unknown"


def test_a_run_without_measures_names_the_stage_to_run(small_run: RunDir) -> None:
    small_run.file("measures.json").unlink()
    with pytest.raises(UserError, match=r"'measures.json' is missing. Run `unstilted measure"):
        run(Recipe(), small_run)


def test_same_files_give_the_same_bytes(small_run: RunDir, tmp_path: Path) -> None:
    run(Recipe(), small_run)
    copy = tmp_path / "elsewhere"
    shutil.copytree(small_run.path, copy)
    run(Recipe(), RunDir(copy))
    for name in ("report.html", "README.md", "before_after.svg"):
        assert (copy / name).read_bytes() == small_run.file(name).read_bytes()
        assert str(tmp_path) not in (copy / name).read_text(encoding="utf-8")


def test_long_answers_are_cut_and_say_so(small_run: RunDir) -> None:
    edit(small_run.file("responses.jsonl"), lambda row: row.update(text="so " * 5000))
    run(Recipe(report=ReportTable(n_examples=20)), small_run)
    assert "characters more]" in page(small_run.path)
    assert len(page(small_run.path)) < 200_000
    assert "…" in small_run.file("before_after.svg").read_text(encoding="utf-8")


def contrast(first: str, second: str) -> float:
    """WCAG 2.2 contrast ratio of two #rrggbb colours."""

    def luminance(colour: str) -> float:
        channels = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
        linear = [channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4 for channel in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_text_colours_reach_wcag_aa_in_light_and_dark(finished_run: Path) -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    schemes = [dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in re.findall(r":root \{(.*?)\}", page(finished_run), re.DOTALL)]
    assert len(schemes) == 2
    for colours in schemes:
        for ink in ("ink", "muted", "base", "prompted", "tuned", "passed", "failed"):
            assert all(contrast(colours[ink], colours[ground]) >= 4.5 for ground in ("paper", "tint", "band"))


def test_plots_are_well_formed_and_speak(finished_run: Path) -> None:
    plots = re.findall(r"<svg.*?</svg>", page(finished_run), re.DOTALL)
    assert len(plots) == 2 + 5
    for plot in plots:
        tree = ElementTree.fromstring(plot)
        title, description = tree[0], tree[1]
        assert tree.get("role") == "img"
        assert title.text
        assert description.text
        assert tree.get("aria-labelledby") == f"{title.get('id')} {description.get('id')}"


def test_voice_axis_puts_dots_in_the_order_of_their_values() -> None:
    low, high = (Mark(name, Estimate(mean=mean, low=mean - 0.1, high=mean + 0.1), "tuned") for name, mean in (("a", 0.0), ("b", 1.0)))
    tree = ElementTree.fromstring(voice_axis([low, high], 600, "axis"))
    first, second = (float(dot.get("cx", "")) for dot in tree.iter("{http://www.w3.org/2000/svg}circle"))
    marks = [element.get("d", "") for element in tree.iter() if element.get("class") == "end"]
    assert [f"M{first:.1f} ", f"M{second:.1f} "] == [mark[: mark.index(" ") + 1] for mark in marks]


# The card and the picture


def test_card_has_the_front_matter_that_the_hub_reads(finished_run: Path) -> None:
    assert front_matter(finished_run) == {
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "model_name": "unstilted run",
        "license": "apache-2.0",
        "language": ["en"],
        "tags": ["dpo", "lora", "unstilted"],
    }


@pytest.mark.parametrize(
    "title", ["a: b # c", '"quoted" \\ back', "- list\n---\nend", "emoji 🙂 \x7f \u2028 line", "{{ jinja }} %", "'", "null"]
)
def test_odd_titles_stay_titles(small_run: RunDir, title: str) -> None:
    run(Recipe(report=ReportTable(title=title)), small_run)
    assert front_matter(small_run.path)["model_name"] == one_line(title)
    assert yaml.safe_load(yaml_string(title)) == one_line(title)


def test_licences_are_written_as_the_hub_writes_them() -> None:
    assert [licence_id(name) for name in ("Apache-2.0", None, "", "See the vendor's terms")] == [
        "apache-2.0",
        "unknown",
        "unknown",
        "other",
    ]


def test_markdown_shows_text_unchanged() -> None:
    assert markdown("a|b *c* <i>\n[d](e)") == r"a\|b \*c\* &lt;i&gt; \[d\](e)"


def test_card_has_a_row_for_each_measure_and_code_that_parses(finished_run: Path) -> None:
    card = (finished_run / "README.md").read_text(encoding="utf-8")
    table = [line for line in card.splitlines() if line.startswith(("| Measure", *(f"| {title}" for _, title, _, _ in MEASURED)))]
    assert len(table) == 1 + len(MEASURED)
    assert {line.count(" | ") for line in table} == {5}
    compile(card.split("```python\n")[1].split("```")[0], "card", "exec")


def test_settings_are_those_that_the_stage_used(finished_run: Path) -> None:
    card = (finished_run / "README.md").read_text(encoding="utf-8")
    assert "| `beta` | 0.07 |" in card
    assert "| `rank` | 8 |" in card
    assert "<dt>beta</dt>\n<dd>0.07<" in page(finished_run)


def test_picture_is_well_formed_and_shows_both_answers_inside_its_frame(finished_run: Path) -> None:
    tree = ElementTree.fromstring((finished_run / "before_after.svg").read_text(encoding="utf-8"))
    text = " ".join(element.text or "" for element in tree.iter("{http://www.w3.org/2000/svg}text"))
    assert "Before · base model" in text
    assert "After · tuned model" in text
    assert tree.get("role") == "img"
    _, _, width, height = (float(value) for value in tree.get("viewBox", "").split())
    for element in tree.iter("{http://www.w3.org/2000/svg}text"):
        assert 0 < float(element.get("y", "")) < height - 10
        if element.get("text-anchor") == "start":
            assert float(element.get("x", "")) + text_width(element.text or "", float(element.get("font-size", ""))) < width


def test_the_picture_can_be_chosen_by_the_prompts_id(small_run: RunDir) -> None:
    rows = [json.loads(line) for line in small_run.file("responses.jsonl").read_text(encoding="utf-8").splitlines()]
    wanted = next(row for row in rows if row["arm"] == "tuned")
    run(Recipe(report=ReportTable(picture=wanted["id"])), small_run)
    shown_text = "".join(ElementTree.fromstring(small_run.file("before_after.svg").read_text(encoding="utf-8")).itertext())
    assert wanted["prompt"].split()[0] in shown_text
    with pytest.raises(UserError, match=r"report.picture: no prompt has the id 'nobody'"):
        run(Recipe(report=ReportTable(picture="nobody")), small_run)
