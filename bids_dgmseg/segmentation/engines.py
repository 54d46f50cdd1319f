"""Engines: networks of this package, and nnU-Net model folders. `engine_of` is the only place that tells them apart.

nnU-Net is run without unpickling and without environment variables. Importing this module does not import torch, so
that a dry run can choose the labels of a model.
"""

from __future__ import annotations

import contextlib
import io
import threading
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
from nibabel import orientations
from numpy.typing import NDArray

from bids_dgmseg.errors import InputError
from bids_dgmseg.image.grids import Grid, block_affine, box_of_mask, covering_block
from bids_dgmseg.image.masks import is_valid, large_components
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.models.label_tables import match_name
from bids_dgmseg.models.nnunet_folder import (
    CEREBELLUM,
    DENTATE,
    NnunetModel,
    is_single_model,
    list_empty_folds,
    mirror_axes,
    nnunet_step_folder,
    read_folder,
    read_labels,
)
from bids_dgmseg.models.registry import MODELS, Model, Postprocessing, check_shipped_weights, get_model, weights_folder
from bids_dgmseg.models.structures import ALL_STRUCTURES
from bids_dgmseg.resources import environment_variables

if TYPE_CHECKING:
    from torch import nn

    from bids_dgmseg.segmentation.predict import InferenceOptions, Location, ProbabilityBlock

_RAS = orientations.axcodes2ornt("RAS")

_MAX_CEREBELLUM_MM3 = 250_000.0
"""The largest of adults have less."""


class Engine(Protocol):
    """Runs the two steps of a model on maps in ppm: finite, without small separate components, within ±5 ppm."""

    supports_longitudinal: ClassVar[bool]
    """Whether the sessions of a participant can be seen on one grid."""

    labels_from_folder: ClassVar[bool]
    """Whether the folder of the weights decides which nuclei are labelled."""

    model: Model
    """The model with what its folder states."""

    def __init__(self, model: Model, options: InferenceOptions) -> None:
        """Read the description of the model folder, but no weights."""

    @staticmethod
    def choose_labels(model: Model, weights: Path | None) -> tuple[Model, list[str]]:
        """Return the model with the nuclei that it labels with these weights, and warnings."""

    def check(self) -> list[str]:
        """Load all weights; return warnings."""

    def localize(self, chi: Volume) -> Location:
        """Find the box of the nuclei."""

    def predict(self, chi: Volume, location: Location) -> ProbabilityBlock:
        """Compute the probability of each nucleus inside the box."""


class NetworkEngine:
    """Networks of `bids_dgmseg.networks`, in model folders with ``model.toml``."""

    supports_longitudinal: ClassVar[bool] = True
    labels_from_folder: ClassVar[bool] = False

    def __init__(self, model: Model, options: InferenceOptions) -> None:
        from bids_dgmseg.models.model_folder import read_model_folder

        self.model, self._options = read_model_folder(model, options.weights), options

    @staticmethod
    def choose_labels(model: Model, weights: Path | None) -> tuple[Model, list[str]]:
        """Return the model with the classes of the folder."""
        if weights is None:
            return model, []
        from bids_dgmseg.models.model_folder import read_model_folder

        trained = read_model_folder(model, weights)
        fewer = trained.labels != model.labels
        return replace(model, labels=trained.labels, heads=trained.heads) if fewer else model, []

    def check(self) -> list[str]:
        """Load the networks of both steps and of the guard, and the atlases."""
        from bids_dgmseg.models.model_folder import load_segmenters, load_weights, localizer_network

        model, options, localizer = self.model, self._options, self.model.localizer
        if localizer.network:
            load_weights(localizer_network(model), model, "localizer", options.weights)
        if model.network:
            load_segmenters(model, options.weights, folds=options.folds)
        if localizer.guard:
            guard = MODELS[localizer.guard]
            load_weights(localizer_network(guard), guard, "localizer")
        if localizer.kind == "atlas":
            from bids_dgmseg.segmentation.localize import read_atlases

            read_atlases(model, options)
        return []

    def localize(self, chi: Volume) -> Location:
        """Run the localizer."""
        from bids_dgmseg.segmentation.localize import run_localizer

        return run_localizer(chi, self.model, self._options)

    def predict(self, chi: Volume, location: Location) -> ProbabilityBlock:
        """Predict on the network's grid, then resample to the map's own."""
        from bids_dgmseg.segmentation.predict import predict_block

        return predict_block(chi, location, self.model, self._options)


class NnunetEngine:
    """Model folders of nnU-Net v2: the cerebellum, then nuclei inside its box; or one network for the whole map."""

    supports_longitudinal: ClassVar[bool] = False
    labels_from_folder: ClassVar[bool] = True

    def __init__(self, model: Model, options: InferenceOptions) -> None:
        self.model, self._options = model, options

    @staticmethod
    def choose_labels(model: Model, weights: Path | None) -> tuple[Model, list[str]]:
        """Match the labels of the folder with our nuclei by name.

        ``labels`` are in the order of structures.tsv; ``label_numbers`` maps each, and the cerebellum, to numbers of
        the folder. Labels of a single model folder are not postprocessed.
        """
        folder = weights or weights_folder(model)
        if weights is None and not folder.is_dir():
            return model, []  # the error about missing weights comes with loading them
        cerebellum, dentate = nnunet_step_folder(folder, CEREBELLUM), nnunet_step_folder(folder, DENTATE)
        numbers, warnings = _match_nuclei(read_labels(dentate or folder), folder.name)
        labels = tuple(structure.abbreviation for structure in ALL_STRUCTURES if structure.abbreviation in numbers)
        if cerebellum is not None:
            numbers[CEREBELLUM] = _match_cerebellum(read_labels(cerebellum), folder.name)
        matched = replace(model, labels=labels, label_numbers={name: tuple(some) for name, some in numbers.items()})
        if is_single_model(folder):  # its labels are those of nnUNetv2_predict
            return replace(matched, postprocessing=Postprocessing(min_component_fraction=0)), warnings
        return matched, warnings

    def check(self) -> list[str]:
        """Read the folders of both steps.

        Warnings are about a trainer that mirrors left and right, a missing network for the cerebellum, and folds
        without a checkpoint.
        """
        model, options = self.model, self._options
        root, warnings = options.weights or weights_folder(model), []
        for folder in filter(None, (nnunet_step_folder(root, step) for step in (CEREBELLUM, DENTATE))):
            if empty := list_empty_folds(folder):
                warnings.append(
                    f"{folder.name}: no checkpoint_final.pth or checkpoint_best.pth in {', '.join(empty)}; the other "
                    "folds are averaged"
                )
        if nnunet_step_folder(root, CEREBELLUM) is not None:
            _read_step(model, options, CEREBELLUM)
        elif not is_single_model(root):
            from bids_dgmseg.models.model_folder import load_weights, localizer_network

            default = get_model("default")
            load_weights(localizer_network(default), default, "localizer")
            warnings.append(f"{root.name}: no folder {CEREBELLUM}; using {default.name} to find the cerebellum")
        trained = _read_step(model, options, DENTATE)
        if mirror_axes(trained, trained.orientation or "RAS", sided=True) != trained.mirror_axes:
            warnings.append(
                f"{trained.folder.name}: mirroring as in training ({trained.trainer}) would exchange left and right "
                "labels; left-right mirroring is off"
            )
        return warnings

    def localize(self, chi: Volume) -> Location:
        """Find the box of the cerebellum, and its mask on the map's grid.

        Without a network for this step, or if that of the package labels more than a cerebellum, such as noise around
        the head, the localizer of the default model finds it; for a single model folder, the result is the whole map
        and no mask. Raises `InputError` if no head or no cerebellum is found.
        """
        from bids_dgmseg.segmentation.localize import check_brain_size, find_cerebellum
        from bids_dgmseg.segmentation.predict import Location  # with torch

        model, options = self.model, self._options
        check_brain_size(chi)
        root = options.weights or weights_folder(model)
        if is_single_model(root):
            return Location(box_of_mask(chi.with_array(np.ones(chi.shape, bool))))
        if nnunet_step_folder(root, CEREBELLUM) is None:
            part = find_cerebellum(chi, device=options.device)
        else:
            network = NnunetNetwork(_read_step(model, options, CEREBELLUM), device=options.device, sided=False)
            cerebellum = np.isin(network(chi).argmax(axis=0), model.label_numbers[CEREBELLUM])
            part = large_components(cerebellum & is_valid(chi.array))
            too_large = np.count_nonzero(part) * np.prod(chi.voxel_size_mm) > _MAX_CEREBELLUM_MM3
            if too_large and options.weights is None:  # networks of others may label more on purpose
                other = find_cerebellum(chi, device=options.device)
                part = other if other.any() else part
        if not part.any():
            raise InputError("no cerebellum found in the map; check units, orientation and field of view of the map")
        mask = chi.with_array(part.astype(np.uint8))
        return Location(box_of_mask(mask).expanded(model.localizer.margin_mm), mask)

    def predict(self, chi: Volume, location: Location) -> ProbabilityBlock:
        """Predict in the box; nnU-Net resamples on its own."""
        from bids_dgmseg.segmentation.predict import ProbabilityBlock  # with torch

        model, options = self.model, self._options
        network = NnunetNetwork(_read_step(model, options, DENTATE), device=options.device, sided=True)
        slices = covering_block(Grid(chi.shape, chi.affine), location.box)
        fractions = network(Volume(chi.array[slices], block_affine(chi.affine, slices), chi.file_orientation))
        nuclei = np.stack([fractions[list(model.label_numbers[name])].sum(axis=0) for name in model.labels])
        probabilities = np.concatenate([1 - nuclei.sum(axis=0, keepdims=True), nuclei])
        return ProbabilityBlock(probabilities, slices, voxel_size_mm=chi.voxel_size_mm)


_ENGINES: Mapping[str, type[Engine]] = {"networks": NetworkEngine, "nnunet": NnunetEngine}


def engine_of(model: Model, *, longitudinal: bool = False) -> type[Engine]:
    """Return the class of a model's engine; `InputError` if it does not support what is asked for."""
    engine = _ENGINES[model.engine]
    if longitudinal and not engine.supports_longitudinal:
        raise InputError(f"`longitudinal`: not supported by {model.name}, which resamples each map itself; omit it")
    return engine


def choose_labels(model: Model, weights: Path | None = None) -> tuple[Model, list[str]]:
    """Return a model with the nuclei that it labels with these weights.

    Parameters
    ----------
    model : Model
        Registry entry; returned unchanged unless the folder of its weights decides.
    weights : path, optional
        Model folder to use instead of the weights in the package.

    Returns
    -------
    Model
        With the labels of the folder; for nnU-Net see `NnunetEngine.choose_labels`.
    list of str
        Warnings about labels without a match.

    Raises
    ------
    InputError
        If the folder cannot be read or no label matches a nucleus.
    """
    return engine_of(model).choose_labels(model, weights)


def _match_nuclei(labels: Mapping[str, int], where: str) -> tuple[dict[str, list[int]], list[str]]:
    """Return the numbers of each nucleus, and warnings."""
    numbers: dict[str, list[int]] = {}
    unknown = []
    for name, number in labels.items():
        abbreviation = match_name(name)
        if abbreviation is None:
            unknown.append(f"{number} ({name})")
        else:
            numbers.setdefault(abbreviation, []).append(number)
    if not numbers:
        raise InputError(
            f"{where}: none of its labels ({', '.join(unknown)}) is a known nucleus; name one DN_L in dataset.json"
        )
    warnings = []
    if unknown:
        warnings.append(f"{where}: label {', '.join(unknown)} matches no nucleus; treated as background")
    return numbers, warnings


def _match_cerebellum(labels: Mapping[str, int], where: str) -> list[int]:
    """Find the numbers of the cerebellum: by name, or the only label there is."""
    named = [number for name, number in labels.items() if CEREBELLUM in name.lower()]
    if named or len(labels) == 1:
        return named or list(labels.values())
    raise InputError(
        f"{where}/{CEREBELLUM}: none of its labels ({', '.join(labels)}) is the cerebellum; name it so in dataset.json"
    )


class NnunetNetwork:
    """A trained nnU-Net.

    Parameters
    ----------
    trained : NnunetModel
        Result of `bids_dgmseg.models.nnunet_folder.read_folder`.
    device : {"cpu", "cuda", "mps", "auto"}
        Where it runs.
    sided : bool
        Whether its labels have sides; left and right are then never mirrored.
    """

    def __init__(self, trained: NnunetModel, *, device: str, sided: bool) -> None:

        from bids_dgmseg.models.model_folder import pick_device, to_channels_last

        self.trained, self.sided = trained, sided
        with quiet():
            from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor, tqdm
            from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

            if not hasattr(tqdm, "_lock"):  # by default one of processes, of which Python warns if a worker is killed
                tqdm.set_lock(threading.RLock())
            self._plans = PlansManager(dict(trained.plans))
            network, self._configuration = _build(trained, self._plans)
            target = pick_device(device)
            self._fast = target.type == "cpu" and len(self._configuration.patch_size) == 3
            if self._fast:  # nnU-Net computes in float16 on GPUs, but in float32 and less quickly on CPUs
                network = to_channels_last(network, target)
                network.register_forward_hook(lambda network, inputs, logits: logits.float())  # they are added up
            self._predictor = nnUNetPredictor(device=target, allow_tqdm=False)
            self._predictor.manual_initialization(
                network,
                self._plans,
                self._configuration,
                list(trained.parameters),
                dict(trained.dataset),
                trained.trainer,
                None,
            )

    def __call__(self, chi: Volume) -> NDArray[np.float32]:
        """Compute probabilities (N, X, Y, Z) of the labels 0, 1, … N - 1 on the map's own grid, like stock nnU-Net.

        The network sees the map in the orientation of its training images, or of the file if the folder states none.
        """
        import torch

        from bids_dgmseg.segmentation.inference import FastLayers, mixed_precision

        axes = self.trained.orientation or chi.file_orientation
        array, spacing_mm = _to_sitk_order(chi, axes)
        mirrored = mirror_axes(self.trained, axes, sided=self.sided)
        self._predictor.allowed_mirroring_axes = mirrored or None
        with quiet():
            data, _, properties = self._configuration.preprocessor_class(verbose=False).run_case_npy(
                array[None], None, {"spacing": spacing_mm}, self._plans, self._configuration, dict(self.trained.dataset)
            )
            with FastLayers(), mixed_precision(self._predictor.device) if self._fast else contextlib.nullcontext():
                logits = self._predictor.predict_logits_from_preprocessed_data(torch.from_numpy(data)).cpu()
            from nnunetv2.inference.export_prediction import (
                convert_predicted_logits_to_segmentation_with_correct_shape as convert,
            )

            labels = self._plans.get_label_manager(dict(self.trained.dataset))
            dseg, fractions = convert(
                logits,
                self._plans,
                self._configuration,
                labels,
                properties,
                return_probabilities=True,
                num_threads_torch=torch.get_num_threads(),
            )
        if labels.has_regions:  # regions overlap; the labels derived from them do not
            fractions = np.stack([dseg == number for number in range(int(max(labels.regions_class_order)) + 1)])
        return _from_sitk_order(np.asarray(fractions, np.float32), axes)


def _build(trained: NnunetModel, plans: Any) -> tuple[nn.Module, Any]:
    """Build the network of plans.json, with the method of its trainer if nnU-Net includes that; return its settings."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from nnunetv2.training.nnUNetTrainer.variants.network_architecture.nnUNetTrainerBN import nnUNetTrainerBN

    # Only this trainer defines its own network. A name from a checkpoint is not looked up in nnU-Net's modules.
    trainer = nnUNetTrainerBN if trained.trainer == nnUNetTrainerBN.__name__ else nnUNetTrainer
    try:
        heads = plans.get_label_manager(dict(trained.dataset)).num_segmentation_heads
        configuration = plans.get_configuration(trained.configuration)
        network: nn.Module = trainer.build_network_architecture(
            plans, configuration, 1, heads, enable_deep_supervision=False
        )
        for parameters in reversed(trained.parameters):  # nnU-Net itself loads them one after the other
            network.load_state_dict(parameters)
    except (RuntimeError, TypeError, KeyError, ValueError, AttributeError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"{trained.folder.name}: the weights do not fit the network of plans.json ({reason}); "
            "copy the whole model folder"
        ) from error
    return network, configuration


def _to_sitk_order(chi: Volume, axes: str) -> tuple[NDArray[np.float32], list[float]]:
    """Reorient a map to given axes and reverse their order, as SimpleITK does; return it with its spacing."""
    turn = orientations.ornt_transform(_RAS, orientations.axcodes2ornt(tuple(axes)))
    stored = orientations.apply_orientation(chi.array, turn)
    spacing = [0.0] * 3
    for size_mm, axis in zip(chi.voxel_size_mm, turn[:, 0].astype(int), strict=True):
        spacing[axis] = size_mm
    return np.ascontiguousarray(stored.T, np.float32), spacing[::-1]


def _from_sitk_order(fractions: NDArray[np.float32], axes: str) -> NDArray[np.float32]:
    """Reorient channels (C, z, y, x) with given axes back to RAS+."""
    back = orientations.ornt_transform(orientations.axcodes2ornt(tuple(axes)), _RAS)
    turned = [orientations.apply_orientation(channel.T, back) for channel in fractions]
    return np.stack(turned)


def _read_step(model: Model, options: InferenceOptions, step: str) -> NnunetModel:
    """Read the model folder of a step; weights in the package are checked against their checksums."""
    root = options.weights or weights_folder(model)
    folder = nnunet_step_folder(root, step)
    if folder is None:
        raise ValueError(f"{step}: a single model folder does not have this step")
    if options.weights is not None:
        return read_folder(folder, folds=options.folds)
    if model.weights is None or not root.is_dir():
        raise InputError(
            f"{model.name}: no weights in the package; train it (dgmseg train {model.name}) and pass "
            "its folder as `weights`, or choose another `model`"
        )
    check_shipped_weights(model)
    return read_folder(folder, folds=options.folds)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress output and warnings of nnU-Net, which are meant for its developers."""
    hidden = environment_variables(dict.fromkeys(("nnUNet_compile", "nnUNet_extTrainer")))
    with hidden, contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
