"""Whether the environment names an OpenTelemetry collector, and what this process says of itself there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from broker import __version__
from broker.settings import Settings

OTLP = frozenset({"otlp", "otlp_proto_http"})


def wanted(environ: Mapping[str, str], signal: Literal["TRACES", "LOGS"]) -> bool:
    """Return whether the standard variables ask for this signal to be sent by OTLP (pure).

    They name an endpoint, for all signals or this one; the SDK is not switched off, and ``OTEL_…_EXPORTER`` does not
    name other exporters only.
    """
    endpoints = (f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    exporters = {name.strip().lower() for name in environ.get(f"OTEL_{signal}_EXPORTER", "").split(",")} - {""}
    off = environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    return any(environ.get(name) for name in endpoints) and not off and (not exporters or bool(exporters & OTLP))


def about(settings: Settings, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the resource's attributes that are ours; the name of the service only where the environment has none (pure)."""
    named = "OTEL_SERVICE_NAME" in environ or "service.name=" in environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    service = {} if named else {"service.name": "broker"}
    return {**service, "service.version": __version__, "deployment.environment.name": settings.env}
