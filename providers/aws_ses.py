"""Amazon SES: each call is signed (Signature Version 4) for the service ``ses``, though the host is ``email``.

Sources: boto/botocore (data/ses and data/sesv2: signing name and endpoint prefix).
"""

from providers.sigv4 import sigv4
from providers.spec import Aws, Provider, Variable

PROVIDER = Provider(
    name="aws_ses",
    title="Amazon SES",
    docs_url="https://docs.aws.amazon.com/ses/latest/APIReference-V2/Welcome.html",
    aws=Aws("AWS access key", "IAM, Users, Security credentials: AKIA… and its secret, or ASIA… with a session token"),
    hosts={"": "https://email.{region}.amazonaws.com"},
    signers={"aws": sigv4("ses")},
    variables=(Variable("region", r"[a-z]{2}(-[a-z]{2,12}){1,2}-[0-9]{1,2}", "eu-central-1"),),
)
