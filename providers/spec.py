"""The vocabulary in which a provider is described: frozen data, and a few slots for functions where data ends.

``parse_token`` is pure. ``identify`` and ``revoke`` may need an answer from the provider, so they are generators: they yield
an ``Outgoing`` request, are sent the ``Incoming`` answer, and return a value; whoever drives them does the I/O.
Nothing here knows the broker, a web framework, a database or a vault. A new slot needs a decision record.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias, TypeVar

T = TypeVar("T")
RESERVED_AUTHORIZE_PARAMS = frozenset(  # what the flow itself sets in an authorization request, or never wants there
    {"client_id", "redirect_uri", "response_type", "response_mode", "scope", "state", "nonce", "code_challenge"}
    | {"code_challenge_method", "request", "request_uri"}
)


class Secret:
    """A string that cannot print, compare in variable time, or pickle itself; ``.reveal()`` opens it."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        """Keep ``value``."""
        self._value = value

    def reveal(self) -> str:
        """Return the secret itself: the one greppable word."""
        return self._value

    def __repr__(self) -> str:
        return "Secret(…)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and hmac.compare_digest(self._value.encode(), other._value.encode())

    def __hash__(self) -> int:
        return hash((Secret, self._value))

    def __reduce__(self) -> str:
        message = "a Secret is not serialised"
        raise TypeError(message)


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A request that a provider's function wants made. ``url`` is absolute; its origin must be one of the pinned ones."""

    method: str
    url: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    body: bytes = field(default=b"", repr=False)


@dataclass(frozen=True, slots=True)
class Incoming:
    """The answer to an ``Outgoing``: header names in lower case, a body within the size limit."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    body: bytes = field(default=b"", repr=False)

    def json(self) -> Any:  # noqa: ANN401 - JSON is any shape until it is checked
        """Return the decoded body; ``ProviderAnswerError`` when it is not JSON."""
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError):
            raise ProviderAnswerError("the answer is not JSON") from None


class ProviderAnswerError(Exception):
    """The provider answered something that its documentation does not allow; the text is ours and safe to show."""


Dialogue: TypeAlias = Generator[Outgoing, Incoming, T]


@dataclass(frozen=True, slots=True)
class Account:
    """Who consented, by the provider's own stable id (never an e-mail address).

    ``variables``: what the provider said besides that its URLs need, such as the id of a site; each must fit its
    ``Variable``'s pattern, else it is left out.
    """

    id: str
    name: str | None = None
    email: str | None = None
    variables: Mapping[str, str] = field(default_factory=dict)


ClientAuth = Literal["client_secret_basic", "client_secret_post", "private_key_jwt", "none"]


@dataclass(frozen=True, slots=True)
class Credential:
    """What a provider's function may use: the client and the tokens it acts for, and the effective URLs.

    ``urls`` by name: authorize_url, token_url, refresh_url, revoke_url, userinfo_url, jwks_url, device_url; ``""`` or
    absent: there is none. ``hosts`` are the API bases by name; one whose variables are not known is left out.
    ``client_auth`` says how the client proves itself at token and revocation endpoint. ``at``: now, seconds since 1970.
    """

    client_id: str
    client_secret: Secret | None
    access_token: Secret | None
    refresh_token: Secret | None
    urls: Mapping[str, str]
    hosts: Mapping[str, str]
    client_auth: ClientAuth = "client_secret_post"
    variables: Mapping[str, str] = field(default_factory=dict)
    at: float = 0.0


Kills = Literal["token", "grant", "project", "nothing"]
Outcome = Literal["transient", "permanent", "client_refused"]


@dataclass(frozen=True, slots=True)
class Refresh:
    """How this provider's refresh tokens behave.

    ``rotates``: whether a used refresh token stops to work. ``grace_seconds``: how long a used one still answers.
    ``keep_old``: an answer without a refresh token means "keep the one you have". ``idle_seconds``: an unused refresh
    token dies after that. ``lifetime_seconds`` with ``sliding``: its age limit, moved by each refresh or not.
    ``expected``: this kind of app gets a refresh token when consent was really shown. ``ends_access``: a refresh ends the
    access token that it replaces at once. ``redirect_uri``: a refresh repeats it. ``params`` go into each refresh besides.
    """

    rotates: bool = True
    grace_seconds: int = 0
    keep_old: bool = True
    expected: bool = False
    idle_seconds: int | None = None
    lifetime_seconds: int | None = None
    sliding: bool = True
    ends_access: bool = False
    redirect_uri: bool = False
    params: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Revocation:
    """How a credential is revoked and what dies with it.

    ``dialogue`` returns True when the provider confirmed. ``kills`` says what dies when there is no refresh token, and
    ``kills_with_refresh`` when there is one: this token, the whole grant of that user and client, or all that the user
    granted to the client's project.
    """

    dialogue: Callable[[Credential], Dialogue[bool]]
    kills: Kills = "token"
    kills_with_refresh: Kills = "token"


@dataclass(frozen=True, slots=True)
class OAuth2:
    """The authorization-code dialogue of a provider (RFC 6749, 7636, 9207; OpenID Connect when ``openid``).

    ``discovery``: ``config.issuer`` starts discovery. ``issuer``: what ``iss`` and the ID token must say;
    ``issuer_aliases``: other spellings that an ID token may carry. ``callback_iss``: whether the callback carries ``iss``
    (``required`` refuses one without it). ``consent_params`` make the provider show consent again. ``error_outcomes`` maps
    error codes of the token endpoint, whatever the HTTP status; ``invalid_grant`` and ``invalid_client`` need no entry.
    ``implied_scopes``: scopes that another one contains; ``scope_aliases``: other names under which a scope comes back.
    ``scope_separators_in``: every character that separates scopes in an answer. ``unscoped_prefixes``: access tokens that
    begin so have permissions of another kind; a ``scope`` beside them says nothing. ``parse_token`` reshapes each decoded
    JSON object of the token endpoint, also an error, before it is checked.
    ``refresh_url``: where refreshes go, when not to ``token_url``. ``pkce``: False only where a confidential client cannot
    use it. ``scope_param``: the parameter's name in the authorization request, ``""`` where scopes are not asked for.
    ``client_id_param``: the name under which the client's id is sent, to the authorization and to the token endpoint.
    ``token_format``: how bodies for the token endpoint are written. ``exchange_params`` go into each code exchange besides.
    ``device_auth``: how the client proves itself in a device flow, when otherwise than with ``client_auth``;
    ``device_scope_param``: the name under which that asks for scopes.
    ``token_variables``: variable → member of the (reshaped) token answer that it is learned from; ``callback_variables``:
    variable → parameter of the callback. ``verify_callback`` is pure: says whether the callback's parameters, as received,
    were signed with the client secret; it is asked before anything is sent.
    """

    authorize_url: str = ""
    token_url: str = ""
    refresh_url: str = ""
    revoke_url: str = ""
    device_url: str = ""
    userinfo_url: str = ""
    jwks_url: str = ""
    issuer: str = ""
    issuer_aliases: tuple[str, ...] = ()
    discovery: bool = False
    openid: bool = False
    callback_iss: Literal["absent", "optional", "required"] = "optional"
    client_auth: ClientAuth = "client_secret_post"
    default_scopes: tuple[str, ...] = ()
    scope_separator: str = " "
    scope_separators_in: str = " "
    implied_scopes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    scope_aliases: Mapping[str, str] = field(default_factory=dict)
    unscoped_prefixes: tuple[str, ...] = ()
    authorize_params: Mapping[str, str] = field(default_factory=dict)
    consent_params: Mapping[str, str] = field(default_factory=lambda: {"prompt": "consent"})
    token_headers: Mapping[str, str] = field(default_factory=dict)
    token_format: Literal["form", "json"] = "form"  # noqa: S105 - a format
    exchange_params: Mapping[str, str] = field(default_factory=dict)
    pkce: bool = True
    scope_param: str = "scope"
    client_id_param: str = "client_id"
    device_auth: ClientAuth | None = None
    device_scope_param: str = "scope"
    token_variables: Mapping[str, str] = field(default_factory=dict)
    callback_variables: Mapping[str, str] = field(default_factory=dict)
    verify_callback: Callable[[Sequence[tuple[str, str]], Secret], bool] | None = None
    error_outcomes: Mapping[str, Outcome] = field(default_factory=dict)
    refresh: Refresh = Refresh()
    parse_token: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
    revocation: Revocation | None = None


@dataclass(frozen=True, slots=True)
class Minter:
    """What a token is minted with: the imported fields, the client, and the time.

    ``material``: by the names that ``Minting.read`` returned. ``unique`` is random, for a ``jti``.
    """

    material: Mapping[str, Secret]
    credential: Credential
    scopes: tuple[str, ...]
    now: float
    unique: str


@dataclass(frozen=True, slots=True)
class Minting:
    """Tokens that are minted again and again with a lasting secret, without a user's consent and without refresh tokens.

    ``fields``: what an import brings beside ``type``, name → whether it is needed. ``read`` is pure: checks the values
    (text, or JSON objects) and returns what is kept of them as text; ``ValueError`` (its text is shown, so it quotes
    nothing) when they cannot be right. ``request`` is pure: builds and signs the request for a token; its origin must be
    the token endpoint's or an API host's. ``parse_token`` as in ``OAuth2``; the answer is judged by the provider's
    ``error_outcomes``. ``account``: whose token it is, from what ``read`` returned. ``uses_client``: the integration's
    client id and secret take part.
    """

    title: str
    request: Callable[[Minter], Outgoing]
    fields: Mapping[str, bool] = field(default_factory=dict)
    read: Callable[[Mapping[str, Any]], Mapping[str, str]] | None = None
    parse_token: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
    account: Callable[[Mapping[str, str]], Account] | None = None
    uses_client: bool = False


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key that a user or an operator pastes in."""

    title: str = "API key"
    help: str = ""


@dataclass(frozen=True, slots=True)
class Basic:
    """A user name and password pair (RFC 7617)."""

    title: str = "User name and password"
    help: str = ""


@dataclass(frozen=True, slots=True)
class Aws:
    """An AWS access key pair, of a user or (with a session token) temporary. It needs a signer: see ``providers.sigv4``.

    The key's region becomes the connection's variable ``region``, where there is such a variable.
    """

    title: str = "AWS access key"
    help: str = ""


@dataclass(frozen=True, slots=True)
class Variable:
    """A part of a host or path that differs between connections, such as ``{shop}``; ``pattern`` must match fully.

    It is given by a session, an import or the integration's ``config.variables``, else it is ``default``. ``learned``: it
    is found out during the flow, so nobody has to give it, and a URL that has it is unknown before.
    """

    name: str
    pattern: str
    example: str
    default: str = ""
    learned: bool = False


# --- Putting the credential into a proxied call.


@dataclass(frozen=True, slots=True)
class Call:
    """A proxied request as it goes out, but for the credential.

    ``path`` begins with ``/`` and is raw, as is ``query`` (without ``?``). ``authority``: what ``Host`` says. ``headers``:
    in order, names in lower case, without ``host``, framing and whatever the signer owns. ``body``: all of it for a signer
    that asks for the whole; else None, for it may be streamed.
    """

    method: str
    scheme: str
    authority: str
    path: bytes
    query: bytes
    headers: tuple[tuple[bytes, bytes], ...] = field(repr=False)
    body: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Material:
    """What a signer may use: the opened credential's fields by the names of its type, and what else is known.

    ``fields``: ``access_token`` (also of everything minted); ``api_key``; ``username`` and ``password``; those of ``aws``.
    ``variables``: the connection's, which hold no secret. ``now``: seconds since 1970. ``unique``: random, for a nonce.
    """

    fields: Mapping[str, Secret]
    variables: Mapping[str, str]
    client_id: str
    now: float
    unique: str


class BodyRewriter(Protocol):
    """Changes a body on its way out, piece by piece, without changing its length; one for each attempt."""

    def feed(self, chunk: bytes) -> bytes:
        """Return what may go out by now; ``ValueError`` (its text is shown) for a body that is not of its form."""
        ...

    def finish(self) -> bytes:
        """Return the rest; ``ValueError`` where the body ended too early."""
        ...


@dataclass(frozen=True, slots=True)
class Signed:
    """What a signer adds: fields (names in lower case, each one once), or another query, or another body."""

    headers: tuple[tuple[bytes, bytes], ...] = field(default=(), repr=False)
    query: bytes | None = field(default=None, repr=False)
    body: bytes | None = field(default=None, repr=False)
    rewriter: BodyRewriter | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Signer:
    """How a credential is put into a call. ``sign`` is pure, runs last, and again for each attempt.

    ``headers`` are the fields that it owns, in lower case: a caller's own are dropped, and a caller key may stand there.
    ``params``: query parameters likewise, without the key. ``whole_body``: it needs all of the body, which is bounded then.
    ``secrets`` says besides the material's own fields which texts it puts on the wire that an answer must not echo.
    ``variables`` are those of the connection that it reads.
    ``sign`` raises ``ValueError`` (its text is shown, so it quotes nothing) for a call that cannot be signed.
    """

    sign: Callable[[Call, Material], Signed]
    headers: tuple[str, ...] = ("authorization",)
    params: tuple[str, ...] = ()
    whole_body: bool = False
    secrets: Callable[[Material], Sequence[str]] | None = None
    variables: tuple[str, ...] = ()


ResetFormat = Literal["seconds", "epoch", "epoch_ms", "duration", "http_date", "rfc3339"]


@dataclass(frozen=True, slots=True)
class RateHeaders:
    """The fields of an answer that tell how much a client may still call. Names in lower case, the first one found counts.

    ``statuses``: those that mean "too many" beside 429, each with the fields (name, value) of which one must be there, or
    none at all where the status alone says it; the value ``""`` is any. ``reset`` counts only when the answer means "too
    many", or nothing remains. A ``remaining`` field may also say used/limit, such as ``32/40``. ``shared``: the provider
    counts for the whole app, not for each token: then everybody's calls rest, else only this connection's.
    """

    remaining: tuple[str, ...] = ()
    reset: tuple[str, ...] = ()
    reset_format: ResetFormat = "seconds"
    statuses: Mapping[int, tuple[tuple[str, str], ...]] = field(default_factory=dict)
    shared: bool = False


# --- Webhooks: what a provider posts, and how it proves that it did.


Covered = Literal["method", "url", "timestamp", "delivery_id", "body", "form", "body_members", "body_checksum"]
Step = Literal[  # where a check stopped; stable words, which documents and logs name
    "method_refused",
    "url_malformed",
    "body_malformed",
    "body_not_signed",
    "body_mismatch",
    "challenge_malformed",
    "header_missing",
    "header_repeated",
    "member_missing",
    "prefix_wrong",
    "encoding_wrong",
    "too_many_signatures",
    "timestamp_missing",
    "timestamp_malformed",
    "timestamp_stale",
    "timestamp_ahead",
    "secret_missing",
    "secret_malformed",
    "setting_missing",
    "signature_mismatch",
    "token_mismatch",
    "token_malformed",
    "algorithm_refused",
    "issuer_mismatch",
    "audience_mismatch",
    "account_mismatch",
    "key_address_refused",
    "key_unavailable",
    "key_unknown",
    "key_refused",
]


class WebhookRefused(Exception):
    """A request that proves nothing. ``step`` says where the check stopped; nothing of the request is quoted."""

    def __init__(self, step: Step) -> None:
        """Stop at ``step``."""
        super().__init__(step)
        self.step: Step = step


@dataclass(frozen=True, slots=True)
class Received:
    """A request that came to a webhook source, byte for byte.

    ``url``: as the source is known outside, with the raw query; made of settings, never of ``Host``. ``headers``: in order
    and each as often as it came, names in lower case.
    """

    method: str
    url: str
    headers: tuple[tuple[bytes, bytes], ...] = field(default=(), repr=False)
    body: bytes = field(default=b"", repr=False)


@dataclass(frozen=True, slots=True)
class SourceKeys:
    """What a check may rely on beside the request.

    ``secrets``: every live one, newest first; with a public-key scheme the public keys. ``settings``: those that the
    ``Webhook`` names. ``now``: seconds since 1970. ``tolerance_seconds``: the source's own; None: the scheme's.
    """

    secrets: tuple[Secret, ...]
    now: float
    settings: Mapping[str, Secret] = field(default_factory=dict)
    tolerance_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Header:
    """A field of the request, by its name in lower case."""

    name: str


@dataclass(frozen=True, slots=True)
class Member:
    """A text or whole number in the JSON body, by JSON Pointer (RFC 6901); a part ``*`` is each element of a list."""

    pointer: str


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry of the field that carries the signature too, such as ``t=`` in ``t=1700000000,v1=…``."""

    prefix: str


Place: TypeAlias = Header | Member


@dataclass(frozen=True, slots=True)
class Proof:
    """What a scheme found. ``signed_digest``: SHA-256 of the bytes that are signed; None: nothing of the request is.

    ``signed_at``: the signed time, seconds since 1970. ``secret_index``: which of the secrets; None: it needs none.
    """

    secret_index: int | None
    covers: frozenset[Covered]
    signed_digest: bytes | None = field(default=None, repr=False)
    signed_at: float | None = None


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a provider proves that a request is its own; ``providers.verifying`` makes them.

    ``verify`` raises ``WebhookRefused``; it yields a request only for a key that the provider publishes, to one of the
    origins in ``asks``, and is otherwise pure. A driver may answer from a cache, unless the request says ``no-cache``.
    ``covers``: what is signed at most (a ``Proof`` says what was). ``signs``: places that are signed though the body as a
    whole is not, or that are fields. ``tolerance_seconds``: how far a signed time may be off; None: no time is judged,
    unless the source says how. ``carries``: fields that hold a credential or a signature, which no log may show.
    ``check_secret``: ``ValueError`` (its text is shown) for what can be no secret of this scheme.
    ``pair``: from 32 random bytes, a secret as a source keeps it, and what signs; ``symmetric``: they are the same.
    ``sign``: pure; adds the proof to a request, for samples. None: only the provider can.
    """

    title: str
    verify: Callable[[Received, SourceKeys], Dialogue[Proof]]
    covers: frozenset[Covered]
    carries: tuple[str, ...] = ()
    signs: tuple[Place, ...] = ()
    tolerance_seconds: float | None = None
    asks: tuple[str, ...] = ()
    needs_secret: bool = True
    symmetric: bool = True
    check_secret: Callable[[str], object] | None = None
    pair: Callable[[bytes], tuple[Secret, Secret]] | None = None
    sign: Callable[[Received, Secret, float], Received] | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """What a provider wants to be answered. ``learned``: the secret that a handshake brought, to be kept by the source."""

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = field(default=b"", repr=False)
    learned: Secret | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Handshake:
    """A request that asks whether somebody is there; it is answered and is no event.

    ``answer`` is pure: None for a request that is something else; ``WebhookRefused`` for one that must not be answered.
    ``signed``: it is asked only after the scheme has verified, and sees the secret that matched alone. ``learns``: it brings
    the secret, to a source that has none.
    """

    answer: Callable[[Received, SourceKeys], Reply | None]
    method: Literal["GET", "POST"] = "POST"
    signed: bool = True
    learns: bool = False


@dataclass(frozen=True, slots=True)
class Setting:
    """Something that a source must say beside its secrets. ``pattern`` must match fully; ``secret``: it is never shown."""

    name: str
    help: str
    pattern: str = r"[\x21-\x7e]{1,256}"
    needed: bool = True
    secret: bool = False


HookProblem = Literal[  # why a provider has no hook; stable words, which sources show and documents name
    "permission_missing",
    "credential_refused",
    "not_found",
    "settings_refused",
    "address_refused",
    "rate_limited",
    "provider_unavailable",
]


class HookRefused(Exception):
    """The provider did not do what was asked of it about a hook; nothing of its answer is quoted."""

    def __init__(self, problem: HookProblem) -> None:
        """Say why."""
        super().__init__(problem)
        self.problem: HookProblem = problem


@dataclass(frozen=True, slots=True)
class HookWanted:
    """A hook as it is to stand at the provider.

    ``url``: the source's address. ``base_url``: the API's default host, without a slash at its end. ``settings``: of those
    that the ``Registration`` names, each fits its pattern. ``unique``: up to 40 letters, digits and ``_``, the same whenever
    this hook is tried again. ``secret``: the source's newest; None where the provider brings one, and where a hook is looked
    at or removed. ``keep``: ids of hooks that are not to be removed, whatever their address. ``at``: now, seconds since 1970.
    """

    url: str
    base_url: str
    settings: Mapping[str, str]
    unique: str
    at: float
    secret: Secret | None = field(default=None, repr=False)
    keep: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Registered:
    """A hook that a provider has. ``expires_at``: the end of its lease; ``secret``: what it will sign with, if it chose that.

    ``detail``: what else removing it takes; no secret.
    """

    remote_id: str
    expires_at: float | None = None
    detail: Mapping[str, str] = field(default_factory=dict)
    secret: Secret | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Registration:
    """How hooks of a kind are made at the provider, with a connection's credential.

    The dialogues yield requests to ``base_url`` without a credential: whoever drives them adds it, as to a proxied call. Each
    may raise ``HookRefused``, and ``ProviderAnswerError`` for an answer that is none; five requests are the most. All may be
    repeated after an answer was lost. ``create``: where the provider can tell, a hook with this address that is there
    already is taken or replaced, so that there is one in the end. ``check``: whether the hook is there, works and is as
    wanted; None: the provider does not tell. ``remove``: a hook that is not there is fine; without a ``Registered`` the one
    with this address, where that can be found. ``brings_secret``: ``create`` returns one. ``renew_before_seconds``: how long
    before its lease ends the next hook is made; both are there until the old one is removed. ``check_settings``:
    ``ValueError`` (its text is shown) for settings that do not go together.
    """

    create: Callable[[HookWanted], Dialogue[Registered]]
    remove: Callable[[HookWanted, Registered | None], Dialogue[None]]
    check: Callable[[HookWanted, Registered], Dialogue[bool]] | None
    settings: tuple[Setting, ...]
    docs_url: str
    help: str
    brings_secret: bool = False
    renew_before_seconds: float = 0.0
    check_settings: Callable[[Mapping[str, str]], object] | None = None


@dataclass(frozen=True, slots=True)
class AccountIn:
    """Where a request names the account that it is about.

    ``form``: the account's id as ``identify`` or an import gives it, with ``{}`` for what stands at each place in turn. Where
    an event knows only the first part of it, such as the workspace, the form ends with ``*``: each account that begins so.
    """

    places: tuple[Place, ...]
    form: str = "{}"


@dataclass(frozen=True, slots=True)
class Lifecycle:
    """An event by which the provider says that what an account granted is over, and what a connection of it becomes then.

    ``accounts``: every account that any of these names. ``client``: where the client's id stands that this was granted to;
    None: the event does not say. ``needs``: signed places that must have a value besides, where the type does not say enough.
    ``at``: when it was, seconds or milliseconds since 1970 or RFC 3339; what was granted later is untouched. An event whose
    type is not signed never says ``revoked``.
    """

    then: Literal["revoked", "reauthorization_required"]
    accounts: tuple[AccountIn, ...]
    client: Place | None = None
    needs: tuple[Place, ...] = ()
    at: Place | None = None


@dataclass(frozen=True, slots=True)
class Webhook:
    """One way in which a provider posts events.

    An event's type is ``<provider>.<event>[.<action>]``: ``event`` is the first of these places that has a value, else
    ``otherwise``. ``delivery_id``: what stays the same when a delivery is repeated; it guards against replays only where
    it is signed. ``acknowledgement``: what the provider wants to hear; None: any 2xx. ``body_unlike``: a body that matches
    fully is refused, since the provider's handshake would sign it for anybody. ``repeats``: the provider signs the same
    bytes for events that differ, so these bytes tell no replay. ``account``: where an event names its account, the first that
    has a value. ``lifecycle``: by event type, without the provider's name, the events that end a grant. ``configure``:
    makes the webhook that a source's settings describe; pure, ``ValueError`` (its text is shown) for settings that cannot
    be. ``registration``: how the broker makes the hook at the provider; None: somebody does by hand.
    """

    scheme: Scheme
    docs_url: str
    event: tuple[Place, ...] = ()
    action: Place | None = None
    otherwise: str = "unknown"
    delivery_id: Place | None = None
    acknowledgement: Reply | None = None
    handshakes: tuple[Handshake, ...] = ()
    settings: tuple[Setting, ...] = ()
    help: str = ""
    body_unlike: str | None = None
    repeats: bool = False
    account: tuple[AccountIn, ...] = ()
    lifecycle: Mapping[str, Lifecycle] = field(default_factory=dict)
    configure: Callable[[Mapping[str, str]], Webhook] | None = None
    registration: Registration | None = None

    @property
    def methods(self) -> frozenset[str]:
        """The methods of requests that are looked at; any other is refused unread."""
        return frozenset({"POST", *(handshake.method for handshake in self.handshakes)})


@dataclass(frozen=True, slots=True)
class Verified:
    """A request that the provider sent, and what of it is proven.

    ``covers``: what is signed; all else may be anybody's. ``signed_digest``: see ``Proof``; where ``signed_at`` was not
    judged (``fresh`` is False) it is what tells a replay. None: nothing does, beside a ``delivery_id`` that may be forged.
    ``delivery_id`` and ``event_type`` are the provider's words. ``body``: as it was read for that (a
    ``webhook_places.Body``), for who reads on; None: not read.
    """

    event_type: str
    event_type_signed: bool
    delivery_id: str | None
    delivery_id_signed: bool
    secret_index: int | None
    covers: frozenset[Covered]
    signed_digest: bytes | None = field(repr=False)
    signed_at: float | None
    fresh: bool
    body: Any = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Refused:
    """A request that proves nothing: see ``WebhookRefused``."""

    step: Step


@dataclass(frozen=True, slots=True)
class Sample:
    """What a made-up delivery says. ``event`` in the provider's words, the action after a dot; ``body`` None: a small one."""

    event: str
    url: str
    now: float
    delivery_id: str
    body: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Provider:
    """One provider: everything that the broker has to know of it, and nothing about it stands anywhere else.

    ``hosts`` are the API bases by name, ``""`` the default one, each exactly what the vendor's SDK takes as its base URL.
    ``minting``: other ways to obtain a token, by the ``type`` of an import. ``signers``: how a credential of a type is put
    into a call, by the type, or by ``type@host`` where one of the named hosts wants it otherwise; without an entry a bearer
    token, for ``basic`` RFC 7617. None: this type is not served at this host, or nowhere but at the hosts with an entry.
    ``method_params``: query parameters by which this API takes another method than the request's. ``path_headers``: fields,
    in lower case, that name a further path which the call reads. Both are for whoever judges calls. ``headers`` go with each
    proxied call: a plain one where the caller sends none of that name, one with a variable (or ``{client_id}``) in place of
    the caller's. ``identify`` asks who the account is when there is no ID token, or the ID token lacks it. With
    ``env_prefix``, ``<PREFIX>_CLIENT_ID`` and ``<PREFIX>_CLIENT_SECRET`` in the environment make an integration of that name:
    every file with ``oauth2`` has one, its name in capitals, but a generic one, which says nothing of where the secret would
    go. Variables are no reason against it: sessions give them.
    ``webhooks``: the ways in which it posts events, by name, ``""`` the default one.
    """

    name: str
    title: str
    docs_url: str
    oauth2: OAuth2 | None = None
    api_key: ApiKey | None = None
    basic: Basic | None = None
    aws: Aws | None = None
    minting: Mapping[str, Minting] = field(default_factory=dict)
    signers: Mapping[str, Signer | None] = field(default_factory=dict)
    method_params: tuple[str, ...] = ()
    path_headers: tuple[str, ...] = ()
    rate_headers: RateHeaders | None = None
    hosts: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    variables: tuple[Variable, ...] = ()
    identify: Callable[[Credential], Dialogue[Account]] | None = None
    env_prefix: str | None = None
    webhooks: Mapping[str, Webhook] = field(default_factory=dict)

    @property
    def credential_types(self) -> tuple[str, ...]:
        """What can be imported: the ``type`` values of ``POST /v1/connections``."""
        kinds = (("oauth2", self.oauth2), ("api_key", self.api_key), ("basic", self.basic), ("aws", self.aws))
        return (*(name for name, kind in kinds if kind is not None), *self.minting)
