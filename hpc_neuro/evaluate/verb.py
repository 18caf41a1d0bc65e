"""Score every volume, then write what people and programs read."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from hpc_neuro.core import files, morphology, run_folder
from hpc_neuro.core.geometry import Box
from hpc_neuro.core.morphology import Tree
from hpc_neuro.core.types import Array
from hpc_neuro.data.store import Store, StoredVolume
from hpc_neuro.evaluate import learning_curves, reliability, report_page
from hpc_neuro.evaluate.config import EvaluateConfig
from hpc_neuro.evaluate.pictures import picture
from hpc_neuro.evaluate.predictions import INDEX, Method, OtsuMask, Prediction, methods, otsu_tree, wanted
from hpc_neuro.evaluate.summary import Results, Scores, as_csv, as_json, as_latex
from hpc_neuro.metrics import cable, centerline, voxel
from hpc_neuro.metrics import tree as tree_metrics
from hpc_neuro.metrics.calibration import Bin
from hpc_neuro.metrics.metric import tolerance_key
from hpc_neuro.metrics.topology import compare_topology
from hpc_neuro.report import provenance
from hpc_neuro.tracing import TraceConfig

log = logging.getLogger(__name__)
_PRODUCTS = ("metrics.json", "metrics.csv", "metrics.tex", "report.html")
_BYTES_PER_VOXEL = 12  # two masks, their surfaces and skeletons


def forecast(cfg: EvaluateConfig) -> list[str]:
    """Check that every prediction of the split is there; say what will be compared."""
    store = Store(cfg.store)
    ids = wanted(cfg, store)
    found = methods(cfg, ids)
    if cfg.train is not None:
        learning_curves.read(cfg.train)
    if cfg.otsu:
        _tracer(cfg, found)
    biggest = max(int(np.prod(store[i].shape)) for i in ids)
    lines = [f"{len(ids)} neurons of the {cfg.split} split of {cfg.store}: {', '.join(ids)}"]
    for m in found:
        text = ", ".join(str(p.path) for p in m.seeds) or "threshold of the raw image, traced from the same root"
        lines.append(f"{m.name}: {text}")
    memory = files.format_bytes(min(biggest, cfg.whole) * _BYTES_PER_VOXEL)
    lines.append(f"largest volume {biggest:,} voxels, about {memory} of memory")
    return lines


def run(cfg: EvaluateConfig) -> int:
    """Score what is not scored yet, then write metrics, pictures and the report. 0 when done."""
    lines = forecast(cfg)
    inputs: dict[str, Path | str] = {"store": cfg.store / "dataset.json", "predictions": cfg.predictions / INDEX}
    for name, folders in cfg.compare.items():
        inputs |= {f"{name}.{i}": folder / INDEX for i, folder in enumerate(folders)}
    whole = cfg.share is not None or all((cfg.out / name).exists() for name in _PRODUCTS)
    with run_folder.start("evaluate", cfg, run_folder.share_folder(cfg.out, cfg.share), inputs, whole=whole) as this:
        if this.complete:
            return 0
        for line in lines:
            log.info("%s", line)
        store = Store(cfg.store)
        compared = methods(cfg, wanted(cfg, store))
        results = _scores(cfg, store, compared)
        if cfg.share is not None:
            this.finish({"volumes": len(results.ids)})
            return 0
        shown = _pictures(cfg, store, compared, results)
        reliable = reliability.measured(cfg, store, results.ids, compared[0].seeds[0])
        _write(cfg, store, results, shown, reliable, this.record, compared)
        mean = as_json(results, cfg)["mean"]
        this.finish({"volumes": len(results.ids), "mean": mean}, outputs=[cfg.out / name for name in _PRODUCTS])
        log.info("report: %s", cfg.out / "report.html")
    return 0


def _scores(cfg: EvaluateConfig, store: Store, compared: list[Method]) -> Results:
    """Scores of all volumes; each is kept in OUT/scores, so that a killed run goes on with the next."""
    ids = tuple(run_folder.take_share(wanted(cfg, store), cfg.share))
    seeds: dict[str, list[dict[str, Scores]]] = {m.name: [{} for _ in m.seeds or (None,)] for m in compared}
    jobs = [(i, m, k) for i in ids for m in compared for k in range(len(seeds[m.name]))]
    for volume_id, method, number in run_folder.track_progress(jobs, "evaluate", unit="score"):
        path = cfg.out / "scores" / f"{method.name}.{number}" / f"{volume_id}.json"
        if not path.exists():
            files.write_json(path, _score_one(cfg, store[volume_id], method, number, compared))
        seeds[method.name][number][volume_id] = files.read_json(path, f"remove {path} and run again")
        f1 = seeds[method.name][number][volume_id][tolerance_key("f1", cfg.tolerance_vox, "vox")]
        log.info(
            "%s, %s: Dice %.3f, F1 %.3f", volume_id, method.name, seeds[method.name][number][volume_id]["dice"], f1
        )
    return Results(
        ids=ids,
        methods=tuple(m.name for m in compared),
        seeds=seeds,
        gold={i: facts(store[i].tree(), store[i]) for i in ids},
        facts={i: _volume_facts(store[i]) for i in ids},
    )


def _score_one(
    cfg: EvaluateConfig, volume: StoredVolume, method: Method, number: int, compared: list[Method]
) -> Scores:
    if method.seeds:
        prediction = method.seeds[number].read(volume.id, volume.shape)
        return score_volume(volume, prediction.mask, prediction.tree, cfg)
    baseline = OtsuMask(volume)
    return score_volume(volume, baseline.mask, otsu_tree(volume, baseline, _tracer(cfg, compared)), cfg)


def _tracer(cfg: EvaluateConfig, compared: list[Method]) -> TraceConfig:
    """The config's settings of the tracer, else those that `infer` recorded, else the defaults."""
    return cfg.trace or compared[0].seeds[0].trace_config() or TraceConfig()


def _pictures(cfg: EvaluateConfig, store: Store, compared: list[Method], results: Results) -> list[tuple[str, Path]]:
    """Pictures of the worst volumes, in OUT/pictures; those that are there are kept."""
    shown = []
    for volume_id in run_folder.track_progress(results.worst_first(cfg)[: cfg.pictures], "pictures", unit="picture"):
        path = cfg.out / "pictures" / f"{volume_id}.jpg"
        if not path.exists():
            volume = store[volume_id]
            prediction = compared[0].seeds[0].read(volume_id, volume.shape)
            with files.atomic(path) as part:
                part.write_bytes(_picture(cfg, volume, prediction, compared))
        shown.append((volume_id, path))
    return shown


def _picture(cfg: EvaluateConfig, volume: StoredVolume, prediction: Prediction, compared: list[Method]) -> bytes:
    trees = {"model": prediction.tree}
    if cfg.otsu:
        trees["Otsu"] = otsu_tree(volume, OtsuMask(volume), _tracer(cfg, compared))
    return picture(volume, prediction, trees, cfg.tolerance_vox, f"{volume.id}: image")


def _write(
    cfg: EvaluateConfig,
    store: Store,
    results: Results,
    shown: list[tuple[str, Path]],
    reliable: dict[str, list[Bin]],
    this: dict[str, Any],
    compared: list[Method],
) -> None:
    links = provenance.follow_runs(
        {"infer": cfg.predictions, "prepare": cfg.store, **({"train": cfg.train} if cfg.train else {})}
    )
    train = cfg.train or next(
        (k.path for k in links if k.name == "train" and (k.path / "metrics.jsonl").exists()), None
    )
    rows = learning_curves.read(train) if train else None
    notices = provenance.list_notices(links, {i: store[i].digest for i in results.ids}) + _unlike(
        cfg, store, results, compared
    )
    for notice in notices:
        log.warning("%s", notice)
    links.append(provenance.RunRecord("evaluate", cfg.out, {**this, "end": "this report"}))
    told = {**as_json(results, cfg), "confidence": reliability.as_json(reliable)}
    files.write_json(cfg.out / "metrics.json", told)
    files.write_text(cfg.out / "metrics.csv", as_csv(results, cfg))
    files.write_text(cfg.out / "metrics.tex", as_latex(results, cfg))
    report = report_page.build(results, cfg, shown, rows, links, notices, str(this["code"]), reliable)
    files.write_text(cfg.out / "report.html", report)


def _unlike(cfg: EvaluateConfig, store: Store, results: Results, compared: list[Method]) -> list[str]:
    """In what Otsu's mask was traced unlike the model's, where it was scored."""
    model, found = compared[0].seeds[0], []
    own = model.trace_config()
    if cfg.otsu and cfg.trace is not None and own is not None and cfg.trace != own:
        found.append("Otsu's mask was traced with other settings than the model's (`trace` of evaluate).")
    roots = {
        i: [] if store[i].root is None else [[round(float(c), 3) for c in store[i].root or ()]] for i in results.ids
    }
    other = [i for i in results.ids if (held := model.roots(i)) is not None and held != roots[i]]
    if cfg.otsu and other:
        found.append(
            f"Otsu's mask was traced from the store's root, the model's from others or none: {', '.join(other)}."
        )
    return found


def _volume_facts(volume: StoredVolume) -> dict[str, object]:
    return {
        "Shape (z y x)": " x ".join(str(n) for n in volume.shape),
        "Voxel size [µm]": " x ".join(f"{s:g}" for s in volume.voxel_size),
        "Type": str(volume.dtype),
        "Root (z y x)": "none" if volume.root is None else ", ".join(f"{c:.1f}" for c in volume.root),
        "Digest": volume.digest[:12],
    }


def score_volume(
    volume: StoredVolume, mask: Callable[[Box], Array], tree: Tree, cfg: EvaluateConfig
) -> dict[str, float]:
    """Every metric of `rows(cfg)`: `mask` (by box) against the store's mask, `tree` (voxels) against its gold tree."""
    return {**_mask_scores(volume, mask, cfg), **_tree_scores(volume, tree, cfg), **facts(tree, volume)}


def facts(tree: Tree, volume: StoredVolume) -> dict[str, float]:
    """What a tree in voxels has by itself: cable in um, tips, branch points."""
    found = tree_metrics.summary(morphology.scale_tree(tree, volume.voxel_size))
    return {"length_um": found["length"], "tips": found["tips"], "branch_points": found["branch_points"]}


def _mask_scores(volume: StoredVolume, mask: Callable[[Box], Array], cfg: EvaluateConfig) -> dict[str, float]:
    whole = Box.whole(volume.shape)
    if whole.size <= cfg.whole:
        predicted, gold = voxel.labelled(mask(whole), volume.mask(whole))
        counts = voxel.counts(predicted, gold)
        surface = voxel.surface_metrics(predicted, gold, volume.voxel_size)
        centre = centerline.cldice(predicted, gold)
    else:
        counts = voxel.counts_streamed(mask, volume.mask, volume.shape)
        surface = voxel.surface_metrics_streamed(mask, volume.mask, volume.shape, volume.voxel_size)
        centre = centerline.cldice_streamed(mask, volume.mask, volume.shape)
    return {
        "dice": counts.dice,
        "cldice": centre,
        "hd95_um": surface.hd95,
        "hd95_pooled_um": surface.hd95_pooled,
        "assd_um": surface.assd,
        "voxel_precision": counts.precision,
        "voxel_recall": counts.recall,
        "mask_missed": float(counts.missed),
    }


def _tree_scores(volume: StoredVolume, tree: Tree, cfg: EvaluateConfig) -> dict[str, float]:
    gold, tolerance = volume.tree(), cfg.tolerance_vox
    bare = cable.remove_stub(tree, gold, tolerance, volume.root)
    match, match_bare = cable.match_cable(tree, gold, tolerance), cable.match_cable(bare, gold, tolerance)
    found = {
        tolerance_key("precision", tolerance, "vox"): match.precision,
        tolerance_key("recall", tolerance, "vox"): match.recall,
        tolerance_key("f1", tolerance, "vox"): match.f1,
        tolerance_key("precision", tolerance, "vox") + "_no_stub": match_bare.precision,
        tolerance_key("f1", tolerance, "vox") + "_no_stub": match_bare.f1,
        **_finite(tree_metrics.distances(tree, gold), volume),
        **{f"{k}_no_stub": v for k, v in _finite(tree_metrics.distances(bare, gold), volume).items()},
        "tree_missed": float(not len(tree)),
    }
    connected = compare_topology(tree, gold, tolerance, volume.voxel_size)
    found |= {
        "splits": connected.splits,
        "merges": connected.merges,
        "expected_run_length_um": connected.expected_run_length,
    }
    if cfg.tolerance_um is not None:
        scaled = [morphology.scale_tree(t, volume.voxel_size) for t in (tree, gold)]
        step = min(1.0, cfg.tolerance_um / 4)
        match = cable.match_cable(scaled[0], scaled[1], cfg.tolerance_um, step)
        found |= {
            tolerance_key("precision", cfg.tolerance_um, "um"): match.precision,
            tolerance_key("recall", cfg.tolerance_um, "um"): match.recall,
            tolerance_key("f1", cfg.tolerance_um, "um"): match.f1,
        }
    return found


def _finite(distances: dict[str, float], volume: StoredVolume) -> dict[str, float]:
    """Without a tree the distance is the diagonal of the volume in voxels, so that a miss stays in the mean."""
    diagonal = float(np.linalg.norm(volume.shape))
    return {k: v if math.isfinite(v) else diagonal for k, v in distances.items()}
