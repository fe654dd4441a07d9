"""`broker webhooks trigger|listen|replay` against a running broker, and an application that verifies what reaches it."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import os
import re
import shlex
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from broker.cli import main
from broker.cli.event_stream import BEFORE_ALL, Broker, Forwarding, Wanted, follow, forwarded, messages
from broker.cli.remote import Remote
from broker.cli.running import Refused
from broker.telemetry import configure_logging
from providers.spec import Secret
from tests.commands import ROOT, Done, environment, logging_as_before
from tests.flows.rig import Rig, eventually, open_rig, reserved_socket, serving

PATIENCE_SECONDS = 30.0
SECRET = "whsec_" + base64.b64encode(b"k" * 32).decode()


@dataclass
class App:
    """An application that remembers what it got, and answers with ``status``."""

    base: str
    status: int = 204
    got: list[tuple[dict[str, str], bytes]] = field(default_factory=list)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request (ASGI)."""
        pieces, more = [], True
        while more:
            message = await receive()
            pieces.append(message.get("body", b""))
            more = message.get("more_body", False)
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        self.got.append((headers, b"".join(pieces)))
        location = [(b"location", self.base.encode())] if self.status == 302 else []
        await send({"type": "http.response.start", "status": self.status, "headers": location})
        await send({"type": "http.response.body", "body": b""})


@asynccontextmanager
async def an_app() -> AsyncIterator[App]:
    with reserved_socket() as listener:
        app = App(f"http://127.0.0.1:{listener.getsockname()[1]}")
        async with serving(app, listener):
            yield app


@pytest.fixture
async def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Rig]:
    """Run a broker with a worker; commands find its settings in the folder."""
    monkeypatch.chdir(tmp_path)
    with logging_as_before():
        async with open_rig(tmp_path, worker=True) as made:
            configure_logging(made.parts.settings, quiet=True)  # its lines would come between those of the commands
            yield made


async def command(rig: Rig, *arguments: str, **variables: str) -> Done:
    """Run `broker webhooks …` beside the broker, on its database."""
    known = {"BROKER_ENV": "development", "BROKER_DATA_DIR": ".", "BROKER_PUBLIC_URL": rig.base}

    def run() -> Done:
        ended = CliRunner(env={**known, **variables}).invoke(main, ["webhooks", *arguments])
        if ended.exception is not None and not isinstance(ended.exception, SystemExit):
            raise ended.exception
        return Done(ended.exit_code, ended.stdout, ended.stderr)

    return await asyncio.to_thread(run)


async def source(rig: Rig, **fields: Any) -> dict[str, Any]:
    made = await rig.call("POST", "/v1/webhook-sources", {"name": "pushes", "provider": "github", **fields})
    assert made.status_code == 201, made.text
    return dict(made.json())


async def triggered(rig: Rig, source_id: str, event: str = "github.push") -> str:
    """Post a sample; return the event's id."""
    done = await command(rig, "trigger", event, "--source", source_id, "--json")
    assert done.status == 0, done.err
    return str(json.loads(json.loads(done.out)["body"])["event_id"])


def is_genuine(headers: dict[str, str], body: bytes, secret: str) -> bool:
    """Verify by the specification, without the broker's code."""
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    key = base64.b64decode(secret.removeprefix("whsec_"))
    made = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
    return f"v1,{made}" in headers["webhook-signature"].split()


# --- trigger --------------------------------------------------------------------------------------------------------------


async def test_a_sample_is_signed_with_the_sources_own_secret_and_stored(rig: Rig, tmp_path: Path) -> None:
    made = await source(rig)
    (tmp_path / "body.json").write_bytes(b'{"ref":  "refs/heads/main"}')
    done = await command(rig, "trigger", "github.push", "--source", made["id"], "--body", "body.json")
    assert (done.status, done.err) == (0, "")
    assert done.out.startswith("202 ")
    assert made["secret"] not in done.out
    (event,) = (await rig.call("GET", "/v1/events")).json()["data"]
    shown = (await rig.call("GET", f"/v1/events/{event['id']}")).json()
    assert (shown["type"], base64.b64decode(shown["body"])) == ("github.push", b'{"ref":  "refs/heads/main"}')


async def test_without_the_database_the_secret_and_the_address_are_given(rig: Rig, tmp_path: Path) -> None:
    made = await source(rig)
    (tmp_path / "secret").write_text(made["secret"])
    right = await command(rig, "trigger", "github.push", "--url", made["url"], "--secret-file", "secret")
    assert (right.status, right.out[:4]) == (0, "202 ")
    wrong = await command(rig, "trigger", "github.push", "--url", made["url"], WEBHOOK_SECRET="another")
    assert (wrong.status, wrong.out) == (1, "")
    assert "answered with 401" in wrong.err
    told = await command(rig, "trigger", "github.push", "--url", made["url"], "--json", WEBHOOK_SECRET="another")
    assert (told.status, json.loads(told.out)["status"]) == (1, 401)


async def test_what_cannot_be_triggered_is_said(rig: Rig) -> None:
    made = await source(rig)
    for arguments, said in (
        (("github", "--source", made["id"]), "must be a provider and an event"),
        (("github.push",), "--source or --url"),
        (("github.push", "--source", "src_" + "a" * 26), "there is no such source"),
        (("stripe.charge.succeeded", "--source", made["id"]), "another provider's"),
        (("github.push", "--url", "ftp://x", "--source", made["id"]), "--url takes an address"),
        (("github.push", "--url", "http://user:pass@127.0.0.1/", "--source", made["id"]), "--url takes an address"),
        (("github.push", "--url", "http://127.0.0.1:9/", "--source", made["id"]), "http://127.0.0.1:9 did not answer"),
    ):
        done = await command(rig, "trigger", *arguments)
        assert (done.status != 0, done.out) == (True, ""), arguments
        assert said in done.err, done.err


# --- listen ---------------------------------------------------------------------------------------------------------------


async def test_listen_brings_events_of_the_stream_to_the_application_signed(rig: Rig, tmp_path: Path) -> None:
    made = await source(rig)
    (tmp_path / "key").write_text(rig.admin_key)
    async with an_app() as app:
        arguments = ("--url", rig.base, "--forward", f"{app.base}/hooks", "--types", "github.**", "--key-file", "key")
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "broker", "webhooks", "listen", *arguments),
            cwd=tmp_path, env=environment(tmp_path), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert process.stdout is not None
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                assert app.base in (await process.stdout.readline()).decode()
                secret = (await process.stdout.readline()).decode().split("signed with ")[1].split(",")[0]
                await eventually(lambda: _streams(rig), seconds=PATIENCE_SECONDS)
                event_id = await triggered(rig, made["id"])
                line = (await process.stdout.readline()).decode()
        finally:
            process.kill()
            await process.wait()
    assert f"{event_id}  github.push  204 in " in line
    ((headers, body),) = app.got
    assert (headers["webhook-id"], headers["x-github-event"]) == (event_id, "push")
    assert headers["x-broker-source"] == made["id"]
    assert is_genuine(headers, body, secret)
    assert "x-hub-signature-256" not in headers
    assert "authorization" not in headers


async def test_the_guides_command_asks_for_the_key_and_says_what_the_page_shows(rig: Rig, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "webhooks.md").read_text("utf-8")
    ((line, shown),) = re.findall(r"^```console\n\$ ([^\n]+)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    asked, *said = shown.splitlines()
    made, (terminal, keyboard) = await source(rig), os.openpty()
    async with an_app() as app:
        here = {"https://broker.example.com": rig.base, "http://localhost:3000": app.base}
        for there, address in here.items():
            assert there in line
            line, said = line.replace(there, address), [one.replace(there, address) for one in said]
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", *shlex.split(line)),
            cwd=tmp_path, env=environment(tmp_path), start_new_session=True,
            stdin=keyboard, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert process.stdout is not None
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                assert (await process.stdout.readuntil(b":")).decode() == asked
                os.write(terminal, f"{rig.admin_key}\n".encode())
                begun = [(await process.stdout.readline()).decode() for _ in said[:-1]]
                await eventually(lambda: _streams(rig), seconds=PATIENCE_SECONDS)
                await triggered(rig, made["id"])
                lines = [*begun, (await process.stdout.readline()).decode()]
        finally:
            process.kill()
            await process.wait()
            os.close(terminal)
            os.close(keyboard)
    for printed, one in zip(lines, said, strict=True):
        form = re.sub(r"\d+", r"\\d+", re.escape(one)).replace("…", r"\S+")
        assert re.fullmatch(form, printed.rstrip()), (form, printed)


async def _streams(rig: Rig) -> bool:
    return rig.parts.webhooks.event_feed._streams.total() > 0


async def test_a_redirect_of_the_application_is_not_followed_and_one_that_is_away_is_told(rig: Rig) -> None:
    made = await source(rig)
    event_id = await triggered(rig, made["id"])
    remote = Remote()
    broker = Broker(remote, rig.base, Secret(rig.admin_key))
    async with an_app() as app:
        app.status = 302
        outcome = await forwarded(broker, event_id, Forwarding(app.base, Secret(SECRET)))
        assert (outcome["status"], len(app.got)) == (302, 1)
    away = await forwarded(broker, event_id, Forwarding(app.base, Secret(SECRET)))
    assert away == {"status": None, "error": f"{app.base} did not answer (ConnectError)"}
    gone = await forwarded(broker, "evt_" + "a" * 26, Forwarding(app.base, Secret(SECRET)))
    assert gone["error"] == "the event is gone"
    await remote.aclose()


async def test_a_key_that_may_not_have_bodies_ends_it(rig: Rig) -> None:
    made = await source(rig)
    event_id = await triggered(rig, made["id"])
    remote = Remote()
    auditor = Broker(remote, rig.base, Secret(await rig.caller(roles=("auditor",))))
    with pytest.raises(Refused, match="may not have the bodies"):
        await forwarded(auditor, event_id, Forwarding("http://127.0.0.1:9", Secret(SECRET)))
    await remote.aclose()


async def test_listen_ends_with_what_is_wrong(rig: Rig) -> None:
    for arguments, said in (
        (("--forward", "localhost:3000"), "--forward takes an address"),
        (("--forward", "http://localhost:3000", "--types", "**.x"), "--types"),
        (("--forward", "http://localhost:3000"), "there is no key"),
    ):
        done = await command(rig, "listen", *arguments)
        assert (done.status, said in done.err) == (1, True), done.err
    key = "brk_" + "a" * 26 + "_" + "b" * 49
    done = await command(rig, "listen", "--forward", "http://localhost:3000", CALLER_KEY=key)
    assert (done.status, "answered 401" in done.err) == (1, True)
    assert key not in done.out + done.err


# The stream, when it breaks. The far side is a fake: a real one that breaks at a chosen byte there is none.

BEHIND = json.dumps({"data": [{"id": "evt_behind", "number": 5}]}).encode()  # its list's next page
Answering = Callable[[dict[str, str], int], bytes]


@asynccontextmanager
async def a_breaking_broker(stream: Answering, newest: bytes) -> AsyncIterator[str]:
    """Serve the list of events, and streams that end after what ``stream`` returns for the head and the how-manieth."""
    opened = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal opened
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        head = dict(line.lower().split(": ", 1) for line in lines if line)
        if "/v1/events/stream" in first:
            opened += 1
            body = stream(head, opened)
            kind = b"text/event-stream\r\nContent-Length: 100000"  # it promises more than comes
        else:
            body = BEHIND if "cursor=wait%3D" in first else newest
            kind = b"application/json\r\nContent-Length: %d" % len(body)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: " + kind + b"\r\n\r\n" + body)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def frame(number: int) -> bytes:
    event = {"id": f"evt_{number}", "type": "acme.event"}
    return f": a comment\nid: evt_{number}\ndata: {json.dumps(event)}\n\n".encode()


@pytest.mark.parametrize(
    ("newest", "begins_after"),
    [
        ({"data": []}, BEFORE_ALL),
        ({"data": [{"id": "evt_waits", "number": None}, {"id": "evt_0", "number": 7}]}, "evt_0"),
        ({"data": [{"id": "evt_waits", "number": None}], "next_cursor": "wait="}, "evt_behind"),
        ({"data": [], "next_cursor": "wait="}, "evt_behind"),
    ],
)
async def test_a_stream_that_breaks_is_taken_up_behind_the_last_event(newest: Any, begins_after: str) -> None:
    asked: list[str] = []

    def stream(head: dict[str, str], opened: int) -> bytes:
        asked.append(head["last-event-id"])
        return (frame(1) + frame(2)[:20], frame(2) + frame(3))[min(opened, 2) - 1]

    lost: list[str] = []
    async with a_breaking_broker(stream, json.dumps(newest).encode()) as base:
        remote = Remote()
        events = follow(Broker(remote, base, Secret("brk_x")), Wanted(None, ()), lost.append)
        async with asyncio.timeout(PATIENCE_SECONDS):
            seen = [str((await anext(events))["id"]) for _ in range(3)]
        await events.aclose()
        await remote.aclose()
    assert seen == ["evt_1", "evt_2", "evt_3"]
    assert asked == [begins_after, "evt_1"]
    assert len(lost) == 1
    assert "again in 0.5 s" in lost[0]


async def test_messages_are_read_however_they_are_cut() -> None:
    whole = frame(1) + b"event: x\r\ndata: one\r\ndata:two\r\n\r\n: only a comment\n\n" + frame(2)

    async def cut(size: int) -> AsyncIterator[bytes]:
        for at in range(0, len(whole), size):
            yield whole[at : at + size]

    expected = [
        json.dumps({"id": "evt_1", "type": "acme.event"}),
        "one\ntwo",
        json.dumps({"id": "evt_2", "type": "acme.event"}),
    ]
    for size in (1, 2, 3, 7, len(whole)):
        assert [text async for text in messages(cut(size))] == expected


def test_several_types_are_told_apart_here_and_one_is_asked_for() -> None:
    assert Wanted("src_1", ("a.**",)).query == "?source_id=src_1&type=a.%2A%2A"
    several = Wanted(None, ("a.*", "b.c"))
    assert several.query == ""
    assert [several.fits(one) for one in ("a.b", "a.b.c", "b.c")] == [True, False, True]


# --- replay ---------------------------------------------------------------------------------------------------------------


async def subscription(rig: Rig, app: App, **fields: Any) -> dict[str, Any]:
    body = {"url": f"{app.base}/hooks", "event_types": ["github.**"], **fields}
    made = await rig.call("POST", "/v1/subscriptions", body)
    assert made.status_code == 201, made.text
    return dict(made.json())


def arrived(app: App, count: int) -> Callable[[], Awaitable[bool]]:
    async def check() -> bool:
        return len(app.got) >= count

    return check


async def test_an_event_is_replayed_under_its_id_to_all_or_to_one(rig: Rig) -> None:
    made = await source(rig)
    async with an_app() as app:
        first, second = await subscription(rig, app), await subscription(rig, app)
        event_id = await triggered(rig, made["id"])
        await eventually(arrived(app, 2))
        everyone = json.loads((await command(rig, "replay", event_id, "--json")).out)
        assert len(everyone["delivery_ids"]) == 2
        one = json.loads((await command(rig, "replay", event_id, "--subscription", first["id"], "--json")).out)
        assert len(one["delivery_ids"]) == 1
        await eventually(arrived(app, 5))
    assert {headers["webhook-id"] for headers, _ in app.got} == {event_id}
    assert [headers.get("x-broker-replay") for headers, _ in app.got].count("true") == 3
    secrets = (first["secret"], second["secret"])
    assert all(any(is_genuine(headers, body, secret) for secret in secrets) for headers, body in app.got)


async def test_many_are_counted_first_and_only_sent_again_when_that_is_said(rig: Rig) -> None:
    made = await source(rig)
    async with an_app() as app:
        app.status = 410
        held = await subscription(rig, app)
        await triggered(rig, made["id"])
        await eventually(arrived(app, 1))
        app.status = 204

        async def dead() -> bool:
            shown = await rig.call("GET", "/v1/deliveries?status=dead")
            return len(shown.json()["data"]) == 1

        await eventually(dead)
        answer = await rig.call("PATCH", f"/v1/subscriptions/{held['id']}", {"active": True})
        assert answer.status_code == 200, answer.text
        since = ("replay", "--since", "2020-01-01T00:00:00Z")
        counted = await command(rig, *since, "--status", "dead", "--dry-run", "--json")
        assert json.loads(counted.out) == {"dry_run": True, "total": 1, "retried": 0, "replayed": 0}
        unasked = await command(rig, *since)
        assert "this would send 1 deliveries again; --yes" in unasked.err
        assert len(app.got) == 1
        done = await command(rig, *since, "--yes", "--json")
        assert json.loads(done.out)["retried"] == 1
        await eventually(arrived(app, 2))
    assert len({headers["webhook-id"] for headers, _ in app.got}) == 1


async def test_what_cannot_be_replayed_is_said(rig: Rig) -> None:
    for arguments, said in (
        ((), "say which"),
        (("evt_x", "--since", "2020-01-01T00:00:00Z"), "say which"),
        (("--since", "yesterday"), "a time is written such as"),
        (("--since", "2020-01-01T00:00:00Z", "--status", "held"), "--status must be one of"),
        (("--since", "2020-01-01T00:00:00Z", "--type", "**.x"), "--types"),
        (("evt_" + "a" * 26,), "no such thing"),
    ):
        done = await command(rig, "replay", *arguments)
        assert (done.status != 0, done.out) == (True, ""), arguments
        assert said in done.err, done.err
