"""How well `edges` follows human contours: the F-measure of BSDS500 (Arbeláez et al. 2011), ODS and OIS.

    python benchmarks/edges.py FOLDER --weights table5_pidinet.pth [--model pidinet] [--thresholds 19]

FOLDER has `images/*.jpg` and `groundTruth/*.mat`, as BSDS500 does. The steps are the benchmark's: thinning by
non-maximum suppression across the edge, thresholds, matching with a tolerance of 0.0075 of the diagonal, one pixel
to one pixel; a predicted pixel is right if any person's contour matches it, recall is over all people's. ODS takes
one threshold for all pictures, OIS the best for each.

Two things differ from the MATLAB code. Matching takes the nearest pairs first and then exchanges partners while
that frees one for a pixel left over, where theirs makes the most pairs at the least distance; it finds one or two
in a hundred fewer, so figures here are a little low. And the thinning is our own, after Canny's and the structured
edge toolbox's (which also fades a map out over the outermost 5 pixels, as is done here).
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from scipy.io import loadmat
from scipy.spatial import cKDTree

from x2i.pipelines.annotators.base import Item
from x2i.pipelines.annotators.edges import Edges
from x2i.pipelines.images import decode, read_header

TOLERANCE = 0.0075  # of the diagonal
BORDER = 5  # pixels


@dataclass
class Counts:
    """Sums over people and, by addition, over pictures."""

    matched_truth: float = 0.0
    truth: float = 0.0
    matched_found: float = 0.0
    found: float = 0.0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    @property
    def f(self) -> float:
        """The harmonic mean of precision and recall."""
        recall = self.matched_truth / self.truth if self.truth else 0.0
        precision = self.matched_found / self.found if self.found else 0.0
        return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def thin(edges: np.ndarray) -> np.ndarray:
    """Non-maximum suppression across the edge: float [height, width] of 0 to 1; what is no ridge becomes 0.

    The direction across comes from second derivatives of the smoothed map, which has a ridge where the edge is.
    """
    smooth = cv2.GaussianBlur(edges, (0, 0), 1.5)
    xx, yy, xy = (cv2.Sobel(smooth, cv2.CV_32F, *order, ksize=5) for order in ((2, 0), (0, 2), (1, 1)))
    angle = 0.5 * np.arctan2(2 * xy, xx - yy)  # of one principal axis; the other is a right angle off
    along = xx * np.cos(angle) ** 2 + yy * np.sin(angle) ** 2 + 2 * xy * np.sin(angle) * np.cos(angle)
    angle = np.where(along > (xx + yy) / 2, angle + np.pi / 2, angle)  # the axis of the more negative curvature
    rows, columns = np.mgrid[: edges.shape[0], : edges.shape[1]].astype(np.float32)
    dx, dy = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    kept = np.ones(edges.shape, bool)
    fine = cv2.GaussianBlur(edges, (0, 0), 1.0)
    for step in (-1, 1):
        beside = cv2.remap(
            fine, columns + step * dx, rows + step * dy, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
        )
        kept &= 1.01 * fine >= beside
    height, width = edges.shape
    fade_y, fade_x = (np.minimum(np.arange(n), np.arange(n)[::-1]) / BORDER for n in (height, width))
    return np.where(kept, edges, 0) * np.minimum(1, np.minimum(fade_y[:, None], fade_x[None]))


def skeleton(mask: np.ndarray) -> np.ndarray:
    """A one pixel wide mask (the benchmark thins every thresholded map)."""
    from skimage.morphology import thin as morphological

    return morphological(mask)


def match(found: np.ndarray, truth: np.ndarray, reach: float) -> tuple[np.ndarray, int]:
    """One-to-one matching of two masks' pixels no further apart than `reach` pixels.

    Returns: which of the found pixels (in order of rows) are matched, and how many pairs there are.
    """
    ours, theirs = np.argwhere(found), np.argwhere(truth)
    if not len(ours) or not len(theirs):
        return np.zeros(len(ours), bool), 0
    pairs = cKDTree(ours).sparse_distance_matrix(cKDTree(theirs), reach, output_type="ndarray")
    order = np.lexsort((pairs["j"], pairs["i"], pairs["v"]))
    i, j = pairs["i"][order], pairs["j"][order]
    partner_i, partner_j = np.full(len(ours), -1), np.full(len(theirs), -1)
    all_i, all_j = i, j
    while len(i):  # all pairs that are both partners' best are taken at once: the same as one after the other
        rank = np.arange(len(i))
        best_i, best_j = np.full(len(ours), len(i)), np.full(len(theirs), len(i))
        np.minimum.at(best_i, i, rank)
        np.minimum.at(best_j, j, rank)
        taken = (best_i[i] == rank) & (best_j[j] == rank)
        partner_i[i[taken]], partner_j[j[taken]] = j[taken], i[taken]
        left = (partner_i[i] < 0) & (partner_j[j] < 0)
        i, j = i[left], j[left]
    while _exchange(all_i, all_j, partner_i, partner_j):
        pass
    return partner_i >= 0, int((partner_i >= 0).sum())


def _exchange(i: np.ndarray, j: np.ndarray, partner_i: np.ndarray, partner_j: np.ndarray) -> bool:
    """Give free pixels the partner of another that has a free one within reach; False if there is none (in place)."""
    spare = np.full(len(partner_i), -1)  # for each of ours, a free one of theirs
    open_j = partner_j[j] < 0
    spare[i[open_j]] = j[open_j]
    wanted = (partner_i[i] < 0) & (partner_j[j] >= 0)
    chains = np.stack([i[wanted], j[wanted], partner_j[j[wanted]], spare[partner_j[j[wanted]]]], 1)
    chains = chains[chains[:, 3] >= 0]
    for column in (0, 1, 3):  # no pixel in two exchanges
        chains = chains[np.unique(chains[:, column], return_index=True)[1]]
    free, theirs, other, spared = chains.T
    partner_i[free], partner_j[theirs] = theirs, free
    partner_i[other], partner_j[spared] = spared, other
    return len(chains) > 0


def evaluate(edges: np.ndarray, contours: list[np.ndarray], thresholds: np.ndarray) -> list[Counts]:
    """Counts at each threshold, of a thinned map against several people's contours."""
    reach, out = TOLERANCE * float(np.hypot(*edges.shape)), []
    for threshold in thresholds:
        found = skeleton(edges >= threshold)
        total, any_match = Counts(found=float(found.sum())), np.zeros(int(found.sum()), bool)
        for contour in contours:
            matched, pairs = match(found, contour, reach)
            any_match |= matched
            total.matched_truth += pairs
            total.truth += float(contour.sum())
        total.matched_found = float(any_match.sum())
        out.append(total)
    return out


def contours_of(path: Path) -> list[np.ndarray]:
    """The contours that people drew, bool [height, width] each."""
    people = loadmat(path)["groundTruth"][0]
    return [person["Boundaries"][0, 0].astype(bool) for person in people]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="pidinet")
    parser.add_argument("--weights")
    parser.add_argument("--thresholds", type=int, default=19)
    parser.add_argument("--images", type=int, default=None, help="only the first so many")
    asked = parser.parse_args()
    given = {"weights": asked.weights} if asked.weights else {}
    annotator = Edges(Edges.Config(model=asked.model, **given))
    annotator.setup()
    thresholds = np.arange(1, asked.thresholds + 1) / (asked.thresholds + 1)
    counted, people, seconds = [], Counts(), 0.0
    for path in sorted((asked.folder / "images").glob("*.jpg"))[: asked.images]:
        data = path.read_bytes()
        header = read_header(data)
        item, start = Item(path.stem, None, data, header, decode(data, header)), time.perf_counter()
        png = annotator([item])["map"][0].as_py()
        seconds += time.perf_counter() - start
        edges = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED).astype(np.float32) / 255
        contours = contours_of(asked.folder / "groundTruth" / f"{path.stem}.mat")
        counted.append(evaluate(thin(edges), contours, thresholds))
        people += evaluate(contours[0].astype(np.float32), contours[1:], np.array([0.5]))[0]
    at = [sum((picture[i] for picture in counted), Counts()) for i in range(len(thresholds))]
    best = int(np.argmax([c.f for c in at]))
    print(f"the first person against the others, by the same code: F {people.f:.3f}")
    oracle = sum((max(picture, key=lambda c: c.f) for picture in counted), Counts())
    print(
        f"{len(counted)} pictures, {asked.model}: ODS {at[best].f:.3f} at {thresholds[best]:.3f}, OIS {oracle.f:.3f}, "
        f"{1000 * seconds / len(counted):.0f} ms a picture for the map"
    )


if __name__ == "__main__":
    main()
