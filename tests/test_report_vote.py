"""The vote in the report and on the card: people's results, and machines' clearly apart."""

import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from test_report import ATTACK, Tags, make_run, page
from unstilted.errors import UserError
from unstilted.pipeline import _do, stage_named
from unstilted.recipe import Recipe
from unstilted.report import run
from unstilted.report.contents import read_contents
from unstilted.report.plots import ShareMark, share_axis
from unstilted.report.vote import shown_vote
from unstilted.rundir import RunDir
from unstilted.tally import tally_run
from unstilted.vote.database import Writer, database_url, open_engine
from unstilted.vote.judge import Judge, JudgeSettings, ask
from unstilted.vote.machines import study_of
from unstilted.vote.serve import prepare
from unstilted.vote.settings import Settings
from unstilted.vote.simulate import ID_ALPHABET, Clock, Panel, PanelSettings, simulate_run
from unstilted.vote.station import Station

STUDY = """
n_items = 24
votes_per_item = 20
votes_per_rater = 15
stopping = "votes"
criteria = [{ name = "thoughtful" }, { name = "helpful" }]
"""
SEQUENTIAL = STUDY.replace('"votes"', '"sequential"')


def let_people_vote(folder: Path, **settings: float) -> None:
    """Votes in the study's own database, as the site would cast them."""
    frozen = prepare(folder, None, Settings())
    ids, clock = Random("people"), Clock()
    writer = Writer(open_engine(database_url(folder, ""), is_writer=True), clock)
    try:
        station = Station(frozen, lambda: "".join(ids.choices(ID_ALPHABET, k=22)))
        Panel(frozen, PanelSettings(n_raters=20, arm="tuned", seed=7, **settings), station, writer, clock).vote()  # type: ignore[arg-type]
    finally:
        writer.close()


def let_a_judge_vote(folder: Path, answer: str = "") -> None:
    from test_vote_judge import Letters, Scripted, left_and_right
    from unstilted.lm.chat import ChatTokens

    engine = Scripted(
        lambda question: answer or ("left" if len(left_and_right(question)[0]) > len(left_and_right(question)[1]) else "right")
    )
    frozen = study_of(folder)
    ask(
        folder,
        frozen,
        frozen.study.criteria,
        Judge("scripted judge", "scripted", True, ChatTokens(Letters(), "letters"), lambda n_context: engine),
        JudgeSettings(),
    )


def new_run(folder: Path, study: str = STUDY) -> RunDir:
    made = make_run(folder, 24)
    made.file("study.toml").write_text(study)
    made.file("recipe.toml").write_text("")
    return made


@pytest.fixture(scope="module")
def voted(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run with votes of all three kinds; read only."""
    made = new_run(tmp_path_factory.mktemp("voted") / "run")
    let_people_vote(made.path, share=0.25, left_bias=0)
    let_a_judge_vote(made.path)
    simulate_run(made.path, PanelSettings(n_raters=12, share=0.97))
    tally_run(made.path)
    run(Recipe(), made)
    return made


@pytest.fixture
def fresh(tmp_path: Path) -> RunDir:
    return new_run(tmp_path / "run")


def section(folder: Path) -> str:
    found = re.search(r'<section id="vote".*?</section>', page(folder), re.DOTALL)
    assert found
    return found[0]


def block(folder: Path, kind: str) -> str:
    return section(folder).split(f'aria-labelledby="vote-{kind}-heading"')[1].split('<div class="machine-block"')[0]


def card(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def test_without_a_vote_one_line_says_that_people_were_not_asked(fresh: RunDir) -> None:
    run(Recipe(), fresh)
    assert "People were not asked yet. <code>unstilted vote</code> serves a blind vote" in section(fresh.path)
    assert '<dt>What people chose</dt><dd><span class="voted">People were not asked yet.</span></dd>' in page(fresh.path)
    assert "- **What people chose:** People were not asked yet." in card(fresh.path)
    assert "## Blind vote" not in card(fresh.path)
    assert "<svg" not in section(fresh.path)


def test_people_are_the_headline_of_page_and_card_and_nobody_else(voted: RunDir) -> None:
    told = re.findall(r'<span class="voted">(.*?)</span>', page(voted.path))
    tally = json.loads(voted.file("tally.json").read_text())
    assert sorted(told) == sorted(tally["headline"].splitlines())
    assert [re.search(r"\((\w+)\)", line)[1] for line in told] == ["thoughtful"] * 2 + ["helpful"] * 2  # type: ignore[index]
    for line in told:
        share = float(re.search(r"in ([\d.]+) %", line)[1])  # type: ignore[index]
        assert share < 50, "the simulated landslide for tuned, or the judge, is in the headline"
        assert f"- **What people chose:** {line}" in card(voted.path).replace("\\", "")


def test_every_table_and_picture_of_machines_says_that_no_human_took_part(voted: RunDir) -> None:
    for kind, label in (
        ("judge", "Automatic judges: no human took part"),
        ("simulated", "Simulated raters: no human took part, for demonstration only"),
    ):
        shown = block(voted.path, kind)
        plots, captions = re.findall(r"<svg.*?</svg>", shown, re.DOTALL), re.findall(r"<caption>(.*?)</caption>", shown)
        assert len(plots) == 4
        assert captions
        for plot in plots:
            assert label in " ".join(re.findall(r'class="warning">(.*?)</text>', plot)), "not in the picture"
            assert f"{label}. " in str(ElementTree.fromstring(plot)[1].text), "not spoken"
            assert not re.search(r'class="(dot|interval) (base|prompted|tuned)"', plot)
        assert all(caption.startswith(f'<span class="no-human">{label}.</span>') for caption in captions)
        assert all(label in caption for caption in re.findall(r"<figcaption>(.*?)</figcaption>", shown))
        assert f"({kind}: no human took part) | Chosen in" in card(voted.path)
    people = section(voted.path).split('<div class="machine-block"')[0]
    assert "no human" not in people


def test_simulated_votes_alone_leave_people_unasked(fresh: RunDir) -> None:
    simulate_run(fresh.path, PanelSettings(n_raters=12, share=0.97))
    tally_run(fresh.path)
    run(Recipe(), fresh)
    assert re.findall(r'<span class="voted">(.*?)</span>', page(fresh.path)) == ["People were not asked yet."]
    assert "- **What people chose:** People were not asked yet." in card(fresh.path)
    assert 'id="vote-simulated-heading"' in section(fresh.path)


def test_a_judge_without_a_readable_answer_is_still_told(fresh: RunDir) -> None:
    let_a_judge_vote(fresh.path, answer="Well, it depends")
    run(Recipe(), fresh)
    assert "48 (100 %) had an answer that is no verdict" in section(fresh.path)
    assert "48 (100 %) had an answer that is no verdict" in card(fresh.path)


def test_the_section_tells_shares_ties_agreement_exclusions_and_registration(voted: RunDir) -> None:
    tally = json.loads(voted.file("tally.json").read_text())
    people = next(panel for panel in tally["panels"] if panel["kind"] == "human")
    shown = section(voted.path)
    for question in people["questions"]:
        for choice in question["choices"]:
            share = choice["share"]
            assert f'<span class="mean">{100 * share["share"]:.1f} %</span>' in shown
            assert f"{100 * share['low']:.1f} to {100 * share['high']:.1f} %" in shown
            assert f"{choice['n_tie']} / {choice['n_both_bad']}" in shown
        assert f"{question['agreement']['ac1']['value']:.2f} (" in shown
        for choice in question["with_excluded"]:
            assert f'data-heading="All counted">{100 * choice["share"]["share"]:.1f} %' in shown
    assert people["exclusions"]
    for left_out in people["exclusions"]:
        assert left_out["reason"] in shown
    registration = json.loads(voted.file("vote/preregistration.json").read_text())[-1]
    assert registration["hash"][:16] in shown
    assert "after all votes that were planned" in shown
    assert "Which reply sounds more like a thoughtful person?" in shown
    assert shown.index("<h3>Thoughtful</h3>") < shown.index("<h3>Helpful</h3>")
    for found in tally["calibration"]:
        assert found["words"] in block(voted.path, "judge").replace("&#39;", "'")
    assert "It is the model whose replies it judges" in block(voted.path, "judge")


def test_a_sequential_study_is_told_only_by_the_interval_that_holds_at_every_look(tmp_path: Path) -> None:
    made = new_run(tmp_path / "run", SEQUENTIAL)
    let_people_vote(made.path, share=0.8)
    tally_run(made.path)
    run(Recipe(), made)
    tally = json.loads(made.file("tally.json").read_text())
    first = next(question for question in tally["panels"][0]["questions"] if question["criterion"] == "thoughtful")
    shown = section(made.path)
    for choice, anytime in zip(first["choices"], first["anytime"], strict=False):
        assert (choice["arm"], choice["other"]) == (anytime["arm"], anytime["other"])
        table = shown.split("</table>")[0]
        assert f"{100 * anytime['result']['low']:.1f} to {100 * anytime['result']['high']:.1f} %" in table
        assert f"{100 * choice['share']['low']:.1f} to {100 * choice['share']['high']:.1f} %" not in table
    told = re.findall(r'<span class="voted">(.*?)</span>', page(made.path))
    assert all(line.startswith("One may look at this interval after every rater") for line in told)
    assert len(tally["headline"].splitlines()) == sum(len(question["anytime"]) for question in tally["panels"][0]["questions"])
    assert all("at every look" in line for line in tally["headline"].splitlines())


def test_the_page_with_votes_is_balanced_small_fetches_nothing_and_has_unique_ids(voted: RunDir) -> None:
    text = page(voted.path)
    seen = Tags(text).seen
    ids = [attributes["id"] for _, attributes in seen if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert len(text.encode()) < 1_000_000
    assert not [attributes for _, attributes in seen if str(attributes.get("src") or attributes.get("href") or "").startswith("http")]
    assert not re.search(r"\b(nan|NaN|None|inf)\b", section(voted.path))


def test_names_from_files_are_escaped(voted: RunDir, tmp_path: Path) -> None:
    contents = read_contents(Recipe(), voted)
    assert contents.tally is not None
    text = contents.tally.model_dump_json().replace("prompted", json.dumps(ATTACK)[1:-1])
    copy = make_run(tmp_path / "copy", 24)
    copy.file("tally.json").write_text(text)
    run(Recipe(), copy)
    assert "script" not in {tag for tag, _ in Tags(page(copy.path)).seen}
    assert "&lt;script&gt;" in section(copy.path)
    assert "<script>" not in card(copy.path)


def test_a_damaged_tally_is_refused_with_its_field(fresh: RunDir) -> None:
    fresh.file("tally.json").write_text('{"headline": 3}')
    with pytest.raises(UserError, match=r"tally\.json: 'headline': input should be a valid string\. Run `unstilted tally` again\."):
        run(Recipe(), fresh)


def test_a_changed_pre_registration_is_refused(voted: RunDir, tmp_path: Path) -> None:
    copy = make_run(tmp_path / "copy", 24)
    copy.file("vote").mkdir()
    text = voted.file("vote/preregistration.json").read_text()
    copy.file("vote/preregistration.json").write_text(text.replace('"n_items": 24', '"n_items": 25'))
    with pytest.raises(UserError, match="was changed after it was frozen"):
        run(Recipe(), copy)


def test_the_report_is_done_again_when_votes_were_tallied(fresh: RunDir, voted: RunDir) -> None:
    (fresh.path / ".lock").touch()
    report = stage_named("report")
    _do(report, Recipe(), fresh, must=False)
    before = page(fresh.path)
    fresh.file("report.html").chmod(0o444)
    _do(report, Recipe(), fresh, must=False)
    assert page(fresh.path) == before
    assert not fresh.file("report.html").stat().st_mode & 0o222, "written again although nothing changed"
    shutil.copy(voted.file("tally.json"), fresh.file("tally.json"))
    _do(report, Recipe(), fresh, must=False)
    assert page(fresh.path) != before


def test_share_axis_puts_one_half_in_the_middle_and_fits_long_names() -> None:
    mark = ShareMark("tuned over base", "50.0 %", 0.5, 0.25, 0.75, "tuned")
    tree = ElementTree.fromstring(share_axis([mark, replace(mark, label="x" * 200, low=None)], 340, "k", "t", "label"))
    xml = "{http://www.w3.org/2000/svg}"
    assert [dot.get("cx") for dot in tree.iter(f"{xml}circle")] == ["170.0", "170.0"]
    (bar,) = [element for element in tree.iter(f"{xml}path") if str(element.get("class")).startswith("interval")]
    assert bar.get("d", "").startswith("M95.0 ")
    assert bar.get("d", "").endswith("H245.0")
    assert tree[1].text == f"label. tuned over base 50.0 %, interval 25.0 to 75.0 %; {'x' * 200} 50.0 %, no interval."
    names = [element.text or "" for element in tree.iter(f"{xml}text") if "name" in str(element.get("class"))]
    assert names[1].endswith("…  50.0 %")
    assert len(names[1]) < 60


def test_nothing_of_the_vote_is_in_contents_without_its_files(fresh: RunDir) -> None:
    shown = shown_vote(read_contents(Recipe(), fresh))
    assert (shown.people, shown.machines, shown.calibration) == (None, (), ())
