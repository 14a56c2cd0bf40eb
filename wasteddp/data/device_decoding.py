"""JPEGs decoded on the device, by nvJPEG through torchvision: for nodes whose cores cannot keep their GPUs busy.

Legend: B images of a rank's batch, C = 3, S the side of the view.

The loader's threads read the bytes, prove them by sha256 and draw the crop, as ever; what is left is done to a batch at
once, on the stream that copies it. Order, crops and everything keyed by the sample stay what they are. The pixels
differ by a few levels from the CPU's, since nvJPEG rounds otherwise, and large photos are not decoded at a fraction of
their size. A JPEG that is cut short may come out grey below the cut without a word: in the sets of `wasteddp shard`
there is none, since it decoded each one whole before it wrote down its hash; tars of other tools were only indexed.

What is no plain JPEG (another format, CMYK, turned by EXIF) the loader decodes on the CPU, and so is a batch of which
the device's decoder refuses an image. Not tried on a GPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional
from torchvision.io import ImageReadMode, decode_jpeg

from wasteddp.data.decoding import Encoded, decode_rgb


def fill(images_BCHW: torch.Tensor, encoded_B: Sequence[Encoded | None]) -> None:
    """Decodes, crops and resizes (bilinear, antialiased) each image that is `Encoded` into its row.

    Args:
        images_BCHW: uint8 [B, C, S, S] on the device that does the work; rows of None are left as they are.
    """
    rows = [row for row, item in enumerate(encoded_B) if item]
    items = [item for item in encoded_B if item]
    if not items:
        return
    # torch tensors want memory that may be written; the copy is of the JPEG's few bytes
    bytes_of = [torch.from_numpy(np.frombuffer(item.data, np.uint8).copy()) for item in items]
    side = images_BCHW.shape[2:]
    with warnings.catch_warnings():
        # torchvision 0.29 names torchcodec as the successor; torchvision is what our users have
        warnings.filterwarnings("ignore", message="The image decoding and encoding", category=DeprecationWarning)
        try:
            decoded = decode_jpeg(bytes_of, ImageReadMode.RGB, device=images_BCHW.device)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # it does not say which image
            decoded = [torch.from_numpy(decode_rgb(item.data)).permute(2, 0, 1) for item in items]
    for row, item, pixels_CHW in zip(rows, items, decoded, strict=True):
        top, left, height, width = item.box
        crop_1CHW = pixels_CHW[None, :, top : top + height, left : left + width].to(images_BCHW.device).float()
        resized_1CHW = functional.interpolate(crop_1CHW, side, mode="bilinear", antialias=True)
        images_BCHW[row] = resized_1CHW[0].round_().clamp_(0, 255).to(torch.uint8)
