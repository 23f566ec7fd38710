"""The models. Importing this package registers every family with timm; ``build_model`` makes one from a config.

Every file of this folder is imported, so that a model of your own is one file here (docs/adding-a-model.md).
"""

import importlib
import pkgutil

from models.build import architecture, build_model, check_input_size, classifier_rows, load_pretrained, load_state, variants

__all__ = ["architecture", "build_model", "check_input_size", "classifier_rows", "load_pretrained", "load_state", "variants"]


def import_all() -> None:
    """Import every module of the package, whose ``register_model`` entry points timm then knows."""
    for found in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{found.name}")


import_all()
