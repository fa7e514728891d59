"""`python -m splitserve` is the console script."""

from splitserve.cli.main import main

main()
