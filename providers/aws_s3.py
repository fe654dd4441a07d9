"""Amazon S3: each call is signed (Signature Version 4), and the path is encoded once and never normalised.

Sources: https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html, boto/botocore (endpoints, names of
services), awslabs/aws-c-auth (vectors).
"""

from providers.sigv4 import sigv4
from providers.spec import Aws, Provider, RateHeaders, Variable

PROVIDER = Provider(
    name="aws_s3",
    title="Amazon S3",
    docs_url="https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-authenticating-requests.html",
    aws=Aws("AWS access key", "IAM, Users, Security credentials: AKIA… and its secret, or ASIA… with a session token"),
    # Buckets go into the path, as with boto3's endpoint_url. No host for STS: it hands out fresh keys (GetSessionToken),
    # which an answer could carry to the caller, for nobody knows them beforehand.
    hosts={"": "https://s3.{region}.amazonaws.com"},
    signers={"aws": sigv4("s3", s3=True)},
    path_headers=("x-amz-copy-source",),
    variables=(Variable("region", r"[a-z]{2}(-[a-z]{2,12}){1,2}-[0-9]{1,2}", "eu-central-1"),),
    rate_headers=RateHeaders(statuses={503: ()}),  # SlowDown; there are no fields that tell more
)
