"""Recycle finetuned models by ColD Fusion (arXiv 2212.01378): finetune, fuse, evaluate, publish, again.

`docs/python.md` shows the functions at work. Each is loaded at its first use, so that `import coldctl` is quick.
"""

import importlib

__version__ = "0.1.0"

_MODULES = {
    "coldctl.api.finetune": ("finetune", "finetune_suite"),
    "coldctl.api.fuse": ("fuse",),
    "coldctl.api.methods": ("merge_method",),
    "coldctl.api.evaluate": ("evaluate", "load_results"),
    "coldctl.api.publish": ("publish",),
    "coldctl.api.check": ("check", "lineage", "carriers"),
    "coldctl.api.objects": (
        "Contribution", "FusedModel", "Evaluation", "Publication", "CheckReport", "Lineage", "SuiteError",
    ),
    "coldctl.common.errors": (
        "ColdctlError", "InputError", "ConfigError", "DataError", "ModelError", "CheckpointError", "ManifestError",
        "OutputError", "BusyError", "DeclinedError", "TeamError", "WorkerError",
    ),
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}
__all__ = ["__version__", *_MODULE_OF]  # noqa: PLE0604


def __getattr__(name: str) -> object:
    """Load a function, class or error at its first use (PEP 562)."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'coldctl' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_MODULE_OF[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
