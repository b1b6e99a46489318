"""Which way is better: said by the caller, and asked for where a metric's name suggests rising."""

import re
from typing import Any

from playbook_optax._checks import check_flag

# Words of metrics that people want large.
_RISING_WORDS = (
    "acc accuracy accuracies precision recall sensitivity specificity f1 f2 fbeta f1score auc "
    "auroc auprc roc pr_auc prauc ap map iou miou giou dice jaccard kappa mcc r2 rsquared "
    "correlation corr pearson spearman kendall psnr ssim msssim snr sdr sisdr sisnr pesq stoi "
    "likelihood loglikelihood loglik elbo evidence bleu sacrebleu rouge rouge1 rouge2 rougel "
    "meteor chrf cider spice bertscore comet ndcg dcg mrr hit hits hitrate em match matches "
    "reward rewards return returns winrate wins success successes solved score scores "
    "throughput fps agreement gain profit sharpe "
)
# Words that turn the others round, or are of metrics that people want small.
_FALLING_WORDS = (
    "loss losses error errors err nll nlls neg negative minus perplexity ppl brier crps "
    "distance rmse mse mae mape regret cost costs wer cer ter fid kl divergence entropy "
    "deviance gap "
)
_RISING, _FALLING = frozenset(_RISING_WORDS.split()), frozenset(_FALLING_WORDS.split())
_TOP_OR_PASS = re.compile(r"(?:top|pass|hit|recall|precision|ndcg|map|acc)@?[0-9]+")
_PART = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+[0-9]*|[0-9]+")


def suggests_rising(metric: str) -> bool:
    """Whether a metric's name says that larger is better.

    Args:
      metric: such as "valid/accuracy"; what stands before the last "/" does not count.

    Returns:
      True for names that people use for what they maximize. False says nothing.

    Example:
      >>> [suggests_rising(n) for n in ("val_acc", "valid/top1", "mAP", "brier_score")]
      [True, True, True, False]
    """
    name = metric.rpartition("/")[2]
    # "mAP" is one word, "valAcc" is two.
    words = {name.lower(), *re.split(r"[^A-Za-z0-9@]+", name.lower())}
    words |= {part.lower() for part in _PART.findall(name)}
    if words & _FALLING:
        return False
    return bool(words & _RISING) or any(_TOP_OR_PASS.fullmatch(word) for word in words)


def direction(argument: str, metric: str, maximize: Any) -> bool:
    """Whether larger is better, as the caller says, or smaller where nothing speaks against it.

    Args:
      argument: what the metric's argument is called.
      metric: the metric's name.
      maximize: True, False, or None where it was not said.

    Returns:
      True to maximize.

    Raises:
      ValueError: it was not said, and the name suggests that larger is better.
      ArgumentTypeError: it is something else.
    """
    if maximize is not None:
        check_flag("maximize", maximize)
        return bool(maximize)
    if suggests_rising(metric):
        raise ValueError(
            f"maximize must be given for {argument} = {metric!r}: its name suggests that larger is "
            "better. Pass maximize=True (or False)."
        )
    return False
