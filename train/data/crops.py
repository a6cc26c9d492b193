"""Encoded photos to crops of one size: decoding and resizing by OpenCV, which lets go of Python's lock.

Whatever the file calls itself is looked at by its first bytes: grayscale and CMYK JPEGs and PNGs become RGB.
The orientation that a camera noted is ignored, as in PIL and TensorFlow.
"""

import math
from typing import NamedTuple

import cv2
import numpy as np

FULL = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
REDUCED = {
    factor: getattr(cv2, f"IMREAD_REDUCED_COLOR_{factor}") | cv2.IMREAD_IGNORE_ORIENTATION
    for factor in (2, 4, 8)
}
ATTEMPTS = 10  # at a crop that fits, as in torchvision
JPEG_START, JPEG_END = b"\xff\xd8", b"\xff\xd9"
# A frame of a JPEG starts at a marker C0 to CF except the tables C4 and CC and the extension C8.
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


class Crop(NamedTuple):
    """A rectangle in the pixels of a whole image."""

    top: int
    left: int
    height: int
    width: int


def training_crop(
    encoded: bytes,
    size: int,
    rng: np.random.Generator,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    out: np.ndarray,
) -> bool:
    """Write a random crop, resized and half the time mirrored, to `out`.

    A crop at least 2, 4 or 8 times `size` in both directions is decoded at that fraction of the resolution:
    the JPEG's own transform averages the pixels, and most of the decoding is saved. Then OpenCV's bilinear
    interpolation, where it skips no pixels (below a factor of 2); the mean over areas above that.

    Args:
      encoded: an image file.
      size: height and width of the result.
      rng: draws the crop and the mirroring.
      scale: least and largest share of the image's area.
      ratio: least and largest width / height.
      out: uint8 [size, size, 3], RGB.
    Returns:
      False if the image cannot be decoded; `out` is left as it was.

    Source: torchvision's RandomResizedCrop and RandomHorizontalFlip; departures: the interpolation.
    """
    shape, crop, factor = jpeg_shape(encoded), None, 1
    if shape is not None:
        crop = draw(rng, shape, scale, ratio)
        factor = next((f for f in (8, 4, 2) if min(crop.height, crop.width) >= f * size), 1)
    image = decode(encoded, REDUCED.get(factor, FULL))
    if image is None:
        return False
    if shape is None or crop is None:  # no JPEG: its size is known now, and nothing was to be saved
        crop = draw(rng, image.shape[:2], scale, ratio)
    elif image.shape[:2] != tuple(-(-side // factor) for side in shape):  # a header that lies
        return False
    rows = slice(crop.top // factor, -(-(crop.top + crop.height) // factor))
    columns = slice(crop.left // factor, -(-(crop.left + crop.width) // factor))
    part = image[rows, columns]
    shrinks = max(part.shape[:2]) >= 2 * size
    part = cv2.resize(
        part, (size, size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    )
    if rng.random() < 0.5:
        part = cv2.flip(part, 1)
    cv2.cvtColor(part, cv2.COLOR_BGR2RGB, dst=out)
    return True


def central_crop(encoded: bytes, size: int, *, resize: int, out: np.ndarray) -> bool:
    """Write the middle of the image to `out`, after its shorter side is resized to `resize`.

    Every pixel has its share (INTER_AREA) wherever the image shrinks.

    Args:
      encoded: an image file.
      size: height and width of the result.
      resize: at least `size`.
      out: uint8 [size, size, 3], RGB.
    Returns:
      False if the image cannot be decoded; `out` is left as it was.

    Source: torchvision's Resize and CenterCrop; departures: the interpolation.
    """
    image = decode(encoded)
    if image is None:
        return False
    height, width = image.shape[:2]
    shorter = min(height, width)
    height, width = (resize * side // shorter for side in (height, width))
    method = cv2.INTER_AREA if resize < shorter else cv2.INTER_LINEAR
    image = cv2.resize(image, (width, height), interpolation=method)
    top, left = (round((side - size) / 2) for side in (height, width))
    cv2.cvtColor(image[top : top + size, left : left + size], cv2.COLOR_BGR2RGB, dst=out)
    return True


def decode(encoded: bytes, flags: int = FULL) -> np.ndarray | None:
    """Return an image as uint8 [height, width, 3] in OpenCV's order, blue first; None if it is none."""
    if encoded[:2] == JPEG_START and encoded.rfind(JPEG_END) < 0:
        return None  # cut off: OpenCV 4 makes it up in gray, OpenCV 5 refuses it
    try:
        return cv2.imdecode(np.frombuffer(encoded, np.uint8), flags)
    except cv2.error:  # for some kinds of damage, and nothing at all
        return None


def draw(
    rng: np.random.Generator,
    shape: tuple[int, ...],
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> Crop:
    """Return a random crop of an image of `shape`: area uniform in `scale`, log(width / height) in `ratio`.

    Where ten of them do not fit in, the largest central one that `ratio` allows.
    """
    height, width = shape
    logs = math.log(ratio[0]), math.log(ratio[1])
    for area, log in zip(
        rng.uniform(*scale, ATTEMPTS).tolist(), rng.uniform(*logs, ATTEMPTS).tolist(), strict=True
    ):
        side, stretch = math.sqrt(height * width * area), math.exp(log / 2)
        h, w = round(side / stretch), round(side * stretch)
        if 0 < h <= height and 0 < w <= width:
            top, left = rng.integers((height - h + 1, width - w + 1)).tolist()
            return Crop(top, left, h, w)
    w = min(width, round(height * ratio[1]))
    h = min(height, round(width / ratio[0]))
    return Crop((height - h) // 2, (width - w) // 2, h, w)


def jpeg_shape(encoded: bytes) -> tuple[int, int] | None:
    """Return height and width from a JPEG's header, without decoding it; None if there is no such header."""
    if encoded[:2] != JPEG_START:
        return None
    at = 2
    while at + 9 <= len(encoded) and encoded[at] == 0xFF:
        marker = encoded[at + 1]
        if marker == 0xFF:  # a byte of padding
            at += 1
        elif marker in FRAMES:
            height, width = (
                int.from_bytes(encoded[start : start + 2], "big") for start in (at + 5, at + 7)
            )
            return (height, width) if height and width else None
        else:
            at += 2 + int.from_bytes(encoded[at + 2 : at + 4], "big")
    return None
