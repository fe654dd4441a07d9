"""Pure rules of refreshing: when a token is good enough, when to send again after silence, how long to wait.

No I/O and no clock: every function gets ``now`` (the database's, seconds since 1970) and plain values.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass, field
from typing import Literal

from broker.errors import BrokerError, NotRefreshable, ProviderUnavailable, RateLimited, ReauthorizationRequired
from broker.token_endpoint import TokenRefusal
from providers.spec import Refresh

FORCE_EVERY_SECONDS = 30.0
REFUSED_EVERY_SECONDS = 5.0
SOFT_MARGIN_SECONDS = 120.0
MOST_RESENDS = 3
CONFIRM_SECONDS = 1.0  # between a refusal that would end the grant and asking once more
RESEND_WAITS_SECONDS = (0.0, 15.0, 900.0)  # before each: the last one outlives an outage of a quarter of an hour
MOST_BACKOFF_SECONDS = 300.0
REACHABLE_SHARE = 0.9
USED_WITHIN_SECONDS = 7 * 86_400.0
IDLE_SHARE = 0.8


@dataclass(frozen=True, slots=True)
class Ask:
    """What a caller wants of a hand-out."""

    min_ttl_seconds: float = 60
    not_token_sha256: str | None = None
    force: bool = False


@dataclass(frozen=True, slots=True)
class Held:
    """What is known of the credential at hand. ``jitter`` in [0, 1) spreads the soft margin over connections.

    Without ``has_token`` none was minted yet, whatever the times say.
    """

    token: str = field(repr=False)
    expires_at: float | None
    lifetime_seconds: float | None
    refreshable: bool
    refreshed_at: float | None
    not_before_at: float | None
    jitter: float = 0.5
    has_token: bool = True

    @property
    def token_sha256(self) -> str:
        """By which callers name the token."""
        return hashlib.sha256(self.token.encode()).hexdigest()

    def live(self, now: float) -> bool:
        """Whether there is a token that the provider should still accept."""
        return self.has_token and (self.expires_at is None or self.expires_at > now)

    def refused(self, ask: Ask) -> bool:
        """Whether the caller says that the provider refused exactly this token."""
        return ask.not_token_sha256 is not None and hmac.compare_digest(ask.not_token_sha256.lower(), self.token_sha256)


def soft_margin_seconds(held: Held) -> float:
    """Return how long before its end a token is renewed early: a tenth of its life, 120 s at most, spread by ±20 %."""
    share = SOFT_MARGIN_SECONDS if held.lifetime_seconds is None else held.lifetime_seconds / 10
    return min(SOFT_MARGIN_SECONDS, share) * (0.8 + 0.4 * held.jitter)


def decide(held: Held, ask: Ask, now: float) -> Literal["serve", "stale", "renew"]:
    """Say whether to hand the token out as it is, or to renew it first.

    Raises NotRefreshable when a new token was demanded and there is no way to get one, ReauthorizationRequired when the
    token is dead besides, RateLimited for a ``force`` within 30 s of the last refresh and for a live token that is said to
    be refused within 5 s of it, ProviderUnavailable while a failed refresh has to wait and the token cannot be served
    meanwhile.
    """
    demanded = ask.force or held.refused(ask)
    if not demanded and _long_enough(held, ask, now):
        return "serve"
    if not held.refreshable:
        return _without_refresh(held, now, demanded=demanded)
    _require_pace(held, ask, now)
    if held.not_before_at is not None and held.not_before_at > now:
        return _while_waiting(held, now, demanded=demanded)
    return "renew"


def _require_pace(held: Held, ask: Ask, now: float) -> None:
    """Raise RateLimited when a new token is demanded too soon after the last one came.

    Who names an older token is never paced: it is handed the current one.
    """
    if held.refreshed_at is None or not (ask.force or (held.refused(ask) and held.live(now))):
        return
    every = FORCE_EVERY_SECONDS if ask.force else REFUSED_EVERY_SECONDS
    if now - held.refreshed_at < every:
        wait = every - (now - held.refreshed_at)
        raise RateLimited("this connection was refreshed a moment ago", retry_after_seconds=int(wait) + 1)


def _long_enough(held: Held, ask: Ask, now: float) -> bool:
    if held.expires_at is None or not held.has_token:
        return held.has_token
    left = held.expires_at - now
    return left >= _wanted_seconds(held, ask) and left >= soft_margin_seconds(held)


def _wanted_seconds(held: Held, ask: Ask) -> float:
    """Return ``min_ttl``, or half a lifetime where no token of this connection lives that long: else every call renews."""
    lifetime = held.lifetime_seconds
    if lifetime is None or ask.min_ttl_seconds <= REACHABLE_SHARE * lifetime:
        return ask.min_ttl_seconds
    return lifetime / 2


def _without_refresh(held: Held, now: float, *, demanded: bool) -> Literal["serve"]:
    if demanded:
        raise NotRefreshable
    if held.live(now):
        return "serve"
    raise ReauthorizationRequired("the access token is over and there is no refresh token")


def _while_waiting(held: Held, now: float, *, demanded: bool) -> Literal["stale"]:
    if held.live(now) and not demanded:
        return "stale"
    raise wait_for(held.not_before_at or now, now)


def wait_for(not_before_at: float, now: float) -> ProviderUnavailable:
    """Return the error that says when a refresh is tried again."""
    wait = str(max(1, int(not_before_at - now) + 1))
    return ProviderUnavailable("the last refresh failed; it is tried again soon", headers={"Retry-After": wait})


def after_failure(held: Held, ask: Ask, now: float, failure: BrokerError) -> Literal["stale"]:
    """Serve the token at hand after a failed refresh if it is live and was not refused; else raise ``failure``."""
    if held.live(now) and not ask.force and not held.refused(ask):
        return "stale"
    raise failure


# After an attempt


Kind = Literal["not_sent", "transient", "unknown", "permanent"]


@dataclass(frozen=True, slots=True)
class Failure:
    """How an attempt ended without a token. ``reason`` is a known code, never a provider's text.

    ``not_sent``: nothing happened. ``transient``: the provider said no for now, or something that it should not say.
    ``unknown``: it may have spent the refresh token. ``permanent``: it said that the grant is dead.
    """

    kind: Kind
    reason: str
    retry_after_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Tally:
    """What a connection's row remembers of its failed attempts since the last token came."""

    failures: int = 0
    unknown_outcomes: int = 0
    not_before_at: float | None = None
    refusals: int = 0


@dataclass(frozen=True, slots=True)
class Verdict:
    """What follows from a failure. ``lost``: only the user's consent helps now; ``reason`` says why.

    ``ask_again``: the provider said that the grant is dead, for the first time; it is asked once more before it is believed.
    """

    tally: Tally
    reason: str
    lost: bool = False
    ask_again: bool = False


def failure_of(refresh: Refresh, refusal: TokenRefusal, *, status: int) -> Failure:
    """Say what an answer without a token means.

    Success without a token (a proxy's page, a cut document) proves nothing: a provider that rotates may have rotated.
    """
    if refusal.outcome == "permanent":
        return Failure("permanent", refusal.error)
    if refresh.rotates and refusal.error == "invalid_answer" and 200 <= status < 300:
        return Failure("unknown", "invalid_answer")
    return Failure("transient", refusal.error, refusal.retry_after_seconds)


def after_attempt(
    refresh: Refresh,
    failure: Failure,
    tally: Tally,
    *,
    expires_at: float | None,
    now: float,
    random_share: float,
    confirm_seconds: float = CONFIRM_SECONDS,
) -> Verdict:
    """Return what to remember of a failed attempt and whether the connection is lost.

    A provider in trouble has been seen to answer ``invalid_grant`` to good tokens, so it has to say it twice. A refusal
    that comes after an unknown outcome is most likely its consequence, so it carries that reason.
    """
    failures, refusals = tally.failures + 1, tally.refusals
    unknown = tally.unknown_outcomes + (failure.kind == "unknown")
    if failure.kind == "permanent":
        reason = "refresh_outcome_unknown" if unknown else failure.reason
        if refusals:
            return Verdict(Tally(failures, unknown, refusals=refusals + 1), reason, lost=True)
        return Verdict(Tally(failures, unknown, now + confirm_seconds, refusals=1), reason, ask_again=True)
    wait = backoff_seconds(failures, random_share)
    if failure.kind != "unknown":
        wait = wait if failure.retry_after_seconds is None else failure.retry_after_seconds + wait
        before = tally.not_before_at or now  # a resend's wait for the live token goes on
        return Verdict(Tally(failures, unknown, max(now + wait, before), refusals), failure.reason)
    again_at = send_again_at(refresh, unknown_outcomes=unknown, expires_at=expires_at, now=now)
    if again_at is None:
        return Verdict(Tally(failures, unknown, refusals=refusals), "refresh_outcome_unknown", lost=True)
    if not refresh.rotates and unknown > 1:
        again_at = now + wait
    return Verdict(Tally(failures, unknown, again_at, refusals), "outcome_unknown")


def send_again_at(refresh: Refresh, *, unknown_outcomes: int, expires_at: float | None, now: float) -> float | None:
    """Return when the same refresh token may be sent again after the n-th unknown outcome, or None to give up.

    A provider that does not rotate may be asked for ever. One that rotates is asked at most 3 times again: at once, then
    after growing waits. Where it has no grace period, reuse may kill the grant, so the live access token is used up first;
    not where a refresh ends that token too: then either nothing was spent, or there is nothing left to use up.
    """
    if not refresh.rotates:
        return now
    if unknown_outcomes > MOST_RESENDS:
        return None
    again_at = now + RESEND_WAITS_SECONDS[max(unknown_outcomes, 1) - 1]
    if refresh.grace_seconds > 0 or refresh.ends_access or expires_at is None:
        return again_at
    return max(again_at, expires_at)


def refresh_ends_at(
    refresh: Refresh, told_at: float | None, *, received_at: float, before: float | None
) -> float | None:
    """Return when the refresh token of an answer ends: as the answer says, else by the provider's file, else as ``before``.

    A fixed end is counted from the consent (``before`` None) and not moved by a refresh; a sliding one is.
    """
    if told_at is not None or refresh.lifetime_seconds is None:
        return told_at if told_at is not None else before
    if before is not None and not refresh.sliding:
        return before
    return received_at + refresh.lifetime_seconds


def backoff_seconds(failures: int, random_share: float) -> float:
    """Return how long to wait after the n-th failure in a row: full jitter under 1, 2, 4, … 300 seconds, at least 0.2."""
    ceiling = min(MOST_BACKOFF_SECONDS, 2.0 ** min(max(failures - 1, 0), 16))
    return max(0.2, ceiling * random_share)


# In the background


FAILURES_BEFORE_REST = 3


@dataclass(frozen=True, slots=True)
class Lane:
    """What background refreshing remembers of one integration: failures in a row, and until when it rests."""

    failures: int = 0
    rest_until: float = 0.0


def after_refresh(lane: Lane, *, failed: bool, pause_seconds: float | None, now: float, random_share: float) -> Lane:
    """Return the lane after a refresh. ``now`` is any clock, the same each time; ``pause_seconds`` what the provider asked.

    A few failures are nobody's outage: the lane rests from the third in a row on, up to 300 s with full jitter, and at once
    when the provider says for how long. Refreshes that were under way when the rest began do not make it longer.
    """
    if not failed:
        return Lane(0, lane.rest_until if lane.rest_until > now else 0.0)
    if pause_seconds is not None:
        return Lane(lane.failures + 1, max(lane.rest_until, now + pause_seconds))
    if lane.rest_until > now:
        return lane
    failures = lane.failures + 1
    if failures < FAILURES_BEFORE_REST:
        return Lane(failures, lane.rest_until)
    return Lane(failures, now + backoff_seconds(failures, random_share))
