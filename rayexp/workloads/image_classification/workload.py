"""Image classification with any of torchvision's models: cross-entropy, top-1 and top-5."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from rayexp.config import IMAGE_DATA, TEXT_DATA, ExperimentConfig, explain
from rayexp.config.components import REFERENCE, meant
from rayexp.data import ImageData, ImageSplit, open_data
from rayexp.engine import order
from rayexp.engine.portable import Portable
from rayexp.engine.runtime import upload
from rayexp.engine.workload import Batch, RecurrentState
from rayexp.errors import UserError
from rayexp.runs.records import Predictions
from rayexp.runs.traits import IMAGES
from rayexp.workloads.image_classification.augmentation import DRAWS, augment
from rayexp.workloads.image_classification.portable import STRIDES, arguments, portable_classifier, ranked, recipe
from rayexp.workloads.image_classification.shapes import check_own, check_size
from rayexp.workloads.own_model import OwnModel, is_own
from rayexp.workloads.samples import SampleWorkload

# Channel means and standard deviations of ImageNet, as in pytorch/examples imagenet/main.py, here for 0..255.
MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)
STD = (0.229 * 255, 0.224 * 255, 0.225 * 255)

PIECE = 4096  # images that are copied to the device at once


class Options(BaseModel):
    """The keys of `model` beside `name`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    stem: Literal["imagenet", "stride2", "small"] = "imagenet"
    """The first layer of a ResNet. imagenet: 7x7 of stride 2, then pooling by 2, as torchvision has it. For small
    images, 3x3 without pooling: stride2 halves the side, small keeps it (and takes four times the arithmetic)."""
    zero_init_residual: bool = False
    """Start every residual branch at zero (ResNets; Goyal et al. 2017)."""


class ImageClassification(SampleWorkload):
    """The workload `image_classification` (see engine/workload.py)."""

    unit, kind, goals = IMAGES.unit, IMAGES.kind, IMAGES.goals
    batch_unit = "images"
    together = True

    def __init__(self, config: ExperimentConfig, data: ImageData | None = None) -> None:
        if config.data.name in TEXT_DATA:
            raise UserError(
                f"data.name: image_classification reads {', '.join(IMAGE_DATA)} and datasets of your own, "
                f"not {config.data.name!r}"
            )
        name, size = config.model.name, config.data.image_size
        self.make: Callable[[int, int], nn.Module]  # of classes and pixels
        own = own_model(config)
        self.format = format_of(own)
        if own is not None:
            self.make = lambda classes, pixels: own.build(num_classes=classes, image_size=pixels)
            check_own(lambda: self.make(2, size), own, size, 2)
        else:
            check_name(name)  # first: options of one's own are foreign to every other model
            try:
                options = Options(**config.model.options)
            except ValidationError as error:
                raise UserError(explain(error, Options, "model")) from None
            self.make = lambda classes, pixels: build(name, options, classes, pixels)
            check_size(lambda pixels: self.make(2, pixels), name, size)
        self.data: ImageData = data or open_data(config.data, config.code)
        super().__init__(config, self.data.train, self.data.val)
        self._resident: dict[str, Tensor] = {}  # the pixels of a split, by its name
        self._normal: dict[torch.device, tuple[Tensor, Tensor]] = {}  # shift and scale, by device

    # ------------------------------------------------------------------ model

    def build(self) -> nn.Module:
        """The named model with one output for each class; torchvision's in channels_last."""
        model = self.make(len(self.data.classes), self.config.data.image_size)
        return model.to(memory_format=self.format)

    def example(self) -> tuple[Tensor]:
        """One black image."""
        size = self.config.data.image_size
        return (torch.zeros(1, 3, size, size),)

    # ------------------------------------------------------------------ training

    def feed(self, epoch: int, step: int, shards: range) -> dict[str, NDArray[Any]]:
        """`samples` int64[n], their `labels` int64[n], the `key` int64[] of the epoch's augmentation, and, unless they
        are resident, the pixels: `images` uint8[n, size, size, 3]."""
        samples = self.samples(epoch, step, shards)
        fed: dict[str, NDArray[Any]] = {
            "samples": samples,
            "labels": self.data.train.labels[samples],
            "key": np.array(order.key(self.config.seed, "augment", epoch)),
        }
        return fed if self._resident else fed | {"images": self.data.train.read(samples)}

    def prepare(self, fed: Mapping[str, Tensor], sizes: Sequence[int]) -> dict[str, Tensor]:
        """What was fed, and `planes` fp32[n, 3, size, size]: pixels gathered, augmented and normalised."""
        samples = fed["samples"]
        images = fed["images"] if "images" in fed else self._resident["train"].index_select(0, samples)
        recipe = self.config.data.augment
        if recipe is None:
            planes = images.permute(0, 3, 1, 2).float()
        else:
            planes = augment(images, recipe, order.uniform_on(fed["key"], samples, DRAWS), sizes)
        return {**fed, "planes": self._normalise(planes)}

    def assemble(self, fed: Mapping[str, Tensor], sizes: Sequence[int]) -> Batch:
        """What `prepare` makes."""
        ready = fed if "planes" in fed else self.prepare(fed, sizes)
        return Batch((ready["planes"],), ready["labels"], tuple(sizes), sum(sizes))

    def resident_bytes(self) -> int:
        """A byte for each value of every pixel of both splits."""
        return sum(len(split) * math.prod(split.images.shape[1:]) for split in (self.data.train, self.data.val))

    def resident(self, device: torch.device) -> None:
        """Keep the pixels of both splits on the device: uint8[n, size, size, 3]."""
        self._resident = {"train": _load(self.data.train, device), "val": _load(self.data.val, device)}

    def loss(self, model: nn.Module, batch: Batch, state: RecurrentState) -> tuple[Tensor, RecurrentState]:
        """The sum of the cross-entropies."""
        logits = model(*batch.inputs).float()
        smoothing = self.config.label_smoothing
        return F.cross_entropy(logits, batch.targets, reduction="sum", label_smoothing=smoothing), {}

    def _normalise(self, planes: Tensor) -> Tensor:
        if planes.device not in self._normal:
            with torch.inference_mode(False):  # the first call may be an evaluation, the next one training
                shift = torch.tensor([-m / s for m, s in zip(MEAN, STD, strict=True)], device=planes.device)
                scale = torch.tensor([1 / s for s in STD], device=planes.device)
            self._normal[planes.device] = shift[:, None, None], scale[:, None, None]
        shift, scale = self._normal[planes.device]
        return torch.addcmul(shift, planes, scale).contiguous(memory_format=self.format)

    # ------------------------------------------------------------------ evaluation

    def predict(self, model: nn.Module, stream: int, device: torch.device) -> Mapping[str, NDArray[Any] | Tensor]:
        """The five likeliest classes of each image, the confidence in the first, and the loss.

        Where the logits give no probabilities (one is NaN or infinite), `top5` is -1, `confidence` and `loss` are NaN.
        """
        size = self.config.batch_size
        samples = self.stream(stream)
        labels = self.data.val.labels[samples]
        if self._resident:
            images = self._resident["val"][stream * size : (stream + 1) * size]
        else:
            images = upload(self.data.val.read(samples), device)
        planes = images.permute(0, 3, 1, 2).float()
        with torch.autocast(device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            logits = model(self._normalise(planes)).float()
        logs, top, confidence = ranked(logits, 5)
        losses = F.nll_loss(logs, upload(labels, device), reduction="none")
        return {
            "index": samples,
            "label": labels,
            "top5": top.to(torch.int32),
            "confidence": confidence[:, 0],
            "loss": losses.masked_fill(logs.isnan().any(1), torch.nan),
        }

    @classmethod
    def portable(
        cls, config: ExperimentConfig, described: Mapping[str, Any], weights: Mapping[str, Tensor]
    ) -> Portable:
        """See engine/workload.py. The model is torchvision's, or the user's own."""
        size, classes, own = config.data.image_size, described["classes"], own_model(config)
        with torch.random.fork_rng(devices=[]):
            if own is None:
                options = Options(**config.model.options)
                model = build(config.model.name, options, len(classes), size)
                lines = recipe(config.model.name, options.stem, len(classes), size)
            else:
                model = own.build(num_classes=len(classes), image_size=size)
                lines = own.lines(num_classes=len(classes), image_size=size)
        return portable_classifier(model, weights, lines, config.model.name, classes, (size, MEAN, STD))

    def mirrored(self, model: nn.Module) -> nn.Module:
        """The model for mirrored evaluation: probabilities averaged over an image and its mirror image."""
        return Mirrored(model)

    def metrics(self, predictions: Predictions) -> dict[str, float]:
        """Mean loss, and accuracies in percent. An image without a finite output counts as wrong."""
        hits = predictions["top5"] == predictions["label"][:, None]
        return {
            "val_loss": float(predictions["loss"].mean(dtype=np.float64)),
            "acc1": 100 * float(hits[:, 0].mean()),
            "acc5": 100 * float(hits.any(1).mean()),
        }

    def describe(self) -> dict[str, Any]:
        """The classes with their names, and the names of the validation images."""
        return {
            **({"layout": self.data.layout} if self.data.layout else {}),
            "classes": [list(one) for one in self.data.classes],
            **super().describe(),
        }


class Mirrored(nn.Module):
    """The logarithm of the mean of a classifier's probabilities for an image and for its mirror image.

    Computed from log-probabilities, so that none that is tiny becomes zero.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """fp32[n, classes] from images [n, 3, height, width] in channels_last."""
        mirrored = images.flip(3).contiguous(memory_format=torch.channels_last)
        logs = (F.log_softmax(self.model(each).float(), 1) for each in (images, mirrored))
        return torch.logaddexp(*logs) - math.log(2)


def _load(split: ImageSplit, device: torch.device) -> Tensor:
    """The pixels of a split on the device: uint8[n, height, width, 3]. Copied by pieces, since a mapped file may be
    larger than the host's memory."""
    pixels = torch.empty(len(split), *split.images.shape[1:], dtype=torch.uint8, device=device)
    for start in range(0, len(split), PIECE):
        rows = np.arange(start, min(len(split), start + PIECE))
        pixels[start : start + PIECE].copy_(torch.from_numpy(split.read(rows)))
    return pixels


def own_model(config: ExperimentConfig) -> OwnModel | None:
    """The model of the user's own that a configuration names; None where it is torchvision's."""
    if not is_own("model.name", config.model.name, torchvision_names):
        return None
    return OwnModel.open(config, ("num_classes", "image_size"))


def format_of(own: OwnModel | None) -> torch.memory_format:
    """How weights and images are laid out."""
    return torch.channels_last if own is None or own.channels_last else torch.contiguous_format


def torchvision_names() -> list[str]:
    """The names of torchvision's classification models."""
    from torchvision import models

    return list(models.list_models(module=models))


def check_name(name: str) -> None:
    """Check that torchvision has a classification model of this name.

    Raises:
        UserError: it has not.
    """
    if name not in (names := torchvision_names()):
        shown = ", ".join([*(n for n in names if n.startswith(("resnet", "mobilenet", "vit_b"))), REFERENCE])
        raise UserError(f"model.name: torchvision has no {name!r}{meant(name, names)}; allowed, for example: {shown}")


def build(name: str, options: Options, classes: int, image_size: int) -> nn.Module:
    """A freshly initialised torchvision model.

    Raises:
        UserError: the model does not take the options or the image size.
    """
    from torchvision import models

    builder = models.get_model_builder(name)
    kwargs = arguments(name, classes, image_size)
    if "aux_logits" in kwargs:
        kwargs["init_weights"] = True
    resnet = name.startswith(("resnet", "resnext", "wide_resnet"))
    if not resnet and (options.stem != "imagenet" or options.zero_init_residual):
        raise UserError(f"model.stem, model.zero_init_residual: only ResNets have them, not {name}")
    if resnet:
        kwargs["zero_init_residual"] = options.zero_init_residual
    try:
        model: nn.Module = builder(weights=None, **kwargs)
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"model.name: {name} cannot be built for {image_size} px images ({error})") from error
    if options.stem != "imagenet":
        model.conv1 = nn.Conv2d(3, 64, 3, stride=STRIDES[options.stem], padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
    return model
