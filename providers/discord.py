"""Discord: tokens of a user for a week, a bot's own token, and a revocation that ends the whole authorization.

Sources: https://discord.com/developers/docs/topics/oauth2, https://discord.com/developers/docs/reference,
https://discord.com/developers/docs/resources/user (discord/discord-api-docs, developers/topics/oauth2.mdx).
"""

from urllib.parse import urlencode

from providers.handshakes import JSON, ping
from providers.minting import client_credentials
from providers.oidc import proof
from providers.signing import scheme
from providers.spec import (
    Account,
    AccountIn,
    ApiKey,
    Credential,
    Dialogue,
    Header,
    Lifecycle,
    Member,
    OAuth2,
    Outgoing,
    Provider,
    ProviderAnswerError,
    RateHeaders,
    Refresh,
    Reply,
    Revocation,
    Webhook,
)
from providers.verifying import ed25519_signature

# "DiscordBot ($url, $version)"; a request with another is liable to be blocked.
HEADERS = {"User-Agent": "DiscordBot (https://credential-broker.invalid, 1)"}


def identify(credential: Credential) -> Dialogue[Account]:
    """Ask ``GET /users/@me``, which takes the scope ``identify``. An address that Discord has not verified is left out."""
    if credential.access_token is None:
        raise ProviderAnswerError("there is no access token to ask with")
    headers = {**HEADERS, "Authorization": f"Bearer {credential.access_token.reveal()}", "Accept": "application/json"}
    answer = yield Outgoing("GET", f"{credential.hosts[''].rstrip('/')}/users/@me", headers)
    user = answer.json() if answer.status == 200 else None
    if not isinstance(user, dict) or not isinstance(user.get("id"), str) or not user["id"]:
        raise ProviderAnswerError("the API did not say who consented")
    name, email = user.get("username"), user.get("email") if user.get("verified") is True else None
    return Account(user["id"], name if isinstance(name, str) else None, email if isinstance(email, str) else None)


def revoke(credential: Credential) -> Dialogue[bool]:
    """Revoke one token, and with it every token of the authorization; True when Discord confirmed."""
    url, token = credential.urls.get("revoke_url"), credential.refresh_token or credential.access_token
    if not url or token is None:
        return False
    try:
        headers, fields = proof(credential)
    except ValueError:
        return False
    headers = {**HEADERS, "Content-Type": "application/x-www-form-urlencoded", "Accept": "application/json", **headers}
    answer = yield Outgoing("POST", url, headers, urlencode({"token": token.reveal(), **fields}).encode())
    return answer.status == 200


PROVIDER = Provider(
    name="discord",
    title="Discord",
    docs_url="https://discord.com/developers/docs/topics/oauth2",
    oauth2=OAuth2(
        authorize_url="https://discord.com/oauth2/authorize",
        token_url="https://discord.com/api/oauth2/token",  # noqa: S106 - an address
        revoke_url="https://discord.com/api/oauth2/token/revoke",
        client_auth="client_secret_basic",
        default_scopes=("identify",),
        token_headers=HEADERS,
        # That a used refresh token dies is not documented; the examples bring a new one.
        refresh=Refresh(rotates=True, keep_old=True),
        revocation=Revocation(revoke, kills="grant", kills_with_refresh="grant"),
    ),
    api_key=ApiKey("Bot token", "Developer Portal, the application, Bot; sent as Authorization: Bot …"),
    minting={"client_credentials": client_credentials()},  # a token for the app's owner
    signers={"api_key": scheme("Bot")},
    rate_headers=RateHeaders(remaining=("x-ratelimit-remaining",), reset=("x-ratelimit-reset-after",)),
    hosts={"": "https://discord.com/api/v10"},
    headers=HEADERS,
    identify=identify,
    env_prefix="DISCORD",
    webhooks={
        "": Webhook(
            ed25519_signature(
                "x-signature-ed25519", signed="{timestamp}{body}", timestamp=Header("x-signature-timestamp")
            ),
            "https://docs.discord.com/developers/events/webhook-events",
            event=(Member("/event/type"),),
            otherwise="interaction",
            acknowledgement=Reply(204, JSON),
            handshakes=(
                ping({Member("/type"): "0"}, Reply(204, JSON)),
                ping(
                    {Member("/type"): "1", Member("/event/type"): None}, Reply(200, JSON, b'{"type":1}')
                ),  # of interactions
            ),
            account=(AccountIn((Member("/event/data/user/id"),)),),
            lifecycle={
                "APPLICATION_DEAUTHORIZED": Lifecycle(
                    "revoked",
                    (AccountIn((Member("/event/data/user/id"),)),),
                    client=Member("/application_id"),
                    at=Member("/event/timestamp"),
                )
            },
            help="Developer Portal, General Information: the public key",
        )
    },
)
