"""How often and how much at once: client addresses, shared rates with a fair queue, rooms, and breakers for what is down."""

from __future__ import annotations

from broker.limits.addresses import AddressLimiter, client_address, limited_as
from broker.limits.breakers import BreakerRule, Breakers, BreakerState, Pass
from broker.limits.rates import Rate, Rates
from broker.limits.room import Room, waiting_elsewhere
from broker.limits.windows import rate_per_second

__all__ = [
    "AddressLimiter",
    "BreakerRule",
    "BreakerState",
    "Breakers",
    "Pass",
    "Rate",
    "Rates",
    "Room",
    "client_address",
    "limited_as",
    "rate_per_second",
    "waiting_elsewhere",
]
