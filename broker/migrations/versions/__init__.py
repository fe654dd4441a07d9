"""One file per schema revision, expand only."""
