"""`python -m llmos_client.cli` is the same as `llmos`."""

from llmos_client.cli import main

main()
