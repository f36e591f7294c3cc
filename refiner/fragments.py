"""Encode a video chunk by chunk as the fragments of one mp4."""

import io
import math
import struct
from collections.abc import Iterator, Mapping
from fractions import Fraction

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from torch import Tensor

# One fragment per chunk, no index at the end, times as given, custom metadata keys.
FRAGMENTED = "empty_moov+default_base_moof+frag_custom+frag_discont+use_metadata_tags"
# The first one that this PyAV has is used. No scene cuts, which would start a group of pictures
# within a chunk.
ENCODERS = {
    "libx264": {"preset": "medium", "crf": "16", "tune": "zerolatency", "sc_threshold": "0"},
    "mpeg4": {"qmin": "2", "qmax": "4", "sc_threshold": "1000000000"},
}
# Every chunk has its own encoder and all share the parameter sets of the first, so no option may
# depend on a chunk's length. 600 is the longest group of pictures that mpeg4 takes.
GROUP = 600
LONGEST_SIDE = 16384  # of libx264
MPEG4_RATE = 65535  # largest numerator
# H.273's number for primaries, transfer and matrix; mpeg4 stores it in the container only
BT709 = 1


def exact_rate(fps: float | Fraction) -> Fraction:
    """Return frames a second as the intended fraction.

    23.976 is 2997/125, and the float nearest to 24000/1001 is 24000/1001.
    """
    given = fps if isinstance(fps, Fraction) else float(fps)  # accepts numpy numbers
    rate = Fraction(given).limit_denominator(1001) if 0 < given < math.inf else 0
    if not rate:
        raise ValueError(f"{fps} frames a second: give a number above 0, like 16 or 23.976")
    return rate


class FragmentEncoder:
    """Encode chunks of frames as an `init` segment (ftyp, moov) and one fragment (moof, mdat) each.

    `init` is empty before the first chunk. `init` and the fragments in order are an mp4; pixels are
    tagged BT.709, limited range. `options` replace those of libx264. Raises ValueError for a size
    or rate that .mp4 does not allow.
    """

    def __init__(
        self,
        width: int,
        height: int,
        fps: float | Fraction = 16,
        metadata: Mapping[str, str] | None = None,
        options: Mapping[str, str] | None = None,
    ) -> None:
        self.size, self.rate, self.metadata = (width, height), exact_rate(fps), metadata or {}
        self.codec = next(name for name in ENCODERS if name in av.codecs_available)
        self.options = ENCODERS[self.codec]
        if options is not None and self.codec == "libx264":
            self.options = {**self.options, **options}
        self.frames = self.chunks = 0
        self.init = b""
        self.parameters: bytes | None = None  # of the first chunk's encoder
        self._check()

    def _check(self) -> None:
        """Raise ValueError for a size or rate that cannot be encoded."""
        width, height = self.size
        if width % 2 or height % 2 or width < 2 or height < 2:
            raise ValueError(
                f"video size {width}x{height}: H.264 shares colour among 2x2 pixels, give even"
                " sides"
            )
        if max(width, height) > LONGEST_SIDE:
            raise ValueError(
                f"video size {width}x{height}: H.264 takes sides of at most {LONGEST_SIDE}, scale"
                " it down"
            )
        if self.codec == "mpeg4" and self.rate.numerator > MPEG4_RATE:
            raise ValueError(
                f"{self.rate} frames a second: mpeg4 takes no such fraction, give a whole number"
            )

    def encode(self, frames: np.ndarray | Tensor) -> bytes:
        """Encode the next chunk of frames [F, H, W, 3], uint8 on the CPU; return its fragment."""
        frames = np.asarray(frames)
        shape = (self.size[1], self.size[0], 3)
        if frames.dtype != np.uint8 or frames.shape[1:] != shape or not len(frames):
            raise ValueError(
                f"frames are {frames.dtype} of {frames.shape}, this video takes uint8 of"
                f" {shape}, one frame or more"
            )
        encoded = dict(boxes(self._encode(frames)))
        self.init = self.init or encoded[b"ftyp"] + encoded[b"moov"]
        self.frames += len(frames)
        self.chunks += 1
        return numbered(encoded[b"moof"], self.chunks) + encoded[b"mdat"]

    def _encode(self, frames: np.ndarray) -> bytes:
        """Encode a chunk as a fragmented mp4 whose times continue those of the chunk before."""
        buffer = io.BytesIO()
        options = {"movflags": FRAGMENTED, "avoid_negative_ts": "disabled"}
        with av.open(buffer, "w", format="mp4", options=options) as container:
            container.metadata.update(self.metadata)
            stream = container.add_stream(self.codec, rate=self.rate, options=dict(self.options))
            stream.width, stream.height = self.size
            stream.pix_fmt = "yuv420p"
            encoder = stream.codec_context
            encoder.time_base = 1 / self.rate
            encoder.gop_size = GROUP
            encoder.color_primaries = encoder.color_trc = encoder.colorspace = BT709
            encoder.color_range = ColorRange.MPEG
            for index, pixels in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(
                    format="yuv420p",
                    dst_colorspace=Colorspace.ITU709,
                    dst_color_range=ColorRange.MPEG,
                )
                frame.pts = self.frames + index
                frame.time_base = 1 / self.rate
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
            parameters = bytes(encoder.extradata or b"")
        self.parameters = self.parameters or parameters
        if parameters != self.parameters:
            raise RuntimeError(
                f"{self.codec} encodes chunk {self.chunks + 1} with other parameters than the first"
            )
        return buffer.getvalue()


def has_h264() -> bool:
    """Whether this PyAV encodes H.264, which pages play."""
    return "libx264" in av.codecs_available


def codec_string(init: bytes) -> str | None:
    """Return the codec of an init segment as RFC 6381 writes it; None unless it is H.264.

    The avcC box begins with its version, then profile, constraints and level.
    """
    _, kind, record = init.partition(b"avcC")
    return f"avc1.{record[1:4].hex()}" if kind and len(record) >= 4 else None


def boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the top-level boxes of an mp4 as (kind, whole box)."""
    start = 0
    while start < len(data):
        length, kind = struct.unpack_from(">I4s", data, start)
        yield kind, data[start : start + length]
        start += length


def numbered(moof: bytes, sequence: int) -> bytes:
    """Return a moof box with this sequence number; the muxer of each chunk starts at 1."""
    start = moof.index(b"mfhd") + 8  # after the name, version and flags
    return moof[:start] + struct.pack(">I", sequence) + moof[start + 4 :]
