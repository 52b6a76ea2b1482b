"""What a stepper is made of: its configs as plain data, an identity for provenance, and the way back from configs."""

import hashlib
import json
from typing import Any

import jax
import numpy as np
from flax import nnx

from physml.coding import name_of, to_dict
from physml.constraints import CONSTRAINTS
from physml.errors import ConfigError, PhysmlError
from physml.fields import Spec, is_key
from physml.models import MODELS
from physml.steppers import STEPPERS, Members


def build_stepper(stepper_config, model_config, spec: Spec, normalizer, constraints=(), seed: int = 0):
    """A fresh stepper: the signature that `stepper_config` computes, the model that fits it, and everything around it.

    `constraints` are constraints, checked against `spec`. `model_config` is None for the floors.
    Raises ConfigError when a model is missing or superfluous.
    """
    signature = stepper_config.signature(spec)
    if (signature is None) != (model_config is None):
        takes = "takes no model" if signature is None else "needs a model"
        raise ConfigError(f"{type(stepper_config).__name__} {takes}, but the model config is {model_config}.")
    model = None if signature is None else model_config.build(signature, nnx.Rngs(seed))
    built = tuple(c.build(spec) if hasattr(c, "build") else c for c in constraints)
    return stepper_config.build(spec, model, normalizer, built)


def configs(stepper) -> dict[str, Any]:
    """`{"stepper": ..., "model": ... or None, "constraints": [...]}` as plain data with registry names.

    Raises ConfigError for a part that has no config or is not registered.
    """
    model = getattr(stepper, "model", None)
    constraints = getattr(stepper, "constraints", None) or ()
    return {
        "stepper": to_dict(config_of(stepper, "stepper"), STEPPERS, "stepper"),
        "model": None if model is None else to_dict(config_of(model, "model"), MODELS, "model"),
        "constraints": [to_dict(getattr(c, "config", c), CONSTRAINTS, "constraints") for c in constraints],
        **({"members": stepper.count} if isinstance(stepper, Members) else {}),
    }


def config_of(part, what: str):
    """The frozen config that `part` was built from."""
    if not hasattr(part, "config"):
        raise ConfigError(
            f"The {what} {type(part).__name__} keeps no `config`, so it cannot be saved or described. "
            "Store the frozen dataclass it was built from as `self.config`."
        )
    return part.config


def parameter_count(module) -> int:
    """Trainable numbers."""
    return sum(int(np.prod(np.shape(leaf))) for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))


def provenance(stepper) -> dict[str, str]:
    """Attributes for files: model id (names and a hash of the numbers), hash of the configs and spec, version."""
    from physml import __version__

    try:
        parts = configs(stepper)
        model = getattr(stepper, "model", None)
        names = [name_of(stepper.config, STEPPERS), *([name_of(model.config, MODELS)] if model is not None else [])]
        text = json.dumps({**parts, "spec": stepper.spec.to_dict()}, sort_keys=True)
        config_hash = hashlib.sha256(text.encode()).hexdigest()[:12]
    except PhysmlError:  # a stepper of the user's own, outside the registries
        names, config_hash = [type(stepper).__name__], "unregistered"
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(nnx.state(stepper)):
        digest.update(np.ascontiguousarray(jax.random.key_data(leaf) if is_key(leaf) else leaf).tobytes())
    return {
        "model_id": f"{'/'.join(names)}@{digest.hexdigest()[:12]}",
        "config_hash": config_hash,
        "physml_version": __version__,
    }
