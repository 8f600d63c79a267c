"""Data sets and their augmentation."""

import shutil

import numpy as np
import pytest
import torch

import data
from runtime.processes import Processes
from train import parse_args
from utils import UserError


def numbered_images(count=20, size=8):
    """Image k has the value k + 1 everywhere, but for a marked pixel at row 2, column 5."""
    pixels = torch.arange(1, count + 1, dtype=torch.uint8)[:, None, None, None].repeat(1, size, size, 3)
    pixels[:, 2, 5] = 255
    return data.Images(pixels, torch.arange(count), [str(k) for k in range(count)])


PLAIN = data.Normalization(mean=(0.0, 0.0, 0.0), std=(1 / 255,) * 3)  # leaves pixel values as they are
BARE = data.Augmentation(pad=0, flip=False, cutout_length=0)


def test_digits():
    train, test = (data.load("digits", "unused", part) for part in (True, False))
    assert (len(train), len(test)) == (1437, 360)
    assert train.pixels.shape == (1437, 8, 8, 3) and train.pixels.dtype == torch.uint8
    assert train.pixels.max() == 255 and len(train.classes) == 10
    seen = {image.numpy().tobytes() for image in train.pixels}
    assert sum(image.numpy().tobytes() in seen for image in test.pixels) < 5  # a few digits are pixel-equal


def test_image_size_and_subset():
    images = data.load("digits", "unused", True, image_size=20, subset=50, seed=3)
    assert images.pixels.shape == (50, 20, 20, 3)
    again = data.load("digits", "unused", True, image_size=20, subset=50, seed=3)
    other = data.load("digits", "unused", True, image_size=20, subset=50, seed=4)
    assert torch.equal(images.pixels, again.pixels) and not torch.equal(images.pixels, other.pixels)


def test_folder(image_folder):
    train = data.load("folder", image_folder, True)
    assert train.pixels.shape == (24, 32, 32, 3)
    assert train.classes == ["blue", "green", "red"]
    brightest = train.pixels.float().mean((1, 2)).argmax(1)  # of red, green, blue
    assert torch.equal(brightest, 2 - train.labels)
    assert len(data.load("folder", image_folder, False, image_size=12)) == 12


def test_val_is_a_name_for_the_test_folder(image_folder, tmp_path):
    shutil.copytree(image_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "test").rename(tmp_path / "val")
    assert len(data.load("folder", tmp_path, False)) == 12


def test_an_epoch_is_every_image_once():
    batches = data.Batches(numbered_images(), 6, PLAIN, BARE, key=(1, 0))
    assert len(batches) == 4
    labels = torch.cat([batches.batch(0, step)[1] for step in range(4)])
    assert sorted(labels.tolist()) == list(range(20))
    other = torch.cat([batches.batch(1, step)[1] for step in range(4)])
    assert sorted(other.tolist()) == list(range(20)) and not torch.equal(labels, other)


def test_a_last_batch_of_one_image_is_left_out():
    batches = data.Batches(numbered_images(19), 6, PLAIN, BARE)
    assert len(batches) == 3
    assert sum(len(target) for _, target in batches) == 19  # but not in evaluation


def test_one_image_is_too_few_to_train_on_but_not_to_evaluate():
    with pytest.raises(ValueError, match="two images or more"):
        data.Batches(numbered_images(1), 2, PLAIN, BARE)
    assert len(list(data.Batches(numbered_images(1), 2, PLAIN, None))) == 1


@pytest.mark.parametrize("more", [{}, dict(resized_crop=True, color_jitter=0.4)], ids=["crop", "resized_crop"])
def test_a_batch_depends_on_seed_epoch_and_step_alone(more):
    images, augmentation = numbered_images(), data.Augmentation(pad=2, flip=True, cutout_length=3, **more)
    first, second = (data.Batches(images, 6, PLAIN, augmentation, key=(1, 0)) for _ in range(2))
    ahead = first.batch(3, 2)
    for step in range(4):
        second.batch(2, step)
    assert all(torch.equal(a, b) for a, b in zip(ahead, second.batch(3, 2), strict=True))
    other = data.Batches(images, 6, PLAIN, augmentation, key=(2, 0)).batch(3, 2)
    assert not torch.equal(ahead[0], other[0])


def test_a_second_lap_is_shuffled_anew():
    batches = data.Batches(numbered_images(), 5, PLAIN, BARE)
    laps = [torch.cat([batches.batch(0, step)[1] for step in range(k, k + 4)]) for k in (0, 4)]
    assert sorted(laps[1].tolist()) == list(range(20)) and not torch.equal(*laps)


@pytest.mark.parametrize("count", [2, 3])
def test_processes_share_the_batches_of_one(count):
    images, augmentation = numbered_images(21), data.Augmentation(pad=2, flip=True, cutout_length=3)
    whole, *shares = (
        data.Batches(images, 8, PLAIN, augmentation, (1, 0), team=Processes(rank, of))
        for rank, of in [(0, 1), *((rank, count) for rank in range(count))]
    )
    for step in range(2):
        for expected, *parts in zip(whole.batch(4, step), *(batches.batch(4, step) for batches in shares), strict=True):
            assert all(torch.equal(part, expected[rank::count]) for rank, part in enumerate(parts))
        assert whole.images(step) == shares[0].images(step) == 8
    for batches in shares:  # the last one of five images: for three processes, too few to share
        share = slice(batches.team.rank, None, count) if count == 2 else slice(None)
        assert torch.equal(batches.batch(4, 2)[0], whole.batch(4, 2)[0][share]) and batches.images(2) == 5


@pytest.mark.parametrize("images", [21, 25, 2])
def test_processes_share_an_evaluation(images):
    shares = [
        list(data.Batches(numbered_images(images), 8, PLAIN, None, (0, 0), team=Processes(r, 3))) for r in range(3)
    ]
    assert len({len(batches) for batches in shares}) == 1  # so that they can agree after each
    for rank, batches in enumerate(shares):
        assert torch.cat([target for _, target in batches]).tolist() == list(range(rank, images, 3))
        assert all(input.shape == (len(target), 3, 8, 8) for input, target in batches)


def test_evaluation_images_are_plain_and_in_order():
    images = numbered_images()
    for augmentation in (None, data.Augmentation(pad=3, flip=True, cutout_length=4)):
        batches = list(data.Batches(images, 8, PLAIN, augmentation))
        assert [len(target) for _, target in batches] == [8, 8, 4]
        assert torch.equal(torch.cat([target for _, target in batches]), images.labels)
        input = torch.cat([input for input, _ in batches])
        assert torch.allclose(input, images.pixels.permute(0, 3, 1, 2).float())


def test_normalization_of_own_images():
    torch.manual_seed(0)
    images = data.Images(torch.randint(256, (50, 4, 4, 3), dtype=torch.uint8), torch.zeros(50).long(), ["a"])
    ((input, _),) = data.Batches(images, 50, data.Normalization.of("folder", lambda: images), None)
    assert torch.allclose(input.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(input.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-4)


def test_the_crop_is_uniform_and_padded_with_black():
    images = numbered_images(200)
    batches = data.Batches(images, 200, PLAIN, data.Augmentation(pad=1, flip=False, cutout_length=0))
    shifts = []
    for epoch in range(20):
        input, target = batches.batch(epoch, 0)
        assert torch.equal(input[:, 0, 4, 3].long(), target + 1)
        y = (input[:, 0] == 255).flatten(1).float().argmax(1) // 8
        x = (input[:, 0] == 255).flatten(1).float().argmax(1) % 8
        shifts += list(zip((2 - y).tolist(), (5 - x).tolist(), strict=True))
        moved_down = y == 3
        assert (input[moved_down][:, :, 0] == 0).all()
    counts = np.array([shifts.count((dy, dx)) for dy in (-1, 0, 1) for dx in (-1, 0, 1)])
    assert counts.sum() == len(shifts)  # nothing else occurs
    assert abs(counts / len(shifts) - 1 / 9).max() < 0.02


def mirrored_at_random(flip, epochs=200):
    """Whether each of 20 images was mirrored (epochs, 20), and how many of each batch of 10 were."""
    batches = data.Batches(numbered_images(), 10, PLAIN, data.Augmentation(pad=0, flip=flip, cutout_length=0))
    found, counts = torch.zeros(epochs, 20, dtype=torch.bool), []
    for epoch in range(epochs):
        for step in range(2):
            input, target = batches.batch(epoch, step)
            mirrored, straight = input[:, 0, 2, 2] == 255, input[:, 0, 2, 5] == 255
            assert (mirrored ^ straight).all()
            found[epoch, target] = mirrored
            counts.append(mirrored.sum())
    return found.float(), torch.stack(counts).float()


def test_every_image_is_mirrored_half_of_the_time_independently_of_the_others():
    found, counts = mirrored_at_random(data.Augmentation.of("folder", 32, 0).flip)
    assert (found.mean(0) - 0.5).abs().max() < 0.15  # four standard deviations
    assert counts.mean().item() == pytest.approx(5, abs=0.35)
    assert counts.var().item() == pytest.approx(2.5, abs=0.8)  # of a binomial distribution
    together = torch.corrcoef(found.T) - torch.eye(20)
    assert together.abs().max() < 0.35


def test_a_resized_crop_is_a_part_of_its_image_and_jitter_changes_its_colours():
    images = numbered_images()
    images.pixels[:] = images.labels[:, None, None, None] * 10 + 20
    crop = data.Augmentation.of("folder", 8, 0, resized_crop=True)
    input, target = data.Batches(images, 20, PLAIN, crop).batch(0, 0)
    assert torch.allclose(input, (target[:, None, None, None] * 10 + 20).expand_as(input).float())
    jittered, same = data.Batches(images, 20, PLAIN, crop._replace(color_jitter=0.5)).batch(0, 0)
    assert torch.equal(target, same) and (jittered - input).abs().amax((1, 2, 3)).gt(0.1).float().mean() > 0.9
    assert jittered.min() >= 0 and jittered.max() <= 255 and jittered.is_contiguous(memory_format=torch.channels_last)


def test_augmentation_of_flags():
    args = parse_args("--dataset digits --augment resized_crop --color_jitter 0.3 --cutout --cutout_length 4".split())
    assert data.Augmentation.of_flags(args) == (0, False, 4, True, 0.3)
    assert data.Augmentation.of_flags(parse_args([])) == (4, True, 0, False, 0.0)


def test_digits_are_not_mirrored():
    found, _ = mirrored_at_random(data.Augmentation.of("digits", 8, 0).flip, epochs=5)
    assert not found.any()


def test_cutout_cuts_a_square_that_the_edge_may_clip():
    batches = data.Batches(numbered_images(200), 200, PLAIN, data.Augmentation(pad=0, flip=False, cutout_length=4))
    input, _ = batches.batch(0, 0)
    holes = (input == 0).all(1)
    assert torch.equal(holes, (input == 0).any(1))
    heights, widths = holes.any(2).sum(1), holes.any(1).sum(1)
    assert torch.equal(holes.sum((1, 2)), heights * widths)
    assert {2, 3, 4} == set(heights.tolist()) == set(widths.tolist())
    assert not torch.equal(holes[0], holes[1])


def test_padding_is_in_the_originals_proportion():
    assert data.Augmentation.of("cifar10", 32, 16) == data.Augmentation(pad=4, flip=True, cutout_length=16)
    assert data.Augmentation.of("digits", 8, 0) == data.Augmentation(pad=1, flip=False, cutout_length=0)


def test_input_is_channels_last():
    input, _ = data.Batches(numbered_images(), 5, PLAIN, BARE).batch(0, 0)
    assert input.shape == (5, 3, 8, 8) and input.is_contiguous(memory_format=torch.channels_last)


def test_split_is_a_partition():
    train, rest = data.split(numbered_images(), 0.3, seed=1)
    assert len(train) == 6
    assert sorted([*train.labels.tolist(), *rest.labels.tolist()]) == list(range(20))
    assert torch.equal(data.split(numbered_images(), 0.3, seed=1)[0].labels, train.labels)
    with pytest.raises(UserError, match="leaves one part empty"):
        data.split(numbered_images(), 0.01, seed=1)


def rename(root):
    (root / "train" / "red").rename(root / "train" / "azure")


def swap(root):
    for old, new in (("000", "x"), ("001", "000"), ("x", "001")):
        (root / "train" / "red" / f"{old}.png").rename(root / "train" / "red" / f"{new}.png")


@pytest.mark.parametrize(
    "change, says",
    [
        (rename, "the classes differ in 'azure'"),
        (lambda root: (root / "train" / "red" / "003.png").unlink(), "class 'red' had 8 images and has 7"),
        (swap, "other pixels or another order"),
        (lambda root: None, None),
    ],
)
def test_images_that_changed_are_noticed(image_folder, tmp_path, change, says):
    before = data.fingerprint(data.load("folder", image_folder, True))
    root = shutil.copytree(image_folder, tmp_path / "images")
    change(root)
    now = data.fingerprint(data.load("folder", root, True))
    if says is None:
        data.check_unchanged("train", before, now)
    else:
        with pytest.raises(UserError, match="the train images are not those that the run began with") as caught:
            data.check_unchanged("train", before, now)
        assert says in str(caught.value)


def test_test_classes_must_be_the_training_classes(image_folder, tmp_path):
    shutil.copytree(image_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "test" / "red").rename(tmp_path / "test" / "rot")
    train, test = (data.load("folder", tmp_path, part) for part in (True, False))
    with pytest.raises(UserError, match="they lack 'red'"):
        data.check_classes(test, train.classes)
    with pytest.raises(UserError, match="'rot' is not one of those"):
        data.check_classes(test, ["blue", "green"])


def same(batch, other):
    return all(map(torch.equal, batch, other))


@pytest.mark.parametrize("fit", ["crop", "squeeze"])
def test_batches_from_the_disk_are_those_from_memory(photographs, fit):
    kept, streamed = (
        data.load("folder", photographs, True, 16, subset=41, seed=2, fit=fit, data_in=where, workers=2)
        for where in ("memory", "disk")
    )
    assert kept.names == streamed.names and kept.classes == streamed.classes
    normalization = data.Normalization.of("folder", lambda: kept)
    assert normalization == data.Normalization.of("folder", lambda: streamed)
    augmentation = data.Augmentation(pad=2, flip=True, cutout_length=6)
    for part, other in zip(data.split(kept, 0.4, 2), data.split(streamed, 0.4, 2), strict=True):
        batches, ahead = (data.Batches(p, 6, normalization, augmentation, (2, 0), steps=5) for p in (part, other))
        assert len(batches) == len(ahead) < 5  # the last steps of an epoch begin another pass
        for epoch, step in [(0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (1, 0), (7, 3), (7, 4), (8, 0), (0, 0)]:
            assert same(batches.batch(epoch, step), ahead.batch(epoch, step))
        for _ in range(2):
            assert all(same(*pair) for pair in zip(batches, ahead, strict=True))
        assert same(batches.batch(3, 1), ahead.batch(3, 1))


@pytest.mark.parametrize("workers, share", [(1, 1), (2, 1), (5, 2)])
def test_parts_that_are_decoded_at_the_same_time_share_the_workers(photographs, workers, share):
    images = data.load("folder", photographs, True, 8, data_in="disk", workers=workers)
    assert [part.workers for part in data.split(images, 0.5, seed=0)] == [share, share]


def test_an_epoch_from_the_disk_waits_for_nothing_at_its_end(photographs):
    """What is read ahead is what is asked for, from epoch to epoch and from validation to validation."""
    images = data.load("folder", photographs, True, 8, data_in="disk", workers=1)
    batches = data.Batches(images, 25, PLAIN, BARE, steps=4)
    batches.batch(0, 0)
    started = batches._reader._results._sampler_iter
    for epoch, step in [(0, 1), (0, 2), (0, 3), (1, 0), (1, 1)]:
        batches.batch(epoch, step)
    assert batches._reader._results._sampler_iter is started
    assert batches._ahead._coming[0] == (1, 2)  # and is made by now, or soon
    plain = data.Batches(images, 25, PLAIN, None)
    assert len([*plain]) == 3
    started = plain._reader._results._sampler_iter
    assert len([*plain]) == 3 and plain._reader._results._sampler_iter is started


def test_large_sets_stay_on_the_disk(photographs, monkeypatch):
    kinds = []
    for limit in (60 * 8 * 8 * 3, 60 * 8 * 8 * 3 - 1):
        monkeypatch.setattr(data, "IN_MEMORY", limit)
        kinds.append(type(data.load("folder", photographs, True, 8)))
    assert kinds == [data.Images, data.StreamedImages]
    assert type(data.load("folder", photographs, True, 8, data_in="memory")) is data.Images
    with pytest.raises(UserError, match="--data_in disk is for --dataset folder"):
        data.load("digits", "unused", True, data_in="disk")


def test_statistics_of_many_images_are_those_of_some(monkeypatch):
    images = numbered_images(100)
    monkeypatch.setattr(data, "_SAMPLE", 20)
    expected = images.pixels[::5].float().mean((0, 1, 2)) / 255
    assert torch.allclose(torch.tensor(data.Normalization.of("folder", lambda: images).mean), expected)


@pytest.mark.parametrize("before, now", [("memory", "disk"), ("disk", "memory"), ("disk", "disk")])
def test_images_may_move_between_memory_and_disk_but_not_change(photographs, tmp_path, before, now):
    root = shutil.copytree(photographs, tmp_path / "elsewhere")
    first = data.fingerprint(data.load("folder", photographs, True, 8, data_in=before))
    data.check_unchanged("train", first, data.fingerprint(data.load("folder", root, True, 8, data_in=now)))
    path = root / "train" / "dawn" / "000.jpg"
    path.write_bytes((root / "train" / "dawn" / "010.jpg").read_bytes())
    with pytest.raises(UserError, match="as many images, but other"):
        data.check_unchanged("train", first, data.fingerprint(data.load("folder", root, True, 8, data_in=now)))
