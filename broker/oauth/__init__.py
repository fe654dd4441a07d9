"""The authorization-code flow: start, callback, identity."""
