"""The raters' pages: consent, about you, the pairs, feedback, stopping, thanks."""

import math
import secrets
from dataclasses import dataclass
from typing import Any, cast

from fastapi import APIRouter, Request
from starlette.datastructures import FormData
from starlette.responses import HTMLResponse, Response

from unstilted.vote.assignment import COUNTED, Step
from unstilted.vote.ballots import ballot_token, read_ballot, read_invitation
from unstilted.vote.database import Transaction
from unstilted.vote.items import Winner
from unstilted.vote.languages import Language, languages
from unstilted.vote.markdown import to_html
from unstilted.vote.site import Refusal, Site, form_of, to
from unstilted.vote.station import BALLOT_LIFE_S, BLINDING, Joining, Slip, Visit, is_right

SECONDS_A_PAIR = 25
BACKGROUND = {
    "age": ("age_18", "age_30", "age_45", "age_60"),
    "use": ("use_never", "use_monthly", "use_weekly", "use_daily"),
    "reading": ("reading_native", "reading_well", "reading_some"),
}
OUTCOME_STATUS = {
    "repeated": 409,
    "taken_back": 409,
    "lapsed": 410,
    "unknown": 403,
    "elsewhere": 409,
    "closed": 410,
    "browser": 403,
    "invalid": 422,
}


@dataclass(frozen=True)
class Question:
    """A criterion as the page asks it."""

    name: str
    text: str
    language: str
    """Of the text."""
    choices: tuple[Winner, ...]
    tie_label: str


def rater_routes(site: Site) -> APIRouter:
    """All pages that a rater can come to."""
    router = APIRouter(default_response_class=HTMLResponse)
    winners = [f"winner-{criterion.name}" for criterion in site.frozen.study.criteria]

    @router.get("/")
    async def front(request: Request) -> Response:
        return await _front(site, request, "")

    @router.get("/join/{code}")
    async def invited(request: Request, code: str) -> Response:
        if read_invitation(site.secrets.signer, code) is None:
            raise Refusal(404, "missing", "/")
        return await _front(site, request, code)

    @router.post("/begin", status_code=303, openapi_extra=form_of("form", "code", "consent"))
    async def begin(request: Request) -> Response:
        form = await _form(request)
        site.require_form(form.get("form"), "")
        if not site.joins.take(request.scope["unstilted_address"]):
            raise Refusal(429, "slow", "/")
        code = str(form.get("code", ""))
        if form.get("consent") != "yes":
            return _consent(site, request, code, status=422)
        invitation = read_invitation(site.secrets.signer, code)
        if (code and invitation is None) or (invitation is None and site.frozen.study.access == "panel"):
            raise Refusal(403, "unknown", "/")
        token = secrets.token_urlsafe(32)
        session = site.session_of(token)
        stratum, number = invitation or ("open", None)
        person = Joining(session, site.browser(request), site.language(request.scope).code, stratum, number)

        def join(transaction: Transaction) -> bool:
            is_open = not site.station.is_closed(transaction.connection)
            if is_open:
                site.station.join(transaction, person)
            return is_open

        if not await site.write(join):
            raise Refusal(410, "closed", "/")
        response = to("/about-you" if site.frozen.study.background else "/vote")
        site.set_session(response, token)
        return response

    @router.get("/about-you")
    async def about_you(request: Request) -> Response:
        await site.visit(request)
        spoken = languages().get(site.frozen.study.language)
        return site.page(
            request,
            "background.html",
            form=site.form_token(site.session(request)),
            background=BACKGROUND,
            reading_language=spoken.name if spoken else site.frozen.study.language,
        )

    @router.post("/about-you", status_code=303, openapi_extra=form_of("form", *BACKGROUND))
    async def describe(request: Request) -> Response:
        await site.visit(request)
        form, session = await _form(request), site.session(request)
        site.require_form(form.get("form"), session)
        known = {name: str(form[name]) for name, values in BACKGROUND.items() if form.get(name) in values}
        await site.write(lambda transaction: site.station.describe(transaction, session, known))
        return to("/vote")

    @router.get("/vote")
    async def vote(request: Request) -> Response:
        visit, session = await site.visit(request), site.session(request)
        if visit.state == "active" and not visit.is_closed and visit.ballot is None:
            await site.write(lambda transaction: site.station.continue_visit(transaction, session))
            visit = await site.visit(request)
        if visit.ballot is None or visit.state != "active" or visit.is_closed:
            return to("/thanks")
        return _pair(site, request, visit)

    @router.post(
        "/vote",
        status_code=303,
        openapi_extra=form_of("form", "ballot", *winners),
    )
    async def cast(request: Request) -> Response:
        session, form = site.session(request), await _form(request)
        site.require_form(form.get("form"), session)
        ballot = read_ballot(site.secrets.signer, str(form.get("ballot", "")), session)
        if ballot is None:
            raise Refusal(403, "unknown")
        if ballot.expires < site.clock():
            raise Refusal(410, "lapsed")
        winners = _winners(site, form)
        if winners is None:
            visit = await site.visit(request)
            if visit.ballot is None or visit.ballot.id != ballot.id:
                raise Refusal(422, "invalid")
            return _pair(site, request, visit, is_incomplete=True)
        site.require_calm(session)
        slip = Slip(session, site.browser(request), ballot.id, winners, ballot.expires - BALLOT_LIFE_S)
        done = await site.write(lambda transaction: site.station.cast(transaction, slip))
        if done.outcome != "saved":
            raise Refusal(OUTCOME_STATUS[done.outcome], {"taken_back": "elsewhere"}.get(done.outcome, done.outcome))
        return to("/feedback" if done.role == "training" else "/vote")

    @router.get("/feedback")
    async def feedback(request: Request) -> Response:
        visit = await site.visit(request)
        return await _feedback(site, request, visit)

    @router.post("/undo", status_code=303, openapi_extra=form_of("form"))
    async def undo(request: Request) -> Response:
        await site.visit(request)
        session = site.session(request)
        site.require_form((await _form(request)).get("form"), session)
        await site.write(lambda transaction: site.station.undo(transaction, session))
        return to("/vote")

    @router.get("/stop")
    async def stop(request: Request) -> Response:
        visit = await site.visit(request)
        if visit.state in ("stopped", "withdrawn") or visit.is_closed:
            return to("/thanks")
        return site.page(request, "stop.html", form=site.form_token(site.session(request)))

    @router.post("/stop", status_code=303, openapi_extra=form_of("form", "votes"))
    async def leave(request: Request) -> Response:
        await site.visit(request)
        form, session = await _form(request), site.session(request)
        site.require_form(form.get("form"), session)
        if form.get("votes") not in ("keep", "withdraw"):
            raise Refusal(422, "invalid", "/stop")
        keep = form["votes"] == "keep"
        await site.write(lambda transaction: site.station.leave(transaction, session, keep_votes=keep))
        return to("/thanks")

    @router.get("/thanks")
    async def thanks(request: Request) -> Response:
        visit, session = await site.visit(request), site.session(request)
        if visit.state == "active" and not visit.is_closed:
            return to("/vote")
        n_given = sum(step.role in COUNTED for step in site.station.plan(visit.rater)[: visit.position])
        key = {"failed": "failed", "stopped": "stopped", "withdrawn": "withdrawn", "done": "thanks" if n_given else "enough"}.get(
            visit.state, "closed"
        )
        return site.page(request, "thanks.html", key=key, can_undo=visit.can_undo, form=site.form_token(session))

    return router


async def _front(site: Site, request: Request, code: str) -> Response:
    """The consent page, or on to where a known rater was."""
    session = site.session(request)
    if session and not code and await site.read(lambda connection: site.station.visit(connection, session)) is not None:
        return to("/vote")
    if await site.read(site.station.is_closed):
        return site.page(request, "notice.html", key="closed", link="", label="")
    if not code and site.frozen.study.access == "panel":
        return site.page(request, "panel_only.html")
    return _consent(site, request, code)


def _consent(site: Site, request: Request, code: str, status: int = 200) -> HTMLResponse:
    study = site.frozen.study
    n_pairs = study.votes_per_rater + study.checks.n_attention + study.checks.n_repeats
    n_all = n_pairs + study.qualification.n_training + study.qualification.n_items + study.checks.n_blinding
    return site.page(
        request,
        "consent.html",
        status=status,
        code=code,
        form=site.form_token(""),
        n_pairs=n_pairs,
        minutes=math.ceil(n_all * SECONDS_A_PAIR / 60),
        own_consent=to_html(study.consent) if study.consent else "",
        study_language=study.language,
        contact=study.contact,
        is_incomplete=status != 200,
    )


def _pair(site: Site, request: Request, visit: Visit, *, is_incomplete: bool = False) -> HTMLResponse:
    """The page with two replies."""
    ballot, session = cast(Any, visit.ballot), site.session(request)
    steps = site.station.plan(visit.rater)
    prompt, left, right = _texts(site, ballot)
    phase, n, total = _progress(steps, visit.position)
    return site.page(
        request,
        "pair.html",
        status=422 if is_incomplete else 200,
        phase=phase,
        n=n,
        total=total,
        prompt=to_html(prompt),
        left=to_html(left),
        right=to_html(right),
        study_language=site.frozen.study.language,
        questions=_questions(site, steps[visit.position], site.language(request.scope)),
        ballot=ballot_token(site.secrets.signer, ballot.id, session, int(site.clock()) + BALLOT_LIFE_S),
        form=site.form_token(session),
        can_undo=visit.can_undo,
        is_incomplete=is_incomplete,
    )


async def _feedback(site: Site, request: Request, visit: Visit) -> Response:
    """What was right about the last training pair."""
    steps = site.station.plan(visit.rater)
    if visit.position == 0 or steps[visit.position - 1].role != "training":
        return to("/vote")
    last = await site.read(lambda connection: site.station.last_ballot(connection, visit.rater, visit.position - 1))
    if last is None:
        return to("/vote")
    gold = site.frozen.gold[last.item]
    wanted = gold.accept[0] if last.left_arm == "left" else {"left": "right", "right": "left"}.get(gold.accept[0], gold.accept[0])
    prompt, left, right = _texts(site, last)
    return site.page(
        request,
        "feedback.html",
        is_right=is_right(gold, last.left_arm, last.winner),
        given=last.winner,
        wanted=wanted,
        reason=to_html(gold.reason),
        prompt=to_html(prompt),
        left=to_html(left),
        right=to_html(right),
        study_language=site.frozen.study.language,
        phase="training",
        n=visit.position,
        total=site.frozen.study.qualification.n_training,
    )


def _texts(site: Site, ballot: Any) -> tuple[str, str, str]:
    """Prompt, left and right reply of a ballot."""
    if ballot.role in ("training", "qualification", "attention"):
        gold = site.frozen.gold[ballot.item]
        sides = {"left": gold.left, "right": gold.right}
        return gold.prompt, sides[ballot.left_arm], sides[ballot.right_arm]
    item = site.frozen.items[ballot.item]
    return item.prompt, item.replies[ballot.left_arm], item.replies[ballot.right_arm]


def _progress(steps: tuple[Step, ...], position: int) -> tuple[str, int, int]:
    """(phase, number in it from 1, pages in it); attention checks and repeats are part of the real thing."""

    def phase(step: Step) -> str:
        return "counted" if step.role in COUNTED else step.role

    here = phase(steps[position])
    places = [index for index, step in enumerate(steps) if phase(step) == here]
    return here, places.index(position) + 1, len(places)


def _questions(site: Site, step: Step, language: Language) -> list[Question]:
    study = site.frozen.study
    if step.role == "blinding":
        return [Question(BLINDING, language("question_blinding"), language.code, ("left", "tie", "right"), language("choice_unsure"))]
    return [
        Question(
            name=criterion.name,
            text=criterion.question or language(f"question_{criterion.name}"),
            language=study.language if criterion.question else language.code,
            choices=allowed_winners(site),
            tie_label=language("choice_tie"),
        )
        for criterion in study.criteria
    ]


def allowed_winners(site: Site) -> tuple[Winner, ...]:
    """The answers that the study allows, in the order in which they stand."""
    study = site.frozen.study
    middle: list[Winner] = [*(["tie"] if study.ties else []), *(["both_bad"] if study.both_bad else [])]  # type: ignore[list-item]
    return ("left", *middle, "right")


def _winners(site: Site, form: FormData) -> dict[str, Winner] | None:
    """The answers of a form by criterion, or None when one is missing or unknown."""
    is_blinding = f"winner-{BLINDING}" in form
    names = site.station.criteria_of("blinding" if is_blinding else "main")
    allowed = ("left", "tie", "right") if is_blinding else allowed_winners(site)
    found = {name: form.get(f"winner-{name}") for name in names}
    return cast(dict[str, Winner], found) if all(value in allowed for value in found.values()) else None


async def _form(request: Request) -> FormData:
    """The fields of a form without files; raises Refusal for a form that isn't one."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/x-www-form-urlencoded":
        raise Refusal(415, "invalid")
    return await request.form(max_fields=32, max_files=0)
