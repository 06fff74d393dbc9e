"""`python -m hythe`."""

from hythe.cli import main

main()
