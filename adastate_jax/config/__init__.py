"""The configuration: frozen dataclasses, built at the border from an `ml_collections.ConfigDict`."""

from adastate_jax.config.files import default_config, load_config, parse_config, save_config
from adastate_jax.config.run import WAN_NEGATIVE_PROMPT, Config

__all__ = ["WAN_NEGATIVE_PROMPT", "Config", "default_config", "load_config", "parse_config", "save_config"]
