"""The Python API: one function per command, which the command line calls."""
