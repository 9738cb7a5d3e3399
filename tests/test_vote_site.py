"""The site over HTTP: nothing about arms leaks, and no forged, foreign, replayed, flooded or oversized request changes anything."""

import html
import re
import stat
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from unstilted.errors import UserError
from unstilted.vote.ballots import Signer, ballot_token, form_token, invitation_code
from unstilted.vote.export import run_votes
from unstilted.vote.inviting import invitation_links
from unstilted.vote.languages import accepted, best, languages
from unstilted.vote.markdown import TAGS, to_html
from unstilted.vote.settings import Limits, Settings
from unstilted.vote.shield import SECURITY_HEADERS, Buckets, client_address
from unstilted.vote.site import Site
from vote_fixtures import SMALL, WHOLE, Clock, Rater, heading, hidden, make_run, make_site, said


def n_votes(site: Site) -> int:
    return len(run_votes(site.run))


# A whole study


def test_a_rater_goes_from_consent_to_thanks(tmp_path: Path) -> None:
    site = make_site(make_run(tmp_path / "run", study=WHOLE))
    try:
        rater = Rater(site)
        assert rater.begin().headers["location"] == "/about-you"
        fields = hidden(rater.get("/about-you").text)
        assert rater.post("/about-you", fields | {"age": "age_30", "use": "nonsense"}).headers["location"] == "/vote"
        pages = []
        while (page := rater.get("/vote")).status_code == 200:
            pages.append(page.text)
            response = rater.post("/vote", hidden(page.text) | {"winner-thoughtful": right_answer(site, page.text)})
            assert response.status_code == 303, heading(response.text)
            if response.headers["location"] == "/feedback":
                assert "Just as we see it" in rater.get("/feedback").text
        assert page.headers["location"] == "/thanks"
        assert heading(rater.get("/thanks").text) == "Thank you"
        assert len(pages) == 2 + 3 + 6 + 2 + 2
        assert "Practice 1 of 2" in pages[0]
        assert "Warm-up 3 of 3" in pages[4]
        assert "10 of 10" in pages[-1]
    finally:
        site.close()
    rows = run_votes(site.run)
    assert sorted(str(row["role"]) for row in rows) == ["main"] * 6 + ["repeat"] * 2
    first = {row["item"]: row for row in rows if row["role"] == "main"}
    for row in rows:
        if row["role"] == "repeat":
            assert (row["left"], row["right"]) == (first[row["item"]]["right"], first[row["item"]]["left"])


def right_answer(site: Site, page: str) -> str:
    """The known answer of a gold pair, and `tie` for all others."""
    prompt, left, _ = (html.unescape(re.sub("<[^>]*>", "", text)) for text in said(page))
    for gold in site.frozen.gold.values():
        if gold.prompt == prompt:
            answer = gold.accept[0]
            return answer if gold.left == left else {"left": "right", "right": "left"}.get(answer, answer)
    return "tie"


def test_a_rater_who_fails_the_warm_up_gets_no_pair_that_counts(tmp_path: Path) -> None:
    site = make_site(make_run(tmp_path / "run", study=WHOLE))
    try:
        rater = Rater(site)
        rater.begin()
        for _ in range(5):
            page = rater.get("/vote").text
            wrong = {"left": "right", "right": "left", "tie": "both_bad", "both_bad": "tie"}[right_answer(site, page)]
            rater.post("/vote", hidden(page) | {"winner-thoughtful": wrong})
        assert rater.get("/vote").headers["location"] == "/thanks"
        assert heading(rater.get("/thanks").text) == "Thank you for trying"
        assert n_votes(site) == 0
    finally:
        site.close()


def test_several_criteria_are_asked_on_one_page_and_none_may_be_left_out(tmp_path: Path) -> None:
    study = SMALL.replace("n_items = 6", 'n_items = 6\ncriteria = [{ name = "helpful" }, { name = "spare", question = "Shorter?" }]')
    site = make_site(make_run(tmp_path / "run", study=study))
    try:
        rater = Rater(site)
        rater.begin()
        fields = rater.ballot()
        half = rater.post("/vote", fields | {"winner-helpful": "left"})
        assert half.status_code == 422
        assert "Please choose an answer to each question." in half.text
        assert n_votes(site) == 0
        assert rater.post("/vote", fields | {"winner-helpful": "left", "winner-spare": "both_bad"}).status_code == 303
        assert [(row["criterion"], row["winner"]) for row in run_votes(site.run)] == [("helpful", "left"), ("spare", "both_bad")]
    finally:
        site.close()


def test_an_answer_that_the_study_does_not_allow_is_not_taken(tmp_path: Path) -> None:
    site = make_site(make_run(tmp_path / "run", study="ties = false\nboth_bad = false\n" + SMALL))
    try:
        rater = Rater(site)
        rater.begin()
        assert "About the same" not in rater.get("/vote").text
        for winner in ("tie", "both_bad", "LEFT", "", "base"):
            assert rater.vote(winner).status_code == 422
        assert n_votes(site) == 0
    finally:
        site.close()


# Nothing about arms


class CountingIds:
    """22 characters, the same at every run."""

    def __init__(self) -> None:
        self.n = 0

    def __call__(self) -> str:
        self.n += 1
        return f"{self.n:022d}"


def all_pages(folder: Path, voices: dict[str, str]) -> list[tuple[dict[str, str], str, str]]:
    """(headers, page, page without its texts) of a whole study."""
    site = make_site(make_run(folder, voices=voices), clock=Clock(), new_id=CountingIds())
    site.secrets = replace(site.secrets, signer=Signer(b"the same key in both runs"))
    pages = []
    try:
        rater = Rater(site)
        rater.client.cookies.set("language", "en")
        rater.begin()
        while (page := rater.get("/vote")).status_code == 200:
            bare = re.sub(r'(<div class="said"[^>]*>).*?(</div>)', r"\1\2", page.text, flags=re.S)
            bare = re.sub(r'value="[^"]*\.[0-9a-f]{64}"', 'value=""', bare)  # signatures are over the session's own random cookie
            pages.append((dict(page.headers), page.text, bare))
            rater.post("/vote", hidden(page.text) | {"winner-thoughtful": "left"})
    finally:
        site.close()
    return pages


def test_exchanging_two_arms_changes_nothing_but_the_texts(tmp_path: Path) -> None:
    """All voices have equal length here, so that even content-length must agree."""
    voices = {"base": "A says: {}.", "prompted": "B says: {}.", "tuned": "C says: {}."}
    exchanged = {"base": "C says: {}.", "prompted": "B says: {}.", "tuned": "A says: {}."}
    one, other = all_pages(tmp_path / "one", voices), all_pages(tmp_path / "other", exchanged)
    assert len(one) == len(other) == 4
    assert any(said(first[1]) != said(second[1]) for first, second in zip(one, other, strict=True))
    for (headers, page, bare), (other_headers, other_page, other_bare) in zip(one, other, strict=True):
        assert bare == other_bare
        assert headers == other_headers
        swap = str.maketrans("AC", "CA")
        assert [text.translate(swap) if "says" in text else text for text in said(page)] == said(other_page)


def test_no_page_and_no_header_names_an_arm(tmp_path: Path) -> None:
    """The arms have names that occur nowhere else."""
    study = SMALL + '[[arms]]\nname = "zebra"\narm = "base"\n[[arms]]\nname = "quagga"\narm = "tuned"\n'
    study = 'against = ""\n' + study
    site = make_site(make_run(tmp_path / "run", study=study))
    try:
        rater = Rater(site)
        sent = [rater.get("/"), rater.begin()]
        for _ in range(4):
            sent += [rater.get("/vote"), rater.vote()]
        sent += [rater.get("/thanks"), rater.get("/stop"), rater.get("/nothing")]
        for response in sent:
            whole = response.text + str(response.headers)
            assert not re.search("zebra|quagga|tuned|prompted", whole)
    finally:
        site.close()


# Forged, foreign, replayed


def test_a_foreign_page_cannot_vote_for_a_rater(site: Site) -> None:
    rater = Rater(site)
    rater.begin()
    fields = rater.ballot() | {"winner-thoughtful": "left"}
    for headers in (
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:8081"},
        {"origin": "https://127.0.0.1:8080"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"sec-fetch-site": "none"},
    ):
        response = rater.post("/vote", fields, **headers)
        assert response.status_code == 403
        assert heading(response.text) == "Please try that once more"
    assert n_votes(site) == 0
    assert rater.post("/vote", fields).status_code == 303


def test_a_form_that_tells_neither_origin_nor_referrer_is_refused_and_a_referrer_is_enough(site: Site) -> None:
    rater = Rater(site)
    rater.begin()
    fields = rater.ballot() | {"winner-thoughtful": "left"}
    del rater.client.headers["origin"]
    del rater.client.headers["sec-fetch-site"]
    assert rater.post("/vote", fields).status_code == 403
    assert rater.post("/vote", fields, referer="http://127.0.0.1:8080.evil.example/vote").status_code == 403
    assert rater.post("/vote", fields, referer="http://127.0.0.1:8080/vote").status_code == 303


@pytest.mark.parametrize(
    "path", ["/vote", "/undo", "/stop", "/about-you", "/begin", "/admin/login", "/admin/close", "/admin/invite", "/admin/logout"]
)
def test_a_form_without_its_token_is_refused_everywhere(site: Site, path: str) -> None:
    rater = Rater(site)
    rater.begin()
    other = Rater(site)
    other.begin()
    stolen = other.ballot()["form"]
    for token in ("", "1.2", stolen, form_token(Signer(b"another key"), "", 2_000_000_000), "9" * 12 + "." + "0" * 64):
        fields = {"form": token, "consent": "yes", "votes": "keep", "winner-thoughtful": "left", "token": "x", "sure": "yes"}
        assert rater.post(path, fields).status_code == 403
    assert n_votes(site) == 0


def test_mangled_forged_and_foreign_ballots_change_nothing_and_get_a_plain_page(site: Site) -> None:
    rater, other = Rater(site), Rater(site)
    rater.begin()
    other.begin()
    fields = rater.ballot()
    ballot_id, expires, signature = fields["ballot"].split(".")
    session = site.session_of(rater.cookie)
    forged = [
        other.ballot()["ballot"],
        f"{ballot_id}.{int(expires) + 3600}.{signature}",
        f"{'A' * 22}.{expires}.{signature}",
        ballot_token(Signer(b"another key"), ballot_id, session, int(expires)),
        ballot_token(site.secrets.signer, ballot_id, site.session_of(other.cookie), int(expires)),
        fields["ballot"].upper(),
        fields["ballot"] + "\n",
        "",
        "." * 300,
        "\u0661" * 22 + f".{expires}.{signature}",
    ]
    for ballot in forged:
        response = rater.post("/vote", fields | {"ballot": ballot, "winner-thoughtful": "left"})
        assert (response.status_code, heading(response.text)) == (403, "This vote can&#39;t be taken".replace("&#39;", "'"))
    assert n_votes(site) == 0


def test_an_expired_ballot_changes_nothing(run: Path) -> None:
    clock = Clock()
    site = make_site(run, clock=clock)
    try:
        rater = Rater(site)
        rater.begin()
        fields = rater.ballot()
        clock.now += 2 * 3600 + 1
        response = rater.post("/vote", fields | {"winner-thoughtful": "left"})
        assert (response.status_code, heading(response.text)) == (410, "This page was open too long")
        assert n_votes(site) == 0
        assert rater.vote().status_code == 303
    finally:
        site.close()


def test_a_cookie_thief_with_another_browser_is_turned_away_and_the_rater_goes_on(site: Site) -> None:
    rater, thief = Rater(site), Rater(site, agent="curl/8.1")
    rater.begin()
    fields = rater.ballot()
    thief.client.cookies.set("vote", rater.cookie)
    assert (thief.get("/vote").status_code, heading(thief.get("/vote").text)) == (403, "This place belongs to another browser")
    for path in ("/vote", "/undo", "/stop", "/about-you"):
        assert thief.post(path, fields | {"winner-thoughtful": "right", "votes": "withdraw"}).status_code == 403
    assert n_votes(site) == 0
    assert rater.post("/vote", fields | {"winner-thoughtful": "left"}).status_code == 303


def test_a_thief_with_the_same_browser_cannot_vote_twice_for_anything(site: Site) -> None:
    """A whole stolen session is the rater to us; it still has one vote an item."""
    rater, thief = Rater(site), Rater(site)
    rater.begin()
    thief.client.cookies.set("vote", rater.cookie)
    both = [thief.ballot(), rater.ballot()]
    assert [
        who.post("/vote", fields | {"winner-thoughtful": "left"}).status_code for who, fields in zip((thief, rater), both, strict=True)
    ] == [303, 409]
    assert n_votes(site) == 1


def test_a_rater_whose_browser_is_updated_goes_on(site: Site) -> None:
    rater = Rater(site, agent="Mozilla/5.0 (X11; Linux) Firefox/128.0")
    rater.begin()
    rater.client.headers["user-agent"] = "Mozilla/5.0 (X11; Linux) Firefox/131.0.2"
    assert rater.vote().status_code == 303


def test_an_unknown_cookie_gets_a_plain_page(site: Site) -> None:
    rater = Rater(site)
    assert (rater.get("/vote").status_code, heading(rater.get("/vote").text)) == (403, "We don't know you yet")
    rater.client.cookies.set("vote", "x" * 43)
    assert rater.get("/vote").status_code == 403


@pytest.mark.parametrize("n_requests", [400, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_replayer_with_many_requests_gets_one_vote(run: Path, n_requests: int) -> None:
    site = make_site(run, Settings(limits=Limits(per_address=10**6, per_session=10**6)))
    try:
        rater = Rater(site)
        rater.begin()
        fields = rater.ballot()
        start = threading.Barrier(8)

        def replay(number: int) -> list[int]:
            client = Rater(site).client
            client.cookies.set("vote", rater.cookie)
            start.wait()
            sent = [fields | {"winner-thoughtful": winner} for winner in ("left", "right")]
            return [client.post("/vote", data=sent[turn % 2]).status_code for turn in range(n_requests // 8)]

        with ThreadPoolExecutor(8) as pool:
            statuses = [status for found in pool.map(replay, range(8)) for status in found]
        assert (statuses.count(303), statuses.count(409)) == (1, n_requests - 1)
        assert n_votes(site) == 1
    finally:
        site.close()


# Limits and headers


def test_every_answer_carries_the_security_headers_and_no_inline_code(site: Site) -> None:
    rater = Rater(site)
    answers = [rater.get("/"), rater.begin(), rater.get("/vote"), rater.get("/nothing"), rater.post("/vote", {}), rater.get("/admin")]
    answers += [
        rater.get("/healthz"),
        rater.get(re.findall(r'href="(/static/vote.css[^"]*)"', answers[0].text)[0]),
        rater.client.put("/vote"),
    ]
    for response in answers:
        for name, value in SECURITY_HEADERS.items():
            assert response.headers[name] == value
        assert not re.search(r"<style|<script(?! src)|\son\w+=|\sstyle=|javascript:", response.text)
    assert "unsafe" not in SECURITY_HEADERS["content-security-policy"]


def test_the_cookie_is_http_only_and_lax_and_bound_to_the_host_behind_tls(run: Path) -> None:
    site = make_site(run, Settings(public_url="https://vote.example.org", proxy_hops=1))
    try:
        rater = Rater(site)
        rater.client.base_url = "https://vote.example.org"
        rater.client.headers["origin"] = "https://vote.example.org"
        response = rater.begin()
        cookie = response.headers["set-cookie"].lower()
        assert cookie.startswith("__host-vote=")
        for part in ("httponly", "samesite=lax", "secure", "path=/"):
            assert part in cookie
        assert "domain" not in cookie
        assert "max-age=31536000" in response.headers["strict-transport-security"]
        assert rater.get("/vote").status_code == 200
    finally:
        site.close()


def test_a_foreign_host_name_is_refused(site: Site) -> None:
    """Somebody else's name that points to this machine must not reach the site of a rater's own computer."""
    rater = Rater(site)
    for host in ("evil.example", "evil.example:8080", "127.0.0.1:8080.evil.example", ""):
        assert rater.client.get("/", headers={"host": host}).status_code == 400


def test_a_large_body_is_refused_whatever_its_length_header_says(site: Site) -> None:
    rater = Rater(site)
    rater.begin()
    assert rater.post("/vote", rater.ballot() | {"winner-thoughtful": "left" * 10_000}).status_code == 413

    def endless() -> Iterator[bytes]:
        for _ in range(1000):
            yield b"a=" + b"x" * 1000 + b"&"

    kind = {"content-type": "application/x-www-form-urlencoded"}
    assert rater.client.post("/vote", content=endless(), headers=kind).status_code == 413
    assert rater.client.post("/vote", content=b"{}", headers={"content-type": "application/json"}).status_code == 415
    assert rater.client.post("/vote", content=b"&".join(b"f%d=1" % n for n in range(500)), headers=kind).status_code in (400, 422)
    assert n_votes(site) == 0


def test_floods_get_a_plain_page_and_others_go_on(run: Path) -> None:
    site = make_site(run, Settings(limits=Limits(per_session=20, joins_per_address=3)))
    try:
        flooder, other = Rater(site), Rater(site)
        flooder.begin()
        other.begin()
        statuses = [flooder.get("/vote").status_code for _ in range(30)]
        assert statuses.count(429) == 10
        last = flooder.get("/vote")
        assert (heading(last.text), last.headers["retry-after"]) == ("A little slower, please", "10")
        assert other.vote().status_code == 303
        assert Rater(site).begin().status_code == 303
        assert Rater(site).begin().status_code == 429
    finally:
        site.close()


def test_a_bucket_refills_with_time_and_forgets_the_longest_unused() -> None:
    clock = Clock()
    buckets = Buckets(2, clock, max_names=2)
    assert [buckets.take("a") for _ in range(3)] == [True, True, False]
    clock.now += 30
    assert [buckets.take("a"), buckets.take("a")] == [True, False]
    for name in ("b", "c"):
        buckets.take(name)
    assert buckets.take("a")  # forgotten, so full again


@pytest.mark.parametrize(
    ("hops", "forwarded", "address"),
    [
        (0, "6.6.6.6", "10.0.0.1"),
        (1, "6.6.6.6, 1.2.3.4", "1.2.3.4"),
        (2, "6.6.6.6, 1.2.3.4, 10.0.0.9", "1.2.3.4"),
        (2, "6.6.6.6", "10.0.0.1"),
    ],
)
def test_forwarded_addresses_are_believed_only_from_configured_proxies(hops: int, forwarded: str, address: str) -> None:
    from starlette.datastructures import Headers

    scope = {"type": "http", "client": ("10.0.0.1", 1)}
    assert client_address(scope, Headers({"x-forwarded-for": forwarded}), hops) == address


@pytest.mark.parametrize("url", ["vote.example.org", "ftp://vote.example.org", "https://vote.example.org/path", "https://"])
def test_a_public_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(UserError, match="no site's address"):
        Settings(public_url=url)


def test_listening_to_others_without_a_public_address_is_refused() -> None:
    with pytest.raises(UserError, match=r"others can reach '0.0.0.0'"):
        Settings(host="0.0.0.0")


def test_secrets_are_random_and_their_owners_alone(site: Site) -> None:
    for name in ("secret_key", "admin_token", "database_url"):
        assert stat.S_IMODE((site.frozen.folder / name).stat().st_mode) == 0o600
    assert stat.S_IMODE(site.frozen.folder.stat().st_mode) == 0o700
    assert len(site.secrets.admin_token) == 43
    (site.frozen.folder / "secret_key").chmod(0o644)
    from unstilted.vote.freezing import load_secrets

    with pytest.raises(UserError, match="others can read this secret"):
        load_secrets(site.run)


def test_an_error_of_ours_is_a_plain_page_without_a_trace(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    rater = Rater(site)
    rater.begin()

    def broken(*_: object) -> None:
        raise RuntimeError("secret detail")

    site.station.visit = broken  # type: ignore[method-assign]
    response = rater.get("/vote")
    assert (response.status_code, heading(response.text)) == (500, "Something went wrong on our side")
    assert "secret detail" not in response.text
    assert "Traceback" not in response.text
    assert response.headers["content-security-policy"]


# Invitations and the admin


def test_an_invitation_is_one_persons_and_moves_with_them(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", study='access = "panel"\nstrata = ["students", "teachers"]\n' + SMALL)
    site = make_site(run)
    try:
        assert heading(Rater(site).get("/").text) == "This study is by invitation"
        links = invitation_links(run, 2, "teachers", "http://127.0.0.1:8080")
        more = invitation_links(run, 1, "teachers", "http://127.0.0.1:8080")
        assert len({*links, *more}) == 3
        path = links[0].removeprefix("http://127.0.0.1:8080")
        laptop, phone = Rater(site), Rater(site, agent="Phone")
        assert laptop.begin(path).status_code == 303
        assert laptop.vote().status_code == 303
        assert phone.begin(path).status_code == 303
        assert phone.vote().status_code == 303
        assert laptop.get("/vote").status_code == 403
        rows = run_votes(run)
        assert len({row["rater"] for row in rows}) == 1
        assert {row["stratum"] for row in rows} == {"teachers"}
        for code in (path[:-1] + "0", "/join/teachers.1.00", f"/join/{invitation_code(Signer(b'other'), 'teachers', 1)}", "/join/%00"):
            assert Rater(site).get(code).status_code == 404
        assert Rater(site).post("/begin", hidden(Rater(site).get(path).text) | {"consent": "yes", "code": ""}).status_code == 403
    finally:
        site.close()


def admin(site: Site) -> Rater:
    person = Rater(site)
    fields = hidden(person.get("/admin").text)
    assert person.post("/admin/login", fields | {"token": site.secrets.admin_token}).status_code == 303
    return person


def test_the_admin_page_needs_the_token_and_guesses_are_limited(run: Path) -> None:
    site = make_site(run, Settings(limits=Limits(logins_per_address=5)))
    try:
        guesser = Rater(site)
        fields = hidden(guesser.get("/admin").text)
        statuses = [guesser.post("/admin/login", fields | {"token": f"guess {turn}"}).status_code for turn in range(7)]
        assert statuses == [403] * 5 + [429] * 2
        for path in ("/admin/votes.csv", "/admin/votes.parquet", "/admin/pairs.jsonl", "/admin/secret_key"):
            assert guesser.get(path).headers["location"] == "/admin"
        guesser.client.cookies.set("admin", "9999999999." + "0" * 64)
        assert guesser.get("/admin/votes.csv").status_code == 303
        assert guesser.post("/admin/close", fields | {"sure": "yes"}).status_code == 403
    finally:
        site.close()


def test_the_admin_sees_progress_and_flags_but_never_who_is_winning(site: Site) -> None:
    rater = Rater(site)
    rater.begin()
    person = admin(site)
    for winner in ("left", "right", "left", "right"):
        rater.vote(winner)
    before = person.get("/admin").text
    assert re.search(r"<dt>Votes that count</dt><dd>4</dd>", before)
    assert not re.search(r"won|winner|%", before.replace("width", ""))
    header = person.get("/admin/votes.csv").text.splitlines()[0]
    assert header == "rater,item,left,right,winner,order,criterion,stratum,domain,left_words,right_words,seconds,excluded,kind,role"
    assert len(person.get("/admin/votes.csv").text.splitlines()) == 5
    assert person.get("/admin/votes.parquet").content[:4] == b"PAR1"


def test_closing_ends_the_study_for_everybody(site: Site) -> None:
    rater, person = Rater(site), admin(site)
    rater.begin()
    fields = rater.ballot()
    form = hidden(person.get("/admin").text)
    assert person.post("/admin/close", form).status_code == 422  # without the tick
    assert person.post("/admin/close", form | {"sure": "yes"}).status_code == 303
    response = rater.post("/vote", fields | {"winner-thoughtful": "left"})
    assert (response.status_code, heading(response.text)) == (410, "This study is closed")
    assert heading(rater.client.get("/thanks").text) == "This study is closed"
    assert heading(Rater(site).get("/").text) == "This study is closed"
    assert n_votes(site) == 0


# Texts


class Tags(HTMLParser):
    """Every tag and attribute of a text."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.attributes: set[tuple[str, str]] = set()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.add(tag)
        self.attributes |= {(tag, name) for name, _ in attributes}


NASTY = st.sampled_from(
    [
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "[a](javascript:alert(1))",
        "![a](http://evil.example/x.png)",
        "<http://evil.example>",
        "http://evil.example",
        "[a]: http://evil.example\n\n[a]",
        '"><svg onload=alert(1)>',
        "<style>*{}</style>",
        "</div></form>",
        "&lt;b&gt;",
        "# h\n",
        "> q\n",
        "```html\n<b>\n```\n",
        "|a|b|\n|-|-|\n|<i>|2|\n",
        "`<b>`",
        "**",
        "\x00",
        "\u202e",
        "1. a\n",
    ]
)


@hypothesis_settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(NASTY, st.text(max_size=20)), max_size=8).map("".join))
def test_no_text_whatsoever_becomes_a_link_an_image_or_code(text: str) -> None:
    tags = Tags()
    tags.feed(to_html(text))
    assert tags.found <= TAGS
    assert tags.attributes <= {("ol", "start")}


def test_markdown_keeps_what_a_reader_sees() -> None:
    assert to_html("**Hi** you\nthere & <b>") == "<p><strong>Hi</strong> you<br>\nthere &amp; &lt;b&gt;</p>"
    assert to_html("# Title") == "<p><strong>Title</strong></p>"
    assert to_html("[text](http://a.b)") == "<p>[text](http://a.b)</p>"


def test_every_language_has_every_text_and_the_wanted_one_is_taken() -> None:
    assert {language.direction for language in languages().values()} == {"ltr", "rtl"}
    assert best(accepted("fr-FR, de;q=0.5, ar;q=0.9")).code == "ar"
    assert best(accepted("de-CH")).code == "de"
    assert best(accepted("xx;q=no, *")).code == "en"
    for language in languages().values():
        assert all(text.strip() for text in language.texts.values())


def test_a_language_is_kept_once_chosen(site: Site) -> None:
    rater = Rater(site)
    assert '<html lang="ar" dir="rtl">' in rater.get("/?lang=ar").text
    assert '<html lang="ar" dir="rtl">' in rater.get("/nothing").text
    assert '<html lang="de" dir="ltr">' in rater.get("/?lang=de").text
    assert '<html lang="de" dir="ltr">' in rater.get("/?lang=<script>").text
