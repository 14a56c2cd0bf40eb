"""Classify images with a model bundle: image bytes -> view -> probabilities. Evaluation and prediction both use it.

Legend: B images in a batch, C = 3, S side of the view, K classes, D features: the inputs of the network's last layer.

An image gets the same probabilities, bit for bit, in every program and with any other images in its batch. Libraries
choose their kernels by shape: with 1 instead of 8 images, ResNet50's logits differ by up to 1e-5. Every batch therefore
has the same shape. It is filled up with black images whose predictions are dropped. A small matrix product on a CPU
also rounds by the place of the row, so it is computed for each image: see `_Alone`. Results are not equal bit for bit
across devices, numbers of threads and batch sizes. With test-time augmentation, each view is such a batch.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from wasteddp.data.decoding.crop import EvaluationView, View, normalise, pixel_view
from wasteddp.data.decoding.decode import ImageHWC
from wasteddp.decisions.unlikeness import TrainingFeatures
from wasteddp.errors import BundleError, LaunchError
from wasteddp.inference.any_classifier import VIEWS, AnyClassifier, load_features
from wasteddp.inference.bundle import BundleCard, load_bundle
from wasteddp.model.networks import build_shapes, head_name

# On two cores, ResNet50 at 224 px classifies 15-20 images/s at any batch size from 1 to 64. A single image takes the
# time of a whole batch: 0.5 s at 8, 4 s at 64. A GPU needs many images to be busy.
BATCH_SIZE_CPU = 8
BATCH_SIZE_GPU = 64


def load_network(path: str | Path) -> tuple[BundleCard, torch.nn.Module]:
    """Load a bundle's card and network, on the CPU.

    Raises:
        BundleError: see `load_bundle` and `network_of`.
    """
    card, state_dict = load_bundle(path)
    return card, network_of(card, state_dict, where=path)


def network_of(card: BundleCard, state_dict: Mapping[str, torch.Tensor], *, where: str | Path) -> torch.nn.Module:
    """Return the card's network with these weights: in fp32 for any training precision, frozen, in evaluation mode.

    It is built on the CPU without initial weights, so it takes no time and no random numbers for them.

    Args:
        where: source of the weights, for the message.

    Raises:
        BundleError: the weights are not those of the card's architecture.
    """
    model = build_shapes(card.arch, len(card.classes))
    try:
        model.load_state_dict(state_dict, assign=True)
    except RuntimeError as error:
        raise BundleError(
            f"the weights in {where} are not those of a {card.arch}: {str(error).splitlines()[-1].strip()}",
            "the model cannot be built",
            "copy the whole model folder again, or let the run write it again (start its training again)",
        ) from error
    return model.float().eval().requires_grad_(False)


class Classifier(AnyClassifier):
    """A model in evaluation mode, fp32, on one device.

    Args:
        state_dict: of the card's architecture.
        device: auto (a GPU if there is one), cpu, cuda, cuda:1, mps.
        batch_size: images in a batch; None: a size that suits the device.
        tta: a name in `VIEWS`: the views of each image whose probabilities are averaged.
        where: source of the model, for the message.
        training: features of training images, for the unlikeness of images; None: it is not known.

    Raises:
        BundleError: the weights are not those of the card's architecture.
        LaunchError: the device does not exist.
    """

    def __init__(
        self,
        card: BundleCard,
        state_dict: Mapping[str, torch.Tensor],
        *,
        device: str = "auto",
        batch_size: int | None = None,
        tta: str = "none",
        where: str | Path = "memory",
        training: TrainingFeatures | None = None,
    ) -> None:
        self.card, self.device, self.tta, self.training = card, find_device(device), tta, training
        model = network_of(card, state_dict, where=where).to(self.device)
        self._model = model.to(memory_format=torch.channels_last)
        self.batch_size = batch_size or (BATCH_SIZE_CPU if self.device.type == "cpu" else BATCH_SIZE_GPU)
        if self.device.type == "cpu":
            for module in self._model.modules():
                if type(module) is torch.nn.Linear:
                    module.forward = _Alone(module, self.batch_size)  # type: ignore[assignment, method-assign]
        self._features: list[torch.Tensor] = []  # [B, D] of each forward pass of a batch
        head = self._model.get_submodule(head_name(self._model))
        assert isinstance(head, torch.nn.Linear)
        head.register_forward_pre_hook(lambda _, inputs: self._features.append(inputs[0]))
        self._num_features = head.in_features
        self._lock, self._process = threading.Lock(), os.getpid()  # a batch at a time: `_features` belongs to it

    @classmethod
    def load(
        cls, path: str | Path, *, device: str = "auto", batch_size: int | None = None, tta: str = "none"
    ) -> Classifier:
        """Load the classifier of a bundle's or a run's folder.

        Raises:
            BundleError, LaunchError: see `load_bundle` and the class.
        """
        card, weights = load_bundle(path)
        training = load_features(path, card)
        return cls(card, weights, device=device, batch_size=batch_size, tta=tta, where=path, training=training)

    @property
    def how_to_view(self) -> View:
        return EvaluationView(self.card.preprocessing.resize_px)

    def view_pixels(self, pixels: ImageHWC) -> ImageHWC:
        size = self.card.preprocessing
        return pixel_view(pixels, image_size_px=size.image_size_px, resize_px=size.resize_px)

    def _one_batch(self, views: Sequence[ImageHWC]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        if os.getpid() != self._process and self.device.type == "cpu" and torch.get_num_threads() > 1:
            raise LaunchError(
                f"the model was loaded in process {self._process}, and this one, {os.getpid()}, was forked from it",
                "it would wait for ever for torch's threads, which a fork does not copy",
                "load the model in each process, start them with multiprocessing's spawn, or torch.set_num_threads(1)",
            )
        images_BHWC = self._filled_up(views)
        # [B, H, W, C] -> [B, C, H, W] as a view: the bytes are unchanged and already in channels_last order
        images_BCHW = torch.from_numpy(images_BHWC).to(self.device).permute(0, 3, 1, 2)
        preprocessing = self.card.preprocessing
        parts = []
        # no TF32, and the same kernel each time, on any GPU; no effect on a CPU. The flags are those of the process.
        exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
        with self._lock, exact, torch.inference_mode():
            self._features.clear()
            for axes in VIEWS[self.tta]:
                view_BCHW = images_BCHW.flip(axes) if axes else images_BCHW
                logits_BK = self._model(normalise(view_BCHW, preprocessing.mean, preprocessing.std))
                parts.append((logits_BK / self.card.temperature).softmax(dim=1))
            while len(parts) > 1:  # in pairs: see VIEWS
                parts = [(one + other) / 2 for one, other in zip(parts[::2], parts[1::2], strict=True)]
            answers_BK: npt.NDArray[np.float32] = parts[0].cpu().numpy()
            features_BD: npt.NDArray[np.float32] = self._features[0].cpu().numpy()  # the first view is not flipped
        return answers_BK[: len(views)], features_BD[: len(views)]


class _Alone:
    """The forward of a linear layer on a CPU, with the same bits for an image at each place of the batch.

    On Intel's CPUs, MKL takes other kernels for the last rows of a small product than for the first ones. This was seen
    with fewer than 64 outputs, as in the last layer of most networks, and with fewer than 8 rows for each image. Such a
    product is computed image by image, which takes 0.07 ms of the 690 ms of a ResNet50 with 8 images. Larger ones, as
    of a ViT, are left in one piece: it would be up to 17 % slower.
    """

    def __init__(self, layer: torch.nn.Linear, batch_size: int) -> None:
        self._layer, self._batch_size = layer, batch_size

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        weight, bias = self._layer.weight, self._layer.bias
        rows = inputs.shape[:-1].numel() // self._batch_size  # of each image
        is_by_image = len(inputs) % self._batch_size == 0  # not the table of positions of a Swin V2
        if self._batch_size == 1 or not is_by_image or (rows >= 16 and len(weight) >= 64):
            return torch.nn.functional.linear(inputs, weight, bias)
        # each a tensor of its own, because kernels also depend on the alignment
        images = [image.clone() for image in inputs.chunk(self._batch_size)]
        return torch.cat([torch.nn.functional.linear(image, weight, bias) for image in images])


def device_type(name: str) -> str:
    """Return the type of the device that `find_device` will return, such as cuda, without initializing it."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name.partition(":")[0]


def find_device(name: str) -> torch.device:
    """Return the device `name` after a test with a tensor: torch accepts a cuda:7 that does not exist until then.

    Raises:
        LaunchError: the device cannot be used.
    """
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch built without CUDA
        raise LaunchError(
            f"the device {name!r} cannot be used: {(str(error).splitlines() or ['no reason given'])[0]}",
            "the model cannot run",
            f"leave --device out, or use cpu{''.join(f', cuda:{n}' for n in range(torch.cuda.device_count()))}",
        ) from error
    return device
