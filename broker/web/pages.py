"""The built-in pages as HTML text: what a person sees when a flow ends here, fails, or begins at the connect page.

Everything here is pure: values in, text out. Every value is escaped where it is put in; no page holds a script, a style or
a picture of its own, so the Content-Security-Policy of ``security_headers`` can forbid all of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from broker.oauth.flow import CONFIRM_CODE_SECONDS

HERE = Path(__file__).resolve().parent
State = Literal["connected", "needs_reconnecting", "paused"]


@dataclass(frozen=True, slots=True)
class ShownConnection:
    """One account as its owner sees it. ``partial``: some of the permissions that were asked for are missing."""

    id: str
    account: str
    state: State
    partial: bool = False


@dataclass(frozen=True, slots=True)
class ShownIntegration:
    """One row of the connect page. ``start_url``: where a new consent begins, None while there is none to have."""

    title: str
    start_url: str | None
    connections: tuple[ShownConnection, ...] = ()


@dataclass(frozen=True, slots=True)
class Advice:
    """What an error page says above and below the error's own text."""

    heading: str
    next_step: str = "Please go back to the application you came from and start again."


# An empty next step: the error's own text says it already.
ADVICE: Mapping[str, Advice] = {
    "access_denied": Advice(
        "Nothing was connected", "If that was a mistake, go back to the application and try again."
    ),
    "provider_error": Advice("The other service reported a problem"),
    "session_required": Advice("This link is not complete", ""),
    "session_expired": Advice("This link is no longer valid", ""),
    "session_bound": Advice("This link is in use in another browser", ""),
    "state_invalid": Advice("This page cannot be opened here", ""),
    "state_expired": Advice("That took too long", ""),
    "issuer_mismatch": Advice("This answer cannot be trusted"),
    "exchange_failed": Advice("The account was not connected"),
    "identity_invalid": Advice("We could not tell whose account this is"),
    "account_mismatch": Advice(
        "This is a different account", "Nothing was changed. Start again and choose the same account."
    ),
    "refresh_token_missing": Advice("The account was not connected"),
    "provider_unavailable": Advice("The other service does not answer", ""),
    "integration_disabled": Advice(
        "This cannot be connected at the moment", "Please ask the people who run the application."
    ),
    "return_to_invalid": Advice(
        "This link is not valid", "Please tell the people who run the application you came from."
    ),
    "rate_limited": Advice("A little too fast", "Wait a minute, then load this page again."),
    "not_found": Advice("There is no such page", "Check the address, or go back to the application you came from."),
}
WRONG_REQUEST = Advice("This request cannot be answered")
OUR_FAULT = Advice("Something went wrong on our side", "Nothing of yours is lost. Please try again in a few minutes.")

NOTICES: Mapping[str, str] = {
    "revoked": "Disconnected. The access was withdrawn at the other service too.",
    "unsupported": "Disconnected. To withdraw the access at the other service too, remove it in your settings there.",
    "failed": "Disconnected. The other service did not confirm it; please check your settings there.",
    "skipped": "Disconnected.",
    "skipped_shared_grant": "Disconnected. The access stays open at the other service, because another connection uses it.",
}


class Pages:
    """Renders the pages. Made once; calls may run at once."""

    def __init__(self) -> None:
        """Read the style sheet; its address changes with its content, so browsers may keep it for good."""
        self.stylesheet = (HERE / "static" / "broker.css").read_bytes()
        self.stylesheet_name = f"broker-{hashlib.sha256(self.stylesheet).hexdigest()[:16]}.css"
        self._templates = Environment(
            loader=FileSystemLoader(HERE / "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.globals["stylesheet_url"] = f"/assets/{self.stylesheet_name}"
        self._templates.filters |= {"json": _json_text, "time": _time_text}

    def error_page(self, *, status: int, code: str, text: str, request_id: str) -> str:
        """Return the page for an error; ``text`` is ours (a ``BrokerError.detail``), ``request_id`` is for a report."""
        advice = ADVICE.get(code) or (OUR_FAULT if status >= 500 else WRONG_REQUEST)
        return self._render("error.html", advice=advice, code=code, text=text, request_id=request_id)

    def done_page(self, *, connection_id: str, confirm_code: str | None, missing_scopes: Sequence[str]) -> str:
        """Return the end of a flow without a ``return_to``; with a code, it shows the command that confirms it."""
        return self._render(
            "done.html",
            connection_id=connection_id,
            confirm_code=confirm_code,
            confirm_minutes=int(CONFIRM_CODE_SECONDS // 60),
            missing_scopes=missing_scopes,
        )

    def connect_page(
        self,
        *,
        session_id: str,
        return_to: str,
        application: str,
        shown: Sequence[ShownIntegration],
        notice: str | None,
    ) -> str:
        """Return the list of what a session's owner may connect.

        ``return_to`` must have been checked against the allow-list; ``application`` is its host. ``notice`` is a key of
        ``NOTICES``; any other shows nothing.
        """
        return self._render(
            "connect.html",
            session_id=session_id,
            return_to=return_to,
            application=application,
            shown=shown,
            notice=NOTICES.get(notice or ""),
        )

    def disconnect_page(
        self, *, session_id: str, application: str, title: str, connection: ShownConnection, form_token: str
    ) -> str:
        """Return the question before a connection is deleted; ``form_token`` proves that the answer came from here."""
        return self._render(
            "disconnect.html",
            session_id=session_id,
            application=application,
            title=title,
            connection=connection,
            form_token=form_token,
        )

    def console_page(self, template: str, **values: object) -> str:
        """Return a page of the operators' console, of the folder ``templates/console``."""
        return self._render(f"console/{template}", **values)

    def security_headers(self) -> dict[str, str]:
        """Return the headers of every page.

        ``form-action 'self'`` also covers where a form redirects to, so only the disconnect form is one; connecting is a
        link. There is no Cross-Origin-Opener-Policy: an application may run the flow in a pop-up, and any value of it
        would cut ``window.opener`` off for the application's own page at the end.
        """
        return {
            "Content-Security-Policy": (
                "default-src 'none'; style-src 'self'; img-src 'self' data:; form-action 'self'; "
                "base-uri 'none'; frame-ancestors 'none'"
            ),
            "Cache-Control": "no-store",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
        }

    def _render(self, template: str, **values: object) -> str:
        return self._templates.get_template(template).render(values)


def _json_text(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def _time_text(rfc3339: str | None) -> str:
    """Return a time as people read it, to the second; a dash for none."""
    return "\N{EN DASH}" if rfc3339 is None else f"{rfc3339[:19].replace('T', ' ')} UTC"
