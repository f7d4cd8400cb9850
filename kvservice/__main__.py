"""`python -m kvservice` is the command `kvservice`."""

from kvservice.cli.main import main

main()
