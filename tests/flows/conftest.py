"""The rig of the flow tests: a broker and the sandbox provider on real sockets."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.flows.rig import Rig, open_rig
from tests.flows.shared import opened_rig


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    """Give a broker on embedded defaults, with the sandbox as its integration."""
    async with open_rig(tmp_path) as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Rig]:
    """Give one rig to a whole file; its tests keep apart by using people, subjects and browsers of their own."""
    async with opened_rig(tmp_path_factory.mktemp("shared")) as made:
        yield made
