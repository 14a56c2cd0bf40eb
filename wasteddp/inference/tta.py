"""Test-time augmentation: the views of one image whose probabilities are averaged. No torch.

Probabilities are averaged, not logits, so that a view in which the model is uncertain counts for less.
Source: Krizhevsky et al. 2012, "ImageNet Classification with Deep Convolutional Neural Networks", section 4.1, which
averages the softmax over crops and their mirror images. All four flips are used because waste on a belt has no upright
orientation.
"""

from __future__ import annotations

Axes = tuple[int, ...]

# The axes of [B, C, H, W] that each view flips. The number of views is a power of two. Flipping the image swaps
# neighbours or halves of this list, so the sum in pairs is the same to the last bit for an image and its flipped copy.
VIEWS: dict[str, tuple[Axes, ...]] = {
    "none": ((),),
    "flip": ((), (3,)),
    "flips": ((), (3,), (2,), (2, 3)),
}
