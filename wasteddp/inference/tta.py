"""Test-time augmentation: the views of one image whose probabilities are averaged. No torch.

Averaging probabilities, not logits: a view in which the model is sure of nothing then counts for less.
Source: Krizhevsky et al. 2012, "ImageNet Classification with Deep Convolutional Neural Networks", section 4.1, which
averages the softmax over crops and their mirror images; all four flips because waste on a belt has no upside.
"""

from __future__ import annotations

Axes = tuple[int, ...]

# Axes of [B, C, H, W] that each view turns round. Their number is a power of two, and a flip swaps neighbours or halves
# of it, so that the sum in pairs, and the answer, is the same for an image and its flipped copy to the last bit.
VIEWS: dict[str, tuple[Axes, ...]] = {
    "none": ((),),
    "flip": ((), (3,)),
    "flips": ((), (3,), (2,), (2, 3)),
}
