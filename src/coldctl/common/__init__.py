"""Errors, progress, text, parsing and digests: what every room may use. It imports nothing of ours."""
