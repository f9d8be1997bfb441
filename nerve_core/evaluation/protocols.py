"""The paper's tables: which variants each compares, on which sets, and what others have published."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..models.pairs import find_pair
from ..models.weights import DIFFUSION_FILES, hub_is_off, local_folder
from ..report.data import Curve, Published, SetScores
from ..settings import Settings
from .variants import Variant, combinations

_PAPER = "arXiv 2511.08248, Table 1"
BENCHMARKS = ("voc21", "pc60", "coco-object", "voc20", "ade20k", "pc59", "coco-stuff")
"""In the order of the paper's Table 1."""
PUBLISHED: dict[str, tuple[Published, ...]] = {
    name: (Published("NERVE", nerve, _PAPER), Published("CLIPer, ViT-L/14", cliper, "arXiv 2411.13836"))
    for name, nerve, cliper in zip(
        BENCHMARKS,
        (69.7, 37.7, 43.3, 90.1, 24.0, 43.4, 28.8),
        (71.6, 39.0, 44.4, 90.3, 24.5, 44.0, 29.7),
        strict=True,
    )
}
"""What others have published of a set, in per cent, to be printed beside ours and never as ours."""
PUBLISHED_MEAN = 48.1
"""Of NERVE over the seven sets, per cent, by the same source."""
STEPS = (0, 5, 10, 20, 40)
TABLES: dict[str, str] = {
    "table1": "Table 1: the method on every set",
    "table3": "Table 3: one head, all heads alike, or weighed by entropy",
    "table4": "Table 4: local, global and both, with and without the walk, and the image's edges",
    "fig2": "Figure 2: the truncated walk of L steps",
}
"""The paper's tables by name, and their titles. Rows of Tables 3 and 4 are our reading of what they compare."""
_AS_PUBLISHED = {"edges": "none"}
"""The paper has nothing between the walk and the readout: its tables 3 and 4 and Fig. 2 are measured without."""


def table_variants(
    table: str, model: str, settings: Settings, axes: Mapping[str, Sequence[Any]]
) -> tuple[Variant, ...]:
    """The rows of a table, one of `TABLES`.

    model, settings: the pair that is measured and what its settings are but for the row's own. axes: of Table 1, what
    is measured besides the method: heads, refinements, edges, readouts. Raises ModelError, ValueError.
    """
    if table == "table1":
        others = combinations(axes) if any(axes.values()) else ()
        rows = (Variant("nerve"), *(other for other in others if other.name != "nerve"))
    elif table == "table3":
        rows = (
            *(
                Variant(f"single, head {head}", {"head_weights": head, **_AS_PUBLISHED})
                for head in range(count_heads(model, settings))
            ),
            Variant("mean", {"head_weights": "mean", **_AS_PUBLISHED}),
            Variant("weighted by entropy", {"head_weights": "entropy", **_AS_PUBLISHED}),
        )
    elif table == "table4":
        rows = (
            Variant("CLIP alone (G)", _AS_PUBLISHED, refine="none"),
            Variant("local only (beta 0)", {"beta": 0.0, **_AS_PUBLISHED}),
            Variant("global only (beta 1)", {"beta": 1.0, **_AS_PUBLISHED}),
            Variant("global + local, one step", {"steps": 1, **_AS_PUBLISHED}),
            Variant("global + local + walk (full NERVE)", _AS_PUBLISHED),
            Variant("full NERVE + edges", {"edges": "pixels"}),
        )
    elif table == "fig2":
        rows = tuple(
            Variant(f"L = {steps}", {"method": "truncated", "steps": steps, **_AS_PUBLISHED}) for steps in STEPS
        )
    else:
        raise ValueError(f"table {table!r} is unknown; choose one of {', '.join(TABLES)}")
    return rows


def count_heads(model: str, settings: Settings) -> int:
    """How many self-attention heads a pair's taps have, by the U-Net's description. Raises ModelError."""
    import torch
    from diffusers import UNet2DConditionModel

    folder = local_folder(find_pair(model).diffusion, DIFFUSION_FILES, cache_dir=None, offline=hub_is_off())
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(json.loads((folder / "unet" / "config.json").read_text()))
    taps = (unet.up_blocks[block].attentions[place] for block, place in settings.diffusion.taps)
    return sum(tap.transformer_blocks[0].attn1.heads for tap in taps)


def curves(table: str, sets: Sequence[SetScores]) -> tuple[Curve, ...]:
    """What of a table is better drawn than read: mIoU over L, or over the one head that is used."""
    kind = {
        "fig2": ("mIoU over the steps of the truncated walk", "L", "steps"),
        "table3": ("mIoU with one head alone", "head", "head_weights"),
    }
    if table not in kind:
        return ()
    title, axis, setting = kind[table]
    found = []
    for item in sets:
        points = [
            (float(value), score.miou, score.interval)
            for score in item.scores
            if isinstance(value := score.settings[setting], int)
            and score.miou is not None
            and score.interval is not None
        ]
        if points:
            x, y, intervals = zip(*points, strict=True)
            found.append(Curve(title, item.name, axis, x, y, intervals))
    return tuple(found)


def means(sets: Sequence[SetScores]) -> dict[str, Any]:
    """The mean over the benchmarks, beside the published one, where all seven were run; else nothing."""
    measured = {item.name: {score.variant: score.miou for score in item.scores} for item in sets}
    if not set(BENCHMARKS) <= measured.keys():
        return {}
    rows = []
    for variant in measured[BENCHMARKS[0]]:
        scores = [measured[name].get(variant) for name in BENCHMARKS]
        values = [score for score in scores if score is not None]
        if len(values) == len(BENCHMARKS):
            rows.append(
                {"variant": variant, "mean mIoU, %": round(100 * sum(values) / len(values), 2), "by": "this run"}
            )
    rows.append({"variant": "NERVE", "mean mIoU, %": PUBLISHED_MEAN, "by": f"published, {_PAPER}"})
    return {"Mean over the seven sets": tuple(rows)}


def read_roots(path: Path) -> dict[str, Path]:
    """Set -> folder, from a YAML file of lines such as "voc21: /data/VOC2012"; relative ones are beside the file.

    Raises ValueError for a file that is no such mapping, OSError.
    """
    import yaml

    from .datasets import DATASETS

    try:
        content = yaml.safe_load(path.read_text("utf-8-sig"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or not all(isinstance(root, str) for root in content.values()):
        raise ValueError(f"{path} must map sets to folders, a line each, as in voc21: /data/VOC2012")
    unknown = [str(name) for name in content if name not in DATASETS]
    if unknown:
        raise ValueError(f"{path} names {', '.join(unknown)}; known sets are {', '.join(DATASETS)}")
    return {name: path.parent / Path(root).expanduser() for name, root in content.items()}
