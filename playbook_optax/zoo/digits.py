"""Workloads on scikit-learn's handwritten digits: 1797 images of 8 x 8 pixels, ten classes.

1197 examples are to train, 300 to validate and 300 to test, by `split_seed`.
"""

from __future__ import annotations

import functools

import numpy as np

from playbook_optax import _checks
from playbook_optax.trials.workload import Workload
from playbook_optax.zoo import blocks, splits

NUM_TRAIN, NUM_VALID = 1197, 300
NUM_CLASSES, NUM_PIXELS = 10, 64


@functools.cache
def _digits(split_seed: int) -> tuple[splits.Split, splits.Split, splits.Split]:
    """The three parts."""
    datasets = _checks.require("sklearn.datasets", "data", "The digits data set")
    x, y = datasets.load_digits(return_X_y=True)
    order = splits.order(len(x), split_seed)
    x, y = x[order], y[order].astype(np.int32)
    # One mean and one deviation for all pixels: some pixels are blank in every training image.
    seen = x[:NUM_TRAIN]
    x = ((x - seen.mean()) / seen.std()).astype(np.float32)
    return splits.cut(x, y, NUM_TRAIN, NUM_VALID)


def _workload(
    module: object,
    name: str,
    batch_size: int,
    split_seed: int,
    shape: tuple[int, ...] = (NUM_PIXELS,),
) -> Workload:
    """A workload whose examples have this shape."""
    split_seed = _checks.check_count("split_seed", split_seed, at_least=0)
    train, valid, test = ((x.reshape(-1, *shape), y) for x, y in _digits(split_seed))
    return Workload.from_flax(
        module,
        train=train,
        valid=valid,
        test=test,
        batch_size=_checks.check_count("batch_size", batch_size),
        name=name,
    )


@_checks.named_arguments
def digits_mlp(
    *, width: int = 128, num_hidden: int = 1, batch_size: int = 128, split_seed: int = 0
) -> Workload:
    """A plain MLP on digits, which trains in seconds and is hard to upset.

    The objective is ``valid/error_rate``; pixels are standardized by mean and deviation of the
    training part; test examples reach nothing but `Workload.final_evaluate`.

    Args:
      width: units of each hidden layer.
      num_hidden: hidden layers.
      batch_size: training examples in a batch.
      split_seed: which of the random splits into the parts to train, to validate and to test.

    Returns:
      The workload; its data are NumPy arrays, x of shape (example, 64), y of shape (example,).

    Raises:
      ImportError: scikit-learn is not installed (the extra ``data``).
      ValueError: a count that is not a positive integer, a negative seed, or too large a batch.

    Example:
      >>> from playbook_optax import zoo
      >>> zoo.digits_mlp().data["train"]["x"].shape
      (1197, 64)

    Source: playbook, "Choosing the model architecture" (start from a simple, known model).
    """
    width = _checks.check_count("width", width)
    num_hidden = _checks.check_count("num_hidden", num_hidden)
    return _workload(
        blocks.MLP((width,) * num_hidden, NUM_CLASSES), "digits_mlp", batch_size, split_seed
    )


@_checks.named_arguments
def digits_cnn(
    *, channels: tuple[int, ...] = (16, 32), batch_size: int = 32, split_seed: int = 0
) -> Workload:
    """A small convolutional net on digits: the usual model for images, 50 MFLOP a training step.

    Objective, standardization and test examples are as in `digits_mlp`.

    Args:
      channels: channels of the 3 x 3 convolutions, in order.
      batch_size: training examples in a batch.
      split_seed: which of the random splits into the parts to train, to validate and to test.

    Returns:
      The workload; its data are NumPy arrays, x of shape (example, 8, 8, 1), y of shape (example,).

    Raises:
      ImportError: scikit-learn is not installed (the extra ``data``).
      ValueError: channels that are no non-empty tuple of positive integers, a batch size that is
        not a positive integer, a negative seed, or too large a batch.

    Example:
      >>> from playbook_optax import zoo
      >>> zoo.digits_cnn(channels=(8,)).data["train"]["x"].shape
      (1197, 8, 8, 1)

    Source: playbook, "Choosing the model architecture" (start from a simple, known model).
    """
    if not isinstance(channels, (tuple, list)) or not channels:
        raise ValueError(f"channels must be a tuple such as (16, 32), got {channels!r}.")
    channels = tuple(_checks.check_count("channels", count) for count in channels)
    return _workload(
        blocks.CNN(channels, NUM_CLASSES), "digits_cnn", batch_size, split_seed, (8, 8, 1)
    )


@_checks.named_arguments
def digits_resmlp(
    norm: str = "post",
    rezero: bool = False,
    *,
    num_blocks: int = 12,
    width: int = 64,
    batch_size: int = 64,
    split_seed: int = 0,
) -> Workload:
    """A deep residual MLP on digits, the unstable one.

    Its default normalization, Norm(x + f(x)), is the placement that is known to cause trouble:
    here it is the patient. The placement of a good design, x + f(Norm(x)), is ``norm="pre"``.
    Objective, standardization and test examples are as in `digits_mlp`.

    Args:
      norm: ``"post"``: Norm(x + f(x)); ``"pre"``: x + f(Norm(x)); ``"none"``: x + f(x).
      rezero: scale each residual branch by a parameter that starts at 0.
      num_blocks: residual blocks.
      width: units of the residual stream.
      batch_size: training examples in a batch.
      split_seed: which of the random splits into the parts to train, to validate and to test.

    Returns:
      The workload; its data are NumPy arrays, x of shape (example, 64), y of shape (example,).

    Raises:
      ImportError: scikit-learn is not installed (the extra ``data``).
      ValueError: an unknown placement, `rezero` that is no bool, a count that is not a positive
        integer, or too large a batch.

    Example:
      >>> from playbook_optax import zoo
      >>> zoo.digits_resmlp(norm="pre", num_blocks=2).objective
      'valid/error_rate'

    Source: playbook, "How can optimization failures be debugged and mitigated?"
    """
    _checks.check_choice("norm", norm, blocks.NORMS)
    _checks.check_flag("rezero", rezero)
    module = blocks.ResidualMLP(
        num_blocks=_checks.check_count("num_blocks", num_blocks),
        width=_checks.check_count("width", width),
        num_outputs=NUM_CLASSES,
        norm=norm,
        rezero=rezero,
    )
    placement = "" if norm == "post" else f"_{norm}"
    return _workload(
        module, f"digits_resmlp{placement}{'_rezero' * rezero}", batch_size, split_seed
    )


@_checks.named_arguments
def digits_recurrent(
    *,
    width: int = 64,
    pixels_per_step: int = 1,
    gain: float = 1.0,
    batch_size: int = 32,
    split_seed: int = 0,
) -> Workload:
    """A recurrent net that reads a digit pixel by pixel, and whose gradient explodes now and then.

    With momentum, training goes well for hundreds of steps and then spikes without warning, with
    a gradient norm far above the others: mid-training instability, the case for clipping.
    Objective, standardization and test examples are as in `digits_mlp`.

    Args:
      width: units of the state.
      pixels_per_step: pixels read at a time; divides 64. More of them make a shorter sequence.
      gain: the recurrent matrix starts as this many times an orthogonal one.
      batch_size: training examples in a batch.
      split_seed: which of the random splits into the parts to train, to validate and to test.

    Returns:
      The workload; its data are NumPy arrays, x of shape (example, 64 / pixels_per_step,
      pixels_per_step), y of shape (example,).

    Raises:
      ImportError: scikit-learn is not installed (the extra ``data``).
      ValueError: a count that is not a positive integer, pixels that do not divide the image, a
        gain that is not positive and finite, or too large a batch.

    Example:
      >>> from playbook_optax import zoo
      >>> zoo.digits_recurrent(pixels_per_step=8).data["train"]["x"].shape
      (1197, 8, 8)

    Source: playbook, "How can optimization failures be debugged and mitigated?" (instability in
    the middle of training, gradient clipping).
    """
    width = _checks.check_count("width", width)
    pixels_per_step = _checks.check_count("pixels_per_step", pixels_per_step)
    if NUM_PIXELS % pixels_per_step:
        raise ValueError(
            f"pixels_per_step = {pixels_per_step} must divide the {NUM_PIXELS} pixels of an image."
        )
    _checks.check_number("gain", gain, above=0.0)
    return _workload(
        blocks.RecurrentClassifier(width, NUM_CLASSES, gain),
        "digits_recurrent",
        batch_size,
        split_seed,
        (NUM_PIXELS // pixels_per_step, pixels_per_step),
    )
