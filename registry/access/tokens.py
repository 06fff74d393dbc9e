"""`/v2/token`: credentials for a token for requests. [distribution: Token Authentication, OAuth2 Token Authentication]

    GET  ?service=&scope=&scope=…            with Basic, or without: then for what everybody may
         &offline_token=true                 and a refresh token, for clients to keep instead of the password
    POST grant_type=password                 username, password, and the same
         grant_type=refresh_token            refresh_token, in place of a password
         grant_type=…:token-exchange         subject_token of another issuer [RFC 8693]

A token says what it is for: what was asked, as far as it is held. It is looked at against the rules again with each
request, so it gives nothing that was taken away meanwhile.
"""

from __future__ import annotations

import asyncio
import time
from typing import Final
from urllib.parse import parse_qsl

from aiohttp import hdrs, web
from multidict import MultiDict, MultiMapping

from registry.access.audit import Auditor
from registry.access.credentials import Credentials
from registry.access.rights import Identity, Scope
from registry.access.signing import Signer
from registry.calls import Call
from registry.config import AccountSettings
from registry.errors import BadRequest, RequestTimeout, Unauthorized
from registry.logs import printable
from registry.metadata import access_tokens
from registry.metadata.audit import audited
from registry.metadata.engine import Database
from registry.metadata.tables import DAY, now, rfc3339
from registry.responses import json_response
from registry.transfer import Receiver, read_limited

_BODY_LIMIT: Final = 64 << 10
_FIELDS_LIMIT: Final = 1000
#: Whoever sends one need not say who he is, so it is not waited for as long as for a body with something to keep.
_FORM_SECONDS: Final = 20.0
_EXCHANGE: Final = "urn:ietf:params:oauth:grant-type:token-exchange"
#: [RFC 8693, 3] What is given for it.
_GIVEN: Final = "urn:ietf:params:oauth:token-type:access_token"


class Tokens:
    """Gives out tokens for requests."""

    def __init__(
        self,
        database: Database,
        credentials: Credentials,
        signer: Signer,
        auditor: Auditor,
        receiver: Receiver,
        settings: AccountSettings,
    ) -> None:
        """Let `credentials` say who asks, `signer` sign, `receiver` take forms in; `database` keeps refresh tokens."""
        self._database = database
        self._credentials = credentials
        self._signer = signer
        self._auditor = auditor
        self._settings = settings
        self._receiver = receiver

    async def get(self, call: Call) -> web.StreamResponse:
        """GET: for whoever sends his credentials, or for nobody."""
        query = call.request.query
        if call.request.headers.get(hdrs.AUTHORIZATION, "").lower().startswith("bearer "):
            raise Unauthorized(
                "a token is given for a name and a password, not for another token",
                headers={hdrs.WWW_AUTHENTICATE: 'Basic realm="Hythe"'},
            )
        wants_refresh = query.get("offline_token", "").lower() in ("true", "1")
        return await self._give(call, call.identity, query, wants_refresh=wants_refresh)

    async def post(self, call: Call) -> web.StreamResponse:
        """POST: for whoever sends his credentials in a form."""
        form = await _form(call.request, self._receiver)
        kind = form.get("grant_type", "")
        if kind == "refresh_token":
            sent = form.get("refresh_token", "")
            identity = await self._credentials.log_in_by_token(call.request, sent, access_tokens.REFRESH)
            return await self._give(call, identity, form, refresh=sent)
        if kind == "password":
            identity = await self._credentials.log_in(call.request, form.get("username", ""), form.get("password", ""))
            return await self._give(call, identity, form, wants_refresh=form.get("access_type") == "offline")
        if kind == _EXCHANGE:
            identity = await self._credentials.log_in(call.request, "", form.get("subject_token", ""))
            return await self._give(call, identity, form)
        raise BadRequest("grant_type must be password, refresh_token or token exchange")

    async def _give(
        self,
        call: Call,
        identity: Identity,
        asked: MultiMapping[str],
        *,
        wants_refresh: bool = False,
        refresh: str = "",
    ) -> web.StreamResponse:
        service = asked.get("service", self._settings.service)
        if service != self._settings.service:
            raise BadRequest(f"this is the service {self._settings.service}, not {service[:100]!r}")
        scope = identity.granted(asked.getall("scope", []))
        if wants_refresh and not refresh:
            refresh = await self._new_refresh(call, identity, asked.get("client_id", ""))
        seconds = int(min(self._settings.token_seconds, identity.ends_at - time.time()))
        token = await self._sign(identity, scope, seconds)
        answer = {
            "token": token,
            "access_token": token,
            "token_type": "Bearer",
            "expires_in": seconds,
            "issued_at": rfc3339(now()),
        }
        answer |= {"refresh_token": refresh} if refresh else {}
        answer |= {"issued_token_type": _GIVEN} if asked.get("grant_type") == _EXCHANGE else {}
        return json_response(answer, headers={hdrs.CACHE_CONTROL: "no-store"})

    async def _sign(self, identity: Identity, scope: Scope, seconds: int) -> str:
        claims = {
            "access": scope.as_claim(),
            "account": identity.account,
            "token": identity.token,
            "by": identity.credential,
            "at": identity.changed_at,
        }
        return await self._signer.sign(identity.name, seconds, claims)

    async def _new_refresh(self, call: Call, identity: Identity, client: str) -> str:
        """Return a token to keep instead of a password; none for who came by a token, which is to be kept itself."""
        if not identity.account or identity.credential != "password" or not self._settings.refresh_days:
            return ""
        token = access_tokens.new_token()
        name = printable(client or "docker login")
        event = self._auditor.event(call.request, identity, "login.keep", target=name)
        await self._database.write(
            audited,
            event,
            access_tokens.add_refresh,
            identity.account,
            identity.changed_at,
            name[:100],
            access_tokens.secret_hash(token),
            now() + self._settings.refresh_days * DAY,
        )
        self._auditor.tell(event)
        return token


async def _form(request: web.Request, receiver: Receiver) -> MultiDict[str]:
    """Return the fields of a form, in its one plain encoding."""
    if request.content_type != "application/x-www-form-urlencoded":
        raise BadRequest("the form must be application/x-www-form-urlencoded")
    try:
        async with asyncio.timeout(_FORM_SECONDS):
            body = await read_limited(request, receiver, _BODY_LIMIT)
    except TimeoutError:
        raise RequestTimeout("the form did not come in time", headers={hdrs.CONNECTION: "close"}) from None
    if body is None:
        raise BadRequest("the form is too large")
    try:
        return MultiDict(parse_qsl(body.decode(), max_num_fields=_FIELDS_LIMIT))
    except ValueError:
        raise BadRequest("the form cannot be read") from None
