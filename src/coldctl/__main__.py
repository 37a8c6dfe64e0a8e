"""`python -m coldctl` is the same program as `coldctl`."""

from coldctl.cli import main

main()
