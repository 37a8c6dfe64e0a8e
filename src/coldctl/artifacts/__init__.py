"""The directory contract: names, manifests, runs, atomic outputs, signatures."""
