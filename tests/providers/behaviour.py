"""How a provider's OAuth server and API behave, as plain data: what ``like.py`` plays, so that the whole broker can be tried.

One file of data for each provider lies in ``behaviours/``. URLs are the provider's real ones: the fake serves all of them on
one loopback port, with the host as the first part of the path. ``{access}`` and ``{refresh}`` in a JSON body stand for the
tokens that the fake makes. Everything is as documented, or as recorded; ``sources`` says where.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Answer:
    """One HTTP answer; ``body`` is sent as JSON unless it is text."""

    status: int
    body: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Call:
    """One API call that the fake answers.

    ``bearer``: the live access token must be in ``Authorization: Bearer`` (else 401). ``basic``: the client must prove itself
    so. ``needs``: members of a form or JSON body, by value; ``{access}``, ``{refresh}``, ``{client_id}``, ``{client_secret}``
    stand for the real ones, there, in ``headers`` and in the URL (tokens not in a URL). A query of the URL must be there just
    so, and none where it has none. ``kills``: a success ends the tokens of the grant.
    """

    method: str
    url: str
    answer: Answer
    bearer: bool = True
    basic: bool = False
    needs: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    kills: bool = False


@dataclass(frozen=True)
class Behaviour:
    """A provider as its documentation or its recorded answers show it.

    ``client_auth``: the only way in which the token endpoint takes the client. ``pkce``: ``checked`` (the verifier must fit
    the challenge), ``ignored``, or ``refused`` (neither may be sent). ``scope_separator`` and ``scope_param`` of the
    authorization request. ``client_id_param``: what the client's id is called, everywhere. ``authorize_needs``: parameters
    that it must have. ``exchange_needs``, ``refresh_needs``: members of those requests besides the protocol's.
    ``code_answer`` and ``refresh_answer`` are the whole answers; without a
    ``refresh_answer`` there are no refresh tokens. ``rotates``: a used refresh token is dead; ``ends_access``: and so is the
    old access token.
    ``dead``: the answer to a refresh token that is not live. ``refused_client``: to a wrong client secret. ``busy``: when the
    provider has no time. ``callback``: parameters that it adds to the callback. ``signs_callback``: it adds ``hmac``, the hex
    HMAC-SHA256 with the client secret over the sorted query. ``given``: variables of the session.
    ``calls``: the API calls that identity and revocation make. ``account_id``, ``variables``, ``scopes``, ``missing_scopes``,
    ``revocation``: what the connection must show in the end; ``asked_scopes`` is what the integration asks for.
    ``expires_in_seconds``: how long the first access token lives by ``code_answer``; None: it has no end.
    ``scopes`` None: just what was asked for. ``variables`` besides those of ``given``. Requests for tokens may have no members
    but the protocol's and those of ``exchange_needs`` and ``refresh_needs``; these may hold ``{client_id}`` and the like.
    ``token_headers``: headers that those requests must have. ``{id_token}`` in an answer is signed by the fake; ``claims``
    are added to it, or replace its own (``sub`` is ``account_id``). ``urls``: addresses as documented, by the names of
    ``OAuth2``; for those that are not here the provider's file is believed. A token may have a beginning of its own:
    ``"gho_{access}"``. ``{in_30_days}`` is that moment (RFC 3339).
    """

    provider: str
    sources: tuple[str, ...]
    client_auth: Literal["client_secret_basic", "client_secret_post", "none"]
    code_answer: Mapping[str, Any]
    account_id: str
    refresh_answer: Mapping[str, Any] | None = None
    rotates: bool = True
    ends_access: bool = False
    token_format: Literal["form", "json"] = "form"
    pkce: Literal["checked", "ignored", "refused"] = "checked"
    scope_param: str = "scope"
    client_id_param: str = "client_id"
    scope_separator: str = " "
    asked_scopes: tuple[str, ...] = ()
    scopes: tuple[str, ...] | None = None
    missing_scopes: tuple[str, ...] = ()
    authorize_needs: Mapping[str, str] = field(default_factory=dict)
    exchange_needs: Mapping[str, str] = field(default_factory=dict)
    refresh_needs: Mapping[str, str] = field(default_factory=dict)
    refresh_repeats_redirect_uri: bool = False
    dead: Answer = Answer(400, {"error": "invalid_grant", "error_description": "The refresh token is invalid."})
    refused_client: Answer = Answer(401, {"error": "invalid_client"})
    busy: Answer = Answer(429, {"error": "rate limited"}, {"Retry-After": "7"})
    callback: Mapping[str, str] = field(default_factory=dict)
    signs_callback: bool = False
    given: Mapping[str, str] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)
    calls: tuple[Call, ...] = ()
    expires_in_seconds: float | None = None
    refresh_expires_in_seconds: float | None = None
    revocation: str = "unsupported"
    name: str = ""
    token_headers: Mapping[str, str] = field(default_factory=dict)
    claims: Mapping[str, Any] = field(default_factory=dict)
    urls: Mapping[str, str] = field(default_factory=dict)
