"""What tests share: tiny models and datasets, servers that stand in for others, faults on demand."""
