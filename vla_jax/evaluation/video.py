"""Pictures into H.264 clips, in memory.

Axis legend: T frames, H x W picture (pixels), R rollouts side by side.
"""

import io

import numpy as np
from jaxtyping import UInt8

CAPTION_ROWS = 3
FONT_SIZE = 13
MARGIN = 4


def caption(
    text: str, width: int, colour: tuple[int, int, int], rows: int = CAPTION_ROWS
) -> UInt8[np.ndarray, "H W 3"]:
    """A strip of fixed height with `text` wrapped into it, so that strips stand flush side by side."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(FONT_SIZE)
    height = rows * (FONT_SIZE + MARGIN) + MARGIN
    strip = Image.new("RGB", (width, height), (255, 255, 255))
    draw = ImageDraw.Draw(strip)
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font) <= width - 2 * MARGIN:
            lines[-1] = longer
        else:
            lines.append(word)
    for row, line in enumerate(lines[:rows]):
        draw.text((MARGIN, MARGIN + row * (FONT_SIZE + MARGIN)), line, colour, font)
    return np.asarray(strip)


def enlarge(frames: UInt8[np.ndarray, "T H W 3"], factor: int) -> UInt8[np.ndarray, "T H2 W2 3"]:
    """Nearest-neighbour enlargement: what is seen stays what the policy saw."""
    return frames.repeat(factor, axis=1).repeat(factor, axis=2)


def titled(
    frames: UInt8[np.ndarray, "T H W 3"], text: str, colour: tuple[int, int, int], factor: int = 3
) -> UInt8[np.ndarray, "T H2 W2 3"]:
    """Enlarged frames with a caption strip above."""
    frames = enlarge(frames, factor)
    strip = caption(text, frames.shape[2], colour)
    return np.concatenate([np.broadcast_to(strip, (len(frames), *strip.shape)), frames], axis=1)


def side_by_side(clips: list[UInt8[np.ndarray, "T H W 3"]], gap: int = 6) -> UInt8[np.ndarray, "T H W2 3"]:
    """Clips in a row; a shorter clip waits on its last frame."""
    length = max(len(clip) for clip in clips)
    columns = []
    for clip in clips:
        held = np.concatenate([clip, np.repeat(clip[-1:], length - len(clip), axis=0)])
        columns += [held, np.full((length, clip.shape[1], gap, 3), 255, np.uint8)]
    return np.concatenate(columns[:-1], axis=2)


def strip(frames: UInt8[np.ndarray, "T H W 3"], count: int, gap: int = 6) -> UInt8[np.ndarray, "H W2 3"]:
    """`count` frames in a row, evenly spaced from the first to the last."""
    chosen = frames[np.linspace(0, len(frames) - 1, count).round().astype(int)]
    return side_by_side([frame[None] for frame in chosen], gap)[0]


def stacked(
    rows: list[UInt8[np.ndarray, "H W 3"]], titles: list[tuple[str, tuple[int, int, int]]]
) -> UInt8[np.ndarray, "H2 W 3"]:
    """Pictures of one width, each under its title (text, colour)."""
    captions = [caption(text, row.shape[1], colour, 1) for row, (text, colour) in zip(rows, titles, strict=True)]
    return np.concatenate([part for pair in zip(captions, rows, strict=True) for part in pair])


def encode_png(picture: UInt8[np.ndarray, "H W 3"]) -> bytes:
    """PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "png", optimize=True)
    return buffer.getvalue()


def encode_mp4(frames: UInt8[np.ndarray, "T H W 3"], fps: int = 10) -> bytes:
    """H.264 in MP4 (yuv420p, plays in every browser). The format wants even sizes: odd ones gain a row or column."""
    import av

    frames = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "20", "preset": "medium"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()
