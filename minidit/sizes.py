"""The sizes and lengths of video that Open-Sora 1.2 has names for, and the fps that it is told."""

from __future__ import annotations

# hpcaitech/Open-Sora v1.2.0: opensora/datasets/aspect.py ASPECT_RATIO_MAP, ASPECT_RATIOS. A ratio is height:width, so
# that 9:16 is a wide frame. Kept: 50:27 names the sizes of 25:12, and a few sides are not even.
RATIOS = (
    "3:8", "9:21", "12:25", "1:2", "9:17", "27:50", "9:16", "5:8", "2:3", "3:4",
    "1:1", "4:3", "3:2", "16:9", "17:9", "2:1", "50:27",
)  # fmt: skip
SIZES = {  # (height, width) in pixels of every ratio, in the order of RATIOS
    "144p": (
        (117, 312), (125, 291), (133, 277), (135, 270), (139, 262), (141, 260), (144, 256), (151, 241), (156, 234),
        (166, 221), (192, 192), (221, 165), (235, 156), (256, 144), (263, 139), (271, 135), (277, 132),
    ),
    "240p": (
        (196, 522), (210, 490), (222, 462), (226, 452), (232, 438), (236, 436), (240, 426), (252, 404), (262, 393),
        (276, 368), (320, 320), (370, 278), (392, 262), (426, 240), (440, 232), (452, 226), (462, 222),
    ),
    "360p": (
        (294, 784), (314, 732), (332, 692), (340, 680), (350, 662), (352, 652), (360, 640), (380, 608), (392, 588),
        (416, 554), (480, 480), (554, 416), (588, 392), (640, 360), (660, 350), (678, 340), (692, 332),
    ),
    "480p": (
        (392, 1046), (420, 980), (444, 925), (452, 904), (466, 880), (470, 870), (480, 854), (506, 810), (522, 784),
        (554, 738), (640, 640), (740, 555), (784, 522), (854, 480), (880, 466), (906, 454), (924, 444),
    ),
    "720p": (
        (588, 1568), (628, 1466), (666, 1388), (678, 1356), (698, 1318), (706, 1306), (720, 1280), (758, 1212),
        (784, 1176), (832, 1110), (960, 960), (1108, 832), (1176, 784), (1280, 720), (1320, 698), (1358, 680),
        (1386, 666),
    ),
}  # fmt: skip

# NUM_FRAMES_MAP of the same file; a second is 25.5 frames, though the model is told 24 a second
FRAMES = {"image": 1, "2s": 51, "4s": 102, "8s": 204, "16s": 408, "32s": 816}
IMAGE_FPS = 120  # opensora/datasets/utils.py IMG_FPS: how the model is told that it makes an image


def size(resolution: str, ratio: str) -> tuple[int, int]:
    """(height, width) in pixels. ratio: height:width. Raises ValueError, listing what is known, for other names."""
    if resolution not in SIZES:
        raise ValueError(f"unknown resolution {resolution!r}, expected one of {', '.join(SIZES)}")
    if ratio not in RATIOS:
        raise ValueError(f"unknown ratio {ratio!r}, expected height:width, one of {', '.join(RATIOS)}")
    return SIZES[resolution][RATIOS.index(ratio)]


def frames(duration: str | int) -> int:
    """Frames of a duration by its name, or as many as are given. Raises ValueError, listing what is known."""
    if duration in FRAMES:
        return FRAMES[str(duration)]
    if not str(duration).isdecimal() or not int(duration):
        raise ValueError(f"unknown duration {duration!r}, expected a number of frames or one of {', '.join(FRAMES)}")
    return int(duration)


def fps_told(frames: int, fps: float) -> float:
    """What Open-Sora 1.1 and 1.2 are told of a video's fps: of an image it is IMAGE_FPS.

    Source: hpcaitech/Open-Sora v1.2.0, opensora/utils/inference_utils.py prepare_multi_resolution_info.
    """
    return IMAGE_FPS if frames == 1 else fps
