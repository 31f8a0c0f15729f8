"""PNG files for people: sheets of images and training curves."""

import io

import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

SCALE, LABEL_HEIGHT = 2, 14


def sheet_png(rows: list[list[torch.Tensor]], labels: list[str], scale: int = SCALE) -> bytes:
    """A PNG of rows of uint8 [H, W, 3] images, enlarged `scale` times, with a label above each row."""
    side = rows[0][0].shape[0] * scale
    sheet = Image.new("RGB", (side * max(map(len, rows)), (side + LABEL_HEIGHT) * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (row, label) in enumerate(zip(rows, labels, strict=True)):
        top = i * (side + LABEL_HEIGHT)
        draw.text((2, top + 1), label, fill="black")
        for j, pixels_HWC in enumerate(row):
            image = Image.fromarray(pixels_HWC.cpu().numpy()).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(image, (j * side, top + LABEL_HEIGHT))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def curves_png(curves: dict[str, list[tuple[int, float]]]) -> bytes:
    """A PNG with one panel per curve, a list of (step, value), on a logarithmic scale."""
    figure = Figure(figsize=(5 * len(curves), 3), layout="constrained")
    for axes, (title, points) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        axes.plot(*zip(*points, strict=True), color="#2a6f97")
        axes.set(title=title, xlabel="step", yscale="log")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()
