"""Runs the sandbox provider as a command: `python -m broker.demo.sandbox`."""

from broker.demo.sandbox.serving import main

if __name__ == "__main__":
    main()
