"""`python -m x2i`, for where the command itself is not on the path."""

from x2i.cli.main import main

main()
