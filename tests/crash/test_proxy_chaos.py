"""Minutes of proxied calls to an API in trouble: each is answered, nothing hangs or leaks, and no POST arrives twice.

Fifty calls a second, each on a connection of its own: plain ones, uploads in pieces, event streams, callers who leave in the
middle. ``TEST_LONG=1`` (`make chaos`) makes it five minutes. What every answer has to be is decided from what the API did:
its own status, head and bytes; or, where it gave none, an error of ours by name. A body that was cut must not pass as whole.
"""

from __future__ import annotations

import asyncio
import base64
import collections
import contextlib
import json
import os
import random
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from broker.app import open_parts
from broker.imports import Import
from broker.integrations import Draft
from providers.spec import Secret
from tests.commands import environment, free_port
from tests.crash.processes import ADMIN, is_up
from tests.crash.trouble import HALVED, NO_HEAD, RIGHT, SHARES, Trouble, body_of, trouble
from tests.flows.rig import settings_for

LONG = os.environ.get("TEST_LONG") == "1"
SECONDS = 300.0 if LONG else 20.0
PER_SECOND = 50
SEED = 20_266
CONNECTIONS = 20
TIMEOUT_SECONDS = 1.5  # of a call, to the answer's head
PATIENCE_SECONDS = 3.0  # of a caller, for the next byte
LONGEST_SECONDS = 10.0  # of a call, all in all
SETTLE_SECONDS = 15.0
QUIET_SECONDS = 4.0
FLAT_BYTES = 16 * 1024 * 1024
UPLOAD_PIECES, PIECE = 20, b"u" * 10_000
NAMED = frozenset(
    {"provider_unavailable", "upstream_timeout", "upstream_invalid", "rate_limited", "circuit_open", "overloaded"}
)
STATUSES = {"error": 500, "limit": 429, "rest": 429, "early": 413}


@dataclass(frozen=True)
class Kind:
    """A kind of call. ``leaves``: its caller hangs up in the middle."""

    method: str
    path: str
    body: str = ""  # "", "plain" or "pieces"
    idempotency_key: bool = False
    leaves: bool = False

    @property
    def once(self) -> bool:
        """Whether the API may see it only once: it is not idempotent, and no key says that it may be repeated."""
        return self.method == "POST" and not self.idempotency_key


KINDS = (
    *[Kind("GET", "/json")] * 6,
    *[Kind("POST", "/json", "plain")] * 5,
    *[Kind("POST", "/json", "plain", idempotency_key=True)] * 2,
    *[Kind("POST", "/json", "pieces")] * 2,
    Kind("PUT", "/json", "pieces"),
    *[Kind("GET", "/events")] * 2,
    *[Kind("GET", "/large")] * 2,
    Kind("GET", "/events", leaves=True),
    Kind("GET", "/large", leaves=True),
    Kind("POST", "/json", "pieces", leaves=True),
)


@dataclass
class Answer:
    """What a caller got. ``whole``: the body came to the end that its head promises; ``status`` 0: there was no head."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    whole: bool = False
    seconds: float = 0.0
    gave_up: bool = False


@dataclass
class Run:
    """One run: what was asked for and answered, by nonce."""

    port: int
    pid: int
    key: str
    ids: Sequence[str]
    tokens: dict[str, str]  # nonce → the credential that the API has to see
    asked: dict[str, Kind] = field(default_factory=dict)
    answers: dict[str, Answer] = field(default_factory=dict)
    sizes: list[int] = field(default_factory=list)


# --- the callers


async def call(run: Run, nonce: str, kind: Kind, connection_id: str) -> None:
    """Make one call on a connection of its own, and keep what came of it."""
    run.asked[nonce] = kind
    answer = run.answers[nonce] = Answer()
    started = time.monotonic()
    reader, writer = await asyncio.open_connection("127.0.0.1", run.port)
    sending = asyncio.create_task(send(writer, run, nonce, kind, connection_id))
    try:
        await receive(reader, answer, leaves=kind.leaves and not kind.body)
    except (OSError, asyncio.IncompleteReadError, ValueError):
        pass  # judged by how far it came
    except TimeoutError:
        answer.gave_up = True
    finally:
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        writer.close()
        answer.seconds = time.monotonic() - started


async def send(writer: asyncio.StreamWriter, run: Run, nonce: str, kind: Kind, connection_id: str) -> None:
    """Send the request; the one that leaves closes in the middle of its pieces."""
    more = {
        "": "",
        "plain": f"Content-Length: {len(PIECE)}\r\n",
        "pieces": "Transfer-Encoding: chunked\r\n",
    }[kind.body]
    if kind.idempotency_key:
        more += f"Idempotency-Key: {nonce}\r\n"
    writer.write(
        f"{kind.method} /proxy/{connection_id}{kind.path} HTTP/1.1\r\nHost: broker\r\nAuthorization: Bearer {run.key}\r\n"
        f"X-Nonce: {nonce}\r\nX-Broker-Timeout-Ms: {TIMEOUT_SECONDS * 1000:.0f}\r\n{more}\r\n".encode()
    )
    if kind.body == "plain":
        writer.write(PIECE)
    elif kind.body == "pieces":
        for number in range(UPLOAD_PIECES):
            if kind.leaves and number == UPLOAD_PIECES // 2:
                writer.close()
                return
            writer.write(b"%x\r\n%b\r\n" % (len(PIECE), PIECE))
            await writer.drain()
            await asyncio.sleep(0.005)
        writer.write(b"0\r\n\r\n")
    with contextlib.suppress(OSError):
        await writer.drain()


async def receive(reader: asyncio.StreamReader, answer: Answer, *, leaves: bool) -> None:
    """Read an answer; one who leaves does so when the first bytes of the body are there."""

    async def next_bytes(most: int = 65_536) -> bytes:
        async with asyncio.timeout(PATIENCE_SECONDS):
            return await reader.read(most)

    async with asyncio.timeout(PATIENCE_SECONDS):
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    answer.headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:-2])}
    answer.status = int(head[0].split(" ")[1])
    if leaves:
        answer.body = await next_bytes(100)
        return
    if "content-length" in answer.headers:
        left = int(answer.headers["content-length"])
        while left and (piece := await next_bytes(left)):
            answer.body += piece
            left -= len(piece)
        answer.whole = left == 0
        return
    while (size := int(await line_of(reader), 16)) != 0:
        while size and (piece := await next_bytes(size)):
            answer.body += piece
            size -= len(piece)
        if size or await line_of(reader):
            return
    answer.whole = True


async def line_of(reader: asyncio.StreamReader) -> bytes:
    """Return the next line; ValueError or IncompleteReadError when none comes."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        return (await reader.readuntil(b"\r\n")).removesuffix(b"\r\n")


async def keep_calling(run: Run, seconds: float, chance: random.Random, kinds: Sequence[Kind], prefix: str) -> None:
    """Let calls begin at a steady rate, whatever becomes of those before."""
    began, number = time.monotonic(), 0
    async with asyncio.TaskGroup() as calls:
        while number < seconds * PER_SECOND:
            connection_id, nonce = chance.choice(run.ids), f"{prefix}{number}"
            run.tokens[nonce] = f"Bearer {token_of(connection_id, run.ids)}"
            calls.create_task(call(run, nonce, chance.choice(kinds), connection_id))
            number += 1
            if number % PER_SECOND == 0:
                run.sizes.append(resident_bytes(run.pid))
            await asyncio.sleep(max(0.0, began + number / PER_SECOND - time.monotonic()))


def token_of(connection_id: str, ids: Sequence[str]) -> str:
    """Return the credential of a connection."""
    return f"tok_{ids.index(connection_id):030d}"


# --- what every call has to have come to


def complaint(run: Run, state: Trouble, nonce: str) -> str | None:
    """Return what is wrong with a call, by what the API saw of it and did to it."""
    kind, answer, seen = run.asked[nonce], run.answers[nonce], state.arrivals.get(nonce, [])
    if any(arrival.authorization != run.tokens[nonce] for arrival in seen):
        return "went out with another credential"
    if kind.once and len(seen) > 1:
        return f"a POST arrived {len(seen)} times"
    if answer.seconds > LONGEST_SECONDS:
        return f"hung for {answer.seconds:.1f} s"
    return None if kind.leaves else complaint_of(kind, answer, nonce, [arrival.fate for arrival in seen])


def complaint_of(kind: Kind, answer: Answer, nonce: str, fates: Sequence[str]) -> str | None:
    """Return what is wrong with an answer to a caller who waited for it."""
    if answer.status == 0:
        return f"no answer (the API: {fates})"
    fate = fates[-1] if fates else "unseen"
    if (code := answer.headers.get("x-broker-error")) is not None:
        return complaint_of_ours(answer, code, fate)
    return complaint_of_theirs(kind, answer, nonce, fate)


def complaint_of_ours(answer: Answer, code: str, fate: str) -> str | None:
    """Return what is wrong with an answer that the broker made."""
    if code not in NAMED or not answer.whole or json.loads(answer.body)["code"] != code:
        return f"an error without its name: {answer.status} {code}"
    in_time = code != "upstream_timeout" or answer.seconds < TIMEOUT_SECONDS
    if fate in RIGHT and code != "rate_limited" and in_time:
        return f"{code} although the API answered"
    return None


def complaint_of_theirs(kind: Kind, answer: Answer, nonce: str, fate: str) -> str | None:
    """Return what is wrong with an answer that is the API's."""
    if answer.headers.get("x-from") != nonce or fate in NO_HEAD:
        return f"not the API's answer to this call ({fate}): {answer.status} {answer.headers}"
    if answer.status != STATUSES.get(fate, 200):
        return f"{answer.status} after {fate}"
    body = body_of(kind.path, nonce) if fate not in STATUSES else b"no: " + nonce.encode()
    if fate in HALVED:
        return "a cut answer passed as whole" if answer.whole or not body.startswith(answer.body) else None
    if not answer.whole or answer.body != body:
        return f"the API's answer came as {len(answer.body)} bytes of {len(body)} ({fate})"
    return None


# --- the process


@contextlib.asynccontextmanager
async def broker_before(state: Trouble, place: Path, database_url: str) -> AsyncIterator[Run]:
    """Run `broker serve` in front of the API, with some connections and a caller."""
    url = "http://127.0.0.1:8000"
    keyring = f"chaos:{base64.b64encode(os.urandom(32)).decode()}"
    settings = settings_for(place, public_url=url, database_url=database_url, keyring=keyring)
    async with open_parts(settings) as parts:
        config = {"api_base_url": f"http://127.0.0.1:{state.port}", "circuit_breaker": {"failure_threshold": 100_000}}
        draft = Draft("chaos", "github", client_id="chaos", client_secret=Secret("chaos-secret"), config=config)
        await parts.integrations.create(draft, ADMIN)
        ids: list[str] = []
        for number in range(CONNECTIONS):
            credentials = {"type": "oauth2", "access_token": f"tok_{number:030d}"}
            made = await parts.connections.import_(Import("chaos", f"user:{number}", credentials), ADMIN)
            ids.append(made.id)
        grant = {"integrations": ["chaos"], "may": ["proxy"]}
        key = (await parts.callers.add("chaos", ["service"], [grant], actor="cli"))[1].reveal()
    port = free_port()
    variables = {
        **{name: "" for name in os.environ if name.startswith("COVERAGE_")},
        "BROKER_ENV": "development",
        "BROKER_PUBLIC_URL": url,
        "BROKER_KEYRING": keyring,
        "BROKER_DATA_DIR": str(place),
        "BROKER_DATABASE_URL": database_url,
    }
    command = (
        sys.executable,
        "-m",
        "tests.crash.counted",
        str(place / "tasks"),
        "serve",
        "--no-worker",
        "--port",
        str(port),
    )
    with (place / "broker.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *command, env=environment(place, **variables), cwd=place, stdout=log, stderr=log
        )
        try:
            await is_up(port)
            yield Run(port, process.pid, key, ids, {})
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            await process.wait()


def resident_bytes(pid: int) -> int:
    """Return the resident memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def sockets_of(pid: int) -> int:
    """Return how many sockets a process has open."""
    found = 0
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found += str(entry.readlink()).startswith("socket:")
    return found


async def tasks_of(run: Run, place: Path) -> collections.Counter[str]:
    """Return the tasks that the broker has, by the names of their coroutines."""
    told = place / "tasks"
    told.unlink(missing_ok=True)
    os.kill(run.pid, signal.SIGUSR1)
    await until(told.exists)
    return collections.Counter(told.read_text(encoding="utf-8").splitlines())


async def until(condition: Callable[[], bool], seconds: float = SETTLE_SECONDS) -> bool:
    """Wait until something holds; return whether it did in time."""
    ends_at = time.monotonic() + seconds
    while not condition() and time.monotonic() < ends_at:  # noqa: ASYNC110 - another process makes it true
        await asyncio.sleep(0.02)
    return condition()


async def at_rest(run: Run, state: Trouble, place: Path) -> tuple[int, collections.Counter[str]]:
    """Close the API's kept connections; return sockets and tasks of the broker when it does nothing any more.

    What it notes behind the calls is written within two seconds: it is at rest when nothing gets less any more.
    """
    assert await until(lambda: state.busy == 0), f"{state.busy} calls are still open at the API"
    state.close_idle()
    await until(lambda: not state.writers)
    found = sockets_of(run.pid), await tasks_of(run, place)
    ends_at, fewer_at = time.monotonic() + SETTLE_SECONDS, time.monotonic() + QUIET_SECONDS
    while time.monotonic() < min(ends_at, fewer_at):
        await asyncio.sleep(0.1)
        now = sockets_of(run.pid), await tasks_of(run, place)
        if now[0] < found[0] or now[1].total() < found[1].total():
            found, fewer_at = now, time.monotonic() + QUIET_SECONDS
    return found


# --- the test


@pytest.mark.timeout(SECONDS + 120)
async def test_an_api_in_trouble_leaves_no_call_unanswered_and_nothing_behind(tmp_path: Path, sqlite_url: str) -> None:
    chance = random.Random(SEED)  # noqa: S311 - repeatable, not secret
    async with trouble() as state, broker_before(state, tmp_path, sqlite_url) as run:
        await keep_calling(run, 1.0, chance, KINDS, "warm")
        sockets, tasks = await at_rest(run, state, tmp_path)
        state.seed = SEED
        await keep_calling(run, SECONDS, chance, KINDS, "n")
        sockets_after, tasks_after = await at_rest(run, state, tmp_path)
        report(run, state, (sockets, sockets_after), (tasks, tasks_after))
        complaints = {nonce: text for nonce in run.asked if (text := complaint(run, state, nonce))}
        assert complaints == {}, defects(tmp_path)
        assert sockets_after <= sockets
        assert tasks_after - tasks == collections.Counter()
        assert enough(run, state)
        quarter = len(run.sizes) // 4
        assert run.sizes[-1] - max(run.sizes[quarter : 2 * quarter]) < FLAT_BYTES


def defects(place: Path) -> str:
    """Return what the broker's log says of defects: each, and where it was."""
    return "\n".join(
        re.findall(r"[^\n]*proxy\.defect.*?(?=\n\d{4}-)", (place / "broker.log").read_text(), re.DOTALL)[:5]
    )


def enough(run: Run, state: Trouble) -> bool:
    """Whether the run was one: every kind of trouble came (the rare ones in the long form), and most calls got through."""
    met = collections.Counter(arrival.fate for seen in state.arrivals.values() for arrival in seen)
    common = [name for name, share in SHARES.items() if LONG or share >= 0.02]
    got_through = sum(answer.status == 200 and answer.whole for answer in run.answers.values())
    return all(met[name] for name in common) and got_through > len(run.asked) / 2


def report(
    run: Run, state: Trouble, sockets: tuple[int, int], tasks: tuple[collections.Counter[str], collections.Counter[str]]
) -> None:
    """Print the figures, for `-s` and for a failure."""
    answers = run.answers.values()
    ours = collections.Counter(one.headers.get("x-broker-error", "the API's") for one in answers if one.status)
    times = sorted(one.seconds for one in answers)
    arrived = collections.Counter(len(state.arrivals.get(nonce, ())) for nonce, kind in run.asked.items() if kind.once)
    print(f"\n{len(answers)} calls, answers {dict(ours)}; POSTs without a key by arrivals {dict(arrived)}")  # noqa: T201
    print(f"seconds: p50 {times[len(times) // 2]:.3f}, p99 {times[-len(times) // 100]:.3f}, most {times[-1]:.3f}")  # noqa: T201
    print(f"sockets {sockets}, tasks {tuple(one.total() for one in tasks)}")  # noqa: T201
    print(f"MiB {[round(size / 2**20) for size in run.sizes[:: max(1, len(run.sizes) // 10)]]}")  # noqa: T201
