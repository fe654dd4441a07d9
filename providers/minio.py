"""MinIO, and any other server of one's own that speaks S3's protocol: ``config.api_base_url`` says where it is.

A variable for the host would let a session choose who gets signed calls, so the integration names it.

Sources: minio/minio-py (minio/signer.py, helpers.py: region, path style, the port in ``Host``).
"""

from providers.sigv4 import sigv4
from providers.spec import Aws, Provider, Variable

PROVIDER = Provider(
    name="minio",
    title="MinIO (S3 compatible)",
    docs_url="https://min.io/docs/minio/linux/administration/identity-access-management/minio-user-management.html",
    aws=Aws("Access key", "The server's console, Access Keys; a session token where the pair is temporary"),
    signers={"aws": sigv4("s3", s3=True)},
    variables=(
        Variable("region", r"[a-z0-9-]{1,64}", "us-east-1", default="us-east-1"),
    ),  # what a server expects untold
    path_headers=("x-amz-copy-source",),
)
