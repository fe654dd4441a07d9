"""Mailgun: a key as the password of the user ``api``.

Sources: NangoHQ/nango and trufflesecurity/trufflehog (host, ``api:{key}``).
"""

from providers.signing import basic
from providers.spec import ApiKey, Provider

PROVIDER = Provider(
    name="mailgun",
    title="Mailgun",
    docs_url="https://documentation.mailgun.com/docs/mailgun/api-reference/mg-auth",
    api_key=ApiKey("API key", "API Security, or a domain's Sending keys; the user name api is put in by the broker"),
    signers={"api_key": basic("api", "{api_key}")},
    hosts={"": "https://api.mailgun.net", "eu": "https://api.eu.mailgun.net"},  # the EU's is unverified
)
