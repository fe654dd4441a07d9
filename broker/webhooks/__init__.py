"""Webhooks: taken in from providers, verified on the raw bytes, stored before the 2xx, delivered signed, replayable.

The way of an event: ``routes`` reads its bytes → ``verification`` proves them by the provider's scheme → ``inbox`` writes it,
what tells it from its twin, and a delivery for each subscription that wants it (``fanning_out``), in one transaction with
others that wait → only then the provider is answered. ``delivery`` takes what is due from the leased table (``queue``), signs
(``signing``), posts, and records; ``backoff`` says when to try again. Sources and subscriptions are configured in ``sources``
and ``subscriptions``; ``configured`` is what of them the others see. The broker's own events come the same way from
``broker.announcing``.
"""
