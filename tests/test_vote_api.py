"""Schemathesis against every address of the site, as a stranger, as a rater and as an admin with valid form tokens."""

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings

from unstilted.vote.app import create_app
from unstilted.vote.checking import verify
from unstilted.vote.export import run_votes
from unstilted.vote.settings import Limits, Settings
from unstilted.vote.shield import SECURITY_HEADERS
from unstilted.vote.site import Site
from vote_fixtures import SMALL, Rater, hidden, make_run, make_site

QUICK = hypothesis_settings(
    max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True
)  # the fixture's site is shared by all examples on purpose


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    run = make_run(tmp_path_factory.mktemp("api") / "run", study='access = "both"\n' + SMALL)
    limits = Limits(per_address=10**7, per_session=10**7, joins_per_address=10**7, logins_per_address=10**7)
    site = make_site(run, Settings(limits=limits))
    yield site
    site.close()


@pytest.fixture(scope="module")
def api(attacked: Site) -> Any:
    shield = create_app(attacked)
    schema = schemathesis.openapi.from_dict(shield.app.openapi())  # type: ignore[attr-defined]
    schema.app = shield
    return schema


@pytest.fixture(scope="module")
def people(attacked: Site) -> list[tuple[dict[str, str], str]]:
    """(cookies, form token): nobody, a rater, an admin."""
    stranger, rater, admin = Rater(attacked), Rater(attacked), Rater(attacked)
    nobody = hidden(stranger.get("/").text)["form"]
    rater.begin()
    admin.post("/admin/login", {"form": nobody, "token": attacked.secrets.admin_token})
    page = hidden(admin.get("/admin").text)["form"]
    return [({}, nobody), ({"vote": rater.cookie}, rater.ballot()["form"]), ({"admin": str(admin.client.cookies["admin"])}, page)]


def test_no_request_breaks_the_site_or_loosens_its_headers(api: Any, attacked: Site, people: list[tuple[dict[str, str], str]]) -> None:
    operations = [found.ok() for found in api.get_all_operations()]
    assert {operation.label for operation in operations} >= {"POST /vote", "POST /begin", "GET /join/{code}", "POST /admin/invite"}
    for operation in operations:
        attack(operation, attacked, people)


def attack(operation: Any, attacked: Site, people: list[tuple[dict[str, str], str]]) -> None:
    """Send made-up requests of one kind as everybody; schemathesis' own pytest plugin doesn't know pytest 9."""

    @QUICK
    @given(case=operation.as_strategy())
    def send(case: Any) -> None:
        for cookies, token in people:
            if isinstance(case.body, dict) and "form" in case.body and case.path != "/admin/close":
                case.body["form"] = token
            headers = {"origin": "http://127.0.0.1:8080", "user-agent": "Mozilla/5.0 Test/1.0"}
            response = case.call(base_url="http://127.0.0.1:8080", headers=headers, cookies=cookies, allow_redirects=False)
            assert response.status_code < 500, (operation.label, case.body)
            for name, value in SECURITY_HEADERS.items():
                assert response.headers[name][0] == value
            text = response.text or ""
            assert "Traceback" not in text
            assert attacked.secrets.admin_token not in text

    send()


def test_after_all_that_nothing_was_voted_and_the_log_is_whole(attacked: Site) -> None:
    assert run_votes(attacked.run) == []
    assert verify(attacked.run).problems == ()
