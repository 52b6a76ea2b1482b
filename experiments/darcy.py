"""Does our FNO learn Darcy flow as well as its authors' code, and does it carry over to a finer grid?

1000 samples on 16 x 16 points, from coefficient `a` to pressure `u` (datasets/darcy/CARD.md); recipe of the
neuraloperator library: 16 modes, width 24, 4 layers, H1 loss, AdamW 5e-3 with decay 1e-4, halved after every
fifth of the training (60 of 300 epochs), batch 8.

    PHYSML_DARCY=/data/darcy physml train experiments/darcy.py                  300 epochs, test on 16 x 16
    PHYSML_DARCY=/data/darcy python experiments/darcy_peer.py --epochs 100      beside neuraloperator, also on 32 x 32

Expect relative L2 below 0.10 at 16 x 16 and below 0.15 at 32 x 32 after 100 epochs.
"""

import os
from pathlib import Path

from physml import DataConfig, Evaluation, Experiment, OneStep, OptimizerConfig, TrainingConfig
from physml.metrics.losses import H1
from physml.models import FNOConfig
from physml.steppers import DirectConfig

FOLDER = Path(os.environ.get("PHYSML_DARCY", "datasets/darcy/data"))

config = Experiment(
    name="darcy",
    data=DataConfig(
        variables=("u",),
        static=("a",),
        train=(str(FOLDER / "darcy_train_16.nc"),),
        valid=(),
        test=(str(FOLDER / "darcy_test_16.nc"),),
    ),
    model=FNOConfig(width=24, modes=(16, 16), depth=4),
    stepper=DirectConfig(history=0),
    objective=OneStep(loss=H1(boundary="periodic")),
    training=TrainingConfig(
        epochs=300,
        batch=8,
        optimizer=OptimizerConfig(learning_rate=5e-3, schedule="step", every=0.2, factor=0.5, weight_decay=1e-4),
        updates_per_call=25,
        checkpoint_every=125 * 20,
        select="last",
    ),
    evaluation=Evaluation(steps=1, floors=("climatology",), metrics=("relative_l2", "h1", "rmse", "correlation")),
)
