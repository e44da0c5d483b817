#!/usr/bin/env python3
"""What exchanging gradients costs a step on many GPUs, by arithmetic: the table of SCALING.md.

A step's backward pass is two thirds of it, spread evenly over its layers. Gradients of a distinct layer are sent when
its first application in the model is done, the last one in backward; exchanges follow each other.
"""

BYTES_PER_GRADIENT = 4
# Name, parameters, seconds of a step of 64 x 1024 tokens on one H100, applications of layers, distinct layers. The step
# of the largest model has not been measured; it is the second one's, times its operations.
MODELS = [
    ("MoEUT 44M", 44e6, 0.223, 16, 2),
    ("MoEUT 244M", 244e6, 0.327, 18, 2),
    ("MoEUT 1.04B", 1.04e9, 1.30, 26, 2),
    ("dense 244M", 244e6, 0.249, 18, 18),
]
# Name, GPUs, bytes per second that an all-reduce moves through each GPU, seconds until the first byte is through.
NETWORKS = [
    ("8 GPUs of one host (NVLink)", 8, 330e9, 0.06e-3),
    ("64 GPUs, 400 Gb/s each", 64, 50e9, 0.5e-3),
    ("512 GPUs, 400 Gb/s each", 512, 50e9, 2.0e-3),
    ("64 GPUs, 100 Gb/s per host", 64, 12.5e9 / 8, 0.5e-3),
]


def all_reduce(n_bytes, n, bandwidth, latency):
    """Seconds of a ring: each GPU sends and receives 2 (n - 1) / n of the bytes."""
    return 2 * (n - 1) / n * n_bytes / bandwidth + latency


def exposed(n_bytes, step, applications, distinct, network):
    """Seconds that the optimizer waits for after backward."""
    backward = step * 2 / 3
    per_application = backward / applications
    end = 0.0
    for index in range(distinct):
        ready = backward - (distinct - 1 - index) * per_application
        end = max(end, ready) + all_reduce(n_bytes / distinct, *network)
    return end - backward


def main():
    print("| Model | " + " | ".join(name for name, *_ in NETWORKS) + " |")
    print("|---|" + "---|" * len(NETWORKS))
    for name, parameters, step, applications, distinct in MODELS:
        n_bytes = BYTES_PER_GRADIENT * parameters
        cells = []
        for _, *network in NETWORKS:
            whole = all_reduce(n_bytes, *network)
            waits = exposed(n_bytes, step, applications, distinct, network)
            cells.append(f"{1e3 * whole:.0f} ms, {1e3 * waits:.0f} waited for: {100 * step / (step + waits):.0f} %")
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
