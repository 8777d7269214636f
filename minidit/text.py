"""What the published models are told to show: captions, cleaned and encoded by a T5 as each original does, or classes.

A run:
    rules = rules_of(config)
    t5 = T5Text.load(rules.encoder, length=config.caption_length, dtype=rules.dtype, device="cuda")
    text, lengths = t5.encode([rules.prompt(caption) for caption in captions])
    null = None if config.null_caption else t5.null()
    t5.to("cpu")
"""

from __future__ import annotations

import html
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import unquote_plus

import torch
from torch import Tensor

from minidit.config import ModelConfig
from minidit.presets import PRESETS
from minidit.weights.source import fetch, on_hub

# cleaning, as of the captions that the models were trained with


def _rules(*rules: tuple[str, str]) -> tuple[tuple[re.Pattern[str], str], ...]:
    return tuple((re.compile(pattern), new) for pattern, new in rules)


DOMAIN = r"[a-z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"
DASHES = (
    r"\-\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40"
    r"\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d"
)
FILES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
# what is replaced, in this order, before markup is read
LINKS = _rules(
    ("<person>", "person"),
    (rf"\b(?:https?:(?:/{{1,3}}|[a-z0-9%])|{DOMAIN})", ""),
    (rf"\b(?:www:(?:/{{1,3}}|[a-z0-9%])|{DOMAIN})", ""),
)
# after it
SIGNS = _rules(
    (r"@\w+\b", ""),  # nicknames
    (r"[\u31c0-\u9fff]+", ""),  # Chinese, and what is written beside it
    (f"[{DASHES}]+", "-"),
    ("[`´«»“”¨]", '"'),
    ("[‘’]", "'"),
    ("&quot;?", ""),
    ("&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),  # addresses of machines
    (r"\d:\d\d\s+$", ""),  # what an article's time leaves
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"\S+\.(?:{FILES})", ""),
    ("[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~)(\]\[}{|\\/*]+", " "),
    (r"\s+\.\s+", " "),
)
# after broken characters are mended
LISTINGS = _rules(
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # article numbers
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    (r"\b\d+[a-zA-Z]+\d+\b", ""),
    (r"(worldwide\s+)?(free\s+)?shipping", ""),
    (r"(free\s)?download(\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{FILES})(\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),  # sizes, with the Latin x, the Cyrillic one or a cross
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
)


def clean(caption: str, *, trim: bool) -> str:
    """A caption without capitals, links, markup, Chinese, file names, article numbers and unusual signs.

    trim: spaces at its ends go before article numbers do, in Open-Sora and not in diffusers; so a sign that comes after
    them is at an end, where some signs are removed. The originals clean twice, since the first time uncovers more.
    Source: Vchitect/Latte b27c24a, sample/pipeline_videogen.py _clean_caption, which is that of diffusers' IFPipeline
    and of PKU-YuanGroup/Open-Sora-Plan; hpcaitech/Open-Sora v1.2.0,
    opensora/models/text_encoder/t5.py clean_caption. Raises ValueError for markup that no parser takes, and ImportError
    where ftfy or beautifulsoup4 is not installed.
    """
    ftfy, bs4 = _package("ftfy"), _package("bs4")
    text = _replaced(unquote_plus(caption).strip().lower(), LINKS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bs4.MarkupResemblesLocatorWarning)  # it is no file name, but a caption
        try:
            text = bs4.BeautifulSoup(text, features="html.parser").text
        except bs4.builder.ParserRejectedMarkup as error:
            raise ValueError(f"the caption {caption!r} cannot be cleaned of its markup: {error}") from error
    text = _replaced(text, SIGNS)
    if len(re.findall("[-_]", text)) > 3:  # this-is-my-cute-cat
        text = re.sub("[-_]", " ", text)
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return _replaced(text.strip() if trim else text, LISTINGS).strip()


def _replaced(text: str, rules: tuple[tuple[re.Pattern[str], str], ...]) -> str:
    for pattern, new in rules:
        text = pattern.sub(new, text)
    return text


@dataclass(frozen=True, kw_only=True)
class TextRules:
    """From a caption to the prompt that a family's T5 reads.

    How many tokens the model reads is ModelConfig.caption_length, and what it reads for no caption null_caption.
    """

    encoder: str  # org/name of the T5 on the Hugging Face hub
    dtype: torch.dtype  # of the encoder in the original's runs
    trim: bool  # see clean
    # said at the end of a prompt that does not speak of it; None: not said
    aesthetic: float | None
    motion: float | None
    camera: str | None  # how it moves

    def prompt(self, caption: str) -> str:
        """With the scores, cleaned twice. Warns when nothing is left of the caption.

        Source: hpcaitech/Open-Sora v1.2.0, opensora/utils/inference_utils.py append_score_to_prompts, and
        opensora/models/text_encoder/t5.py text_preprocessing; _text_preprocessing of the other two's pipelines.
        """
        said = caption
        if self.aesthetic is not None and "aesthetic score:" not in caption:
            said += f" aesthetic score: {self.aesthetic:.1f}."
        if self.motion is not None and "motion score:" not in caption:
            said += f" motion score: {self.motion:.1f}."
        if self.camera is not None and "camera motion:" not in caption:
            said += f" camera motion: {self.camera}."
        if caption.strip() and not self._cleaned(caption):
            message = f"nothing is left of the caption {caption!r}, cleaned as those of its model: say it in English"
            warnings.warn(message, stacklevel=2)
        return self._cleaned(said)

    def _cleaned(self, text: str) -> str:
        return clean(clean(text, trim=self.trim), trim=self.trim)


# hpcaitech/Open-Sora v1.0.0, v1.1.0: configs/*/inference, opensora/models/text_encoder/t5.py T5Encoder
OPENSORA = TextRules(
    encoder="DeepFloyd/t5-v1_1-xxl", dtype=torch.float32, trim=True, aesthetic=None, motion=None, camera=None
)
# its v1.2.0: configs/opensora-v1-2/inference/sample.py
OPENSORA_12 = TextRules(
    encoder="DeepFloyd/t5-v1_1-xxl", dtype=torch.float32, trim=True, aesthetic=6.5, motion=None, camera=None
)
# Vchitect/Latte b27c24a: sample/sample_t2v.py, sample/pipeline_videogen.py
LATTE_T2V = TextRules(
    encoder="maxin-cn/Latte-1", dtype=torch.float16, trim=False, aesthetic=None, motion=None, camera=None
)
# PKU-YuanGroup/Open-Sora-Plan v1.0.0, v1.1.0: opensora/sample/sample_t2v.py, pipeline_videogen.py
OPENSORA_PLAN = TextRules(
    encoder="DeepFloyd/t5-v1_1-xxl", dtype=torch.float16, trim=False, aesthetic=None, motion=None, camera=None
)

RULES: dict[str, TextRules] = {
    "opensora-1.2": OPENSORA_12,
    "opensora-1.1": OPENSORA,
    "opensora-1.0-16x512x512": OPENSORA,
    "opensora-1.0-16x256x256": OPENSORA,
    "latte-t2v": LATTE_T2V,
    "opensora-plan-1.1-65x512x512": OPENSORA_PLAN,
    "opensora-plan-1.1-221x512x512": OPENSORA_PLAN,
    "opensora-plan-1.0-65x512x512": OPENSORA_PLAN,
    "opensora-plan-1.0-65x256x256": OPENSORA_PLAN,
    "opensora-plan-1.0-17x256x256": OPENSORA_PLAN,
}


def rules_of(config: ModelConfig) -> TextRules:
    """The rules of a model's family, whatever its size. Raises ValueError for one whose captions no T5 encodes."""

    def family(config: ModelConfig) -> tuple[object, ...]:
        return config.null_caption, config.told, config.sampling.time

    if config.caption_dim and not config.captions:
        for name, rules in RULES.items():
            if family(PRESETS[name]) == family(config):
                return rules
    raise ValueError(f"this model's captions are not a T5's to encode: known are the families of {', '.join(RULES)}")


# encoding

CONFIG, WORDS = "config.json", "spiece.model"
LAYOUTS = (("text_encoder/", "tokenizer/"), ("", ""))  # where they are: in a diffusers pipeline, in a bare encoder


@dataclass(frozen=True)
class T5Text:
    """A T5 encoder and its words: prompts -> text features (B, L, C). It is on one device, until moved by `to`."""

    encoder: Any  # transformers.T5EncoderModel
    words: Any  # sentencepiece.SentencePieceProcessor
    length: int  # tokens of a prompt at most, the end's among them

    @classmethod
    def load(cls, source: str | Path, *, length: int, dtype: torch.dtype, device: str | torch.device = "cpu") -> T5Text:
        """From a folder or org/name on the hub: a diffusers pipeline's text_encoder/ and tokenizer/, or both in one.

        Raises OSError or ValueError, saying what is missing or does not fit; ImportError where transformers or
        sentencepiece is not installed.
        """
        transformers, sentencepiece = _package("transformers"), _package("sentencepiece")
        folder = Path(source) if Path(source).is_dir() else _fetched(str(source))
        encoder_at, words_at = layout_of(folder)
        try:
            encoder, found = transformers.T5EncoderModel.from_pretrained(
                folder / encoder_at, dtype=dtype, local_files_only=True, output_loading_info=True
            )
        except (ImportError, OSError, ValueError, MemoryError):
            raise
        except Exception as error:  # what a file does not fit is an error of torch, of pickle or of safetensors
            raise ValueError(f"{source} holds no T5 that fits its {CONFIG}: {' '.join(str(error).split())}") from error
        if missing := sorted(found["missing_keys"]):
            raise ValueError(f"{source} is no T5 encoder: {len(missing)} tensors are missing, first {missing[0]!r}")
        words = sentencepiece.SentencePieceProcessor(model_file=str(folder / words_at / WORDS))
        if words.vocab_size() > encoder.config.vocab_size:
            raise ValueError(
                f"{source}: {WORDS} has {words.vocab_size()} tokens, the encoder only {encoder.config.vocab_size}"
            )
        return cls(encoder.eval().requires_grad_(False), words, length).to(device)

    @property
    def device(self) -> torch.device:
        return self.encoder.device

    def to(self, device: str | torch.device) -> T5Text:
        """Moves the encoder, itself and not a copy."""
        self.encoder.to(device)
        return self

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Text features (B, L, C) of prompts and their lengths (B,), L being the longest's.

        As in the originals, all are padded to `length` for the encoder, which does not see the padding. Each prompt is
        then to be read as far as it is long: Open-Sora packs them so, and Latte T2V and Open-Sora-Plan do it for one
        prompt, while of several they attend to the padding as zeros, which is not reproduced. Warns of the words that
        are beyond `length`, which the originals drop too, most of them silently.
        """
        if isinstance(prompts, str) or not prompts:
            raise ValueError(f"expected a sequence of one prompt or more, got {prompts!r}")
        tokens = [self._tokens(prompt) for prompt in prompts]
        lengths = torch.tensor([len(row) for row in tokens], device=self.device)
        return self._features(tokens)[:, : max(map(len, tokens))], lengths

    def null(self, prompt: str = "") -> Tensor:
        """Features (length, C) of the empty prompt, for models that have learned no null caption, or of a negative one.

        Those of its padding are among them: Latte T2V and Open-Sora-Plan cut them to as many tokens as the caption
        has, and the model sees them all. Source: Vchitect/Latte b27c24a, sample/pipeline_videogen.py encode_prompt.
        """
        return self._features([self._tokens(prompt)])[0]

    def _tokens(self, prompt: str) -> list[int]:
        tokens: list[int] = self.words.encode(prompt)
        if len(tokens) >= self.length:
            tokens, dropped = tokens[: self.length - 1], self.words.decode(tokens[self.length - 1 :])
            message = f"a prompt of more than {self.length} tokens is cut, this end of it is not read: {dropped!r}"
            warnings.warn(message, stacklevel=3)
        return [*tokens, self.words.eos_id()]

    @torch.inference_mode()
    def _features(self, tokens: Sequence[list[int]]) -> Tensor:
        padded = [row + [self.words.pad_id()] * (self.length - len(row)) for row in tokens]
        seen = [[1] * len(row) + [0] * (self.length - len(row)) for row in tokens]
        ids, mask = torch.tensor(padded, device=self.device), torch.tensor(seen, device=self.device)
        return self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state


def layout_of(folder: Path) -> tuple[str, str]:
    """Where a folder has its encoder and its words. Raises FileNotFoundError for one that has no T5."""
    for encoder, words in LAYOUTS:
        if (folder / encoder / CONFIG).is_file() and (folder / words / WORDS).is_file():
            return encoder, words
    expected = ", or ".join(f"{encoder}{CONFIG} and {words}{WORDS}" for encoder, words in LAYOUTS)
    raise FileNotFoundError(f"{folder} holds no T5: expected {expected}")


def _fetched(source: str) -> Path:
    """The folder of the hub's cache with what `load` needs of the repository, weights as safetensors if it has them."""
    name = on_hub(source)
    if name is None or name.inside:
        raise FileNotFoundError(f"{source} does not exist: expected a folder with a T5, or org/name on the hub")
    small = [part for encoder, words in LAYOUTS for part in (encoder + CONFIG, words + WORDS)]
    folder = fetch(source, name.repository, small)
    try:
        at, _ = layout_of(folder)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{source} on the hub: {error}") from error
    for names in (("model.safetensors*", "model-*.safetensors"), ("pytorch_model*.bin*",)):
        fetch(source, name.repository, [at + part for part in names])
        if any(path for part in names for path in folder.glob(at + part)):
            break
    return folder


def _package(name: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        message = f"the published models' captions need the package {name}, of minidit's extra 'hub'"
        raise ModuleNotFoundError(message, name=name) from error


# classes

# the folders of UCF101, which Latte numbers in the order that sorts capitals before small letters, other than the
# dataset's own classInd.txt. Source: Vchitect/Latte b27c24a, datasets/ucf101_datasets.py find_classes
UCF101 = (
    "ApplyEyeMakeup", "ApplyLipstick", "Archery", "BabyCrawling", "BalanceBeam", "BandMarching", "BaseballPitch",
    "Basketball", "BasketballDunk", "BenchPress", "Biking", "Billiards", "BlowDryHair", "BlowingCandles",
    "BodyWeightSquats", "Bowling", "BoxingPunchingBag", "BoxingSpeedBag", "BreastStroke", "BrushingTeeth",
    "CleanAndJerk", "CliffDiving", "CricketBowling", "CricketShot", "CuttingInKitchen", "Diving", "Drumming", "Fencing",
    "FieldHockeyPenalty", "FloorGymnastics", "FrisbeeCatch", "FrontCrawl", "GolfSwing", "Haircut", "HammerThrow",
    "Hammering", "HandstandPushups", "HandstandWalking", "HeadMassage", "HighJump", "HorseRace", "HorseRiding",
    "HulaHoop", "IceDancing", "JavelinThrow", "JugglingBalls", "JumpRope", "JumpingJack", "Kayaking", "Knitting",
    "LongJump", "Lunges", "MilitaryParade", "Mixing", "MoppingFloor", "Nunchucks", "ParallelBars", "PizzaTossing",
    "PlayingCello", "PlayingDaf", "PlayingDhol", "PlayingFlute", "PlayingGuitar", "PlayingPiano", "PlayingSitar",
    "PlayingTabla", "PlayingViolin", "PoleVault", "PommelHorse", "PullUps", "Punch", "PushUps", "Rafting",
    "RockClimbingIndoor", "RopeClimbing", "Rowing", "SalsaSpin", "ShavingBeard", "Shotput", "SkateBoarding", "Skiing",
    "Skijet", "SkyDiving", "SoccerJuggling", "SoccerPenalty", "StillRings", "SumoWrestling", "Surfing", "Swing",
    "TableTennisShot", "TaiChi", "TennisSwing", "ThrowDiscus", "TrampolineJumping", "Typing", "UnevenBars",
    "VolleyballSpiking", "WalkingWithDog", "WallPushups", "WritingOnBoard", "YoYo",
)  # fmt: skip


def label(name: str | int, config: ModelConfig) -> int:
    """The class that a number or, of UCF101's 101 classes, a name means; capitals and spaces do not matter.

    Raises ValueError, with the nearest names, for a class that the model does not know.
    """
    if config.classes is None:
        raise ValueError("this model knows no classes: give it captions")
    if str(name).isdecimal() and int(name) < config.classes:
        return int(name)
    expected = f"a number from 0 to {config.classes - 1}"
    if config.classes == len(UCF101):
        plain = {known.lower(): known for known in UCF101}
        asked = re.sub(r"[\s_-]", "", str(name)).lower()
        if asked in plain:
            return UCF101.index(plain[asked])
        near = [plain[known] for known in get_close_matches(asked, plain, 3)]
        expected += f" or a name of UCF101, as {', '.join(near or ('ApplyEyeMakeup', 'YoYo'))}"
    raise ValueError(f"unknown class {name!r}, expected {expected}")
