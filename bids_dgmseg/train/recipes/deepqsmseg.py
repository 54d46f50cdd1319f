"""DeepQSMSeg (Guan et al. 2021), section II, line by line.

There is no published program: each "silent" is this project's choice.

======================  ==============================================  ============================================
Section                 Paper                                           Here
======================  ==============================================  ============================================
II.A                    256×256×64; 240 mm field of view, 2 mm slices   ``spacing_mm`` of the model: 0.9375, 0.9375, 2
II.A                    CN, PUT, GP, SN, RN, left and right             ``classes``
II.A                    five parts, five-fold cross-validation          ``folds``: each fold's own part validates
II.D                    volumes normalized                              mean 0, SD 1 of the crop (silent)
II.D                    cropped to 128×128×64 around the centre         ``size``
II.D                    random spatial transformations within a         shift ±8 voxels, rotation ±10°, each axis scaled
                        reasonable range                                by 0.9 to 1.1 (silent)
II.C, eqs. 1, 2, 3      Dice + λ focal, λ 0.5                           ``loss``; the minus that eq. 2 lacks is there
II.D                    Adam, 0.01, a tenth at epochs 30, 75, 300, 800  ``pace``
                        epochs in all
(silent)                batch                                           2
(silent)                which epoch's weights                           those with the least validation loss
II.D                    controls and patients alike                     all scans of the dataset
======================  ==============================================  ============================================
"""

from __future__ import annotations

from bids_dgmseg.train.augment import Augmentation
from bids_dgmseg.train.losses import DeepQSMSegObjective
from bids_dgmseg.train.recipe import Recipe, Sampling
from bids_dgmseg.train.schedule import Pace

_NUCLEI = ("CN", "PUT", "GP", "SN", "RN")

RECIPES = {
    "paper": Recipe(
        classes={f"{nucleus}_{side}": (f"{nucleus}_{side}",) for nucleus in _NUCLEI for side in "LR"},
        sampling=Sampling(size=(128, 128, 64), step=(0, 0, 0), region="localizer", normalization="zscore"),
        augmentation=Augmentation(shift=8, rotation_deg=10, scale=(0.9, 1.1)),
        loss=DeepQSMSegObjective(focal_weight=0.5),
        pace=Pace(epochs=800, batch=2, learning_rate=1e-2, milestones=(30, 75, 300)),
        folds=5,
    ),
}
