"""Does a small residual network forecast sea level pressure better than persistence, climatology and a linear model?

NCEP/NCAR reanalysis, daily, 30-70 N, 70 W-10 E (datasets/ncep_slp/CARD.md): train 2001-2007, validate 2008, test
2009-2010.

    PHYSML_NCEP_SLP=/data/ncep_slp_natl_daily_2001-2010.nc physml train experiments/slp_north_atlantic.py

Another region or variable by options alone, e.g. hourly 2 m temperature (datasets/era5_t2m_uk/CARD.md):

    physml train experiments/slp_north_atlantic.py --name t2m --set data.path=era5_t2m_uk_hourly_2019-03.nc \\
        --set 'data.variables=[t2m]' --set 'data.train=[0, 600]' --set 'data.valid=[600, 648]' \\
        --set 'data.test=[648, 744]' --set evaluation.steps=24
"""

import os

from physml import DataConfig, Evaluation, Experiment, OptimizerConfig, TrainingConfig, Unrolled
from physml.models import ResNetConfig
from physml.steppers import ResidualConfig

config = Experiment(
    name="slp_north_atlantic",
    data=DataConfig(
        path=os.environ.get("PHYSML_NCEP_SLP", "datasets/ncep_slp/ncep_slp_natl_daily_2001-2010.nc"),
        train=("2001", "2007"),
        valid=("2008", "2008"),
        test=("2009", "2010"),
    ),
    model=ResNetConfig(width=48, depth=4, boundary="zero", positions=True, dropout=0.2),
    stepper=ResidualConfig(history=3, calendar=True),
    objective=Unrolled(steps=2, discount=0.5),
    training=TrainingConfig(
        epochs=30,
        batch=32,
        optimizer=OptimizerConfig(learning_rate=2e-3, weight_decay=5e-2, clip=1.0, warmup=0.05),
        average=0.998,
        validate_every=200,
        validate_windows=0,
        checkpoint_every=400,
    ),
    evaluation=Evaluation(steps=10, floors=("persistence", "climatology", "linear_inverse"), batch=64),
)
