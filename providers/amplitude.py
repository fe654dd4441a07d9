"""Amplitude: a project's API key and secret key as user name and password.

Events are sent to another host with the API key in the body, which is no secret and not kept here.

Sources: NangoHQ/nango and trufflesecurity/trufflehog (host and Basic).
"""

from providers.spec import Basic, Provider

PROVIDER = Provider(
    name="amplitude",
    title="Amplitude",
    docs_url="https://amplitude.com/docs/apis/authentication",
    basic=Basic("API key and secret key", "Settings, Projects: user name the API key, password the secret key"),
    # The hosts of the EU and for events are unverified: config.api_base_url may name another one.
    hosts={"": "https://amplitude.com/api"},
)
