"""From an image file to the input of this model, with torchvision.

    image = Image.open("photo.jpg")
    probabilities = (model(preprocess(image)[None]) / TEMPERATURE).softmax(1)     # in the order of CLASSES

Open the file with Pillow and pass it on unchanged: a large JPEG is then decoded at a fraction of its size.
"""

import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

CLASSES: list[str] = []
TEMPERATURE = 1.0
IMAGE_SIZE, RESIZE = 224, 256  # px: the shorter side is resized to RESIZE, then the centre is cut out
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class CentreSquare(torch.nn.Module):
    """Cut out the centre first and resize it once: PIL image -> uint8 [3, IMAGE_SIZE, IMAGE_SIZE]."""

    def forward(self, image: Image.Image) -> torch.Tensor:
        turn = image.getexif().get(0x0112, 1)
        turn = turn if turn in range(1, 9) else 1
        width, height = image.size if turn < 5 else image.size[::-1]
        shorter = min(height, width)
        side = min(shorter, max(1, round(shorter * IMAGE_SIZE / RESIZE)))
        factor = next((f for f in (8, 4, 2) if side >= 2 * f * IMAGE_SIZE), 1)
        top, left = (height - side) // 2, (width - side) // 2
        if factor > 1:
            side = min(round(side / factor), shorter // factor) * factor
            top, left = (min(round((n - side) / 2 / factor), (n - side) // factor) * factor for n in (height, width))
            if image.format in ("JPEG", "MPO") and not (turn != 1 and (height % factor or width % factor)):
                image.draft(None, (image.size[0] // factor, image.size[1] // factor))
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            layers = image.convert("RGBA")
            image_rgb = Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers).convert("RGB")
        else:
            image_rgb = image.convert("RGB")
        pixels = F.pil_to_tensor(image_rgb)
        if turn >= 5:
            pixels = pixels.transpose(1, 2)
        pixels = pixels.flip([axis for axis, turns in ((1, (3, 4, 7, 8)), (2, (2, 3, 6, 7))) if turn in turns])
        if pixels.shape[1] != height:
            top, left, side = top // factor, left // factor, side // factor
        view: torch.Tensor = F.resized_crop(pixels, top, left, side, side, [IMAGE_SIZE, IMAGE_SIZE], antialias=True)
        return view


preprocess = v2.Compose([CentreSquare(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
