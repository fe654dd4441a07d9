"""Proxied calls: a service calls a provider's API through the broker and never sees the credential.

``routes`` speaks ASGI, ``forward`` makes one call, ``retrying`` says whether it may be made again and ``outcomes`` keeps
what became of it. Below them everything is pure:

* ``target``: the raw request target is refused, or it is exactly one place below one base URL;
* ``fields``: which fields of a request and of an answer go on, and where an answer's URLs point afterwards;
* ``scrub``: finds the credential, in any of its usual spellings, in what an upstream echoes;
* ``coding``: undoes an answer's compression in bounded pieces.
"""
