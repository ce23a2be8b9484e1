"""Writes fake_quantize.bin: hard inputs and what torch's aten::fake_quantize_per_tensor_affine makes of them.

Run with torch 2.11.0 (CPU): python tests/golden/fake_quantize.py [VALUES_PER_QUANTIZER [PATH]]

Format, little endian, one block per quantizer until the end of the file:
  f32 scale, i32 zero_point, i32 quant_min, i32 quant_max, u32 n, n * f32 inputs, n * f32 outputs
NaN, infinities and values beyond 2^31 scales are left out: there libtorch's kernel converts out of range.
"""

import pathlib
import random
import struct
import sys

import numpy as np
import torch

SMALLEST_SCALE = 2.0**-126
LARGEST = float(np.finfo(np.float32).max)


def quantizers(rng):
    """(scale, zero_point, quant_min, quant_max): every grid, 2 to 16 bits, scales from 2^-126 to 2^127."""
    scales = [1.0, 0.1, 1 / 3, 0.0478, 2.0**-7, 1e-6, 7e5, SMALLEST_SCALE, 1.7e-38, 2.0**100, 2.0**127, 3e38]
    for index, scale in enumerate(scales):
        bits = [8, 8, 4, 3, 2, 16, 10, 8, 16, 8, 2, 2][index]
        full = 1 << bits
        yield scale, 0, -full // 2, full // 2 - 1
        yield scale, 0, 0, full - 1
        yield scale, rng.randrange(full), 0, full - 1


def ordinary(rng, scale, levels, n):
    """Around ties, on levels, within the range and somewhat outside, and with a tiny step away from each tie."""
    ties = (np.array([rng.randrange(-levels, levels) for _ in range(n)]) + 0.5) * scale
    near = np.nextafter(ties.astype(np.float32), np.float32(rng.choice([-1, 1]) * LARGEST))
    on = np.array([rng.randrange(-levels, levels) for _ in range(n)]) * scale
    inside = np.array([rng.uniform(-1.5, 1.5) * levels for _ in range(n)]) * scale
    return np.concatenate([ties, near, on, inside])


def extraordinary(rng, n):
    """Zeros of both signs, denormals, random bit patterns."""
    denormals = [rng.getrandbits(23) | (rng.getrandbits(1) << 31) for _ in range(n)]
    patterns = [rng.getrandbits(32) for _ in range(2 * n)]
    words = [0x00000000, 0x80000000, 0x00800000, 0x80800000, 0x7F7FFFFF, 0xFF7FFFFF] + denormals + patterns
    return np.array(words, dtype=np.uint32).view(np.float32)


def main():
    per_quantizer = int(sys.argv[1]) if len(sys.argv) > 1 else 560
    path = pathlib.Path(sys.argv[2]) if len(sys.argv) > 2 else pathlib.Path(__file__).with_suffix(".bin")
    rng = random.Random(20)
    with open(path, "wb") as file, np.errstate(all="ignore"):
        for scale, zero_point, quant_min, quant_max in quantizers(rng):
            scale = np.float32(scale)
            n = per_quantizer // 7
            x = np.concatenate([ordinary(rng, float(scale), quant_max - quant_min + 1, n), extraordinary(rng, n)])
            x = x.astype(np.float32)
            x = x[np.isfinite(x) & (np.abs(x.astype(np.float64)) < float(scale) * 2.0**31)]
            y = torch.fake_quantize_per_tensor_affine(
                torch.from_numpy(x), float(scale), zero_point, quant_min, quant_max
            ).numpy()
            file.write(struct.pack("<fiiiI", scale, zero_point, quant_min, quant_max, len(x)))
            file.write(x.astype("<f4").tobytes() + y.astype("<f4").tobytes())


if __name__ == "__main__":
    main()
