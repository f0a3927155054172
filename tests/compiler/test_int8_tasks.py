"""Decisions of a net with its real weights on recorded data, in 8 bits against float32."""

from __future__ import annotations

import silero
import torch

import graphwright
from graphwright.hwdb import lookup

VNNI = lookup("znver4")  # quantised for such a machine, and run in PyTorch: the exact integers of its kernels
BLOCK = 60  # frames of a call


def test_silero_hears_the_same_speech() -> None:
    """At least 99 of 100 frames of a novel are speech, or not, in 8 bits as in float32.

    Quantised on commands and numbers of other speakers. By the default tolerance, 0.1, too few products are left in 8
    bits for the model to gain by them, and all of it stays float32.
    """
    encoder, decoder = silero.load()
    novel = silero.frames_of("librivox/*.wav").split(BLOCK)[:-1]
    calibration = silero.frames_of("cards/*.wav", "*.raw").split(BLOCK)[:-1]
    quantised = graphwright.quantize(encoder, calibration, tolerance=0.2, target=VNNI)
    assert sum(c.dtype == "int8" for c in quantised.report().precisions) >= 3, quantised.report().text()
    with torch.no_grad():
        exact = decoder(torch.cat([encoder(block) for block in novel])) > 0.5
        rounded = decoder(torch.cat([quantised(block) for block in novel])) > 0.5
    assert 0.05 < float(exact.float().mean()) < 0.95
    assert float((exact == rounded).float().mean()) >= 0.99


def test_silero_hears_the_same_speech_by_ranges_at_run_time() -> None:
    """With all five convolutions in 8 bits: each frame has a scale of its own, of whatever loudness it is."""
    encoder, decoder = silero.load()
    novel = silero.frames_of("librivox/*.wav").split(BLOCK)[:-1]
    quantised = graphwright.quantize(encoder, novel[:2], activation="dynamic", tolerance=0.2, target=VNNI)
    forms = [c.form for c in quantised.report().precisions if "conv2d" in c.operator]
    assert forms == ["int8 dynamic"] * 5, quantised.report().text()
    with torch.no_grad():
        exact = decoder(torch.cat([encoder(block) for block in novel])) > 0.5
        rounded = decoder(torch.cat([quantised(block) for block in novel])) > 0.5
    assert float((exact == rounded).float().mean()) >= 0.99


def test_the_net_is_the_one_of_the_package() -> None:
    encoder, decoder = silero.load()
    frames = silero.frames_of("librivox/*.wav")[:40]
    with torch.no_grad():
        ours = decoder(encoder(frames))
    torch.testing.assert_close(ours, silero.scripted_probabilities(frames), rtol=0.0, atol=1e-5)  # float32, 40 steps
