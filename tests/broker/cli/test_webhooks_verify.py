"""`broker webhooks verify`: a recorded request is judged as a source judges it, and every refusal is told with its reason."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from joserfc import jwt
from joserfc.jwk import RSAKey
from typer.testing import CliRunner

from broker.cli import main
from broker.cli.raw_requests import read_request
from broker.cli.refusals import WHY
from providers import load_catalog
from providers.receiving import sign_sample
from providers.spec import Received, Sample, Secret, Step, Webhook
from tests.commands import PATIENCE_SECONDS, ROOT, Done, environment, logging_as_before

CATALOG = load_catalog()
SIGNED = {
    (f"{name}:{kind}" if kind else name): webhook
    for name, provider in CATALOG.items()
    for kind, webhook in provider.webhooks.items()
    if webhook.scheme.sign is not None
}
NOW = 1_700_000_000
URL = "https://hooks.example.test/webhooks/src_1?tag=a"
SEED = b"\x07" * 32
TEXT = "a-secret-that-no-line-may-show"
GITHUB = ("--provider", "github")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Give an empty folder in which no variable of this machine counts; it has no database."""
    for name in [name for name in os.environ if name.startswith(("BROKER_", "WEBHOOK_"))]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    with logging_as_before():
        yield tmp_path


def verify(*arguments: str, given: str = "", **variables: str) -> Done:
    """Run `broker webhooks verify …` inside this process."""
    ended = CliRunner(env=variables).invoke(main, ["webhooks", "verify", *arguments], input=given)
    if ended.exception is not None and not isinstance(ended.exception, SystemExit):
        raise ended.exception
    return Done(ended.exit_code, ended.stdout, ended.stderr)


def raw(request: Received, *, line_end: bytes = b"\r\n") -> bytes:
    """Return a request as bytes on the wire, with what a server in between would add."""
    target = request.url.split("hooks.example.test")[1]
    first = f"{request.method} {target} HTTP/1.1".encode()
    fields = [name + b": " + value for name, value in (*request.headers, (b"User-Agent", b"sender"))]
    return line_end.join([first, *fields, b"", b""]) + request.body


def sample(webhook: Webhook, *, body: bytes | None = None) -> tuple[Received, str]:
    """Return a genuine request and the secret of its source."""
    assert webhook.scheme.pair is not None
    kept, key = webhook.scheme.pair(SEED)
    return sign_sample(webhook, Sample("push.opened", URL, NOW, "delivery-1", body), key), kept.reveal()


def recorded(place: Path, name: str = "github", **how: Any) -> list[str]:
    """Record a genuine request in ``request.http`` and its secret in ``secret``; return the options that fit."""
    request, secret = sample(SIGNED[name], **how)
    (place / "request.http").write_bytes(raw(request))
    (place / "secret").write_text(f"{secret}\n")
    texts = [f"{one.name}=made-up-setting" for one in SIGNED[name].settings if one.needed]
    settings = [word for text in texts for word in ("--setting", text)]
    return ["--provider", name, "--secret-file", "secret", "--url", URL, "--now", str(NOW), *settings, "request.http"]


# --- what is genuine ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIGNED)
def test_a_recorded_request_of_each_kind_is_genuine_and_told_with_what_is_proven(place: Path, name: str) -> None:
    done = verify(*recorded(place, name), "--json")
    told = json.loads(done.out)
    assert (done.status, done.err, told["result"]) == (0, "", "event")
    assert told["event_type"].startswith(f"{name.partition(':')[0]}.")
    assert set(told["signed"]) <= set(told["signs_at_most"]) == set(SIGNED[name].scheme.covers)


@pytest.mark.parametrize("name", ["gitlab", "gitlab:signed", "sendgrid", "twilio"])
def test_one_under_another_secret_is_refused_with_a_sentence(place: Path, name: str) -> None:
    options = recorded(place, name)
    pair = SIGNED[name].scheme.pair
    assert pair is not None
    (place / "secret").write_text(pair(b"\x08" * 32)[0].reveal())
    done = verify(*options)
    assert (done.status, done.out) == (1, "")
    step: Step = "token_mismatch" if not SIGNED[name].scheme.covers else "signature_mismatch"
    assert done.err.splitlines()[0] == f"broker: refused at {step}: {WHY[step]}"


def test_it_is_told_in_lines_what_is_the_senders_word_only(place: Path) -> None:
    done = verify(*recorded(place))
    lines = dict(line.split(maxsplit=1) for line in done.out.splitlines())
    assert lines["event_type"].startswith("github.push")
    assert (lines["event_type_signed"], lines["delivery_id_signed"]) == ("false", "false")
    assert (lines["signed"], lines["secret"]) == ("body", "1")


def test_heads_that_an_editor_wrote_with_bare_line_feeds_are_read_too(place: Path) -> None:
    options = recorded(place)
    (place / "request.http").write_bytes(raw(sample(SIGNED["github"])[0], line_end=b"\n"))
    assert verify(*options).status == 0


def test_the_body_counts_to_the_byte_also_where_it_is_no_text(place: Path) -> None:
    body = b'{"a": "\xff\x00\r\n\r\n"}'
    assert verify(*recorded(place, body=body)).status == 0
    assert read_request((place / "request.http").read_bytes()).body == body


def test_the_second_of_two_secrets_is_found_and_named(place: Path) -> None:
    options = recorded(place)
    (place / "other").write_text(TEXT)
    done = verify("--secret-file", "other", *options, "--json")
    assert json.loads(done.out)["secret"] == 2


def test_the_request_may_come_from_standard_input(place: Path) -> None:
    options = recorded(place)
    text = (place / "request.http").read_text()
    assert verify(*options[:-1], "-", given=text).status == 0


def test_a_handshake_is_told_with_its_answer_and_a_secret_that_it_brings_is_not_shown(place: Path) -> None:
    (place / "hello.http").write_text("GET /webhooks/src_1?challenge=hello%20you HTTP/1.1\n\n")
    told = json.loads(verify("--provider", "dropbox", "hello.http", "--json", WEBHOOK_SECRET=TEXT).out)
    assert (told["result"], told["answer_body"]) == ("handshake", "hello you")


# --- where the secret comes from ------------------------------------------------------------------------------------------


def test_the_secret_may_stand_in_the_environment_and_no_output_shows_it(place: Path) -> None:
    request = sign_sample(SIGNED["github"], Sample("push", URL, NOW, "1"), Secret(TEXT))
    (place / "request.http").write_bytes(raw(request))
    for flags in ((), ("--json",)):
        done = verify(*GITHUB, "request.http", *flags, WEBHOOK_SECRET=TEXT)
        assert done.status == 0
        refused = verify(*GITHUB, "request.http", *flags, WEBHOOK_SECRET=TEXT + "x")
        assert refused.status == 1
        assert TEXT not in done.out + done.err + refused.out + refused.err


def test_without_a_secret_and_a_terminal_it_says_how_to_give_one(place: Path) -> None:
    (place / "request.http").write_bytes(raw(sample(SIGNED["github"])[0]))
    done = verify(*GITHUB, "request.http")
    assert (done.status, done.err) == (1, "broker: there is no secret: give --secret-file or WEBHOOK_SECRET\n")


def test_on_a_terminal_the_secret_is_asked_for_and_not_echoed(place: Path) -> None:
    request = sign_sample(SIGNED["github"], Sample("push", URL, NOW, "1"), Secret(TEXT))
    (place / "request.http").write_bytes(raw(request))
    outer, inner = pty.openpty()
    command = [sys.executable, "-m", "broker", "webhooks", "verify", *GITHUB, "request.http"]
    with subprocess.Popen(  # noqa: S603 - the command under test
        command, cwd=place, env=environment(place), stdin=inner, stdout=inner, stderr=inner, start_new_session=True
    ) as process:
        os.close(inner)
        shown = b""
        while b"Secret: " not in shown:  # the space comes once nothing is echoed and nothing flushed any more
            shown += os.read(outer, 1000)
        os.write(outer, f"{TEXT}\n".encode())
        with contextlib.suppress(OSError):  # the end of a terminal is an error on Linux
            while piece := os.read(outer, 1000):
                shown += piece
        os.close(outer)
        assert process.wait(PATIENCE_SECONDS) == 0
    assert b"github.push" in shown
    assert TEXT.encode() not in shown


# --- what is not ----------------------------------------------------------------------------------------------------------


def test_a_line_break_that_an_editor_added_is_found(place: Path) -> None:
    options = recorded(place)
    for added in (b"\n", b"\r\n"):
        (place / "request.http").write_bytes(raw(sample(SIGNED["github"])[0]) + added)
        done = verify(*options)
        assert done.status == 1
        assert "genuine without the line break at the end of the file" in done.err


def test_a_body_of_another_length_than_the_head_says_is_remarked(place: Path) -> None:
    options = recorded(place)
    whole = (place / "request.http").read_bytes()
    (place / "request.http").write_bytes(whole.replace(b"User-Agent: sender", b"Content-Length: 999") + b"changed")
    told = json.loads(verify(*options, "--json").out)
    assert (told["result"], told["step"], told["why"]) == ("refused", "signature_mismatch", WHY["signature_mismatch"])
    assert re.search(r"The body has \d+ bytes and Content-Length says 999", told["notes"][0])


def test_an_old_recording_is_stale_and_is_judged_by_its_own_time(place: Path) -> None:
    options = recorded(place, "stripe")
    del options[options.index("--now") : options.index("--now") + 2]
    done = verify(*options)
    assert done.err.startswith("broker: refused at timestamp_stale: ")
    assert "--now" in done.err
    assert verify(*options, "--now", "2023-11-14T22:13:20Z").status == 0
    assert verify(*options, "--tolerance", "1e12").status == 0
    assert verify(*options, "--now", "2023-11-14T22:00:00+00:00").err.startswith("broker: refused at timestamp_ahead: ")


@pytest.mark.parametrize("now", ["yesterday", "2023-11-14T22:13:20", "-1"])
def test_a_time_that_could_mean_two_things_is_not_taken(place: Path, now: str) -> None:
    assert verify(*recorded(place), f"--now={now}").err.startswith("broker: --now ")


def test_where_the_address_is_signed_it_has_to_be_given_and_counts(place: Path) -> None:
    options = recorded(place, "square")
    at = options.index("--url")
    without = options[:at] + options[at + 2 :]
    assert verify(*without).err == "broker: this scheme signs the source's address; give it by --url\n"
    other = verify(*without, "--url", "https://elsewhere.test/")
    assert other.status == 1
    assert "The address counts" in other.err


BAD_FILES = {
    "is empty": (b"", "does not begin with a request line"),
    "is an answer": (b"HTTP/1.1 200 OK\r\n\r\n", "does not begin with a request line"),
    "has a line that is no field": (
        b"POST / HTTP/1.1\r\nA: b\r\nnonsense\r\n\r\n",
        "line 3 of the file is no header field",
    ),
    "has a folded field": (b"POST / HTTP/1.1\r\nA: b\r\n c\r\n\r\n", "line 3 of the file is no header field"),
    "has chunks": (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n", "in chunks"),
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_a_file_that_is_no_recorded_request_is_an_error_in_words(place: Path, what: str) -> None:
    content, said = BAD_FILES[what]
    (place / "request.http").write_bytes(content)
    done = verify(*GITHUB, "request.http", WEBHOOK_SECRET=TEXT)
    assert (done.status, done.out) == (1, "")
    assert said in done.err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--provider", "nobody"), "there is no such provider"),
        (("--provider", "github:other"), "known: github"),
        (("--provider", "oidc"), "posts no webhooks"),
        (("--provider", "github", "--setting", "x=y"), "a setting is not one that this kind of source has"),
        (("--provider", "github", "--setting", "x"), "NAME=VALUE"),
        (("--provider", "generic_hmac"), "the setting header is needed"),
        (("--provider", "github", "--secret-file", "nowhere"), "nowhere"),
    ],
)
def test_what_is_wrong_with_the_options_is_said(place: Path, options: tuple[str, ...], said: str) -> None:
    (place / "request.http").write_bytes(raw(sample(SIGNED["github"])[0]))
    done = verify(*options, "request.http", WEBHOOK_SECRET=TEXT)
    assert (done.status, done.out) == (1, "")
    assert said in done.err


def test_a_secret_setting_is_read_from_a_file(place: Path) -> None:
    (place / "token").write_text(f"{TEXT}\n")
    query = f"hub.mode=subscribe&hub.challenge=42&hub.verify_token={TEXT}"
    (place / "hello.http").write_text(f"GET /webhooks/src_1?{query} HTTP/1.1\n\n")
    options = ("--provider", "facebook", "hello.http", "--json")
    told = verify(*options, "--setting", "verify_token=@token", WEBHOOK_SECRET=TEXT)
    assert json.loads(told.out)["answer_body"] == "42"
    wrong = verify(*options, "--setting", "verify_token=another-one", WEBHOOK_SECRET=TEXT)
    assert json.loads(wrong.out)["step"] == "token_mismatch"


def test_a_generic_source_is_what_its_settings_say(place: Path) -> None:
    request = Received("POST", URL, ((b"x-sig", b"sha1=" + b"0" * 40),), b"{}")
    (place / "request.http").write_bytes(raw(request))
    words = ("header=X-Sig", "algorithm=sha1", "prefix=sha1=")
    settings = [word for text in words for word in ("--setting", text)]
    done = verify("--provider", "generic_hmac", *settings, "request.http", WEBHOOK_SECRET=TEXT)
    assert done.err.startswith("broker: refused at signature_mismatch: ")


NOBODY = "127.0.0.254"  # an address of loopback on which nobody listens


# --- keys that the provider publishes -------------------------------------------------------------------------------------

PUBSUB = ("--provider", "google:pubsub", "--setting", "audience=aud", "--setting", "account=push@example.test")


def test_nobody_is_asked_for_keys_unless_that_is_said(place: Path) -> None:
    key = RSAKey.generate_key(2048)
    token = jwt.encode({"alg": "RS256", "kid": "k1"}, {"iss": "https://accounts.google.com"}, key)
    (place / "request.http").write_text(f"POST / HTTP/1.1\nAuthorization: Bearer {token}\n\n{{}}")
    alone = verify(*PUBSUB, "request.http")
    assert alone.err.startswith("broker: refused at key_unavailable: ")
    assert "--fetch-keys" in alone.err
    nobody_there = {"BROKER_EGRESS_RESOLVE": f"www.googleapis.com:443:{NOBODY}"}
    asked = verify(*PUBSUB, "request.http", "--fetch-keys", **nobody_there)
    assert asked.err == f"broker: refused at key_unavailable: {WHY['key_unavailable']}\n"
    wrong = verify(*PUBSUB, "request.http", "--fetch-keys", BROKER_EGRESS_RESOLVE="nonsense")
    assert "BROKER_EGRESS_RESOLVE" in wrong.err


# --- the sentences --------------------------------------------------------------------------------------------------------


def test_every_step_has_one_sentence_and_the_guide_has_the_same() -> None:
    assert set(WHY) == set(get_args(Step))
    assert all(re.fullmatch(r"[A-Z][^\n]+\.", sentence) for sentence in WHY.values())
    assert len(set(WHY.values())) == len(WHY)
    page = (ROOT / "docs" / "webhooks.md").read_text("utf-8")
    assert dict(re.findall(r"^\| `([a-z_]+)` \| ([A-Z].*\.) \|$", page, re.MULTILINE)) == WHY
