"""Each neuron held out once: the model against tracing the raw image and against skeletonizing Otsu's mask.

    python -m tools.leave_one_out --out OUT --pairs FOLDER... [--meta FILE] [--only ID...] [--budget STEPS]
                                  [--demo KEY=VALUE ...]

FOLDERs hold image + SWC pairs of the same stem (as `hpc-neuro demo data=`); FILE is a meta.json for pairs whose folder
has none ({ID: {"voxel_size_um_xyz": [..], "root_xyz": [..]}}). For every neuron a demo trains on all others for STEPS
steps (none: the demo's own) and traces the one held out; more keys go to the demo. The baselines are given the same
root:

    raw    the normalized image, traced by our tracer with Otsu's threshold
    otsu   Otsu's mask, traced by our tracer
    thin   Otsu's mask, thinned (scikit-image, Lee 1994); the skeleton that hangs on the root, as a tree

What is done is kept: the same command goes on where it was, and prints the table of all folds that are there. Last
line: JSON; the same in OUT/leave_one_out.json.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order
from scipy.spatial import cKDTree
from skimage.morphology import skeletonize

from hpc_neuro import demo
from hpc_neuro.core import files, morphology, run_folder
from hpc_neuro.core.constants import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILURES, TOLERANCE_VOX
from hpc_neuro.core.geometry import Box
from hpc_neuro.core.image_names import is_system_file, strip_ending
from hpc_neuro.core.morphology import Tree
from hpc_neuro.core.schema import ConfigError, InputError, load
from hpc_neuro.data.store import Store, StoredVolume
from hpc_neuro.evaluate.config import EvaluateConfig
from hpc_neuro.evaluate.predictions import OtsuMask
from hpc_neuro.evaluate.verb import score_volume
from hpc_neuro.metrics.metric import tolerance_key
from hpc_neuro.tracing import TraceConfig, trace
from hpc_neuro.tracing.voxel_graph import find_neighbor_pairs

METHODS = ("model", "raw", "otsu", "thin")
_CABLE_KEYS = tuple(tolerance_key(name, TOLERANCE_VOX) for name in ("f1", "precision", "recall"))
KEYS = (*_CABLE_KEYS, "esa", f"{_CABLE_KEYS[0]}_no_stub", "esa_no_stub", "tips")
_FULL = 0.999
"""[brightness] Otsu's threshold of the normalized image is this at most."""


def main() -> int:
    """Run the folds that are missing. 3: a fold's model made no tree, so it is not in the table; 75: stopped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pairs", type=Path, nargs="+", required=True)
    parser.add_argument("--meta", type=Path)
    parser.add_argument("--only", nargs="+", default=[], help="hold out these only (all others are still trained on)")
    parser.add_argument("--budget", type=int, help="training steps of a fold")
    parser.add_argument("--demo", nargs="+", default=[], help="more key=value for the demo")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    try:
        names = link_pairs(args.pairs, args.meta, args.out / "pairs")
        if unknown := sorted(set(args.only) - set(names)):
            raise ConfigError(f"--only: there is no pair {', '.join(unknown)}; there are {', '.join(names)}")

        failed: list[str] = []
        for name in args.only or names:
            code = run_fold(name, args)
            if code == EXIT_FAILURES:
                failed.append(name)
            elif code != EXIT_DONE:
                return code
            else:
                score_baselines(args.out / name, name)
        facts = summarize(args.out, names)
    except (ConfigError, InputError) as error:
        logging.error("%s", error)
        return EXIT_BAD_INPUT

    files.write_json(args.out / "leave_one_out.json", facts)
    print("\n".join(describe(facts)))
    print(json.dumps(facts))
    if failed:
        logging.error("not in the table, since something failed (see infer/log.txt of each): %s", ", ".join(failed))
        return EXIT_FAILURES
    return EXIT_DONE


def run_fold(name: str, args: argparse.Namespace) -> int:
    """Train on all neurons but one, and trace that one; the exit code of the demo."""
    keys = [f"data={args.out / 'pairs'}", f"test=[{name}]", f"out={args.out / name}", *args.demo]
    if args.budget:
        keys.append(f"steps={args.budget}")
    return demo.run(load(demo.DemoConfig, None, keys))


def link_pairs(folders: list[Path], meta: Path | None, into: Path) -> list[str]:
    """One folder of links to all pairs, with one meta.json; the pairs' names. Raises InputError for two of one name."""
    meta_of: dict[str, Any] = files.read_json(meta, "give a file of the form of a meta.json") if meta else {}
    into.mkdir(parents=True, exist_ok=True)

    names: list[str] = []
    for folder in folders:
        if (folder / "meta.json").exists():
            meta_of = {**files.read_json(folder / "meta.json", "mend it or remove it"), **meta_of}
        for tree, image in list_pairs(folder):
            if tree.stem in names:
                raise InputError(f"{tree.stem} is in two of the folders; rename one")
            names.append(tree.stem)
            for path in (tree, image):
                link_file(path, into)

    if len(names) < 2:
        raise InputError(f"{', '.join(map(str, folders))} hold {len(names)} pairs; at least two are wanted")
    files.write_json(into / "meta.json", {name: meta_of[name] for name in names if name in meta_of})
    return names


def list_pairs(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Each tree of a folder with its image. Raises InputError for a tree with no image or several."""
    paths = [path for path in sorted(folder.iterdir()) if not is_system_file(path)]
    candidates = [path for path in paths if path.suffix not in (".swc", ".json")]
    for tree in (path for path in paths if path.suffix == ".swc"):
        images = [path for path in candidates if strip_ending(path) == tree.stem]
        if len(images) != 1:
            raise InputError(f"{tree} has {len(images)} images of its name beside it, wanted one")
        yield tree, images[0]


def link_file(path: Path, into: Path) -> None:
    """Link a file into a folder. Raises InputError where the folder links its name to another file."""
    link = into / path.name
    if not link.is_symlink():
        link.symlink_to(path.resolve())
    elif link.resolve() != path.resolve():
        raise InputError(f"{into} was made of {link.resolve()}, not of {path}; give another --out")


def score_baselines(fold: Path, name: str) -> None:
    """Score what needs no training on the neuron held out, into FOLD/baselines.json, unless that is there.

    It is traced with the settings of the model's tree, and again when these have changed.
    """
    path = fold / "baselines.json"
    settings = run_folder.read_record(fold / "infer", "run the fold again")["config"]["trace"]
    if path.exists() and files.read_json(path, f"remove {path}").get("trace") == settings:
        return

    volume = Store(fold / "store")[name]
    otsu = OtsuMask(volume)
    whole = Box.whole(volume.shape)
    mask, image = otsu.mask(whole), volume.normalized_image(whole)

    # The normalized image serves as a probability; Otsu's threshold parts it as it does the raw one.
    level = float(np.clip(image[mask].min() if mask.any() else 1.0, 1e-3, _FULL))
    keys = [f"{k}={json.dumps(v)}" for k, v in settings.items() if k not in ("threshold", "low")]
    trees = {
        "raw": _trace_from_root(image, image, volume, load(TraceConfig, None, [*keys, f"threshold={level}"])),
        "otsu": _trace_from_root(mask, image, volume, load(TraceConfig, None, keys)),
        "thin": thin_mask(mask, volume.root),
    }

    cfg = load(EvaluateConfig, None, [f"store={fold / 'store'}", f"predictions={fold / 'infer'}", f"out={fold}"])
    all_scores = {method: score_volume(volume, otsu.mask, tree, cfg) for method, tree in trees.items()}
    scores = {method: {key: row[key] for key in KEYS} for method, row in all_scores.items()}
    files.write_json(path, {"trace": settings, **scores})


def _trace_from_root(
    probability: NDArray[Any], image: NDArray[np.float32], volume: StoredVolume, cfg: TraceConfig
) -> Tree:
    """The tree from the neuron's root, an empty one where nothing can be traced from it."""
    if volume.root is None:
        raise InputError(f"{volume.id} has no root, and all methods begin there; give root_xyz in the meta file")

    try:
        return trace(probability, volume.voxel_size, roots=[volume.root], cfg=cfg, image=image)[0]
    except InputError as error:
        logging.warning("%s: counts as a miss: %s", volume.id, error)
        return morphology.empty_tree()


def thin_mask(mask: NDArray[np.bool_], root: tuple[float, float, float] | None) -> Tree:
    """The skeleton of a mask [Z, Y, X] as a tree in voxels: what hangs on the voxel nearest to `root`."""
    voxels = np.argwhere(skeletonize(mask)).astype(np.int32)
    if not len(voxels) or root is None:
        return morphology.empty_tree()

    z, y, x = mask.shape
    pairs, step = find_neighbor_pairs(voxels, (z, y, x), np.ones(3))
    graph = csr_array((step, (pairs[:, 0], pairs[:, 1])), shape=(len(voxels),) * 2)

    start = int(cKDTree(voxels).query(root)[1])
    order, above = breadth_first_order(graph, start, directed=False)

    rank = np.empty(len(voxels), dtype=np.int64)
    rank[order] = np.arange(len(order))
    parents = np.concatenate([[-1], rank[above[order[1:]]]]).astype(np.int64)
    return morphology.build_tree(voxels[order].astype(np.float64), parents)


def summarize(out: Path, names: list[str]) -> dict[str, Any]:
    """The scores of the folds that are done, with their means. Raises InputError for folds of different settings."""
    folds, configs = {}, dict[str, Any]()
    for name in names:
        if not (out / name / "baselines.json").exists():
            continue
        config = run_folder.read_record(out / name, "run the fold again")["config"]
        configs[name] = {key: value for key, value in config.items() if key not in ("test", "data")}
        first = next(iter(configs))
        if other := run_folder.differences(configs[name], configs[first]):
            raise InputError(
                f"the folds {first} and {name} were made otherwise and have no mean ({'; '.join(other)}); "
                "give another --out"
            )

        model = files.read_json(out / name / "metrics.json", "run the fold again")
        scores = {"model": model["volumes"][name]["model"], **files.read_json(out / name / "baselines.json", "")}
        folds[name] = {method: {key: scores[method][key] for key in KEYS} for method in METHODS}
        folds[name]["gold"] = {"tips": model["gold"][name]["tips"]}

    if not folds:
        return {"folds": {}, "mean": {}}
    mean = {
        method: {key: round(float(np.mean([fold[method][key] for fold in folds.values()])), 4) for key in KEYS}
        for method in METHODS
    }
    return {"folds": folds, "mean": mean}


def describe(facts: dict[str, Any]) -> Iterator[str]:
    """The table for people."""
    yield f"{'held out':>16} {'method':>6} " + " ".join(f"{key:>16}" for key in KEYS)
    for name, fold in facts["folds"].items():
        for method in METHODS:
            cells = [f"{fold[method][key]:16.3f}" for key in KEYS[:-1]]
            tips = f"{fold[method]['tips']:.0f}/{fold['gold']['tips']:.0f}"
            yield f"{name:>16} {method:>6} " + " ".join(cells) + f" {tips:>16}"
    for method, row in facts["mean"].items():
        yield f"{'mean':>16} {method:>6} " + " ".join(f"{row[key]:16.3f}" for key in KEYS)


if __name__ == "__main__":
    raise SystemExit(main())
