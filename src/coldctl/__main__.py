"""`python -m coldctl` is the same program as `coldctl`."""

from coldctl.cli.app import main

main()
