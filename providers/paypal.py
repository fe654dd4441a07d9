"""PayPal: an app's own token opens the REST API; a user's, from "Log in with PayPal", says who the user is.

Sources: https://developer.paypal.com/docs/log-in-with-paypal/integrate, https://developer.paypal.com/api/rest/authentication,
https://developer.paypal.com/docs/api/identity/v1, NangoHQ/nango, better-auth, paypal/PayPal-PHP-SDK#916 (a refused secret).
No way to revoke is documented.
"""

from providers.minting import client_credentials
from providers.spec import (
    Account,
    Credential,
    Dialogue,
    OAuth2,
    Outgoing,
    Provider,
    ProviderAnswerError,
    Refresh,
)


def identify(credential: Credential) -> Dialogue[Account]:
    """Ask the identity API, which needs ``openid``. The id is PayPal's own for this user; it looks like an address."""
    if credential.access_token is None:
        raise ProviderAnswerError("there is no access token to ask with")
    headers = {"Authorization": f"Bearer {credential.access_token.reveal()}", "Accept": "application/json"}
    url = f"{credential.hosts[''].rstrip('/')}/v1/identity/oauth2/userinfo?schema=paypalv1.1"
    answer = yield Outgoing("GET", url, headers)
    user = answer.json() if answer.status == 200 else None
    account_id = user.get("user_id") if isinstance(user, dict) else None
    if not isinstance(user, dict) or not isinstance(account_id, str) or not account_id:
        raise ProviderAnswerError("the API did not say who consented")
    name = user.get("name")
    return Account(account_id, name if isinstance(name, str) else None)


PROVIDER = Provider(
    name="paypal",
    title="PayPal",
    docs_url="https://developer.paypal.com/api/rest/authentication/",
    oauth2=OAuth2(
        authorize_url="https://www.paypal.com/signin/authorize",
        token_url="https://api-m.paypal.com/v1/oauth2/token",  # noqa: S106 - an address
        client_auth="client_secret_basic",
        default_scopes=("openid",),
        consent_params={},
        refresh=Refresh(rotates=True, keep_old=True),  # unknown, so the careful side
    ),
    # An app's token is to be used until it ends: asking for one per call is limited by itself.
    minting={"client_credentials": client_credentials()},
    hosts={"": "https://api-m.paypal.com"},
    identify=identify,
    env_prefix="PAYPAL",
)
