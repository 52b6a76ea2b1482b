"""`python -m physml` is `physml`."""

from physml.cli import main

main()
