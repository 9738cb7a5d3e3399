"""The site in a real browser: a whole study by four very different raters at once, and every page under axe."""

import csv
import os
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from unstilted.cli import main
from unstilted.vote.app import create_app
from unstilted.vote.checking import verify
from unstilted.vote.export import run_votes
from unstilted.vote.inviting import invitation_links
from unstilted.vote.settings import Limits, Settings
from unstilted.vote.site import Site
from vote_fixtures import WHOLE, free_port, make_run, make_site

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
sync_playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").sync_playwright
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
DESKTOP = {"viewport": {"width": 1280, "height": 800}}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox"] if os.getuid() == 0 else []
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield chromium
        chromium.close()


class Serving:
    """A site on a real socket, in a thread."""

    def __init__(self, run: Path) -> None:
        self.port = free_port()
        settings = Settings(port=self.port, limits=replace(Limits(), joins_per_address=1000, per_address=100_000))
        self.site: Site = make_site(run, settings)
        self.url = settings.url
        self.server = uvicorn.Server(uvicorn.Config(create_app(self.site), host="127.0.0.1", port=self.port, log_level="error"))
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.02)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(20)
        self.site.close()


def right_answer(site: Site, page: Any) -> str:
    """The known answer of a gold pair as the page shows it, and `tie` for all others."""
    prompt, left = page.inner_text(".prompt .said"), page.inner_text(".reply-left .said")
    for gold in site.frozen.gold.values():
        if gold.prompt == prompt:
            answer = gold.accept[0]
            return answer if gold.left == left else {"left": "right", "right": "left"}.get(answer, answer)
    return "tie"


class Person:
    """One rater's way through the study; `step` does one page and tells whether there was one."""

    def __init__(self, browser: Any, serving: Serving, **options: Any) -> None:
        self.serving, self.context, self.last = serving, browser.new_context(**options), ""
        self.page, self.complaints = self.context.new_page(), []
        self.page.on("console", lambda message: self.complaints.append(message.text) if message.type in ("error", "warning") else None)
        self.page.goto(serving.url)

    def begin(self) -> None:
        self.page.check("#consent")
        self.page.click("button.main")
        self.page.click("button.main")

    def step(self) -> bool:
        if self.page.url.endswith("/feedback"):
            self.go_on()
        if not self.page.url.endswith("/vote"):
            return False
        self.last = right_answer(self.serving.site, self.page)
        self.choose(self.last)
        return True

    def undo(self) -> None:
        self.page.click("button:has-text('Undo last vote')")

    def go_on(self) -> None:
        self.page.click("#go")

    def choose(self, winner: str) -> None:
        self.page.locator(f".{winner} label").click(force=True)
        self.page.click("button.main")


class KeyboardOnly(Person):
    """Never touches a mouse."""

    def press(self, *keys: str) -> None:
        for key in keys[:-1]:
            self.page.keyboard.press(key)
        with self.page.expect_navigation():
            self.page.keyboard.press(keys[-1])

    def focus(self, selector: str) -> None:
        for _ in range(40):
            self.page.keyboard.press("Tab")
            if self.page.evaluate("selector => document.activeElement.matches(selector)", selector):
                return
        raise AssertionError(f"Tab never reaches {selector}")

    def begin(self) -> None:
        self.focus("#consent")
        self.page.keyboard.press("Space")
        self.focus("button.main")
        self.press("Enter")
        self.focus("button.main")
        self.press("Enter")

    def undo(self) -> None:
        self.press("u")

    def go_on(self) -> None:
        self.press("Enter")

    def choose(self, winner: str) -> None:
        self.press({"left": "ArrowLeft", "right": "ArrowRight", "tie": "t", "both_bad": "b"}[winner], "Enter")


def test_four_people_do_a_whole_study_at_once(browser: Any, tmp_path: Path) -> None:
    """Mouse on a desktop, finger on a phone, keyboard alone, and a browser without JavaScript."""
    serving = Serving(make_run(tmp_path / "run", study=WHOLE))
    try:
        people = [
            Person(browser, serving, **DESKTOP),
            Person(browser, serving, **PHONE),
            KeyboardOnly(browser, serving, **DESKTOP),
            Person(browser, serving, **DESKTOP, java_script_enabled=False),
        ]
        for person in people:
            person.begin()
        steps, to_undo = 0, {2: "both_bad", 3: "left"}
        while sum(person.step() for person in people):
            steps += 1
            for index in [index for index in to_undo if steps > 5 and people[index].last == "tie"]:  # no attention check
                people[index].undo()
                people[index].choose(to_undo.pop(index))
        assert steps == 2 + 3 + 6 + 2 + 2
        for person in people:
            assert person.page.inner_text("h1") == "Thank you"
            assert person.complaints == []
        close_and_export(browser, serving, tmp_path)
        people[0].page.goto(serving.url + "/vote")
        assert people[0].page.inner_text("h1") == "Thank you"
    finally:
        serving.stop()
    rows = run_votes(serving.site.run)
    counted = [row for row in rows if not row["excluded"]]
    assert len(counted) == 4 * 6
    assert [row["excluded"] for row in rows].count("taken back by the rater") == 2
    assert {row["winner"] for row in counted} == {"tie", "both_bad", "left"}
    with (tmp_path / "votes.csv").open(newline="") as file:
        assert [row["item"] for row in csv.DictReader(file)] == [row["item"] for row in rows]
    assert verify(serving.site.run).problems == ()
    assert main(["tally", str(serving.site.run)]) == 0
    assert '"human"' in (serving.site.run / "tally.json").read_text()


def close_and_export(browser: Any, serving: Serving, folder: Path) -> None:
    """The admin's part."""
    page = browser.new_context().new_page()
    page.goto(serving.url + "/admin")
    page.fill("#token", serving.site.secrets.admin_token)
    page.click("button.main")
    assert page.inner_text("dd >> nth=0") == "24"
    with page.expect_download() as download:
        page.click("a:has-text('votes.csv')")
    download.value.save_as(folder / "votes.csv")
    page.check("#sure")
    page.click("button:has-text('Close the study')")
    assert "Closed." in page.inner_text(".lead")


def test_a_double_click_on_next_gives_one_vote(browser: Any, tmp_path: Path) -> None:
    serving = Serving(make_run(tmp_path / "run"))
    try:
        for enabled in (True, False):
            context = browser.new_context(java_script_enabled=enabled)
            page = context.new_page()
            page.goto(serving.url)
            page.check("#consent")
            page.click("button.main")
            page.locator(".left label").click(force=True)
            page.dblclick("button.main", no_wait_after=True)
            page.wait_for_selector("h1:has-text('Already counted'), .progress p:has-text('2 of 4')", timeout=20_000)
        rows = run_votes(serving.site.run)
        assert len(rows) == len({row["rater"] for row in rows}) == 2
    finally:
        serving.stop()


def test_in_a_right_to_left_page_the_arrow_keys_choose_what_they_point_at(browser: Any, tmp_path: Path) -> None:
    serving = Serving(make_run(tmp_path / "run"))
    try:
        page = browser.new_context(**DESKTOP).new_page()
        page.goto(serving.url + "/?lang=ar")
        page.check("#consent")
        page.click("button.main")
        page.wait_for_selector("input[name^=winner]")
        page.wait_for_load_state("load")  # the keys' script runs at its end
        for key in ("ArrowLeft", "ArrowRight"):
            page.keyboard.press(key)
            chosen = page.eval_on_selector("input[name^=winner]:checked", "input => input.value")
            boxes = {side: page.locator(f".reply-{side}").bounding_box()["x"] for side in ("left", "right")}
            assert chosen == (min if key == "ArrowLeft" else max)(boxes, key=lambda side: boxes[side])
            hint = page.inner_text(f".choice.{chosen} kbd")
            assert hint == {"ArrowLeft": "←", "ArrowRight": "→"}[key]
    finally:
        serving.stop()


LOOKS = [
    ("en", "light", DESKTOP),
    ("en", "dark", PHONE),
    ("ar", "dark", DESKTOP),
    ("ar", "light", PHONE),
    ("de", "light", PHONE),
]


LOOK_IDS = ["-".join([language, scheme, str(size["viewport"]["width"])]) for language, scheme, size in LOOKS]  # type: ignore[index]


@pytest.mark.parametrize(("language", "scheme", "size"), LOOKS, ids=LOOK_IDS)
def test_no_page_has_an_accessibility_violation(browser: Any, tmp_path: Path, language: str, scheme: str, size: dict[str, Any]) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed").Axe()
    study = 'access = "both"\ncontact = "study@example.org"\n' + WHOLE
    voices = {"base": "# A\n\n- {}\n- b", "prompted": "> {}\n\n`x`", "tuned": "1. {}\n\n|a|b|\n|-|-|\n|1|2|"}
    serving = Serving(make_run(tmp_path / "run", study=study, voices=voices))
    context = browser.new_context(**size, color_scheme=scheme, reduced_motion="reduce")
    page, seen = context.new_page(), []

    def check(name: str) -> None:
        found = axe.run(page, options={"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]})
        told = [(fault["id"], [node["target"] for node in fault["nodes"]]) for fault in found.response["violations"]]
        assert told == [], name
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{name} scrolls sideways"
        seen.append(name)

    try:
        page.goto(f"{serving.url}/?lang={language}")
        check("consent")
        page.eval_on_selector("form", "form => { form.noValidate = true }")
        page.click("button.main")
        check("consent, not ticked")
        page.goto(serving.url)
        page.check("#consent")
        page.click("button.main")
        check("about you")
        page.click("button.main")
        check("practice")
        for number in range(7):
            page.locator(f".{right_answer(serving.site, page)} label").click(force=True)
            page.click("button.main")
            if page.url.endswith("/feedback"):
                check("feedback") if number == 0 else None
                page.click("#go")
        check("a pair")
        page.locator(".left label").click(force=True)
        check("a pair, chosen")
        page.eval_on_selector("#ballot", "form => { form.noValidate = true; form.reset() }")
        page.click("button.main")
        check("a pair, nothing chosen")
        for path in ("stop", "nothing", "admin"):
            page.goto(f"{serving.url}/{path}")
            check(path)
        page.fill("#token", serving.site.secrets.admin_token)
        page.click("button.main")
        page.click("button:has-text('Make links')")
        check("admin's page")
        page.goto(invitation_links(serving.site.run, 1, "panel", serving.url)[0])
        check("invitation")
        page.goto(f"{serving.url}/stop")
        page.click("button.main")
        check("thanks")
    finally:
        context.close()
        serving.stop()
    assert len(seen) == 14
