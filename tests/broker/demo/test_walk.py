"""The guided run tells every step, shows no secret, and fails when one of its steps does not hold."""

from __future__ import annotations

import asyncio
import io
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qsl, urljoin, urlsplit

import httpx2
import pytest

from broker.demo.browser import Browser, NoConsentPage, consent_form, redirect_of
from broker.demo.browser import main as browser_main
from broker.demo.sandbox import SandboxOptions, fault
from broker.demo.stage import free_port, listening, open_stage
from broker.demo.steps import STEPS, Walk, shortened
from broker.demo.walk import DEMO_OPTIONS, Narrator, run_demo, take_steps
from tests.commands import PATIENCE_SECONDS, Done, broker, logging_as_before, run, running

HOSTILE = {  # none of this may matter to the demo
    "BROKER_ENV": "production",
    "BROKER_NO_SUCH_SETTING": "1",
    "BROKER_DATABASE_URL": "postgresql://nowhere.test/x",
    "GITHUB_CLIENT_ID": "someone",
    "GITHUB_CLIENT_SECRET": "someones-secret",
    "HTTP_PROXY": "http://127.0.0.1:9",
    "ALL_PROXY": "http://127.0.0.1:9",
}
IDS = r"(?:con|ses)_[a-z0-9]{26}"


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Give the process its logging back after each test."""
    with logging_as_before():
        yield


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Done:
    place = tmp_path_factory.mktemp("demo")
    (place / "broker.toml").write_text('env = "nonsense"\n')
    return broker("demo", place=place, **HOSTILE)


def test_the_demo_ends_well_whatever_the_environment_holds(demo: Done) -> None:
    assert demo.status == 0, demo.err
    assert f"All {len(STEPS)} steps held" in demo.out
    assert demo.err == ""


@pytest.mark.parametrize(("number", "title"), list(enumerate([step.title for step in STEPS], 1)))
def test_each_step_is_told_with_what_was_seen(demo: Done, number: int, title: str) -> None:
    lines = demo.out.splitlines()
    at = lines.index(f"{number:>2}. {title}")
    assert re.fullmatch(r"    → .{10,}", lines[at + 1])


def test_piped_output_has_no_colour_codes(demo: Done) -> None:
    assert "\x1b" not in demo.out


def test_nothing_in_the_output_is_long_enough_to_be_a_secret(demo: Done) -> None:
    text = re.sub(IDS, "", demo.out)
    assert re.findall(r"[A-Za-z0-9_-]{25,}", text) == []
    assert re.findall(r"\b(?:brk|bst|sat|srt|sac)_\w{5,}", text) == []
    assert "someones-secret" not in text


async def walked(options: SandboxOptions = DEMO_OPTIONS) -> tuple[bool, Walk, str]:
    out = io.StringIO()
    async with open_stage(options=options) as stage:
        walk = Walk(stage)
        held = await take_steps(walk, Narrator(out))
        await walk.aclose()
    return held, walk, out.getvalue()


async def test_no_secret_of_the_run_is_printed_or_stands_in_a_repr() -> None:
    held, walk, told = await walked()
    assert held, told
    assert len(walk.secrets) >= 12
    shown = [name for name, secret in walk.secrets.items() if secret in told or secret in repr(walk)]
    assert shown == []
    assert shortened(walk.secrets["access token"]) in told


async def test_nothing_is_left_in_the_temporary_folder() -> None:
    async with open_stage(options=DEMO_OPTIONS) as stage:
        place = stage.data_dir
        assert (place / "broker.db").is_file()
    assert not place.exists()


async def test_where_old_tokens_live_on_the_step_says_so() -> None:
    held, _, told = await walked(SandboxOptions())
    assert held, told
    assert "with the old one" not in told


BROKEN = {
    "a provider that is not where it says": (
        SandboxOptions(issuer="http://127.0.0.1:9"),
        "A test makes the real calls",
    ),
    "a provider without the scopes": (SandboxOptions(scopes=("openid",)), "The provider asks her"),
    "a code that is dead on arrival": (SandboxOptions(code_seconds=-1), "Her browser comes back"),
    "no refresh token": (SandboxOptions(refresh_tokens="never"), "The app wants a new token at once"),
}


@pytest.mark.parametrize("case", sorted(BROKEN))
async def test_a_step_that_does_not_hold_ends_the_demo_with_a_reason(case: str) -> None:
    options, title = BROKEN[case]
    out = io.StringIO()
    assert await run_demo(keep_serving=False, options=options, out=out) == 1
    lines = out.getvalue().splitlines()
    at = next(place for place, line in enumerate(lines) if title in line)
    assert re.fullmatch(r"    ✗ step \d+ did not hold: .{10,}", lines[at + 1])
    assert "The end of the broker's log:" in out.getvalue()
    assert "steps held" not in out.getvalue()


async def test_a_step_that_raises_is_a_step_that_did_not_hold() -> None:
    out = io.StringIO()
    async with open_stage(options=DEMO_OPTIONS) as stage:
        stage.sandbox.state.faults.append(fault("drop_request", endpoint="api"))
        walk = Walk(stage)
        assert not await take_steps(walk, Narrator(out))
        await walk.aclose()
    assert "did not hold: RemoteProtocolError was raised" in out.getvalue()


# Serving on, for people


def addresses(lines: list[str]) -> list[str]:
    """Return what can be clicked, in the order of the page: app, start link, connect page, without an app."""
    return [found[0] for line in lines if (found := re.search(r"http://\S+", line)) and "BROKER_ENV" not in line]


def read_until(process: subprocess.Popen[str], wanted: str) -> list[str]:
    """Return the lines up to the one that holds ``wanted``."""
    assert process.stdout is not None
    lines: list[str] = []
    while not lines or wanted not in lines[-1]:
        line = process.stdout.readline()
        assert line, "".join(lines)
        lines.append(line)
    return lines


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], list[str], str]]:
    """Give a demo that keeps serving: the process, what can be clicked, and the command that confirms."""
    with running(sys.executable, "-m", "broker", "demo", "--serve", place=tmp_path, variables=HOSTILE) as process:
        read_until(process, "To click:")
        lines = read_until(process, "connections confirm")
        yield process, addresses(lines), lines[-1].strip()


Served = tuple[subprocess.Popen[str], list[str], str]


def ended(process: subprocess.Popen[str], number: signal.Signals) -> tuple[int, str]:
    """Send a signal; return status and the rest of the output."""
    process.send_signal(number)
    rest, _ = process.communicate(timeout=PATIENCE_SECONDS)
    return process.returncode, rest


def form_fields(page: str) -> dict[str, str]:
    """Return the hidden fields of the page's first form that has any."""
    return dict(re.findall(r'<input type="hidden" name="(\w+)" value="([^"]+)">', page))


async def through_the_provider(browser: Browser, start: str) -> httpx2.Response:
    """Go from a start link through the consent page to where the flow ends."""
    asked = redirect_of(await browser.follow(start))
    assert asked is not None
    assert "Allow “sandbox-demo” to use your account?" in (await browser.open(asked)).text
    back = await browser.follow(await browser.allow(asked, "grace"))
    target = redirect_of(back)
    return await browser.open(target) if target else back


async def test_a_person_can_click_through_all_of_it(served: Served) -> None:
    process, (app, start, choose, _), _ = served
    browser = Browser()
    page = await through_the_provider(browser, start)
    fields = form_fields(page.text)
    assert shortened(fields["confirm"]) in page.text
    async with httpx2.AsyncClient(base_url=app, trust_env=False) as http:
        confirmed = await http.post("/confirm", data=fields)
        assert "Grace Hopper" in confirmed.text
        used = await http.post("/use", data={"connection_id": fields["connection_id"]})
        assert "The provider&#39;s API answered" in used.text
        assert "200 {" in used.text
        again = await http.post("/use", data={"connection_id": fields["connection_id"], "refresh": "yes"})
        assert "200 {" in again.text
        assert "Connected as" in (await browser.follow(choose)).text
        gone = await http.post("/disconnect", data={"connection_id": fields["connection_id"]})
        assert "revoked" in gone.text
        assert "No account is connected yet." in (await http.get("/")).text
    await browser.aclose()
    assert ended(process, signal.SIGTERM) == (0, "Stopped; nothing is left of it.\n")


async def test_the_apps_own_links_lead_into_a_flow(served: Served) -> None:
    process, (app, *_), _ = served
    browser = Browser()
    connect = redirect_of(await browser.open(urljoin(app, "/connect"))) or ""
    choose = redirect_of(await browser.open(urljoin(app, "/choose"))) or ""
    came = await through_the_provider(browser, connect)
    assert "You are back from the provider" in came.text
    assert "Connect your accounts" in (await browser.follow(choose)).text
    await browser.aclose()
    assert ended(process, signal.SIGINT)[0] == 0


async def test_a_flow_without_an_app_is_confirmed_by_the_printed_command(served: Served, tmp_path: Path) -> None:
    process, (*_, bare), command = served
    browser = Browser()
    page = (await through_the_provider(browser, bare)).text
    await browser.aclose()
    connection, code = re.findall(r"confirm (con_\w+)", page), re.findall(r"--code ([\w-]+)", page)
    filled = command.replace("CONNECTION", connection[0]).replace("CODE", code[0])
    done = run("/bin/sh", "-c", filled, place=tmp_path)
    assert done.status == 0, done.err
    assert "active" in done.out
    assert code[0] not in done.out
    assert ended(process, signal.SIGTERM)[0] == 0


async def test_the_app_refuses_what_its_own_page_did_not_send(served: Served) -> None:
    process, (app, *_), _ = served
    async with httpx2.AsyncClient(base_url=app, trust_env=False) as http:
        crossed = await http.post("/confirm", headers={"Sec-Fetch-Site": "cross-site"}, data={"confirm": "x"})
        rebound = await http.get("/", headers={"Host": "attacker.test"})
        nowhere = await http.get("/nowhere")
        made_up = await http.post("/confirm", data={"connection_id": "../x", "confirm": "x"})
        tokenless = await http.post("/use", data={"connection_id": "con_x"})
        refused = await http.get("/connected?status=error&error=access_denied")
    assert [crossed.status_code, rebound.status_code, nowhere.status_code] == [403, 403, 404]
    assert "404 not_found" in made_up.text
    assert "404 not_found" in tokenless.text
    assert "access_denied" in refused.text
    assert ended(process, signal.SIGTERM)[0] == 0


# Stopping and starting


async def test_a_signal_on_the_way_ends_the_walk_and_cleans_up() -> None:
    out = io.StringIO()
    asyncio.get_running_loop().call_later(1.0, signal.raise_signal, signal.SIGTERM)
    slow = SandboxOptions(latency_seconds=30)
    assert await run_demo(keep_serving=False, options=slow, out=out) == 1
    assert "Stopped on the way." in out.getvalue()
    assert not asyncio.get_running_loop().remove_signal_handler(signal.SIGTERM)


def test_a_taken_port_gives_way_to_a_free_one() -> None:
    with listening(0) as first:
        taken = first.getsockname()[1]
        assert free_port(taken) == 0
        with listening(taken) as second:
            assert second.getsockname()[1] != taken
    assert free_port(taken) == taken


def test_a_terminal_without_unicode_gets_plain_letters() -> None:
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii")
    Narrator(out).saw("“ready” …")
    out.flush()
    assert raw.getvalue() == b'    -> "ready" ...\n'


# The browser without a screen


async def test_the_browser_goes_through_a_flow_and_says_where_it_ended(capsys: pytest.CaptureFixture[str]) -> None:
    async with open_stage(options=DEMO_OPTIONS) as stage:
        walk = Walk(stage)
        for step in STEPS[:4]:
            await step.act(walk)
        start = (await walk.new_session("notes:ada"))["start_urls"]["sandbox"]
        status = await asyncio.to_thread(browser_main, [start, "--user", "grace"])
    assert status == 0
    came = dict(parse_qsl(urlsplit(capsys.readouterr().out.strip()).query))
    assert came["status"] == "connected"
    assert came["confirm"]


async def test_the_browser_says_what_went_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    async with open_stage(options=DEMO_OPTIONS) as stage:
        assert await asyncio.to_thread(browser_main, [f"{stage.base}/oauth/nobody/start"]) == 1
        assert await asyncio.to_thread(browser_main, [f"{stage.app}:x"]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "browser: the link did not lead to a provider" in shown.err
    assert "Traceback" not in shown.err


async def test_a_circle_of_redirects_ends() -> None:
    async def circle(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 302 Found\r\nLocation: /again\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        writer.close()
        await writer.wait_closed()

    browser = Browser()
    async with await asyncio.start_server(circle, "127.0.0.1", 0) as server:
        with pytest.raises(httpx2.TooManyRedirects):
            await browser.follow(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/")
        with pytest.raises(NoConsentPage):
            await browser.allow(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/", "ada")
    await browser.aclose()


def test_a_page_without_a_form_is_no_consent_page() -> None:
    with pytest.raises(NoConsentPage):
        consent_form("<p>hello</p>")
    form = consent_form('<form action="/x"><input name="granted" value="a" checked><input name="granted" value="b">')
    assert (form.action, form.scopes) == ("/x", ["a"])
