"""The doctor asks a real Redis, and says when it does not answer any more."""

from __future__ import annotations

from pathlib import Path

import pytest

from broker.cli.doctor.surroundings import redis
from tests.flows.rig import open_rig
from tests.real.redis_server import RedisServer, binary

pytestmark = pytest.mark.real


async def test_a_redis_that_answers_is_ok_until_it_is_gone(tmp_path: Path) -> None:
    if not binary().exists():
        pytest.fail("Redis is not there: run `make test-real`", pytrace=False)
    server = RedisServer(tmp_path)
    server.start()
    try:
        async with open_rig(tmp_path / "data", redis_url=server.url) as rig:
            assert [one.state for one in await redis(rig.parts)] == ["ok"]
            server.kill()
            assert [one.state for one in await redis(rig.parts)] == ["failed"]
    finally:
        server.kill()
