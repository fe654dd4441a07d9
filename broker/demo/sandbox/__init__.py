"""The sandbox provider: a real OAuth 2.0 and OpenID Connect server with an API, in memory, that can be told to misbehave.

Made for ``make demo`` and for tests of whatever talks to a provider: it is strict where the RFCs are (PKCE S256 always, exact
redirect URIs, single-use codes, ``iss`` in every answer to the browser), rotates refresh tokens in three ways, fails on
demand, and remembers what it saw (digests, never a secret). Authlib's server half decides, joserfc signs, these files
keep the state and speak HTTP. Handlers are synchronous, so each request is decided at one instant. Nothing here is for
production: anyone who reaches it may consent as anyone.
"""

from broker.demo.sandbox.application import Sandbox
from broker.demo.sandbox.options import (
    DEMO_CLIENT_ID,
    DEMO_CLIENT_SECRET,
    FAULTS,
    Counters,
    Fault,
    SandboxOptions,
    Visit,
    fault,
)
from broker.demo.sandbox.serving import create_sandbox, main, run_sandbox, serve_sandbox
from broker.demo.sandbox.state import (
    Grant,
    RefreshToken,
    SandboxState,
    TokenAnswer,
    is_loopback,
    is_safe_redirect,
    judge_refresh_token,
    sha256,
)
from broker.demo.sandbox.wire import Answer, Request

__all__ = [
    "DEMO_CLIENT_ID",
    "DEMO_CLIENT_SECRET",
    "FAULTS",
    "Answer",
    "Counters",
    "Fault",
    "Grant",
    "RefreshToken",
    "Request",
    "Sandbox",
    "SandboxOptions",
    "SandboxState",
    "TokenAnswer",
    "Visit",
    "create_sandbox",
    "fault",
    "is_loopback",
    "is_safe_redirect",
    "judge_refresh_token",
    "main",
    "run_sandbox",
    "serve_sandbox",
    "sha256",
]
