"""`coldctl.merge_method`: a merge method of one's own, used by its name."""

import hashlib
import inspect
import marshal
from collections.abc import Callable

import numpy as np

from coldctl.fusing.blocks import Array, Block
from coldctl.fusing.methods import METHODS, register, stacked
from coldctl.fusing.recipe import Method, Recipe

Merge = Callable[[Array, Array, Array], Array]


def merge_method(name: str, *, summary: str = "", paper: str = "none") -> Callable[[Merge], Merge]:
    """Register a function as the merge method `name` of this process, for `fuse(method=name)`.

    The function takes the contributions [N, L], the base [L] and the weights [N], which sum to one, all float64, and
    returns the fused values [L]. It is called for ranges of L elements of one tensor, so it must compute element by element.
    A method of one's own that is registered again is replaced. Raises ConfigError for the name of a built-in method.
    """

    def add(merge: Merge) -> Merge:
        def merged(block: Block, recipe: Recipe) -> Array:
            base = block.base.astype(np.float64)
            return np.asarray(merge(stacked(block.contributions), base, recipe.weights), np.float64)

        if name in METHODS and METHODS[name].code is not None:  # a notebook's cell may be run again
            del METHODS[name]
        summary_line = summary or str(merge.__doc__ or "").partition("\n")[0]
        register(Method(name, summary_line, paper, merged, code=_digest_of_code(merge)))
        return merge

    return add


def _digest_of_code(function: Callable[..., object]) -> str:
    """Return a digest of a function's source, or of its byte code where no source is to be had."""
    try:
        code = inspect.getsource(function).encode()
    except (OSError, TypeError):
        code = marshal.dumps(function.__code__)
    return "sha256:" + hashlib.sha256(code).hexdigest()
