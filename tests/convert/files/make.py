"""Writes the PyTorch files of this folder: `python make.py` here, with torch 2.13. Tests read them without it."""

from collections import OrderedDict

import torch

torch.manual_seed(0)
base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
kinds = {
    "float32": base, "float64": base.double(), "float16": base.half(), "bfloat16": base.bfloat16(),
    "complex64": torch.complex(base, -base), "int64": base.long(), "int32": base.int(), "uint8": base.byte(),
    "bool": base > 3, "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3),
    "transposed": base.t(), "strided": base[1::2, 1::3], "expanded": base[:1, :1].expand(3, 2),
    "shared": base[2], "parameter": torch.nn.Parameter(base[:, 0].clone()),
}  # fmt: skip
torch.save(OrderedDict(kinds), "kinds.pt")
torch.save(OrderedDict(kinds), "kinds_legacy.pt", _use_new_zipfile_serialization=False)

layer = torch.nn.Linear(2, 3)
layer.load_state_dict({"weight": torch.arange(6.0).reshape(3, 2), "bias": torch.ones(3)})
state = OrderedDict(("module." + key, value) for key, value in layer.state_dict().items())
torch.save({"epoch": 3, "state_dict": state, "optimizer": {"lr": 0.1}}, "nested.ckpt")
state = layer.state_dict()
state["_metadata"] = {"activation": torch.nn.functional.gelu, "layer": torch.nn.Linear, "device": torch.device("cpu")}
torch.save(state, "metadata.pt")
torch.save(layer, "module.pt")
