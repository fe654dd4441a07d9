"""Pure: what a call asks for besides its request line, where an API takes a method from a parameter or a path from a field."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from urllib.parse import unquote_plus

from broker.policy import CallDecision
from broker.proxy.target import CallTarget
from providers.spec import Provider


def also_asked(
    target: CallTarget, headers: Iterable[tuple[bytes, bytes]], provider: Provider
) -> Iterator[tuple[str, bytes]]:
    """Yield each further (method, raw path) that the provider's API would understand: policy has to allow them all.

    A parameter that names a method (``Provider.method_params``) in a query; a form's or a JSON body's is not looked at. A field
    that names what is read besides (``Provider.path_headers``), as a GET of its path.
    """
    wanted = {name.lower() for name in provider.method_params}
    if wanted and target.query:
        for part in target.query.split(b"&"):
            name, _, value = part.partition(b"=")
            if unquote_plus(name.decode("latin-1")).lower() in wanted:
                yield unquote_plus(value.decode("latin-1")).strip().upper(), target.path
    if not provider.path_headers:
        return
    fields = {name.encode() for name in provider.path_headers}
    for name, value in headers:
        if name.lower() in fields:
            yield "GET", b"/" + value.partition(b"?")[0].strip().lstrip(b"/")


def strictest(decisions: list[CallDecision]) -> CallDecision:
    """Return the one that counts: a refusal, else one that was only observed, else the first."""
    refused = [one for one in decisions if not one.permitted]
    observed = [one for one in decisions if one.would_be_denied]
    return (refused or observed or decisions)[0]
