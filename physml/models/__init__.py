"""Architectures: arrays in, arrays out. `MODELS` maps names to config classes with `build(signature, rngs)`."""

from physml.models.classic_fno import ClassicFNOConfig
from physml.models.fno import FNOConfig
from physml.models.poseidon_scot import ScOTConfig
from physml.models.resnet import ResNetConfig

MODELS = {
    "classic_fno": ClassicFNOConfig,
    "fno": FNOConfig,
    "poseidon_scot": ScOTConfig,
    "resnet": ResNetConfig,
}
