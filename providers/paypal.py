"""PayPal: an app's own token opens the REST API; a user's, from "Log in with PayPal", says who the user is.

Sources: https://developer.paypal.com/docs/log-in-with-paypal/integrate, https://developer.paypal.com/api/rest/authentication,
https://developer.paypal.com/docs/api/identity/v1, NangoHQ/nango, better-auth, paypal/PayPal-PHP-SDK#916 (a refused secret).
No way to revoke is documented.
"""

import hashlib
import re
import zlib

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from providers.minting import client_credentials
from providers.spec import (
    Account,
    Covered,
    Credential,
    Dialogue,
    Header,
    Member,
    OAuth2,
    Outgoing,
    Proof,
    Provider,
    ProviderAnswerError,
    Received,
    Refresh,
    Reply,
    Scheme,
    SourceKeys,
    Webhook,
    WebhookRefused,
)
from providers.verifying import check_time, read_time
from providers.webhook_keys import decoded
from providers.webhook_places import field

CERTIFICATES = ("https://api.paypal.com", "https://api.sandbox.paypal.com")


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


def verify_webhook(received: Received, keys: SourceKeys) -> Dialogue[Proof]:
    """Check RSA-SHA256 over id, time, the webhook's id and the CRC-32 of the body, with the certificate that is named.

    A CRC is no hash: who holds a request can make another body that has it. The certificate is taken from PayPal's own
    hosts alone, and its time is looked at; that it is PayPal's is for TLS to say.
    """
    address = field(received, "paypal-cert-url")
    if not any(address.startswith(f"{origin}/v1/notifications/certs/") for origin in CERTIFICATES):
        raise WebhookRefused("key_address_refused")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", address.rpartition("/certs/")[2]):
        raise WebhookRefused("key_address_refused")
    if field(received, "paypal-auth-algo") != "SHA256withRSA":
        raise WebhookRefused("algorithm_refused")
    signature = decoded(field(received, "paypal-transmission-sig"), "base64")
    if signature is None:
        raise WebhookRefused("encoding_wrong")
    delivery, written = field(received, "paypal-transmission-id"), field(received, "paypal-transmission-time")
    signed_at = read_time(written, "rfc3339")
    if not keys.secrets:
        raise WebhookRefused("secret_missing")
    answer = yield Outgoing("GET", address)
    if answer.status != 200:
        raise WebhookRefused("key_unavailable")
    public, checksum = _certified(answer.body, keys.now), zlib.crc32(received.body)
    for index, webhook_id in enumerate(keys.secrets):
        signed = f"{delivery}|{written}|{webhook_id.reveal()}|{checksum}".encode()
        if webhook_id.reveal() and _is_right(public, signature, signed):
            check_time(signed_at, None, keys)
            covers: frozenset[Covered] = frozenset({"delivery_id", "timestamp", "body_checksum"})
            return Proof(index, covers, hashlib.sha256(signed).digest(), signed_at)
    raise WebhookRefused("signature_mismatch")


def _certified(pem: bytes, now: float) -> rsa.RSAPublicKey:
    try:
        certificate = x509.load_pem_x509_certificate(pem)
        public = certificate.public_key()
    except (ValueError, UnsupportedAlgorithm):
        raise WebhookRefused("key_refused") from None
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if not begins.timestamp() <= now <= ends.timestamp():
        raise WebhookRefused("key_refused")
    if not isinstance(public, rsa.RSAPublicKey) or public.key_size < 2048:
        raise WebhookRefused("key_refused")
    return public


def _is_right(public: rsa.RSAPublicKey, signature: bytes, signed: bytes) -> bool:
    try:
        public.verify(signature, signed, padding.PKCS1v15(), hashes.SHA256())
    except InvalidSignature:
        return False
    return True


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
    webhooks={
        "": Webhook(
            Scheme(
                "RSA and a certificate",
                verify_webhook,
                frozenset({"delivery_id", "timestamp", "body_checksum"}),
                ("paypal-transmission-sig",),
                (Header("paypal-transmission-id"), Header("paypal-transmission-time")),
                asks=CERTIFICATES,
                symmetric=False,
            ),
            "https://developer.paypal.com/api/rest/webhooks/rest/",
            event=(Member("/event_type"),),
            delivery_id=Header("paypal-transmission-id"),
            acknowledgement=Reply(200),
            help="The webhook's id, which is part of what is signed and no secret",
        )
    },
)
