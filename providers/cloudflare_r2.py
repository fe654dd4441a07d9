"""Cloudflare R2: S3's protocol with the region ``auto``, at a host of the account's own, one more for each jurisdiction.

Sources: cloudflare/cloudflare-docs (src/content/docs/r2/api/tokens.mdx).
"""

from providers.sigv4 import sigv4
from providers.spec import Aws, Provider, Variable

PROVIDER = Provider(
    name="cloudflare_r2",
    title="Cloudflare R2",
    docs_url="https://developers.cloudflare.com/r2/api/tokens/",
    aws=Aws(
        "R2 access key",
        "R2, Manage API tokens. Of an API token: its id is the access key id, the SHA-256 (hex) of its value the secret",
    ),
    # A bucket of a jurisdiction answers at that jurisdiction's host only.
    hosts={
        "": "https://{account_id}.r2.cloudflarestorage.com",
        "eu": "https://{account_id}.eu.r2.cloudflarestorage.com",
        "fedramp": "https://{account_id}.fedramp.r2.cloudflarestorage.com",
    },
    signers={"aws": sigv4("s3", region="auto", s3=True)},  # whatever region a key was imported with
    path_headers=("x-amz-copy-source",),
    variables=(Variable("account_id", r"[0-9a-f]{32}", "0123456789abcdef0123456789abcdef"),),
)
