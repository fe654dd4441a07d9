"""The broker: holds other people's credentials so that no other service has to."""

__version__ = "0.1.0"
