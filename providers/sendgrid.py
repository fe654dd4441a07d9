"""Twilio SendGrid: a key as a bearer token; accounts in the EU have a host of their own.

Sources: sendgrid/sendgrid-python (base_interface.py: both hosts and the header), trufflesecurity/trufflehog.
"""

from providers.spec import ApiKey, Provider

PROVIDER = Provider(
    name="sendgrid",
    title="Twilio SendGrid",
    docs_url="https://www.twilio.com/docs/sendgrid/api-reference/how-to-use-the-sendgrid-v3-api/authentication",
    api_key=ApiKey("API key", "Settings, API Keys: SG.…; GET /v3/scopes says what a key may do"),
    hosts={"": "https://api.sendgrid.com", "eu": "https://api.eu.sendgrid.com"},
)
