"""Format a report as Markdown tables and as a contact sheet."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from causvid_jax.evaluation import color_separation, metrics

ROWS = {
    "real": "real test clips",
    "vae": "real, through the VAE",
    "taehv": "real, through the VAE and the tiny decoder",
    "teacher": "teacher",
    "student": "student",
    "long": "student, last frames of a long stream",
    "longest": "student, last frames of the longest stream",
}

FRAME_MEASURES = {
    "digit": "digit per frame",
    "first_block": "digit, first block",
    "identity": "identity never changes",
    "color": "colour per frame",
    "direction": "direction per pair",
    "motion": "motion against real",
    "sharpness": "sharpness against real",
}


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines] + [""]


def _frames_table(frames: Mapping[str, Any], names: Mapping[str, str]) -> list[str]:
    """Return the table of measures frame by frame, each mean with its 95 % interval."""
    if not frames:
        return []

    def cell(value: Mapping[str, float]) -> str:
        return f"{value['mean']:.3f} ({value['low']:.2f} to {value['high']:.2f})"

    header = ["frame by frame, with 95 % intervals", *FRAME_MEASURES.values(), "PSNR in dB: all, first, worst index"]
    rows = []
    for key, row in frames.items():
        psnr = row.get("psnr")
        decibels = f"{psnr['mean']:.1f}, {psnr['first']:.1f}, {psnr['worst']:.1f}" if psnr else ""
        rows.append([names[key], *(cell(row[name]) for name in FRAME_MEASURES), decibels])
    return _table(header, rows)


def markdown(report: Mapping[str, Any]) -> str:
    """Return the report of ``report.evaluate`` as Markdown tables: scores, frames, cost, prompt switch, targets."""
    scores, passes, seconds = report["scores"], report["passes"], report["seconds_per_clip"]
    decoders = {role: {"vae": "VAE", "taehv": "tiny"}[name] for role, name in report["decoders"].items()}
    plan = report["plan"]
    lengths = {"long": plan["long_factor"], "longest": plan.get("longest_factor")}
    names = {**ROWS, **{key: f"student, end of {factor}x the length" for key, factor in lengths.items()}}
    rows = []
    for key, row in scores.items():
        cells = [f"{row[name]:.3f}" for name in (*metrics.ATTRIBUTES, "all")]
        cells += [f"{row['frechet']:.2f}", f"{row['discontinuity']:.2f}"]
        rows.append([names[key], *cells, str(row["clips"])])
    lines = [f"# {report['recipe']}: evaluation", ""]
    header = ["clips of held-out prompts", *metrics.ATTRIBUTES, "all three", "Frechet", "border / inside", "clips"]
    lines += _table(header, rows)
    lines += _frames_table(report.get("frames", {}), names)
    rows = [
        [
            name,
            str(passes[name]["calls"]),
            f"{passes[name]['passes_per_frame']:.3g}",
            f"{seconds[name]['without_decode']:.3f}",
            f"{seconds[name]['with_decode']:.3f} ({decoders[name]})",
        ]
        for name in ("teacher", "student")
        if name in seconds
    ]
    header = ["cost of a clip", "network calls", "passes per frame", "seconds, latents", "seconds, frames (decoder)"]
    lines += _table(header, rows)
    switch = report["switch"]
    names = {f"within_{n}": f"within {n} block{'s' if n > 1 else ''}" for n in (1, 2, 3)} | {"ever": "ever"}
    lines += _table(
        [f"prompt switch (cache: {switch['cache']}): the new caption holds", "share", "every block read alone"],
        [[words, f"{switch[key]:.3f}", f"{switch['every_block'][key]:.3f}"] for key, words in names.items()],
    )
    rows = [
        [t["name"], f"{t['value']:.3f}", t["bound"].replace(">=", "≥").replace("<=", "≤"), "yes" if t["met"] else "no"]
        for t in report["targets"]
    ]
    lines += _table(["target", "measured", "bound", "met"], rows)
    machine = report["machine"]
    batch = report["plan"]["batch"]
    lines.append(
        f"{machine['devices']}, {machine['cpu_cores']} CPU cores, JAX {machine['jax']}, Python {machine['python']}; "
        f"seconds are per clip in batches of {batch}, without compilation."
    )
    return "\n".join(lines) + "\n"


def contact_sheet(
    clips: Mapping[str, tuple[Sequence[str], np.ndarray]], *, examples: int = 2, columns: int = 9
) -> Image.Image:
    """Draw frames of clips at twice their size; rows real, vae, teacher, student, long, longest and switch.

    Args:
        clips: name of a row to (captions, uint8 ``[B, T, H, W, 3]``), as in ``report.Result``; absent rows are left
            out.
        examples: number of clips of each row, side by side.
        columns: number of frames of each clip.
    """
    rows = [name for name in ("real", "vae", "teacher", "student", "long", "longest", "switch") if name in clips]
    examples = min(examples, *(len(clips[name][1]) for name in rows))
    height, width = clips[rows[0]][1].shape[2:4]
    cell_h, cell_w, label, gap = 2 * height, 2 * width, 14, 2
    strip = columns * (cell_w + gap)
    sheet = Image.new("RGB", (examples * (strip + 8) - 8, len(rows) * (cell_h + label + 4)), (40, 40, 40))
    draw = ImageDraw.Draw(sheet)
    for r, name in enumerate(rows):
        captions, video = clips[name]
        steps = color_separation.spread(video.shape[1], columns)
        for e in range(examples):
            x, y = e * (strip + 8), r * (cell_h + label + 4)
            words = {"switch": "switch to", "vae": "real, through the VAE"}.get(name, name)
            draw.text((x + 2, y + 1), f"{words}: {captions[e]}", fill=(255, 255, 255))
            for c, step in enumerate(steps):
                tile = Image.fromarray(video[e, step]).resize((cell_w, cell_h), Image.Resampling.NEAREST)
                sheet.paste(tile, (x + c * (cell_w + gap), y + label))
    return sheet
