"""Where references go, what of them is encoded, and how long videos are put together."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from minidit import references
from minidit.presets import PRESETS
from minidit.references import Loop, Reference, Span, check, edits, encoded, fitted, nearest, read, read_loop, span
from minidit.video import save_video

V12, V11 = (PRESETS[name] for name in ("opensora-1.2", "opensora-1.1"))
SMALL = replace(V12, sampling=replace(V12.sampling, height=16, width=24))


def video(frames, height=4, width=6):
    return torch.randint(256, (frames, height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


class Encoder:
    """One latent a piece's fourth of frames, which is the mean of its pixels."""

    def __init__(self):
        self.sizes = []

    def encode(self, frames):
        self.sizes.append(tuple(frames.shape))
        pieces = frames.split(17, 1)
        latents = [part.mean((0, 2, 3)) for piece in pieces for part in piece.split(4, 1)]
        return torch.stack([part.mean() for part in latents])[None, :, None, None].expand(4, -1, 2, 3)


# what the original's inference configs give, of a run of 51 frames: reference's frames, mask strategy, where it is put
PUBLISHED = [
    (1, (0, 0, 1, 0.0), Span(0, 0, 1, 0.0)),  # "0": an image as the first frame
    (1, (0, -1, 1, 0.0), Span(0, 10, 1, 0.0)),  # "0,1,0,-1,1": as the last, which is the first of its piece
    (51, (-8, 0, 8, 0.0), Span(5, 0, 8, 0.0)),  # "0,0,-8,0,8": a video continued
    (102, (0, 0, 15, 0.8), Span(0, 0, 15, 0.8)),  # "0,0,0,0,15,0.8": a video edited
]


@pytest.mark.parametrize(("frames", "strategy", "expected"), PUBLISHED)
def test_a_published_mask_strategy_is_a_reference(frames, strategy, expected):
    start, at, length, edit = strategy
    assert span(Reference(video(frames), start, at, length, edit), V12.sampling) == expected


def test_positions_move_to_the_nearest_piece_and_stay_in_place_where_each_frame_is_one():
    moved = [nearest(position, 5, 15) for position in range(15)]
    assert moved == [0, 0, 0, 5, 5, 5, 5, 5, 10, 10, 10, 10, 10, 10, 10]
    assert [nearest(position, 5, 8) for position in range(8)] == [0, 0, 0, 0, 0, 5, 5, 5]  # 3 has no whole piece behind
    assert [nearest(position, 1, 16) for position in range(16)] == list(range(16))


@given(
    st.integers(1, 60),
    st.integers(1, 60),
    st.integers(-15, 14),
    st.integers(-15, 14),
    st.none() | st.integers(1, 30),
    st.sampled_from([V11, V12]),
)
def test_what_is_taken_is_in_the_reference_and_goes_into_the_clip(have, frames, start, at, length, model):
    run = replace(model.sampling, frames=frames)
    latents, room = (references.latent_frames(run, n) for n in (have, frames))
    reference = Reference(torch.zeros(have, 1, 1, 3, dtype=torch.uint8), start, at, length)
    if -latents <= start < latents and -room <= at < room:
        found = span(reference, run)
        assert 0 <= found.start < found.start + found.length <= latents
        assert 0 <= found.at < found.at + found.length <= room
        assert found.length <= (length or latents)
        assert model is V12 or (found.start, found.at) == (start % latents, at % room)
    else:
        with pytest.raises(ValueError, match=r"is not in -\d+\.\.\d+: (the reference|a clip) has \d+ latent frames"):
            span(reference, run)


def test_noise_is_kept_around_what_is_given_and_the_later_counts_where_both_are():
    z = torch.randn(2, 4, 6, 2, 3)
    one, other = torch.randn(4, 3, 2, 3), torch.randn(2, 4, 2, 2, 3)
    at = [Span(0, 1, 3, 0.25), Span(0, 3, 2, 0.0)]
    made, mask = references.given(z, at, [one, other])
    assert torch.equal(made[:, :, 1:3], one[None, :, :2].expand(2, -1, -1, -1, -1))
    assert torch.equal(made[:, :, 3:5], other) and torch.equal(made[:, :, [0, 5]], z[:, :, [0, 5]])
    assert mask.tolist() == [[1, 0.25, 0.25, 0, 0, 1]] * 2 == [edits(at, 6)] * 2
    assert references.given(z, [], []) == (z, None)


def test_a_clip_of_a_loop_begins_with_the_end_of_the_one_before_whatever_references_say():
    first, later = Reference(video(1)), Reference(video(51), length=10, edit=0.5, clip=1)
    spans = [references.spans([first, later], Loop(2), clip, V12.sampling) for clip in (0, 1)]
    assert spans == [[Span(0, 0, 1, 0.0)], [Span(0, 0, 10, 0.5), Span(0, 0, 5, 0.0)]]
    assert edits(spans[1], 15) == [0.0] * 5 + [0.5] * 5 + [1.0] * 5


@pytest.mark.parametrize(
    ("model", "loop", "latents", "frames"),
    [(V12, Loop(2), 5, 17), (V12, Loop(2, length=10), 10, 34), (V11, Loop(2), 4, 4), (V11, Loop(2, length=7), 7, 7)],
)
def test_a_loop_hands_on_latents_whose_frames_the_video_has_once(model, loop, latents, frames):
    assert references.handed_on(loop, model.sampling) == latents
    assert references.repeated(loop, model.sampling) == frames


def test_only_the_pieces_that_are_needed_are_encoded():
    whole, encoder = video(102, 16, 24), Encoder()
    latents = encoder.encode(fitted(whole, 16, 24))
    cut = encoded(Reference(whole, start=11, length=7), encoder, SMALL.sampling)
    assert torch.equal(cut, latents[:, 10:17]) and encoder.sizes[1] == (3, 34, 16, 24)
    assert encoded(Reference(video(1)), encoder, SMALL.sampling).shape == (4, 1, 2, 3)


def test_what_is_encoded_is_of_whole_latents_cut_on_the_right_and_below():
    run, encoder = replace(SMALL.sampling, height=19, width=30), Encoder()
    encoded(Reference(video(17, 19, 30)), encoder, run)
    assert encoder.sizes == [(3, 17, 16, 24)]


def test_the_end_of_a_clip_is_encoded_as_it_is():
    clips, encoder = torch.stack([video(34, 16, 24)] * 2), Encoder()
    latents = references.passed_on(clips, Loop(2), encoder, SMALL.sampling)
    assert latents.shape == (2, 4, 5, 2, 3)
    assert torch.equal(latents[1], encoder.encode(fitted(clips[1], 16, 24)[:, 17:]))


def test_an_image_is_resized_by_pil_until_it_fills_and_its_middle_taken():
    image = video(1, 9, 30)
    expected = np.array(Image.fromarray(image[0].numpy()).resize((60, 18), Image.Resampling.BICUBIC))[:, 20:40]
    made = fitted(image, 18, 20)
    assert made.shape == (3, 1, 18, 20)
    assert torch.equal((made[:, 0].permute(1, 2, 0) + 1).mul(127.5).round().byte(), torch.from_numpy(expected.copy()))


@pytest.mark.parametrize("frames", [1, 3])
def test_what_has_the_size_stays_as_it_is(frames):
    made = fitted(video(frames, 5, 7), 5, 7)
    assert torch.equal((made.permute(1, 2, 3, 0) + 1).mul(127.5).round().byte(), video(frames, 5, 7))


def test_a_video_is_resized_and_its_middle_taken():
    stripes = torch.zeros(2, 4, 12, 3, dtype=torch.uint8)
    stripes[:, :, 4:8] = 255
    assert fitted(stripes, 8, 8).shape == (3, 2, 8, 8)
    assert fitted(stripes, 8, 8)[..., 1:-1].eq(1).all() and fitted(stripes, 8, 20)[..., 0].eq(-1).all()


@given(st.tuples(*[st.integers(1, 40)] * 4), st.integers(1, 2))
def test_any_size_fits_any_other(sizes, frames):
    height, width, rows, columns = sizes
    made = fitted(video(frames, height, width), rows, columns)
    assert made.shape == (3, frames, rows, columns) and made.abs().max() <= 1


@pytest.mark.parametrize("ending", ["png", "jpg", "bmp", "webp", "mp4"])
def test_a_reference_is_read_from_a_file_with_what_stands_behind_it(tmp_path, ending):
    path = tmp_path / f"a@1.{ending}"
    if ending == "mp4":
        save_video(video(3, 16, 16), path, fps=8, scale=1)
    else:
        Image.fromarray(video(1, 16, 16)[0].numpy()).save(path, **{"lossless": True} if ending == "webp" else {})
    plain, reference = read(f"{path}"), read(f"{path}@at=-1,start=2,length=3,edit=.5,clip=1")
    assert (plain.start, plain.at, plain.length, plain.edit, plain.clip) == (0, 0, None, 0, 0)
    assert (reference.start, reference.at, reference.length) == (2, -1, 3)
    assert (reference.edit, reference.clip) == (0.5, 1)
    assert reference.video.shape == (3 if ending == "mp4" else 1, 16, 16, 3)
    if ending in ("png", "bmp", "webp"):
        assert torch.equal(reference.video, video(1, 16, 16))


def test_an_image_is_turned_as_its_camera_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    Image.fromarray(video(1, 8, 16)[0].numpy()).save(tmp_path / "a.png", exif=exif)
    assert torch.equal(read(f"{tmp_path}/a.png").video[0], video(1, 8, 16)[0].rot90(-1))


def test_a_loop_is_read_with_what_stands_behind_it():
    assert read_loop("1") == references.ONCE
    assert read_loop("3@length=10,edit=0.25") == Loop(3, length=10, edit=0.25)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("missing.png", "missing.png: no such image or video"),
        (".", ".: no such image or video"),
        ("a.txt", "a.txt: a reference is one of .png, .jpg, .jpeg, .bmp, .mp4, .gif, .webp; convert it first"),
        ("a.png", "a.png is not a whole image"),
        ("a.mp4", "a.mp4 is not a whole mp4 file"),
        ("a.png@at=x", "a.png@at=x: behind the @ are start, at, length, edit, clip, =, and a number"),
        ("a.png@at=1.5", "a.png@at=1.5: behind the @"),
        ("a.png@of=1", "a.png@of=1: behind the @"),
    ],
)
def test_what_is_no_reference_is_said_in_one_line(tmp_path, monkeypatch, text, said):
    monkeypatch.chdir(tmp_path)
    for ending in ("txt", "png", "mp4"):
        (tmp_path / f"a.{ending}").write_text("not that")
    with pytest.raises((OSError, ValueError)) as caught:
        read(text)
    assert f"{caught.value}".startswith(said) and "\n" not in f"{caught.value}"


@pytest.mark.parametrize(
    ("model", "given", "said"),
    [
        (V12, dict(at=15), "at=15 is not in -15..14: a clip has 15 latent frames"),
        (V12, dict(start=-2), "start=-2 is not in -1..0: the reference has 1 latent frames"),
        (V12, dict(clip=1), "a reference is of clip 1, but the last one is 0"),
        (V12, dict(clip=-1), "a reference's clip must be 0, the first one, or more, got -1"),
        (V12, dict(length=0), "the length of a reference must be 1 latent frame at least, got 0"),
        (V12, dict(edit=1.1), "the edit of a reference must be a share from 0 to 1, got 1.1"),
        (V12, dict(video=video(51)), "references leave none of the 15 latent frames to be made"),
        (V12, dict(video=torch.zeros(4, 6, 3)), "a reference's video must be (T, H, W, 3) uint8"),
        (PRESETS["latte-t2v"], {}, "this model was not trained with frame masks"),
        (PRESETS["opensora-1.0-16x256x256"], {}, "this model was not trained with frame masks"),
        (PRESETS["opensora-plan-1.1-65x512x512"], {}, "this model was not trained with frame masks"),
    ],
)
def test_references_that_a_video_cannot_be_made_around_are_refused(model, given, said):
    with pytest.raises(ValueError, match="^") as caught:
        check([Reference(**{"video": video(1), **given})], references.ONCE, model)
    assert f"{caught.value}".startswith(said)


@pytest.mark.parametrize(
    ("model", "frames", "loop", "said"),
    [
        (V12, 51, dict(clips=0), "a loop has 1 clip at least, got 0"),
        (V12, 51, dict(clips=2, length=4), "a loop hands on a multiple of 5 latent frames"),
        (V12, 17, dict(clips=2), "a loop hands on a multiple of 5 latent frames, fewer than a clip's 5, got 5"),
        (V12, 60, dict(clips=2), "clips of a loop have a multiple of 17 frames, got 60"),
        (V11, 4, dict(clips=2), "a loop hands on a multiple of 1 latent frames, fewer than a clip's 4, got 4"),
        (PRESETS["latte-t2v"], 16, dict(clips=2), "this model was not trained with frame masks"),
    ],
)
def test_loops_that_cannot_go_on_are_refused(model, frames, loop, said):
    with pytest.raises(ValueError, match="^") as caught:
        check([], Loop(**loop), replace(model, sampling=replace(model.sampling, frames=frames)))
    assert f"{caught.value}".startswith(said)


def test_sixteen_bits_of_grey_are_read_as_eight(tmp_path):
    ramp = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    assert read(f"{tmp_path}/ramp.png").video[0, 0].tolist() == [[n] * 3 for n in (0, 1, 128, 255)]


def test_of_an_odd_surplus_a_video_loses_less_at_the_left_and_an_image_more():
    columns = 30 * torch.arange(7, dtype=torch.uint8).reshape(1, 1, 7, 1).expand(2, 4, 7, 3)
    for frames, first in ((2, 1), (1, 2)):  # 3 columns too many: 3 // 2, and 1.5 rounded
        made = ((fitted(columns[:frames], 4, 4) + 1) * 127.5).round()
        assert made[0, 0, 0].tolist() == [30.0 * (first + n) for n in range(4)]


def test_a_video_is_made_smaller_between_two_pixels_and_not_over_all():
    stripes = torch.zeros(2, 4, 16, 3, dtype=torch.uint8)
    stripes[:, :, 1::4] = 255  # a new pixel's middle is between the second and the third of four
    assert fitted(stripes, 1, 4).tolist() == torch.zeros(3, 2, 1, 4).tolist()
