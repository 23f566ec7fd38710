"""The models. Importing this package registers every family with timm; ``build_model`` makes one from a config."""

from models.build import architecture, build_model, check_input_size, classifier_rows, load_pretrained, load_state, variants

__all__ = ["architecture", "build_model", "check_input_size", "classifier_rows", "load_pretrained", "load_state", "variants"]
