"""How full packs get: the packer of training over a mixed set of images and videos.

    python -m benchmarks.packing [--samples 16384]

The set: 256p to 720p in four aspect ratios, a fifth images, the rest videos of 17 to 81 frames. One JSON line per token
budget and buffer: the share of the packs' tokens that are real, and the packer's milliseconds per pack.
"""

from __future__ import annotations

import argparse
import json
import random
import time

import numpy as np

from wan_core.data.stream import PackStream

SIZES = ((256, 448), (448, 256), (320, 320), (480, 832), (832, 480), (624, 624), (720, 1280), (1280, 720))
BUDGETS = (75600, 151200, 302400)  # the longest sample, twice and four times that
BUFFERS = (64, 128, 256, 512, 1024)


def lengths(count: int, seed: int = 0) -> list[int]:
    """Tokens of a mixed set's samples, in training order."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        height, width = rng.choice(SIZES)
        frames = 1 if rng.random() < 0.2 else rng.randrange(17, 82, 4)
        found.append(((frames - 1) // 4 + 1) * (height // 16) * (width // 16))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=16384)
    tokens = lengths(parser.parse_args().samples)
    for budget in BUDGETS:
        for buffer in BUFFERS:
            begin = time.perf_counter()
            stream = PackStream((np.array(tokens),), (1.0,), budget, buffer, caption_dropout=0.1, seed=0)
            packs = sum(len(stream.window(window)) for window in range(len(tokens) // buffer))
            row = {
                "tokens_per_pack": budget, "packing_buffer_size": buffer, "mean_tokens": sum(tokens) // len(tokens),
                "real": round(sum(tokens) / packs / budget, 4),
                "milliseconds_per_pack": round(1000 * (time.perf_counter() - begin) / packs, 3),
            }  # fmt: skip
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
