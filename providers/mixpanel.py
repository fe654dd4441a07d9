"""Mixpanel: a service account as user name and password; most queries want ``project_id`` besides.

Events are sent to another host with a project's token in the body, which is no secret and not kept here.

Sources: NangoHQ/nango and trufflesecurity/trufflehog (host and Basic).
"""

from providers.spec import Basic, Provider

PROVIDER = Provider(
    name="mixpanel",
    title="Mixpanel",
    docs_url="https://developer.mixpanel.com/reference/service-accounts",
    basic=Basic("Service account", "Organization settings, Service Accounts: its user name and its secret"),
    # Hosts for data that lies in the EU, for exports and for events are unverified: config.hosts may name them.
    hosts={"": "https://mixpanel.com/api"},
)
