"""Multi-input attention U-Net (Zhao et al. 2022), data preprocessing to network description, line by line.

"Silent" says that the paper leaves it open; the choice is then that of the published program, where there is one.

======================  ==============================================  ============================================
Section                 Paper                                           Here
======================  ==============================================  ============================================
Datasets                target 0.83 × 0.83 × 0.80 mm, source            ``spacing_mm``; the target's is the model's
                        0.63 × 0.63 × 2.0 mm
Preprocessing           three consecutive images, truth of the middle   ``stack_axis``, ``size``
Preprocessing           target: coronal, cropped to 96×96; source:      ``size`` with ``stack_axis`` 1 and 2
                        transverse, 128×128
Preprocessing           slices with nuclei and adjacent ones            30 % of those without (silent)
(silent)                intensities                                     mean 0, SD 1 over the three cropped slices
Preprocessing           augmented anew in each epoch: shift ±15         ``augmentation``, within the slice. A shear from
                        pixels, rotation ±10°, "shearing" 0.8 to 1.2    0.8 to 1.2 that leaves images as they are at 1
                                                                        is a factor: each axis is scaled by its own
Architecture            deeply supervised, λ 0.6, 0.3, 0.1              ``scale_weights``; source 0.6, 0.2, 0.1
Description             Dice + cross-entropy                            ``loss``; classes weigh 0.4, 0.2, 0.4, source
                                                                        0.8, 0.2 (silent)
Description             source: RN and SN–STN                           ``classes`` of the variant ``source``
Description             weights without output layers initialize the    ``--from`` the source's folder
                        target, all are fine-tuned
Description             batches of 32 (source)                          ``batch``, both
Description             Adam, 0.0001; stops after 20 epochs without a   ``pace``; at most 300 epochs (silent)
                        lower validation loss
Description             five-fold cross-validation in the training      ``folds``: each fold's own part validates;
                        cohort; a test cohort                           ``--holdout`` for the test
Comparison              ResNet-50 from ImageNet as encoder              variant ``resnet50``, ``--from`` a file
Comparison              without attention gates                         ``--arch attention=false``
Comparison              without transfer                                without ``--from``
Evaluation              mean of the five folds                          the model folder holds all folds
======================  ==============================================  ============================================
"""

from __future__ import annotations

from dataclasses import replace

from bids_dgmseg.train.augment import Augmentation
from bids_dgmseg.train.losses import AttentionUNetObjective
from bids_dgmseg.train.recipe import Recipe, Sampling
from bids_dgmseg.train.schedule import Pace

_CORONAL, _AXIAL = 1, 2

_TARGET = Recipe(
    classes={"RN": ("RN",), "SN": ("SN",), "STN": ("STN",)},
    sampling=Sampling(
        size=(96, 3, 96),
        step=(0, 1, 0),
        region="localizer",
        stack_axis=_CORONAL,
        empty=0.3,
        normalization="zscore",
    ),
    augmentation=Augmentation(axes=(0, 2), shift=15, rotation_deg=10, scale=(0.8, 1.2)),
    loss=AttentionUNetObjective(class_weights=(0.4, 0.2, 0.4), scale_weights=(0.6, 0.3, 0.1)),
    pace=Pace(epochs=300, batch=32, learning_rate=1e-4, patience=20),
    folds=5,
)

_SOURCE = replace(
    _TARGET,
    classes={"RN": ("RN",), "SN-STN": ("SN", "STN")},
    sampling=replace(_TARGET.sampling, size=(128, 128, 3), step=(0, 0, 1), stack_axis=_AXIAL),
    augmentation=replace(_TARGET.augmentation, axes=(0, 1)),
    loss=AttentionUNetObjective(class_weights=(0.8, 0.2), scale_weights=(0.6, 0.2, 0.1)),
    spacing_mm=(0.63, 0.63, 2.0),
)

RECIPES = {
    "paper": _TARGET,
    "source": _SOURCE,
    "resnet50": replace(_TARGET, network="bids_dgmseg.networks.attention_unet:ResNet50AttentionUNet25D"),
}
