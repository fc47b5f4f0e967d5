"""What devices can do at best: dense matrix products per second, by data type, from the makers' data sheets.

MFU is useful arithmetic per second divided by these numbers. A CPU has no entry: its peak is measured (`runtime`). Nor
has what is sold under a card's name and is not it: a part of one, another board, a laptop's.
"""

from __future__ import annotations

# The name that the driver reports contains the key; longer keys are tried first.
_PEAKS: dict[str, dict[str, float]] = {
    "V100": {"float16": 125e12, "float32": 15.7e12},
    "A100": {"bfloat16": 312e12, "float16": 312e12, "tf32": 156e12, "float32": 19.5e12},
    "A800": {"bfloat16": 312e12, "float16": 312e12, "tf32": 156e12, "float32": 19.5e12},
    "A10": {"bfloat16": 125e12, "float16": 125e12, "tf32": 62.5e12, "float32": 31.2e12},
    "L4": {"bfloat16": 121e12, "float16": 121e12, "tf32": 60e12, "float32": 30.3e12},
    "L40S": {"bfloat16": 362e12, "float16": 362e12, "tf32": 183e12, "float32": 91.6e12},
    "H100 PCIe": {"bfloat16": 756e12, "float16": 756e12, "tf32": 378e12, "float32": 51e12},
    "H100": {"bfloat16": 989.4e12, "float16": 989.4e12, "tf32": 494.7e12, "float32": 67e12},
    "H800": {"bfloat16": 989.4e12, "float16": 989.4e12, "tf32": 494.7e12, "float32": 67e12},
    "H200": {"bfloat16": 989.4e12, "float16": 989.4e12, "tf32": 494.7e12, "float32": 67e12},
    "B200": {"bfloat16": 2250e12, "float16": 2250e12, "tf32": 1125e12, "float32": 75e12},
    "RTX 3090": {"bfloat16": 71e12, "float16": 71e12, "tf32": 35.6e12, "float32": 35.6e12},
    "RTX 4090": {"bfloat16": 165.2e12, "float16": 165.2e12, "tf32": 82.6e12, "float32": 82.6e12},
    "MI300X": {"bfloat16": 1307e12, "float16": 1307e12, "float32": 163.4e12},
}

_OTHERS = {"MIG", "NVL", "Laptop"}
"""Words of names that are not of the card itself."""


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Return the dense peak of a device in operations per second, or None when it is not in the table.

    `device_name`: as the driver reports it, such as "NVIDIA H100 80GB HBM3".
    """
    words = device_name.replace("-", " ").split()
    for key in sorted(_PEAKS, key=len, reverse=True):
        if all(word in words for word in key.split()) and _OTHERS.isdisjoint(words):
            return _PEAKS[key].get(dtype)
    return None
