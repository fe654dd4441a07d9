"""Commands that run the broker or look at how it would run: serve, worker, migrate, demo, config check."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import signal
import sys
from typing import Annotated, Any

import sqlalchemy as sa
import structlog
import typer
import uvicorn

from broker.app import database_of, open_parts, running_worker
from broker.callers import parse_key
from broker.cli.running import Json, fail, guarded, quiet_settings, show_done, show_rows
from broker.egress import Egress
from broker.integrations import parse_file
from broker.listening import BoundedHttp
from broker.settings import Settings, SettingsError, load_settings
from broker.telemetry import configure_logging, new_metrics
from broker.tracing.logs import sending_logs
from broker.vault.keyring import load_keyring
from providers import load_catalog

# Longer than load balancers keep an idle connection (60 s is usual): else they send a request into one that was just closed.
KEEP_ALIVE_SECONDS = 75
HIDDEN = ("keyring", "admin_key", "database_url", "provider_credentials")
log = structlog.get_logger()


def serve(
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Where to listen; 0.0.0.0 for every address of the machine.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="PORT", min=0, max=65535, help="The port to listen on.")] = 8000,
    workers: Annotated[
        int, typer.Option(metavar="COUNT", min=1, max=64, help="How many processes answer requests.")
    ] = 1,
    no_worker: Annotated[  # noqa: FBT002 - a flag
        bool, typer.Option("--no-worker", help="Leave the background jobs to `broker worker`.")
    ] = False,
) -> None:
    """Serve the API and the browser's routes.

    Runs until SIGTERM. The schema is brought to this version first. Background jobs (refreshing, sweeping, audit
    checkpoints) run in the same processes unless --no-worker is given.
    """
    settings = _started()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn raises it once more after an orderly end
    if settings.vault_secret_id_wrapped and workers > 1:
        fail("a wrapped secret id opens once: start single processes, each with one of its own, instead of --workers")
    guarded(lambda: asyncio.run(_try_opening(settings)))
    factory = "from_environment_without_worker" if no_worker else "from_environment"
    uvicorn.run(
        f"broker.app:{factory}",
        factory=True,
        host=host,
        port=port,
        workers=workers,
        http=BoundedHttp,
        lifespan="on",
        access_log=False,
        log_config=None,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=settings.grace_seconds,
    )


def _started() -> Settings:
    settings = guarded(load_settings)
    configure_logging(settings)
    _raise_open_files()
    return settings


def _raise_open_files() -> None:
    """Use as many open files as the machine allows: the usual soft limit, 1,024, is for programs that use ``select``."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # where the system allows less than it says
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def _try_opening(settings: Settings) -> None:
    """Open everything once, so that what is wrong is said here: a supervisor would start its processes again for ever.

    Not with a wrapped secret id, which opens once: there is one process then, and it says so itself.
    """
    if settings.vault_secret_id_wrapped:
        return
    async with open_parts(settings):
        return


def worker() -> None:
    """Run the background jobs by themselves.

    Refreshes what expires, sweeps, writes audit checkpoints, until SIGTERM. Any number may run beside any number of
    `broker serve --no-worker`; the database decides who does what.
    """
    settings = _started()

    async def run() -> None:
        stop, counters = _stop_event(), new_metrics()
        async with (
            sending_logs(settings, counters.log_lines_lost),
            open_parts(settings, counters=counters) as parts,
            parts.replicas.beating("worker"),
            running_worker(parts),
        ):
            log.info("worker.started")
            await stop.wait()

    guarded(lambda: asyncio.run(run()))


def _stop_event() -> asyncio.Event:
    """Return an event that SIGTERM and SIGINT set from now on."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop


def migrate(as_json: Json = False) -> None:  # noqa: FBT002 - a flag
    """Bring the database's schema to this version.

    Makes the database if there is none. `serve` and `worker` do this too when they start; run it by itself to have it done
    before.
    """

    async def run() -> str | None:
        database = database_of(quiet_settings())
        try:
            await database.migrate()
            return await database.schema_revision()
        finally:
            await database.aclose()

    revision = guarded(lambda: asyncio.run(run()))
    show_done(f"The schema is at revision {revision}.", {"revision": revision}, as_json=as_json)


def demo(
    keep_serving: Annotated[  # noqa: FBT002 - a flag
        bool, typer.Option("--serve", help="Leave everything running afterwards, and print what to click.")
    ] = False,
) -> None:
    """Walk the whole way against a sandbox provider.

    No account anywhere is needed, your settings are not read, and nothing is left afterwards.
    """
    from broker.demo.walk import run_demo  # noqa: PLC0415 - the demo's parts are not loaded by a server

    raise typer.Exit(asyncio.run(run_demo(keep_serving=keep_serving)))


def config_check(as_json: Json = False) -> None:  # noqa: FBT002 - a flag
    """Say what is wrong with the settings, or what is in force.

    No secret is shown. Nothing is started and nobody is called. Files that a setting names are read.
    """
    settings = guarded(_checked)
    show_rows(_in_force(settings), ["setting", "value"], as_json=as_json)


def _checked() -> Settings:
    """Return the settings after all that can be checked without starting anything (SettingsError)."""
    settings = load_settings()
    if settings.keyring is not None or settings.keyring_file is not None:
        load_keyring(settings)
    if settings.admin_key is not None and parse_key(settings.admin_key.reveal()) is None:
        raise SettingsError("BROKER_ADMIN_KEY: must be a whole brk_ key, as `broker callers key` prints it")
    if settings.integrations_file is not None:
        parse_file(settings.integrations_file)
    if not _is_url(settings.effective_database_url):
        raise SettingsError("BROKER_DATABASE_URL: is not a URL")
    asyncio.run(_try_egress(settings))
    return settings


def _is_url(text: str) -> bool:
    try:
        return bool(sa.make_url(text))
    except (sa.exc.ArgumentError, ValueError):
        return False


async def _try_egress(settings: Settings) -> None:
    await Egress(settings).aclose()


def _in_force(settings: Settings) -> list[dict[str, Any]]:
    shown: dict[str, Any] = settings.model_dump(mode="json", exclude=set(HIDDEN))
    shown["database_url"] = sa.make_url(settings.effective_database_url).render_as_string(hide_password=True)
    shown["keyring"] = "given" if settings.keyring else "not given"
    shown["admin_key"] = "given" if settings.admin_key else "not given"
    rows = [{"setting": f"BROKER_{name.upper()}", "value": value} for name, value in sorted(shown.items())]
    prefixes = sorted(one.env_prefix for one in load_catalog().values() if one.env_prefix)
    for name in (f"{prefix}_{part}" for prefix in prefixes for part in ("CLIENT_ID", "CLIENT_SECRET")):
        given = name in settings.provider_credentials
        rows.append({"setting": name, "value": "given" if given else "not given"})
    return rows
