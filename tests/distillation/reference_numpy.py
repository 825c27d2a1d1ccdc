"""The four losses in plain NumPy and float64, written from the formulas, one row at a time.

Nothing here is shared with the package: loops over rows, passages and tokens, lists of real
entries instead of masks, and gradients by central differences.
"""

from collections.abc import Callable

import numpy as np


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - np.max(x))
    return e / e.sum()


def log_softmax(x: np.ndarray) -> np.ndarray:
    return x - np.max(x) - np.log(np.exp(x - np.max(x)).sum())


def real(flags: np.ndarray) -> list[int]:
    return [i for i, flag in enumerate(flags) if flag]


def pdist_scores(logits_bktv: np.ndarray, targets_bt: np.ndarray) -> np.ndarray:
    """Mean over target tokens of log p(y_t | passage j alone)."""
    b, k = logits_bktv.shape[:2]
    g = np.zeros((b, k))
    for i in range(b):
        places = real(targets_bt[i] != 0)
        for j in range(k):
            values = [log_softmax(logits_bktv[i, j, t])[targets_bt[i, t]] for t in places]
            g[i, j] = sum(values) / len(values)
    return g


def loop_scores(logits_without_bktv: np.ndarray, targets_bt: np.ndarray) -> np.ndarray:
    """Mean over target tokens of -log p(y_t | all passages but j)."""
    b, k = logits_without_bktv.shape[:2]
    g = np.zeros((b, k))
    for i in range(b):
        places = real(targets_bt[i] != 0)
        for j in range(k):
            nll = 0.0
            for t in places:
                nll -= np.log(softmax(logits_without_bktv[i, j, t])[targets_bt[i, t]])
            g[i, j] = nll / len(places)
    return g


def adist_scores(
    attention_xbhts: np.ndarray,
    value_norms_xbhs: np.ndarray,
    source_mask_bkl: np.ndarray,
    targets_bt: np.ndarray,
    constant: float = 256.0,
) -> np.ndarray:
    """1/(256 L N) sum over layers, target tokens, source tokens of mean_h attention ||v||."""
    layers, b, h = attention_xbhts.shape[:3]
    k, length = source_mask_bkl.shape[1:]
    g = np.zeros((b, k))
    for i in range(b):
        places = real(targets_bt[i] != 0)
        for j in range(k):
            for x in range(layers):
                for t in places:
                    for position in real(source_mask_bkl[i, j]):
                        s = j * length + position
                        products = [
                            attention_xbhts[x, i, head, t, s] * value_norms_xbhs[x, i, head, s]
                            for head in range(h)
                        ]
                        g[i, j] += sum(products) / h
            g[i, j] /= constant * layers * len(places)
    return g


def kl_loss(
    gold_bk: np.ndarray,
    scores_bk: np.ndarray,
    mask_bk: np.ndarray,
    weight_b: np.ndarray,
    gold_temperature: float,
    score_temperature: float,
    reduction: str,
) -> float:
    """Mean over real rows (and passages, if 'released') of KL(target || retriever)."""
    total, rows, pairs = 0.0, 0, 0
    for i in real(weight_b):
        passages = real(mask_bk[i])
        if not passages:
            continue
        p = softmax(gold_bk[i, passages] / gold_temperature)
        log_q = log_softmax(scores_bk[i, passages] / score_temperature)
        total += sum(pj * (np.log(pj) - qj) for pj, qj in zip(p, log_q, strict=True) if pj > 0)
        rows += 1
        pairs += len(passages)
    return total / (pairs if reduction == "released" else rows)


def emdr2_loss(
    logits_bktv: np.ndarray,
    scores_bk: np.ndarray,
    targets_bt: np.ndarray,
    mask_bk: np.ndarray,
    weight_b: np.ndarray,
    gold_temperature: float,
    score_temperature: float,
) -> float:
    """- mean over target tokens of log sum_j p(y_t | passage j alone) p_retr(j)."""
    total, count = 0.0, 0
    for i in real(weight_b):
        passages = real(mask_bk[i])
        if not passages:
            continue
        q = softmax(scores_bk[i, passages] / score_temperature)
        for t in real(targets_bt[i] != 0):
            likelihood = 0.0
            for qj, j in zip(q, passages, strict=True):
                likelihood += (
                    qj * softmax(logits_bktv[i, j, t] / gold_temperature)[targets_bt[i, t]]
                )
            total -= np.log(likelihood)
            count += 1
    return total / count


def gradient(f: Callable[[np.ndarray], float], x: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """Central differences, float64."""
    g = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[index] += step
        down[index] -= step
        g[index] = (f(up) - f(down)) / (2 * step)
    return g
