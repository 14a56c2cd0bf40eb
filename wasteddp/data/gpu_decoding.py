"""JPEG decoding on the device by nvJPEG, through torchvision: for nodes with too few cores to keep their GPUs busy.

Legend: B images of a rank's batch, N images of one chunk of it, C = 3, H W the pixels of the largest crop of a chunk,
S T the height and width of the view.

As usual, the loader reads the bytes, checks their sha256 and draws the crop. The other work is done for a whole batch,
on the stream that copies it. Order, crops and everything keyed by the sample stay the same. The pixels differ by a few
levels from those decoded on a CPU, since nvJPEG rounds differently and large photographs are not decoded at a fraction
of their size. A truncated JPEG may be grey below the cut without an error. Sets of `wasteddp shard` do not contain
truncated JPEGs, since it decodes each image completely before it writes the hash; tars of other tools are only indexed.

The loader decodes on the CPU every image that is not a plain JPEG (another format, CMYK, rotated by EXIF). If the
device's decoder refuses an image, the whole batch is decoded on the CPU.

All crops of a chunk are cut out and resized together, by one gather and two batched matrix products: a few dozen
launches for each chunk, for any N. The work is 2 * C * S * W * (H + T) floating-point operations an image: 0.42 GFLOP
for a crop of 512x384 at 224 px. Not measured on a GPU.
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

_CHUNK_BYTES = 512 * 2**20  # device memory for the crops that are resized together


def fill(images_BCHW: torch.Tensor, encoded_B: Sequence[Encoded | None]) -> None:
    """Decode, crop and resize (bilinear, antialiased) each `Encoded` image into its row.

    Args:
        images_BCHW: uint8 [B, C, S, T], on the device that does the work.
        encoded_B: None for a row that is decoded already.
    """
    rows = [row for row, item in enumerate(encoded_B) if item]
    items = [item for item in encoded_B if item]
    if items:
        decoded = _decode([item.data for item in items], images_BCHW.device)
        resize_crops(images_BCHW, rows, decoded, np.array([item.box for item in items], np.int64))


def resize_crops(
    images_BCHW: torch.Tensor, rows: Sequence[int], decoded: Sequence[torch.Tensor], boxes_B4: npt.NDArray[np.int64]
) -> None:
    """Write the crop `boxes_B4[i]` (top, left, height, width; px) of `decoded[i]` into row `rows[i]`, resized.

    The host does not wait. The number of launches depends on the number of chunks, not on the number of images.

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
        # outside its crop an image repeats the crop's last pixel, with weight 0
        y = torch.arange(height, device=top.device).minimum(heights[:, None] - 1) + top[:, None]  # [N, H]
        x = torch.arange(width, device=top.device).minimum(widths[:, None] - 1) + left[:, None]  # [N, W]
        plane = torch.arange(3, device=top.device) * (image_height * image_width)[:, None]  # [N, C]
        # image n begins at begin[n], its channel c after c planes, its line y after y widths
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
    """Yield positions in the batch to resize together: those that fit into `_CHUNK_BYTES`, or a single image.

    The crops are sorted from the largest to the smallest, so that there is little padding.

    Args:
        crops_B2: height and width of each crop, px.
        image_bytes_B: bytes of each decoded image; the images of a chunk are copied into one tensor.
        view_px: height and width of the view.
    """
    view_height, view_width = view_px
    chunk: list[int] = []
    height = width = image_bytes = 0
    for i in np.argsort(-crops_B2.prod(axis=1), kind="stable"):
        height, width = max(height, int(crops_B2[i, 0])), max(width, int(crops_B2[i, 1]))
        image_bytes += int(image_bytes_B[i])
        # an index (4 bytes), a byte and a float for each padded pixel; floats between the products and for the result
        pixels, between, view = height * width, view_height * width, view_height * view_width
        weights = height * view_height + width * view_width
        each_bytes = 3 * (9 * pixels + 4 * between + 5 * view) + 8 * weights
        if chunk and (len(chunk) + 1) * each_bytes + image_bytes > _CHUNK_BYTES:
            yield np.array(chunk)
            chunk, (height, width), image_bytes = [], map(int, crops_B2[i]), int(image_bytes_B[i])
        chunk.append(int(i))
    yield np.array(chunk)


def _decode(files: Sequence[bytes], device: torch.device) -> list[torch.Tensor]:
    """Return uint8 [C, height, width] for each file, on the device.

    The host waits for the earlier work of the current stream, and for the decoder. torchvision decodes on its own
    stream, which does not wait for the current one, into memory that the allocator may have reused while the current
    stream still had to read it. It returns when the decoder has finished.
    Source: torchvision/csrc/io/image/cuda/decode_jpegs_cuda.cpp.
    """
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    # torch tensors need writable memory; this copies only the JPEG's few bytes
    bytes_of = [torch.from_numpy(np.frombuffer(file, np.uint8).copy()) for file in files]
    with warnings.catch_warnings():
        # torchvision 0.29 recommends torchcodec instead, but users have torchvision
        warnings.filterwarnings("ignore", message="The image decoding and encoding", category=DeprecationWarning)
        try:
            return list(decode_jpeg(bytes_of, ImageReadMode.RGB, device=device))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # the error does not name the image
            return [to_device(np.ascontiguousarray(decode_rgb(file).transpose(2, 0, 1)), device) for file in files]


def _resize(
    crops_NHCW: torch.Tensor, heights_N: torch.Tensor, widths_N: torch.Tensor, view_px: tuple[int, int]
) -> torch.Tensor:
    """Resize the top left `heights_N` x `widths_N` pixels of each crop: float32 [N, S, C, T].

    Exact to one level with or without TF32 (which this program does not enable). TF32 keeps 11 bits of each factor, and
    pixels have 8. The relative error of the weights and of the values between the products is at most 2^-12, in total
    3 * 255 * 2^-12 = 0.2.
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
    """Return the weight of each pixel of a line in each pixel of the view: float32 [N, view_px, longest].

    The filter is a triangle around (i + 0.5) * scale, max(1, scale) wide on each side. The weights of each pixel of the
    view add up to 1.
    Source: torch's `interpolate(mode="bilinear", antialias=True)`, aten/src/ATen/native/UpSample.h and
    cuda/UpSampleBilinear2d.cu.

    Args:
        lengths_N: pixels in each line.
        longest: the largest of them.
        view_px: pixels in a line of the view.
    """
    scale_N11 = (lengths_N / view_px)[:, None, None]
    centre = (torch.arange(view_px, device=lengths_N.device)[:, None] + 0.5) * scale_N11  # [N, view_px, 1]
    at = torch.arange(longest, device=lengths_N.device) + 0.5  # centres of the pixels
    weights = (1 - (at - centre).abs() / scale_N11.clamp(min=1)).clamp_(min=0)
    weights *= at < lengths_N[:, None, None]
    return weights / weights.sum(2, keepdim=True)
