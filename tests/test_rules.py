"""The project's own rules, read off the syntax trees and the lock files; each is shown to be able to fail.

A rule is a function from one file to its violations. `RULES` names where each applies. What no rule here covers is done
by ruff, mypy and import-linter.
"""

from __future__ import annotations

import ast
import json
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import packages_distributions as _packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from providers import load_catalog

ROOT = Path(__file__).resolve().parent.parent
LONGEST_FUNCTION_LINES = 40

# Who may open a secret, and why. A new line needs the same thought as a new dependency.
REVEALS: dict[str, str] = {
    "broker.api.callers": "shows a new caller key, once",
    "broker.api.connections": "puts the access token into the answer of a hand-out",
    "broker.api.sessions": "shows a new session's token and start addresses, once",
    "broker.api.subscriptions": "shows a new signing secret, once",
    "broker.api.token_exchange": "shows a token that was exchanged, once",
    "broker.api.webhook_sources": "shows a secret that was made for a source, once",
    "broker.app": "hands the confirm code to the page that shows it",
    "broker.callers": "finds who a key or a token belongs to",
    "broker.callers.keys": "keeps the digest of a new caller key",
    "broker.cli.callers": "prints a new caller key, once",
    "broker.cli.doctor.surroundings": "asks Redis whether it answers",
    "broker.cli.event_stream": "sends the caller key to the broker that was named",
    "broker.cli.processes": "checks the form of the admin key",
    "broker.cli.webhook_kinds": "has the settings of a source checked, which a command was given",
    "broker.cli.webhooks": "prints the secret that `listen` signs with, made for that run",
    "broker.connections": "keyed digest of a handed-out token for the audit record",
    "broker.credentials.renewals": "keeps a renewed token for the vault",
    "broker.credentials.stored_secrets": "writes a token answer to the vault",
    "broker.demo.stage": "makes the admin key with which the guided run plays the operator",
    "broker.integrations": "writes a client secret to the vault, and its keyed digest to the row",
    "broker.integrations.portable": "seals client secrets to a passphrase for export",
    "broker.oauth.device": "seals the device code",
    "broker.oauth.flow": "digests of cookie and confirm code; seals the PKCE verifier",
    "broker.oauth.identity": "reads an ID token",
    "broker.oauth.outcome": "the confirm code in the redirect and in the outcome to be sealed",
    "broker.oauth.routes": "sets the cookies of a flow and of a session",
    "broker.proxy.forward": "what an answer must not echo",
    "broker.proxy.opening": "hands the address of Redis to the limits",
    "broker.sessions": "digests of a session's token and cookie",
    "broker.settings": "defines the settings' own kind of secret",
    "broker.token_endpoint": "builds requests to a token endpoint",
    "broker.vault.hashicorp.adapter": "sends its token to Vault",
    "broker.vault.hashicorp.login": "sends the secret id, or the service account's token, to Vault",
    "broker.vault.keyring": "reads the key-encryption keys from the settings",
    "broker.web.console.routes": "sets the cookie of a session of the console",
    "broker.web.console.sessions": "checks the form of a caller key",
    "broker.webhooks.known_sources": "has the settings of a source checked by its provider's file",
    "broker.webhooks.opening": "hands the address of Redis to the limits",
    "broker.webhooks.secrets": "writes webhook secrets to the vault, and their keyed digest to the row",
    "broker.webhooks.signing": "signs a delivery",
    "broker.webhooks.source_config": "has a source's secret and settings checked by its provider's file",
    "broker.webhooks.subscription_config": "checks the form of a signing secret",
    "providers": "a provider's file builds the requests that carry its tokens",
}
OPENERS = ("reveal", "get_secret_value")

# Dependencies that no file of ours imports, and who does.
USED_UNSEEN = {
    "asyncpg": "SQLAlchemy's driver, named by the database URL",
    "greenlet": "SQLAlchemy's asyncio bridge",
}

# Words that are a provider's name and something else too: (module, word) -> what it means there.
NOT_A_PROVIDER: dict[tuple[str, str], str] = {
    ("broker.integrations.config", "linear"): "a kind of backoff",
    ("broker.integrations.config", "x"): "a letter that stands for a variable",
    ("broker.callers.signatures", "x"): "a member of a public key (RFC 7518 6.2)",
    ("broker.refresh", "resend"): "to send again",
    ("broker.tracing.exporting", "resend"): "to send again",
    ("broker.oauth.identity", "x"): "a member of a public key (RFC 7518 6.2)",
}

MOCK_LIBRARY = re.compile(r"(unittest\.)?mock\b|pytest_mock\b")
PATCHERS = {"monkeypatch", "mocker"}
MAY_PRINT = ("broker.cli", "broker.demo")
FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef
DECLARATIONS = ("broker.migrations.versions",)  # lists of columns, written once and then frozen
FIRST_PARTY = {"broker", "providers", "tests"}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Source:
    """One Python file: its path from the root, its module name and its syntax tree."""

    path: str
    tree: ast.Module

    @property
    def module(self) -> str:
        """The dotted name; a package's is that of its folder."""
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    def at(self, node: ast.stmt | ast.expr, what: str) -> str:
        """Return a violation that editors can jump to."""
        return f"{self.path}:{node.lineno}: {what}"


packages_distributions = cache(_packages_distributions)  # reads every installed package's metadata
Rule = Callable[[Source], list[str]]


@cache
def sources(*folders: str) -> tuple[Source, ...]:
    """Every Python file below these folders."""
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")) if _is_ours(path)]
    return tuple(Source(path.relative_to(ROOT).as_posix(), ast.parse(path.read_text("utf-8"))) for path in files)


def _is_ours(path: Path) -> bool:
    return not {"node_modules", "__pycache__"} & set(path.parts)


def _within(module: str, parents: tuple[str, ...]) -> bool:
    return any(module == parent or module.startswith(f"{parent}.") for parent in parents)


def _functions(tree: ast.Module) -> Iterator[FunctionNode]:
    return (node for node in ast.walk(tree) if isinstance(node, FunctionNode))


def _method_calls(tree: ast.Module, method: str) -> Iterator[tuple[ast.Call, ast.expr]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == method:
            yield node, node.func.value


def _docstring(node: FunctionNode | ast.ClassDef | ast.Module) -> ast.Expr | None:
    first = node.body[0] if node.body else None
    is_text = (
        isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    )
    return first if is_text and isinstance(first, ast.Expr) else None


# --- the rules ------------------------------------------------------------------------------------------------------------


def only_the_database_commits(source: Source) -> list[str]:
    """`Database.transaction` has the only commit."""
    if source.module == "broker.database":
        return []
    return [source.at(call, "commits; use Database.transaction") for call, _ in _method_calls(source.tree, "commit")]


def secrets_are_opened_where_listed(source: Source) -> list[str]:
    """`.reveal()` stands only in modules that `REVEALS` gives a reason for."""
    if source.module in REVEALS or _within(source.module, ("providers",)):
        return []
    return [source.at(call, "opens a secret; give the module a reason in REVEALS") for call in _openings(source)]


def _openings(source: Source) -> list[ast.Call]:
    return [call for opener in OPENERS for call, _ in _method_calls(source.tree, opener)]


def functions_are_short(source: Source) -> list[str]:
    """Signature and body, without the docstring, fit on one screen."""
    if _within(source.module, DECLARATIONS):
        return []
    found = []
    for node in _functions(source.tree):
        text = _docstring(node)
        documented = (text.end_lineno or 0) - text.lineno + 1 if text else 0
        length = (node.end_lineno or 0) - node.lineno + 1 - documented
        if length > LONGEST_FUNCTION_LINES:
            found.append(source.at(node, f"{node.name} has {length} lines, more than {LONGEST_FUNCTION_LINES}"))
    return found


def modules_begin_with_a_sentence(source: Source) -> list[str]:
    """Ask that the docstring's first line is one whole sentence."""
    first = (ast.get_docstring(source.tree, clean=False) or "").split("\n")[0]
    if re.fullmatch(r"[^\s].*\.", first) and not re.search(r"[a-z)`]\. [A-Z]", first):
        return []
    return [f"{source.path}:1: the first line does not say in one sentence what the file does"]


def nothing_of_ours_is_mocked(source: Source) -> list[str]:
    """Refuse mock libraries and patched objects: tests fake the other side of the wire."""
    imports = [node for node in ast.walk(source.tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    mocks = [node for node in imports if any(map(MOCK_LIBRARY.match, _imported(node)))]
    found = [source.at(node, "imports a mock library") for node in mocks]
    for method in ("setattr", "setitem", "patch"):
        patches = [call for call, owner in _method_calls(source.tree, method) if _text(owner) in PATCHERS]
        found += [source.at(call, "patches an object") for call in patches]
    return found


def _imported(node: ast.Import | ast.ImportFrom) -> list[str]:
    """Return the absolute names that a statement imports; none for a relative import."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [f"{node.module}.{alias.name}" for alias in node.names] if node.module and not node.level else []


def providers_are_not_named(source: Source) -> list[str]:
    """Find a provider's name outside its own file, in an identifier or a literal (docstrings may give examples).

    A name of one letter is a name only where it stands alone: it is a part of many others, such as ``X-Request-Id``.
    """
    return _named_providers(source, frozenset(load_catalog()))


def _named_providers(source: Source, names: frozenset[str]) -> list[str]:
    if _within(source.module, ("broker.demo",)):
        return []
    allowed = {word for module, word in NOT_A_PROVIDER if module == source.module}
    found = []
    for node, words in _words(source.tree):
        hits = sorted(name for name in words & (names - allowed) if len(name) > 1 or _text(node).lower() == name)
        found += [source.at(node, f"names the provider {name}") for name in hits]
    return found


def _words(tree: ast.Module) -> Iterator[tuple[ast.stmt | ast.expr, set[str]]]:
    documented = [node for node in ast.walk(tree) if isinstance(node, DOCUMENTED)]
    docstrings = {id(text.value) for node in documented if (text := _docstring(node))}
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt | ast.expr) and id(node) not in docstrings:
            yield node, set(re.split(r"[^a-z0-9]+", _text(node).lower()))


def _text(node: ast.stmt | ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.Attribute):
        return node.attr
    if isinstance(node, ast.Name):
        return node.id
    return node.name if isinstance(node, ast.ClassDef | FunctionNode) else ""


def every_test_asserts(source: Source) -> list[str]:
    """Every test asserts, expects an exception, or calls a helper that does (in its file, or named `check_…`)."""
    helpers = {node.name for node in _functions(source.tree) if any(_asserts(part, set()) for part in ast.walk(node))}
    tests = [node for node in _functions(source.tree) if node.name.startswith("test_")]
    silent = [node for node in tests if not any(_asserts(part, helpers) for part in ast.walk(node))]
    return [source.at(node, f"{node.name} asserts nothing") for node in silent]


def _asserts(node: ast.AST, helpers: set[str]) -> bool:
    if isinstance(node, ast.Assert):
        return not isinstance(node.test, ast.Constant)
    if not isinstance(node, ast.Call):
        return False
    name = _text(node.func)
    return name in helpers | {"raises", "warns", "fail"} or bool(re.match(r"(check|assert|expect)_", name))


def only_commands_print(source: Source) -> list[str]:
    """Everything else logs through telemetry, where secrets cannot pass."""
    if _within(source.module, MAY_PRINT):
        return []
    calls = [node for node in ast.walk(source.tree) if isinstance(node, ast.Call)]
    return [source.at(call, "prints") for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]


RULES: dict[Rule, tuple[str, ...]] = {
    only_the_database_commits: ("broker", "providers"),
    secrets_are_opened_where_listed: ("broker", "providers"),
    functions_are_short: ("broker", "providers"),
    modules_begin_with_a_sentence: ("broker", "providers", "tests", "benchmarks", ".ci"),
    nothing_of_ours_is_mocked: ("tests",),
    providers_are_not_named: ("broker",),
    every_test_asserts: ("tests",),
    only_commands_print: ("broker", "providers"),
}

# For each rule a file that breaks it, and one that is close to it but fine.
BAD: dict[Rule, str] = {
    only_the_database_commits: "def f(session): session.commit()",
    secrets_are_opened_where_listed: "def f(key): return key.reveal()",
    functions_are_short: "def f():\n" + "    x = 1\n" * LONGEST_FUNCTION_LINES,
    modules_begin_with_a_sentence: '"""\nThe first line is empty.\n"""',
    nothing_of_ours_is_mocked: "from unittest import mock",
    providers_are_not_named: "if provider == 'oidc': pass",
    every_test_asserts: "def test_x():\n    assert True",
    only_commands_print: "print('x')",
}
GOOD: dict[Rule, str] = {
    only_the_database_commits: "async def f(database, work): await database.transaction(work)",
    secrets_are_opened_where_listed: "def f(key): return repr(key)",
    functions_are_short: "def f():\n    '''" + "one\n" * LONGEST_FUNCTION_LINES + "    '''\n    return 1",
    modules_begin_with_a_sentence: '"""Says what it does, e.g. this."""',
    nothing_of_ours_is_mocked: "def test_x(monkeypatch): monkeypatch.setenv('A', 'b')",
    providers_are_not_named: "def f(provider):\n    '''Such as oidc.'''\n    return provider.oauth2.issuer",
    every_test_asserts: "def test_x(answer):\n    check_problem(answer)",
    only_commands_print: "log.info('x')",
}
ALSO_BAD: list[tuple[Rule, str]] = [
    (secrets_are_opened_where_listed, "x = key.get_secret_value()"),
    (nothing_of_ours_is_mocked, "import unittest.mock"),
    (nothing_of_ours_is_mocked, "from unittest.mock import patch"),
    (nothing_of_ours_is_mocked, "def test_x(monkeypatch): monkeypatch.setattr(broker, 'x', 1)"),
    (modules_begin_with_a_sentence, '"""It does this. It does that."""'),
    (modules_begin_with_a_sentence, "x = 1"),
    (providers_are_not_named, "oidc_issuer = 1"),
    (providers_are_not_named, "if provider == 'x': pass"),
    (providers_are_not_named, "x = f'/{name}/oidc'"),
    (every_test_asserts, "def helper(): return 1\ndef test_x():\n    helper()"),
    (every_test_asserts, "async def test_x(client):\n    await client.get('/')"),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: str(rule.__name__))
def test_the_tree_keeps_the_rule(rule: Rule) -> None:
    found = [violation for source in sources(*RULES[rule]) for violation in rule(source)]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("rule", "text"), [*BAD.items(), *ALSO_BAD], ids=lambda value: str(getattr(value, "__name__", "snippet"))
)
def test_a_file_that_breaks_the_rule_is_found(rule: Rule, text: str) -> None:
    assert rule(Source("broker/example.py", ast.parse(text)))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: str(rule.__name__))
def test_a_file_that_keeps_the_rule_passes(rule: Rule) -> None:
    assert rule(Source("broker/example.py", ast.parse(GOOD[rule]))) == []


def test_every_module_that_may_open_secrets_does_so() -> None:
    opening = [source.module for source in sources("broker", "providers") if _openings(source)]
    idle = [listed for listed in REVEALS if not any(_within(module, (listed,)) for module in opening)]
    assert idle == [], "REVEALS names modules that open nothing any more"
    assert list(REVEALS) == sorted(REVEALS)


# --- the dependencies ---------------------------------------------------------------------------------------------------


def undeclared_imports(source: Source, declared: set[str]) -> list[str]:
    """Find imports of distributions that are only there because something else needs them today."""
    found = []
    beside = (ROOT / source.path).parent.glob("*.py") if source.path.startswith("benchmarks/") else ()
    ours = FIRST_PARTY | {path.stem for path in beside}  # a script finds what lies beside it
    for node in ast.walk(source.tree):
        names = _imported(node) if isinstance(node, ast.Import | ast.ImportFrom) else []
        for root in sorted({name.partition(".")[0] for name in names} - sys.stdlib_module_names - ours):
            owners = {canonicalize_name(owner) for owner in packages_distributions().get(root, [])}
            if not owners & declared and isinstance(node, ast.stmt):
                found.append(source.at(node, f"imports {root}, which pyproject.toml does not ask for"))
    return found


def _names(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(one).name) for one in requirements}


def test_the_service_imports_only_what_it_declares() -> None:
    declared = _names(_project()[0])
    found = [one for source in sources("broker", "providers") for one in undeclared_imports(source, declared)]
    assert not found, "\n" + "\n".join(found)


def test_the_tests_import_only_what_is_declared() -> None:
    dependencies, extras, _ = _project()
    declared = _names([*dependencies, *extras["dev"]])
    found = [one for source in sources("tests", "benchmarks") for one in undeclared_imports(source, declared)]
    assert not found, "\n" + "\n".join(found)


def test_the_service_uses_what_it_declares() -> None:
    trees = [ast.walk(source.tree) for source in sources("broker", "providers")]
    names = [_imported(node) for tree in trees for node in tree if isinstance(node, ast.Import | ast.ImportFrom)]
    roots = {name.partition(".")[0] for one in names for name in one}
    used = {canonicalize_name(owner) for root in roots for owner in packages_distributions().get(root, [])}
    assert _names(_project()[0]) - used == set(USED_UNSEEN)


def test_an_undeclared_import_is_found() -> None:
    source = Source("broker/example.py", ast.parse("import os\nimport pytest\nfrom broker import app"))
    assert undeclared_imports(source, {"litestar"}) == [
        "broker/example.py:2: imports pytest, which pyproject.toml does not ask for"
    ]
    assert undeclared_imports(source, {"pytest"}) == []


# --- the locks ------------------------------------------------------------------------------------------------------------


def lock_problems(text: str, requirements: list[str]) -> list[str]:
    """Say where a lock holds more than names, versions and hashes, or no longer fits these requirements."""
    problems = [f"not a pin or a hash: {line}" for line in text.splitlines() if not _is_lock_line(line)]
    problems += [f"no hash for {line}" for line in re.findall(r"^\S+==.*$(?!\n    --hash=)", text, re.MULTILINE)]
    pins = lock_pins(text)
    for requirement in map(Requirement, requirements):
        versions = pins.get(canonicalize_name(requirement.name), set())
        if not versions or not all(requirement.specifier.contains(version) for version in versions):
            problems.append(f"{requirement} is not met by {sorted(versions)}; run make lock")
    return problems


def _is_lock_line(line: str) -> bool:
    pin = r"[a-z0-9._-]+==[0-9][0-9a-z.+!]*( ; [^:/]+)? \\"
    return bool(re.fullmatch(rf"{pin}|    --hash=sha256:[0-9a-f]{{64}}( \\)?", line))


def lock_pins(text: str) -> dict[str, set[str]]:
    """Return name → versions; several where markers choose between them."""
    pins: dict[str, set[str]] = {}
    for name, version in re.findall(r"^([a-z0-9._-]+)==(\S+)", text, re.MULTILINE):
        pins.setdefault(canonicalize_name(name), set()).add(version)
    return pins


def _project() -> tuple[list[str], dict[str, list[str]], list[str]]:
    document = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    project = document["project"]
    return project["dependencies"], project["optional-dependencies"], document["build-system"]["requires"]


def test_the_runtime_lock_is_fresh_and_names_no_host() -> None:
    dependencies, extras, build = _project()
    text = (ROOT / "requirements.lock").read_text("utf-8")
    assert lock_problems(text, [*dependencies, *extras["build"], *build]) == []


def test_the_dev_lock_is_fresh_and_names_no_host() -> None:
    dependencies, extras, build = _project()
    text = (ROOT / "requirements-dev.lock").read_text("utf-8")
    assert lock_problems(text, [*dependencies, *build, *(one for extra in extras.values() for one in extra)]) == []


def test_both_locks_name_the_same_versions() -> None:
    runtime = lock_pins((ROOT / "requirements.lock").read_text("utf-8"))
    dev = lock_pins((ROOT / "requirements-dev.lock").read_text("utf-8"))
    assert {name: dev.get(name) for name in runtime} == runtime


@pytest.mark.parametrize(
    "line",
    ["--index-url https://pypi.example/simple", "a @ file:///root/a.whl", "a>=1", "a==1 --hash=md5:00", "-e ."],
)
def test_a_lock_with_anything_but_pins_and_hashes_is_refused(line: str) -> None:
    assert lock_problems(line, [])


def test_a_lock_that_lags_behind_its_requirements_is_refused() -> None:
    text = "one==1.0 \\\n    --hash=sha256:" + "0" * 64
    assert lock_problems(text, ["one>=1"]) == []
    assert lock_problems(text, ["one>=2"])
    assert lock_problems(text, ["two"])


def test_a_pin_without_a_hash_is_refused() -> None:
    assert lock_problems("one==1.0 \\", [])


def test_npm_locks_hold_integrity_and_no_address() -> None:
    found = [
        path for path in ROOT.rglob("package-lock.json") if not {"node_modules", ".venv", ".cache"} & set(path.parts)
    ]
    packages = [(name, one) for path in found for name, one in json.loads(path.read_text())["packages"].items() if name]
    assert [name for name, one in packages if "resolved" in one or "integrity" not in one] == []
