"""The rig of the flow tests: a broker and the sandbox provider on real sockets."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.flows.rig import Rig, open_rig


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    """Give a broker on embedded defaults, with the sandbox as its integration."""
    async with open_rig(tmp_path) as made:
        yield made
