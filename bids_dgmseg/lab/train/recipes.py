"""The papers' recipes, to be compared with the methods sections, line by line.

"Silent" in the tables says that the paper leaves it open; the choice is then that of the published program, where there
is one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from bids_dgmseg.errors import InputError
from bids_dgmseg.lab.train.augment import Augmentation
from bids_dgmseg.lab.train.recipe import AttentionUNetObjective, DCNNetObjective, DeepQSMSegObjective, Recipe, Sampling
from bids_dgmseg.lab.train.schedule import Pace

DCNNET = {
    "paper": Recipe(
        classes={"DN": ("DN",), "IN": ("IN",)},
        sampling=Sampling(
            size=(32, 32, 32),
            step=(5, 5, 5),
            region="labels",
            margin=5,
            zero_padding=True,
            normalization="minmax",
            normalized="region",
        ),
        loss=DCNNetObjective(),
        pace=Pace(epochs=50, batch=8, learning_rate=1e-3, patience=20),
        folds=5,
        validation=0.2,
        references=10,
    ),
}
"""DCN-Net (Kim et al. 2020), sections II and III, line by line.

======================  ==============================================  ============================================
Section                 Paper                                           Here
======================  ==============================================  ============================================
III.A                   box around the labels in training, placed by    ``region``; 5 voxels around it (silent) in both;
                        registered references in use                    ``references`` of the training scans
III.A                   1.25 mm isotropic                               the model's ``spacing_mm``
III.B                   patches of 32³, step 5; 3,453 of 29             ``size``, ``step``; all of them, from a region
                        participants (765 at step 9)                    padded with zeros, half a patch on every side
                                                                        (silent; ``zero_padding``), in use to a patch
III.B                   intensities (silent)                            minimum to maximum of the unpadded region
III.B                   patches instead of augmentation                 no augmentation
II.B, eqs. 3, 4, 5, 8   Tversky α 0.3, β 0.7; focal; both weigh 0.5     ``terms``; β weighs what is missed; sums over
                                                                        the batch and the factor g of the published
                                                                        program, or ``loss.terms.equations=paper``
II.B, eq. 5             class weights from the volume ratio             inverse frequency in the batch (silent)
II.C, eqs. 7, 8, 9      λ 1, 1, attention 0.5, overlap 0.1              ``terms``
(silent)                L2                                              1e-4 on `DCNNet.decayed_weights`
III.B                   Adam, 0.001, batches of 8, 50 epochs            ``pace``
III.B                   stops after 20 epochs without improvement,      ``patience``
                        weights with the least validation loss
III.B                   fixed seed of the kernels                       ``--seed``; that of the split is
                                                                        ``split_seed``
III.C                   five folds; 20 % of the training data           ``folds``, ``validation``
                        validate
II.D                    pre-training on pseudo-labels; majority vote    ``--pretrain-on``, ``--distill``
                        of 5 models
IV.C                    step 9                                          ``--recipe sampling.step=[9,9,9]``
IV.D                    patches of 16³, 24³, 40³                        ``--recipe sampling.size=[16,16,16]``
IV.F, Table II          one softmax over all classes, or one per        ``--arch attention=false``, with
                        nucleus, without attention modules              ``independent=false`` or
                                                                        ``--recipe loss.terms.overlap=0``
IV.F, Table III         with overlap loss, or attention modules         ``--arch attention=false``, or
                                                                        ``--recipe loss.terms.overlap=0``
IV.F, Fig. 11           FC-Dense ContextNet: the first row of Table II  ``--arch attention=false independent=false``
IV.B, Table V           U-Net                                           ``--recipe network=…plain_unet:PlainUNet``;
                                                                        other networks are not built
======================  ==============================================  ============================================
"""

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
    classes={"RN": ("RN",), "SN": ("SN", "STN")},
    sampling=replace(_TARGET.sampling, size=(128, 128, 3), step=(0, 0, 1), stack_axis=_AXIAL),
    augmentation=replace(_TARGET.augmentation, axes=(0, 1)),
    loss=AttentionUNetObjective(class_weights=(0.8, 0.2), scale_weights=(0.6, 0.2, 0.1)),
    spacing_mm=(0.63, 0.63, 2.0),
)

ATTUNET25D = {
    "paper": _TARGET,
    "source": _SOURCE,
    "resnet50": replace(_TARGET, network="bids_dgmseg.networks.attention_unet:ResNet50AttentionUNet25D"),
}
"""Multi-input attention U-Net (Zhao et al. 2022), data preprocessing to network description, line by line.

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
Description             source: RN and SN–STN                           ``classes`` of the variant ``source``, where SN
                                                                        has the STN, too
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

_NUCLEI = ("CN", "PUT", "GP", "SN", "RN")

_PAPER_SIZE = Recipe(
    classes={f"{nucleus}_{side}": (f"{nucleus}_{side}",) for nucleus in _NUCLEI for side in "LR"},
    sampling=Sampling(size=(128, 128, 64), step=(0, 0, 0), region="localizer", normalization="zscore"),
    augmentation=Augmentation(shift=8, rotation_deg=10, scale=(0.9, 1.1)),
    loss=DeepQSMSegObjective(focal_weight=0.5),
    pace=Pace(epochs=800, batch=2, learning_rate=1e-2, milestones=(30, 75, 300)),
    arch={"features": [16, 32, 64, 128, 256]},
    folds=5,
    validation=0.0,
)

DEEPQSMSEG = {"paper": _PAPER_SIZE, "small": replace(_PAPER_SIZE, arch={})}
"""DeepQSMSeg (Guan et al. 2021), section II, line by line.

There is no published program: each "silent" is this project's choice.

======================  ==============================================  ============================================
Section                 Paper                                           Here
======================  ==============================================  ============================================
II.A                    256×256×64; 240 mm field of view, 2 mm slices   ``spacing_mm`` of the model: 0.9375, 0.9375, 2
II.A                    CN, PUT, GP, SN, RN, left and right             ``classes``
II.A                    five parts, five-fold cross-validation          ``folds``: each fold's own part is its test set
II.B                    filters (silent)                                ``arch``: 16 to 256; variant ``small``: those of
                                                                        the shipped weights, 6 to 96
II.D                    volumes normalized                              mean 0, SD 1 of the crop (silent)
II.D                    cropped to 128×128×64 around the centre         ``size``
II.D                    random spatial transformations within a         shift ±8 voxels, rotation ±10°, each axis scaled
                        reasonable range                                by 0.9 to 1.1 (silent)
II.C, eqs. 1, 2, 3      Dice + λ focal, λ 0.5                           ``loss``; the minus that eq. 2 lacks is there
II.D                    Adam, 0.01, a tenth at epochs 30, 75, 300, 800  ``pace``
                        epochs in all
(silent)                batch                                           2
(silent)                which epoch's weights                           the last: the number of epochs is fixed, without
                                                                        any validation set (``validation`` 0)
II.D                    controls and patients alike                     all scans of the dataset
======================  ==============================================  ============================================
"""

RECIPES: Mapping[str, Mapping[str, Recipe]] = {
    "dcnnet": DCNNET,
    "attunet25d": ATTUNET25D,
    "deepqsmseg": DEEPQSMSEG,
}
"""Model → variant → recipe; the variant ``paper`` is the system itself."""


def get_recipe(model: str, variant: str = "paper") -> Recipe:
    """Return a recipe.

    Raises
    ------
    InputError
        If the model has no recipe or no such variant.
    """
    if model not in RECIPES:
        raise InputError(f"{model}: no training recipe; choose from {', '.join(RECIPES)}")
    if variant not in RECIPES[model]:
        raise InputError(f"`variant` {variant}: unknown variant of {model}; choose from {', '.join(RECIPES[model])}")
    return RECIPES[model][variant]
