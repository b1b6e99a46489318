"""A byte-level language model on the topics of Python's own help, which every CPython carries.

The text is `pydoc_data.topics`: all topics in the order of their names. Topics repeat whole
sections of each other, so only the first copy of each paragraph is kept; without that, one in
twelve of the validation bytes would have been seen in training. What is left is cut, in this order
and without shuffling, into 80% to train, 10% to validate and 10% to test.

The text differs between Python versions, and so do all results; `Workload.version` names it by the
start of its SHA-256.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import lzma
import zlib
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from playbook_optax import _checks
from playbook_optax.trials.workload import Workload
from playbook_optax.zoo import blocks

NUM_BYTES = 256
_NUM_EVAL_WINDOWS = 128
_NATS_PER_BIT = 0.6931471805599453

Parts = tuple[np.ndarray, np.ndarray, np.ndarray]


@functools.cache
def _text() -> tuple[Parts, str]:
    """Train, valid and test bytes, uint8 and read-only, and the start of the hash of them all."""
    topics = importlib.import_module("pydoc_data.topics").topics
    kept: dict[str, str] = {}
    for name in sorted(topics):
        for paragraph in topics[name].split("\n\n"):
            # Topics indent each other's paragraphs differently.
            kept.setdefault(" ".join(paragraph.split()), paragraph)
    text = "\n\n".join(kept.values()).encode()
    data = np.frombuffer(text, np.uint8)  # Read-only, because bytes are.
    ends = [len(data) * tenths // 10 for tenths in (8, 9)]
    train, valid, test = np.split(data, ends)
    return (train, valid, test), hashlib.sha256(text).hexdigest()[:12]


def _eval_windows(part: np.ndarray, context: int) -> np.ndarray:
    """At most 128 windows of context + 1 bytes, evenly spaced; shape (window, context + 1)."""
    num_windows = min(_NUM_EVAL_WINDOWS, (len(part) - 1) // context)
    starts = np.linspace(0, len(part) - 1 - context, num_windows).astype(np.int64)
    return part[starts[:, None] + np.arange(context + 1)]


def bytes_baselines() -> dict[str, float]:
    """What models without parameters to tune reach on the validation part, in bits per byte.

    All of them are for the whole validation part, of which `bytes_transformer` evaluates 128
    windows, giving each byte at most ``context`` bytes before it, and none at a window's start.

    Returns:
      ``uniform``: 8, all bytes alike. ``unigram``: frequencies of single bytes in the training
      part, one added to each count. ``zlib`` and ``lzma``: 8 times the compressed size of the
      validation part alone, per byte, at the hardest setting, headers included.
      ``zlib_after_train`` and ``lzma_after_train``: the same of what it adds when compressed
      after the training part; zlib looks back over 32 kB only. The last of these is the one to
      compare with a trained model.
      Python 3.11: 8.00, 4.65, 2.48, 2.35, 2.30, 1.85.

    Example:
      >>> from playbook_optax import zoo
      >>> baselines = zoo.bytes_baselines()
      >>> baselines["uniform"]
      8.0

    Source: playbook, "Choosing the model architecture" (know what a simple model reaches).
    """
    (train, valid, _), _ = _text()
    counts = np.bincount(train, minlength=NUM_BYTES) + 1.0
    bits = -np.log2(counts / counts.sum())
    found = {"uniform": 8.0, "unigram": float(bits[valid].mean())}
    before, after = train.tobytes(), valid.tobytes()
    for name, compress in (
        ("zlib", lambda text: zlib.compress(text, 9)),
        ("lzma", lambda text: lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)),
    ):
        added = len(compress(before + after)) - len(compress(before))
        found[name] = 8 * len(compress(after)) / len(after)
        found[f"{name}_after_train"] = 8 * added / len(after)
    return found


@_checks.named_arguments
def bytes_transformer(
    norm: str = "post",
    rezero: bool = False,
    *,
    num_layers: int = 4,
    width: int = 32,
    num_heads: int = 2,
    context: int = 64,
    batch_size: int = 16,
) -> Workload:
    """A small causal transformer that predicts the next byte of Python's help.

    Its default normalization, Norm(x + f(x)), is the placement that is known to cause trouble:
    here it is the patient. A training batch is windows of the training part at random places.

    Metrics are ``train/loss`` in nats per byte, as the training loss is, ``train/bits_per_byte``,
    the same in bits, and ``valid/bits_per_byte``, the objective; each is over 128 windows, evenly
    spaced. Test bytes reach nothing but `Workload.final_evaluate`.

    Args:
      norm: ``"post"``: Norm(x + f(x)); ``"pre"``: x + f(Norm(x)); ``"none"``: x + f(x).
      rezero: scale each residual branch by a parameter that starts at 0.
      num_layers: layers, each an attention and a feedforward branch.
      width: units of the residual stream.
      num_heads: heads of each attention; divides `width`.
      context: bytes in a window.
      batch_size: windows in a batch.

    Returns:
      The workload; its data are uint8: ``train``, shape (byte,), ``train_windows`` and
      ``valid_windows``, shape (window, context + 1).

    Raises:
      ValueError: an unknown placement, `rezero` that is no bool, a count that is not a positive
        integer, a width that the heads do not divide, or a context longer than the parts.

    Example:
      >>> from playbook_optax import zoo
      >>> zoo.bytes_transformer(norm="pre", num_layers=1).objective
      'valid/bits_per_byte'

    Source: playbook, "How can optimization failures be debugged and mitigated?"
    """
    _checks.check_choice("norm", norm, blocks.NORMS)
    _checks.check_flag("rezero", rezero)
    num_heads = _checks.check_count("num_heads", num_heads)
    width = _checks.check_count("width", width)
    if width % num_heads:
        raise ValueError(
            f"width = {width} must be a multiple of num_heads = {num_heads}: each head has its "
            "share of the units."
        )
    context = _checks.check_count("context", context)
    batch_size = _checks.check_count("batch_size", batch_size)
    (train, valid, test), digest = _text()
    if context >= len(valid):
        raise ValueError(
            f"context = {context} must be shorter than the validation part, {len(valid)} bytes."
        )
    module = blocks.Transformer(
        num_layers=_checks.check_count("num_layers", num_layers),
        width=width,
        num_heads=num_heads,
        context=context,
        num_tokens=NUM_BYTES,
        norm=norm,
        rezero=rezero,
    )

    def init(key: chex.PRNGKey) -> tuple[Any, Any]:
        return module.init(key, jnp.zeros((1, context), jnp.int32))["params"], {}

    def nats(params: Any, windows: chex.Array) -> chex.Array:
        """Mean loss over windows, shape (window, context + 1)."""
        windows = windows.astype(jnp.int32)
        logits = module.apply({"params": params}, windows[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:])
        return jnp.mean(losses)

    def loss(params: Any, state: Any, batch: chex.Array, key: chex.PRNGKey) -> Any:
        return nats(params, batch), (state, {})

    def batch(data: Any, key: chex.PRNGKey, step: chex.Array) -> chex.Array:
        text = data["train"]
        places = (batch_size, 1)
        starts = jax.random.randint(
            jax.random.fold_in(key, step), places, 0, text.shape[0] - context
        )
        return text[starts + jnp.arange(context + 1)[None]]

    def evaluate(params: Any, state: Any, data: Any) -> dict[str, chex.Array]:
        seen = nats(params, data["train_windows"])
        return {
            "train/loss": seen,
            "train/bits_per_byte": seen / _NATS_PER_BIT,
            "valid/bits_per_byte": nats(params, data["valid_windows"]) / _NATS_PER_BIT,
        }

    def evaluate_test(params: Any, state: Any, windows: Any) -> dict[str, chex.Array]:
        return {"test/bits_per_byte": nats(params, windows) / _NATS_PER_BIT}

    placement = "" if norm == "post" else f"_{norm}"
    return Workload(
        name=f"bytes_transformer{placement}{'_rezero' * rezero}",
        init=init,
        loss=loss,
        batch=batch,
        evaluate=evaluate,
        objective="valid/bits_per_byte",
        data={
            "train": train,
            "train_windows": _eval_windows(train, context),
            "valid_windows": _eval_windows(valid, context),
        },
        version=f"pydoc_data.topics sha256:{digest}",
        evaluate_test=evaluate_test,
        test_data=_eval_windows(test, context),
    )
