"""The most memory that a full-size step's tensors take, counted on tensors without data: no GPU, half a minute.

    python -m benchmarks.live_memory                                # every variant of both stages
    python -m benchmarks.live_memory --stages 1 --variants low_memory

Prints one JSON line per stage and variant. Counted are weights, optimizer state, and what forward and backward keep and
make, 512 px, half precision; not the VAE, nor what kernels take for themselves, nor norms in fp32, as CUDA has them. So
a GPU needs more, see docs/results.md; what moves a peak, and where it lies, shows without one.
"""

import argparse
import json

from toy.full_size import VARIANTS, peak_bytes

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", choices=(1, 2), default=(1, 2))
    variants = [name for name, flags in VARIANTS.items() if "compile" not in flags]
    parser.add_argument("--variants", nargs="+", choices=variants, default=variants)
    options = parser.parse_args()
    for stage in options.stages:
        for variant in options.variants:
            gib = round(peak_bytes(stage, **VARIANTS[variant]) / 2**30, 2)
            print(json.dumps({"stage": stage, "variant": variant, "peak_gib": gib}), flush=True)
