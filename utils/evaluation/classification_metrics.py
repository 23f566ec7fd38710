"""The metrics of classification: a function or two and a row each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.evaluation.metrics import SumMetric


def counted(targets: Tensor) -> Tensor:
    """How many of a batch's targets (B,) count; -1 does not."""
    return (targets >= 0).sum()


def _hits(k: int) -> Callable[[Tensor, Tensor], Tensor]:
    """(images whose class is among the ``k`` largest logits, images counted), for ``k`` up to 5; with fewer classes all are right."""
    def sums(logits: Tensor, targets: Tensor) -> Tensor:
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices  # of five for every k: among equals the order must be the same
        return torch.stack([(best[:, :k] == targets[:, None]).sum(), counted(targets)])
    return sums


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    loss = F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")
    return torch.stack([loss, counted(targets).to(loss.dtype)])


def _ratio(scale: float) -> Callable[[Tensor], float]:
    def value(sums: Tensor) -> float:
        part, whole = sums.tolist()
        return scale * part / max(1, whole)
    return value


def _per_class(logits: Tensor, targets: Tensor) -> Tensor:
    """(3, C): of each class the images predicted rightly, its images, and the images predicted as it."""
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices[:, 0]
    counts = (targets >= 0).long()
    targets = targets.clamp(min=0)
    sums = torch.zeros(3, logits.shape[1], dtype=torch.int64, device=logits.device)
    sums[0].scatter_add_(0, targets, counts * (best == targets))
    sums[1].scatter_add_(0, targets, counts)
    sums[2].scatter_add_(0, best, counts)
    return sums


def _mean_recall(sums: Tensor) -> float:
    right, images, _ = sums.double()
    return 100 * float((right / images)[images > 0].mean())


def _macro_f1(sums: Tensor) -> float:
    right, images, predicted = sums.double()
    return 100 * float((2 * right / (images + predicted))[images > 0].mean())


def _kappa(sums: Tensor) -> float:
    """Cohen's kappa (1960): agreement beyond that of chance; 0 where chance alone agrees always."""
    right, images, predicted = sums.double()
    total = images.sum()
    observed, chance = float(right.sum() / total), float((images * predicted).sum() / total ** 2)
    return (observed - chance) / (1 - chance) if chance < 1 else 0.0


def _scores(logits: Tensor, targets: Tensor) -> Tensor:
    """(B, 2): how much likelier the second of two classes is, and the class."""
    return torch.stack([logits[:, 1] - logits[:, 0], targets.to(logits.dtype)], dim=1)


def _auroc(rows: Tensor) -> float:
    """Area under the ROC curve: how often an image of the second class scores above one of the first, a tie counting half, by the ranks
    of the scores (Mann and Whitney, 1947); nan without images of both."""
    from scipy.stats import rankdata
    scores, targets = rows[rows[:, 1] >= 0].numpy().T
    second = targets == 1
    images, others = int(second.sum()), int((~second).sum())
    if not images or not others:
        return math.nan
    return float(rankdata(scores)[second].sum() - images * (images + 1) / 2) / (images * others)


HEADLINE = (
    SumMetric("top1", "top1", sums=_hits(1), value=_ratio(100)),
    SumMetric("top5", "top5", sums=_hits(5), value=_ratio(100)),
    SumMetric("val_loss", "loss", higher_is_better=False, digits=4, sums=_loss, value=_ratio(1)),
)
METRICS = (*HEADLINE, SumMetric("mean_recall", "mean recall", sums=_per_class, value=_mean_recall))
# What TRAIN.BEST_METRIC may name besides.
OTHERS = (
    SumMetric("f1", "F1", sums=_per_class, value=_macro_f1),
    SumMetric("kappa", "kappa", digits=4, sums=_per_class, value=_kappa),
    SumMetric("auroc", "AUROC", digits=4, sums=_scores, value=_auroc, add=lambda a, b: torch.cat((a, b))),
)
FEW = 5  # classes up to which all are among the first five, so that top-5 says nothing
UNEVEN = 1.5  # images of the largest class over those of the smallest, from where the mean recall is told beside top-1


def detail(values: Mapping[str, float], samples: int) -> str:
    """``(313 of 360)``: images answered rightly, of all."""
    return f"({round(values['top1'] * samples / 100) if samples else 0} of {samples})"


def only_answer(sums: Tensor) -> int | None:
    """The class that all images of an evaluation, by its ``mean_recall`` sums, are taken for; None where there is not just one, or where
    all are of one class."""
    _, images, predicted = sums
    answers = predicted.nonzero().flatten().tolist()
    return answers[0] if len(answers) == 1 and int((images > 0).sum()) > 1 else None


def uneven(sums: Tensor) -> bool:
    """Whether the classes of an evaluation, by its ``mean_recall`` sums, have so different numbers of images that top-1 misleads."""
    images = sums[1][sums[1] > 0]
    return len(images) > 1 and float(images.max() / images.min()) > UNEVEN
