"""The command line: parse options, call one function of the API, show what it returns."""
