"""Engines that run jobs: in this process, in processes of this machine, or on a Ray cluster."""

from coldctl.common.errors import ConfigError
from coldctl.workers.jobs import Engine
from coldctl.workers.local import Local


def choose(name: str, *, jobs: int, threads: int | None, ray_address: str | None) -> Engine:
    """Return the engine `name` for `jobs` at once (0: as many as fit), each with `threads` (None: its share of the cores).

    It starts nothing before the first job. Raises ConfigError.
    """
    if name == "local":
        if ray_address:
            raise ConfigError("--ray-address goes with --engine ray: give that, too, or leave it out")
        return Local(jobs, threads)
    if name != "ray":
        raise ConfigError(f"--engine {name} is not known: use --engine local or --engine ray")
    try:
        from coldctl.workers.ray import Ray
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise ConfigError("--engine ray needs Ray: install it with `pip install 'coldctl[ray]'`") from None
    return Ray(jobs, threads, ray_address)
