"""Turn files or Hub datasets into three labelled splits."""
