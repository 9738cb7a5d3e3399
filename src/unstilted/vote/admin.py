"""The admin's page, in English: progress, balance, rater quality, invitations, closing, export. It never shows who is winning."""

import hmac
from collections import Counter
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from sqlalchemy import Connection, func, select
from starlette.datastructures import FormData
from starlette.responses import HTMLResponse, Response

from unstilted.vote import schema
from unstilted.vote.ballots import invitation_code
from unstilted.vote.checking import note_head
from unstilted.vote.export import Vote, rater_quality, study_votes, to_csv, to_pairs, to_parquet
from unstilted.vote.inviting import note_invitations
from unstilted.vote.site import Refusal, Site, form_of, to

LOGIN_LIFE_S = 8 * 3600
MAX_INVITATIONS = 500
EXPORTS = ("votes.csv", "votes.parquet", "pairs.jsonl")
SESSION = "admin"
"""What the admin's forms are signed for."""


def admin_routes(site: Site) -> APIRouter:
    """Everything under /admin."""
    router = APIRouter(prefix="/admin", default_response_class=HTMLResponse)

    @router.get("")
    async def overview(request: Request) -> Response:
        if not _is_admin(site, request):
            return site.page(request, "admin_login.html", form=site.form_token(""))
        return await _overview(site, request, [])

    @router.post("/login", status_code=303, openapi_extra=form_of("form", "token"))
    async def login(request: Request) -> Response:
        if not site.logins.take(request.scope["unstilted_address"]):
            raise Refusal(429, "slow", "/admin")
        form = await _form(request)
        site.require_form(form.get("form"), "")
        if not hmac.compare_digest(str(form.get("token", "")).encode(), site.secrets.admin_token.encode()):
            raise Refusal(403, "unknown", "/admin")
        response, expires = to("/admin"), str(int(site.clock()) + LOGIN_LIFE_S)
        response.set_cookie(
            "admin",
            f"{expires}.{site.secrets.signer.sign('admin', expires, site.secrets.admin_token)}",
            max_age=LOGIN_LIFE_S,
            path="/admin",
            httponly=True,
            samesite="strict",
            secure=site.settings.is_https,
        )
        return response

    @router.post("/logout", status_code=303, openapi_extra=form_of("form"))
    async def logout(request: Request) -> Response:
        await _own_form(site, request)
        response = to("/admin")
        response.delete_cookie("admin", path="/admin")
        return response

    @router.post("/invite", openapi_extra=form_of("form", "stratum", "number"))
    async def invite(request: Request) -> Response:
        form = await _own_form(site, request)
        stratum, number = str(form.get("stratum", "")), str(form.get("number", ""))
        if (
            stratum not in site.frozen.study.strata
            or not number.isascii()
            or not number.isdecimal()
            or not 1 <= int(number) <= MAX_INVITATIONS
        ):
            raise Refusal(422, "invalid", "/admin")
        first = await site.write(lambda transaction: note_invitations(transaction, stratum, int(number)))
        codes = [invitation_code(site.secrets.signer, stratum, first + index) for index in range(int(number))]
        return await _overview(site, request, [f"{site.settings.url}/join/{code}" for code in codes])

    @router.post("/close", status_code=303, openapi_extra=form_of("form", "sure"))
    async def close(request: Request) -> Response:
        form = await _own_form(site, request)
        if form.get("sure") != "yes":
            raise Refusal(422, "invalid", "/admin")
        if await site.write(site.station.close):
            await site.read(lambda connection: note_head(connection, site.frozen.folder))
        return to("/admin")

    @router.get("/{name}")
    async def export(request: Request, name: str) -> Response:
        if not _is_admin(site, request):
            return to("/admin")
        if name not in EXPORTS:
            raise Refusal(404, "missing", "/admin")
        votes = await site.read(lambda connection: study_votes(connection, site.frozen))
        await site.read(lambda connection: note_head(connection, site.frozen.folder))
        return _download(site, name, votes)

    return router


def _download(site: Site, name: str, votes: list[Vote]) -> Response:
    match name:
        case "votes.csv":
            content, kind = to_csv(votes).encode(), "text/csv; charset=utf-8"
        case "votes.parquet":
            content, kind = to_parquet(votes), "application/vnd.apache.parquet"
        case _:
            content, kind = "".join(f"{line}\n" for line in to_pairs(votes, site.frozen)).encode(), "application/jsonl; charset=utf-8"
    return Response(content, media_type=kind, headers={"content-disposition": f'attachment; filename="{name}"'})


async def _overview(site: Site, request: Request, links: list[str]) -> HTMLResponse:
    shown = await site.read(lambda connection: _figures(connection, site))
    return site.page(request, "admin.html", form=site.form_token(SESSION), study=site.frozen.study, links=links, exports=EXPORTS, **shown)


def _figures(connection: Connection, site: Site) -> dict[str, Any]:
    """What the page shows; nothing of it depends on who won."""
    ballots, study = schema.ballots.c, site.frozen.study
    voted = (
        select(ballots.left_arm, ballots.right_arm, func.count().label("n"))
        .where(ballots.role == "main", ballots.state == "voted")
        .group_by(ballots.left_arm, ballots.right_arm)
    )
    sides = {(row.left_arm, row.right_arm): row.n for row in connection.execute(voted)}
    quality = rater_quality(connection, site.frozen)
    return {
        "is_closed": site.station.is_closed(connection),
        "n_votes": sum(sides.values()),
        "n_wanted": len(site.frozen.items) * study.votes_per_item,
        "states": Counter(rater.state for rater in quality),
        "n_items": len(site.frozen.items),
        "balance": [(first, second, sides.get((first, second), 0), sides.get((second, first), 0)) for first, second in study.pairs],
        "raters": quality,
        "registration": site.frozen.registration,
        "head": connection.execute(
            select(schema.audit.c.seq, schema.audit.c.hash).order_by(schema.audit.c.seq.desc()).limit(1)
        ).one_or_none(),
        "token_file": Path(site.frozen.folder.name) / "admin_token",
    }


def _is_admin(site: Site, request: Request) -> bool:
    expires, _, signature = request.cookies.get("admin", "").partition(".")
    return (
        expires.isascii()
        and expires.isdecimal()
        and len(expires) < 13
        and int(expires) >= site.clock()
        and site.secrets.signer.is_signed(signature, "admin", expires, site.secrets.admin_token)
    )


async def _own_form(site: Site, request: Request) -> FormData:
    """The form of a logged-in admin; raises Refusal for anybody else's."""
    if not _is_admin(site, request):
        raise Refusal(403, "unknown", "/admin")
    form = await _form(request)
    site.require_form(form.get("form"), SESSION)
    return form


async def _form(request: Request) -> FormData:
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/x-www-form-urlencoded":
        raise Refusal(415, "invalid", "/admin")
    return await request.form(max_fields=16, max_files=0)
