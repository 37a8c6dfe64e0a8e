"""Where jobs run: each engine maps a function over jobs that are plain configs and paths."""
