"""Read files or Hub datasets, and make three labelled splits of them."""
