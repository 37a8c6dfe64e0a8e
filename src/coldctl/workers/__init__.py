"""Where jobs run: each engine maps a function over jobs that are plain configs and paths."""

from coldctl.common.errors import ConfigError
from coldctl.workers.jobs import Engine
from coldctl.workers.local import Local


def choose(name: str, *, jobs: int, threads: int | None, ray_address: str | None) -> Engine:
    """The engine called `name`, for so many jobs side by side (0: as fit) of so many threads (None: their share).

    Nothing is started before the first job. Raises ConfigError.
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
