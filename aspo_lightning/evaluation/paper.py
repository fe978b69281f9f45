"""What the paper measured (arXiv 2510.06062), in percent: avg@k at temperature 0.8 and 32,768 tokens."""

_MATH = ("aime24/avg@64", "aime25/avg@64", "amc23/avg@64", "math500/avg@4", "minerva/avg@8", "olympiadbench/avg@4")

_CODE = (
    "livecodebench_v5/avg@8",
    "livecodebench_v5/pass@8",
    "livecodebench_v6/avg@16",
    "livecodebench_v6/pass@16",
)

_BASE = "DeepSeek-R1-Distill-Qwen-1.5B"

_MATH_ROWS = {
    _BASE: (30.6, 23.5, 70.7, 83.6, 27.6, 44.6),
    f"{_BASE} + GRPO": (42.1, 28.6, 80.3, 87.6, 29.2, 53.2),
    f"{_BASE} + ASPO": (49.0, 35.1, 87.2, 90.5, 35.1, 58.8),
    "Qwen3-4B": (23.6, 18.3, 67.7, 84.5, 41.5, 54.1),
    "Qwen3-4B + GRPO": (43.4, 35.5, 84.3, 91.7, 47.2, 67.4),
    "Qwen3-4B + GRPO without IS": (46.4, 36.3, 88.9, 92.9, 49.3, 67.2),
    "Qwen3-4B + GRPO, positive mean": (46.5, 42.3, 87.4, 92.0, 48.6, 67.1),
    "Qwen3-4B + ASPO": (50.5, 40.9, 87.4, 93.4, 49.0, 68.8),
    "Qwen3-8B + GRPO": (50.3, 34.1, 84.1, 92.7, 50.2, 68.2),
    "Qwen3-8B + ASPO": (52.4, 38.9, 89.1, 93.6, 50.6, 69.8),
}

_CODE_ROWS = {
    _BASE: (16.7, 29.0, 17.2, 34.4),
    f"{_BASE} + GRPO": (26.0, 40.5, 27.6, 43.5),
    f"{_BASE} + ASPO": (31.5, 47.0, 30.5, 46.0),
}

ROWS: dict[str, dict[str, float]] = {
    model: dict(zip(_MATH, scores, strict=True)) | dict(zip(_CODE, _CODE_ROWS.get(model, ()), strict=False))
    for model, scores in _MATH_ROWS.items()
}
"""By model: percent by ``benchmark/metric``."""
