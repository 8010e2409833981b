"""Procedural chest phantoms: radiograph-like images with known findings, made from a seed.

They stand in for radiographs where none may be shipped: tests, demonstrations, continuous
integration. Nothing in them comes from a patient, and a model made from them says nothing about
people. The drawing is a map of attenuation in a chest frame (x to the image's right, y down, both
about -1 to 1), to which a pose and the look of one of several imaging sources are applied.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage
from scipy.interpolate import splev, splprep
from tqdm import tqdm

from cxr_training.data.errors import DataError
from cxr_training.data.labels import COVID, NO_FINDING, PNEUMONIA

Array = npt.NDArray[np.float64]
Points = list[tuple[float, float]]

PHANTOM_LABELS = (COVID, NO_FINDING, PNEUMONIA)
METADATA_COLUMNS = ("filename", "patient", "sex", "age", "view", "style", "label")

# The canvas is larger than the field of view, so that a moved or turned patient still fills it.
_CANVAS = 400
_EXTENT = 1.2
_LEVELS = 255
_SIDES = (-1, 1)  # the patient's right lung stands on the image's left


@dataclass(frozen=True, kw_only=True)
class Style:
    """The look of one imaging source.

    Attributes:
        gamma: exponent of the display curve; above 1 darkens the lungs.
        window: attenuation shown as black and as white.
        noise: standard deviation of the detector noise, in grey levels of 0..1.
        blur: standard deviation of the detector blur, in canvas pixels.
        vignette: loss of brightness at the corners, 0..1.
        border: width of the black collimation border, as a fraction of the height.
        marker: side marker letter, drawn on the side of the patient that it names.
        aspect: width over height.
        suffix: file name suffix, which is also the format.
        scale: resolution relative to the requested size.
    """

    gamma: float
    window: tuple[float, float]
    noise: float
    blur: float
    vignette: float
    border: float
    marker: Literal["L", "R"]
    aspect: float
    suffix: Literal[".png", ".jpg"]
    scale: float


STYLES: dict[str, Style] = {
    "atrium": Style(
        gamma=1.0, window=(0.14, 1.08), noise=0.012, blur=0.6, vignette=0.10,
        border=0.0, marker="R", aspect=1.0, suffix=".png", scale=1.0,
    ),
    "bedside": Style(
        gamma=0.8, window=(0.10, 1.12), noise=0.018, blur=1.1, vignette=0.25,
        border=0.0, marker="L", aspect=1.18, suffix=".jpg", scale=0.85,
    ),
    "clinic": Style(
        gamma=1.25, window=(0.18, 1.02), noise=0.008, blur=0.4, vignette=0.05,
        border=0.03, marker="L", aspect=0.88, suffix=".png", scale=1.0,
    ),
    "film": Style(
        gamma=1.1, window=(0.08, 1.14), noise=0.014, blur=0.9, vignette=0.22,
        border=0.015, marker="R", aspect=0.82, suffix=".jpg", scale=0.7,
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Thorax:
    """Measures of one patient's chest, in the chest frame.

    Attributes:
        width: half-width of the rib cage at its widest.
        apex: height of the lung tops.
        domes: heights of the right and left diaphragm domes.
        tilt: sideways lean of the spine, from top to bottom.
    """

    width: float
    apex: float
    domes: tuple[float, float]
    tilt: float

    def wall(self, y: float) -> float:
        """Half-width of the rib cage at height `y`."""
        return float(self.width * max(1 - ((y - 0.25) / 1.27) ** 2, 0.05) ** 0.6)


@dataclass(frozen=True, kw_only=True)
class Patient:
    """One patient: what stays the same in all of the patient's images.

    Attributes:
        attenuation: the chest without a finding, shape `[canvas, canvas]`.
        opacity: attenuation that the finding adds at its full extent, same shape.
    """

    attenuation: Array
    opacity: Array


def generate_phantoms(
    folder: Path,
    *,
    patients_per_class: int,
    seed: int,
    images_per_patient: tuple[int, int] = (1, 3),
    size_range: tuple[int, int] = (320, 512),
    progress: bool = False,
) -> Path:
    """Write a tree of chest phantoms: `images/` and `metadata.csv`.

    The same arguments give the same bytes, given the same versions of NumPy, SciPy and Pillow.
    Each patient belongs to one source style; styles are dealt out evenly within each class, so
    that the style says nothing about the class.

    Args:
        folder: where to write; made if missing, must be empty.
        patients_per_class: patients for each of `PHANTOM_LABELS`.
        seed: not negative; patients of different seeds are different people.
        images_per_patient: fewest and most images of one patient.
        size_range: smallest and largest image height in pixels, before the style's scale.
        progress: draw a progress bar when stderr is a terminal.

    Returns:
        `folder`, ready for :func:`cxr_training.data.build_manifest`.

    Raises:
        DataError: an argument is out of range, or the folder holds something already.
    """
    _check_arguments(patients_per_class, seed, images_per_patient, size_range)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder} is not an empty folder; name a new one for the phantoms.")
    (folder / "images").mkdir(parents=True)
    plan = list(_plan(patients_per_class, seed))
    rows = [
        row
        for number, label, style in tqdm(
            plan, desc="phantoms", unit="patient", disable=None if progress else True
        )
        for row in _write_patient(
            folder,
            number=number,
            label=label,
            style=style,
            seed=seed,
            images_per_patient=images_per_patient,
            size_range=size_range,
        )
    ]
    frame = pd.DataFrame(rows, columns=list(METADATA_COLUMNS))
    frame.to_csv(folder / "metadata.csv", index=False, lineterminator="\n")
    return folder


def _check_arguments(
    patients_per_class: int, seed: int, images: tuple[int, int], sizes: tuple[int, int]
) -> None:
    if patients_per_class < 1:
        raise DataError("patients_per_class must be at least 1.")
    if seed < 0:
        raise DataError("The seed must not be negative.")
    if not 1 <= images[0] <= images[1]:
        raise DataError("images_per_patient must be a range that starts at 1 or more.")
    if not 64 <= sizes[0] <= sizes[1]:  # noqa: PLR2004 - below it, no text and no rib is legible
        raise DataError("size_range must be a range that starts at 64 pixels or more.")


def _plan(patients_per_class: int, seed: int) -> Iterator[tuple[int, str, str]]:
    """Number, label and style of each patient; numbers are shuffled, so that they tell nothing."""
    rng = np.random.default_rng([seed, 0])
    numbers = iter(rng.permutation(patients_per_class * len(PHANTOM_LABELS)) + 1)
    for label in PHANTOM_LABELS:
        for style in islice(cycle(rng.permutation(list(STYLES))), patients_per_class):
            yield int(next(numbers)), label, str(style)


def _write_patient(
    folder: Path,
    *,
    number: int,
    label: str,
    style: str,
    seed: int,
    images_per_patient: tuple[int, int],
    size_range: tuple[int, int],
) -> Iterator[tuple[str, str, str, int, str, str, str]]:
    rng = np.random.default_rng([seed, 1, number])
    sex = str(rng.choice(["F", "M"]))
    age = int(rng.integers(19, 91))
    patient = draw_patient(rng, sex, label)
    name = f"s{seed}-{number:04d}"
    for index in range(int(rng.integers(images_per_patient[0], images_per_patient[1] + 1))):
        filename = f"{name}-{index + 1}{STYLES[style].suffix}"
        view = str(rng.choice(["PA", "AP"]))
        image = _expose(rng, patient, STYLES[style], int(rng.integers(*size_range, endpoint=True)))
        # Pillow ignores `quality` for PNG.
        image.save(folder / "images" / filename, quality=90)
        yield filename, name, sex, age, view, style, label


# Anatomy


# Coordinates of the canvas pixels: x as one row, y as one column; arithmetic widens them.
_X = np.linspace(-_EXTENT, _EXTENT, _CANVAS)[None, :]
_Y = _X.T


def _pixels(points: Points) -> Points:
    scale = _CANVAS / (2 * _EXTENT)
    return [((x + _EXTENT) * scale, (y + _EXTENT) * scale) for x, y in points]


def _soften(image: Array, sigma: float) -> Array:
    """Gaussian blur; `sigma` in units of the chest frame."""
    return np.asarray(ndimage.gaussian_filter(image, sigma * _CANVAS / (2 * _EXTENT)))


def _region(outline: Points, softness: float) -> Array:
    """A closed smooth shape through the outline's points: 1 inside, 0 outside."""
    x, y = np.asarray([*outline, outline[0]]).T
    spline, _ = splprep([x, y], per=True, s=0)
    curve_x, curve_y = splev(np.linspace(0, 1, 160), spline)
    image = Image.new("L", (_CANVAS, _CANVAS))
    ImageDraw.Draw(image).polygon(_pixels(list(zip(curve_x, curve_y, strict=True))), fill=1)
    return _soften(np.asarray(image, dtype=np.float64), softness)


def _ellipse(center: tuple[float, float], radii: tuple[float, float], angle: float = 0.0) -> Array:
    """Normalised radius around an ellipse's centre: below 1 inside. `angle` in radians."""
    x, y = _X - center[0], _Y - center[1]
    cos, sin = np.cos(angle), np.sin(angle)
    along = x * (cos / radii[0]) + y * (sin / radii[0])
    across = y * (cos / radii[1]) - x * (sin / radii[1])
    return np.asarray(np.sqrt(along * along + across * across))


def _edge(inside: Array, softness: float) -> Array:
    """Soft step: 1 where `inside` is well above 0, 0 where well below."""
    return np.asarray(0.5 * (1 + np.tanh(inside / softness)))


def _bones(lines: list[Points], half_width: float) -> Array:
    """Tubular bones along lines: brighter at the cortex than within."""
    image = Image.new("1", (_CANVAS, _CANVAS), 1)
    draw = ImageDraw.Draw(image)
    for line in lines:
        draw.line(_pixels(line), fill=0)
    distance = ndimage.distance_transform_edt(np.asarray(image)) * (2 * _EXTENT / _CANVAS)
    inside = _edge(half_width - distance, 0.008)
    return np.asarray(inside * (0.55 + 0.45 * np.clip(distance / half_width, 0, 1) ** 2))


def _clouds(rng: np.random.Generator, scale: float) -> Array:
    """Smooth noise of mean 0 and standard deviation 1; `scale` in units of the chest frame."""
    # Coarse noise enlarged: much cheaper than a wide blur of fine noise.
    cells = max(4, round(2 * _EXTENT / scale))
    coarse = Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32))
    noise = np.asarray(coarse.resize((_CANVAS, _CANVAS), Image.Resampling.BICUBIC))
    return np.asarray((noise - noise.mean()) / noise.std(), dtype=np.float64)


def draw_patient(rng: np.random.Generator, sex: str, label: str) -> Patient:
    """Draw a patient of a sex (`F`, `M`) with the finding of one of `PHANTOM_LABELS`."""
    left_dome = rng.uniform(0.34, 0.58)
    thorax = _Thorax(
        width=rng.uniform(0.60, 0.80),
        apex=rng.uniform(-0.88, -0.70),
        domes=(left_dome - rng.uniform(0.02, 0.08), left_dome),
        tilt=rng.normal(0, 0.025),
    )
    lungs = [_lung(rng, thorax, side) for side in _SIDES]
    either = lungs[0] + lungs[1]
    # Air is deepest in the middle of a lung.
    heart = _heart(rng, thorax)
    depth = either * (0.66 + 0.28 * _soften(either, 0.12) - 0.13 * _Y)
    chest = (
        _body(rng, thorax)
        - rng.uniform(0.58, 0.68) * depth
        + _mediastinum(rng, thorax)
        + heart * (0.12 + 0.88 * either)
        + 0.16 * rng.uniform(0.8, 1.2) * _abdomen(rng, thorax) * (1 - either)
        + either * _vessels(rng, thorax)
        + _skeleton(rng, thorax)
        + 0.015 * _clouds(rng, 0.3)
        + either * 0.010 * _clouds(rng, 0.035)
    )
    if sex == "F":
        chest += _breasts(rng, thorax)
    # Behind the heart, a finding hardly shows.
    opacity = _finding(rng, thorax, [lung * (1 - 1.5 * heart) for lung in lungs], label)
    # Dense parts saturate: behind heart and spine, little radiation is left to differ.
    return Patient(attenuation=_compressed(chest), opacity=opacity)


def _compressed(attenuation: Array) -> Array:
    return np.asarray(1.45 * (1 - np.exp(-np.clip(attenuation, 0, None))))


def _lung(rng: np.random.Generator, thorax: _Thorax, side: int) -> Array:
    dome = thorax.domes[_SIDES.index(side)]
    wall, apex = thorax.wall, thorax.apex
    outline = [
        (0.24, apex),
        (wall(-0.62) - 0.06, -0.62),
        (wall(-0.35) - 0.03, -0.35),
        (wall(0.0) - 0.02, 0.0),
        (wall(0.3) - 0.02, 0.3),
        (wall(dome) - 0.03, dome + 0.14),
        (0.62 * thorax.width, dome + 0.02),
        (0.40 * thorax.width, dome - 0.02),
        (0.13, dome + 0.08),
        (0.09, 0.05),
        (0.09, -0.35),
        (0.12, -0.62),
    ]
    jitter = rng.normal(0, 0.010, (len(outline), 2))
    moved = [(side * (x + dx), y + dy) for (x, y), (dx, dy) in zip(outline, jitter, strict=True)]
    return _region(moved, 0.010)


def _body(rng: np.random.Generator, thorax: _Thorax) -> Array:
    """Soft tissue: neck, sloping shoulders, torso."""
    neck, slope = rng.uniform(0.24, 0.30), rng.uniform(0.30, 0.45)
    torso = thorax.width + rng.uniform(0.14, 0.24)
    shoulder = -0.98 + slope * np.clip(np.abs(_X) - neck, 0, None)
    arms = torso + 0.6 * _edge(-0.30 - _Y, 0.30)
    inside = _edge(arms - np.abs(_X), 0.03) * _edge(_Y - shoulder, 0.03)
    inside = np.maximum(inside, _edge(neck - np.abs(_X), 0.03))
    thickness = 0.78 + 0.22 * np.sqrt(np.clip(1 - (_X / (torso + 0.15)) ** 2, 0, 1))
    return np.asarray(rng.uniform(0.80, 0.92) * inside * thickness)


def _spine(thorax: _Thorax) -> Array:
    """The x of the spine at each pixel's height."""
    return np.asarray(thorax.tilt * _Y)


def _mediastinum(rng: np.random.Generator, thorax: _Thorax) -> Array:
    middle = _X - _spine(thorax)
    half_width = 0.125 + 0.03 * np.cos(2 * _Y + rng.uniform(0, 1))
    shadow = 0.34 * _edge(half_width - np.abs(middle), 0.05)
    knob = (rng.uniform(0.10, 0.14), rng.uniform(-0.36, -0.28))
    shadow = np.maximum(shadow, 0.30 * _edge(1 - _ellipse(knob, (0.085, 0.09)), 0.18))
    period = rng.uniform(0.125, 0.145)
    vertebrae = 0.75 + 0.25 * np.tanh(3 * np.cos(2 * np.pi * _Y / period))
    spine = _edge(0.062 - np.abs(middle), 0.012) * vertebrae
    trachea = _edge(0.032 - np.abs(middle - 0.01), 0.012) * _edge(-0.22 - _Y, 0.05)
    return np.asarray(shadow + 0.08 * spine - 0.16 * trachea)


def _heart(rng: np.random.Generator, thorax: _Thorax) -> Array:
    """Two thirds of it left of the spine: to the image's right."""
    center = (rng.uniform(0.07, 0.13), thorax.domes[1] - rng.uniform(0.11, 0.17))
    radii = (rng.uniform(0.28, 0.36), rng.uniform(0.19, 0.25))
    shape = _edge(1 - _ellipse(center, radii, rng.uniform(0.3, 0.6)), 0.10)
    return np.asarray(rng.uniform(0.42, 0.55) * shape)


def _abdomen(rng: np.random.Generator, thorax: _Thorax) -> Array:
    tissue = _edge(_Y - thorax.domes[1], 0.25)
    bubble = (rng.uniform(0.28, 0.40), thorax.domes[1] + rng.uniform(0.12, 0.17))
    radii = (rng.uniform(0.06, 0.15), rng.uniform(0.03, 0.06))
    return np.asarray(tissue - 1.2 * _edge(1 - _ellipse(bubble, radii), 0.2))


def _vessels(rng: np.random.Generator, thorax: _Thorax) -> Array:
    """Pulmonary vessels: they branch from the hila and thin out towards the wall."""
    image = Image.new("F", (_CANVAS, _CANVAS))
    draw = ImageDraw.Draw(image)
    hila: Array = np.zeros((_CANVAS, _CANVAS))
    for side in _SIDES:
        hilum = (side * rng.uniform(0.15, 0.18), rng.uniform(-0.14, -0.04))
        hila += _edge(1 - _ellipse(hilum, (0.06, 0.11), -0.25 * side), 0.5)
        reach = 0.85 * thorax.width
        for angle in np.linspace(-1.25, 1.35, 11) + rng.normal(0, 0.08, 11):
            length = reach * rng.uniform(0.5, 0.8)
            _branch(rng, draw, hilum, side=side, angle=angle, length=length, width=6.0)
    drawn = np.asarray(image, dtype=np.float64)
    return np.asarray(rng.uniform(0.8, 1.2) * (0.13 * hila + _soften(drawn, 0.005)))


def _branch(
    rng: np.random.Generator,
    draw: ImageDraw.ImageDraw,
    start: tuple[float, float],
    *,
    side: int,
    angle: float,
    length: float,
    width: float,
) -> None:
    """One vessel with its side branches. `angle` from the horizontal, in radians; `width` in px."""
    steps = 7
    x, y = start
    for step in range(steps):
        angle += rng.normal(0, 0.10)
        end = (x + side * np.cos(angle) * length / steps, y + np.sin(angle) * length / steps)
        taper = 1 - step / steps
        draw.line(
            _pixels([(x, y), end]), fill=0.04 + 0.10 * taper * width / 6, width=round(width * taper)
        )
        x, y = end
        if width > 3 and step in (2, 4):  # noqa: PLR2004 - two generations are visible
            turn = rng.choice([-0.55, 0.55])
            _branch(
                rng, draw, (x, y),
                side=side, angle=angle + turn, length=0.55 * length, width=0.6 * width,
            )  # fmt: skip


def _skeleton(rng: np.random.Generator, thorax: _Thorax) -> Array:
    first, spacing = thorax.apex + rng.uniform(0.0, 0.05), rng.uniform(0.132, 0.152)
    sag = rng.uniform(0.10, 0.18)
    t = np.linspace(0, 1, 24)
    back: list[Points] = []
    front: list[Points] = []
    for side in _SIDES:
        for rib in range(9):
            y0 = first + rib * spacing + rng.normal(0, 0.006)
            reach = thorax.wall(y0 + sag) + 0.015
            x = 0.06 + (reach - 0.06) * np.sin(0.5 * np.pi * t)
            y = y0 - 0.07 * np.sin(np.pi * t) + (sag + 0.016 * rib) * t**3
            back.append(list(zip(side * x + thorax.tilt * y, y, strict=True)))
            inner = 0.26 + 0.012 * rib
            x = reach - (reach - inner) * (1 - np.cos(0.5 * np.pi * t))
            y = y[-1] + 0.01 + (0.17 + 0.012 * rib) * t**0.8
            front.append(list(zip(side * x, y, strict=True)))
    rise, drop = rng.uniform(0.06, 0.17), rng.uniform(-0.03, 0.05)
    clavicles: list[Points] = []
    for side in _SIDES:
        x = 0.07 + 0.62 * t
        y = thorax.apex + 0.20 + drop - rise * t - 0.035 * np.sin(2 * np.pi * t)
        clavicles.append(list(zip(side * x, y, strict=True)))
    bones = (
        0.12 * _bones(back, 0.026) + 0.06 * _bones(front, 0.030) + 0.15 * _bones(clavicles, 0.026)
    )
    return np.asarray(rng.uniform(0.8, 1.2) * (bones + 0.07 * _scapulae(rng, thorax)))


def _scapulae(rng: np.random.Generator, thorax: _Thorax) -> Array:
    x, y = thorax.width + rng.uniform(-0.06, 0.02), thorax.apex + rng.uniform(0.12, 0.22)
    outline = [(x - 0.14, y + 0.10), (x + 0.10, y), (x + 0.26, y + 0.08), (x + 0.14, y + 0.30),
               (x + 0.04, y + 0.58), (x - 0.04, y + 0.48)]  # fmt: skip
    blades = [_region([(side * px, py) for px, py in outline], 0.012) for side in _SIDES]
    heads = [_edge(1 - _ellipse((s * (x + 0.33), y + 0.06), (0.11, 0.12)), 0.1) for s in _SIDES]
    return np.asarray(blades[0] + blades[1] + 1.3 * (heads[0] + heads[1]))


def _breasts(rng: np.random.Generator, thorax: _Thorax) -> Array:
    center = (0.58 * thorax.width, rng.uniform(0.22, 0.34))
    radii = (rng.uniform(0.24, 0.32), rng.uniform(0.22, 0.30))
    strength = rng.uniform(0.03, 0.09)
    both: Array = np.zeros((_CANVAS, _CANVAS))
    for side in _SIDES:
        radius = _ellipse((side * center[0], center[1]), radii)
        both += strength * _edge(1 - radius, 0.12) * np.clip(radius, 0.5, 1)
    return both


# Findings


def _finding(rng: np.random.Generator, thorax: _Thorax, lungs: list[Array], label: str) -> Array:
    if label == PNEUMONIA:
        return _lobar_consolidation(rng, thorax, lungs)
    if label == COVID:
        return _ground_glass(rng, thorax, lungs)
    return np.zeros((_CANVAS, _CANVAS))


def _lobar_consolidation(rng: np.random.Generator, thorax: _Thorax, lungs: list[Array]) -> Array:
    """One dense focus in one lobe, with a straight border where a fissure would stop it."""
    side = int(rng.integers(2))
    center = (
        _SIDES[side] * thorax.width * rng.uniform(0.48, 0.70),
        rng.choice([rng.uniform(-0.50, -0.25), rng.uniform(0.05, thorax.domes[side] - 0.10)]),
    )
    radii = (rng.uniform(0.22, 0.36), rng.uniform(0.20, 0.32))
    radius = _ellipse(center, radii, rng.uniform(-0.5, 0.5)) + 0.12 * _clouds(rng, 0.16)
    focus = _edge(1 - radius, rng.uniform(0.15, 0.35))
    fissure = _Y - center[1] + 0.2 * (_X - center[0])
    focus *= _edge(rng.choice([-1, 1]) * fissure + 0.75 * radii[1], 0.02)
    texture = 1 + 0.06 * _clouds(rng, 0.08)
    return np.asarray(lungs[side] * rng.uniform(0.34, 0.60) * focus * texture)


def _ground_glass(rng: np.random.Generator, thorax: _Thorax, lungs: list[Array]) -> Array:
    """Hazy patches in both lungs, near the wall, mostly low."""
    opacity: Array = np.zeros((_CANVAS, _CANVAS))
    strength = rng.uniform(0.22, 0.44)
    for side in range(2):
        haze: Array = np.zeros((_CANVAS, _CANVAS))
        for _ in range(int(rng.integers(3, 7))):
            y = rng.triangular(-0.35, thorax.domes[side] - 0.08, thorax.domes[side] + 0.02)
            x = _SIDES[side] * (thorax.wall(y) - rng.uniform(0.06, 0.20))
            radii = (rng.uniform(0.09, 0.18), rng.uniform(0.11, 0.22))
            radius = _ellipse((x, y), radii, rng.uniform(-0.4, 0.4)) + 0.22 * _clouds(rng, 0.10)
            haze = np.maximum(haze, rng.uniform(0.75, 1.0) * _edge(1 - radius, 0.40))
        opacity += lungs[side] * haze * rng.uniform(0.75, 1.0)
    texture = np.clip(1 + 0.22 * _clouds(rng, 0.045), 0.2, None)
    return np.asarray(strength * opacity * texture)


# Imaging


def _expose(rng: np.random.Generator, patient: Patient, style: Style, size: int) -> Image.Image:
    """One image of a patient: severity of the day, pose, exposure, detector, annotations."""
    attenuation = patient.attenuation + rng.uniform(0.75, 1.15) * patient.opacity
    height = round(size * style.scale)
    width = round(height * style.aspect)
    posed = _pose(rng, _soften(attenuation, style.blur * 2 * _EXTENT / _CANVAS), height, width)
    black, white = style.window
    exposure = rng.normal(1, 0.05)
    grey = np.clip((posed * exposure - black) / (white - black), 0, 1) ** style.gamma
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    grey *= 1 - style.vignette * (x**2 + y**2) / 2
    grey += style.noise * rng.standard_normal(grey.shape)
    margin = round(style.border * height)
    if margin:
        framed = np.zeros_like(grey)
        framed[margin:-margin, margin:-margin] = grey[margin:-margin, margin:-margin]
        grey = framed
    image = Image.fromarray(np.round(np.clip(grey, 0, 1) * _LEVELS).astype(np.uint8))
    _annotate(image, style.marker)
    return image


def _pose(rng: np.random.Generator, attenuation: Array, height: int, width: int) -> Array:
    """Turn, shift and scale the canvas into an image of `height` x `width` pixels."""
    angle, zoom = np.radians(rng.normal(0, 2.0)), rng.normal(1.0, 0.035)
    shift = rng.normal(0, 0.025, 2) * _CANVAS
    # Canvas pixels per image pixel; the image's height spans the chest frame's -1 to 1.
    step = _CANVAS / _EXTENT / height / zoom
    turn = step * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    offset = _CANVAS / 2 + shift - turn @ np.array([height / 2, width / 2])
    posed = ndimage.affine_transform(attenuation, turn, offset, (height, width), order=1)
    return np.asarray(posed)


def _annotate(image: Image.Image, marker: str) -> None:
    """Burn in the side marker, and the word that keeps a phantom from passing for a patient."""
    draw = ImageDraw.Draw(image)
    width, height = image.size
    x = 0.08 if marker == "R" else 0.92
    big = ImageFont.load_default(size=height / 16)
    draw.text((x * width, 0.10 * height), marker, fill=_LEVELS, font=big, anchor="mm")
    small = ImageFont.load_default(size=max(9.0, height / 30))
    draw.text(
        (0.5 * width, 0.985 * height), "SYNTHETIC", fill=_LEVELS, font=small, anchor="ms",
        stroke_width=1, stroke_fill=0,
    )  # fmt: skip
