"""Videos as files and as pictures. A video is a uint8 tensor (T, H, W, 3), RGB, on the CPU."""

import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from math import ceil, isqrt
from pathlib import Path
from threading import Event

import av
import numpy as np
import torch
from av.container import OutputContainer
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from av.video.stream import VideoStream
from PIL import Image, ImageDraw, ImageFont, ImageSequence
from torch import Tensor

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont

WATCHABLE = 256  # pixels: a saved video's short side is brought to at least this
LEGIBLE = 96  # pixels: the same for the small frames of `sheet`
SAMPLE = 2**18  # pixels, about: those a gif's palette is chosen from, as the choice takes long
PAPER = (250, 249, 246)
INK = (52, 52, 58)


def save_video(video: Tensor | Iterable[Tensor], path: str | Path, *, fps: float, scale: int | None = None) -> Path:
    """Writes video, (T, H, W, 3) uint8, as the ending of path says: .mp4, .gif, .webp, or .png, a sheet of the frames.

    video: all of it, or parts of it in order, each (t, H, W, 3), which an mp4 takes one at a time, and writes while the
    next one is made; the others need to have them all. scale: each pixel becomes scale x scale; None picks the smallest
    that brings the short side to WATCHABLE. An mp4 is padded to even sizes by repeating its edge. A gif shows a frame
    for a multiple of 10 ms, 20 at least. path appears complete or not at all, also if a part fails to be made; what
    stood there before stays until then.
    """
    path = Path(path)
    check_output(path)
    if not 0.01 <= fps <= 1000:
        raise ValueError(f"fps must be frames a second, from 0.01 to 1000, got {fps}")
    parts = _scaled([video] if isinstance(video, Tensor) else video, scale)
    with _replacing(path) as unfinished:
        WRITERS[path.suffix.lower()](parts, unfinished, fps)
    return path


def _scaled(parts: Iterable[Tensor], scale: int | None) -> Iterator[Tensor]:
    size = None
    for part in parts:
        check_video(part)
        size = size or part.shape[1:]
        if part.shape[1:] != size:
            shapes = f"{tuple(size)} and {tuple(part.shape[1:])}"
            raise ValueError(f"the parts of a video must have frames of one shape, got {shapes}")
        yield upscale(part, _factor(part, WATCHABLE) if scale is None else scale)
    if size is None:
        raise ValueError("a video must have a frame at least, got no part of one")


def check_output(path: str | Path) -> None:
    """Raises what `save_video` would raise for this path, so that a long run can ask before it starts."""
    path = Path(path)
    folder = path.parent
    if path.suffix.lower() not in WRITERS:
        raise ValueError(f"{path}: a video is written as one of {', '.join(WRITERS)}; end the name with one of them")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file to write the video to")
    if not folder.exists():
        raise FileNotFoundError(f"{path}: the folder {folder} does not exist; create it or name another")
    if not folder.is_dir():
        raise NotADirectoryError(f"{path}: {folder} is a file, not a folder; name another place")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{path}: no permission to write in the folder {folder}; name another")
    try:
        with _unfinished(path) as file:
            file.touch()
    except OSError as error:
        raise OSError(f"{path}: the folder {folder} takes no file ({error.strerror}); name another") from error


def load_video(path: str | Path) -> Tensor:
    """The frames of an mp4, gif or webp file at the size they have there, (T, H, W, 3) uint8.

    A gif or webp shows equal neighbours as one frame held longer. It is repeated here, so that frames are evenly spaced
    in time; only of a video that never changes a single frame is left.
    """
    path = Path(path)
    if path.suffix.lower() not in READERS:
        raise ValueError(f"{path}: a video is read from one of {', '.join(READERS)}; convert it to one of them first")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such video file")
    frames = READERS[path.suffix.lower()](path)
    return torch.from_numpy(np.stack(frames))


def check_video(video: Tensor, name: str = "video") -> None:
    """Raises ValueError unless video is (T, H, W, 3) uint8 on the CPU with at least one frame and one pixel."""
    if video.dtype != torch.uint8 or video.ndim != 4 or video.shape[-1] != 3 or video.device.type != "cpu":
        got = f"{tuple(video.shape)} {str(video.dtype).removeprefix('torch.')} on {video.device.type}"
        raise ValueError(f"{name} must be (T, H, W, 3) uint8 on the CPU, got {got}; convert it first")
    if video.numel() == 0:
        raise ValueError(f"{name} must have a frame and a pixel at least, got shape {tuple(video.shape)}")


def upscale(video: Tensor, scale: int) -> Tensor:
    """(T, H, W, 3) -> (T, H * scale, W * scale, 3), each pixel a square of its own colour."""
    if not isinstance(scale, int) or scale < 1:
        raise ValueError(f"scale must be a whole number, 1 or more, got {scale}")
    return video.repeat_interleave(scale, dim=1).repeat_interleave(scale, dim=2)


def side_by_side(*videos: Tensor, gap: int = 2) -> Tensor:
    """Videos of one shape (T, H, W, 3), left to right with gap white columns between: (T, H, n * W + gaps, 3)."""
    if not videos:
        raise ValueError("side_by_side needs one video at least, got none")
    for number, video in enumerate(videos, start=1):
        check_video(video, f"video {number}")
        if video.shape != videos[0].shape:
            shapes = f"{tuple(videos[0].shape)} and {tuple(video.shape)}"
            raise ValueError(f"videos side by side must have one shape, but video 1 and video {number} have {shapes}")
    t, h, _, _ = videos[0].shape
    white = torch.full((t, h, gap, 3), 255, dtype=torch.uint8)
    spaced = [part for video in videos for part in (white, video)]
    return torch.cat(spaced[1:], dim=2)


def sheet(
    videos: Sequence[Tensor],
    captions: Sequence[str],
    *,
    frames: int = 8,
    scale: int | None = None,
    columns: int | None = None,
) -> Image.Image:
    """One picture of many videos: each a strip of evenly spaced frames, first and last among them, with its caption.

    scale: as in `save_video`, but for LEGIBLE. columns of strips: None means one for three videos or fewer, else two.
    """
    if not videos or len(videos) != len(captions):
        raise ValueError(f"sheet needs one caption a video, got {len(videos)} videos and {len(captions)} captions")
    if frames < 1:
        raise ValueError(f"frames must be 1 or more, got {frames}")
    columns = columns or (1 if len(videos) <= 3 else 2)
    strips = [_strip(video, frames, scale) for video in videos]
    width = max(strip.width for strip in strips)
    # in proportion to the whole, so that they can be read when a page shrinks the sheet to its own width
    font = ImageFont.load_default(size=max(14, width * min(columns, len(videos)) // 72))
    cells = [_captioned(strip, caption, width, font) for strip, caption in zip(strips, captions, strict=True)]
    return _pasted(cells, columns, gap=36, margin=36, background=PAPER)


def _strip(video: Tensor, frames: int, scale: int | None) -> Image.Image:
    """Up to `frames` evenly spaced frames of video, left to right."""
    check_video(video)
    chosen = torch.linspace(0, len(video) - 1, min(frames, len(video))).round().long()
    video = upscale(video[chosen], _factor(video, LEGIBLE) if scale is None else scale)
    return _pasted(_images(video), len(chosen), gap=3, margin=0, background=PAPER)


def _captioned(strip: Image.Image, caption: str, width: int, font: Font) -> Image.Image:
    """strip with its caption below, `width` pixels wide."""
    lines = _wrapped(caption, font, width)
    height = int(font.getbbox("x")[3])  # pixels from the top of a line to its baseline
    spacing = height // 2
    below = spacing + len(lines) * (height + spacing)
    cell = Image.new("RGB", (width, strip.height + below), PAPER)
    cell.paste(strip, (0, 0))
    text = "\n".join(lines)
    ImageDraw.Draw(cell).multiline_text((0, strip.height + spacing), text, fill=INK, font=font, spacing=spacing)
    return cell


def _wrapped(text: str, font: Font, width: int) -> list[str]:
    """text in lines of at most width pixels, broken between words; a longer word has a line of its own."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _pasted(
    images: Sequence[Image.Image], columns: int, *, gap: int, margin: int, background: tuple[int, int, int]
) -> Image.Image:
    """images row by row in a grid with `gap` pixels between and `margin` around; rows are as high as they need."""
    rows = [images[i : i + columns] for i in range(0, len(images), columns)]
    width = max(image.width for image in images)
    heights = [max(image.height for image in row) for row in rows]
    across = min(columns, len(images))
    size = (across * (width + gap) - gap + 2 * margin, sum(heights) + gap * (len(rows) - 1) + 2 * margin)
    canvas = Image.new("RGB", size, background)
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            canvas.paste(image, (margin + c * (width + gap), margin + sum(heights[:r]) + r * gap))
    return canvas


def _images(video: Tensor) -> list[Image.Image]:
    return [Image.fromarray(frame) for frame in video.numpy()]


def _factor(video: Tensor, short: int) -> int:
    """The smallest whole number that brings the short side of video to `short` pixels."""
    return ceil(short / min(video.shape[1:3]))


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A name in path's folder to write to; it becomes path when the block ends well and is deleted when not."""
    with _unfinished(path) as file:
        try:
            yield file
            os.replace(file, path)
        except OSError as error:
            if error.errno and error.filename in (None, str(file)):  # told by the name that it would have
                raise OSError(error.errno, error.strerror, str(path)) from error
            raise


@contextmanager
def _unfinished(path: Path) -> Iterator[Path]:
    """A name beside path; a file of that name is gone after the block."""
    # not tempfile: its files are readable by their owner alone, and would stay so
    file = path.with_name(f".{secrets.token_hex(8)}{path.suffix.lower()}")
    try:
        yield file
    finally:
        file.unlink(missing_ok=True)


def _write_mp4(parts: Iterator[Tensor], path: Path, fps: float) -> None:
    stream, writing, stopped = None, None, Event()
    with ExitStack() as stack:
        # faststart: a browser can play the beginning before it has the end
        options = {"movflags": "+faststart"}
        container = stack.enter_context(av.open(path, "w", format="mp4", options=options))
        writer = stack.enter_context(ThreadPoolExecutor(1))  # of a part, while the next one is made
        stack.callback(stopped.set)  # it is waited for then
        for part in parts:
            frames = part.numpy()
            frames = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge")
            stream = stream or _stream(container, frames.shape[1:3], fps)
            if writing:
                writing.result()
            writing = writer.submit(_encode, frames, stream, container, stopped)
        if stream and writing:
            writing.result()
            container.mux(stream.encode(None))


def _encode(frames: np.ndarray, stream: VideoStream, container: OutputContainer, stopped: Event) -> None:
    for frame in frames:
        if stopped.is_set():
            break
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        container.mux(stream.encode(picture.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709)))


def _stream(container: OutputContainer, size: tuple[int, int], fps: float) -> VideoStream:
    # rc-lookahead: frames it waits for before it begins, 40 else, which is most of a short video
    options = {"crf": "16", "rc-lookahead": "10"}
    # 1001: the denominator of 29.97 and its kin
    stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=options)
    stream.thread_type = "AUTO"  # several frames at a time, and not only slices of one
    stream.height, stream.width = size
    stream.pix_fmt = "yuv420p"
    # said aloud, since players differ in what they assume of small videos
    stream.codec_context.colorspace = Colorspace.ITU709
    stream.codec_context.color_range = ColorRange.MPEG
    stream.codec_context.color_primaries = ColorPrimaries.BT709
    stream.codec_context.color_trc = ColorTrc.BT709
    return stream


def _write_gif(parts: Iterator[Tensor], path: Path, fps: float) -> None:
    video = torch.cat(list(parts))
    # one palette for all frames: with one each, still colours would flicker
    pixels = video.flatten(0, 2)  # (T * H * W, 3)
    sample = pixels[:: 1 + len(pixels) // SAMPLE].unsqueeze(0)
    palette = Image.fromarray(sample.numpy().copy()).quantize(256, method=Image.Quantize.MEDIANCUT)
    first, *rest = (image.quantize(palette=palette) for image in _images(video))
    # browsers take 10 ms or less to mean 100
    held = max(20, 10 * round(100 / fps))  # ms
    first.save(path, format="GIF", save_all=True, append_images=rest, duration=held, loop=0)


def _write_webp(parts: Iterator[Tensor], path: Path, fps: float) -> None:
    first, *rest = _images(torch.cat(list(parts)))
    held = max(1, round(1000 / fps))  # ms
    first.save(path, format="WEBP", save_all=True, append_images=rest, duration=held, loop=0, lossless=True)


def _write_png(parts: Iterator[Tensor], path: Path, fps: float) -> None:
    """Up to four frames in a row, more in a nearly square grid; fps has no place in a still picture."""
    images = _images(torch.cat(list(parts)))
    n = len(images)
    root = isqrt(n - 1) + 1  # ceil(sqrt(n))
    # of the nearly square grids, the one with the fewest holes
    columns = n if n <= 4 else min(range(root, 3 * root // 2 + 1), key=lambda c: (-n % c, c))
    _pasted(images, columns, gap=4, margin=0, background=PAPER).save(path, format="PNG")


def _read_mp4(path: Path) -> list[np.ndarray]:
    try:
        # explode: else the decoder would paint over what is missing
        with av.open(path, options={"err_detect": "explode"}) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"{path} is not a whole mp4 file with a video in it: {error}") from error
    if not frames:
        raise ValueError(f"{path} has no video frames in it")
    return frames


def _read_animation(path: Path) -> list[np.ndarray]:
    frames, held = [], []  # held: ms
    try:
        with Image.open(path) as image:
            for frame in ImageSequence.Iterator(image):
                frames.append(np.asarray(frame.convert("RGB")))
                held.append(frame.info.get("duration", 0))
    except (OSError, EOFError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path} is not a whole gif or webp file: {error}") from error
    step = min((ms for ms in held if ms > 0), default=1)
    return [frame for frame, ms in zip(frames, held, strict=True) for _ in range(max(1, round(ms / step)))]


WRITERS: dict[str, Callable[[Iterator[Tensor], Path, float], None]] = {
    ".mp4": _write_mp4,
    ".gif": _write_gif,
    ".webp": _write_webp,
    ".png": _write_png,
}
READERS: dict[str, Callable[[Path], list[np.ndarray]]] = {
    ".mp4": _read_mp4,
    ".gif": _read_animation,
    ".webp": _read_animation,
}
