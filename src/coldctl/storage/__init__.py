"""Read and write bytes on a disk or in a store that fsspec knows."""
