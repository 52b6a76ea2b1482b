"""Writes refiner.ckpt, laid out as Lightning does: `python make_refiner.py` here, with torch 2.13 and physml.

The network is the smallest that PDE-Refiner can have. Its averaged weights are all 0.25, the others all 1.
"""

import collections
import json
import pathlib
import sys
import types

import torch
from flax import nnx

from physml.convert import pderefiner
from physml.convert.modern_unet import rules

config = json.loads((pathlib.Path(__file__).parent / "refiner.json").read_text())
built, signature = pderefiner.config_of(config)
model = nnx.eval_shape(lambda: built.build(signature, nnx.Rngs(0)))
shapes = {}
ours = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
for item in rules(model, {"pde_emb.0.0.weight": None}):
    path = tuple(int(part) if part.isdigit() else part for part in item.target.split("."))
    *kernel, inputs, outputs = (
        (1, 1, *ours[path].shape)[-3:] if len(ours[path].shape) > 1 else (1, 1, *ours[path].shape)
    )
    (name,) = item.sources
    if len(ours[path].shape) == 1:
        shapes[name] = (outputs,)
    elif len(ours[path].shape) == 2:
        shapes[name] = (outputs, inputs, 1) if "shortcut" in name else (outputs, inputs)
    else:
        shapes[name] = (outputs, inputs, *kernel)
parsing = types.ModuleType("pytorch_lightning.utilities.parsing")
parsing.AttributeDict = type("AttributeDict", (dict,), {"__module__": parsing.__name__})
for part in ("pytorch_lightning", "pytorch_lightning.utilities"):
    sys.modules[part] = types.ModuleType(part)
sys.modules[parsing.__name__] = parsing
one, quarter = torch.tensor(1.0), torch.tensor(0.25)  # views of one number keep the file small
numbers = collections.defaultdict(int, step=3)
torch.save(
    {
        "epoch": 399, "global_step": 7, "pytorch-lightning_version": "1.9.0",
        "state_dict": collections.OrderedDict((f"model.{name}", one.expand(shape)) for name, shape in shapes.items()),
        "ema": {name: quarter.expand(shape) for name, shape in shapes.items()},
        "hyper_parameters": parsing.AttributeDict(config, lr=1e-4, folder=pathlib.PosixPath("runs")),
        "callbacks": {"ModelCheckpoint": {"best": torch.tensor(0.5), "counts": numbers}},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(7.0)}}, "param_groups": [{"lr": 1e-4}]}],
        "lr_schedulers": [{"base_lrs": [1e-4]}],
    },
    "refiner.ckpt",
)  # fmt: skip
