"""The sandbox provider and the guided run behind `make demo`."""
