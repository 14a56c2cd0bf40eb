"""JPEGs decoded on the device, by nvJPEG through torchvision: for nodes whose cores cannot keep their GPUs busy.

Legend: B images of a rank's batch, N images of one chunk of it, C = 3, H W the pixels of the largest crop of a chunk,
S T the height and width of the view.

The loader reads the bytes, checks them by sha256 and draws the crop, as always; what is left is done to a batch at
once, on the stream that copies it. Order, crops and everything keyed by the sample stay what they are. The pixels
differ by a few levels from the CPU's, since nvJPEG rounds otherwise, and large photos are not decoded at a fraction of
their size. A JPEG that is cut short may come out grey below the cut without an error: the sets of `wasteddp shard`
hold none, since it decoded each one whole before it wrote its hash; tars of other tools were only indexed.

What is not a plain JPEG (another format, CMYK, turned by EXIF) the loader decodes on the CPU, and so is a batch of
which the device's decoder refuses an image.

All crops of a chunk are cut and resized together: one gather and two batched matrix products, a few dozen launches
for each chunk, whatever N is. The work is 2 * C * S * W * (H + T) floating-point operations an image: 0.42 GFLOP for a
crop of 512x384 at 224 px. Unmeasured on a GPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torchvision.io import ImageReadMode, decode_jpeg

from wasteddp.data.augmentation.operations import to_device
from wasteddp.data.decoding.decode import Encoded, decode_rgb

_CHUNK_BYTES = 512 * 2**20  # of the device's memory, for the crops that are resized at once


def fill(images_BCHW: torch.Tensor, encoded_B: Sequence[Encoded | None]) -> None:
    """Decodes, crops and resizes (bilinear, antialiased) each image that is `Encoded` into its row.

    Args:
        images_BCHW: uint8 [B, C, S, T] on the device that does the work; rows of None are left as they are.
    """
    rows = [row for row, item in enumerate(encoded_B) if item]
    items = [item for item in encoded_B if item]
    if items:
        decoded = _decode([item.data for item in items], images_BCHW.device)
        resize_crops(images_BCHW, rows, decoded, np.array([item.box for item in items], np.int64))


def resize_crops(
    images_BCHW: torch.Tensor, rows: Sequence[int], decoded: Sequence[torch.Tensor], boxes_B4: npt.NDArray[np.int64]
) -> None:
    """Writes the crop `boxes_B4[i]` (top, left, height, width; px) of `decoded[i]` into row `rows[i]`, resized.

    The host does not wait, and the launches depend on the number of chunks only, not on the number of images.

    Args:
        images_BCHW: uint8 [B, C, S, T], on the device of the decoded images.
        decoded: uint8 [C, height, width] each.
    """
    view_px = (images_BCHW.shape[2], images_BCHW.shape[3])
    for chunk in chunks(boxes_B4[:, 2:], np.array([image.numel() for image in decoded]), view_px):
        images = [decoded[i] for i in chunk]
        begins = np.cumsum([0, *(image.numel() for image in images)])[:-1]
        sizes = np.array([image.shape[1:] for image in images], np.int64)
        table = np.stack([np.array(rows, np.int64)[chunk], *boxes_B4[chunk].T, *sizes.T, begins])
        height, width = (int(longest) for longest in boxes_B4[chunk, 2:].max(axis=0))
        row, top, left, heights, widths, image_height, image_width, begin = to_device(table, images_BCHW.device)
        # beyond its crop's edge an image repeats its last pixel, which has no weight
        y = torch.arange(height, device=top.device).minimum(heights[:, None] - 1) + top[:, None]  # [N, H]
        x = torch.arange(width, device=top.device).minimum(widths[:, None] - 1) + left[:, None]  # [N, W]
        plane = torch.arange(3, device=top.device) * (image_height * image_width)[:, None]  # [N, C]
        # image n begins at begin[n]; its channel c at c planes, its line y at y widths
        line_NHC = (begin[:, None] + y * image_width[:, None])[:, :, None] + plane[:, None]
        index_NHCW = line_NHC.int()[..., None] + x.int()[:, None, None]  # 32 bits: MAX_PIXELS * C is below 2^31
        flat = torch.cat([image.reshape(-1) for image in images])
        crops_NHCW = flat.index_select(0, index_NHCW.reshape(-1)).view(index_NHCW.shape)
        del index_NHCW, flat
        resized_NSCT = _resize(crops_NHCW, heights, widths, view_px).round_().clamp_(0, 255).to(torch.uint8)
        images_BCHW.index_copy_(0, row, resized_NSCT.transpose(1, 2))


def chunks(
    crops_B2: npt.NDArray[np.int64], image_bytes_B: npt.NDArray[np.int64], view_px: tuple[int, int]
) -> Iterator[npt.NDArray[np.int64]]:
    """Positions in the batch that are resized together: in at most `_CHUNK_BYTES`, or a single image.

    From the largest crop to the smallest, so that little is padded.

    Args:
        crops_B2: height and width of each crop, px.
        image_bytes_B: bytes of each decoded image; those of a chunk are copied into one piece.
    """
    view_height, view_width = view_px
    chunk: list[int] = []
    height = width = image_bytes = 0
    for i in np.argsort(-crops_B2.prod(axis=1), kind="stable"):
        height, width = max(height, int(crops_B2[i, 0])), max(width, int(crops_B2[i, 1]))
        image_bytes += int(image_bytes_B[i])
        # an index (4 bytes), a byte and a float of each padded pixel; floats between the products, and of the result
        pixels, between, view = height * width, view_height * width, view_height * view_width
        weights = height * view_height + width * view_width
        each_bytes = 3 * (9 * pixels + 4 * between + 5 * view) + 8 * weights
        if chunk and (len(chunk) + 1) * each_bytes + image_bytes > _CHUNK_BYTES:
            yield np.array(chunk)
            chunk, (height, width), image_bytes = [], map(int, crops_B2[i]), int(image_bytes_B[i])
        chunk.append(int(i))
    yield np.array(chunk)


def _decode(files: Sequence[bytes], device: torch.device) -> list[torch.Tensor]:
    """uint8 [C, height, width] of each, on the device.

    The host waits: for what the current stream was given before, and for the decoder. torchvision decodes on a stream
    of its own, which does not wait for the current one, into memory that the allocator may have taken back while the
    current stream still had to read it; and it returns when the decoder is done.
    Source: torchvision/csrc/io/image/cuda/decode_jpegs_cuda.cpp.
    """
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    # torch tensors want memory that may be written; the copy is of the JPEG's few bytes
    bytes_of = [torch.from_numpy(np.frombuffer(file, np.uint8).copy()) for file in files]
    with warnings.catch_warnings():
        # torchvision 0.29 names torchcodec as the successor; torchvision is what our users have
        warnings.filterwarnings("ignore", message="The image decoding and encoding", category=DeprecationWarning)
        try:
            return list(decode_jpeg(bytes_of, ImageReadMode.RGB, device=device))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # it does not say which image
            return [to_device(np.ascontiguousarray(decode_rgb(file).transpose(2, 0, 1)), device) for file in files]


def _resize(
    crops_NHCW: torch.Tensor, heights_N: torch.Tensor, widths_N: torch.Tensor, view_px: tuple[int, int]
) -> torch.Tensor:
    """float32 [N, S, C, T]: each crop's top left `heights` x `widths` pixels, resized.

    Exact to a level at any setting of TF32 (which this program leaves off): it keeps 11 bits of each factor. Pixels fit
    into 8; weights and what lies between the products are wrong by 2^-12 at most, which makes 3 * 255 * 2^-12 = 0.2.
    """
    n, height, channels, width = crops_NHCW.shape
    view_height, view_width = view_px
    with torch.autocast(crops_NHCW.device.type, enabled=False):
        down_NSH = triangle_weights(heights_N, height, view_height)
        across_NTW = triangle_weights(widths_N, width, view_width)
        narrowed = torch.bmm(down_NSH, crops_NHCW.view(n, height, channels * width).float())  # [N, S, C * W]
        resized = torch.bmm(narrowed.view(n, view_height * channels, width), across_NTW.mT)  # [N, S * C, T]
    return resized.view(n, view_height, channels, view_width)


def triangle_weights(lengths_N: torch.Tensor, longest: int, view_px: int) -> torch.Tensor:
    """float32 [N, view_px, longest]: how much each pixel of a line of `lengths_N` counts in each pixel of the view.

    Source: the filter of torch's `interpolate(mode="bilinear", antialias=True)`, aten/src/ATen/native/UpSample.h and
    cuda/UpSampleBilinear2d.cu: a triangle around (i + 0.5) * scale, as wide as max(1, scale) on each side; the
    weights of a pixel of the view add up to 1.
    """
    scale_N11 = (lengths_N / view_px)[:, None, None]
    centre = (torch.arange(view_px, device=lengths_N.device)[:, None] + 0.5) * scale_N11  # [N, view_px, 1]
    at = torch.arange(longest, device=lengths_N.device) + 0.5  # the pixels' middles
    weights = (1 - (at - centre).abs() / scale_N11.clamp(min=1)).clamp_(min=0)
    weights *= at < lengths_N[:, None, None]
    return weights / weights.sum(2, keepdim=True)
