"""Say what is in images, with ONNX Runtime, Pillow and NumPy alone: neither PyTorch nor this code is needed.

python export.py RUN --format onnx --output network.onnx
python examples/predict.py network.onnx photograph.jpg another.png
"""

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def prepare(path, about):
    """An image as the network takes it: (1, 3, S, S) float32, or (1, H, W, 3) uint8 where it resizes by itself."""
    size = about["image_size"], about["image_size"]
    with Image.open(path) as image:
        image.draft(None, (2 * size[0], 2 * size[1]))  # of a large JPEG a fraction is decoded, as in training
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # of 16 bits, which convert() would clip
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    if about["with_preprocessing"]:
        return np.asarray(image)[None]
    fit = ImageOps.fit if about["fit"] == "crop" else Image.Image.resize
    pixels = np.asarray(fit(image, size, Image.BILINEAR), np.float32) / 255
    pixels = (pixels - np.float32(about["mean"])) / np.float32(about["std"])
    return pixels.transpose(2, 0, 1)[None]


def predict(session, about, path):
    """The most probable class, and its probability."""
    (logits,) = session.run(None, {"images": prepare(path, about)})
    scores = np.exp(logits[0] - logits[0].max())
    best = int(scores.argmax())
    return about["classes"][best], scores[best] / scores.sum()


def main():
    parser = argparse.ArgumentParser(description="Say what is in images, with a network that export.py wrote.")
    parser.add_argument("network", help="an ONNX file")
    parser.add_argument(
        "images",
        nargs="+",
        type=Path,
        help="files; of those in a folder that is named as a class, the accuracy is counted",
    )
    args = parser.parse_args()
    session = onnxruntime.InferenceSession(args.network)
    about = {name: json.loads(value) for name, value in session.get_modelmeta().custom_metadata_map.items()}
    right, known = 0, 0
    for path in args.images:
        name, probability = predict(session, about, path)
        print(f"{path}: {name} ({100 * probability:.1f} %)")
        known += path.parent.name in about["classes"]
        right += path.parent.name == name
    if known:
        print(f"{right} of {known} are in the folder of their class ({100 * right / known:.2f} %)")


if __name__ == "__main__":
    main()
