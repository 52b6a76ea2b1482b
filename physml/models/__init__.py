"""Architectures: arrays in, arrays out. `MODELS` maps names to config classes with `build(signature, rngs)`."""

from physml.models.auto_deeponet import AutoDeepONetConfig
from physml.models.auto_ffn import AutoFFNConfig
from physml.models.cfdbench_resnet import CFDBenchResNetConfig
from physml.models.classic_fno import ClassicFNOConfig
from physml.models.classic_unet import ClassicUNetConfig
from physml.models.conv_net import ConvNetConfig
from physml.models.ffno import FFNOConfig
from physml.models.fno import FNOConfig
from physml.models.ifactformer import IFactFormerConfig
from physml.models.modern_unet import ModernUNetConfig
from physml.models.poseidon_scot import ScOTConfig
from physml.models.resnet import ResNetConfig
from physml.models.sinenet import SineNetConfig

MODELS = {
    "auto_deeponet": AutoDeepONetConfig,
    "auto_ffn": AutoFFNConfig,
    "cfdbench_resnet": CFDBenchResNetConfig,
    "classic_fno": ClassicFNOConfig,
    "classic_unet": ClassicUNetConfig,
    "conv_net": ConvNetConfig,
    "ffno": FFNOConfig,
    "fno": FNOConfig,
    "ifactformer": IFactFormerConfig,
    "modern_unet": ModernUNetConfig,
    "poseidon_scot": ScOTConfig,
    "resnet": ResNetConfig,
    "sinenet": SineNetConfig,
}
