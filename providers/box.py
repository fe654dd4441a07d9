"""Box: refresh tokens that work once within 60 days; server apps mint by client credentials or with a signed JWT.

Sources: https://developer.box.com/guides/authentication/tokens/refresh, https://developer.box.com/guides/authentication/tokens/revoke,
https://developer.box.com/guides/authentication/client-credentials, https://developer.box.com/guides/authentication/jwt/without-sdk
and box-community/samples-docs-authenticate-with-jwt-api (RS256, RS384 and RS512 are taken), box/box-openapi,
box/box-python-sdk (box_sdk_gen: the hosts).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from urllib.parse import urlencode

from providers.client_auth import signed_jwt
from providers.minting import (
    JWT_BEARER,
    client_credentials,
    json_object,
    require_private_key,
    require_text,
    token_request,
    token_url_of,
)
from providers.oidc import proof
from providers.spec import (
    Account,
    Credential,
    Dialogue,
    Incoming,
    Minter,
    Minting,
    OAuth2,
    Outgoing,
    Provider,
    ProviderAnswerError,
    Refresh,
    Revocation,
)

NUMBER = r"[0-9]{1,32}"
SIXTY_DAYS_SECONDS = 60 * 86_400
ENCRYPTED = (
    "privateKey is encrypted: decrypt it once with openssl pkcs8, and import the file with the outcome in its place"
)
ASSERTION_SECONDS = 45  # an assertion may live 60 seconds at most


def identify(credential: Credential) -> Dialogue[Account]:
    """Ask ``GET /users/me``. The login is an e-mail address, so it is not the id."""
    if credential.access_token is None:
        raise ProviderAnswerError("there is no access token to ask with")
    headers = {"Authorization": f"Bearer {credential.access_token.reveal()}", "Accept": "application/json"}
    answer = yield Outgoing("GET", f"{credential.hosts[''].rstrip('/')}/2.0/users/me", headers)
    user = answer.json() if answer.status == 200 else None
    number = user.get("id") if isinstance(user, dict) else None
    if not isinstance(user, dict) or not isinstance(number, str) or not number:
        raise ProviderAnswerError("the API did not say who consented")
    name, email = user.get("name"), user.get("login")
    return Account(number, name if isinstance(name, str) else None, email if isinstance(email, str) else None)


def revoke(credential: Credential) -> Dialogue[bool]:
    """Revoke refresh and access token; True when nothing of the two is left alive."""
    url = credential.urls.get("revoke_url")
    tokens = [token for token in (credential.refresh_token, credential.access_token) if token is not None]
    try:
        headers, fields = proof(credential)
    except ValueError:
        return False
    if not url or not tokens:
        return False
    headers = {"Content-Type": "application/x-www-form-urlencoded", "Accept": "application/json", **headers}
    for token in tokens:
        answer = yield Outgoing("POST", url, headers, urlencode({**fields, "token": token.reveal()}).encode())
        if answer.status != 200 and not _dead_already(answer):
            return False
    return True


def _dead_already(answer: Incoming) -> bool:
    try:
        said = answer.json()
    except ProviderAnswerError:
        return False
    return answer.status == 400 and isinstance(said, dict) and said.get("error") in {"invalid_token", "invalid_grant"}


def read_subject(given: Mapping[str, Any]) -> Mapping[str, str]:
    """Check whom a client-credentials token is for: the enterprise's service account, or one user."""
    return {
        "box_subject_type": require_text(given.get("box_subject_type"), "enterprise|user", "box_subject_type"),
        "box_subject_id": require_text(given.get("box_subject_id"), NUMBER, "box_subject_id"),
    }


def read_key(given: Mapping[str, Any]) -> Mapping[str, str]:
    """Check the app's configuration file (config.json), whose private key a person has decrypted beforehand.

    An encrypted key says itself how often its passphrase is to be hashed: whoever sends one chooses how long we stand still.
    """
    key = json_object(given.get("key"))
    settings = key.get("boxAppSettings")
    auth = settings.get("appAuth") if isinstance(settings, Mapping) else None
    if not isinstance(auth, Mapping):
        raise ValueError("the key must be the app's configuration file")  # noqa: TRY004 - one kind of refusal
    private_key = auth.get("privateKey")
    if isinstance(private_key, str) and "ENCRYPTED" in private_key:
        raise ValueError(ENCRYPTED)
    user = given.get("user_id")
    subject = (user, "user_id") if user is not None else (key.get("enterpriseID"), "enterpriseID")
    return {
        "private_key": require_private_key(private_key, algorithm="RS256"),
        "key_id": require_text(auth.get("publicKeyID"), r"[A-Za-z0-9_-]{1,64}", "publicKeyID"),
        "box_subject_type": "enterprise" if user is None else "user",
        "box_subject_id": require_text(subject[0], NUMBER, subject[1]),
    }


def sign_in(minter: Minter) -> Outgoing:
    """Give a signed JWT, and the client's secret besides, for a token of the service account or of one user."""
    text = {name: value.reveal() for name, value in minter.material.items() if name != "private_key"}
    claims = {
        "iss": minter.credential.client_id,
        "sub": text["box_subject_id"],
        "box_sub_type": text["box_subject_type"],
        "aud": token_url_of(minter),
        "jti": minter.unique,
    }
    assertion = signed_jwt(
        minter.material["private_key"],
        claims,
        now=minter.now,
        lifetime_seconds=ASSERTION_SECONDS,
        key_id=text["key_id"],
    )
    return token_request(minter, {"grant_type": JWT_BEARER, "assertion": assertion})


def subject_of(material: Mapping[str, str]) -> Account:
    """Return the user by the id that the API gives too, or the enterprise, whose service account's id is not known."""
    number = material["box_subject_id"]
    return Account(number if material["box_subject_type"] == "user" else f"enterprise:{number}")


CLIENT_CREDENTIALS = replace(
    client_credentials(fields={"box_subject_type": True, "box_subject_id": True}),
    read=read_subject,
    account=subject_of,
)

PROVIDER = Provider(
    name="box",
    title="Box",
    docs_url="https://developer.box.com/guides/authentication/oauth2",
    oauth2=OAuth2(
        authorize_url="https://account.box.com/api/oauth2/authorize",
        token_url="https://api.box.com/oauth2/token",  # noqa: S106 - an address
        revoke_url="https://api.box.com/oauth2/revoke",
        consent_params={},  # consent is shown each time
        refresh=Refresh(rotates=True, keep_old=False, expected=True, idle_seconds=SIXTY_DAYS_SECONDS),
        # It is not documented that another authorization of the same user and app lives on: assume that it does not.
        revocation=Revocation(revoke, kills="token", kills_with_refresh="grant"),
    ),
    minting={
        "client_credentials": CLIENT_CREDENTIALS,
        "service_account": Minting(
            "JWT app's configuration file",
            sign_in,
            {"key": True, "user_id": False},
            read=read_key,
            account=subject_of,
            uses_client=True,
        ),
    },
    hosts={"": "https://api.box.com", "upload": "https://upload.box.com/api"},
    identify=identify,
    env_prefix="BOX",
)
