"""DCN-Net (Kim et al. 2020), sections II and III, line by line.

"Silent" says that the paper leaves it open; the choice is then that of the published program, where there is one.

======================  ==============================================  ============================================
Section                 Paper                                           Here
======================  ==============================================  ============================================
III.A                   box around the labels in training, placed by    ``region``; 5 voxels around it (silent) in both;
                        registered references in use                    ``references`` of the training scans
III.A                   1.25 mm isotropic                               the model's ``spacing_mm``
III.B                   patches of 32³, step 5                          ``size``, ``step``; all of them
III.B                   intensities (silent)                            minimum to maximum of the region
III.B                   patches instead of augmentation                 no augmentation
II.B, eqs. 3, 4, 5      Tversky α 0.3, β 0.7; focal; both weigh 0.5     ``terms``; β weighs what is missed
II.B, eq. 5             class weights from the volume ratio             inverse frequency in the batch (silent)
II.C, eqs. 7, 8, 9      λ 1, 1, attention 0.5, overlap 0.1              ``terms``
(silent)                L2                                              1e-4 on `DCNNet.decayed_weights`
III.B                   Adam, 0.001, batches of 8, 50 epochs            ``pace``
III.B                   stops after 20 epochs without improvement,      ``patience``
                        weights with the least validation loss
III.B                   fixed seed of the kernels                       ``--seed``
III.C                   five folds; 20 % of the training data           ``folds``, ``validation``
                        validate
II.D                    pre-training on pseudo-labels; majority vote    ``--pretrain-on``, ``--distill``
                        of 5 models
IV.C                    step 9                                          ``--recipe sampling.step=[9,9,9]``
IV.D                    patches of 16³, 24³, 40³                        ``--recipe sampling.size=[16,16,16]``
IV.F, Table II          one softmax over all classes                    ``--arch independent=false``
IV.F, Table III         without attention loss, without overlap loss    ``--recipe loss.terms.attention=0``, …
======================  ==============================================  ============================================
"""

from __future__ import annotations

from bids_dgmseg.train.losses import DCNNetObjective
from bids_dgmseg.train.recipe import Recipe, Sampling
from bids_dgmseg.train.schedule import Pace

RECIPES = {
    "paper": Recipe(
        classes={"DN": ("DN",), "IN": ("IN",)},
        sampling=Sampling(
            size=(32, 32, 32),
            step=(5, 5, 5),
            region="labels",
            margin=5,
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
