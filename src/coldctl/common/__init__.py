"""What every room may use: errors, progress, text, parsing, digests. It imports nothing of ours."""
