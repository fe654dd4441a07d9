"""Cloudinary: a product environment's key and secret as user name and password; each path names the environment.

Uploads may be sent with Basic too, so no signature over the parameters is made here.

Sources: cloudinary/pycloudinary (the base URL, Basic), trufflesecurity/trufflehog, the api-evangelist profile of 2026-08-22
(rate fields).
"""

from providers.spec import Basic, Provider, RateHeaders

PROVIDER = Provider(
    name="cloudinary",
    title="Cloudinary",
    docs_url="https://cloudinary.com/documentation/admin_api",
    basic=Basic("API key and secret", "Settings, API Keys: user name the API key, password the API secret"),
    # Hosts of other regions are unverified: config.api_base_url may name one.
    hosts={"": "https://api.cloudinary.com"},  # the SDK's own paths begin with /v1_1/<cloud name>
    rate_headers=RateHeaders(
        remaining=("x-featureratelimit-remaining",), reset=("x-featureratelimit-reset",), reset_format="http_date"
    ),
)
