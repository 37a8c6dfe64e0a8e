"""What the stages are made of: contracts on disk, arithmetic on bodies, data, training, scoring."""
