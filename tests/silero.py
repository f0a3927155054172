"""silero-vad with its real weights, and recorded speech to try it on: both from packages, nothing is downloaded."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

# Debian's pocketsphinx-testdata: 16 kHz, 16 bits, one channel; a novel read aloud, commands and numbers.
RECORDINGS = Path("/usr/share/pocketsphinx/test/data")
FRAME, CONTEXT, HEADER = 512, 64, 44  # samples of a decision, those before it that are looked at too; bytes of a .wav's


class Encoder(nn.Module):
    """Frames [count, 576] of sound to features [count, 128]: magnitudes of a Fourier transform, four convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stft = nn.Conv1d(1, 258, 256, stride=128, bias=False)
        sizes = ((129, 128, 1), (128, 64, 2), (64, 64, 2), (64, 128, 1))
        self.convs = nn.ModuleList(nn.Conv1d(i, o, 3, stride=stride, padding=1) for i, o, stride in sizes)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """The features."""
        x = self.stft(F.pad(frames[:, None], (0, CONTEXT), mode="reflect"))
        x = (x[:, :129] ** 2 + x[:, 129:] ** 2).sqrt()
        for conv in self.convs:
            x = conv(x).relu()
        return x.squeeze(-1)


class Decoder(nn.Module):
    """Features of consecutive frames to the probability of speech in each."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(128, 128)
        self.head = nn.Linear(128, 1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """The probabilities [count]."""
        state = None
        found = []
        for row in features.split(1):
            state = self.cell(row, state)
            found.append(self.head(state[0].relu()).sigmoid())
        return torch.cat(found).flatten()


def load() -> tuple[Encoder, Decoder]:
    """The net for 16 kHz with the weights that the package ships; skips where it is missing."""
    spec = find_spec("silero_vad")
    if spec is None or spec.origin is None:
        pytest.skip("needs the package silero-vad, which carries the weights")
    scripted = torch.jit.load(str(Path(spec.origin).parent / "data" / "silero_vad.jit"))
    stored = {name.removeprefix("_model."): value.float() for name, value in scripted.state_dict().items()}
    encoder, decoder = Encoder(), Decoder()
    weights = {"stft.weight": stored["stft.forward_basis_buffer"]}
    for place in range(4):
        for kind in ("weight", "bias"):
            weights[f"convs.{place}.{kind}"] = stored[f"encoder.{place}.reparam_conv.{kind}"]
    encoder.load_state_dict(weights)
    decoder.cell.load_state_dict({name: stored[f"decoder.rnn.{name}"] for name in decoder.cell.state_dict()})
    decoder.head.load_state_dict(
        {"weight": stored["decoder.decoder.2.weight"][..., 0], "bias": stored["decoder.decoder.2.bias"]}
    )
    return encoder.eval(), decoder.eval()


def scripted_probabilities(frames: torch.Tensor) -> torch.Tensor:
    """What the package's own TorchScript says of the frames, one after the other."""
    spec = find_spec("silero_vad")
    assert spec is not None
    assert spec.origin is not None
    scripted = torch.jit.load(str(Path(spec.origin).parent / "data" / "silero_vad.jit"))
    scripted.reset_states()
    with torch.no_grad():
        return torch.cat([scripted(frame[None, CONTEXT:], 16000).flatten() for frame in frames])


def frames_of(*patterns: str) -> torch.Tensor:
    """The recordings that fit, one after the other, as frames [count, 576]; skips where Debian's package is missing."""
    paths = sorted(path for pattern in patterns for path in RECORDINGS.glob(pattern))
    if not paths:
        pytest.skip("needs the recordings of Debian's package pocketsphinx-testdata")
    parts = [path.read_bytes()[HEADER if path.suffix == ".wav" else 0 :] for path in paths]
    samples = torch.frombuffer(bytearray(b"".join(part[: len(part) // 2 * 2] for part in parts)), dtype=torch.int16)
    frames = samples[: len(samples) // FRAME * FRAME].float().reshape(-1, FRAME) / 32768.0
    before = torch.cat([torch.zeros(1, CONTEXT), frames[:-1, -CONTEXT:]])
    return torch.cat([before, frames], 1)
