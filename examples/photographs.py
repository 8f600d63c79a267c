"""Make a small folder of real photographs, as `--dataset folder` wants it: from which picture is this detail?

python examples/photographs.py data/photographs          # needs scikit-image (pip install scikit-image)

A class is a photograph that scikit-image or scikit-learn ships; its images are details of it, of many sizes and both
orientations. Training and test images come from regions that share no pixel: the left 70 % and the right 30 %.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

import utils

FROM_SKLEARN = ("china", "flower")
FROM_SKIMAGE = (
    *("astronaut", "brick", "chelsea", "coffee", "grass", "gravel", "hubble_deep_field", "immunohistochemistry"),
    *("retina", "rocket"),
)
SPLIT = 0.7  # where the test region begins, of the width
SIDES, RATIOS = (100, 150), (3 / 4, 4 / 3)  # pixels of a detail's height, its width to its height


def load_photographs():
    """{name: image (H, W, 3) or (H, W)}.

    Raises:
        UserError: scikit-image is missing.
    """
    from sklearn.datasets import load_sample_image

    try:
        import skimage.data
    except ImportError:
        raise utils.UserError("this needs scikit-image: pip install scikit-image") from None
    found = {name: load_sample_image(f"{name}.jpg") for name in FROM_SKLEARN}
    return found | {name: getattr(skimage.data, name)() for name in FROM_SKIMAGE}


def details(photograph, part, count, rng):
    """Yield `count` random details of the region of a part."""
    H, W = photograph.shape[:2]
    cut = round(SPLIT * W)
    region = photograph[:, :cut] if part == "train" else photograph[:, cut:]
    for _ in range(count):
        h = rng.integers(*SIDES)
        w = min(region.shape[1], round(h * rng.uniform(*RATIOS)))
        y, x = rng.integers(H - h + 1), rng.integers(region.shape[1] - w + 1)
        yield region[y : y + h, x : x + w]


def parse_args():
    parser = utils.ArgumentParser(description="Make a small folder of real photographs.")
    parser.add_argument("folder", type=Path, help="a folder that is not there yet")
    parser.add_argument("--train", type=utils.number(int, low=2), default=64, help="training images of a class")
    parser.add_argument("--test", type=utils.number(int, low=1), default=20, help="test images of a class")
    parser.add_argument("--seed", type=utils.number(int, low=0), default=0, help="of the details")
    return parser.parse_args()


def main():
    args = parse_args()
    if args.folder.exists():
        raise utils.UserError(f"{args.folder} is there already: remove it, or name another folder")
    rng = np.random.default_rng(args.seed)
    photographs = load_photographs()
    for part, count in (("train", args.train), ("test", args.test)):
        for name, photograph in photographs.items():
            place = args.folder / part / name
            place.mkdir(parents=True)
            for k, detail in enumerate(details(photograph, part, count, rng)):
                Image.fromarray(detail).save(place / f"{k:03d}.jpg", quality=90)
    print(f"{len(photographs)} classes of {args.train} training and {args.test} test images in {args.folder}")


if __name__ == "__main__":
    utils.run_script(main)
