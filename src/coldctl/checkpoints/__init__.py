"""Open, decode, verify and write tensors in files."""
