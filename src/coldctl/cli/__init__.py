"""The command line: options become settings, the settings go to one command, what it returns is shown."""
