"""Memory per card and time per step on 1, 2, 8 and 64 GPUs: the tables of docs/scaling.md.

    python -m benchmarks.scaling

Computed from parameter counts, steps measured on one GPU and link speeds, which stand at the top: change them there and
put the output into docs/scaling.md.
"""

from dataclasses import dataclass

from common.distributed import state_bytes

# stage, gradient checkpointing: seconds per step and peak GiB on one H200, fp16, batch 1, 512 px; see RESULTS.md
MEASURED = {
    (1, False): (0.40, 47.3),
    (1, True): (0.55, 27.9),
    (2, False): (0.65, 50.3),
    (2, True): (0.80, 17.1),
}
TRAINED = {1: 1745.6e6, 2: 453.2e6}  # parameters
FROZEN = {1: 0, 2: 1745.6e6}  # in half precision
GPUS_PER_MACHINE = 8
# Bytes per second that a GPU sends in a collective: about what NCCL reaches of NVLink 4's 450 GB/s, of a 400 Gb/s
# InfiniBand port for every GPU, and of a 100 Gb/s Ethernet port that eight GPUs share.
NVLINK, INFINIBAND, ETHERNET = 350e9, 40e9, 1.3e9
BACKWARD = 0.5  # share of a step that can hide communication: the backward pass
CLIPS = 4071  # an epoch of DAVIS (60 videos, ten times) and YouTube-VOS (3,471)
GIB = 2**30


@dataclass(frozen=True)
class Engine:
    """Bytes that a card sends per trained and per frozen parameter and step, before (n - 1) / n."""

    key: str  # in libs.engine.STATE_BYTES
    name: str
    sent: float
    sent_frozen: float = 0


ENGINES = (
    # Gradients are summed and spread again in fp32.
    Engine("ddp", "DDP", sent=8),
    # Weights are gathered in half precision for the forward and again for the backward pass, gradients summed in fp32.
    # Of the frozen weights BrushNet's half is gathered once, UNet2D's twice.
    Engine("fsdp", "FSDP2", sent=8, sent_frozen=3),
    # Both ways in half precision.
    Engine("deepspeed", "ZeRO-2", sent=4),
)


def memory(stage, checkpointing, engine, gpus):
    """GiB per card, at most: activations may have had their peak while there were no gradients, so all but weights and
    moments (12 bytes) counts as activations. What one GPU took is a bound too, but not for DDP, whose buckets hold
    gradients in the forward pass as well."""
    measured = MEASURED[stage, checkpointing][1]
    if gpus == 1:
        return measured
    activations = measured - (TRAINED[stage] * 12 + FROZEN[stage] * 2) / GIB
    bound = activations + state_bytes(TRAINED[stage], FROZEN[stage], engine.key, gpus) / GIB
    return bound if engine.key == "ddp" else min(measured, bound)


def sent_bytes(stage, engine, gpus):
    """That each card sends in a step."""
    return (TRAINED[stage] * engine.sent + FROZEN[stage] * engine.sent_frozen) * (gpus - 1) / gpus


def seconds(stage, checkpointing, engine, gpus, between_machines):
    """(least, most) per step: communication hidden behind the backward pass as far as it goes, or not at all."""
    link = NVLINK if gpus <= GPUS_PER_MACHINE else between_machines
    alone, sending = MEASURED[stage, checkpointing][0], sent_bytes(stage, engine, gpus) / link
    return alone + max(0, sending - BACKWARD * alone), alone + sending


def span(low, high):
    return f"{low:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f}-{high:.2f}"


def main():
    for (stage, checkpointing), _ in MEASURED.items():
        print(f"\n### Stage {stage}{', `--gradient_checkpointing`' if checkpointing else ''}\n")
        print("| GPUs | engine | GiB per card | s/step | s/step over Ethernet | epoch, minutes |")
        print("|---|---|---|---|---|---|")
        for gpus in (1, 2, 8, 64):
            for engine in ENGINES[:1] if gpus == 1 else ENGINES:
                steps = [seconds(stage, checkpointing, engine, gpus, link) for link in (INFINIBAND, ETHERNET)]
                ethernet = span(*steps[1]) if gpus > GPUS_PER_MACHINE else ""
                epoch = steps[0][1] * CLIPS / gpus / 60
                name = "one process" if gpus == 1 else engine.name
                gib = memory(stage, checkpointing, engine, gpus)
                print(f"| {gpus} | {name} | {gib:.1f} | {span(*steps[0])} | {ethernet} | {epoch:.1f} |")


if __name__ == "__main__":
    main()
