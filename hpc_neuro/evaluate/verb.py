"""Score every volume, then write what people and programs read."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hpc_neuro.core import files, run_folder
from hpc_neuro.core.geometry import Box
from hpc_neuro.core.morphology import Tree, empty_tree
from hpc_neuro.core.schema import InputError
from hpc_neuro.core.stop_signals import stop_on_request, until_stopped
from hpc_neuro.core.types import Array
from hpc_neuro.data.predictions import INDEX
from hpc_neuro.data.store import Store, StoredVolume
from hpc_neuro.evaluate import confidence, places, report_page, run_sections
from hpc_neuro.evaluate.config import EvaluateConfig
from hpc_neuro.evaluate.pictures import draw_picture
from hpc_neuro.evaluate.predictions import (
    Method,
    OtsuMask,
    choose_trace_config,
    list_methods,
    list_volumes,
    trace_otsu_mask,
)
from hpc_neuro.evaluate.summary import Results, Scores, build_json, format_csv, format_latex
from hpc_neuro.metrics.metric import MAX_VOXELS_IN_MEMORY, Comparison
from hpc_neuro.report import provenance
from hpc_neuro.report.provenance import RunRecord

log = logging.getLogger(__name__)

_PRODUCTS = ("metrics.json", "metrics.csv", "metrics.tex", "report.html")
_BYTES_PER_VOXEL = 12
"""[byte] Peak memory per voxel: two masks, their surfaces and skeletons."""


def forecast(cfg: EvaluateConfig) -> list[str]:
    """Check that every prediction of the split exists; say what will be compared."""
    # Read whatever the run will read, so that bad input ends it before anything is written.
    store = Store(cfg.store)
    ids = list_volumes(cfg, store)
    cfg = choose_scores(cfg, store)
    methods = list_methods(cfg, ids)
    if cfg.train is not None:
        run_sections.read_metrics(cfg.train)
    if cfg.otsu and cfg.trees:
        choose_trace_config(methods)

    # Name every folder: a comparison with the wrong one looks like any other.
    lines = [f"{files.format_count(len(ids), 'neuron')} of the {cfg.split} split of {cfg.store}: {', '.join(ids)}"]
    if sentence := _describe_missing_trees(cfg, store):
        lines.append(sentence)
    for method in methods:
        folders = ", ".join(str(seed.path) for seed in method.seeds)
        lines.append(f"{method.name}: {folders or 'threshold of the raw image, traced from the same root'}")

    # Beyond the limit masks are compared block by block, and memory stays.
    largest = max(math.prod(store[i].shape) for i in ids)
    memory = files.format_bytes(min(largest, MAX_VOXELS_IN_MEMORY) * _BYTES_PER_VOXEL)
    lines.append(f"largest volume {largest:,} voxels, about {memory} of memory")

    return lines


def choose_scores(cfg: EvaluateConfig, store: Store) -> EvaluateConfig:
    """The config without trees where a volume of the split has none."""
    has_trees = all(store[i].has_tree for i in list_volumes(cfg, store))
    return cfg if has_trees else replace(cfg, trees=False)


def _describe_missing_trees(cfg: EvaluateConfig, store: Store) -> str:
    """A sentence on volumes without a tree; "" where all have one."""
    absent = [i for i in list_volumes(cfg, store) if not store[i].has_tree]
    if not absent:
        return ""
    return (
        f"{', '.join(absent)}: prepared from labels, without a tree, so that only labelled voxels are scored (Dice, "
        "precision, recall)"
    )


def run(cfg: EvaluateConfig) -> int:
    """Score what is not scored yet, then write metrics, pictures and the report. 0 when done."""
    # Hash what decides the result, so that a changed input is noticed at the next start.
    lines = forecast(cfg)
    inputs: dict[str, Path | str] = {"store": cfg.store / "dataset.json", "predictions": cfg.predictions / INDEX}
    for name, folders in cfg.compare.items():
        inputs |= {f"{name}.{i}": folder / INDEX for i, folder in enumerate(folders)}

    # A product that was deleted is written again, from the scores that are kept.
    is_whole = cfg.share is not None or all((cfg.out / name).exists() for name in _PRODUCTS)
    out = run_folder.share_folder(cfg.out, cfg.share)
    with run_folder.start("evaluate", cfg, out, inputs, whole=is_whole) as current_run:
        if current_run.complete:
            return 0

        for line in lines:
            log.info("%s", line)
        # Scores take nearly all the time, and may come from several jobs.
        store = Store(cfg.store)
        cfg = choose_scores(cfg, store)
        methods = list_methods(cfg, list_volumes(cfg, store))
        results = _score_all(cfg, store, methods)

        # A share has scored its part; the run without `share` gathers all of them.
        if cfg.share is not None:
            current_run.finish({"volumes": len(results.ids)})
            return 0

        # Pictures that are there are kept, the others are drawn.
        for name in current_run.damaged:
            (cfg.out / name).unlink(missing_ok=True)

        _write_products(cfg, store, methods, results, current_run.record)
        summary = {"volumes": len(results.ids), "mean": build_json(results, cfg)["mean"]}
        current_run.finish(
            summary,
            outputs=[cfg.out / name for name in _PRODUCTS],
            large_outputs=sorted((cfg.out / "pictures").glob("[!.]*.jpg")),
        )
        log.info("report: %s", cfg.out / "report.html")

    return 0


def _score_all(cfg: EvaluateConfig, store: Store, methods: Sequence[Method]) -> Results:
    """Score all volumes; each score is kept in OUT/scores, so that a killed run continues with the next."""
    # The baseline has no seeds, and one score.
    ids = tuple(run_folder.take_share(list_volumes(cfg, store), cfg.share))
    seeds: dict[str, list[dict[str, Scores]]] = {m.name: [{} for _ in m.seeds or (None,)] for m in methods}
    jobs = [(i, method, number) for i in ids for method in methods for number in range(len(seeds[method.name]))]

    for volume_id, method, number in until_stopped(run_folder.track_progress(jobs, "evaluate", unit="score")):
        path = cfg.out / "scores" / f"{method.name}.{number}" / f"{volume_id}.json"
        if _read_scores(path, cfg) is None:
            mask, tree = _predict(cfg, store[volume_id], method, number, methods)
            files.write_json(path, score_volume(store[volume_id], mask, tree, cfg))

        # Read back also what was just written: the results are then the same in a run that was interrupted.
        scores = _read_scores(path, cfg)
        assert scores is not None, f"{path} was written with all scores"
        seeds[method.name][number][volume_id] = scores
        cable = f", F1 {scores[cfg.f1_key]:.3f}" if cfg.trees else ""
        log.info("%s, %s: Dice %.3f%s", volume_id, method.name, scores["dice"], cable)

    return Results(
        ids=ids,
        methods=tuple(method.name for method in methods),
        seeds=seeds,
        gold={i: describe_gold(store[i], cfg) for i in ids},
        volume_facts={i: _list_volume_facts(store[i]) for i in ids},
    )


def _read_scores(path: Path, cfg: EvaluateConfig) -> Scores | None:
    """The scores that an earlier start or a share wrote; None where there are none, or they cannot be read."""
    if not path.exists():
        return None
    try:
        scores = files.read_json(path, "it is scored again", Scores)
    except InputError as error:
        log.warning("%s", error)
        return None
    return scores if {metric.key for metric in cfg.list_metrics()} <= scores.keys() else None


def _predict(
    cfg: EvaluateConfig, volume: StoredVolume, method: Method, number: int, methods: Sequence[Method]
) -> tuple[Callable[[Box], Array], Tree]:
    """Mask (by box) and tree (voxels) of a volume by one seed of a method."""
    # Otsu's mask is cheap to make, so it is not kept.
    if method.seeds:
        prediction = method.seeds[number].read(volume.id, volume.shape)
        return stop_on_request(prediction.mask), prediction.tree
    baseline = OtsuMask(volume)
    tree = trace_otsu_mask(volume, baseline, choose_trace_config(methods)) if cfg.trees else empty_tree()
    return stop_on_request(baseline.mask), tree


def score_volume(volume: StoredVolume, mask: Callable[[Box], Array], tree: Tree, cfg: EvaluateConfig) -> Scores:
    """All metrics of `mask` (by box) against the store's mask and of `tree` (voxels) against its gold tree."""
    comparison = _compare(volume, mask, tree, cfg)
    return {metric.key: metric.compute(comparison) for metric in cfg.list_metrics()}


def describe_gold(volume: StoredVolume, cfg: EvaluateConfig) -> Scores:
    """The metrics that describe a tree alone, of the gold tree."""
    # Gold takes the place of the prediction; its masks are not read.
    comparison = _compare(volume, volume.mask, volume.tree(), cfg)
    return {metric.key: metric.compute(comparison) for metric in cfg.list_metrics() if metric.describes_tree}


def _compare(volume: StoredVolume, mask: Callable[[Box], Array], tree: Tree, cfg: EvaluateConfig) -> Comparison:
    return Comparison(
        predicted_mask=mask,
        gold_mask=volume.mask,
        predicted_tree=tree,
        gold_tree=volume.tree(),
        shape=volume.shape,
        voxel_size=volume.voxel_size,
        root=volume.root,
        tolerance_vox=cfg.tolerance_vox,
        tolerance_um=cfg.tolerance_um,
    )


def _list_volume_facts(volume: StoredVolume) -> dict[str, object]:
    return {
        "Shape (z y x)": " x ".join(str(n) for n in volume.shape),
        "Voxel size [µm]": " x ".join(f"{s:g}" for s in volume.voxel_size),
        "Type": str(volume.dtype),
        "Root (z y x)": "none" if volume.root is None else ", ".join(f"{c:.1f}" for c in volume.root),
        "Digest": volume.digest[:12],
    }


def _write_products(
    cfg: EvaluateConfig, store: Store, methods: Sequence[Method], results: Results, record: Mapping[str, Any]
) -> None:
    """Write the tables and the report."""
    # Sentences that decide what the numbers mean go to the log as well.
    runs = provenance.follow_runs(
        {"infer": cfg.predictions, "prepare": cfg.store, **({"train": cfg.train} if cfg.train else {})}
    )
    notices = provenance.list_notices(runs, {i: store[i].digest for i in results.ids})
    if sentence := _describe_missing_trees(cfg, store):
        notices.append(f"{sentence}.")
    if cfg.otsu and cfg.trees:
        notices += _list_otsu_differences(store, results, methods)
    for notice in notices:
        log.warning("%s", notice)

    # The page is built before anything is written, so that an error leaves no half of the tables.
    model = methods[0].seeds[0]
    hits = places.measure_hits(store, results.ids, methods[0].seeds[0], cfg.tolerance_vox) if cfg.trees else {}
    reliability = confidence.measure_reliability(cfg, store, results.ids, model) if cfg.trees else {}
    runs.append(RunRecord("evaluate", cfg.out, {**record, "end": "this report"}))
    thresholds = [methods[0].seeds[0].read_threshold(i) for i in results.ids]
    page = report_page.render_report(
        results,
        cfg,
        pictures=_draw_pictures(cfg, store, methods, results),
        training=_read_training(cfg, runs),
        runs=runs,
        notices=notices,
        reliability=reliability,
        hits=hits,
        methods=run_sections.describe_methods(results, cfg, runs, thresholds, _count_training_volumes(store, runs)),
    )

    # metrics.json first: it is what other programs wait for.
    metrics = {**build_json(results, cfg), "confidence": confidence.build_json(reliability)}
    if hits:
        metrics["proofread"] = places.build_json(hits)
    files.write_json(cfg.out / "metrics.json", metrics)
    files.write_text(cfg.out / "metrics.csv", format_csv(results, cfg))
    files.write_text(cfg.out / "metrics.tex", format_latex(results, cfg))
    files.write_text(cfg.out / "report.html", page)


def _read_training(cfg: EvaluateConfig, runs: Sequence[RunRecord]) -> list[dict[str, Any]] | None:
    """The rows of the training run's metrics.jsonl: of the config's folder, else of the run behind the predictions."""
    # A run whose folder was removed has no curves.
    behind = [r.folder for r in runs if r.verb == "train" and (r.folder / "metrics.jsonl").exists()]
    folders = [cfg.train] if cfg.train else behind
    return run_sections.read_metrics(folders[0]) if folders else None


def _count_training_volumes(store: Store, runs: Sequence[RunRecord]) -> int:
    """How many volumes of the store the training run recorded as inputs, those of its validation included."""
    # `train` records the digest of every volume it reads.
    digests = {
        sha for run in runs if run.record and run.verb == "train" for sha in run.record.get("inputs", {}).values()
    }
    return sum(volume.digest in digests for volume in store)


def _list_otsu_differences(store: Store, results: Results, methods: Sequence[Method]) -> list[str]:
    """Sentences on how the tracing of Otsu's mask differs from that of the model's probability."""
    # The comparison is fair when only the mask differs.
    model = methods[0].seeds[0]
    # A tracer that starts elsewhere leaves out other cable.
    others = [i for i in results.ids if _has_other_roots(store[i], model.read_roots(i))]
    if not others:
        return []
    return [f"Otsu's mask was traced from the store's root, the model's from others or none: {', '.join(others)}."]


def _has_other_roots(volume: StoredVolume, traced_roots: list[list[float]] | None) -> bool:
    """Whether a volume was traced from other roots than the store's; False where that is not recorded."""
    # `infer` records roots with three decimals.
    root = [] if volume.root is None else [[round(float(c), 3) for c in volume.root]]
    return traced_roots is not None and traced_roots != root


def _draw_pictures(
    cfg: EvaluateConfig, store: Store, methods: Sequence[Method], results: Results
) -> list[tuple[str, Path]]:
    """Draw the worst volumes into OUT/pictures; existing pictures are kept."""
    # Failures teach more than successes, so the worst neurons are shown.
    worst = results.rank_worst_first(cfg)[: cfg.pictures]
    pictures = []
    for volume_id in until_stopped(run_folder.track_progress(worst, "pictures", unit="picture")):
        path = cfg.out / "pictures" / f"{volume_id}.jpg"
        if not path.exists():
            with files.atomic(path) as part:
                part.write_bytes(_draw_volume(cfg, store[volume_id], methods))
        pictures.append((volume_id, path))

    return pictures


def _draw_volume(cfg: EvaluateConfig, volume: StoredVolume, methods: Sequence[Method]) -> bytes:
    prediction = methods[0].seeds[0].read(volume.id, volume.shape)
    trees = {"model": prediction.tree} if cfg.trees else {}
    if cfg.otsu and cfg.trees:
        trees["Otsu"] = trace_otsu_mask(volume, OtsuMask(volume), choose_trace_config(methods))
    return draw_picture(volume, prediction, trees, cfg.tolerance_vox, f"{volume.id}: image")
