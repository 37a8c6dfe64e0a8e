"""Turn a model into a repository that others can load."""
