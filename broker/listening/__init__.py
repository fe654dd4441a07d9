"""How requests come in: uvicorn's HTTP protocol, with limits on a request's head and its time, stricter, and made cheaper."""

from broker.listening.exchange import (
    BARE,
    CUT,
    GONE,
    NAMES_ITSELF,
    RAW_TARGET,
    Exchange,
    raw_target,
)
from broker.listening.protocol import (
    COUNT_REFUSED,
    HEAD_SECONDS,
    LEAVING,
    LOOK_SECONDS,
    MAX_HEAD_BYTES,
    BoundedHttp,
    Lane,
)

__all__ = [
    "BARE",
    "COUNT_REFUSED",
    "CUT",
    "GONE",
    "HEAD_SECONDS",
    "LEAVING",
    "LOOK_SECONDS",
    "MAX_HEAD_BYTES",
    "NAMES_ITSELF",
    "RAW_TARGET",
    "BoundedHttp",
    "Exchange",
    "Lane",
    "raw_target",
]
