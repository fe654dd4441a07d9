"""Rates shared through a real Redis: two processes count together, and each alone while Redis is away."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.errors import RateLimited
from broker.limits import Rate, Rates
from tests.real.redis_server import RedisServer, binary

pytestmark = pytest.mark.real

TAKER = """
import asyncio, sys
from broker.errors import RateLimited
from broker.limits import Rate, Rates

async def main(url, strategy, tries):
    rates, taken = Rates(url), 0
    for _ in range(tries):
        try:
            await rates.take("shop api.shop.test", Rate(100, 60, strategy), caller="one", wait_seconds=0)
            taken += 1
        except RateLimited:
            pass
    await rates.aclose()
    print(taken)

asyncio.run(main(sys.argv[1], sys.argv[2], 80))
"""


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    """Run a Redis of this test's own."""
    if not binary().exists():
        pytest.fail("Redis is not there: run `make test-real`", pytrace=False)
    server = RedisServer(tmp_path)
    server.start()
    yield server
    server.kill()


async def _taken(rates: Rates, rate: Rate, tries: int, key: str = "k") -> int:
    taken = 0
    for _ in range(tries):
        try:
            await rates.take(key, rate, caller="one", wait_seconds=0)
            taken += 1
        except RateLimited:
            pass
    return taken


@pytest.mark.parametrize("strategy", ["sliding", "fixed"])
async def test_two_processes_share_one_limit(redis: RedisServer, strategy: str) -> None:
    arguments = (sys.executable, "-c", TAKER, redis.url, strategy)
    processes = [await asyncio.create_subprocess_exec(*arguments, stdout=asyncio.subprocess.PIPE) for _ in range(2)]
    outputs = [(await process.communicate())[0] for process in processes]
    taken = [int(output) for output in outputs]
    assert sum(taken) == 100
    assert all(taken)


@pytest.mark.parametrize("strategy", ["sliding", "fixed"])
async def test_who_is_over_the_shared_limit_is_told_when_to_come_again_or_waits(
    redis: RedisServer, strategy: str
) -> None:
    rate = Rate(3, 1, strategy)  # type: ignore[arg-type]
    one, other = Rates(redis.url), Rates(redis.url)
    assert await _taken(one, rate, 2) + await _taken(other, rate, 2) == 3
    with pytest.raises(RateLimited) as caught:
        await one.take("k", rate, caller="one", wait_seconds=0)
    assert caught.value.headers["Retry-After"] in {"1", "2"}
    began = time.monotonic()
    await other.take("k", rate, caller="one", wait_seconds=5)
    assert 0.2 < time.monotonic() - began < 3
    for rates in (one, other):
        await rates.aclose()


async def test_while_redis_is_away_each_process_counts_alone_and_afterwards_together_again(redis: RedisServer) -> None:
    failures: list[int] = []
    one, other = (Rates(redis.url, on_store_failure=lambda: failures.append(1)) for _ in range(2))
    rate = Rate(10, 60)
    assert await _taken(one, rate, 6) == 6
    redis.kill()
    began = time.monotonic()
    assert await _taken(one, rate, 20) == 4, "it has kept its own count all along"
    assert await _taken(other, rate, 20) == 10
    assert time.monotonic() - began < 2
    assert failures == [1, 1]
    redis.start()
    await asyncio.sleep(2.1)  # how long a Redis that failed is left alone
    assert await _taken(one, rate, 6, "new") + await _taken(other, rate, 6, "new") == 10
    assert failures == [1, 1]
    for rates in (one, other):
        await rates.aclose()


async def test_a_redis_that_loses_its_scripts_gets_them_again(redis: RedisServer) -> None:
    failures: list[int] = []
    rates, rate = Rates(redis.url, on_store_failure=lambda: failures.append(1)), Rate(5, 60)
    assert await _taken(rates, rate, 1, "a") == 1
    reader, writer = await asyncio.open_connection("127.0.0.1", redis.port)
    writer.write(b"SCRIPT FLUSH\r\n")
    assert await reader.readline() == b"+OK\r\n"
    writer.close()
    await writer.wait_closed()
    assert await _taken(rates, rate, 7, "a") == 4
    assert failures == []
    await rates.aclose()
