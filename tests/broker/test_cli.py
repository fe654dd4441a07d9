"""Every command runs for real: what it prints, how it fails, and that it shows no secret but a new key, once."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
import typer
from typer.testing import CliRunner

from broker import __version__
from broker.callers import mint_key
from broker.cli import main
from broker.cli.running import printable
from providers import load_catalog
from tests.commands import PATIENCE_SECONDS, Done, broker, environment, free_port, logging_as_before, running
from tests.flows.rig import APP, Rig, open_rig

MIGRATIONS = Path(__file__).parents[2] / "broker" / "migrations" / "versions"

CANARY = "CANARY-0123456789"
GRANT = '{"integrations": ["*"], "may": ["connect", "token"]}'


@dataclass
class Terminal:
    """Somebody's shell in a folder of its own, with the variables that are set there."""

    place: Path
    variables: dict[str, str]

    def run(self, *arguments: str, given: str = "", **variables: str) -> Done:
        """Run a command inside this process; one that raises instead of failing fails the test."""
        env = {**self.variables, **variables}
        ended = CliRunner(env=env).invoke(main, list(arguments), input=given)
        if ended.exception is not None and not isinstance(ended.exception, SystemExit):
            raise ended.exception
        return Done(ended.exit_code, ended.stdout, ended.stderr)

    def ok(self, *arguments: str, given: str = "", **variables: str) -> str:
        """Run a command that must succeed without a word on standard error; return what it prints."""
        done = self.run(*arguments, given=given, **variables)
        assert (done.status, done.err) == (0, "")
        return done.out

    def json(self, *arguments: str, **variables: str) -> Any:
        """Run a command with --json; return what it says."""
        return json.loads(self.ok(*arguments, "--json", **variables))

    def refused(self, *arguments: str, given: str = "", **variables: str) -> str:
        """Run a command that must fail, with nothing on standard output; return standard error."""
        done = self.run(*arguments, given=given, **variables)
        assert done.status != 0
        assert done.out == ""
        assert "Traceback" not in done.err
        return done.err


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    """Give a shell in an empty folder with development settings."""
    for name in [name for name in os.environ if name.startswith(("BROKER_", "GITHUB_", "GOOGLE_"))]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    with logging_as_before():
        yield Terminal(tmp_path, {"BROKER_ENV": "development"})


@pytest.fixture
def terminal(shell: Terminal, sqlite_template: bytes) -> Terminal:
    """Give a shell where the database is there already."""
    (shell.place / "broker-data").mkdir(mode=0o700)
    (shell.place / "broker-data" / "broker.db").write_bytes(sqlite_template)
    return shell


# --- the tree of commands -------------------------------------------------------------------------------------------------


def tree(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield every group and command with its path."""
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from tree(inner, (*path, name))


COMMANDS = dict(tree(typer.main.get_command(main)))


def test_the_commands_of_the_contract_are_there() -> None:
    expected = """demo, serve, worker, migrate, config check, callers add, callers list, callers revoke, callers key,
        connections list, connections show, connections confirm, connections revoke, integrations list, integrations add,
        integrations test, integrations export, integrations import, providers list, providers show, providers new,
        providers check, audit tail, audit verify, doctor"""
    wanted = {tuple(path.split()) for path in expected.split(",")}
    assert wanted - COMMANDS.keys() == set()


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: " ".join(("broker", *path)))
def test_help_says_what_a_command_and_each_of_its_parameters_does(path: tuple[str, ...]) -> None:
    command = COMMANDS[path]
    done = CliRunner().invoke(main, [*path, "--help"])
    assert (done.exit_code, done.stderr) == (0, "")
    said = re.sub(r"\s", "", done.stdout)  # lines are broken at hyphens too
    for sentence in [command.help, *(one.help for one in command.params)]:
        assert sentence
        assert sentence[0].isupper() or sentence.startswith(("admin,", "encryption,", "freeze "))
        assert sentence.rstrip().endswith((".", "con_…", "clr_…", "rot_…", "rev_…"))
        assert re.sub(r"\s", "", sentence) in said
    assert "<str>" not in done.stdout.partition("Options:")[2]
    assert all(len(line) <= 80 for line in done.stdout.splitlines())


@pytest.mark.parametrize("path", [path for path in COMMANDS if hasattr(COMMANDS[path], "commands")], ids=str)
def test_a_list_of_commands_cuts_no_sentence_off(path: tuple[str, ...]) -> None:
    done = CliRunner().invoke(main, [*path, "--help"])
    assert "..." not in done.stdout.partition("Commands:")[2]


def test_a_group_without_a_command_shows_its_help() -> None:
    done = CliRunner().invoke(main, ["callers"])
    assert "Commands:" in done.output


def test_it_runs_as_a_module_and_tells_its_version(tmp_path: Path) -> None:
    assert broker("--version", place=tmp_path) == Done(0, f"{__version__}\n", "")
    unknown = broker("fly", place=tmp_path)
    assert (unknown.status, unknown.out) == (2, "")
    assert "Traceback" not in unknown.err


# --- config check ---------------------------------------------------------------------------------------------------------


def test_config_check_shows_what_is_in_force_and_no_secret(shell: Terminal) -> None:
    key = mint_key()[1].reveal()
    keyring = f"k1:{'QUFB' * 10}QUE="
    shown = shell.ok(
        "config",
        "check",
        BROKER_ADMIN_KEY=key,
        BROKER_KEYRING=keyring,
        BROKER_DATABASE_URL=f"postgresql+asyncpg://broker:{CANARY}@db.test/broker",
        GITHUB_CLIENT_SECRET=CANARY,
    )
    lines = dict(line.split(maxsplit=1) for line in shown.splitlines()[1:] if len(line.split()) > 1)
    assert lines["BROKER_ENV"] == "development"
    assert (lines["BROKER_ADMIN_KEY"], lines["BROKER_KEYRING"]) == ("given", "given")
    assert lines["BROKER_DATABASE_URL"] == "postgresql+asyncpg://broker:***@db.test/broker"
    assert (lines["GITHUB_CLIENT_SECRET"], lines["GITHUB_CLIENT_ID"]) == ("given", "not given")
    assert not any(secret in shown for secret in (key, keyring, CANARY))
    assert list(shell.place.iterdir()) == []


def test_config_check_speaks_json_too(shell: Terminal) -> None:
    rows = {row["setting"]: row["value"] for row in shell.json("config", "check", BROKER_RETURN_TO=f"{APP},{APP}/**")}
    assert rows["BROKER_RETURN_TO"] == [APP, f"{APP}/**"]


BAD_SETTINGS = {
    "BROKER_ENV": "staging",
    "BROKER_PUBLIC_URL": f"http://127.0.0.1:8000/{CANARY}",
    "BROKER_DATABASE_URL": f"mysql://{CANARY}@db.test/x",
    "BROKER_ROUTES": CANARY,
    "BROKER_VAULT": CANARY,
    "BROKER_KEYRING": CANARY,
    "BROKER_KEYRING_FILE": CANARY,
    "BROKER_SECRET_CACHE_SECONDS": "-1",
    "BROKER_AUDIT_SINKS": CANARY,
    "BROKER_AUDIT_CHECKPOINTS": CANARY,
    "BROKER_RETURN_TO": f"ftp://{CANARY}",
    "BROKER_DEFAULT_RETURN_TO": f"https://user@{CANARY}",
    "BROKER_EGRESS_ALLOW": "10.0.0.1/8",
    "BROKER_EGRESS_CA_FILE": CANARY,
    "BROKER_EGRESS_RESOLVE": CANARY,
    "BROKER_TRUSTED_PROXIES": CANARY,
    "BROKER_ADMIN_KEY": CANARY,
    "BROKER_INTEGRATIONS_FILE": CANARY,
    "BROKER_PUBLIC_ULR": "https://typo.test",
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_a_wrong_setting_is_named_and_its_value_is_not_shown(shell: Terminal, name: str) -> None:
    said = shell.refused("config", "check", **{name: BAD_SETTINGS[name]})
    assert name in said
    assert said.startswith("broker: ")
    assert CANARY not in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("url", ["sqlite:///", "sqlite:///:memory:", "sqlite:///x?mode=ro", "postgresql://h:port/x"])
def test_a_database_address_that_is_none_is_named(shell: Terminal, url: str) -> None:
    assert "BROKER_DATABASE_URL" in shell.refused("config", "check", BROKER_DATABASE_URL=url)
    assert "BROKER_DATABASE_URL" in shell.refused("migrate", BROKER_DATABASE_URL=url)


def test_production_without_its_settings_names_all_of_them(shell: Terminal) -> None:
    said = shell.refused("config", "check", BROKER_ENV="production")
    assert "BROKER_PUBLIC_URL" in said
    assert "BROKER_KEYRING" in said


@pytest.mark.parametrize(("name", "text"), [("broker.toml", "= nonsense"), (".env", "NONSENSE")])
def test_a_wrong_file_is_named(shell: Terminal, name: str, text: str) -> None:
    (shell.place / name).write_text(text)
    assert name in shell.refused("config", "check")


@pytest.mark.parametrize("command", ["serve", "worker"])
def test_what_would_run_long_says_at_once_what_is_wrong(shell: Terminal, command: str) -> None:
    assert "BROKER_ENV" in shell.refused(command, BROKER_ENV="nonsense")


# --- the database ---------------------------------------------------------------------------------------------------------


def test_migrate_makes_the_database_and_may_be_repeated(shell: Terminal) -> None:
    assert re.fullmatch(r"The schema is at revision \d{4}\.\n", shell.ok("migrate"))
    assert (shell.place / "broker-data" / "broker.db").is_file()
    assert list(shell.json("migrate")) == ["revision"]


@pytest.mark.parametrize("command", ["callers list", "audit verify", "integrations export", "connections list"])
def test_no_command_makes_an_empty_database_by_the_way(shell: Terminal, command: str) -> None:
    said = shell.refused(*command.split())
    assert "there is no database at broker-data/broker.db; `broker migrate` makes one" in said
    assert list(shell.place.iterdir()) == []


def test_a_question_makes_no_schema_in_an_empty_postgresql(shell: Terminal, empty_postgres_url: str) -> None:
    key = mint_key()[1].reveal()
    empty = {"BROKER_DATABASE_URL": empty_postgres_url, "BROKER_ADMIN_KEY": key}
    for question in (("callers", "list"), ("audit", "tail")):
        assert shell.refused(*question, **empty) == "broker: the database has no schema; `broker migrate` makes it\n"
    newest = max(MIGRATIONS.glob("[0-9]*.py")).name[:4]
    assert shell.ok("migrate", **empty) == f"The schema is at revision {newest}.\n"
    assert "admin" in shell.ok("callers", "list", **empty)


def test_a_database_that_cannot_be_used_is_an_error_in_words(shell: Terminal) -> None:
    (shell.place / "no.db").write_text("this is no database\n" * 100)
    assert "not available" in shell.refused("callers", "list", BROKER_DATABASE_URL="sqlite:///no.db")
    assert "SQLITE_NOTADB" in shell.refused("migrate", BROKER_DATABASE_URL="sqlite:///no.db")
    (shell.place / "file").touch()
    assert "file" in shell.refused("migrate", BROKER_DATA_DIR="file")
    nobody = f"postgresql://u:{CANARY}@127.0.0.1:{free_port()}/x"
    said = shell.refused("callers", "list", BROKER_DATABASE_URL=nobody)
    assert "not available; ConnectionRefusedError" in said
    assert CANARY not in said


# --- callers --------------------------------------------------------------------------------------------------------------

KEY = re.compile(r"brk_[a-z0-9]{26}_[A-Za-z0-9]{49}")


def test_a_key_is_whole_and_new_each_time(shell: Terminal) -> None:
    keys = {shell.ok("callers", "key").strip() for _ in range(2)} | {shell.json("callers", "key")["key"]}
    assert len(keys) == 3
    assert all(KEY.fullmatch(key) for key in keys)


def test_the_life_of_a_caller(terminal: Terminal) -> None:
    shown = terminal.ok("callers", "add", "notes app", "--role", "service", "--grant", GRANT)
    (key,) = KEY.findall(shown)
    made = dict(line.split(maxsplit=1) for line in shown.splitlines() if len(line.split()) > 1)
    assert (made["name"], made["roles"], made["key"]) == ("notes app", "service", key)

    (listed,) = terminal.json("callers", "list")
    assert (listed["id"], listed["grants"]) == (made["id"], [{**json.loads(GRANT), "mode": "enforce"}])
    second = terminal.json("callers", "add-key", made["id"])
    table = terminal.ok("callers", "list")
    assert second["id"] in table
    assert key not in table
    assert "two live keys" in terminal.refused("callers", "add-key", made["id"])

    assert terminal.ok("callers", "revoke", made["id"], "--key", second["id"]) == "Revoked.\n"
    assert second["id"] not in terminal.ok("callers", "list")
    assert terminal.json("callers", "revoke", made["id"])["revoked"] is True
    assert terminal.ok("callers", "list") == "There are none.\n"
    assert terminal.json("callers", "list") == []
    assert "no such thing" in terminal.refused("callers", "revoke", made["id"])


def test_a_caller_may_end_by_itself(terminal: Terminal) -> None:
    made = terminal.json("callers", "add", "x", "--role", "auditor", "--expires-at", "2030-01-31T00:00:00Z")
    assert made["expires_at"] == "2030-01-31T00:00:00.000Z"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--role", "king"], "/roles/0"),
        (["--role", "service", "--grant", '{"may": ["fly"]}'], "/grants/0/may/0"),
        (["--role", "service", "--grant", f'{{"{CANARY}'], "--grant"),
        (["--role", "service", "--grant", "[" * 100_000], "--grant"),
        (["--role", "service", "--expires-at", "tomorrow"], "/expires_at"),
        ([], "--role"),
    ],
)
def test_a_wrong_caller_is_refused_by_the_field(terminal: Terminal, arguments: list[str], named: str) -> None:
    said = terminal.refused("callers", "add", "app", *arguments)
    assert named in said
    assert CANARY not in said


def test_a_name_cannot_steer_the_terminal(terminal: Terminal) -> None:
    assert "/name" in terminal.refused("callers", "add", "\x1b[31mred", "--role", "service")
    assert printable("a\x1b[31m\x9b\u202eb\n") == "a\\u001b[31m\\u009b\\u202eb\\u000a"
    assert [printable(value) for value in (None, True, ["a", "b"], {"a": [1]}, 3)] == [
        "",
        "true",
        "a, b",
        '{"a": [1]}',
        "3",
    ]


def test_the_admin_key_of_the_settings_makes_the_first_admin(terminal: Terminal) -> None:
    key = terminal.ok("callers", "key").strip()
    (admin,) = terminal.json("callers", "list", BROKER_ADMIN_KEY=key)
    assert (admin["name"], admin["roles"]) == ("admin", ["admin"])
    assert "without an admin" in terminal.refused("callers", "revoke", admin["id"])


# --- integrations ---------------------------------------------------------------------------------------------------------


def test_client_secrets_are_added_tried_promoted_and_deleted(terminal: Terminal) -> None:
    terminal.ok("integrations", "add", "work", "--provider", "github", "--client-id", "me")
    (terminal.place / "one").write_text(f"{CANARY}-1\n")
    terminal.ok("integrations", "add-secret", "work", "--client-secret-file", "one")
    tried = json.loads(
        terminal.ok(
            *("integrations", "add-secret", "work", "--client-secret-file", "-", "--canary", "3", "--json"),
            given=f"{CANARY}-2\n",
        )
    )
    assert (tried["state"], tried["rotation_id"][:4]) == ("candidate", "rot_")
    newest, oldest = terminal.json("integrations", "secrets", "work")
    assert (newest["id"], newest["state"], oldest["state"]) == (tried["id"], "candidate", "live")
    assert "live" in terminal.ok("integrations", "promote-secret", "work", tried["id"])
    assert oldest["id"] in terminal.ok("integrations", "delete-secret", "work", oldest["id"])
    shown = terminal.ok("integrations", "secrets", "work")
    assert oldest["id"] not in shown
    assert CANARY not in shown
    assert terminal.run("integrations", "promote-secret", "work", "key_absent").status != 0


def test_an_integration_is_added_listed_and_carried_to_another_broker(terminal: Terminal) -> None:
    (terminal.place / "secret").write_text(f"{CANARY}\n")
    shown = terminal.ok(
        *("integrations", "add", "work", "--provider", "github", "--client-id", "me"),
        *("--client-secret-file", "secret", "--scope", "repo", "--scope", "read:user"),
    )
    assert "http://127.0.0.1:8000/oauth/work/callback" in shown
    listed = terminal.ok("integrations", "list")
    assert re.search(r"^work\s+github\s+active\s+me\s+repo, read:user$", listed, re.MULTILINE)

    (terminal.place / "plain.json").write_text(terminal.ok("integrations", "export"))
    (terminal.place / "words").write_text("four words are enough\n")
    sealed = terminal.ok("integrations", "export", "--passphrase-file", "words")
    (terminal.place / "sealed.json").write_text(sealed)
    assert "sealed_secrets" in sealed
    everything = shown + listed + sealed + (terminal.place / "plain.json").read_text()
    assert CANARY not in everything

    other = {"BROKER_DATA_DIR": "other"}
    terminal.ok("migrate", **other)
    assert terminal.ok("integrations", "import", "plain.json", **other) == "Created: work. Updated: none.\n"
    assert "configuring" in terminal.ok("integrations", "list", **other)
    done = terminal.run(
        *("integrations", "import", "sealed.json", "--passphrase-file", "-", "--json"),
        given="four words are enough\n",
        **other,
    )
    assert json.loads(done.out) == {"created": [], "updated": ["work"]}
    assert "active" in terminal.ok("integrations", "list", **other)


def test_a_client_secret_may_come_by_standard_input(terminal: Terminal) -> None:
    terminal.ok("integrations", "add", "google", "--client-id", "me", "--client-secret-file", "-", given=f"{CANARY}\n")
    (row,) = terminal.json("integrations", "list")
    assert (row["provider"], row["client_secrets"]) == ("google", 1)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("integrations add work --provider nobody", "/provider"),
        ("integrations add Work --provider github", "/name"),
        ("integrations add work --provider oidc", "issuer"),
        ("integrations add work --provider github --config []", "--config"),
        ("integrations add work --provider github --client-secret-file absent", "absent"),
        ("integrations add work --provider github --client-secret-file -", "the secret is empty"),
        ("integrations add work --provider github --client-secret-file binary", "not text"),
        ("integrations test absent", "no such thing"),
        ("integrations import absent", "absent"),
        ("integrations import list.json", "FILE"),
        ("integrations import other.json", "/format"),
        ("integrations import binary", "not text"),
        ("integrations export --passphrase-file short", "12 characters"),
        ("integrations export --passphrase-file folder", "folder"),
    ],
)
def test_a_wrong_instruction_about_integrations_is_refused(terminal: Terminal, arguments: str, named: str) -> None:
    (terminal.place / "binary").write_bytes(b"\xff\xfe\x00")
    (terminal.place / "list.json").write_text("[]")
    (terminal.place / "other.json").write_text("{}")
    (terminal.place / "short").write_text("short")
    (terminal.place / "folder").mkdir()
    assert named in terminal.refused(*arguments.split())


# --- providers ------------------------------------------------------------------------------------------------------------


def test_the_catalog_is_listed_and_shown(shell: Terminal) -> None:
    assert re.search(
        r"^github\s+GitHub\s+oauth2, api_key, github_app\s+https://", shell.ok("providers", "list"), re.MULTILINE
    )
    assert {row["name"] for row in shell.json("providers", "list")} >= {"github", "google", "oidc"}
    assert "default_scopes" in shell.ok("providers", "show", "github")
    assert shell.json("providers", "show", "oidc")["config_schema"]["properties"]["issuer"]
    assert "no such provider" in shell.refused("providers", "show", "absent")


def test_the_catalog_is_in_order(shell: Terminal) -> None:
    assert shell.ok("providers", "check") == f"In order: {', '.join(load_catalog())}.\n"
    assert shell.ok("providers", "check", "google") == "In order: google.\n"
    assert shell.json("providers", "check", "oidc") == {"ok": True, "problems": []}
    assert "no such provider" in shell.refused("providers", "check", "spec")


def test_a_new_providers_file_can_be_begun(shell: Terminal) -> None:
    text = shell.ok("providers", "new", "acme")
    assert text.startswith('"""Acme: ')
    assert "broker providers check acme" in text
    assert "a-z" in shell.refused("providers", "new", "Acme/../x")


@pytest.fixture
def own_catalog(tmp_path: Path) -> Callable[..., Done]:
    """Give a way to run commands over a copy of the catalog, which may then be spoilt."""
    root = Path(__file__).resolve().parents[2]
    folder = tmp_path / "own" / "providers"
    folder.mkdir(parents=True)
    for file in (root / "providers").iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    variables = {
        "PYTHONPATH": f"{tmp_path / 'own'}{os.pathsep}{root}",
        "COVERAGE_PROCESS_CONFIG": "",  # the copy is nobody's source
        "COVERAGE_PROCESS_START": "",
    }
    return lambda *arguments: broker(*arguments, place=tmp_path, **variables)


def test_a_skeleton_is_written_once_and_is_valid_as_it_stands(own_catalog: Callable[..., Done], tmp_path: Path) -> None:
    written = own_catalog("providers", "new", "acme", "--write")
    assert written == Done(0, f"{tmp_path}/own/providers/acme.py\n", "")
    assert own_catalog("providers", "check", "acme") == Done(0, "In order: acme.\n", "")
    again = own_catalog("providers", "new", "acme", "--write")
    assert (again.status, again.out) == (1, "")
    assert "nothing was written" in again.err


def test_a_spoilt_catalog_names_each_file_and_what_is_wrong(own_catalog: Callable[..., Done], tmp_path: Path) -> None:
    folder = tmp_path / "own" / "providers"
    own_catalog("providers", "new", "acme", "--write")
    text = (folder / "acme.py").read_text()
    (folder / "acme.py").write_text(text.replace('token_url="https://', 'token_url="http://'))
    (folder / "broken.py").write_text("def (:\n")
    done = own_catalog("providers", "check")
    assert (done.status, done.out) == (1, "")
    assert "broker: acme: token_url must be an https URL" in done.err
    assert "broker: broken: cannot be imported: SyntaxError" in done.err
    assert "Traceback" not in done.err
    said = json.loads(own_catalog("providers", "check", "broken", "--json").out)
    assert (said["ok"], len(said["problems"])) == (False, 1)
    (folder / "broken.py").unlink()
    assert "broker: acme: token_url" in own_catalog("providers", "list").err


# --- connections ----------------------------------------------------------------------------------------------------------


@dataclass
class Beside:
    """A shell on the machine of a running broker."""

    rig: Rig
    terminal: Terminal

    async def run(self, *arguments: str, given: str = "") -> Done:
        """Run a command beside the broker that this loop serves."""
        return await asyncio.to_thread(self.terminal.run, *arguments, given=given)


@pytest.fixture
async def beside(shell: Terminal) -> Any:
    """Give a running broker and a shell over its data."""
    async with open_rig(shell.place / "data") as rig:
        yield Beside(
            rig, Terminal(shell.place, {**shell.variables, "BROKER_DATA_DIR": "data", "BROKER_PUBLIC_URL": rig.base})
        )


async def test_a_connection_is_confirmed_shown_and_revoked(beside: Beside) -> None:
    came = await beside.rig.flow()
    pending = await beside.run("connections", "list", "--status", "pending")
    assert came["connection_id"] in pending.out
    confirm = ("connections", "confirm", came["connection_id"], "--subject", "acme:42", "--return-to", APP)
    wrong = await beside.run(*confirm, "--code", CANARY)
    assert (wrong.status, wrong.out) == (1, "")
    assert "confirmation code is not valid" in wrong.err
    assert CANARY not in wrong.err
    confirmed = await beside.run(*confirm, given=f"{came['confirm']}\n")
    assert (confirmed.status, confirmed.err) == (0, "")
    assert re.search(r"^status\s+active$", confirmed.out, re.MULTILINE)
    assert came["confirm"] not in confirmed.out

    listed = await beside.run("connections", "list", "--subject", "acme:42", "--integration", "sandbox")
    assert re.search(rf"^{came['connection_id']}\s+sandbox\s+acme:42\s+Ada Lovelace\s+active", listed.out, re.MULTILINE)
    shown = json.loads((await beside.run("connections", "show", came["connection_id"], "--json")).out)
    assert shown["account"]["name"] == "Ada Lovelace"
    assert "acme:42" in (await beside.run("connections", "show", came["connection_id"])).out

    token = (await beside.rig.token(came["connection_id"])).json()["access_token"]
    revoked = await beside.run("connections", "revoke", came["connection_id"])
    assert revoked == Done(0, "Deleted. Revocation at the provider: revoked.\n", "")
    assert (await beside.rig.whoami(token)).status_code == 401
    gone = await beside.run("connections", "show", came["connection_id"])
    assert (gone.status, gone.out) == (1, "")


async def test_a_revoked_connection_may_leave_the_grant_alone(beside: Beside) -> None:
    connection = await beside.rig.connected()
    token = (await beside.rig.token(connection["id"])).json()["access_token"]
    done = await beside.run("connections", "revoke", connection["id"], "--keep-grant", "--json")
    assert json.loads(done.out) == {"id": connection["id"], "deleted": True, "revocation": "skipped"}
    assert (await beside.rig.whoami(token)).status_code == 200


async def test_a_list_that_was_cut_says_so(beside: Beside) -> None:
    for subject in ("acme:1", "acme:2"):
        await beside.rig.connected(subject)
    done = await beside.run("connections", "list", "--limit", "1", "--json")
    assert len(json.loads(done.out)) == 1
    assert "There are more" in done.err
    assert done.status == 0


async def test_an_integration_is_tested_by_real_calls(beside: Beside) -> None:
    good = await beside.run("integrations", "test", "sandbox")
    assert good.status == 0
    assert re.search(r"^client\s+true\s+fine$", good.out, re.MULTILINE)
    beside.rig.sandbox.state.add_fault("invalid_client")
    bad = await beside.run("integrations", "test", "sandbox", "--json")
    assert bad.status == 1
    assert json.loads(bad.out)["checks"][-1] == {
        "name": "client",
        "ok": False,
        "detail": "the provider refused the client id or secret",
    }


def test_a_status_that_is_none_and_a_connection_that_is_none_are_refused(terminal: Terminal) -> None:
    assert "reauthorization_required" in terminal.refused("connections", "list", "--status", "asleep")
    for command in (["show"], ["revoke"], ["confirm", "--subject", "a:b", "--code", "x"]):
        assert "no such thing" in terminal.refused("connections", command[0], "con_x", *command[1:])


def test_a_code_that_is_typed_is_not_shown(terminal: Terminal) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "broker", "connections", "confirm", "con_x", "--subject", "a:b"],
        cwd=terminal.place,
        env=environment(terminal.place, **terminal.variables),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    said = b""
    while b"Code: " not in said:  # the space comes when the terminal has stopped to echo
        said += os.read(ours, 1024)
    os.write(ours, f"{CANARY}\n".encode())
    assert process.wait(PATIENCE_SECONDS) == 1
    with contextlib.suppress(OSError):  # Linux: the other side is closed
        while more := os.read(ours, 1024):
            said += more
    os.close(ours)
    assert b"no such thing" in said
    assert CANARY.encode() not in said


# --- audit ----------------------------------------------------------------------------------------------------------------


def test_the_chain_is_shown_and_verified(terminal: Terminal) -> None:
    made = terminal.json("callers", "add", "app", "--role", "auditor")
    terminal.ok("callers", "revoke", made["id"])
    records = terminal.json("audit", "tail")
    assert [(one["number"], one["action"], one["actor"]) for one in records] == [
        (3, "caller.deleted", "cli"),
        (2, "caller.created", "cli"),
        (1, "caller.rows_taken_over", "system"),
    ]
    assert len(terminal.json("audit", "tail", "--limit", "1")) == 1
    assert len(terminal.json("audit", "tail", "--action", "caller.created", "--actor", "cli")) == 1
    assert terminal.ok("audit", "tail", "--connection", "con_x") == "There are none.\n"
    assert terminal.ok("audit", "verify") == "The chain is whole (records: 3, checkpoints: 0).\n"
    assert terminal.json("audit", "verify")["ok"] is True


TAMPERED = {
    "UPDATE audit_records SET actor = 'nobody' WHERE number = 2": ("at record 2 (edited)", 2),
    "DELETE FROM audit_records WHERE number = 1": ("at record 1 (removed)", 1),
    "DELETE FROM audit_records WHERE number = 4": ("at record 4 (cut_tail)", 4),
    "UPDATE audit_head SET count = 2": ("(head_forged)", None),
}


@pytest.mark.parametrize("statement", TAMPERED)
def test_a_chain_that_was_tampered_with_names_the_record(terminal: Terminal, statement: str) -> None:
    for _ in range(3):
        terminal.ok("callers", "add", "app", "--role", "auditor")
    with sqlite3.connect(terminal.place / "broker-data" / "broker.db") as database:
        database.execute(statement)
    database.close()
    words, number = TAMPERED[statement]
    said = terminal.refused("audit", "verify")
    assert words in said
    verdict = terminal.run("audit", "verify", "--json")
    assert (verdict.status, verdict.err) == (1, "")
    assert number in {None, json.loads(verdict.out)["first_broken"]}


def test_the_chain_can_be_verified_whatever_else_is_wrong(terminal: Terminal) -> None:
    terminal.ok("callers", "add", "app", "--role", "auditor")
    with sqlite3.connect(terminal.place / "broker-data" / "broker.db") as database:
        database.execute("UPDATE audit_head SET mac = 'forged'")
    database.close()
    key = terminal.ok("callers", "key").strip()
    assert "head" in terminal.refused("callers", "list", BROKER_ADMIN_KEY=key)
    assert "(head_forged)" in terminal.refused("audit", "verify", BROKER_ADMIN_KEY=key)


# --- processes ------------------------------------------------------------------------------------------------------------


def answers_ready(port: int) -> bool:
    """Wait until a broker says that it is ready."""
    ends_at = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < ends_at:
        try:
            answer = httpx2.get(f"http://127.0.0.1:{port}/health/ready", trust_env=False)
        except httpx2.TransportError:
            time.sleep(0.05)
            continue
        return answer.status_code == 200
    return False


@pytest.mark.parametrize(
    ("options", "number"),
    [
        ([], signal.SIGTERM),
        ([], signal.SIGINT),
        (["--workers", "2"], signal.SIGTERM),
        (["--no-worker"], signal.SIGTERM),
    ],
    ids=lambda value: " ".join(value) or "plain" if isinstance(value, list) else value.name,
)
def test_serve_answers_and_stops_in_an_orderly_way(tmp_path: Path, options: list[str], number: signal.Signals) -> None:
    port = free_port()
    command = (sys.executable, "-m", "broker", "serve", "--port", str(port), *options)
    with running(*command, place=tmp_path, variables={"BROKER_ENV": "development"}) as process:
        assert answers_ready(port)
        process.send_signal(number)
        said, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, said
    assert "Traceback" not in said


def test_the_worker_runs_by_itself_and_stops_in_an_orderly_way(tmp_path: Path) -> None:
    command = (sys.executable, "-m", "broker", "worker")
    with running(*command, place=tmp_path, variables={"BROKER_ENV": "development"}) as process:
        assert process.stdout is not None
        assert any("worker.started" in line for line in iter(process.stdout.readline, ""))
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, said
    assert "Traceback" not in said


def test_serve_fails_at_once_when_it_cannot_start(tmp_path: Path) -> None:
    nobody = f"postgresql://127.0.0.1:{free_port()}/x"
    done = broker("serve", "--workers", "2", place=tmp_path, BROKER_ENV="development", BROKER_DATABASE_URL=nobody)
    assert (done.status, done.out) == (1, "")
    assert "broker: The database is not available" in done.err
    assert "Traceback" not in done.err
