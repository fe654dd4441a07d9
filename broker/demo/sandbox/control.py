"""The sandbox's control API, for tests in another process: steer it and read what it saw."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qsl

import msgspec

from broker.demo.sandbox.application import Handler, Route, Routes, Sandbox
from broker.demo.sandbox.options import FAULTS, Fault, fault
from broker.demo.sandbox.state import SandboxState
from broker.demo.sandbox.wire import Answer, Request, json_answer
from providers.spec import Secret


def show_log(sandbox: Sandbox, request: Request) -> Answer:
    """Return counters and what was seen, oldest first; ``?after=<number>`` skips what is known already."""
    asked = dict(parse_qsl(request.query)).get("after", "0")
    after = int(asked) if asked.isdecimal() else 0
    seen = [visit for visit in sandbox.state.visits if visit.number > after]
    return json_answer({"counters": sandbox.state.counters, "requests": seen})


def clear_log(sandbox: Sandbox, _request: Request) -> Answer:
    """Forget what was seen."""
    sandbox.state.clear_log()
    return json_answer({})


def show_faults(sandbox: Sandbox, _request: Request) -> Answer:
    """List what will go wrong, and the presets' names."""
    return json_answer({"faults": sandbox.state.faults, "presets": list(FAULTS)})


def clear_faults(sandbox: Sandbox, _request: Request) -> Answer:
    """Behave again."""
    sandbox.state.clear_faults()
    return json_answer({})


def steer(act: Callable[[SandboxState, dict[str, Any]], object]) -> Handler:
    """Make a handler of a function over the state and a JSON object; what it refuses is a 400 with the reason."""

    def handle(sandbox: Sandbox, request: Request) -> Answer:
        try:
            sent = msgspec.json.decode(request.body or b"{}", type=dict[str, Any])
            return json_answer(act(sandbox.state, sent) or {})
        except (ValueError, TypeError, KeyError) as error:
            return json_answer({"error": "invalid_request", "reason": str(error)}, 400)

    return handle


def add_fault(state: SandboxState, sent: dict[str, Any]) -> None:
    """``{"preset": "fail", …changes}``, or a whole ``Fault``."""
    preset = sent.pop("preset", None)
    state.add_fault(fault(preset, **sent) if preset is not None else msgspec.convert(sent, Fault))


def add_client(state: SandboxState, sent: dict[str, Any]) -> None:
    """``{client_id, client_secrets, redirect_uris, auth_methods?, default_scope?}``."""
    sent["client_secrets"] = [Secret(value) for value in sent["client_secrets"]]
    state.add_client(**sent)


def change_options(state: SandboxState, sent: dict[str, Any]) -> dict[str, Any]:
    """Any ``SandboxOptions`` but the fixed ones; return them all."""
    state.configure(**sent)
    return msgspec.structs.asdict(state.options)


def control(act: Callable[[SandboxState, dict[str, Any]], object]) -> Route:
    """Route to a steering function."""
    return Route("control", steer(act))


CONTROL: Routes = {
    "/_control/log": {"GET": Route("control", show_log), "DELETE": Route("control", clear_log)},
    "/_control/faults": {
        "GET": Route("control", show_faults),
        "POST": control(add_fault),
        "DELETE": Route("control", clear_faults),
    },
    "/_control/options": {"PATCH": control(change_options)},
    "/_control/clients": {"POST": control(add_client)},
    "/_control/keys": {"POST": control(lambda state, sent: {"kid": state.rotate_keys(**sent)})},
    "/_control/mint": {"POST": control(lambda state, sent: state.mint(**sent))},
    "/_control/kill": {"POST": control(lambda state, sent: {"killed": state.kill_account(**sent)})},
}
