"""``python -m broker`` is the same as ``broker``."""

from broker.cli import main

main()
