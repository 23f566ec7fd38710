"""The models. Importing this package registers every family with timm; ``build_model`` makes one from a config."""

from models.build import build_model, check_input_size, load_pretrained, load_state, variants

__all__ = ["build_model", "check_input_size", "load_pretrained", "load_state", "variants"]
