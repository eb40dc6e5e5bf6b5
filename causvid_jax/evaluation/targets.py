"""The figures that the digits recipes must reach, compared with those of a report."""

from typing import Any

from causvid_jax.evaluation import metrics

FRAME_TARGETS = {
    "teacher": {
        "digit": 0.95,
        "identity": 0.95,
        "color": 0.98,
        "direction": 0.98,
        "first_block": 0.93,
        "sharpness": 0.9,
    },
    "student": {
        "digit": 0.93,
        "identity": 0.9,
        "color": 0.97,
        "direction": 0.97,
        "first_block": 0.9,
        "sharpness": 0.85,
    },
    "long": {"identity": 0.9, "color": 0.96, "direction": 0.96, "sharpness": 0.85},
    "longest": {"identity": 0.9, "color": 0.96, "direction": 0.96, "sharpness": 0.85},
}
"""Minimum means of the measures frame by frame, for clips of one digit."""


def targets(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the targets of the digits recipes, each with the measured figure and whether it is met.

    Clips of one digit have the targets :data:`FRAME_TARGETS`, clips of two digits accuracies per clip. Targets relative
    to the teacher are omitted if ``report`` has no teacher.
    """
    scores, seconds, passes = report["scores"], report["seconds_per_clip"], report["passes"]
    result = []

    def add(name: str, value: float, bound: float, at_least: bool = True) -> None:
        met = value >= bound - 1e-9 if at_least else value <= bound + 1e-9
        words = f"{'>=' if at_least else '<='} {bound:g}"
        result.append({"name": name, "value": value, "bound": words, "met": met})

    def share(part: float, whole: float) -> float:
        return part / whole if whole else float("nan")

    frames = report["frames"]
    for row, bounds in FRAME_TARGETS.items():
        for measure, bound in bounds.items() if row in frames else ():
            add(f"{row}, {measure}", frames[row][measure]["mean"], bound)
    for row in ("long", "longest"):
        if row in frames:
            drop = frames["student"]["digit"]["mean"] - frames[row]["digit"]["mean"]
            add(f"{row}, digit lost", drop, 0.02, at_least=False)
    if frames:
        psnr = frames["vae"]["psnr"]
        add("VAE, PSNR at the worst frame index", psnr["worst"], 30)
        add("VAE, PSNR lost at the first frame", psnr["mean"] - psnr["first"], 1, at_least=False)
    elif "teacher" in scores:
        for part, whole in (("teacher", "real"), ("student", "teacher")):
            for attribute in metrics.ATTRIBUTES:
                add(f"{part} / {whole}, {attribute}", share(scores[part][attribute], scores[whole][attribute]), 0.95)
    if "teacher" in scores:
        ratio = passes["teacher"]["passes_per_frame"] / passes["student"]["passes_per_frame"]
        add("network passes per frame, teacher / student", ratio, 20)
        ratio = share(seconds["teacher"]["with_decode"], seconds["student"]["with_decode"])
        add("seconds with decoding, teacher / student", ratio, 8)
    add("new prompt holds within 2 blocks", report["switch"]["within_2"], 0.95)
    return result
