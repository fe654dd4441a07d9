"""What the sandbox can be told, and what it tells of itself: options, faults, visits, counters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

import msgspec

DEMO_CLIENT_ID: Final = "sandbox-demo"
DEMO_CLIENT_SECRET: Final = "sandbox-demo-secret"  # noqa: S105 - opens nothing but the sandbox, and is documented
DEFAULT_LOGIN: Final = "ada"
CLIENT_AUTH: Final = ("client_secret_basic", "client_secret_post", "none")
GRANT_TYPES: Final = ("authorization_code", "refresh_token", "client_credentials")
Mode = Literal["strict", "grace", "static"]
EndpointName = Literal["authorize", "token", "revoke", "userinfo", "api", "jwks", "discovery", "control"]


class SandboxOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the sandbox behaves; all but ``issuer`` and ``control`` can be changed while it runs.

    ``mode``: what a used refresh token does. ``strict``: kills its grant and counts an alarm. ``grace``: answers again with
    the same successor for ``grace_seconds``, as long as that successor was not used itself; then as strict. ``static``:
    is not replaced, and the answer has no refresh token. ``refresh_tokens``: who gets one: every consent; as at Google the
    first consent of a user and each with ``prompt=consent``; only the latter; nobody. ``revocation_kills``: the token alone;
    a refresh token's whole grant (RFC 7009); every grant of that user and client. ``latency_seconds`` lies between the commit
    and the answer of the token endpoint. ``echo_credentials`` lets ``/api/echo`` show the Authorization header.
    """

    issuer: str = ""
    mode: Mode = "strict"
    grace_seconds: float = 30
    access_token_seconds: int = 3600
    refresh_token_seconds: int | None = None
    code_seconds: float = 60
    access_dies_on_refresh: bool = False
    refresh_tokens: Literal["always", "like_google", "prompt_consent", "never"] = "always"
    revocation_kills: Literal["token", "grant", "user"] = "grant"
    scopes: tuple[str, ...] = ("openid", "profile", "email", "offline_access", "read", "write")
    redirect_uris: tuple[str, ...] = ("http://127.0.0.1:8000/oauth/sandbox/callback",)
    latency_seconds: float = 0
    date_skew_seconds: float = 0
    auto_consent: bool = False
    control: bool = False
    echo_credentials: bool = False
    log_length: int = 200_000


class Fault(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One way to misbehave, for the next ``times`` requests that fit (None: until cleared).

    ``commit`` says when: False before the request has any effect, True after it took effect and before its answer leaves.
    ``answer`` sends ``status`` and ``body`` (text as it is, anything else as JSON) instead of the true answer. ``stall`` waits
    ``seconds`` first (a caller that hangs up meanwhile ends it). ``drop`` closes the connection without a byte
    (``reset``: by RST). ``cut`` sends the true answer's headers and half of its body. ``id_token`` changes ``claims`` (null
    removes one) or breaks the signature. ``callback`` changes ``parameters`` of the redirect (null removes one).
    ``account`` and ``grant_type`` narrow it; ``share`` lets it befall only that part of what fits, by chance. Of several faults
    the oldest that fits is used.
    """

    kind: Literal["answer", "stall", "drop", "cut", "id_token", "callback"]
    endpoint: EndpointName = "token"
    times: int | None = 1
    account: str | None = None
    grant_type: str | None = None
    share: float = 1.0
    commit: bool = False
    seconds: float = 0
    status: int = 500
    body: Any = ""
    headers: dict[str, str] = {}
    reset: bool = False
    claims: dict[str, Any] = {}
    bad_signature: bool = False
    parameters: dict[str, str | None] = {}

    @property
    def error(self) -> str | None:
        """The OAuth error code of the answer that this fault sends, if it sends one."""
        found = self.body.get("error") if self.kind == "answer" and isinstance(self.body, dict) else None
        return found if isinstance(found, str) else None


FAULTS: Mapping[str, Fault] = {
    "fail": Fault(kind="answer", status=503, body={"error": "temporarily_unavailable"}),
    "invalid_client": Fault(kind="answer", status=401, body={"error": "invalid_client"}),
    "invalid_grant": Fault(kind="answer", status=400, body={"error": "invalid_grant"}),
    "garbage": Fault(kind="answer", status=200, body="<html>not JSON</html>", headers={"content-type": "text/html"}),
    "drop_request": Fault(kind="drop"),
    "drop_answer": Fault(kind="drop", commit=True),
    "cut_answer": Fault(kind="cut", commit=True),
    "wrong_iss": Fault(kind="callback", endpoint="authorize", parameters={"iss": "https://other-issuer.test"}),
    "missing_iss": Fault(kind="callback", endpoint="authorize", parameters={"iss": None}),
    "wrong_nonce": Fault(kind="id_token", grant_type="authorization_code", claims={"nonce": "not-the-nonce"}),
    "bad_signature": Fault(kind="id_token", grant_type="authorization_code", bad_signature=True),
}


def fault(preset: str, **changes: Any) -> Fault:  # noqa: ANN401 - checked against Fault's own types
    """Return a named fault with changes, such as ``fault("fail", times=3, account="ada")``; ValueError when it is not one."""
    if preset not in FAULTS:
        raise ValueError("there is no such fault")
    return msgspec.convert({**msgspec.structs.asdict(FAULTS[preset]), **changes}, Fault)


class Visit(msgspec.Struct, kw_only=True):
    """What the sandbox remembers of one request to ``/authorize``, ``/token`` or ``/revoke``; digests, never a secret.

    ``outcome``: ``pending`` while it is worked on, ``shown`` for a consent page, ``committed`` when it took effect,
    ``refused`` when it was answered by an error, ``dropped`` when it was ended without effect. ``answered``: whether the
    answer that belongs to the outcome was written to the caller's connection, with ``status``. ``replayed``: a grace period's
    repeated answer. ``presented`` is the SHA-256 of the code, refresh token or other token that was sent in.
    """

    number: int
    at: float
    endpoint: str
    grant_type: str | None = None
    client_id: str | None = None
    account: str | None = None
    presented: str | None = None
    outcome: Literal["pending", "shown", "committed", "refused", "dropped"] = "pending"
    error: str | None = None
    status: int | None = None
    answered: bool = False
    replayed: bool = False
    fault: str | None = None
    issued_access: str | None = None
    issued_refresh: str | None = None
    prompt: str | None = None
    scopes: tuple[str, ...] = ()


class Counters(msgspec.Struct):
    """What happened since the start. ``refreshes`` counts committed ones without ``replays``."""

    authorizations: int = 0
    exchanges: int = 0
    refreshes: int = 0
    replays: int = 0
    client_credentials: int = 0
    reuse_alarms: int = 0
    code_reuses: int = 0
    concurrent_senders: int = 0
    revocations: int = 0
    api_calls: int = 0
    api_refusals: int = 0
